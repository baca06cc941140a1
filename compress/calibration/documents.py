"""Documents for calibration, one at a time and in an order drawn from a seed: from a local file or from the Hugging Face Hub.

Nothing here reads a file or a dataset whole, except the column of one row group of a .parquet: a line index, or the number of
rows, is what a drawn order needs. A .txt above `PIECE` bytes is cut at blank lines into documents of about that size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from compress.errors import CalibrationError
from compress.recipe.data import BUILTIN, PRESETS, SUFFIXES, Data, Preset

OWN_TEXT = Path(__file__).with_name("builtin.jsonl")
PIECE = 1 << 18  # bytes of a .txt that make a document
SHUFFLE = 10_000  # rows in the shuffle buffer of a streamed dataset
STREAM_ABOVE = 1 << 30  # bytes of a dataset that are not downloaded whole
TIMEOUT = 10.0  # seconds to wait for the Hub's first answer
COLUMNS = ("text", "messages", "conversations")
# Suffixes that mean a file and not a dataset of the Hub, whose names may hold a dot too (org/name-2.5).
OTHER_FILES = (".text", ".md", ".json", ".csv", ".tsv", ".gz", ".zst", ".xz", ".zip", ".npz", ".pt", ".bin", ".pkl", ".arrow")


class Row(NamedTuple):
    """One document as it was read, and where it stands."""

    place: str
    value: object


def rows(path: Path | None, data: Data, generator: torch.Generator) -> Iterator[Row]:
    """Yield the text or the messages of each document of the file `path`, or of the dataset that `data` names when it is None.

    Raises CalibrationError when there is nothing to read, or a row is not what it should be.
    """
    return _hub_rows(data, generator) if path is None else _file_rows(path, data, generator)


def local_file(name: str) -> Path | None:
    """Return the local file that `name` means; None when it means a dataset of the Hub."""
    if name == BUILTIN:
        return OWN_TEXT
    if name in PRESETS:
        return None
    path = Path(os.path.expanduser(name))
    kinds = f"expected a file that ends in {', '.join(SUFFIXES)}"
    if os.path.isdir(path):
        raise CalibrationError(f"{name}: is a folder; {kinds}")
    looks_local = name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or path.is_absolute()
    if not (os.path.isfile(path) or looks_local or path.suffix.lower() in (*SUFFIXES, *OTHER_FILES)):
        return None
    if not os.path.isfile(path):
        raise CalibrationError(f"{name}: there is no such file (in {Path.cwd()}); {kinds}, or one of {', '.join(PRESETS)}")
    if path.suffix.lower() not in SUFFIXES:
        raise CalibrationError(f"{name}: files that end in {path.suffix or 'nothing'!r} are not read; {kinds}")
    return path


LONGEST_LINE = 16 << 20  # bytes; tokenizers take a hundred times as much


def _file_rows(path: Path, data: Data, generator: torch.Generator) -> Iterator[Row]:
    read = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix.lower()]
    try:
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path}: is empty; expected text")
        yield from read(path, data, generator)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({first_line(error)})") from error


def _txt_rows(path: Path, data: Data, generator: torch.Generator) -> Iterator[Row]:
    with path.open("rb") as file:
        starts = [0]
        end = path.stat().st_size
        while end - starts[-1] > PIECE:
            file.seek(starts[-1] + PIECE)
            ahead = file.read(PIECE)
            # After a blank line, else after a line, else before a character (in UTF-8 never a byte 10xxxxxx).
            cut = re.search(rb"\n\r?\n", ahead) or re.search(rb"\n", ahead) or re.search(rb"(?=[^\x80-\xbf])", ahead)
            starts.append(starts[-1] + PIECE + (cut.end() if cut else len(ahead)))
        ends = [*starts[1:], end]
        for index in torch.randperm(len(starts), generator=generator).tolist():
            file.seek(starts[index])
            raw = file.read(ends[index] - starts[index])
            yield Row(str(path), _decode(raw, str(path), starts[index]))


def _jsonl_rows(path: Path, data: Data, generator: torch.Generator) -> Iterator[Row]:
    with path.open("rb") as file:
        ends = np.cumsum(np.fromiter((len(line) for line in file), dtype=np.int64))
        for index in torch.randperm(len(ends), generator=generator).tolist():
            start = int(ends[index - 1]) if index else 0
            file.seek(start)
            place = f"{path}:{index + 1}"
            if int(ends[index]) - start > LONGEST_LINE:
                found = f"has {int(ends[index]) - start:,} bytes"
                raise CalibrationError(f"{place}: {found}; expected at most {LONGEST_LINE:,} in a line. Cut it into documents")
            line = _decode(file.read(int(ends[index]) - start), place, start).strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{place}: not JSON ({first_line(error)}); expected one JSON object per line") from error
            if not isinstance(row, dict):
                raise CalibrationError(f"{place}: got {type(row).__name__}, expected one JSON object per line")
            yield Row(place, row[_column(row, data.column, place)])


def _parquet_rows(path: Path, data: Data, generator: torch.Generator) -> Iterator[Row]:
    """Row groups in drawn order, and the rows of each in drawn order: one column of one row group is in memory."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = _column(file.schema_arrow.names, data.column, str(path))
            for group in torch.randperm(file.num_row_groups, generator=generator).tolist():
                values = file.read_row_group(group, columns=[column]).column(0)
                for index in torch.randperm(len(values), generator=generator).tolist():
                    yield Row(f"{path}: row group {group}, row {index}", values[index].as_py())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


