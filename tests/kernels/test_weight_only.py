"""Weight-only products: whole kernels run on the CPU (see host.h) against the exact product with the decoded part."""

from __future__ import annotations

from dataclasses import replace

import host_cuda
import pytest
import torch
from kernel_parts import activations, close, exact, kinds, uniform
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _cuda, _weights, weight_only
from compress.weights.weight import CompressedWeight

BF16, FP16 = torch.bfloat16, torch.float16
PARTS = kinds()
FP16_PARTS = ("1 bits", "3 bits, zeros", "4 bits", "8 bits", "3 bits, offsets", "fp4", "bitmod-fp4", "3 bits in two levels")
CASES = [(name, BF16) for name in PARTS] + [(name, FP16) for name in FP16_PARTS]
WIDE = "4 bits, zeros"  # the one that is run for all numbers of tokens


def instances(name: str, dtype: torch.dtype) -> list[_cuda.Kernel]:
    tiles = _weights.prepare(PARTS[name])
    which = (dtype, tiles.bits, tiles.kind, tiles.table is not None)
    narrow = [weight_only.instance("wqmm", *which, 8, tiles=1)] if dtype == BF16 else []
    return [weight_only.instance("wqmm", *which, 8), weight_only.instance("dequantize", *which), *narrow]


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    every = [kernel for case in CASES for kernel in instances(*case)]
    sizes = [(n, wide) for n in weight_only.TOKENS for wide in weight_only.pieces(n)]
    return host_cuda.Host(*every, *(weight_only.instance("wqmm", BF16, 4, "ZERO", False, n, tiles=wide) for n, wide in sizes))


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    compiled.device, compiled.seed = host_cuda.DEVICE, 0
    return compiled.install(monkeypatch)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products_of_every_kind(name: str, dtype: torch.dtype, host: host_cuda.Host) -> None:
    part = PARTS[name]
    x = activations(8, part.shape[1], dtype)
    if dtype == FP16:  # sums shall not leave the range of the type
        x = (x * float(min(1, 3e4 / exact(x, part.dequantize()).abs().max()))).to(FP16)
    y = weight_only.matmul_tiles(x, _weights.prepare(part))
    assert y.dtype == dtype
    live = x.any(1)
    assert not y[~live].any()
    close(y[live], x[live], part, rounded_weight=name == "nf4")


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_decoded_weights_of_every_kind(name: str, dtype: torch.dtype, host: host_cuda.Host) -> None:
    """By the kernel and by torch; exact up to one rounding where the part's own values are exact."""
    part = PARTS[name]
    tiles = _weights.prepare(part)
    mine = _weights.decode(tiles)
    torch.testing.assert_close(mine, part.dequantize(), rtol=1e-6, atol=1e-6)
    w = weight_only.dequantize_rows(tiles, dtype, 0, part.shape[0])
    order = torch.arange(part.shape[1]) if tiles.order is None else tiles.order
    expected = part.dequantize()[:, order].to(dtype)
    ulp = 2**-7 if dtype == BF16 else 2**-10
    # Two roundings where values are not exact.
    slack = ulp if name in ("nf4",) or "offset" in name or "levels" in name else 0
    assert w.dtype == dtype
    difference, size = (w.float() - expected.float()).abs(), expected.float().abs()
    near = 1e-2 if "offset" in name else 0.0  # offsets may cancel
    assert bool((difference <= slack * size + slack * near).all()), (difference / size).max()


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129])
def test_any_number_of_tokens(tokens: int, host: host_cuda.Host) -> None:
    part = uniform(16, 64, 4, 64, zero=True)
    x = activations(tokens, 64, BF16, tokens)
    y = weight_only.matmul_tiles(x, _weights.prepare(part))
    live = x.any(1)
    assert y.shape == (tokens, 16)
    close(y[live], x[live], part)
    assert not y[~live].any()


