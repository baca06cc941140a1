"""Lints of runtimes: on what a recipe will make and on what is there, and what methods say they will store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import compress as run

from compress import registry
from compress.architecture.config import settings
from compress.architecture.family import Site
from compress.architecture.known import family_of
from compress.checkpoint import packed_source
from compress.errors import RecipeError
from compress.interop import exporter as exporting
from compress.interop import targets
from compress.interop.foreign import open_any
from compress.interop.targets import Stored, lint
from compress.methods.method import group_columns, uniform_described
from compress.recipe import reading as recipe_reading
from compress.runs import prepare as run_prepare

Tiny = Callable[..., Path]
LLAMA = {"model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 128}
LINEARS = {
    "self_attn.q_proj": (512, 512),
    "self_attn.k_proj": (256, 512),
    "self_attn.v_proj": (256, 512),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_proj": (1536, 512),
    "mlp.up_proj": (1536, 512),
    "mlp.down_proj": (512, 1536),
}


def grid_described(shape: tuple[int, int], bits: int, group_size: int, zero: bool = False, more: Any = None) -> dict[str, Any]:
    """How a checkpoint describes a weight (out, in) on a uniform grid, with more words if any."""
    spec = uniform_described(shape, bits, group_columns(group_size, shape[1]), zero=zero).spec
    assert spec is not None
    return {**spec, "base": spec["base"] | (more or {})}


def dense_model(**changes: Any) -> Stored:
    """Two blocks of a llama with 4 bits in groups of 128; `changes` are other options by linear, None for dense."""
    sites, specs = [], {}
    for block in range(2):
        for kind, shape in LINEARS.items():
            site = Site(f"model.layers.{block}.{kind}", shape, block, kind, kind, f"model.layers.{block}.{kind}.weight")
            options = {"bits": 4, "group_size": 128, **changes.get("every", {}), **(changes.get(kind.split(".")[1]) or {})}
            sites.append(site)
            if changes.get(kind.split(".")[1], {}) is not None:
                specs[site.name] = grid_described(shape, **options)
    return Stored(family_of("llama"), LLAMA, sites, specs)


def expert_model(family: str = "mixtral", **changes: Any) -> Stored:
    """Two blocks of four experts; `changes` are options by block and expert, as b0e1, None for dense."""
    layout = family_of(family).experts
    assert layout is not None
    sites, specs = [], {}
    for block in range(2):
        for expert in range(4):
            for name in (*layout.inputs, layout.output):
                full = f"model.layers.{block}.{layout.disk}.{expert}.{name}"
                sites.append(Site(full, (256, 256), block, "x", f"{layout.disk}.{name}", full + ".weight", expert))
                key = f"b{block}e{expert}"
                if changes.get(key, {}) is not None:
                    options = {"bits": 4, "group_size": 128, **changes.get("every", {}), **changes.get(key, {})}
                    specs[full] = grid_described((256, 256), **options)
    return Stored(family_of(family), {**LLAMA, "model_type": family}, sites, specs)


def said(found: list[targets.Finding], severity: str = "refuse") -> str:
    return "\n".join(finding.message for finding in found if finding.severity == severity)


@pytest.mark.parametrize("target", ["vllm", "sglang", "transformers", "llama.cpp"])
def test_one_plain_scheme_is_fine_everywhere(target: str) -> None:
    assert lint(target, dense_model()) == []
    assert said(lint(target, expert_model())) == ""


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 64}, {"zero": True}, None])
def test_siblings_have_one_scheme(target: str, change: dict[str, Any] | None) -> None:
    found = said(lint(target, dense_model(k_proj=change)))
    assert "model.layers.0.self_attn.q_proj has 4 bits, group 128, symmetric" in found
    assert "model.layers.0.self_attn.k_proj has" in found
    assert "expected one scheme, as they are loaded as one matrix" in found
    assert said(lint("transformers", dense_model(k_proj=change))) == ""
    assert said(lint(target, dense_model(down_proj={"bits": 8}))) == "", "nothing is fused with it"


def test_gate_and_up_are_siblings() -> None:
    assert "mlp.gate_proj has 4 bits" in said(lint("vllm", dense_model(up_proj={"bits": 3})))


@pytest.mark.parametrize("change", [{"b0e1": {"bits": 8}}, {"b1e3": None}])
def test_experts_of_a_block_have_one_scheme(change: dict[str, Any]) -> None:
    assert "expected one scheme for all experts of a block" in said(lint("vllm", expert_model(**change)))
    assert said(lint("transformers", expert_model(**change))) == "", "the native format has experts one by one"
    found = said(lint("transformers", expert_model(**change), formats=["compressed-tensors"]))
    assert "expected one scheme for the experts of all blocks" in found


def test_experts_of_blocks_may_differ_but_for_transformers() -> None:
    stored = expert_model(**{f"b1e{n}": {"bits": 8} for n in range(4)})
    assert said(lint("vllm", stored)) == ""
    assert "experts of all blocks" in said(lint("transformers", stored, formats=["compressed-tensors"]))


def test_zero_points_on_transformers() -> None:
    every = {"every": {"zero": True}}
    assert lint("transformers", dense_model(**every)) == []
    found = lint("transformers", dense_model(**every), formats=["compressed-tensors"])
    assert (said(found), "dequantize=True" in said(found, "warn")) == ("", True)
    found = lint("transformers", dense_model(**every, down_proj={"bits": 8}), formats=["compressed-tensors"])
    assert "all linears by one scheme" in said(found)
    assert "experts with zero points" in said(lint("transformers", expert_model(**every), formats=["compressed-tensors"]))


def test_gptq_on_transformers_has_one_scheme() -> None:
    found = lint("transformers", dense_model(q_proj={"bits": 8}), formats=["gptq"])
    assert "no settings by module for gptq" in said(found)
    assert "gptqmodel" in said(found, "warn")
    assert said(lint("transformers", dense_model(), formats=["gptq"])) == ""


@pytest.mark.parametrize(
    ("parallel", "size", "fine"), [(2, 128, True), (4, 128, True), (8, 128, False), (8, 64, True), (3, 128, False), (8, -1, True)]
)
def test_shards_have_whole_groups(parallel: int, size: int, fine: bool) -> None:
    """down_proj has 1536 columns and o_proj 512: over 8, 64 of o_proj each."""
    found = said(lint("vllm", dense_model(every={"group_size": size}), parallel))
    assert (found == "") == fine
    if parallel == 8 and not fine:
        assert "in=512 over 8 GPUs gives 64 columns each, no whole groups of 128" in found
        assert "--tensor-parallel 4 at most" in found
    if parallel == 3:
        assert "out=512 is no multiple of 3 GPUs" in found


def test_rows_in_tiles_of_kernels() -> None:
    found = lint("vllm", dense_model(every={"group_size": 64}), 8)
    assert "out=256 over 8 GPUs gives 32 rows each; fast kernels take multiples of 64" in said(found, "warn")


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_widths_of_recent_builds_only(bits: int) -> None:
    found = lint("vllm", dense_model(every={"bits": bits}))
    assert f"{bits} bits in compressed-tensors: only recent builds" in said(found, "warn")
    assert said(found) == ""


def test_what_no_layout_of_a_runtime_holds() -> None:
    stored = dense_model()
    specs = {name: {"shape": [512, 512], "base": {"format": "two_level"}} for name in stored.specs}
    found = said(lint("vllm", Stored(stored.family, stored.config, stored.sites, specs)))
    assert "no layout that vllm reads holds this" in found
    assert "--format dense" in found
    assert lint("vllm", Stored(stored.family, stored.config, stored.sites, specs), formats=["dense"]) == []
    assert all(f"{name}: model.layers.0" in found for name in ("compressed-tensors", "gptq", "awq"))
    assert lint("transformers", Stored(stored.family, stored.config, stored.sites, specs)) == []


def test_the_layout_is_the_first_that_fits() -> None:
    """Act-order is GPTQ's alone."""
    stored = dense_model()
    specs = {name: grid_described(tuple(s["shape"]), 4, 128, more={"group": "U8"}) for name, s in stored.specs.items() if s}
    assert lint("vllm", Stored(stored.family, stored.config, stored.sites, specs)) == []
    assert "act-order" in said(lint("vllm", Stored(stored.family, stored.config, stored.sites, specs), formats=["awq"]))


