"""What candidates cost: against the definition on a whole model, against measured divergence, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thorough import some
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.errors import CheckpointError
from compress.planning import measure as measurement_module
from compress.planning import planner
from compress.planning import sensitivity as sensitivity_module
from compress.planning.candidates import Candidate, candidate
from compress.planning.measure import Measurement, above_deviation, measure
from compress.planning.sensitivity import Reference, Sensitivity, SiteCosts, check, split
from compress.runs import prepare as run_prepare
from compress.weights.weight import CompressedWeight

Tiny = Callable[..., Path]
ROOM = 1 << 30


def silent(*_: Any) -> None:
    pass


def tried() -> list[Candidate]:
    return [candidate("gptq", {"bits": bits, "group_size": 16}) for bits in (2, 3, 4)]


def planned(model: Path, ids: Path) -> tuple[Any, Tensor]:
    plan = planner.prepared(str(model), {"name": str(ids)}, "float32", "cpu")
    return plan, run_prepare.calibration(plan)


@pytest.mark.parametrize("family", some(["llama", "gpt2", "mixtral", "gpt_oss"], "llama", "gpt_oss"))
def test_costs_are_those_of_the_definition(family: str, tiny: Tiny, ids: Path) -> None:
    """Squares of gradients and errors by output, from autograd through the model as transformers runs it."""
    plan, tokens = planned(tiny(family), ids)
    measurement = Measurement(plan, tokens, tried(), ROOM, silent)
    labels = drawn(measurement)
    found = measurement.run()
    assert len(found.sites) == len(measurement.sites)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    gradients = logit_gradients(model, measurement.gradient_ids, labels)
    positions = measurement.gradient_ids.numel()
    for site, row in zip(measurement.sites, found.sites, strict=True):
        errors = measurement.errors[site.name]
        if site.expert is None:
            expected = gradients[site.name.split(".", 1)[-1]].double().flatten(0, -2).square().sum(0)
            torch.testing.assert_close(measurement.squares[site.name], expected, rtol=1e-3, atol=1e-8)
            for error, kl in zip(errors, row.kl, strict=True):
                assert error is not None
                assert kl == pytest.approx(0.5 * float(expected @ error.double()) / positions, rel=1e-3)
        assert all(kl is not None and math.isfinite(kl) and kl > 0 for kl in row.kl)
        assert [b for b in row.bits if b is not None] == sorted(b for b in row.bits if b is not None)


def test_errors_of_a_sample_of_rows_stand_for_all(tiny: Tiny, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tokens = planned(tiny("llama"), ids)
    many = [candidate("gptq", {"bits": bits, "group_size": 16}) for bits in range(2, 9)]
    whole = Measurement(plan, tokens, many, ROOM, silent).run()
    monkeypatch.setattr(measurement_module, "LEAST_ROWS", 4)
    measurement = Measurement(plan, tokens, many, ROOM, silent)
    sampled = measurement.run()
    site = measurement.sites[0]
    lengths = [len(e) for e in measurement.errors[site.name] if e is not None]
    assert set(lengths) == {site.shape[0], site.shape[0] // min(8, site.shape[0] // 4)}
    logs = []
    for before, after in zip(whole.sites, sampled.sites, strict=True):
        assert after.bits == before.bits
        logs += [math.log(b / a) for a, b in zip(before.kl, after.kl, strict=True) if a is not None and b is not None]
    assert abs(sum(logs) / len(logs)) < 0.05
    assert max(map(abs, logs)) < 0.7  # four rows; of real weights there are 64 at least


def drawn(measurement: Measurement) -> Tensor:
    """The labels that the measurement will draw: by inversion, from the model's own distribution."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(measurement.plan.source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        chances = model(measurement.gradient_ids.long()).logits.softmax(-1).cumsum(-1)
    labels = []
    for window in chances:
        at = torch.rand(len(window), 1, generator=generator) * window[:, -1:]
        labels.append((window < at).sum(-1).clamp_max(window.shape[-1] - 1))
    return torch.stack(labels)


def logit_gradients(model: Any, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the summed loss at the output of every linear in a block, by the name below `model.`."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and "." in name:
            module.register_forward_hook(keep(name.split(".", 1)[-1]))
    embedded = model.get_input_embeddings()(ids.long()).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))


def test_errors_are_those_of_the_hessian(tiny: Tiny, ids: Path) -> None:
    """(D H D^T)_oo is the mean over tokens of the squared error of output o."""
    from compress.calibration.statistics import Hessian

    plan, tokens = planned(tiny("llama"), ids)
    measurement = Measurement(plan, tokens, tried(), ROOM, silent)
    site = measurement.sites[0]
    rows = torch.randn(50, site.shape[1], generator=torch.Generator().manual_seed(3))
    statistic = Hessian(site.shape[1], torch.device("cpu"))
    statistic.add(rows)
    made: dict[int, list[tuple[str, CompressedWeight]]] = {1: []}
    measurement._try([site], {Hessian: statistic}, made)
    weight = measurement.streamed.weight(site).double()
    delta = weight - made[1][0][1].dequantize().double()
    expected = torch.stack([(rows.double() @ delta[o]).square().mean() for o in range(site.shape[0])])
    error = measurement.errors[site.name][1]
    assert error is not None
    torch.testing.assert_close(error.double(), expected, rtol=1e-3, atol=1e-9)


