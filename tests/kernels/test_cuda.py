"""Kernels on a GPU: what the CPU cannot show, from launches through CuPy to graphs, streams and speed. `pytest -m cuda`."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace

import pytest
import torch
from examples.low_rank import low_rank
from examples.mixed import mixed as mixed_part
from examples.sparse import sparse
from kernel_parts import Part, activations, close, kinds, uniform
from options import function_of
from places import ROOT
from pruned_parts import close as close_to_pruned
from pruned_parts import kinds as pruned_kinds
from pruned_parts import mask, pruned, values
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.evaluation import bench
from compress.kernels import (
    _activations,
    _cuda,
    _packets,
    _weights,
    bit_serial,
    experts,
    int8,
    masked,
    mixed,
    sparse_rows,
    weight_only,
)
from compress.kernels._layouts import Packets
from compress.methods.solvers import operators
from compress.runtime.linear import CompressedLinear
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

gptq = function_of("quant/gptq")

pytestmark = pytest.mark.cuda

BF16, FP16 = torch.bfloat16, torch.float16
PARTS = kinds()
PRUNED = pruned_kinds()
TOKENS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129)
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module", autouse=True)
def gpu() -> torch.device:
    where = torch.device("cuda", torch.cuda.current_device())
    # A machine with a GPU that cannot run kernels must not pass for one that did.
    assert _cuda.obstacle(where) is None, _cuda.obstacle(where)
    for kernel in ("round_columns", "nearest"):  # registers the kernels of methods
        importlib.import_module(f"compress.kernels.{kernel}")
    return where


def on(part: Part, where: torch.device) -> Part:
    fields = {name: value.to(where) for name, value in vars(part).items() if isinstance(value, Tensor)}
    return replace(part, **fields)


def run(part: Part, x: Tensor, where: torch.device) -> Tensor:
    y = weight_only.matmul_tiles(x.to(where), _weights.prepare(on(part, where)))
    torch.cuda.synchronize()
    return y.cpu()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("seed", range(3))
def test_products_of_every_kind(name: str, dtype: torch.dtype, seed: int, gpu: torch.device) -> None:
    part = PARTS[name]
    x = activations(8, part.shape[1], BF16, seed).float()
    if dtype == FP16:
        x = x * float(min(1, 3e4 / (x.double() @ part.dequantize().double().T).abs().max()))
    x = x.to(dtype)
    y = run(part, x, gpu)
    live = x.any(1)
    close(y[live], x[live], part, rounded_weight=name == "nf4")
    assert not y[~live].any()


@pytest.mark.parametrize("name", PARTS)
def test_decoded_weights(name: str, gpu: torch.device) -> None:
    part = PARTS[name]
    tiles = _weights.prepare(on(part, gpu))
    here = _weights.prepare(part)
    assert torch.equal(tiles.codes.cpu(), here.codes)  # the layout is the same wherever it is made
    assert torch.equal(tiles.meta.cpu(), here.meta)
    w = weight_only.dequantize_rows(tiles, BF16, 0, part.shape[0]).float().cpu()
    order = torch.arange(part.shape[1]) if here.order is None else here.order
    expected = part.dequantize()[:, order]
    torch.testing.assert_close(w, expected, rtol=2**-7, atol=2**-7 if "offset" in name else 0)


@pytest.mark.parametrize("rows", [16, 48, 64, 80, 4096 + 16])
@pytest.mark.parametrize(("columns", "size"), [(64, 16), (128, 128), (192, 32), (896, 64), (1408, 128), (2880, 2880), (100, 100)])
def test_any_shape(rows: int, columns: int, size: int, gpu: torch.device) -> None:
    part = uniform(rows, columns, 4, size, zero=True, seed=rows)
    for tokens in TOKENS:
        x = activations(tokens, columns, BF16, rows + tokens)
        y = run(part, x, gpu)
        assert y.shape == (tokens, rows)
        live = x.any(1)
        close(y[live], x[live], part)
        if tokens in (1, 16, 129):
            dense = weight_only.matmul_dense(x.to(gpu), _weights.prepare(on(part, gpu))).cpu()
            close(dense[live], x[live], part, rounded_weight=True)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_weight_by_itself(bits: int, gpu: torch.device) -> None:
    part = uniform(80, 192, bits, 32, zero=True)
    assert torch.equal(run(part, torch.eye(192, dtype=BF16), gpu), part.dequantize().T.to(BF16))


def test_twenty_runs_are_the_same(gpu: torch.device) -> None:
    part = on(uniform(64, 8192, 4, 128, zero=True), gpu)  # few rows: many blocks share the columns
    tiles, x = _weights.prepare(part), activations(5, 8192, BF16).to(gpu)
    first = weight_only.matmul_tiles(x, tiles)
    assert all(torch.equal(weight_only.matmul_tiles(x, tiles), first) for _ in range(20))


def test_two_streams_at_once(gpu: torch.device) -> None:
    part = on(uniform(64, 8192, 4, 128, zero=True), gpu)
    tiles, x = _weights.prepare(part), activations(5, 8192, BF16).to(gpu)
    expected = weight_only.matmul_tiles(x, tiles)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[Tensor] = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(weight_only.matmul_tiles(x, tiles))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_a_graph_is_replayed_on_other_activations(gpu: torch.device) -> None:
    weight = CompressedWeight(uniform(64, 8192, 4, 128, zero=True), sparse(64, 8192, 0.01))
    layer = CompressedLinear.of(weight).to(gpu)
    x = activations(5, 8192, BF16).to(gpu)
    layer(x)  # compiles, and lays codes out
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graphs.append((graph, y))
    for seed in range(3):
        x.copy_(activations(5, 8192, BF16, seed))
        expected = layer(x)
        for graph, y in graphs:
            graph.replay()
            assert torch.equal(y, expected)


def test_a_kernel_that_is_new_within_a_capture_is_an_error(gpu: torch.device) -> None:
    tiles = _weights.prepare(on(uniform(16, 64, 5, 16, zero=True), gpu))
    x = torch.zeros(1, 64, dtype=FP16, device=gpu)
    _cuda._compiled.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(Exception, match="once before the capture"), torch.cuda.graph(graph):
        weight_only.matmul_tiles(x, tiles)


def test_the_linear_under_torch_compile(gpu: torch.device) -> None:
    weight = CompressedWeight(uniform(48, 192, 3, 64), sparse(48, 192, 0.05))
    layer = CompressedLinear.of(weight).to(gpu)
    x = activations(9, 192, BF16)[3:].to(gpu)
    with torch.no_grad():
        expected = layer(x)
        assert layer.path(x) == "weight_only"
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
    whole = x.cpu().double() @ weight.dequantize().double().T
    assert float((expected.cpu().double() - whole).norm() / whole.norm()) < 3e-3


@pytest.mark.parametrize("tokens", [1, 9, 64, 200])
def test_single_weights(tokens: int, gpu: torch.device) -> None:
    part, x = sparse(300, 500, 0.05), activations(tokens, 500, BF16)
    y = sparse_rows.product(x.to(gpu), part.pointers.to(gpu), part.columns.to(gpu), part.values.to(gpu)).cpu().double()
    decoded = part.dequantize().double()
    assert bool(((y - x.double() @ decoded.T).abs() <= 2.0**-18 * (x.double().abs() @ decoded.abs().T)).all())


def test_gptq_gives_the_codes_of_the_cpu(gpu: torch.device) -> None:
    """Sums are formed in other orders: a few weights that lie between two codes may go to the other one."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 1024, generator=generator), torch.randn(4096, 1024, generator=generator)
    x[:, 1:] += x[:, :-1]
    hessian = x.T @ x / len(x)
    here = gptq(weight, hessian, refinements=0).weight.base
    there = gptq(weight.to(gpu), hessian.to(gpu), refinements=0).weight.base
    assert isinstance(here, Uniform)
    assert isinstance(there, Uniform)
    assert float((here.codes == there.codes.cpu()).float().mean()) > 0.98  # one that goes elsewhere moves others after it
    losses = []
    for part in (here, there):
        d = weight.double() - part.dequantize().cpu().double()
        losses.append(float(((d @ hessian.double()) * d).sum()))
    assert abs(losses[1] / losses[0] - 1) < 2e-3


