"""What is refused before anything is exported, with the reason and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports import SIZES, export, quiet, rtn, tensors
from runs import compress as run

from compress.checkpoint import tensor_file as container
from compress.errors import CheckpointError, CompressError, FormatError, RecipeError
from compress.interop import exporter as exporting

Tiny = Callable[..., Path]


def test_a_refusal_names_site_reason_and_way_out(made: Callable[..., Path], tmp_path: Path) -> None:
    message = (
        r"model\.layers\.0\.self_attn\.k_proj: has codes that need 8 bits; awq holds codes of up to 4 bits, .*"
        r"12 of 22 sites do not fit.*export to compressed-tensors or gguf or gptq"
    )
    with pytest.raises(FormatError, match=message):
        export(made("two widths, with the head"), "awq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FormatError, match=r"act-order.*export to gptq"):
        export(made("act-order"), "compressed-tensors", tmp_path / "out")


def test_dense_checkpoints_and_unknown_formats(tiny: Tiny, made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is dense; give a compressed checkpoint"):
        export(tiny("llama", **SIZES), "gptq", tmp_path / "out")
    with pytest.raises(RecipeError, match="formats exl2: no such format; known are awq, compressed-tensors"):
        export(made("symmetric"), "exl2", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "reason"), [("gpt2", r"stores weights \(in, out\)"), ("gpt_oss", "one tensor in the original")]
)
def test_families_that_other_tools_name_differently(family: str, reason: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family)
    run(model, tmp_path / "model", None, [rtn(group_size=16)])
    with pytest.raises(FormatError, match=reason):
        export(tmp_path / "model", "compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(bits=3), "in=85 with group_size=32; expected whole groups"),
        (lambda q: q.update(group_size=7), "expected whole groups"),
        (lambda q: q.update(bits="4"), "bits is '4' in quantization_config; expected a whole number"),
        (lambda q: q.update(bits=5), "5 bits and qweight"),
        (lambda q: q.update(dynamic={"+:[": {}}), "no regular expression"),
        (lambda q: q.update(group_size=16), "qzeros is"),
    ],
)
def test_a_foreign_config_that_does_not_fit(
    change: Callable[[dict[str, Any]], None], message: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    export(made("symmetric"), "gptq", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        source = exporting.open_packed(str(tmp_path / "out"))
        for site in source.table:
            source.compressed(site)


def test_errors_are_ours(made: Callable[..., Path], tmp_path: Path) -> None:
    """A damaged checkpoint gives a message, whatever is damaged."""
    export(made("symmetric"), "gptq", tmp_path / "out")
    found = tensors(tmp_path / "out")
    for missing in ("qzeros", "scales", "qweight"):
        fewer = {k: v for k, v in found.items() if k != f"model.layers.1.mlp.up_proj.{missing}"}
        container.save(tmp_path / "out" / "model.safetensors", fewer)
        with pytest.raises(CompressError):
            exporting.export(exporting.prepare(str(tmp_path / "out"), "native"), tmp_path / "native", quiet)
    assert not (tmp_path / "native").exists()
