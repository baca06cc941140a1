"""Cutting: scores by the equations, what is left equals what is zeroed, and plain transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import made, quiet
from torch import Tensor
from typer.testing import CliRunner

from compress.architecture.inventory import take_inventory
from compress.architecture.known import family_of
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.evaluation.quality import measure
from compress.model.detect import find_family
from compress.recipe.data import Data
from compress.structured_pruning import importance
from compress.structured_pruning.importance import group_scores, kept_of, repaired, spread, weight_scores
from compress.structured_pruning.sizes import Sizes, Wish, after, sizes_of, smaller_config
from compress.verify.verify import verify

Tiny = Callable[..., Path]


def logits(folder: Path, ids: Tensor, change: Callable[[Any], None] | None = None) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if change is not None:
        change(model)
    with torch.no_grad():
        found: Tensor = model.eval()(ids, use_cache=False).logits
    return found


PROBE = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(5))
CASES = {
    "channels": ("llama", {"channels": 0.25}),
    "heads": ("llama", {"heads": 0.5}),
    "KV groups": ("llama", {"kv_groups": 0.5}),
    "all heads of their own": ("llama", {"heads": 0.5, "num_key_value_heads": 4}),
    "all": ("qwen3", {"heads": 0.5, "channels": 0.5, "blocks": 1}),
    "biases": ("qwen2", {"kv_groups": 0.5, "channels": 0.25}),
    "sliding": ("mistral", {"kv_groups": 0.5}),
    "opt": ("opt", {"channels": 0.5}),
}


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
def test_cutting_equals_zeroing(family: str, options: dict[str, Any], tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    options = dict(options)
    changes = {key: options.pop(key) for key in ("num_key_value_heads",) if key in options}
    model = tiny(family, **changes)
    summary = made(model, tmp_path / "out", ids, repair=False, **options)
    source, small = Source.open(model), Source.open(tmp_path / "out")
    found = find_family(source)
    place = {block: number for number, block in enumerate(summary["blocks"])}

    def zeroed(loaded: Any) -> None:
        layers = loaded.get_submodule(found.blocks)
        for block, number in place.items():
            for part in (found.heads, *found.channels):
                if part is None:
                    continue
                reader = layers[block].get_submodule(part.output)
                left = small.tensor(f"{found.blocks}.{number}.{part.output}.weight").float()
                columns = [c for c in range(reader.weight.shape[1]) if bool((reader.weight[:, c] == left.T).all(1).any())]
                assert len(columns) == left.shape[1]
                gone = [c for c in range(reader.weight.shape[1]) if c not in columns]
                with torch.no_grad():
                    reader.weight[:, gone] = 0
        kept = [layers[block] for block in summary["blocks"]]
        for number, layer in enumerate(kept):
            layer.self_attn.layer_idx = number
        parent, _, leaf = found.blocks.rpartition(".")
        setattr(loaded.get_submodule(parent), leaf, torch.nn.ModuleList(kept))
        loaded.config.num_hidden_layers = len(kept)

    torch.testing.assert_close(logits(tmp_path / "out", PROBE), logits(model, PROBE, zeroed), rtol=1e-4, atol=1e-5)
    verify(tmp_path / "out", "cpu", quiet)
    assert not (tmp_path / "out.job").exists()
    assert summary["bytes_after"] == small.nbytes < source.nbytes
    assert "quantization_config" not in small.config


def test_it_generates_with_a_cache_and_is_found_by_eval(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made(tiny("qwen3"), tmp_path / "out", ids, blocks=1, kv_groups=0.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = model.generate(PROBE[:1, :4], max_new_tokens=4, do_sample=False)
    again = model.generate(PROBE[:1, :4], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(tokens, again)
    found = measure(str(tmp_path / "out"), None, Data(name=str(ids)), "cpu", "float32", False, quiet)
    assert found.kl is not None
    assert found.kl > 0


def test_repair_lowers_the_error_to_the_original(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    errors = []
    for repair in (False, True):
        out = tmp_path / str(repair)
        made(model, out, ids, channels=0.5, score="wanda", repair=repair)
        found = measure(str(out), str(model), Data(name=str(ids)), "cpu", "float32", False, quiet)
        errors.append(found.kl)
    assert errors[1] < 0.9 * errors[0]


def test_gradients_of_gates_are_those_of_weights(tiny: Tiny) -> None:
    """dL/d gate_c = sum_i w_ic dL/dw_ic, window by window, for every score."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    linear = model.model.layers[1].self_attn.o_proj
    model.requires_grad_(False)
    found = list(
        importance.gate_gradients(
            {(1, "heads"): linear}, {(1, "heads"): torch.ones(32)}, PROBE.split(1), lambda ids: model(ids).logits
        )
    )
    expected = []
    for ids in PROBE.split(1):
        linear.weight.requires_grad_(True)
        lost = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(lost, [linear.weight])
        expected.append((gradient * linear.weight).sum(0).detach())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[1, "heads"], theirs, rtol=1e-3, atol=1e-4)
    sums = [[float(e[8 * h : 8 * h + 8].double().sum()) for h in range(4)] for e in expected]
    wanted = {
        "fisher": [sum(s[h] ** 2 for s in sums) / 2 for h in range(4)],
        "taylor": [sum(abs(s[h]) for s in sums) / 2 for h in range(4)],
        "lora": [abs(sum(s[h] for s in sums)) / 2 for h in range(4)],
    }
    for score, values in wanted.items():
        scores = group_scores(found, {(1, "heads"): 8}, score)[1, "heads"]  # type: ignore[arg-type]
        torch.testing.assert_close(scores, torch.tensor(values, dtype=torch.float64), rtol=1e-3, atol=1e-5)


