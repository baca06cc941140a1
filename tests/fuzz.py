"""Random damage to what compress reads: `python tests/fuzz.py --minutes 60 --seed 1`; nothing but a CompressError may come of it.

Each case is made of its seed alone, so that `--seed N --cases 1` repeats the one that a failure names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

from limits import PROCESSOR, quickly

from compress import registry
from compress.checkpoint import packing
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.tensor_file import read_header
from compress.errors import CompressError
from compress.report.rows import read_rows
from compress.system.side_files import read_json, read_json_lines
from compress.verify import raw_files, second_reader
from compress.weights.weight import ROLES, CompressedWeight

GOLDEN = Path(__file__).parent / "golden" / "v1"
SECONDS = 20.0
NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    256,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.5,
    1e300,
    float("inf"),
)
TEXTS = (
    "",
    "a",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "é" * 300,
    "a.{0-9999999}.{0-9999999}",
    "U8",
    "I32",
)


def value(generator: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = generator.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return generator.choice(NUMBERS)
    if kind < 4:
        return generator.choice(TEXTS)
    if kind == 4:
        return generator.choice((None, True, False))
    inner = [value(generator, depth + 1) for _ in range(generator.randrange(4))]
    return inner if kind < 7 else {generator.choice(TEXTS): item for item in inner}


def damaged(generator: random.Random, whole: Any) -> Any:
    """A JSON value with one place replaced, removed or added to."""
    if not isinstance(whole, dict | list) or not whole or generator.random() < 0.1:
        return value(generator)
    copied = dict(whole) if isinstance(whole, dict) else list(whole)
    key: Any = generator.choice(list(copied)) if isinstance(copied, dict) else generator.randrange(len(copied))
    kind = generator.random()
    if kind < 0.7:
        copied[key] = damaged(generator, copied[key])
    elif kind < 0.85:
        del copied[key]
    elif isinstance(copied, dict):
        copied[generator.choice(TEXTS)] = value(generator)
    else:
        copied.append(value(generator))
    return copied


def flipped(generator: random.Random, raw: bytes) -> bytes:
    """Bytes with some changed, cut or doubled."""
    result = bytearray(raw)
    for _ in range(generator.choice((1, 1, 4, 64))):
        result[generator.randrange(len(result))] = generator.randrange(256)
    kind = generator.random()
    at = generator.randrange(len(result))
    return bytes(result[:at] if kind < 0.2 else result[at:] + result if kind < 0.3 else result)


def headers(generator: random.Random, folder: Path) -> None:
    """A file of tensors, whose header or bytes are damaged, in both readers."""
    raw = (GOLDEN / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if generator.random() < 0.5:
        raw = flipped(generator, raw)
    else:
        text = json.dumps(damaged(generator, json.loads(raw[8 : 8 + length]))).encode()
        raw = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    allowed(lambda: read_header(path))
    allowed(lambda: raw_files.header(path))


def configs(generator: random.Random, folder: Path) -> None:
    """A checkpoint whose config is damaged: opened, and every weight decoded by both readers."""
    shutil.copyfile(GOLDEN / "model.safetensors", folder / "model.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    inner = dict(config, quantization_config=damaged(generator, config["quantization_config"]))
    (folder / "config.json").write_text(json.dumps(inner if generator.random() < 0.8 else damaged(generator, config)))

    def ours() -> None:
        source = PackedSource.open_packed(folder)
        for site in source.table:
            source.compressed(site).dequantize()

    def theirs() -> None:
        stored = raw_files.open_stored(folder)
        for site in stored.sites:
            second_reader.digest(stored, site)

    allowed(ours)
    allowed(theirs)


def side_files(generator: random.Random, folder: Path) -> None:
    """JSON, and lines of it, in any state."""
    path = folder / "summary.json"
    row = {"site": "a.b", "block": 0, "kind": "b", "shape": [4, 8], "method": "quant/rtn", "bits_per_weight": 4.0}
    row |= {"stored_bits": 128, "error": 0.1, "expert": None, "tokens": None, "fallback": None, "seconds": 0.1, "notes": {}}
    text = json.dumps(damaged(generator, row)).encode()
    path.write_bytes(flipped(generator, text) if generator.random() < 0.5 else text + b"\n")
    for read in (read_json, lambda p: list(read_json_lines(p)), read_rows):
        allowed(lambda read=read: read(path))  # type: ignore[misc]


def indices(generator: random.Random, folder: Path) -> None:
    """Every number that a part of any format holds, replaced by any other: refused, or decoded to the shape that was said."""
    name = generator.choice(registry.names("formats"))
    form = registry.lookup("formats", name)
    role = form.roles[0]
    parts = list(importlib.import_module(f"examples.{name}").fixed())
    part = generator.choice([part for part in parts if part.shape[0] <= 128] or parts[:1])
    described, tensors = form.describe(part), {leaf: tensor.clone() for leaf, tensor in form.pack(part).items()}
    raw = tensors[generator.choice(sorted(tensors))].flatten().view(torch.uint8) if tensors else torch.empty(0)
    for _ in range(generator.choice((1, 3)) if raw.numel() else 0):
        raw[generator.randrange(raw.numel())] = generator.randrange(256)
    spec = {"shape": list(part.shape), role: described}
    prefixed = {("" if role == "base" else f"{role}_") + key: tensor for key, tensor in tensors.items()}

    def read() -> None:
        if role == "base":
            packing.check(spec, prefixed, "a.b")
            assert tuple(CompressedWeight(base=packing.unpack(spec, prefixed).base).dequantize().shape) == part.shape
        else:
            form.check(described, part.shape, tensors)
            found = form.unpack(described, part.shape, tensors)
            assert not hasattr(found, "shape") or tuple(found.shape) == tuple(part.shape)

    assert role in ROLES
    allowed(read)


def allowed(use: Callable[[], object]) -> None:
    """Do something that may end in an error of the package, and in no other, in time."""
    try:
        use()
    except CompressError as error:
        assert error.message.replace("\n", "").isprintable(), "a message that a terminal would obey"


TARGETS = {target.__name__: target for target in (headers, configs, side_files, indices)}


def case(seed: int, names: list[str]) -> None:
    """One case. Raises what a reader raised, with a note on how to repeat it."""
    generator = random.Random(seed)
    name = names[seed % len(names)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            with quickly(SECONDS, timer=PROCESSOR):
                TARGETS[name](generator, Path(folder))
        except BaseException as error:
            error.add_note(f"repeat with: python tests/fuzz.py --target {' '.join(names)} --seed {seed} --cases 1")
            raise


def main() -> None:
    """Run cases until the time is over, or so many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, default=None, help="so many, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next number")
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    done = 0
    while done < options.cases if options.cases is not None else time.monotonic() < end:
        case(options.seed + done, options.target)
        done += 1
    print(f"{done} cases from seed {options.seed}: only errors of compress, each in less than {SECONDS:.0f} s")


if __name__ == "__main__":
    main()
