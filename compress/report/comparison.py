"""`compress compare`: several checkpoints on one page, divergence against size, and which of them no other beats in both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.system.side_files import read_json_lines, read_object


@dataclass(frozen=True)
class Entry:
    """A checkpoint in a comparison."""

    name: str
    folder: str
    base: str
    bytes: int
    bits_per_weight: float
    bits_per_compressed_weight: float
    methods: list[str]
    seconds: float
    perplexity: float | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    agreement: float | None = None
    ids_sha256: str | None = None
    best: bool = False  # no other is both smaller and nearer to the original

    def plain(self) -> dict[str, Any]:
        """The entry as JSON values."""
        return dict(self.__dict__)


def _read(folder: Path) -> Entry:
    try:
        summary = read_object(folder / "summary.json")
        measured = folder / "evaluation.json"
        e = read_object(measured) if measured.is_file() else {}
        methods = sorted({str(row["method"]) for row in read_json_lines(folder / "report.jsonl")})
        interval = e.get("kl_interval")
        return Entry(
            folder.resolve().name,
            str(folder),
            str(summary["base_model"]),
            int(summary["bytes_after"]),
            float(summary["bits_per_weight"]),
            float(summary["bits_per_compressed_weight"]),
            methods,
            float(summary["seconds"]),
            e.get("perplexity"),
            e.get("kl"),
            (interval[0], interval[1]) if interval else None,
            e.get("agreement"),
            e.get("ids_sha256"),
        )
    except (CheckpointError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); expected a checkpoint that compress wrote") from error


def entries(folders: list[Path]) -> list[Entry]:
    """Read checkpoints in order of size and mark those of the front. Raises CheckpointError."""
    found = sorted((_read(folder) for folder in folders), key=lambda entry: (entry.bytes, entry.name))
    measured = [entry for entry in found if entry.kl is not None]

    def beaten(entry: Entry) -> bool:
        assert entry.kl is not None
        return any(
            o.kl is not None and o.bytes <= entry.bytes and o.kl <= entry.kl and (o.bytes, o.kl) != (entry.bytes, entry.kl)
            for o in measured
        )

    return [Entry(**{**e.__dict__, "best": e.kl is not None and not beaten(e)}) for e in found]


def notices(found: list[Entry]) -> list[str]:
    """What makes a comparison unfair or incomplete, in sentences."""
    said = []
    if missing := [entry.name for entry in found if entry.kl is None]:
        said.append(
            f"No divergence was measured for {', '.join(missing)}: compress eval OUT --original MODEL --data TEXT --save."
        )
    if len({entry.base for entry in found}) > 1:
        said.append(f"They were made from different models: {', '.join(sorted({entry.base for entry in found}))}.")
    if len({entry.ids_sha256 for entry in found if entry.ids_sha256}) > 1:
        said.append("They were measured on different text, so that divergences cannot be compared.")
    return said
