"""`compress verify`: whatever is changed, anywhere, is found and named; and what a run itself checks before it publishes."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import PROCESSOR, quickly
from runs import compress, steps

from compress.checkpoint import packed_source
from compress.errors import CheckpointError, VerificationError
from compress.output import seal
from compress.verify import raw_files as stored
from compress.verify import second_reader as independent
from compress.verify import verify as module
from compress.verify.raw_files import header, open_stored
from compress.verify.verify import verify

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def shards(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several shards, with compressed and copied tensors and outliers."""
    out = tmp_path_factory.mktemp("shards") / "out"
    recipe = steps("quant/spqr", match="*.mlp.*", bits=3) + steps(bits=3, group_size=16)
    compress(tiny("llama"), out, ids, recipe, max_shard_size="10KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def said(folder: Path) -> str:
    """What verify complains of."""
    with pytest.raises(VerificationError) as caught:
        verify(folder, "cpu", lambda *_: None)
    return str(caught.value)


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_as_written(shards: Path, tmp_path: Path) -> None:
    """Also anywhere else, with a card that somebody has changed and a file that has nothing to do with it."""
    moved = copy(shards, tmp_path / "moved")
    (moved / "README.md").write_text("mine")
    (moved / "notes.txt").write_text("mine")
    found = verify(moved, "cpu", lambda *_: None)
    assert found["decoded"] == found["sites"] == 21
    assert found["files"] == len(json.loads((shards / "summary.json").read_text())["files"])
    assert found["mean_difference_nats"] < 1e-6


def test_every_file_but_cards_is_recorded(shards: Path) -> None:
    recorded = set(json.loads((shards / "summary.json").read_text())["files"])
    there = {path.name for path in shards.iterdir()}
    assert there - recorded <= {"summary.json", "README.md", "report.html", ".local.json"}
    assert {"config.json", "model.safetensors.index.json", "recipe.yaml", "report.jsonl"} <= recorded


def test_a_flipped_bit_anywhere_is_found_and_named(shards: Path, tmp_path: Path) -> None:
    """At random places of every recorded file, headers included; the site is named where one decodes to something else."""
    folder = copy(shards, tmp_path / "copy")
    draw = random.Random(0)
    named = 0
    for name in sorted(json.loads((shards / "summary.json").read_text())["files"]):
        path = folder / name
        raw = path.read_bytes()
        places = [draw.randrange(len(raw) * 8) for _ in range(6)]
        if path.suffix == ".safetensors":
            length = 8 + int.from_bytes(raw[:8], "little")
            places += [draw.randrange(length * 8), draw.randrange(64), len(raw) * 8 - 1]
        for place in places:
            changed = bytearray(raw)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            text = said(folder)
            assert f"{name} was changed since it was written" in text
            named += "decodes to other values" in text
        path.write_bytes(raw)
    assert named > 10
    verify(folder, "cpu", lambda *_: None)


def test_the_site_of_a_changed_code_is_named(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards, tmp_path / "copy")
    site = "model.layers.1.self_attn.o_proj"
    place = open_stored(folder).tensors[f"{site}.codes"]
    raw = bytearray(place.file.read_bytes())
    raw[place.start] ^= 1
    place.file.write_bytes(raw)
    text = said(folder)
    assert f"{site} decodes to other values than were compressed" in text
    assert text.count("decodes to") == 1


def test_a_truncated_shard(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards, tmp_path / "copy")
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path.name} was changed" in said(folder)
    path.unlink()
    assert f"{path.name} is missing" in said(folder)


def test_renamed_and_swapped_shards(shards: Path, tmp_path: Path) -> None:
    renamed = copy(shards, tmp_path / "renamed")
    first, second, *_ = sorted(renamed.glob("*.safetensors"))
    other = renamed / "model-99999.safetensors"
    first.rename(other)
    assert f"{first.name} is missing, and {other.name} has its content: it was renamed" in said(renamed)
    swapped = copy(shards, tmp_path / "swapped")
    first, second, *_ = sorted(swapped.glob("*.safetensors"))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    text = said(swapped)
    assert f"{first.name} has not its own content; {second.name} has it: files were swapped" in text
    assert f"{second.name} has not its own content; {first.name} has it" in text