def _hub_rows(data: Data, generator: torch.Generator) -> Iterator[Row]:
    preset = PRESETS.get(data.name) or Preset(data.name)
    with _hub_errors(data.name, preset.path):
        dataset, streamed = _open_hub(data, preset)
        column = data.column or preset.column
        if streamed:
            for number, row in enumerate(dataset.shuffle(seed=data.seed, buffer_size=SHUFFLE)):
                place = f"{data.name}: row {number} of the shuffled stream"
                yield Row(place, row[_column(row, column, place)])
            return
        column = _column(dataset.column_names, column, data.name)
        dataset = dataset.select_columns([column])  # the others may be costly to decode
        step = preset.rows_per_document
        for start in (torch.randperm(-(-len(dataset) // step), generator=generator) * step).tolist():
            values = dataset[start : start + step][column]
            yield Row(f"{data.name}: row {start}", values[0] if step == 1 else "\n\n".join(values))


def _open_hub(data: Data, preset: Preset) -> tuple[Any, bool]:
    """Return the dataset, and whether it is streamed; without the Hub only what an earlier run has left in the cache."""
    import datasets

    where = (preset.path, data.config or preset.config)
    split = data.split or preset.split
    if not _hub_answers(preset.path):
        try:
            with _cache_only():
                return datasets.load_dataset(*where, split=split), False
        except ConnectionError as error:
            reason = "offline mode is set" if datasets.config.HF_HUB_OFFLINE else "it does not answer"
            raise CalibrationError(_no_dataset(data.name, preset.path, reason)) from error
    streamed = preset.streaming
    if streamed is None:
        size = datasets.load_dataset_builder(*where).info.download_size
        streamed = size is None or size > STREAM_ABOVE
    return datasets.load_dataset(*where, split=split, streaming=streamed), streamed


def _hub_answers(dataset: str) -> bool:
    """Ask the Hub once: `datasets` itself asks six times over 24 seconds before it gives up."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # the base of transport errors

    if datasets.config.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().dataset_info(dataset, timeout=TIMEOUT)
    except HfHubHTTPError:
        return True  # an answer: not found, or no access, for which `datasets` has the words
    except (OSError, HTTPError):
        return False
    return True


@contextmanager
def _cache_only() -> Iterator[None]:
    """Let `datasets` look into its cache and nowhere else; it has no argument for that."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _hub_errors(name: str, path: str) -> Iterator[None]:
    """Say what to do instead when a dataset cannot be had, for whatever reason `datasets` gives."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    # RuntimeError: datasets that are scripts; ValueError: names, splits and configurations that there are not.
    except (OSError, HTTPError, DatasetsError, ValueError, RuntimeError) as error:
        raise CalibrationError(_no_dataset(name, path, first_line(error))) from error


def _no_dataset(name: str, path: str, reason: str) -> str:
    place = f"{name} ({path})" if name in PRESETS else f"{name}: neither a file nor a preset ({', '.join(PRESETS)})"
    return (
        f"{place}: cannot be read from the Hugging Face Hub or its local cache ({reason}); "
        "expected a dataset that can be reached; or pass a local file: --data text.jsonl, text.txt, text.parquet, ids.npy; "
        "or the text of this package: --data builtin"
    )


def _column(names: Collection[str], column: str | None, place: str) -> str:
    for candidate in COLUMNS if column is None else (column,):
        if candidate in names:
            return candidate
    wanted = ", ".join(COLUMNS) if column is None else column
    raise CalibrationError(
        f"{place}: has the columns {', '.join(map(repr, names)) or '(none)'}, expected {wanted}; name one with data.column"
    )


def _decode(raw: bytes, place: str, offset: int) -> str:
    try:
        return raw.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{place}: byte {offset + error.start} is not UTF-8 ({error.reason}); save the text as UTF-8"
        ) from error


def first_line(error: BaseException) -> str:
    """Return what an error says in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