def test_formats_that_a_runtime_does_not_read() -> None:
    assert "vllm reads compressed-tensors, gptq, awq" in said(lint("vllm", dense_model(), formats=["gguf"]))
    assert lint("vllm", dense_model(), formats=["gguf", "awq"]) == []
    assert "llama.cpp reads gguf" in said(lint("llama.cpp", dense_model(), formats=["dense"]))


def test_llama_cpp() -> None:
    assert "groups of 16" in said(lint("llama.cpp", dense_model(every={"group_size": 16})))
    stored = dense_model()
    other = Stored(stored.family, {**LLAMA, "model_type": "phi3"}, stored.sites, stored.specs)
    assert "model_type is 'phi3'" in said(lint("llama.cpp", other))
    assert "dense among 4 experts" in said(lint("llama.cpp", expert_model(b0e1=None)))


def test_families_of_other_names() -> None:
    assert "experts are one tensor in the original" in said(lint("vllm", expert_model("gpt_oss")))
    stored = dense_model()
    assert "(in, out)" in said(lint("vllm", Stored(family_of("gpt2"), {"model_type": "gpt2"}, stored.sites, stored.specs)))


def test_an_unknown_runtime() -> None:
    with pytest.raises(RecipeError, match=r"target ollama: no such runtime; known are vllm, sglang, transformers, llama\.cpp"):
        lint("ollama", dense_model())