def test_scores_of_weights_and_what_is_kept() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 3.0], [1.0, 0.0, 1.0, 1.0]])
    assert weight_scores(weight, None, 2).tolist() == [6.0, 11.0]
    assert weight_scores(weight, torch.diag(torch.tensor([10.0, 1.0, 1.0, 0.5])), 2).tolist() == [24.0, 6.0]
    assert kept_of(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]
    assert kept_of(torch.tensor([9.0, 8.0, 1.0, 2.0]), 2, 2).tolist() == [0, 3]
    assert spread(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_repair_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 10, generator=generator, dtype=torch.float64) @ torch.randn(10, 10, generator=generator).double()
    weight, kept = torch.randn(4, 10, generator=generator), torch.tensor([0, 3, 4, 8, 9])
    damp = importance.DAMP * (inputs.T @ inputs / 200).diagonal().mean()
    # Damping is the second moment of inputs that are seen beside: sqrt(200 damp) times the identity.
    more = torch.cat([inputs, (200 * damp).sqrt() * torch.eye(10, dtype=torch.float64)])
    expected = torch.linalg.lstsq(more[:, kept], more @ weight.double().T).solution.T
    found = repaired(weight, (inputs.T @ inputs / 200).float(), kept)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_blocks_that_do_nothing_go_first(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama", num_hidden_layers=4), dtype=torch.float32)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(name).weight.mul_(1e-3)
    model.save_pretrained(tmp_path / "model")
    summary = made(tmp_path / "model", tmp_path / "out", ids, blocks=1)
    assert summary["blocks"] == [0, 1, 3]
    assert min(range(4), key=summary["influences"].__getitem__) == 2
    torch.testing.assert_close(logits(tmp_path / "out", PROBE), logits(tmp_path / "model", PROBE), rtol=0.1, atol=0.05)


def test_configs_of_what_is_left() -> None:
    before, left = Sizes(4, 2, 8, 64, 4), Sizes(2, 1, 8, 48, 2)
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "mlp_only_layers": [0, 3],
        "no_rope_layers": [1, 1, 0, 1],
        "max_window_layers": 3,
        "first_k_dense_replace": 1,
        "_name_or_path": "somewhere",
    }
    found = smaller_config(config, family_of("llama"), before, left, [1, 3])
    assert found == {
        "num_hidden_layers": 2,
        "layer_types": ["b", "d"],
        "mlp_only_layers": [1],
        "no_rope_layers": [1, 1],
        "max_window_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 48,
    }
    inner = smaller_config({"text_config": config, "x": 1}, family_of("llama"), before, left, [1, 3])
    assert inner == {"text_config": found, "x": 1}


def test_what_cannot_be_cut_is_said(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    def say(family: str, **wish: Any) -> str:
        source = Source.open(tiny(family))
        with pytest.raises(RecipeError) as caught:
            after(Wish(**wish), take_inventory(source, find_family(source)).family, sizes_of(source, find_family(source)))
        return caught.value.message

    assert "nothing to cut" in say("llama")
    assert "0.5" in say("llama", heads=0.25)
    assert "fewer" in say("opt", heads=0.5)
    assert "1 to 2 of 3" in say("llama", blocks=3)
    assert "--kv-groups" in say("llama", heads=0.5, kv_groups=0.5)
    assert "share" in say("llama", channels=25)
    with pytest.raises(RecipeError, match="multiple of the number of attention heads"):  # before any work
        made(tiny("llama", num_key_value_heads=4), tmp_path / "three", ids, heads=0.25)
    assert not (tmp_path / "three.job").exists()
    failed = CliRunner().invoke(__import__("compress.cli").cli.app, ["cut", str(tiny("llama")), "-o", str(tmp_path / "x")])
    assert isinstance(failed.exception, RecipeError)


def test_the_command(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from compress.cli import app

    command = ["cut", str(tiny("llama")), "-o", str(tmp_path / "out"), "--blocks", "1", "--channels", "0.25", "--data", str(ids)]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    values = json.loads(done.output)
    none = {"experts": 0, "expert_channels": 0, "shared_channels": 0}
    assert values["after"] == {"heads": 4, "kv_groups": 2, "head_dim": 8, "channels": 48, "blocks": 2} | none
    assert "| channels | 64 | 48 |" in (tmp_path / "out" / "README.md").read_text()
    again = CliRunner().invoke(app, [*command, "-q"], catch_exceptions=False)
    assert "was there already" in " ".join(again.output.split())
