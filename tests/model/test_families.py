"""Every family: streamed equals whole, every tensor has one disposition, compressed and reloaded equals streamed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import compress as run
from runs import steps
from safetensors.torch import load_file, save_file
from tiny import TINY, VOCABULARY, tiny_checkpoint
from transformers import AutoModelForCausalLM

import compress  # noqa: F401  (registers the format with transformers)
from compress.architecture.inventory import take_inventory
from compress.architecture.known import model_types
from compress.blockwise.forward import last_hidden, open_streamed
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CalibrationError, CheckpointError
from compress.inspection.contents import contents
from compress.inspection.doctor import diagnose
from compress.model.detect import find_family
from compress.model.streamed import StreamedModel

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
# Experts add up their tokens' outputs in another order than the fused module; everything else is the same arithmetic.
TOLERANCE = 1e-5


def token_ids(samples: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def whole(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, use_cache=False)
    return output.logits, list(output.hidden_states)


def streamed(source: Source, ids: torch.Tensor) -> torch.Tensor:
    streamed, hidden = last_hidden(source, ids, torch.float32, CPU)
    with streamed.embeddings_and_head():
        return streamed.logits(ids, hidden)


def test_every_family_has_a_tiny_model() -> None:
    assert sorted(TINY) == model_types()


@pytest.mark.parametrize("family", TINY)
def test_streamed_hidden_states_equal_the_whole_models(family: str, tiny: Tiny) -> None:
    folder, ids = tiny(family), token_ids()
    logits, expected = whole(folder, ids)
    streamed = open_streamed(Source.open(folder), torch.float32, CPU)
    with streamed.embeddings_and_head():
        hidden = streamed.embed(ids)
    for block in range(len(streamed.blocks)):
        torch.testing.assert_close(hidden, expected[block], rtol=TOLERANCE, atol=TOLERANCE)
        streamed.load(block)
        hidden = streamed.forward(block, hidden)
        streamed.release(block)
    with streamed.embeddings_and_head():
        torch.testing.assert_close(streamed.logits(ids, hidden), logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


@pytest.mark.parametrize("family", TINY)
def test_every_tensor_is_claimed_exactly_once(family: str, tiny: Tiny) -> None:
    source = Source.open(tiny(family))
    inventory = take_inventory(source, find_family(source))
    claimed = [*{site.tensor for site in inventory.sites}, *inventory.copied, *inventory.dropped]
    assert sorted(claimed) == sorted(source.entries)
    assert len({site.name for site in inventory.sites}) == len(inventory.sites)
    matrices = {site.tensor for site in inventory.sites}
    # What is left dense is named here: a linear that a family forgot would show up.
    dense = (
        "embed",
        "norm",
        "bias",
        "router",
        "mlp.gate.",
        "moe.gate.",
        "shared_expert_gate",
        "wte",
        "wpe",
        "ln_",
        "sinks",
        "vision_tower",
        "multi_modal",
    )
    assert all(any(word in name for word in dense) for name in set(source.entries) - matrices)


@pytest.mark.parametrize("family", TINY)
def test_compressed_and_reloaded_gives_the_streamed_logits(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny(family), out, ids, steps(bits=3, group_size=16))
    probe = token_ids()
    expected = streamed(PackedSource.open_packed(out), probe)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(probe, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    original, _ = whole(tiny(family), probe)
    assert 0 < (logits - original).norm() / original.norm() < 1, "compression must change something, and not everything"
    left = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    assert all("gate" in name or "vision_tower" in name for name in left)

    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    before, after = Source.open(out), Source.open(tmp_path / "again")
    assert set(before.entries) == set(after.entries)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(probe, use_cache=False).logits, logits)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gpt_oss"])
def test_sharded_checkpoints_read_the_same(family: str, tiny: Tiny) -> None:
    one, many = Source.open(tiny(family)), Source.open(tiny(family, max_shard_size="20KB"))
    assert len({entry.file for entry in many.entries.values()}) > 1
    assert set(one.entries) == set(many.entries)
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.entries)


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def test_a_tensor_that_no_rule_claims_is_an_error_until_the_recipe_names_it(tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("llama"), tmp_path / "odd", lambda t: t.update({"model.layers.1.extra.weight": torch.ones(3)}))
    source = Source.open(folder)
    with pytest.raises(CheckpointError, match=r"no rule claims 1 tensors, such as 'model.layers.1.extra.weight'.*copy"):
        take_inventory(source, find_family(source))
    assert "model.layers.1.extra.weight" in take_inventory(source, find_family(source), copy=("*.extra.*",)).copied
    assert "model.layers.1.extra.weight" in take_inventory(source, find_family(source), drop=("*.extra.*",)).dropped


def test_tensors_outside_the_blocks_go_along_whatever_they_are(tiny: Tiny, tmp_path: Path) -> None:
    """Towers and heads that the model class does not know; a rule of the recipe or the family still wins."""
    extra = {
        "audio_tower.conv.weight": torch.ones(2, 3, 4),
        "rotary_emb.steps": torch.ones(2),
        "x.rotary_emb.inv_freq": torch.ones(2),
    }
    source = Source.open(changed(tiny("llama"), tmp_path / "tower", lambda t: t.update(extra)))
    inventory = take_inventory(source, find_family(source))
    assert {"audio_tower.conv.weight", "rotary_emb.steps"} <= set(inventory.copied)
    assert inventory.dropped == ["x.rotary_emb.inv_freq"]
    assert "audio_tower.conv.weight" in take_inventory(source, find_family(source), drop=("audio_tower.*",)).dropped
    every = {site.tensor for site in inventory.sites} | set(inventory.copied) | set(inventory.dropped)
    assert every == set(source.entries)


def test_prediction_heads_beyond_the_last_block_go_along_byte_for_byte(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    extra = {"model.layers.3.eh_proj.weight": torch.randn(4, 4), "mtp.head.weight": torch.randn(2, 2)}
    folder = changed(tiny("deepseek_v3"), tmp_path / "mtp", lambda t: t.update(extra))
    run(folder, tmp_path / "out", ids, steps("quant/rtn", bits=4, group_size=16))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in extra.items())


def test_a_missing_linear_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("llama"), tmp_path / "gap", without("model.layers.1.self_attn.k_proj.weight"))
    source = Source.open(folder)
    with pytest.raises(CheckpointError, match=r"layers.1 has .*q_proj.* but not self_attn.k_proj"):
        take_inventory(source, find_family(source))


def test_of_alternatives_a_block_has_one(tiny: Tiny, tmp_path: Path) -> None:
    """Smaller models of DeepSeek have q_proj where larger ones have q_a_proj."""
    name = "model.layers.1.self_attn.{}.weight"
    queries, other = name.format("q_a_proj"), name.format("q_proj")
    none = Source.open(changed(tiny("deepseek_v3"), tmp_path / "none", without(queries)))
    with pytest.raises(CheckpointError, match=r"layers.1 has .*kv_a_proj_with_mqa but not self_attn.q_proj, self_attn.q_a_proj"):
        take_inventory(none, find_family(none))
    one = Source.open(changed(tiny("deepseek_v3"), tmp_path / "one", lambda t: t.update({other: t.pop(queries)})))
    assert other in {site.tensor for site in take_inventory(one, find_family(one)).sites}


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm", "model.norm", "model.embed_tokens", "lm_head"])
def test_a_missing_tensor_is_an_error_and_not_garbage(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("llama"), tmp_path / "gap", without(f"{name}.weight"))
    expected = rf"gap: nothing fills {name}.weight \(1 in all\)"
    with pytest.raises(CheckpointError, match=expected):
        open_streamed(Source.open(folder), torch.float32, CPU)
    with pytest.raises(CheckpointError, match=expected):
        run(folder, tmp_path / "out", None, steps("quant/rtn", bits=4, group_size=16))
    assert not (tmp_path / "out.job").exists()


def test_experts_out_of_order_are_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("mixtral"), tmp_path / "gap", without("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    source = Source.open(folder)
    with pytest.raises(CheckpointError, match=r"experts"):
        take_inventory(source, find_family(source))


def test_checkpoints_without_the_models_prefix(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """GPT-2's first checkpoints say `h.0...` and hold causal masks that no current model reads."""

    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    folder, probe = changed(tiny("gpt2"), tmp_path / "bare", bare), token_ids()
    torch.testing.assert_close(
        streamed(Source.open(folder), probe), whole(tiny("gpt2"), probe)[0], rtol=TOLERANCE, atol=TOLERANCE
    )
    run(folder, tmp_path / "out", ids, steps(bits=4, group_size=16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(probe, use_cache=False).logits
    torch.testing.assert_close(
        logits, streamed(PackedSource.open_packed(tmp_path / "out"), probe), rtol=TOLERANCE, atol=TOLERANCE
    )
    assert "h.0.attn.bias" not in Source.open(tmp_path / "out").entries


def test_an_unknown_family_names_the_known_ones(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "unknown")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama_of_tomorrow"}))
    expected = (
        r"'llama_of_tomorrow' is not a known family \(known are .*llama.*\), and cannot be inferred, because transformers cannot"
    )
    with pytest.raises(CheckpointError, match=expected):
        find_family(Source.open(folder))


MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
UNWRITTEN = {
    "olmo2": {},
    "starcoder2": {},
    "phi": {},
    "glm4_moe": {**MOE, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
}


@pytest.mark.parametrize("family", UNWRITTEN)
def test_a_family_that_is_not_written_is_inferred(
    family: str, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, family, UNWRITTEN[family])
    folder, probe = tiny_checkpoint(tmp_path / "model", family), token_ids()
    torch.testing.assert_close(streamed(Source.open(folder), probe), whole(folder, probe)[0], rtol=TOLERANCE, atol=TOLERANCE)
    run(folder, tmp_path / "out", ids, steps(bits=4, group_size=16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(probe, use_cache=False).logits
    torch.testing.assert_close(
        logits, streamed(PackedSource.open_packed(tmp_path / "out"), probe), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_what_an_inferred_family_does_not_know_is_left_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY, "olmo2", {})
    made, extra = tiny_checkpoint(tmp_path / "model", "olmo2"), "model.layers.1.extra.weight"
    source = Source.open(changed(made, tmp_path / "odd", lambda t: t.update({extra: torch.ones(3)})))
    with pytest.raises(CheckpointError, match=r"no rule claims 1 tensors, such as 'model.layers.1.extra.weight'.*`drop:`"):
        take_inventory(source, find_family(source))
    assert extra in take_inventory(source, find_family(source), drop=("*.extra.*",)).dropped
    inventory = take_inventory(source, find_family(source), copy=("*.extra.*",))
    StreamedModel(source, inventory, torch.float32, CPU).load(1)


def test_an_already_compressed_source_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("llama"), tmp_path / "out", None, steps("quant/rtn", bits=4, group_size=16))
    with pytest.raises(CheckpointError, match="already compressed"):
        find_family(Source.open(tmp_path / "out"))


def test_activations_that_overflow_are_named_where_they_do(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e20

    folder = changed(tiny("llama"), tmp_path / "large", large)
    with pytest.raises(CalibrationError, match=r"layers.1.mlp.down_proj: its inputs are not finite: .* overflows in float32"):
        run(folder, tmp_path / "out", ids, steps(bits=4, group_size=16))


def test_a_quantization_config_above_plain_weights_is_left_over(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    run(folder, tmp_path / "out", None, steps("quant/rtn", bits=4, group_size=16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "compress"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_framework_are_said_to_be_that(prefix: str, tiny: Tiny, tmp_path: Path) -> None:
    def wrapped(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    folder = changed(tiny("llama"), tmp_path / "wrapped", wrapped)
    with pytest.raises(
        CheckpointError, match=rf"wrapped: every tensor's name begins with '{re.escape(prefix)}', as .* leaves it"
    ):
        Source.open(folder)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter .* merge it into its base model first"):
        Source.open(tmp_path)


def test_what_is_not_known_can_be_looked_at(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "unknown")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama_of_tomorrow"}))
    found = contents(str(folder))
    assert found.notice is not None
    assert "'llama_of_tomorrow' is not a known family" in found.notice
    assert found.other_tensors == len(Source.open(folder).entries)
    assert found.bytes == found.other_bytes
    problems = [problem for problem in diagnose(folder, None, 1, lambda *_: None).problems if problem.stage == "model"]
    assert [problem.severity for problem in problems] == ["note"]
