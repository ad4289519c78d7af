"""The steps of the Dockerfile in a clean root folder, where no container engine is at hand.

    python tests/container.py <root> --build-arg TORCH_INDEX= --command "make test"

debootstrap makes the root, a Debian with nothing else in it, in place of the image in FROM; the rest is carried out as
the Dockerfile says it, by its users, in a chroot, which root alone may do. What is done is not done again: the file
<root>.steps counts. What pip and apt are told here (settings, certificates, proxies) they are told there; --mount
shows the root a folder that such settings name. Not shown by it: layers and volumes, an image with CUDA.
"""

import argparse
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

SOURCE = Path(__file__).parents[1]
TOLD = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/xdg/pip", "etc/apt/apt.conf.d",
        "etc/ssl/certs/ca-certificates.crt")  # fmt: skip
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OF_AN_ENGINE = ("FROM", "VOLUME", "CMD")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, what follows it) of a Dockerfile, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", dockerfile)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    words = [line.strip().partition(" ") for line in lines]
    return [(step.upper(), given.strip()) for step, _, given in words if step]


class Root:
    """A folder that passes for the root of a machine, and what the Dockerfile has said up to here."""

    def __init__(self, folder: Path, arguments: dict[str, str]):
        self.folder, self.arguments = folder, arguments
        self.user, self.workdir, self.settings = "0", "/", {"PATH": PATH, "HOME": "/root"}

    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if re.match(r"PIP_|\w+_proxy$", name)}
        return ours | self.arguments | self.settings

    def do(self, step: str, given: str, again: bool) -> None:
        """Carry out an instruction; where it was done before, only remember what it says of later ones."""
        if step == "ARG":
            name, _, value = given.partition("=")
            self.arguments.setdefault(name, value)
        elif step == "ENV":
            for each in shlex.split(given):
                name, _, value = each.partition("=")
                self.settings[name] = string.Template(value).safe_substitute(self.environment())
        elif step == "USER":
            self.user = given
        elif step == "WORKDIR":
            self.workdir = given
            self.inside(given).mkdir(parents=True, exist_ok=True)
        elif step == "COPY" and not again:
            self.copy(given)
        elif step == "RUN" and not again:
            self.run(given)
        elif step not in (*OF_AN_ENGINE, "COPY", "RUN"):
            sys.exit(f"{step} {given}: an instruction that this program does not know.")

    def inside(self, path: str) -> Path:
        return self.folder / os.path.join(self.workdir, path).lstrip("/")

    def copy(self, given: str) -> None:
        options, (*sources, to) = [], shlex.split(given)
        while sources[0].startswith("--"):
            options.append(sources.pop(0))
        for name in sources:
            source, target = SOURCE / name, self.inside(to)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target = target / name if to.endswith("/") else target
                shutil.copy(source, target)
            for owner in (option.partition("=")[2] for option in options if option.startswith("--chown=")):
                subprocess.run(["chown", "-R", owner, target], check=True)

    def run(self, command: str) -> None:
        print(f"# {command}", flush=True)
        inside = f"cd {shlex.quote(self.workdir)} && {command}"
        spec = [f"--userspec={self.user}:{self.user}"] if self.user != "0" else []
        subprocess.run(["chroot", *spec, self.folder, "/bin/sh", "-c", inside], env=self.environment(), check=True)


def make(folder: Path, suite: str, mirror: list[str]) -> None:
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", suite, folder, *mirror]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name in TOLD:
        source, target = Path("/", name), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, target)


def mounted(folder: Path, folders: list[str]) -> Iterator[list]:
    """Commands that mount what a step needs."""
    for source in folders:
        target = folder / source.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        yield ["mount", "--bind", source, target]
    yield ["mount", "-t", "proc", "proc", folder / "proc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to make, or to go on with")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    parser.add_argument("--mount", action="append", default=[], metavar="FOLDER", help="shown to the root, as it is")
    parser.add_argument("--suite", default="bookworm", help="of Debian")
    parser.add_argument("--mirror", nargs=1, default=[], help="of Debian's packages")
    parser.add_argument("--command", help="to run in the end, in place of CMD")
    asked = parser.parse_args()
    folder, counted = asked.root.absolute(), asked.root.absolute().with_suffix(".steps")
    if not counted.exists():
        make(folder, asked.suite, asked.mirror)
        counted.write_text("0")
    root = Root(folder, dict(each.split("=", 1) for each in asked.build_arg))
    steps = instructions((SOURCE / "Dockerfile").read_text())
    with ExitStack() as stack:
        for command in mounted(folder, ["/dev", *asked.mount]):
            subprocess.run(command, check=True)
            stack.callback(subprocess.run, ["umount", command[-1]])
        done = int(counted.read_text())
        for place, (step, given) in enumerate(steps, 1):
            root.do(step, given, again=place <= done)
            counted.write_text(str(max(place, done)))
        command = next(given for step, given in reversed(steps) if step == "CMD")
        root.run(asked.command or re.sub(r'[\[\]",]', "", command))


if __name__ == "__main__":
    main()
