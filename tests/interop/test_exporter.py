"""Exports from end to end: what transformers makes of them, what is refused before anything is written, and round trips."""

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
from pages import measure
from runs import compress as run
from safetensors.torch import load_file
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

import compress
from compress.checkpoint import tensor_file as container
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CheckpointError, CompressError, FormatError, OutputError, RecipeError, VerificationError
from compress.interop import exporter as exporting
from compress.interop import readme as export_card
from compress.interop.foreign import ForeignSource, open_any

Tiny = Callable[..., Path]
PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def rtn(match: str = "*.*", bits: int = 4, **options: Any) -> dict[str, Any]:
    return {"match": match, "method": "quant/rtn", "options": {"bits": bits, "group_size": 32, **options}}


FLOATS = {"datatype": "mxfp4", "compensate": False}


def quiet(*_: Any) -> None:
    pass


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        result: torch.Tensor = model(PROBE, use_cache=False).logits
    return result


RECIPES: dict[str, list[dict[str, Any]]] = {
    "symmetric": [rtn()],
    "asymmetric": [rtn(symmetric=False)],
    "3 bits": [rtn(bits=3)],
    "5 bits per row": [rtn(bits=5, group_size=-1)],
    "two widths, with the head": [rtn("*.self_attn.*", 8), rtn("*")],
    "act-order": [{"match": "*.*", "method": "quant/gptq", "options": {"bits": 4, "group_size": 32, "order": "desc_act"}}],
}


