"""Check files against the SHA-256 that was recorded when they were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.checkpoint.recorded_files import sha256_of
from compress.errors import VerificationError
from compress.report.redaction import LOCAL
from compress.system.files import sha256
from compress.system.progress import Progress

SUMMARY = "summary.json"
EXPORTED = "export.json"
# Written after the checksums, rewritten by an evaluation, or only for this machine.
_UNCHECKED = (SUMMARY, EXPORTED, "evaluation.json", "README.md", "report.html", LOCAL)
SHOWN = 8  # problems in a message


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint that a run writes once and for all, by its path within the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {name: sha256(folder / name) for name in names if name not in _UNCHECKED}


def changed(folder: Path, files: Mapping[str, str], progress: Progress) -> list[str]:
    """Say which files differ from what was recorded, and where their content is found under another name."""
    found: dict[str, str | None] = {}
    for number, name in enumerate(files):
        progress(1, 1, "checksums", number / len(files))
        found[name] = sha256_of(folder, name)
    # Files that weights are read from must be recorded; other files added to the folder do no harm.
    weights = [p.name for kind in ("*.safetensors*", "*.gguf") for p in sorted(folder.glob(kind)) if p.name not in files]
    strange = {name: sha256_of(folder, name) for name in weights}
    where = {digest: name for name, digest in ({n: d for n, d in found.items() if d is not None} | strange).items()}
    problems = []
    for name, digest in files.items():
        got = found[name]
        if got == digest:
            continue
        other = where.get(digest)
        if got is None:
            what = f"is missing, and {other} has its content: it was renamed" if other else "is missing"
        elif other is not None:
            what = f"has not its own content; {other} has it: files were swapped"
        else:
            size = (folder / name).stat().st_size
            what = f"was changed since it was written (SHA-256 of its {size} bytes is {got}; recorded is {digest})"
        problems.append(f"{name} {what}")
    problems += [f"{name} is a file of weights that was not recorded" for name in strange if strange[name] not in files.values()]
    return problems


def refuse(folder: Path, problems: list[str]) -> None:
    """Raise VerificationError where there are problems, with the first of them."""
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        raise VerificationError(f"{folder}: not what was written; fetch these files again:{listed}{more}")
