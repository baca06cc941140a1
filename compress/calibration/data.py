"""Calibration text as token ids: windows of equal length, no padding, the same for the same recipe on every rank.

Documents come in an order drawn from `data.seed` (a dataset that is streamed goes through a seeded shuffle buffer), are
tokenised until there are `POOL` times as many windows as asked, joined into one stream, cut into windows that do not overlap,
and `samples` of them are drawn. So large data cost no more than small ones, and no part of a sorted file is preferred.

- A document is a row of a .jsonl, .parquet or dataset, or a .txt (cut at blank lines where it is large). Rows of wikitext are
  lines, and a thousand of them make a document.
- Between documents stands the tokenizer's eos token, or its bos where it has no eos, or nothing. Chats that a template wrote
  bring their own marks and get none. No special token is added inside a document.
- Where the tokenizer puts something in front of every text by itself (bos of Llama or Gemma), every window starts with it,
  because the model sees no other beginning in use; the rest of the window, `length` less that prefix, is a slice of the stream.
  `data.bos` puts the bos token there where the tokenizer does not, or leaves out what it would put there.
- `builtin` is a .jsonl of this package, whose dialogues are written as plain text where there is no chat template; `self` is
  written by the model, see `own_text`.
- Ids of an .npy file are taken as they are: all rows in the file's order, or a drawn subset in the file's order, and the first
  `length` columns.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress.calibration import own_text
from compress.calibration.documents import Row, first_line, local_file, rows
from compress.errors import CalibrationError
from compress.recipe.data import BUILTIN, SELF, Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

POOL = 4  # windows to draw from, for each one asked
BATCH = 1 << 20  # characters that are tokenised at a time
ROLES = {"human": "user", "gpt": "assistant"}  # names in `conversations` rows to those that templates know


def load_ids(data: Data, model_folder: Path, vocabulary: int, max_length: int | None, *, fewer: bool = False) -> Tensor:
    """Return the calibration windows, (samples, length) int64, every id in [0, vocabulary); `max_length` is the model's context.

    With `fewer`, a text that is too short for the default number of windows gives those that it has.
    Raises CalibrationError when the data cannot be read, do not suffice, or do not fit the model.
    """
    path = local_file(data.name)
    generator = torch.Generator().manual_seed(data.seed)
    if path is not None and path.suffix.lower() == ".npy":
        return _load_npy(path, data, vocabulary, max_length, generator)
    samples, length = data.shape
    length = _limit(data, length, max_length)
    tokenizer = _load_tokenizer(model_folder)
    prefix = _prefix(tokenizer, data.bos, model_folder)
    if data.name == SELF:
        return own_text.write(model_folder, tokenizer, prefix, samples, length, data.chat_template, generator)
    stride = length - len(prefix)
    if stride < 1:
        raise CalibrationError(
            f"data.length: {length}, but the tokenizer puts {len(prefix)} tokens before a text; use {len(prefix) + 1} or more"
        )
    stream = _stream(rows(path, data, generator), data, tokenizer, POOL * samples * stride)
    count = len(stream) // stride
    if fewer and "samples" not in data.model_fields_set and count > 0:
        samples = min(samples, count)
    if count < samples:
        raise CalibrationError(_too_little(data.name, len(stream), samples, length, len(prefix)))
    chosen = torch.randperm(count, generator=generator)[:samples].sort().values
    windows = torch.from_numpy(stream[: count * stride].reshape(count, stride)[chosen.numpy()].astype(np.int64))
    ids = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(samples, -1), windows], dim=1)
    _check_range(ids.numpy(), vocabulary, f"{data.name}: the tokenizer of {model_folder}")
    logger.info("%s: drew %d of %d windows of %d tokens", data.name, samples, count, length)
    return ids


def fingerprint(ids: Tensor) -> str:
    """Return the sha256, in hex, of the shape (two int64) and the ids (int32), both little endian."""
    shape = np.array(ids.shape, dtype="<i8").tobytes()
    return hashlib.sha256(shape + ids.cpu().numpy().astype("<i4").tobytes()).hexdigest()


def _limit(data: Data, length: int, max_length: int | None) -> int:
    """Return the length of a window in a model whose context is `max_length`: shortened when it was not asked for."""
    if max_length is None or length <= max_length:
        return length
    if "length" in data.model_fields_set:
        raise CalibrationError(
            f"data.length: {length} tokens, but the model's context is {max_length}; use {max_length} or less, or leave it out"
        )
    return max_length


def _too_little(name: str, tokens: int, samples: int, length: int, prefix: int) -> str:
    ways = ["more text"]
    if tokens // samples + prefix > max(prefix, 1):
        ways.insert(0, f"length: {tokens // samples + prefix} (at {samples} samples)")
    if tokens >= length - prefix:
        ways.insert(0, f"samples: {tokens // (length - prefix)} (at length {length})")
    return (
        f"{name}: has {tokens:,} tokens, but {samples} samples x {length - prefix} tokens need "
        f"{samples * (length - prefix):,}; use " + ", or ".join(ways)
    )


def _check_range(ids: np.ndarray[Any, Any], vocabulary: int, place: str) -> None:
    for extreme, at in ((ids.min(), ids.argmin), (ids.max(), ids.argmax)):
        if not 0 <= int(extreme) < vocabulary:
            row, column = np.unravel_index(at(), ids.shape)
            raise CalibrationError(
                f"{place}: id {extreme} in window {row} at position {column} is outside the model's vocabulary of {vocabulary}; "
                "use ids or a tokenizer that belong to this model"
            )


# --- token ids


def _load_npy(path: Path, data: Data, vocabulary: int, max_length: int | None, generator: torch.Generator) -> Tensor:
    """Read ids (samples, length) of any integer type; see the module's last rule for what is taken of a larger file."""
    expected = "expected a two-dimensional array of integers, (samples, length), as numpy.save writes it"
    try:
        with np.errstate(over="ignore"):  # a header may claim any shape
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
    # What numpy raises for empty, truncated and mangled files; TokenError comes from its header parser.
    except (OSError, ValueError, TypeError, EOFError, OverflowError, MemoryError, SyntaxError, tokenize.TokenError) as error:
        # numpy proposes to allow pickles for anything that it does not know
        reason = "not a plain array" if "pickle" in str(error) else first_line(error)
        raise CalibrationError(f"{path}: cannot be read ({reason}); {expected}") from error
    if not isinstance(ids, np.ndarray):
        raise CalibrationError(f"{path}: is an archive of arrays; {expected}")
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(f"{path}: got shape {ids.shape} of {ids.dtype}; {expected}")
    rows, columns = ids.shape
    if rows < 1 or columns < 2:
        raise CalibrationError(f"{path}: got shape {ids.shape}; expected at least one row of at least two ids")
    samples = data.samples if "samples" in data.model_fields_set else rows
    length = _limit(data, data.length if "length" in data.model_fields_set else columns, max_length)
    if rows < samples or columns < length:
        raise CalibrationError(
            f"{path}: has {rows} rows of {columns} ids, expected at least {samples} x {length}; "
            f"use samples: {min(samples, rows)} and length: {min(length, columns)}, or leave them out"
        )
    _check_range(ids, vocabulary, str(path))
    if rows > samples:
        ids = ids[torch.randperm(rows, generator=generator)[:samples].sort().values.numpy()]
    return torch.from_numpy(ids[:, :length].astype(np.int64))