def test_predictions_are_near_what_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    """One site at a time: within a factor of 1.7 for most, where costs go over a factor of 300."""
    from runs import ids_file

    plan, tokens = planned(tiny("llama"), ids_file(tmp_path / "ids.npy", samples=96, length=64))
    fine = [candidate("rtn", {"bits": bits, "group_size": 16}) for bits in (3, 5)]
    found = measure(plan, tokens, fine, ROOM, silent)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    probes = split(tokens)[1].long()
    with torch.no_grad():
        p = model(probes).logits[:, :-1].log_softmax(-1)
        ratios = []
        for site, row in zip(planner.sites_of(plan), found.sites, strict=True):
            module = model.get_submodule(site.name)
            weight = module.weight.data
            for c in (0, 1):
                module.weight.data = fine[c].build(weight.float(), {}).weight.dequantize()
                q = model(probes).logits[:, :-1].log_softmax(-1)
                ratios.append(math.log((row.kl[c] or 0) / float((p.exp() * (p - q)).sum(-1).mean())))
                module.weight.data = weight
    # A model that attends to everything alike averages tokens: errors of its values have a part in common, which adds up.
    assert sum(abs(ratio) < 0.55 for ratio in ratios) >= 0.85 * len(ratios)
    assert all(abs(ratio) < 2 for ratio in ratios)


def test_references_are_measured_with_all_sites_at_once(tiny: Tiny, ids: Path) -> None:
    plan, tokens = planned(tiny("llama"), ids)
    candidates = [candidate("rtn", {"bits": bits, "group_size": 16}) for bits in (3, 5)]
    found = measure(plan, tokens, candidates, ROOM, silent)
    assert [r.candidate for r in found.references] == [0, 1]
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    probes = split(tokens)[1].long()
    with torch.no_grad():
        p = model(probes).logits[:, :-1].log_softmax(-1)
        for site in planner.sites_of(plan):
            module = model.get_submodule(site.name)
            module.weight.data = candidates[0].build(module.weight.data.float(), {}).weight.dequantize()
        q = model(probes).logits[:, :-1].log_softmax(-1)
    reference = found.references[0]
    assert reference.measured == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert reference.predicted == pytest.approx(sum(row.kl[0] or 0 for row in found.sites))
    # The check of a plan at this candidate is the same model, as rounding needs no calibration.
    kl, _ = check(plan, tokens, {site.name: candidates[0] for site in planner.sites_of(plan)}, ROOM, silent)
    assert kl == pytest.approx(reference.measured, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layer_scores_are_those_of_the_definition(family: str, tiny: Tiny, ids: Path) -> None:
    plan, tokens = planned(tiny(family), ids)
    found = measure(plan, tokens, tried()[:1], ROOM, silent)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    fit = split(tokens)[0].long()
    states: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        block.register_forward_hook(lambda module, args, output: states.append(output))
    with torch.no_grad():
        model(fit)
    for block in range(3):
        before, after = states[2 * block].double(), states[2 * block + 1].double()
        total = 0.0
        for x, y in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True):
            total += float((x @ y) / (x.norm() * y.norm())) if x.any() else 0.0  # the padding token's embedding is zero
        assert found.lim[block] == pytest.approx(-total / fit.numel(), rel=1e-5)
        weights = [plan.source.tensor(s.tensor, s.slice).double().flatten() for s in planner.sites_of(plan) if s.block == block]
        values = torch.cat(weights).tolist()
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        assert found.zd[block] == -sum((v - mean) / deviation > 1 for v in values) / len(values)


def test_constant_weights_have_nothing_above_a_deviation() -> None:
    assert above_deviation([torch.ones(4, 4), torch.ones(2, 3)]) == 0.0
    assert above_deviation([torch.tensor([[0.0, 0.0, 0.0, 1.0]])]) == 0.25


def test_passes_over_statistics_change_nothing(tiny: Tiny, ids: Path) -> None:
    plan, tokens = planned(tiny("mixtral"), ids)
    one, many = (measure(plan, tokens, tried()[:2], room, silent) for room in (ROOM, 1))
    assert [row.bits for row in one.sites] == [row.bits for row in many.sites]
    assert [row.kl for row in one.sites] == [row.kl for row in many.sites]
    assert one.references == many.references