def test_a_changed_table_or_index(shards: Path, tmp_path: Path) -> None:
    folder = copy(shards, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    table = config["quantization_config"]
    gone = next(iter(table["sites"]))
    del table["sites"][gone]
    (folder / "config.json").write_text(json.dumps(config))
    text = said(folder)
    assert "config.json was changed" in text
    assert "was compressed, and config.json does not name it" in text
    index = copy(shards, tmp_path / "index")
    (index / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json was changed" in said(index)


def endless(config: Any, index: Any, summary: Any) -> None:
    config["quantization_config"]["sites"] = {"model.layers.{0-9999999}.mlp.{0-9999999}": 0}


HOSTILE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "ranges that never end": endless,
    "a range that is none": lambda config, index, summary: config["quantization_config"]["sites"].update({"a.{x}": 0}),
    "infinite shapes": lambda config, index, summary: config["quantization_config"]["specs"][0].update(shape=[float("inf"), 1]),
    "far too large": lambda config, index, summary: config["quantization_config"]["specs"][0].update(shape=[2**30, 2**30]),
    "an index that leaves": lambda config, index, summary: index["weight_map"].update(other="../other.safetensors"),
    "an index of numbers": lambda config, index, summary: index["weight_map"].update(other=3),
    "a file elsewhere": lambda config, index, summary: summary["files"].update({"/etc/passwd": "0" * 64}),
    "a file above": lambda config, index, summary: summary["files"].update({"../secret": "0" * 64}),
    "digests that are lists": lambda config, index, summary: summary["files"].update({"config.json": ["0" * 64]}),
    "no identity": lambda config, index, summary: summary.update(identity=None, check=None),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_records_are_refused_at_once(kind: str, shards: Path, tmp_path: Path) -> None:
    folder = copy(shards, tmp_path / "out")
    paths = [folder / name for name in ("config.json", "model.safetensors.index.json", "summary.json")]
    values = [json.loads(path.read_text()) for path in paths]
    HOSTILE[kind](*values)
    for path, value in zip(paths, values, strict=True):
        path.write_text(json.dumps(value))
    with quickly(20.0, 300 << 20, PROCESSOR), pytest.raises((VerificationError, CheckpointError)):
        verify(folder, "cpu", lambda *_: None)


@pytest.mark.parametrize("name", ["summary.json", "report.jsonl", "config.json", "a shard"])
def test_a_pipe_is_not_waited_for(name: str, shards: Path, tmp_path: Path) -> None:
    folder = copy(shards, tmp_path / "out")
    path = folder / name if (folder / name).exists() else sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    os.mkfifo(path)
    with quickly(60.0), pytest.raises((VerificationError, CheckpointError), match=r"is not a file|has neither"):
        verify(folder, "cpu", lambda *_: None)


def test_weights_beside_those_that_were_written(shards: Path, tmp_path: Path) -> None:
    """transformers reads model.safetensors before an index: one that was laid into the folder takes the place of all shards."""
    folder = copy(shards, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(sorted(folder.glob("*.safetensors"))[0].read_bytes() + b"x")
    assert "model.safetensors is a file of weights that was not recorded" in said(folder)


# --- what a run does before it gives a result its name


def test_a_run_stops_when_a_packed_tensor_is_wrong(
    tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packer that swaps two columns in all it writes, and a reader that does the same: only the second reader sees it."""
    from compress.formats import bitpack

    pack, unpack = bitpack._bits.pack, bitpack._bits.unpack

    def swapped(fields: torch.Tensor, bits: int) -> torch.Tensor:
        turned = fields.flatten().clone()
        turned[:2] = turned[:2].flip(0)
        return pack(turned, bits)

    def back(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        found = unpack(stream, bits, count)
        found[:2] = found[:2].flip(0)
        return found

    monkeypatch.setattr(bitpack._bits, "pack", swapped)
    monkeypatch.setattr(bitpack._bits, "unpack", back)
    with pytest.raises(VerificationError, match=r"model\.layers\.0\.self_attn\.\w_proj decodes to other values"):
        compress(tiny("llama"), tmp_path / "out", ids, steps(bits=3, group_size=16))
    assert not (tmp_path / "out").exists()


def test_a_run_stops_when_a_copied_tensor_is_wrong(
    tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = seal.write_shards

    def damaged(folder: Path, entries: Any, limit: int) -> Any:
        result = write(folder, entries, limit)
        place = header(folder / "model.safetensors")["model.norm.weight"]
        raw = bytearray(place.file.read_bytes())
        raw[place.start] ^= 1
        place.file.write_bytes(raw)
        return result

    monkeypatch.setattr(seal, "write_shards", damaged)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight is not what"):
        compress(tiny("llama"), tmp_path / "out", ids, steps(bits=3, group_size=16))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_copied_tensors_are_compared_in_pieces_of_any_size(
    chunk: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.checkpoint.tensor_file import read_header

    path = tiny("llama") / "model.safetensors"
    entry, place = read_header(path)[0]["model.norm.weight"], header(path)["model.norm.weight"]
    monkeypatch.setattr(stored, "_CHUNK", chunk)
    assert module._equal(entry, place)
    assert not module._equal(entry, header(path)["model.layers.0.input_layernorm.weight"])


def test_a_format_without_a_second_reader_is_said(tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(independent.DECODERS, "bitpack")
    summary = compress(tiny("llama"), tmp_path / "out", ids, steps(bits=3, group_size=16))
    assert summary.values["read_back"]["decoded"] == 0
    assert "bitpack" in summary.values["read_back"]["unknown_formats"][0]
    assert packed_source.PackedSource.open_packed(tmp_path / "out").table
