"""The folder of an export: side files, card, index, and nothing half written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exports import SIZES, equal_codes, export, parts, quiet, rtn, tensors
from pages import measure
from runs import compress as run
from safetensors.torch import load_file

from compress.checkpoint import tensor_file as container
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import OutputError, VerificationError
from compress.interop import exporter as exporting
from compress.interop import readme as export_card

Tiny = Callable[..., Path]


def test_everything_else_goes_along(tiny: Tiny, tmp_path: Path) -> None:
    """Prediction heads that the model class does not know, and side files, byte for byte; nothing of another place."""
    model = tmp_path / "model"
    shutil.copytree(tiny("llama", **SIZES), model)
    found = load_file(model / "model.safetensors")
    found["mtp.layers.0.proj.weight"] = torch.randn(8, 8)
    found["model.layers.3.extra.weight"] = torch.randn(4, 4).to(torch.float8_e4m3fn)
    found["audio_tower.conv.weight"] = torch.randn(3, 2, 2)
    found["audio_tower.steps"] = torch.arange(3)
    container.save(model / "model.safetensors", found)
    (model / "additional_chat_templates").mkdir()
    side = ("tokenizer.model", "LICENSE", "chat_template.jinja", "special_tokens_map.json", "modeling_mine.py", "vocab.bpe")
    side += ("additional_chat_templates/tools.jinja", "preprocessor_config.json")
    for name in side:
        (model / name).write_bytes(name.encode() + b"\x00\xff")
    run(model, tmp_path / "native", None, [rtn()])
    (tmp_path / "native" / "evaluation.json").write_text("{}")
    card = tmp_path / "native" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\nbase_model: org/name\n", 1))
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out")
    out = Source.open(tmp_path / "out")
    native = Source.open(tmp_path / "native")
    others = [name for name in found if not name.startswith("model.layers.") or "norm" in name or "extra" in name]
    assert {"mtp.layers.0.proj.weight", "model.layers.3.extra.weight", "audio_tower.steps", "model.norm.weight"} <= set(others)
    for name in others:
        assert b"".join(container.stream_entry(native.entries[name])) == found[name].view(torch.uint8).numpy().tobytes(), name
        raw = b"".join(container.stream_entry(out.entries[name]))
        assert raw == found[name].view(torch.uint8).numpy().tobytes(), name
    for name in (*side, "generation_config.json"):
        assert (tmp_path / "native" / name).read_bytes() == (model / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"evaluation.json", "summary.json", "report.jsonl", "report.html"} & names
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    assert not any(name.endswith(".weight") and out.entries[name].nbytes == 0 for name in out.entries), (
        "no guard in other layouts"
    )
    matter = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert (matter["license"], matter["base_model"]) == ("mit", "org/name")
    assert matter["tags"] == ["compress", "compressed-tensors", "quantized"]
    digests = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    assert digests == {n: hashlib.sha256((tmp_path / "out" / n).read_bytes()).hexdigest() for n in digests}


def test_the_card_has_the_scores_of_what_was_exported(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("llama", **SIZES), tmp_path / "native", None, [rtn()])
    export(tmp_path / "native", "gptq", tmp_path / "before")
    assert "Quality was not measured before the export" in (tmp_path / "before" / "README.md").read_text()
    measure(tmp_path / "native", kl_interval=[0.0084, 0.0088])
    work = exporting.prepare(str(tmp_path / "native"), "gptq")
    exporting.export(work, tmp_path / "out", quiet)
    text = (tmp_path / "out" / "README.md").read_text()
    for word in ("| | original | source checkpoint |", "0.00861 (0.00840 to 0.00880)", "95.83%", "12.331", "heldout.npy"):
        assert word in text, word
    assert "Scores of `native`" in text and "All values are the same, bit for bit" in text
    assert "tokens per second" not in text, "that is another runtime's business"
    assert "secret" not in text and str(tmp_path) not in text
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    partial = export_card.text(work.source, {**record, "left_out": ["mtp.*.weight"]}, "name `<b>`", work.form)
    assert "leaves out `mtp.*.weight`, for which gptq has no place" in partial and "bit for bit" not in partial
    assert "# name &#96;&lt;b&gt;&#96;" in partial
    (tmp_path / "native" / "evaluation.json").write_text('{"perplexity": 1.0}')
    assert "not measured" in export_card.text(work.source, record, "name", work.form), "a file that somebody else wrote"


def test_several_files_have_an_index(made: Callable[..., Path], tmp_path: Path) -> None:
    work = exporting.prepare(str(made("symmetric")), "gptq")
    exporting.export(work, tmp_path / "out", quiet, limit=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 3
    export(made("symmetric"), "gptq", tmp_path / "single")
    whole, cut = tensors(tmp_path / "single"), tensors(tmp_path / "out")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    equal_codes(parts(tmp_path / "out"), parts(made("symmetric")), scale_dtype=False)


def test_an_export_that_is_there_stays(made: Callable[..., Path], tmp_path: Path) -> None:
    export(made("symmetric"), "gptq", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert export(made("symmetric"), "gptq", tmp_path / "out")["resumed"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="is another export"):
        export(made("symmetric"), "awq", tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="is not an export that compress wrote"):
        export(made("symmetric"), "gptq", tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_nothing_half_written_gets_the_name(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, the folder has a name of its own, and the next export begins anew; an error leaves nothing."""
    fork = os.fork()
    if fork == 0:
        original, calls = PackedSource.compressed, 0

        def dying(self: Any, site: str) -> Any:
            nonlocal calls
            calls += 1
            if calls == 9:
                os._exit(9)
            return original(self, site)

        PackedSource.compressed = dying  # type: ignore[method-assign]
        export(made("symmetric"), "gptq", tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["out.exporting"]
    export(made("symmetric"), "gptq", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert ".compress-export" not in {p.name for p in (tmp_path / "out").iterdir()}

    real = PackedSource.compressed
    count = 0

    def wrong(self: Any, site: str) -> Any:
        nonlocal count
        weight = real(self, site)
        count += 1
        if count == 30:  # while it is read back
            weight.base.codes[0, 0] ^= 1
        return weight

    monkeypatch.setattr(PackedSource, "compressed", wrong)
    with pytest.raises(VerificationError, match="reads back with other values"):
        export(made("symmetric"), "gptq", tmp_path / "second")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_exports_into_one_place(made: Callable[..., Path], tmp_path: Path) -> None:
    def again(*_: Any) -> None:
        export(made("symmetric"), "gptq", tmp_path / "out")

    with pytest.raises(OutputError, match="another export is at work here"):
        exporting.export(exporting.prepare(str(made("symmetric")), "gptq"), tmp_path / "out", again)


def test_inspect_reads_foreign_checkpoints(made: Callable[..., Path], tmp_path: Path) -> None:
    from compress.inspection.contents import contents

    export(made("asymmetric"), "awq", tmp_path / "out")
    found = contents(str(tmp_path / "out"))
    kinds = {kind.name: kind for kind in found.kinds}
    assert kinds["mlp.up_proj"].stored == "4-bit g32 with zeros"
    assert kinds["mlp.up_proj"].bits_per_weight == 4 + (16 + 4) / 32
    assert found.compressed