@pytest.mark.parametrize("columns", [1, 100, 128])
def test_columns_follow_from_one_another(columns: int, gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, 300, generator=generator).to(gpu)
    scale = torch.rand(1, 300, generator=generator).to(gpu) / 4 + 0.1
    low, high = torch.full_like(scale, -8), torch.full_like(scale, 7)
    feedback = (torch.randn(columns, columns, generator=generator) * columns**-0.5).to(gpu)
    target, delta, steps = weight.clone(), weight.clone(), torch.empty_like(weight)
    groups = torch.zeros(columns, dtype=torch.int64, device=gpu)
    operators.round_columns(target, delta, steps, feedback, scale, scale.reciprocal(), low, high, groups)
    wanted = weight.double() + feedback.double().tril(-1) @ delta.double()
    torch.testing.assert_close(target.double(), wanted, rtol=1e-5, atol=1e-5)
    ideal = (target / scale).clamp(-8, 7)
    assert float((steps - ideal).abs().max()) <= 0.5 + 1e-5


@pytest.mark.parametrize("dimensions", [1, 3, 8, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_nearest_centroids(dimensions: int, weighted: bool, gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(dimensions)
    points, centers = (torch.randn(n, dimensions, generator=generator) + 3 for n in (20000, 1000))
    weights = torch.rand(20000, dimensions, generator=generator) if weighted else torch.ones(20000, dimensions)
    found = operators.assign(points.to(gpu), centers.to(gpu), weights.to(gpu) if weighted else None).cpu()
    distance = (weights.double().unsqueeze(1) * (points.double().unsqueeze(1) - centers.double()).square()).sum(2)
    chosen = distance.gather(1, found.unsqueeze(1)).squeeze(1)
    assert bool((chosen - distance.amin(1) <= 1e-5 * distance.amax(1)).all())


def test_the_hessian_of_bfloat16(gpu: torch.device) -> None:
    rows = torch.randn(10000, 300, generator=torch.Generator().manual_seed(0)).to(BF16)
    here, there = Hessian(300, torch.device("cpu")), Hessian(300, gpu)
    here.add(rows.double().float())
    there.add(rows.to(gpu))
    torch.testing.assert_close(there.matrix().cpu(), here.matrix(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, 65])
@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_of_8_bits(bits: int, tokens: int, gpu: torch.device) -> None:
    part, x = uniform(80, 1408, bits, 64, zero=True), activations(tokens, 1408, BF16)
    y = int8.matmul_tiles(x.to(gpu), _weights.prepare(on(part, gpu), 8)).cpu().double()
    whole, scale = _activations.quantize(x)
    there, their_scale = int8.quantize_kernel(x.to(gpu))
    assert torch.equal(there.cpu(), whole)
    assert torch.equal(their_scale.cpu(), scale)
    expected = whole.double() @ part.dequantize().double().T * scale.double().unsqueeze(1)
    assert float((y - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize(("weight_bits", "bits"), [(1, 4), (2, 2), (2, 8), (4, 4), (8, 8)])
@pytest.mark.parametrize("bipolar", [False, True])
def test_products_of_bits(weight_bits: int, bits: int, bipolar: bool, gpu: torch.device) -> None:
    part, x = uniform(80, 1024, weight_bits, 256, bipolar=bipolar), activations(9, 1024, BF16)
    y = bit_serial.matmul_bits(x.to(gpu), bit_serial.prepare(on(part, gpu)), bits, bipolar).cpu().double()
    expected = bit_serial.rounded(x, bits, bipolar).double() @ part.dequantize().double().T
    assert float((y - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_groups_of_different_widths(tokens: int, gpu: torch.device) -> None:
    part, x = mixed_part(80, [8, 7, 6, 5, 4, 3, 2, 1], 64, True, scattered=True), activations(tokens, 512, BF16)
    there = replace(part, **{name: value.to(gpu) for name, value in vars(part).items() if isinstance(value, Tensor)})
    y = mixed.product(x.to(gpu), mixed.prepare(there)).cpu().double()
    expected = x.double() @ part.dequantize().double().T
    assert float((y - expected).norm() / expected.norm()) < 5e-3


def packets_on(weight: CompressedWeight, where: torch.device) -> Packets:
    assert weight.keep is not None
    return _packets.prepare(on(weight.base, where), on(weight.keep, where))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_weights(name: str, gpu: torch.device) -> None:
    """Of every layout: packets as on a CPU, products, whole weights, and what was stored."""
    weight = PRUNED[name]
    there, here = packets_on(weight, gpu), _packets.prepare(weight.base, weight.keep)  # type: ignore[arg-type]
    assert torch.equal(there.data.cpu(), here.data)
    assert torch.equal(there.offsets.cpu(), here.offsets)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(_packets.stored(there), _packets.stored(here), strict=True))
    for tokens in TOKENS:
        x = activations(tokens, 256, BF16, tokens)
        close_to_pruned(masked.matmul_packets(x.to(gpu), there).cpu(), x, weight)
    decoded = weight.dequantize() if here.order is None else weight.dequantize()[:, here.order]
    w = masked.weight_rows(there, BF16, 0, 40).float().cpu()
    torch.testing.assert_close(w, decoded, rtol=2**-7, atol=2**-7 if "offsets" in name else 0)
    x = activations(200, 256, BF16)
    close_to_pruned(masked.matmul_dense(x.to(gpu), there).cpu(), x, weight, rounded_weight=True)


@pytest.mark.parametrize("kind", ["2:4", "single", "runs 16"])
def test_each_pruned_weight_by_itself(kind: str, gpu: torch.device) -> None:
    """Sparse tensor cores read the places of kept weights as they were meant: one-hot activations give the weight's own bits."""
    for base in (values(80, 448), uniform(80, 448, 4, 64, zero=True)):
        weight = pruned(base, mask(kind, 80, 448))
        y = masked.matmul_packets(torch.eye(448, dtype=BF16, device=gpu), packets_on(weight, gpu)).cpu()
        assert torch.equal(y, weight.dequantize().T.to(BF16))


def test_the_sum_of_all_parts(gpu: torch.device) -> None:
    """Base under a mask, single weights and a low-rank part, through the module, compiled, and in a graph."""
    weight = replace(pruned(uniform(80, 512, 4, 64, zero=True), mask("2:4", 80, 512)), outliers=sparse(80, 512, 0.02))
    weight = replace(weight, low_rank=low_rank(80, 512, 8, BF16))
    for x in (activations(9, 512, BF16)[3:], activations(200, 512, BF16)[3:]):
        layer, there = CompressedLinear.of(weight).to(gpu), x.to(gpu)
        with torch.no_grad():
            y = layer(there)
            assert layer.path(there) == "masked"
            assert torch.equal(torch.compile(layer, fullgraph=True)(there), y)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(there)
            graph.replay()
        assert torch.equal(captured, y)
        whole = x.double() @ weight.dequantize().double().T
        assert float((y.cpu().double() - whole).norm() / whole.norm()) < 5e-3
        layer.restore()
        assert torch.equal(layer.compressed().dequantize().cpu(), weight.dequantize())


def test_experts_together(gpu: torch.device) -> None:
    parts = [uniform(80, 256, 3 + e % 2, 64, seed=e) for e in range(6)]
    groups = experts.group({e: _weights.prepare(on(part, gpu)) for e, part in enumerate(parts)})
    counts = [5, 0, 1, 40, 0, 9]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=gpu)
    x = torch.randn(sum(counts), 256, generator=torch.Generator().manual_seed(0)).to(BF16)
    y = experts.matmul(x.to(gpu), starts, groups, max(counts)).cpu()
    begin = 0
    for count, part in zip(counts, parts, strict=True):
        close(y[begin : begin + count], x[begin : begin + count], part)
        begin += count


@pytest.mark.parametrize("bits", [4, 3, 2, 8])
def test_speed(bits: int, gpu: torch.device) -> None:
    """Times go to bench/results; what is asked of them is the first milestone: at one token faster than the dense product."""
    machine = bench.rates(gpu, BF16)
    rows = []
    for shape in ((4096, 4096), (14336, 4096), (28672, 8192)):
        weight = CompressedWeight(bench.random_uniform(shape, bits, 128, False))
        rows += list(bench.measure(weight, bench.TOKENS, gpu, BF16, machine))
    name = torch.cuda.get_device_name(gpu)
    found = bench.Bench(name, "bfloat16", torch.__version__, *machine, rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"weight_only-{bits}bit-{name.replace(' ', '_')}-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(found.plain(), indent=1) + "\n")
    assert all(row.difference < 1e-2 for row in rows)
    assert all(row.gain > 1 for row in rows if row.tokens == 1 and row.out > 4096), [(r.out, r.tokens, r.gain) for r in rows]
