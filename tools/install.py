"""Install compress into the environment of the Python that runs this file; arguments name extras (`dev`, `eval`).

On Linux the torch of PyPI brings gigabytes of CUDA libraries, and a range such as `torch>=2.6` takes the newest release.
So torch goes first, in the version that constraints.txt pins and the build that this machine can use, and everything else
is installed against it. `--dry-run` prints the choice and installs nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYTORCH = "https://download.pytorch.org/whl"


class Source(NamedTuple):
    """One way to get torch: a requirement, and the index that has it (None: wherever pip is set up to look)."""

    requirement: str
    url: str | None = None
    warning: str = ""


def output(*command: str) -> str:
    """Return what a command prints, or nothing when it is not there, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def parse_cuda(listing: str, banner: str) -> int | None:
    """Return 12 or 13, the CUDA that the driver takes, from what `nvidia-smi -L` and `nvidia-smi` print; None: no usable GPU."""
    if not re.search(r"^GPU \d+:", listing, flags=re.MULTILINE):
        return None
    found = re.search(r"CUDA(?: UMD)? Version:\s*(\d+)", banner)  # "CUDA UMD Version" from driver 610 on
    major = int(found[1]) if found else 13  # only a driver newer than this line words it differently
    return min(major, 13) if major >= 12 else None


def sources(version: str, cuda: int | None, platform: str) -> list[Source]:
    """Return where to look for torch, best first.

    A build for one platform carries a local tag (`2.13.0+cpu`), which PyPI does not allow: asking for the tag finds a CPU
    wheel in a mirror or a `find-links` folder, or fails at once without a download. `===` compares the whole string. It
    refuses such a wheel, which `==` prefers, and gets the untagged build of PyPI, for Linux the one with CUDA 13.
    """
    plain = Source(f"torch=={version}")
    if platform == "darwin":
        return [plain]  # macOS has one build
    tag = {None: "cpu", 12: "cu126", 13: "cu130"}[cuda]
    first = [Source(f"torch==={version}")] if cuda == 13 else []
    tagged = f"torch=={version}+{tag}"
    warning = f"no {tag} build of torch found: taking the default one, which may " + (
        "need a newer driver to see the GPU" if cuda else "bring CUDA libraries that this machine cannot use"
    )
    return [*first, Source(tagged), Source(tagged, f"{PYTORCH}/{tag}"), plain._replace(warning=warning)]


def fits(version: str, cuda: int | None) -> bool:
    """Say whether the torch that is already here has this version and, where there is a GPU, can use it."""
    found = output(sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda)").split()
    return bool(found) and found[0].partition("+")[0] == version and (not cuda or found[1].startswith(str(cuda)))


def pip(*arguments: str, show_errors: bool = True) -> str | None:
    """Run `pip install`; return None on success, else the error text (empty if it was shown)."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, stderr=None if show_errors else subprocess.PIPE, text=True, check=False)
    return None if result.returncode == 0 else (result.stderr or "")


def install_torch(choices: list[Source]) -> None:
    """Install torch from the first source that has it, without its dependencies (the project's own install adds them)."""
    errors = ""
    for choice in choices:
        print(f"torch: trying {choice.requirement} from {choice.url or 'the sources that pip is set up for'}", flush=True)
        if choice.warning:
            print(f"warning: {choice.warning}", file=sys.stderr, flush=True)
        # A network that blocks the index should cost seconds; pip's defaults make it minutes.
        index = ["--index-url", choice.url, "--timeout", "15", "--retries", "2"] if choice.url else []
        error = pip("--no-deps", choice.requirement, *index, show_errors=False)
        if error is None:
            return
        errors += error
    raise SystemExit(f"{errors}\ntorch could not be installed from any of these; is there a network?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml to install as well")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    options = parser.parse_args()

    pin = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(), flags=re.MULTILINE)
    if not pin:
        raise SystemExit(f"{CONSTRAINTS}: found no line torch==VERSION; add one")
    cuda = parse_cuda(output("nvidia-smi", "-L"), output("nvidia-smi"))
    print(f"GPU: {f'yes, the driver takes CUDA {cuda}' if cuda else 'none'}", flush=True)

    choices = [] if fits(pin[1], cuda) else sources(pin[1], cuda, sys.platform)
    extras = ",".join([*options.extras, *([f"cuda{cuda}"] if cuda else [])])
    project = f"{ROOT}[{extras}]" if extras else str(ROOT)
    if options.dry_run:
        print(*choices, project, sep="\n")
        return
    if choices:
        install_torch(choices)
    if pip("--constraint", str(CONSTRAINTS), "--editable", project) is not None:
        raise SystemExit("the install failed; pip says why above")


if __name__ == "__main__":
    main()