def test_few_gradient_tokens_still_give_every_expert_a_cost(tiny: Tiny, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement_module, "GRADIENT_TOKENS", 1)
    plan, tokens = planned(tiny("qwen3_moe"), ids)
    measurement = Measurement(plan, tokens[:2, :4], tried()[:1], ROOM, silent)
    found = measurement.run()
    assert any(measurement.reached[s.name] == 0 for s in measurement.sites if s.expert is not None)
    assert all(row.kl[0] is not None and row.kl[0] > 0 for row in found.sites)


def test_factors_are_measured_at_references_and_between_them() -> None:
    rows = [SiteCosts("a", [1, 2, 3, None], [0.6, 0.06, 0.15, 0.006]), SiteCosts("b", [1, 2, 3, 4], [0.4, 0.04, None, None])]
    rows[0] = SiteCosts("a", [1, 2, 3, 4], [0.6, 0.06, 0.06 * math.sqrt(10), 0.0006])
    found = Sensitivity(rows, [Reference(0, 1.0, 2.0, None), Reference(1, 0.1, 0.11, None)], [], [], True, 0.0).factors()
    assert found[:2] == pytest.approx([2.0, 1.1])
    assert found[2] == pytest.approx(math.sqrt(2.0 * 1.1)), "half way in logarithms, by its share of the sites it fits"
    assert found[3] == pytest.approx(1.1), "beyond the references as at the nearest"


def test_references_fit_everything_and_lie_apart(tiny: Tiny, ids: Path) -> None:
    plan, _ = planned(tiny("llama"), ids)
    sites = planner.sites_of(plan)
    settings = [(4, 16), (2, 16), (2, 32), (3, 64), (3, 32), (5, 16), (8, 16), (6, 16)]
    candidates = [candidate("gptq", {"bits": bits, "group_size": size}) for bits, size in settings]
    # 64 does not divide the 32 columns of most; 2 bits in groups of 16 are half a bit above those of 32.
    assert sensitivity_module.references(sites, candidates) == [2, 4, 0, 5]
    assert sensitivity_module.references(sites, [candidates[3]]) == []


def test_sizes_that_depend_on_values_are_those_found(tiny: Tiny, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.methods.quant.rtn import RTN

    plan, tokens = planned(tiny("llama"), ids)
    candidates = [candidate("rtn", {"bits": bits, "group_size": 16}) for bits in (3, 5)]
    known = measure(plan, tokens, candidates, ROOM, silent)
    describe = RTN.describe
    monkeypatch.setattr(RTN, "describe", lambda self, shape: replace(describe(self, shape), least=0))
    found = measure(plan, tokens, candidates, ROOM, silent)
    assert (known.exact, found.exact) == (True, False)
    assert found.sites == known.sites
    assert [r.candidate for r in found.references] == [0, 1]


def test_no_reference_means_no_factors() -> None:
    rows = [SiteCosts("a", [1, None], [0.5, None]), SiteCosts("b", [None, 2], [None, 0.1])]
    assert Sensitivity(rows, [], [], [], True, 0.0).factors() == [1.0, 1.0]


def test_windows_are_split_without_overlap() -> None:
    ids = torch.arange(64 * 16).reshape(64, 16)
    fit, probes = split(ids)
    assert (len(fit), len(probes)) == (56, 8)
    assert not set(fit.flatten().tolist()) & set(probes.flatten().tolist())
    fit, probes = split(ids[:1])
    assert torch.equal(fit, probes), "one window has to do for both"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_measurement_that_is_interrupted_goes_on(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Stopped within every block on the way forwards and back: the same numbers to the last bit, and no block twice."""
    plan, tokens = planned(tiny(family), ids)
    whole = measure(plan, tokens, tried(), ROOM, silent)
    folder, begun = tmp_path / "begun", []
    for stop in range(1, 20):

        def progress(block: int, blocks: int, step: str, share: float, stop: int = stop) -> None:
            if step in ("loading", "gradients") and share == 0.0:
                begun.append(block)
            if block == stop:
                raise KeyboardInterrupt

        if stop < 2 * len(whole.lim):
            with pytest.raises(KeyboardInterrupt):
                measure(plan, tokens, tried(), ROOM, progress, folder)
            continue
        found = measure(plan, tokens, tried(), ROOM, progress, folder)
        assert (found.sites, found.references, found.lim, found.zd) == (whole.sites, whole.references, whole.lim, whole.zd)
        break
    else:
        raise AssertionError("the model has more blocks than this test stops in")
    assert begun == sorted(begun)
    assert all(begun.count(block) <= 2 for block in begun), "once when it was stopped there, and once when it was done"


def test_what_was_begun_and_is_damaged_is_named(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    plan, tokens = planned(tiny("llama"), ids)
    (tmp_path / "state.pt").write_bytes(b"half of")
    with pytest.raises(CheckpointError, match=r"state.pt: is damaged.* to measure anew"):
        measure(plan, tokens, tried(), ROOM, silent, tmp_path)