@pytest.fixture(scope="module")
def made(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a checkpoint of a family by one of RECIPES."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def get(recipe: str, family: str = "llama", **changes: Any) -> Path:
        key = f"{family} {recipe} {changes}"
        if key not in known:
            known[key] = root / str(len(known))
            data = ids if recipe == "act-order" else None
            run(tiny(family, **{**SIZES, **changes}), known[key], data, RECIPES[recipe])
        return known[key]

    return get


def export(model: Path, name: str, out: Path) -> dict[str, Any]:
    return exporting.export(exporting.prepare(str(model), name), out, quiet)


def parts(folder: Path) -> dict[str, Any]:
    source = exporting.open_packed(str(folder))
    return {site: source.compressed(site).base for site in source.table}


def equal_codes(first: dict[str, Any], second: dict[str, Any], scale_dtype: bool = True) -> None:
    """Codes, scales, zero points and groups are the same numbers; scales in the same type where that is asked for."""
    assert first.keys() == second.keys()
    for site, a in first.items():
        b = second[site]
        assert torch.equal(a.codes, b.codes), site
        assert torch.equal(a.scale.double(), b.scale.double()), site
        assert not scale_dtype or a.scale.dtype == b.scale.dtype
        assert (a.bits, a.group_size, a.bipolar) == (b.bits, b.group_size, b.bipolar)
        for x, y in ((a.zero, b.zero), (a.group, b.group)):
            assert (x is None) == (y is None), site
            assert x is None or torch.equal(x, y), site


# ------------------------------------------------------------------------------------------------ the real reader


@pytest.mark.parametrize("recipe", ["symmetric", "3 bits", "5 bits per row", "two widths, with the head"])
def test_transformers_reads_compressed_tensors(recipe: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """It decodes to the dtype of the scales, bfloat16, when a module first runs in float32: exactly as codes times scales."""
    export(made(recipe), "compressed-tensors", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(made(recipe)))


def test_transformers_reads_asymmetric_compressed_tensors_decoded(made: Callable[..., Path], tmp_path: Path) -> None:
    """Packed, transformers 5.23 expects zero points of another shape; with dequantize=True it rounds values to bfloat16."""
    export(made("asymmetric"), "compressed-tensors", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    source = PackedSource.open_packed(made("asymmetric"))
    for site in source.table:
        assert torch.equal(model.get_submodule(site).weight, source.tensor(f"{site}.weight").bfloat16().float()), site


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("recipe", ["symmetric", "3 bits"])
def test_transformers_reads_experts(family: str, recipe: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """Experts become one dense tensor in the dtype of the scales; every decoded value is compared."""
    model = made(recipe, family, num_hidden_layers=2, **({"moe_intermediate_size": 64} if family == "qwen3_moe" else {}))
    export(model, "compressed-tensors", tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    source = PackedSource.open_packed(model)
    disk, names = (
        ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    block = next(n for n in range(2) if any(f"layers.{n}.{disk}.experts" in site for site in source.table))
    experts = loaded.model.layers[block].mlp.experts

    def weight(expert: int, name: str) -> torch.Tensor:
        return source.tensor(f"model.layers.{block}.{disk}.experts.{expert}.{name}.weight").bfloat16().float()

    for expert in range(4):
        joined = torch.cat([weight(expert, names[0]), weight(expert, names[1])])
        assert torch.equal(experts.gate_up_proj[expert], joined)
        assert torch.equal(experts.down_proj[expert], weight(expert, names[2]))
    with torch.no_grad():
        assert bool(loaded(PROBE).logits.isfinite().all())


# ------------------------------------------------------------------------------------------------ round trips

TRIPS = [
    ("symmetric", ["gptq", "awq", "compressed-tensors"]),
    ("asymmetric", ["gptq", "awq", "compressed-tensors"]),
    ("3 bits", ["gptq", "compressed-tensors"]),
    ("5 bits per row", ["compressed-tensors"]),
    ("two widths, with the head", ["gptq", "compressed-tensors"]),
    ("act-order", ["gptq"]),
]


@pytest.mark.parametrize(("recipe", "name"), [(recipe, name) for recipe, names in TRIPS for name in names])
def test_there_and_back_again(recipe: str, name: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """Native -> other -> native: every code, scale, zero point and group; and all other tensors byte for byte."""
    original = made(recipe)
    summary = export(original, name, tmp_path / "there")
    assert summary["widened"] == {}
    assert isinstance(open_any(tmp_path / "there"), ForeignSource)
    export(tmp_path / "there", "native", tmp_path / "back")
    first, second = PackedSource.open_packed(original), PackedSource.open_packed(tmp_path / "back")
    equal_codes(parts(original), parts(tmp_path / "back"), scale_dtype=False)
    assert first.entries.keys() == second.entries.keys()
    for tensor in first.entries:
        if tensor.removesuffix(".weight") not in first.table:
            assert torch.equal(first.tensor(tensor), second.tensor(tensor)), tensor
    assert torch.equal(logits(tmp_path / "back"), logits(original))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("recipe", "first", "second"),
    [
        ("symmetric", "gptq", "awq"),
        ("symmetric", "awq", "compressed-tensors"),
        ("symmetric", "compressed-tensors", "gptq"),
        ("asymmetric", "gptq", "awq"),
        ("asymmetric", "awq", "gptq"),
        ("3 bits", "compressed-tensors", "gptq"),
    ],
)
def test_between_foreign_layouts(recipe: str, first: str, second: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """A -> B gives the files that native -> B gives, where scales have one type."""
    export(made(recipe), first, tmp_path / "a")
    export(tmp_path / "a", second, tmp_path / "b")
    equal_codes(parts(made(recipe)), parts(tmp_path / "b"), scale_dtype=False)
    again = tmp_path / "again"
    export(tmp_path / "b", first, again)
    assert tensors(again).keys() == tensors(tmp_path / "a").keys()
    for tensor, value in tensors(tmp_path / "a").items():
        assert torch.equal(tensors(again)[tensor].double(), value.double()), tensor


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_a_checkpoint_from_elsewhere_becomes_native(made: Callable[..., Path], tmp_path: Path) -> None:
    """As GPTQModel writes them: float16 scales with all their bits, v1 zeros, its own settings."""
    export(made("symmetric"), "gptq", tmp_path / "foreign")
    path = tmp_path / "foreign" / "model.safetensors"
    found, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, tensor in found.items():
        if name.endswith(".scales"):
            found[name] = (tensor.float() * (1 + torch.rand(tensor.shape, generator=generator) / 100)).half()
    container.save(path, found)
    (tmp_path / "foreign" / "quantize_config.json").unlink()
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    more = {"damp_percent": 0.01, "true_sequential": True, "model_file_base_name": None}
    config["quantization_config"] = {**config["quantization_config"], **more}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    export(tmp_path / "foreign", "native", tmp_path / "native")
    equal_codes(parts(tmp_path / "foreign"), parts(tmp_path / "native"))
    part = parts(tmp_path / "native")["model.layers.0.mlp.up_proj"]
    assert part.scale.dtype == torch.float16
    assert not torch.equal(part.scale.bfloat16().half(), part.scale)
    export(tmp_path / "native", "gptq", tmp_path / "again")
    assert all(torch.equal(value, found[name]) for name, value in tensors(tmp_path / "again").items())
    model = compress.load(str(tmp_path / "native"), dtype=torch.float32)
    site = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(site).compressed().dequantize(), part.dequantize())


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("low", [False, True])
def test_floats_of_four_bits_are_wider_integers(name: str, low: bool, tiny: Tiny, tmp_path: Path) -> None:
    """E2M1 times a power of two; scales that float16 does not hold are written in bfloat16, where a layout has that."""
    model = tmp_path / "model"
    shutil.copytree(tiny("llama", hidden_size=128), model)
    if low:
        found = load_file(model / "model.safetensors")
        found["model.layers.1.mlp.up_proj.weight"][:, :32] *= 2.0**-30
        container.save(model / "model.safetensors", found)
    run(model, tmp_path / "native", None, [{"match": "*.up_proj", "method": "quant/floating", "options": FLOATS}])
    made = export(tmp_path / "native", name, tmp_path / "out")
    assert made["scale_dtypes"] == (["BF16"] if low or name == "compressed-tensors" else ["F16"])
    assert made["widened"] == {("4 -> 5 bits" if name == "compressed-tensors" else "4 -> 8 bits"): 3}
    first, second = open_any(tmp_path / "native"), open_any(tmp_path / "out")
    for site in PackedSource.open_packed(tmp_path / "native").table:
        assert torch.equal(first.tensor(f"{site}.weight"), second.tensor(f"{site}.weight"))


# ------------------------------------------------------------------------------------------------ what is refused


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
    with pytest.raises(RecipeError, match="--format exl2: no such format; known are awq, compressed-tensors"):
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


# ------------------------------------------------------------------------------------------------ folders


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
    partial = export_card.text(work.source, {**record, "left_out": ["mtp.*.weight"]}, "name `<b>`")
    assert "leaves out `mtp.*.weight`, for which gptq has no place" in partial and "bit for bit" not in partial
    assert "# name &#96;&lt;b&gt;&#96;" in partial
    (tmp_path / "native" / "evaluation.json").write_text('{"perplexity": 1.0}')
    assert "not measured" in export_card.text(work.source, record, "name"), "a file that somebody else wrote"


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
