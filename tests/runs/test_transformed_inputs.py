"""A method that is dropped into place transforms and rounds inputs: from the run to logits, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import TESTS
from runs import compress as run
from runs import steps
from scipy.linalg import hadamard
from tiny import VOCABULARY
from torch import Tensor, nn

from compress import registry
from compress.architecture.inventory import take_inventory
from compress.blockwise.forward import last_hidden, open_streamed
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import FormatError
from compress.evaluation import bisect
from compress.interop import exporter, targets
from compress.methods import quant
from compress.model.detect import find_family
from compress.model.streamed import Weights
from compress.recipe import reading, schema
from compress.runs import prepare as run_prepare
from compress.runs import sizes
from compress.verify import second_reader
from compress.verify.raw_files import open_stored
from compress.verify.verify import verify
from compress.weights.activation import Activation
from compress.weights.uniform import Uniform

Tiny = Callable[..., Path]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the folder with the method beside `quant/`: the folders are the registry."""
    known = registry.names
    folder = str(TESTS / "support" / "dropped")
    monkeypatch.setattr(quant, "__path__", [*quant.__path__, folder])
    monkeypatch.setattr(registry, "names", lambda kind: known(kind) + (["rotated"] if kind == "quant" else []))


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(PROBE, use_cache=False).logits
    return found


def streamed(source: Source) -> Tensor:
    """Logits one block at a time."""
    model, hidden = last_hidden(source, PROBE, torch.float32, torch.device("cpu"))
    with model.embeddings_and_head():
        return model.logits(PROBE, hidden)


