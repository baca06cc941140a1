"""Cutting experts, cutting blocks to different sizes, and cutting that was stopped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import loaded, logits, made, quiet
from runs import compress as run
from runs import digests, steps
from thorough import some
from torch import Tensor

from compress.checkpoint.source import Source
from compress.errors import FormatError, RecipeError, ResumeError
from compress.evaluation.quality import measure
from compress.model.layer_sizes import sizes_of
from compress.output.job import Job
from compress.recipe.data import Data
from compress.structured_pruning import importance
from compress.verify.verify import verify

Tiny = Callable[..., Path]
PROBE = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(5))


SETTINGS = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
}


@pytest.mark.parametrize("family", some([*SETTINGS, "mixtral without a block"], "gpt_oss", "mixtral without a block"))
def test_cutting_experts_equals_a_model_of_those_that_stay(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Every parameter of the original that has a row for each expert, cut by hand."""
    from transformers import AutoModelForCausalLM

    family, _, fewer = family.partition(" ")
    model = tiny(family, **({"n_routed_experts": 8} if family == "deepseek_v3" else {}))
    summary = made(model, tmp_path / "out", ids, experts=0.5, blocks=bool(fewer))
    original, small = loaded(model), loaded(tmp_path / "out")
    left = 4 if family == "deepseek_v3" else 2
    assert getattr(small.config, SETTINGS[family]) == left
    config = original.config
    setattr(config, SETTINGS[family], left)
    config.num_hidden_layers = len(summary["blocks"])
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(config, key, None):
            setattr(config, key, [getattr(config, key)[block] for block in summary["blocks"]])
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {}
    for name, value in original.state_dict().items():
        if name.startswith("model.layers."):
            block, rest = name.removeprefix("model.layers.").split(".", 1)
            if int(block) not in summary["blocks"]:
                continue
            if block in summary["experts"] and any(part in rest for part in ("mlp.experts.", "mlp.gate.", "mlp.router.")):
                value = value[torch.tensor(summary["experts"][block])]
            name = f"model.layers.{summary['blocks'].index(int(block))}.{rest}"
        state[name] = value
    expected.load_state_dict(state)
    torch.testing.assert_close(logits(small, PROBE), logits(expected, PROBE), rtol=1e-5, atol=1e-5)
    assert summary["after"]["experts"] == left
    assert Source.open(tmp_path / "out").nbytes == summary["bytes_after"] < summary["bytes_before"]
    verify(tmp_path / "out", "cpu", quiet)


