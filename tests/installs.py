"""Whether what `make dist` has built installs where there is nothing, and each extra by itself.

    python tests/installs.py dist --environment <folder> --constraint constraints.txt

The wheel goes into an environment of its own, which --environment keeps for the next time; there, without git, each of
its commands shows its help in an empty folder, and one refuses. Then pip says what each extra would install beside it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with the wheel")
    parser.add_argument("--environment", type=Path, required=True, help="made where it is not there")
    parser.add_argument("--constraint", type=Path, help="file of versions")
    asked = parser.parse_args()
    (wheel,) = asked.dist.absolute().glob("*.whl")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    programs = asked.environment.absolute() / "bin"
    if not programs.exists():
        subprocess.run([sys.executable, "-m", "venv", asked.environment], check=True)
    # No git, no compiler, nothing of this machine's.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
        "PATH": str(programs)
    }
    pip = [programs / "python", "-m", "pip", "install", "--quiet"]
    pip += ["--constraint", asked.constraint.absolute()] if asked.constraint else []
    failed = []

    def check(what: str, command: list, expected: int = 0) -> None:
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(command, cwd=empty, env=alone, capture_output=True, text=True)
            left = os.listdir(empty)
        good = done.returncode == expected and not left
        said = "" if good else f": exit {done.returncode}, left {left}: {(done.stderr or done.stdout).strip()[-500:]}"
        print(f"{what}: {'works' if good else 'FAILED'}{said}", flush=True)
        failed.extend([] if good else [what])

    check(wheel.name, [*pip, "--no-compile", "--force-reinstall", "--no-deps", wheel])
    check("its dependencies", [*pip, "--no-compile", wheel])
    for name in project["scripts"]:
        check(f"{name} --help", [programs / name, "--help"])
    check("rlhf-dpo modle=x, a refusal", [programs / "rlhf-dpo", "modle=x"], expected=2)
    for extra in project["optional-dependencies"]:
        check(f"[{extra}]", [*pip, "--dry-run", f"{wheel}[{extra}]"])
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