def test_what_is_known_only_afterwards_is_said() -> None:
    stored = dense_model()
    specs: dict[str, Any] = dict.fromkeys(stored.specs)
    found = lint("vllm", Stored(stored.family, stored.config, stored.sites, specs))
    assert said(found) == ""
    assert "depends on the weights; it is checked again when it is exported" in said(found, "warn")


# ------------------------------------------------------------------------------------------------ plans and checkpoints


@pytest.mark.parametrize("method", registry.methods(("quant",)))
def test_methods_store_what_they_say(method: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """What a lint sees before a run is what is there after it."""
    model = tiny("llama", num_hidden_layers=1)
    options: dict[str, Any] = {}
    known = registry.method(method).model_fields
    if "group_size" in known and "datatype" not in known and method != "quant/spqr":
        options["group_size"] = 16
    if "datatype" in known:
        options["group_size"] = 32
    options |= {"g_min": 8} if "g_min" in known else {}
    options |= {"steps": 2} if "steps" in known else {}
    variants: list[dict[str, Any]] = [options]
    if "symmetric" in known:
        variants.append({**options, "symmetric": False})
    if method == "quant/gptq":
        variants.append({**options, "order": "desc_act", "symmetric": False})
    if method == "quant/floating":
        variants += [{"datatype": "mxfp4"}, {"datatype": "nf4", "group_size": 32}]
    for number, variant in enumerate(variants):
        steps = [{"match": "*.*", "method": method, "options": variant}]
        plan = run_prepare.prepare(str(model), recipe_reading.parse({"steps": steps, "data": {"name": str(ids)}}), "cpu")
        run(model, tmp_path / str(number), ids, steps)
        table = packed_source.PackedSource.open_packed(tmp_path / str(number)).table
        for a in plan.assignments:
            said_before = a.method.describe(a.site.shape).spec
            if said_before is None:
                assert method == "quant/finequant"
                continue
            stored = json.loads(json.dumps(table[a.site.name]))
            assert said_before["shape"] == stored["shape"]
            for key, value in said_before["base"].items():
                assert stored["base"][key] == value, (method, key)
            if stored["base"]["format"] == "bitpack":
                assert stored["base"] == said_before["base"]


def test_a_checkpoint_is_linted_before_it_is_exported(tiny: Tiny, tmp_path: Path) -> None:
    steps = [
        {"match": "*.q_proj", "method": "quant/rtn", "options": {"bits": 8, "group_size": 32}},
        {"match": "*.*", "method": "quant/rtn", "options": {"bits": 4, "group_size": 32}},
    ]
    run(tiny("llama", hidden_size=128), tmp_path / "mixed", None, steps)
    source = open_any(str(tmp_path / "mixed"))
    assert "q_proj has 8 bits" in said(lint("vllm", targets.of_checkpoint(source)))
    exporting.export(exporting.prepare(str(tmp_path / "mixed"), "gptq"), tmp_path / "gptq", lambda *_: None)
    foreign = targets.of_checkpoint(open_any(str(tmp_path / "gptq")))
    assert said(lint("vllm", foreign)) == said(lint("vllm", targets.of_checkpoint(source)))
    assert settings(source)["model_type"] == "llama"
