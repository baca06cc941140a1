"""The job folder: what a run has done so far, so that it can be killed at any moment and run again.

    JOB/job.json        identity: every field that decides the result
    JOB/recipe.yaml     the effective recipe
    JOB/journal.jsonl   one line per finished block: the only truth about progress
    JOB/parts/          packed tensors of finished blocks
    JOB/hidden/         hidden states after some of them
    JOB/checkpoint/     the result while it is being written

A block is done when its line is in the journal, whole; anything newer than the journal is removed on the next start.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError, OutputError, ResumeError
from compress.system.files import fsync_folder, locked, remove_folder, sha256, write_json, write_text, writing
from compress.system.side_files import parse_json, read_json, read_side_file

_MARKER = "job.json"
_MAX_JOURNAL = 1 << 30  # bytes; a model of 60,000 experts has a journal of 60 MB
_FIRST = {_MARKER, "lock", "recipe.yaml", "parts", "hidden"}  # what a folder may hold before its marker is there


@dataclass(frozen=True)
class Record:
    """One finished block."""

    block: int  # the head is the block after the last
    parts: dict[str, str] = field(default_factory=dict)  # file name -> SHA-256
    hidden: dict[str, str] = field(default_factory=dict)  # files of hidden states after it -> SHA-256
    rows: list[dict[str, Any]] = field(default_factory=list)  # report rows of its sites
    seconds: float = 0.0
    difference: float | None = None  # of the held-out windows' hidden states from the original's, over their norm
    largest: dict[str, Any] | None = None  # value of the hidden states that entered it: value, median, channel, position, token

    @classmethod
    def parse(cls, values: Any) -> Record:
        """Read a record back from JSON values. Raises CheckpointError where they are none."""
        whole = isinstance(values, dict) and values.keys() <= {f.name for f in fields(cls)} and type(values.get("block")) is int
        if whole:
            record = cls(**values)
            parts = record.parts, record.hidden
            names = all(isinstance(found, dict) and all(isinstance(d, str) for d in found.values()) for found in parts)
            rows = isinstance(record.rows, list) and all(isinstance(row, dict) for row in record.rows)
            if names and rows and all(Path(name).name == name for found in parts for name in found):
                return record
        raise CheckpointError("a line of a journal is not a record; the job begins again before it")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": [{"b": 1}]} -> {"a.0.b": 1}: the fields of an identity, so that the one that differs can be named."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list) and value:
        pairs = dict(enumerate(value)).items()
    else:
        return {prefix: value}
    return {k: v for key, inner in pairs for k, v in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}


class Job:
    """A folder that belongs to one job; only rank 0 writes to the journal."""

    def __init__(self, folder: Path, records: list[Record]) -> None:
        self.folder = folder
        self.records = records
        self._lock: Any = None

    @property
    def parts(self) -> Path:
        """Where packed tensors are."""
        return self.folder / "parts"

    @property
    def hidden(self) -> Path:
        """Where hidden states are."""
        return self.folder / "hidden"

    @property
    def checkpoint(self) -> Path:
        """Where the result is written before it gets its name."""
        return self.folder / "checkpoint"

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], recipe: str, owner: bool = True) -> Job:
        """Create the folder, or go on with the job that it holds. Only the owner (rank 0) writes; others open after it did.

        Raises ResumeError when it holds another job or another run is at work in it, OutputError when it is not a job's folder.
        """
        job = cls(folder, [])
        if owner:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                job._own()
                for inside in (job.parts, job.hidden):
                    inside.mkdir(exist_ok=True)
            if not (folder / _MARKER).exists():
                write_text(folder / "recipe.yaml", recipe)
                write_json(folder / _MARKER, identity)
        _compare(folder, identity)
        job.records = _read_journal(folder / "journal.jsonl", owner)
        if owner:
            job._clean()
        return job

    def _own(self) -> None:
        """Take the folder, if it is a job's or may become one, and keep other runs out of it."""
        names = [path.name.partition(".tmp-")[0] for path in self.folder.iterdir()]
        foreign = sorted(set(names) - _FIRST)
        if _MARKER not in names and foreign:
            raise OutputError(f"{self.folder}: holds {foreign[0]!r} and is not a job folder; choose another place, or remove it")
        try:
            self._lock = locked(self.folder / "lock")
        except BlockingIOError as error:
            raise ResumeError(f"{self.folder}: another run is at work in this job folder; wait for it, or stop it") from error

    def _clean(self) -> None:
        """Remove what is newer than the journal."""
        known = {name for record in self.records for name in record.parts}
        for path in self.parts.iterdir():
            if path.name not in known:
                path.unlink()
        latest = max((r.block for r in self.records if r.hidden), default=-1)
        for path in self.hidden.iterdir():
            if not path.name.startswith(f"after-{latest:05d}."):
                path.unlink()
        for path in self.folder.glob("*.tmp-*"):
            path.unlink()
        if self.checkpoint.exists():
            shutil.rmtree(self.checkpoint)

    def commit(self, record: Record) -> None:
        """Note a finished block, durably: its parts must be on disk already."""
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        path = self.folder / "journal.jsonl"
        with writing(path), path.open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
        fsync_folder(self.folder)
        self.records.append(record)
        self.forget_hidden(record)

    def forget_hidden(self, record: Record) -> None:
        """Remove hidden states that a later record has made useless."""
        if record.hidden:
            for path in self.hidden.iterdir():
                if not path.name.startswith(f"after-{record.block:05d}."):
                    path.unlink(missing_ok=True)

    def check_parts(self) -> None:
        """Compare the parts on disk with the journal. Raises CheckpointError."""
        for record in self.records:
            for name, digest in record.parts.items():
                path = self.parts / name
                if not path.exists() or sha256(path) != digest:
                    raise CheckpointError(
                        f"{path}: missing or changed since it was written; remove {self.folder} and start again"
                    )

    def remove(self) -> None:
        """Remove the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        remove_folder(self.folder, _MARKER)


def remove_leftover(folder: Path, identity: dict[str, Any]) -> None:
    """Remove the folder of a job that was killed after its result had got its name; any other folder is left alone."""
    if not folder.is_dir():
        return
    try:
        recorded = read_json(folder / _MARKER)
    except CheckpointError:
        recorded = None
    if recorded == identity or {path.name for path in folder.iterdir()} <= {"lock"}:
        with writing(folder), suppress(BlockingIOError), locked(folder / "lock"):
            remove_folder(folder, _MARKER)


def _compare(folder: Path, identity: dict[str, Any]) -> None:
    try:
        recorded = read_json(folder / _MARKER)
    except CheckpointError as error:
        raise ResumeError(f"{error.message}; or remove {folder} and start again") from error
    differ(flatten(recorded), flatten(identity), str(folder))


def differ(before: dict[str, Any], now: dict[str, Any], place: str) -> None:
    """Raise ResumeError that names the fields in which two flattened identities differ."""
    fields = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if fields:
        key = fields[0]
        more = f" (and {len(fields) - 1} more: {', '.join(fields[1:4])})" if len(fields) > 1 else ""
        raise ResumeError(
            f"{place}: holds another job: {key} was {before.get(key)!r} and is {now.get(key)!r} now{more}. "
            "Go on with the same command as before, or choose another --job or output folder, or remove this one"
        )


def _read_journal(path: Path, repair: bool) -> list[Record]:
    """Read whole lines; a torn last one is what a crash left of a block that is not done, and is cut off."""
    if not path.exists():
        return []
    records = []
    raw = read_side_file(path, _MAX_JOURNAL)
    good = 0
    for line in raw.splitlines(keepends=True):
        try:
            record = Record.parse(parse_json(line, str(path))) if line.endswith(b"\n") else None
        except CheckpointError:
            record = None
        if record is None:
            break
        records.append(record)
        good += len(line)
    if good < len(raw) and repair:
        with writing(path), path.open("r+b") as stream:
            stream.truncate(good)
            os.fsync(stream.fileno())
    return records