# --- tokens


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    todo = "repair it, or pass token ids: --data ids.npy"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    # Not narrower: the Rust library raises plain Exception for a tokenizer.json that it does not understand.
    except Exception as error:
        raise CalibrationError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)}); {todo}") from error
    if tokenizer.vocab_size == 0:  # transformers makes one up when the files are missing
        raise CalibrationError(f"{folder}: has no tokenizer, expected tokenizer.json or the files of its class; {todo}")
    return tokenizer


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: bool | None, folder: Path) -> list[int]:
    """Return the ids in front of every window: what the tokenizer puts there by itself, its bos token with `bos`, or nothing."""
    if bos is False:
        return []
    found = _by_itself(tokenizer)
    if bos is None or found:
        return found
    if tokenizer.bos_token_id is None:
        raise CalibrationError(f"data.bos: true, but the tokenizer of {folder} has no bos token; leave bos out")
    return [tokenizer.bos_token_id]


def _by_itself(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts in front of every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def _stream(
    found: Iterator[Row], data: Data, tokenizer: PreTrainedTokenizerBase, wanted: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return the first `wanted` tokens of the joined documents, (tokens,) int32, or all when there are fewer."""
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    between = np.array([] if separator is None else [separator], dtype=np.int32)
    parts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    total = 0
    for batch in _batches(found, data, tokenizer):
        texts = [text for text, _ in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for (_, templated), ids in zip(batch, encoded, strict=True):
            parts += [np.asarray(ids, dtype=np.int32)] if templated or not parts else [between, np.asarray(ids, dtype=np.int32)]
        total = sum(map(len, parts))
        if total >= wanted:
            break
    return np.concatenate(parts)[:wanted] if parts else np.empty(0, dtype=np.int32)


def _batches(found: Iterator[Row], data: Data, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[tuple[str, bool]]]:
    """Group the texts that are not blank, each with whether a template wrote it, by `BATCH` characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for row in found:
        text, templated = _text(row, data, tokenizer)
        if not text.strip():
            continue
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise CalibrationError(f"{row.place}: holds half of a surrogate pair, which is not text; remove it")
        batch.append((text, templated))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text(row: Row, data: Data, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    if row.value is None:
        return "", False
    if isinstance(row.value, str):
        if data.chat_template:
            raise CalibrationError(
                f"{row.place}: holds plain text, but chat_template: true expects messages; leave chat_template out"
            )
        return row.value, False
    messages = _messages(row)
    if data.chat_template is False or (data.name == BUILTIN and not tokenizer.chat_template):
        return "\n\n".join(message["content"] for message in messages), False
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{row.place}: holds messages, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "set chat_template: false to take the contents as plain text, or use data with a text column"
        )
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False)), True
    # TypeError and ValueError are what templates that index or convert raise on messages they do not expect; OverflowError what
    # the sandbox raises for ranges that would take for ever.
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CalibrationError(
            f"{row.place}: the tokenizer's chat template refuses these messages ({first_line(error)}); "
            "remove the row, or set chat_template: false"
        ) from error


def _messages(row: Row) -> list[dict[str, str]]:
    """Return the messages as role and content, from either of the two usual spellings; images and tool calls are left out."""
    if not isinstance(row.value, list):
        raise CalibrationError(f"{row.place}: got {type(row.value).__name__}, expected text or a list of messages")
    messages = []
    for entry in row.value:
        known = entry if isinstance(entry, dict) else {}
        role = known.get("role", known.get("from"))
        content = known.get("content", known.get("value", ""))
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise CalibrationError(
                f"{row.place}: got {str(entry)[:60]!r}, expected messages with `role` and `content`, or `from` and `value`"
            )
        messages.append({"role": ROLES.get(role, role), "content": content or ""})
    return messages