def test_experts_count_by_what_the_router_makes_of_their_outputs(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Scores by the equation, token by token, on the inputs of a block's experts; the two highest stay."""
    import numpy as np

    model = tiny("mixtral")
    summary = made(model, tmp_path / "out", ids, experts=0.5)
    original = loaded(model)
    seen: dict[int, list[tuple[Tensor, ...]]] = {}
    for number, layer in enumerate(original.model.layers):
        layer.mlp.experts.register_forward_pre_hook(lambda _, rows, n=number: seen.setdefault(n, []).append(rows))
    original.requires_grad_(False)
    original(torch.from_numpy(np.load(ids)).long(), use_cache=False)
    for number, calls in seen.items():
        experts = original.model.layers[number].mlp.experts
        total, count = [0.0] * 4, [0] * 4
        for hidden, index, weights in calls:
            for token in range(hidden.shape[0]):
                for place in range(index.shape[1]):
                    expert = int(index[token, place])
                    gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    output = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    total[expert] += float(weights[token, place] * output.norm())
                    count[expert] += 1
        mean = [a / max(b, 1) for a, b in zip(total, count, strict=True)]
        assert summary["experts"][str(number)] == sorted(sorted(range(4), key=mean.__getitem__)[2:])


def test_an_expert_without_tokens_goes_first() -> None:
    sums = importance.ExpertScore(3)
    sums.add(0, torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    sums.add(2, torch.tensor([[0.0, 2.0]]))
    assert sums.scores().tolist() == [3.0, 0.0, 2.0]


def test_what_experts_cannot_be_cut_is_said(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    def say(family: str, **wish: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            made(tiny(family), tmp_path / "out", ids, **wish)
        assert not (tmp_path / "out.job").exists()
        return caught.value.message

    assert "has none" in say("llama", experts=0.5)
    assert "goes to 2 experts, and could choose from 1" in say("mixtral", experts=0.75)
    assert "in 2 sets that need the same number" in say("deepseek_v3", experts=0.25)


UNEVEN: dict[str, dict[str, Any]] = {
    "llama": {"kv_groups": 0.5, "channels": 0.5},
    "qwen2": {"channels": 0.25},  # with biases in front of heads
    "opt": {"channels": 0.5},  # with biases in front of channels
}


@pytest.mark.parametrize("family", some(UNEVEN, "llama"))
def test_blocks_of_different_sizes_load_and_go_on(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """What is cut equals what is zeroed; it generates, is verified, measured and compressed further."""
    model, out = tiny(family), tmp_path / "out"
    summary = made(model, out, ids, uneven=True, repair=False, anew=family == "llama", **UNEVEN[family])
    sizes = {name: tuple(size) for name, size in summary["sizes"].items()}
    source = Source.open(out)
    assert sizes == sizes_of(source.config)
    assert len({size for name, size in sizes.items() if "down_proj" in name or "fc2" in name}) > 1
    small = loaded(out)
    assert all(tuple(small.get_submodule(name).weight.shape) == size for name, size in sizes.items())
    original = loaded(model)
    for name, (_, columns) in sizes.items():
        reader = original.get_submodule(name)
        if reader.weight.shape[1] > columns:
            kept = [
                c
                for c in range(reader.weight.shape[1])
                if bool((reader.weight[:, c] == source.tensor(f"{name}.weight").T).all(1).any())
            ]
            assert len(kept) == columns
            with torch.no_grad():
                reader.weight[:, [c for c in range(reader.weight.shape[1]) if c not in kept]] = 0
    torch.testing.assert_close(logits(small, PROBE), logits(original, PROBE), rtol=1e-4, atol=1e-5)
    tokens = small.generate(PROBE[:1, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, small.generate(PROBE[:1, :4], max_new_tokens=4, do_sample=False, use_cache=False))
    verify(out, "cpu", quiet)
    found = measure(str(out), str(model), Data(name=str(ids)), "cpu", "float32", False, quiet)
    assert found.kl is not None
    assert found.kl > 0
    run(out, tmp_path / "packed", ids, steps("quant/gptq", bits=8, group_size=-1))
    torch.testing.assert_close(logits(loaded(tmp_path / "packed"), PROBE), logits(small, PROBE), rtol=0.1, atol=0.1)


def test_what_is_left_goes_where_it_counts() -> None:
    scores = {0: torch.tensor([9.0, 8.0, 7.0, 1.0]), 1: torch.tensor([2.0, 0.1, 0.2, 0.3]), 2: torch.tensor([3.0, 2.5, 0.0, 1.0])}
    assert importance.units_of(scores, 6, 1) == {0: 3, 1: 1, 2: 2}
    assert importance.units_of(scores, 8, 2) == {0: 4, 1: 2, 2: 2}
    assert importance.units_of(scores, 3, 1) == {0: 1, 1: 1, 2: 1}


def test_without_the_package_blocks_of_different_sizes_do_not_load(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    import json

    made(tiny("llama"), tmp_path / "out", ids, uneven=True, channels=0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers_weights"] == "pip-install-compress-llm-and-import-compress-first.safetensors"
    assert config["quantization_config"]["sites"] == {}


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ({"blocks": 1}, "only KV groups and channels"),
        ({"heads": 0.5, "channels": 0.5}, "give --kv-groups instead"),
        ({"channels": 0.5, "score": "wanda"}, "do not compare between blocks"),
    ],
)
def test_what_cannot_differ_is_said(wish: dict[str, Any], complaint: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        made(tiny("llama"), tmp_path / "out", ids, uneven=True, **wish)
    assert re.search(complaint, caught.value.message)


@pytest.mark.parametrize("size", [[0, 32], [8], "8x32", [8.0, 32], [True, 32], [65, 32], [64, 33]], ids=str)
def test_sizes_that_make_no_sense_are_refused(size: Any, tiny: Tiny) -> None:
    from compress.model.layer_sizes import resize
    from compress.model.meta import build_model

    folder = tiny("llama")
    with pytest.raises(FormatError, match="compress_sizes"):
        sizes = sizes_of({"compress_sizes": {"model.layers.0.mlp.up_proj": size}})
        resize(build_model(Source.open(folder).config, str(folder), torch.float32), sizes, str)


@pytest.mark.parametrize(
    "wish", [{"channels": 0.5, "kv_groups": 0.5, "uneven": True}, {"channels": 0.25, "blocks": 1, "score": "wanda"}]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    wish: dict[str, Any], tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    made(model, tmp_path / "whole", ids, **wish)
    out = tmp_path / "stopped"
    commit = Job.commit
    for stop in (1, 2):  # after what was found out, and after the first block

        def stopped(job: Job, record: Any, last: int = stop) -> None:
            commit(job, record)
            if len(job.records) == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(Job, "commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(model, out, ids, **wish)
        assert not out.exists()
    monkeypatch.setattr(Job, "commit", commit)
    with pytest.raises(ResumeError, match="holds another job"):
        made(model, out, ids, **{**wish, "channels": 0.75})

    def never(*_: Any) -> Any:
        raise AssertionError("what was found out is found out again")

    monkeypatch.setattr("compress.structured_pruning.cutter.Cutter.scores", never)
    monkeypatch.setattr("compress.structured_pruning.cutter.Cutter.kept_blocks", never)
    made(model, out, ids, **wish)
    assert digests(out) == digests(tmp_path / "whole")
    assert not out.with_name("stopped.job").exists()
