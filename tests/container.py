"""The steps of the Dockerfile in a clean root folder, where no container engine is at hand.

    python tests/container.py <root> --build-arg TORCH_INDEX=<index of CPU builds> [--cmd]

debootstrap makes the root, a Debian with nothing else in it, in place of the image in FROM; the rest is carried out as
the Dockerfile says it, by its users, in a chroot with mounts and processes of its own, which root alone may do. Then
this looks at what has come of it, and runs a command's help and a short training there; --cmd runs CMD, too. A step
that is done is not done again (<root>.steps tells), whatever has become of the files it took: remove both to start
anew.

What pip and apt are told here (settings, certificates, proxies) they are told there; --mount shows the root a folder
that such settings name. Not shown by it: layers and volumes, another base, an image with CUDA.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1]
sys.path.insert(0, str(SOURCE))

from rlhf_recipes import secrets  # noqa: E402 - of this tree, wherever it is started

TOLD = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/xdg/pip", "etc/apt/apt.conf.d",
        "etc/ssl/certs/ca-certificates.crt")  # fmt: skip
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OF_AN_ENGINE = ("FROM", "VOLUME", "CMD")
# A namespace of mounts, which go with the process that has it: $1 is the root, $2 the number of folders to show it.
MOUNTS = """
set -e; root=$1; shown=$2; shift 2
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
while [ "$shown" -gt 0 ]; do mkdir -p "$root$1"; mount -o bind,ro "$1" "$root$1"; shift; shown=$((shown - 1)); done
exec "$@"
"""
SHORT = "data.train_size=4 data.eval_size=2 trainer.max_steps=2"
# By the user of the image, as its commands are: what is asked, and a command that fails where it is not so.
LOOKS = {
    "the user is not root": 'test "$(id -u)" != 0 && test "$(id -g)" != 0',
    "none of the code can be written": 'test -z "$(find . -path ./outputs -prune -o ! -type l -writable -print)"',
    "outputs and cache can": "test -w outputs && test -w /cache",
    "the demo would install nothing": "make --question .venv/demo",
    "a command answers": "rlhf-dpo --help > /dev/null",
    "a short training ends": f"rlhf-dpo run_name=container overwrite=true {SHORT}",
    "and has left an adapter": "test -s outputs/dpo/container/adapter/adapter_model.safetensors",
}
# Folders of version control, and files in which secrets are kept.
KEPT_OUT = (".git", ".hg", ".svn", ".env", ".netrc", ".pypirc", "id_rsa", "id_ed25519", "token")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, what follows it) of a Dockerfile, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", dockerfile)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    words = [line.strip().partition(" ") for line in lines]
    return [(step.upper(), given.strip()) for step, _, given in words if step]


def left_out(path: str, ignored: list[str]) -> bool:
    """Whether an engine would not see this path of the folder.

    Args:
        ignored: lines of .dockerignore. The last that matches the path or a folder above it says so.
    """
    above = ["/".join(path.split("/")[:end]) for end in range(1, path.count("/") + 2)]
    out = False
    for line in ignored:
        pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, part) for part in above):
            out = not line.startswith("!")
    return out


def copy(source: Path, name: str, target: Path) -> None:
    """A file or folder of the source, less what .dockerignore says."""
    ignored = [line for line in (source / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def unseen(folder, names):
        inside = Path(folder).relative_to(source)
        return [each for each in names if left_out(str(inside / each), ignored)]

    if left_out(name, ignored):
        sys.exit(f"COPY {name}: .dockerignore leaves it out.")
    if (source / name).is_dir():
        shutil.copytree(source / name, target, dirs_exist_ok=True, ignore=unseen)
    else:
        shutil.copy(source / name, target)


class Root:
    """A folder that passes for the root of a machine, and what the Dockerfile has said up to here."""

    def __init__(self, folder: Path, arguments: dict[str, str], shown: list[str]):
        self.folder, self.arguments, self.shown = folder, arguments, shown
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
            known = self.environment()
            for each in shlex.split(given):
                name, _, value = each.partition("=")
                self.settings[name] = string.Template(value).safe_substitute(known)
        elif step == "USER":
            self.user = given
        elif step == "WORKDIR":
            self.workdir = given
            self.inside(given).mkdir(parents=True, exist_ok=True)
        elif step == "COPY" and not again:
            *sources, to = shlex.split(given)
            for name in sources:
                copy(SOURCE, name, self.inside(to) / name if to.endswith("/") else self.inside(to))
        elif step == "RUN" and not again:
            print(f"# {given}", flush=True)
            if self.run(given):
                sys.exit("This step failed; the same command goes on with it.")
        elif step not in (*OF_AN_ENGINE, "COPY", "RUN"):
            sys.exit(f"{step} {given}: an instruction that this program does not know.")

    def inside(self, path: str) -> Path:
        return self.folder / os.path.join(self.workdir, path).lstrip("/")

    def run(self, command: str) -> int:
        """Exit status of a command of the user that the Dockerfile has named last, in its folder."""
        namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", MOUNTS, "mounts"]
        there = ["chroot", f"--userspec={self.user}", self.folder, "/bin/sh", "-c"]
        arguments = [self.folder, str(len(self.shown)), *self.shown, *there, f"cd {self.workdir} && {command}"]
        return subprocess.run([*namespace, *arguments], env=self.environment()).returncode


def make(folder: Path, suite: str, mirror: list[str]) -> None:
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", "--include=ca-certificates"]
    command += [suite, folder, *mirror]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name in TOLD:
        source, target = Path("/", name), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, target)


def kept_out(folder: Path, held: list[str]) -> list[str]:
    """What an image shall not have: names that are KEPT_OUT, and files with one of these secrets."""
    names = [part for name in KEPT_OUT for part in ("-o", "-name", name)][1:]
    done = subprocess.run(["find", folder, "-xdev", *names], check=True, capture_output=True, text=True)
    found = done.stdout.splitlines()
    if held:
        search = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", "--file=-", folder]
        done = subprocess.run(search, input="\n".join(held), capture_output=True, text=True)
        found += done.stdout.splitlines()
    return found


def look(root: Root, cmd: str | None) -> list[str]:
    """What is not as it should be of an image that is built."""
    failed = []

    def say(what: str, good: bool) -> None:
        print(f"{what}: {'yes' if good else 'NO'}", flush=True)
        failed.extend([] if good else [what])

    held = list(secrets.in_environment())
    unwanted = kept_out(root.folder, held)
    say(f"no history, none of {len(held)} secrets of this environment{': ' * bool(unwanted)}{' '.join(unwanted[:5])}",
        not unwanted)  # fmt: skip
    for what, command in LOOKS.items():
        say(what, root.run(command) == 0)
    if cmd:
        say(f"CMD ends ({cmd})", root.run(cmd) == 0)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to make, or to go on with")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    parser.add_argument("--mount", action="append", default=[], metavar="FOLDER", help="shown to the root, as it is")
    parser.add_argument("--suite", default="bookworm", help="of Debian")
    parser.add_argument("--mirror", nargs=1, default=[], help="of Debian's packages")
    parser.add_argument("--cmd", action="store_true", help="run CMD in the end: the demo, 12 minutes of 2 cores")
    asked = parser.parse_args()
    folder = asked.root.absolute()
    record = folder.with_name(f"{folder.name}.steps")
    if not record.exists():
        make(folder, asked.suite, asked.mirror)
        record.write_text("[]")
    root = Root(folder, dict(each.split("=", 1) for each in asked.build_arg), asked.mount)
    steps = instructions((SOURCE / "Dockerfile").read_text())
    done = json.loads(record.read_text())
    if done != [list(step) for step in steps[: len(done)]]:
        sys.exit(f"{folder}: made by another Dockerfile. Remove it and {record.name}.")
    for place, (step, given) in enumerate(steps, 1):
        root.do(step, given, again=place <= len(done))
        record.write_text(json.dumps(steps[: max(place, len(done))]))
    (cmd,) = (json.loads(given) for step, given in steps if step == "CMD")
    failed = look(root, shlex.join(cmd) if asked.cmd else None)
    sys.exit(f"not so: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