class ByHand(nn.Module):
    """A linear that turns its input by a dense matrix, rounds it if `top` is given, and multiplies by codes times scales."""

    def __init__(self, weight: Tensor, scale: Tensor, signs: Tensor, top: int | None) -> None:
        super().__init__()
        columns = weight.shape[1]
        block = torch.from_numpy(hadamard(128)).double() / 128**0.5
        self.turn = torch.diag(signs.double()) @ torch.block_diag(*[block] * (columns // 128))
        spread = scale.float().repeat_interleave(columns // scale.shape[1], 1)
        codes = (weight.double() @ self.turn).float().div(spread).round().clamp(-8, 7)
        self.values, self.top = codes * spread, top

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.turn.float()
        if self.top is not None:
            scale = x.abs().amax(-1, keepdim=True) / self.top
            x = (x / scale.where(scale > 0, 1.0)).round() * scale  # the embedding of padding is 0
        return x @ self.values.T


def computed_by_hand(model: Path, packed: PackedSource, top: int | None) -> Tensor:
    """Logits of the original with every linear of its blocks exchanged."""
    dense = loaded(model)
    for site in packed.table:
        weight = dense.get_submodule(site).weight.detach()
        base = packed.compressed(site).base
        assert isinstance(base, Uniform)
        random = torch.randint(0, 2, (weight.shape[1],), generator=torch.Generator().manual_seed(weight.shape[1]))
        dense.set_submodule(site, ByHand(weight, base.scale, 1 - 2 * random, top))
    return logits(dense)


def test_from_a_run_to_logits(dropped: None, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model, wanted = tiny("llama", **SIZES), steps("quant/rotated")
    plan = run_prepare.prepare(str(model), reading.parse({"steps": wanted, "data": {"name": str(ids)}}), "cpu")
    announced = sizes.sizes(plan.source, plan.inventory, plan.assignments, schema.parse_size(plan.recipe.max_shard_size))
    summary = run(model, tmp_path / "out", ids, wanted, reload=True).values  # loads it with transformers, too
    assert announced.exact
    assert announced.tensors == summary["bytes_after"]
    assert announced.files == {p.name: p.stat().st_size for p in (tmp_path / "out").glob("model*")}
    assert summary["read_back"]["decoded"] == 14

    source, files = PackedSource.open_packed(tmp_path / "out"), open_stored(tmp_path / "out")
    assert len(source.table) == 14
    for site, spec in source.table.items():
        assert spec["input"] == {"format": "input", "transform": {"kind": "hadamard", "block": 128}}
        values = np.concatenate(list(second_reader.decode(files, site)))
        assert values.tobytes() == source.compressed(site).dequantize().numpy().tobytes()
    found = verify(tmp_path / "out", "cpu", lambda *_: None)
    assert found["decoded"] == found["sites"] == 14

    # The same numbers; sums come in another order, of values up to 3.
    mine = logits(loaded(tmp_path / "out"))
    torch.testing.assert_close(mine, computed_by_hand(model, source, None), rtol=1e-4, atol=1e-4)
    assert (mine - logits(loaded(model))).abs().max() > 0.05  # and they are not those of the original


def test_inputs_are_rounded_by_what_the_checkpoint_says(
    dropped: None, tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", **SIZES)
    # The run rounds as the loaded model does: their losses agree within 1e-3 nats, or it would not be published.
    run(model, tmp_path / "out", ids, steps("quant/rotated", activation="int4"), reload=True)
    source = PackedSource.open_packed(tmp_path / "out")
    model_in_use = loaded(tmp_path / "out")
    mine = logits(model_in_use)
    torch.testing.assert_close(streamed(source), mine, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "out", "cpu", lambda *_: None)["mean_difference_nats"] < 1e-5
    # A sum that comes in another order may round to the next of 15 steps; here none does.
    torch.testing.assert_close(mine, computed_by_hand(model, source, 7), rtol=1e-4, atol=1e-4)
    assert (mine - computed_by_hand(model, source, None)).abs().max() > 0.05
    monkeypatch.setattr(Activation, "quantize", lambda self, x: x)  # the one place where inputs are rounded
    torch.testing.assert_close(logits(model_in_use), computed_by_hand(model, source, None), rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_put_back_reads_its_input_as_it_is(dropped: None, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tiny("llama", **SIZES)
    run(model, tmp_path / "out", ids, steps("quant/rotated", activation="int2"))
    source, dense = PackedSource.open_packed(tmp_path / "out"), Source.open(model)
    sites = {site.name: site for site in take_inventory(dense, find_family(dense)).sites if site.name in source.table}
    fields = {key: getattr(source, key) for key in PackedSource.__dataclass_fields__}
    torch.testing.assert_close(streamed(bisect.HalfDense(**fields, original=dense, dense=sites)), logits(loaded(model)))
    block = open_streamed(source, torch.float32, torch.device("cpu"))
    with block.embeddings_and_head():
        hidden = block.embed(PROBE)
    block.load(0)
    rounded = block.forward(0, hidden)
    block.set_weights(0, Weights({site.name: dense.tensor(site.tensor) for site in sites.values() if site.block == 0}))
    plain = block.forward(0, hidden)
    assert (plain - rounded).abs().max() > 0.05
    original = open_streamed(dense, torch.float32, torch.device("cpu"))
    with original.embeddings_and_head():
        original.embed(PROBE)
    original.load(0)
    torch.testing.assert_close(plain, original.forward(0, hidden))


def test_other_layouts_refuse_it(dropped: None, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    for activation in (None, "int8"):
        out = tmp_path / str(activation)
        run(tiny("llama", **SIZES), out, ids, steps("quant/rotated", activation=activation))
        for name in ("compressed-tensors", "gptq", "awq", "gguf", *(["dense"] if activation else [])):
            last = "keep the native format" if activation else "export to dense"
            with pytest.raises(FormatError, match=rf"_proj: has (an )?inputs? that (is|are) .* before the product.*{last}"):
                exporter.prepare(str(out), name)
        stored = targets.of_checkpoint(PackedSource.open_packed(out))
        refused = [finding for finding in targets.lint("vllm", stored) if finding.severity == "refuse"]
        assert refused
        assert "input that is transformed or rounded" in refused[0].message
        assert [f for f in targets.lint("transformers", stored) if f.severity == "refuse"] == []
    exporter.export(exporter.prepare(str(tmp_path / "None"), "dense"), tmp_path / "plain", lambda *_: None)
    torch.testing.assert_close(logits(loaded(tmp_path / "plain")), logits(loaded(tmp_path / "None")), rtol=1e-4, atol=1e-4)