@pytest.mark.parametrize("rows", [1, 5, 16, 48, 64, 80, 81])
@pytest.mark.parametrize(
    ("columns", "size"), [(64, 16), (128, 64), (192, 192), (896, 128), (100, 100), (96, 48), (1, 1), (480, 96)]
)
def test_any_shape(rows: int, columns: int, size: int, host: host_cuda.Host) -> None:
    part = uniform(rows, columns, 4, size, zero=True, seed=rows)
    tiles, x = _weights.prepare(part), activations(3, columns, BF16, columns)
    close(weight_only.matmul_tiles(x, tiles), x, part)
    close(weight_only.matmul_dense(x, tiles), x, part, rounded_weight=True)
    assert torch.equal(weight_only.dequantize_rows(tiles, BF16, 0, rows), part.dequantize().to(BF16))


def test_each_column_and_each_row_by_itself(host: host_cuda.Host) -> None:
    """One-hot activations read single columns: y is the weight, in its own bits."""
    part = uniform(48, 128, 4, 32, zero=True)
    y = weight_only.matmul_tiles(torch.eye(128, dtype=BF16), _weights.prepare(part))
    assert torch.equal(y, part.dequantize().T.to(BF16))


@pytest.mark.parametrize("processors", [1, 4, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_of_the_columns_are_added_in_order(processors: int, seed: int, host: host_cuda.Host) -> None:
    """Blocks and threads come in any order; with more processors, more blocks share columns, and the sums are theirs."""
    host.device, host.seed = replace(host_cuda.DEVICE, processors=processors), seed
    part = uniform(16, 2880, 4, 64, zero=True)
    x, tiles = activations(5, 2880, BF16), _weights.prepare(part)
    before = len(host.launched)
    y = weight_only.matmul_tiles(x, tiles)
    splits = host.launched[before][1][1]
    pieces = -(-45 // weight_only.plan(5, tiles, weight_only.shape_of(tiles), host.device).tiles)
    assert splits == -(-pieces // -(-pieces // min(2 * processors, pieces // 8)))
    assert splits > 1
    close(y[3:], x[3:], part)
    host.seed = seed + 100
    assert torch.equal(weight_only.matmul_tiles(x, tiles), y)
    host.check_counters()


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(16, 64, 16), (81, 192, 64), (129, 320, 32), (272, 448, 448), (33, 1408, 128), (81, 100, 100)]
)
def test_teams_of_warps(rows: int, columns: int, size: int, tokens: int, host: host_cuda.Host) -> None:
    """Warps without rows, an odd number of tiles, tokens that are not there; by pieces of one tile and of two, in any order."""
    part = uniform(rows, columns, 4, size, zero=True, seed=rows)
    tiles = _weights.prepare(part)
    shape = weight_only.shape_of(tiles)
    x = activations(tokens - 3, columns, BF16, columns)
    for wide in weight_only.pieces(tokens):
        room = weight_only._shared(tiles, tokens, wide, 2, 1 << weight_only._record_bits(shape, wide))
        host.device = replace(host_cuda.DEVICE, shared=room)
        chosen = weight_only.plan(len(x), tiles, shape, host.device)
        assert (chosen.tokens, chosen.tiles) == (tokens, wide)
        y = weight_only.matmul_tiles(x, tiles)
        close(y[3:], x[3:], part)
        host.seed += 1
        assert torch.equal(weight_only.matmul_tiles(x, tiles), y)
    host.check_counters()


@pytest.mark.parametrize("name", PARTS)
def test_every_kind_in_pieces_of_one_tile(name: str, host: host_cuda.Host) -> None:
    """As GPUs with little shared memory take them."""
    part = PARTS[name]
    tiles, x = _weights.prepare(part), activations(8, part.shape[1], BF16)
    shape = weight_only.shape_of(tiles)
    host.device = replace(host_cuda.DEVICE, shared=weight_only._shared(tiles, 8, 1, 2, 1 << weight_only._record_bits(shape, 1)))
    y = weight_only.matmul_tiles(x, tiles)
    assert host.launched[-1][0].name.endswith("8, 1>")
    live = x.any(1)
    close(y[live], x[live], part, rounded_weight=name == "nf4")


@pytest.mark.parametrize(("steps", "most"), [(1, 40000), (3, 40000), (8, 40000), (32767, 32767), (12345, 32767)])
def test_the_group_of_a_step(steps: int, most: int) -> None:
    """What kernels compute by the reciprocal that `shape_of` gives: floor(step / steps)."""
    reciprocal = -(-(1 << 31) // steps)
    assert 0 < reciprocal < 1 << 32
    step = torch.arange(min(most, 1 << 15))
    assert torch.equal((2 * step + 1) * reciprocal >> 32, step // steps)


@pytest.mark.parametrize(("shared", "tokens"), [(100, 64), (64, 64), (40, 64), (227, 64)])
def test_blocks_fit_the_shared_memory_there_is(shared: int, tokens: int, host: host_cuda.Host) -> None:
    host.device = replace(host_cuda.DEVICE, shared=shared << 10)
    part = uniform(32, 256, 2, 64)
    x = activations(tokens, 256, BF16)
    y = weight_only.matmul_tiles(x, _weights.prepare(part))
    close(y[3:], x[3:], part)
    assert host.launched[-1][0].name.endswith({227: "64, 1>", 100: "64, 1>", 64: "32, 2>", 40: "32, 1>"}[shared])


def test_no_block_fits(host: host_cuda.Host) -> None:
    host.device = replace(host_cuda.DEVICE, shared=8 << 10)
    with pytest.raises(KernelError, match="8192 bytes of shared memory"):
        weight_only.matmul_tiles(torch.ones(1, 64, dtype=BF16), _weights.prepare(uniform(16, 64, 4, 64)))


def poisoned(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for a tensor within not-a-numbers on both sides."""
    guard = 256 // dtype.itemsize
    whole = torch.full((shape[0] * shape[1] + 2 * guard,), torch.nan, dtype=dtype)
    return whole, whole[guard:-guard].view(shape)


def test_nothing_but_the_result_is_written(host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    part = uniform(33, 192, 4, 64, zero=True)
    tiles, x = _weights.prepare(part), activations(9, 192, BF16)
    made = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        whole, inner = poisoned((shape[0], shape[1] if len(shape) > 1 else 1), dtype)
        made.append((whole, inner))
        return inner.view(*shape)

    monkeypatch.setattr(weight_only.torch, "empty", empty)
    y = weight_only.matmul_tiles(x, tiles)
    w = weight_only.dequantize_rows(tiles, BF16, 16, 33)
    close(y[3:], x[3:], part)
    assert torch.equal(w, part.dequantize()[16:33].to(BF16))
    assert len(made) >= 2
    for whole, inner in made:
        guard = (len(whole) - inner.numel()) // 2
        assert bool(whole[:guard].isnan().all() and whole[-guard:].isnan().all())


def test_addend_and_bias(host: host_cuda.Host) -> None:
    part, generator = uniform(33, 192, 4, 64, zero=True), torch.Generator().manual_seed(1)
    x = torch.randn(9, 192, generator=generator).to(BF16)
    addend, bias = 30 * torch.randn(9, 33, generator=generator), 30 * torch.randn(33, generator=generator).to(BF16)
    y = weight_only.matmul_tiles(x, _weights.prepare(part), addend, bias)
    whole = x.double() @ part.dequantize().double().T + addend.double() + bias.double()
    assert bool(((y.double() - whole).abs() <= 2**-8 * whole.abs() + 1e-3).all())
    assert torch.equal(weight_only.matmul_tiles(x[:0], _weights.prepare(part), addend[:0], bias), y[:0])


def test_activations_of_any_strides(host: host_cuda.Host) -> None:
    part = uniform(16, 128, 4, 64, zero=True)
    tiles, x = _weights.prepare(part), activations(6, 128, BF16)
    y = weight_only.matmul_tiles(x, tiles)
    wide = torch.full((6, 200), torch.nan, dtype=BF16)
    wide[:, 8:136] = x
    for view in (wide[:, 8:136], x.T.contiguous().T, x.repeat_interleave(2, 0)[::2], x.view(2, 3, 128)):
        assert torch.equal(weight_only.matmul_tiles(view, tiles).flatten(0, -2), y)
    wide[:, 3:131] = x
    assert torch.equal(weight_only.matmul_tiles(wide[:, 3:131], tiles), y)  # not aligned to 16 bytes
    assert torch.equal(weight_only.matmul_tiles(x[:1].expand(6, 128), tiles), y[:1].expand(6, 16))  # a stride of 0
    assert weight_only.matmul_tiles(x[0], tiles).shape == (16,)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 64), "float32"),
        (torch.zeros(2, 64, dtype=torch.float64), "float64"),
        (torch.zeros(2, 63, dtype=BF16), "63 columns; expected in=64"),
    ],
)
def test_activations_that_do_not_fit(x: Tensor, message: str, host: host_cuda.Host) -> None:
    with pytest.raises(KernelError, match=message):
        weight_only.matmul_tiles(x, _weights.prepare(uniform(16, 64, 4, 64)))


def test_addends_that_do_not_fit(host: host_cuda.Host) -> None:
    x, tiles = torch.zeros(2, 64, dtype=BF16), _weights.prepare(uniform(16, 64, 4, 64))
    for addend, bias in ((torch.zeros(2, 16, dtype=BF16), None), (torch.zeros(16, 2).T, None), (None, torch.zeros(16))):
        with pytest.raises(KernelError, match="expected contiguous"):
            weight_only.matmul_tiles(x, tiles, addend, bias)
    for start, stop in ((8, 16), (0, 17), (16, 0)):
        with pytest.raises(KernelError, match="multiple of 16"):
            weight_only.dequantize_rows(tiles, BF16, start, stop)


@pytest.mark.parametrize("name", PARTS)
def test_codes_come_back_from_tiles(name: str) -> None:
    tensors, spec = packing.pack(CompressedWeight(PARTS[name]))
    assert weight_only.reason(spec) is None
    assert torch.equal(_weights.stored_codes(_weights.prepare(PARTS[name])), tensors["codes"])


@pytest.mark.parametrize(
    ("base", "columns", "why"),
    [
        ({"format": "bitpack", "group_size": 8}, 64, "groups of 8 columns"),
        ({"format": "bitpack", "group_size": 40}, 80, "groups of 40 columns"),
        ({"format": "unheard_of", "group_size": 32}, 64, "format unheard_of"),
        ({"format": "two_level", "group_size": 16, "scale_bits": 5, "zero_bits": 3}, 64, "scales of 5"),
    ],
)
def test_what_has_no_kernel_is_said(base: dict[str, object], columns: int, why: str) -> None:
    spec = {"shape": [16, columns], "base": base}
    assert why in str(weight_only.reason(spec))
    with pytest.raises(KernelError, match=why):
        weight_only.matmul(torch.zeros(1, columns, dtype=BF16), spec, {})


def test_large_weights_are_decoded_some_rows_at_a_time(host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    part = uniform(81, 128, 4, 32, zero=True)
    x, tiles = activations(5, 128, BF16)[3:], _weights.prepare(part)
    monkeypatch.setattr(weight_only, "_DENSE", 40 * 128)
    before = len(host.launched)
    close(weight_only.matmul_dense(x, tiles), x, part, rounded_weight=True)
    assert len(host.launched) - before == 3


@pytest.mark.parametrize("name", ["4 bits, zeros", "nf4", "4 bits in two levels, scattered"])
def test_the_operator(name: str) -> None:
    """Its schema, its shapes under torch.compile, and on a CPU its values."""
    part = PARTS[name]
    tiles = _weights.prepare(part)
    x = activations(4, part.shape[1], torch.float32)
    torch.library.opcheck(torch.ops.compress.weight_only.default, (x, *vars(tiles).values(), None, None))
    addend, bias = torch.randn(4, 48), torch.randn(48)

    @torch.compile(fullgraph=True, backend="eager")
    def twice(x: Tensor) -> Tensor:
        return 2 * weight_only.product(x, tiles, addend, bias)

    expected = 2 * (x @ part.dequantize().T + addend + bias)
    torch.testing.assert_close(twice(x), expected, rtol=1e-4, atol=1e-2)
