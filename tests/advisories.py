"""Known faults of the packages that constraints.txt pins, as far as the package index tells: `make advisories`.

pip-audit asks the index for each version; it is installed beside the environment, not into it. Where there is no
network, or the index has no advisories, that is said, and nothing fails. `make lint` shows the same and never fails by
it: what was found out this morning is no fault of a change.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
TOOL = Path(sys.prefix) / "pip-audit"
SECONDS = 300  # for all of it; a firewall that drops what it does not know is waited for
# Advisory -> why it does not reach what runs here.
ACCEPTED: dict[str, str] = {}


def found(report: dict) -> list[str]:
    """A line for each advisory that is not accepted.

    Args:
        report: of `pip-audit --format json`.
    """
    lines = []
    for package in report["dependencies"]:
        for each in package.get("vulns", ()):
            names = [each["id"], *each.get("aliases", ())]
            if not ACCEPTED.keys() & set(names):
                mended = ", ".join(each.get("fix_versions", ())) or "no release"
                lines.append(f"advisories: {package['name']} {package['version']}: {names[0]}, mended in {mended}")
    return lines


def skipped(report: dict) -> list[str]:
    """Packages of which the index says nothing."""
    return [package["name"] for package in report["dependencies"] if "skip_reason" in package]


def ask() -> tuple[dict | None, str]:
    """pip-audit's report, or None and why there is none."""
    if not TOOL.is_dir():
        plainly = ("--quiet", "--no-compile", "--retries", "0")
        done = _run("-m", "pip", "install", *plainly, "--target", str(TOOL), "pip-audit")
        if done is None or done.returncode:
            return None, "pip-audit cannot be installed from here"
    start = f"import sys; sys.path.insert(0, {str(TOOL)!r}); from pip_audit._cli import audit; audit()"
    plain = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")
    done = _run("-c", start, "--requirement", str(PINS), *plain)
    try:
        return json.loads(done.stdout), ""
    except (ValueError, AttributeError):
        said = done.stderr.strip().splitlines() if done else []
        return None, f"the index does not answer ({said[-1][:120] if said else 'no answer in time'})"


def _run(*arguments: str) -> subprocess.CompletedProcess | None:
    try:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None


def main() -> int:
    report, why = ask()
    if report is None:
        print(f"advisories: not looked at, {why}.")
        return 0
    lines, unknown = found(report), skipped(report)
    if len(unknown) == len(report["dependencies"]):  # a mirror, which has the packages alone
        print(f"advisories: not looked at, the index tells of none of {len(unknown)} packages.")
        return 0
    print(*lines, sep="\n", end="\n" if lines else "")
    accepted = f"; {len(ACCEPTED)} accepted, see tests/advisories.py" if ACCEPTED else ""
    silent = f"; nothing is known of {', '.join(unknown)}" if unknown else ""
    print(f"advisories: {len(lines)} of {len(report['dependencies'])} packages of constraints.txt{accepted}{silent}.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
