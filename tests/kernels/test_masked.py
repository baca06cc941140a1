"""Products with pruned weights: layout golden words, and whole kernels run on the CPU (see host.h) against the exact product."""

from __future__ import annotations

import itertools
from dataclasses import replace

import host_cuda
import pytest
import torch
from kernel_parts import activations, uniform
from pruned_parts import close, kinds, mask, packets_of, pruned, values
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _cuda, _packets, masked, weight_only
from compress.weights.dense import Dense
from compress.weights.mask import Bitmask, Pattern
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

BF16, FP16 = torch.bfloat16, torch.float16
WEIGHTS = kinds()
LAYOUTS = {"2:4": "TWO_OF_FOUR", "single": "SINGLE", "runs 16": "RUNS"}
# In float16, one of each layout; its values are small, so that sums stay in range.
HALVES = {
    name: pruned(Dense((values(40, 256).values.float() / 64).to(FP16)) if codes is None else codes, mask(kind, 40, 256))
    for kind in LAYOUTS
    for name, codes in ((f"values, {kind}", None), (f"4 bits and zeros, {kind}", uniform(40, 256, 4, 32, zero=True)))
}


def kernel_of(template: str, weight: CompressedWeight, dtype: torch.dtype, tokens: int | None = None) -> _cuda.Kernel:
    p = packets_of(weight)
    return masked.instance(template, dtype, p.layout, p.bits, p.kind, tokens)


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    every = [
        kernel_of(template, weight, dtype, tokens)
        for weights, dtype in ((WEIGHTS, BF16), (HALVES, FP16))
        for weight in weights.values()
        for template, tokens in (("masked_products", 8), ("masked_weight", None))
        if tokens or packets_of(weight).bits not in (1, 2, 5, 6)
    ]
    wide = [masked.instance("masked_products", BF16, layout, 16, "BF16", n) for layout in LAYOUTS.values() for n in (16, 32, 64)]
    return host_cuda.Host(*every, *wide)


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    compiled.device, compiled.seed = host_cuda.DEVICE, 0
    return compiled.install(monkeypatch)


# --- the layout


def hexadecimal(octets: Tensor) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in octets.view(torch.int32).tolist())


def test_golden_packet_of_two_of_four() -> None:
    """16 x 64 with the combination (row + column / 4) mod 6 in each four; values count up along the columns, by 16 rows of 64."""
    choice = ((torch.arange(16).view(-1, 1) + torch.arange(16)) % 6).to(torch.uint8)
    numbers = torch.arange(16 * 64, dtype=torch.int16).view(16, 64)
    p = _packets.prepare(Dense(numbers.view(BF16)), Pattern(choice, 2, 4))
    assert (p.layout, p.room, p.offsets.tolist()) == ("TWO_OF_FOUR", 1152, [0, 72])
    # Combinations 01 02 03 12 13 23 are the fours 4 8 c 9 d e. Row 0 begins 4 8 c 9 and goes on d e 4 8; row 8 begins c 9 d e.
    assert hexadecimal(p.data[:16]) == "ed9c9c84 9c8484ed 84eded9c ed9c9c84"
    # Lane 0 has rows 0, 8, 0, 8: kept weights 0 and 1 of the step, and 8 and 9; lane 1 the next.
    assert p.data[128:144].view(torch.int16).tolist() == [0, 1, 8 * 64, 8 * 64 + 3, 17, 19, 8 * 64 + 16, 8 * 64 + 17]
    assert p.data[144:148].view(torch.int16).tolist() == [4, 6]


def test_golden_packet_of_runs() -> None:
    """Two rows of 32 columns, codes of 4 bits counting up; row 0 keeps its second run, row 1 both."""
    codes = (torch.arange(64).view(2, 32) % 16).to(torch.uint8)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(BF16)
    p = _packets.prepare(Uniform(codes, scale, 4, 16), Bitmask(torch.tensor([[False, True], [True, True]]), 16))
    assert (p.layout, p.room) == ("RUNS", 48)
    # Bits: step 0 row 1, step 1 rows 0 and 1. A run's fields: columns 0 1 8 9, 2 3 10 11, ...
    assert hexadecimal(p.data[:48]) == (
        "00030002 00000000 00000000 00000000 ba329810 fe76dc54 ba329810 fe76dc54 ba329810 fe76dc54 40004040 00004080"
    )


def test_golden_packet_of_single_weights() -> None:
    """One row keeps columns 0, 9 and 18: pairs 0, 2 and 5 of lane 0 and 1."""
    keep = torch.zeros(1, 32, dtype=torch.bool)
    keep[0, [0, 9, 18]] = True
    codes = torch.full((1, 32), 7, dtype=torch.uint8)
    codes[0, [0, 9, 18]] = torch.tensor([1, 2, 4], dtype=torch.uint8)
    p = _packets.prepare(Uniform(codes, torch.ones(1, 2).to(BF16), 3, 16), Bitmask(keep))
    assert (p.layout, p.record_bytes, p.room) == ("SINGLE", 128, 272)
    words = p.data[128:256].view(torch.int32).tolist()
    # Columns 0 1 are pair 0 of lane 0, 8 9 pair 2, 18 19 pair 4 of lane 1: words 0, 4 and 8.
    assert {i: word for i, word in enumerate(words) if word} == {0: 1, 4: 2, 8: 4}
    assert hexadecimal(p.data[256:272]) == "00000024 00000000 00000001 00000000"


@pytest.mark.parametrize("name", WEIGHTS)
def test_packets_hold_what_was_stored(name: str) -> None:
    weight = WEIGHTS[name]
    p = packets_of(weight)
    fields, keep = _packets.stored(p)
    assert weight.keep is not None
    assert torch.equal(keep, weight.keep.mask())
    wanted = weight.base.values if isinstance(weight.base, Dense) else weight.base.codes  # type: ignore[attr-defined]
    assert fields.dtype == wanted.dtype
    assert torch.equal(fields, torch.where(keep, wanted, torch.zeros_like(wanted)))
    torch.testing.assert_close(_packets.decode(p), weight.dequantize(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_some_rows_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pruned(uniform(70, 192, 3, 64, zero=True), mask(kind, 70, 192))
    whole = packets_of(weight)
    monkeypatch.setattr(_packets, "_CHUNK", 192 * 20)
    pieces = packets_of(weight)
    assert torch.equal(whole.data, pieces.data)
    assert torch.equal(whole.offsets, pieces.offsets)
    assert torch.equal(_packets.decode(pieces), _packets.decode(whole))


@pytest.mark.parametrize(
    ("keep", "size", "layout"),
    [
        ("2:4", 32, "TWO_OF_FOUR"),
        ("1:2", 64, "TWO_OF_FOUR"),
        ("2:4", 16, "SINGLE"),  # a group would end within a step
        ("1:4", 32, "SINGLE"),
        ("4:8", 32, "SINGLE"),
        ("runs 8", 32, "SINGLE"),
        ("runs 64", 64, "RUNS"),
    ],
)
def test_the_layout_that_is_chosen(keep: str, size: int, layout: str) -> None:
    assert packets_of(pruned(uniform(16, 128, 4, size), mask(keep, 16, 128))).layout == layout


# --- kernels


@pytest.mark.parametrize("name", WEIGHTS)
def test_products_and_whole_weights(name: str, host: host_cuda.Host) -> None:
    weight = WEIGHTS[name]
    p, x = packets_of(weight), activations(8, 256, BF16)
    y = masked.matmul_packets(x, p)
    close(y, x, weight)
    assert not y[1].any()
    if p.bits in (1, 2, 5, 6):  # enough widths are made whole below
        return
    decoded = weight.dequantize() if p.order is None else weight.dequantize()[:, p.order]
    w = masked.weight_rows(p, BF16, 0, 40)
    exactly = decoded.to(BF16)
    if "offsets" in name:
        torch.testing.assert_close(w, exactly, rtol=2**-7, atol=2**-7)
    else:
        assert torch.equal(w, exactly)
    assert torch.equal(masked.weight_rows(p, BF16, 16, 33), w[16:33])


@pytest.mark.parametrize("name", HALVES)
def test_products_in_float16(name: str, host: host_cuda.Host) -> None:
    weight = HALVES[name]
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).to(FP16)
    p = packets_of(weight)
    close(masked.matmul_packets(x, p), x, weight)
    assert torch.equal(masked.weight_rows(p, FP16, 0, 40), weight.dequantize().to(FP16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_place_of_two_of_four_and_of_masks(layout: str, host: host_cuda.Host) -> None:
    """All masks of four columns in all fours of a tile; one-hot activations read single weights in their own bits."""
    masks = torch.tensor([[k in of for k in range(4)] for of in itertools.combinations(range(4), 2)])
    if layout == "single":
        masks = torch.tensor([[n >> k & 1 for k in range(4)] for n in range(16)]).bool()
    generator = torch.Generator().manual_seed(0)
    picked = masks[torch.randint(0, len(masks), (32, 32), generator=generator)].flatten(1)
    keep: Bitmask | Pattern = Bitmask(picked)
    if layout == "2:4":
        keep = Pattern.from_mask(picked, 2, 4)
    elif layout == "runs 16":
        keep = Bitmask(picked[:, :8], 16)
    for base in (values(32, 128), uniform(32, 128, 4, 32, zero=True)):
        weight = pruned(base, keep)
        y = masked.matmul_packets(torch.eye(128, dtype=BF16), packets_of(weight))
        assert torch.equal(y, weight.dequantize().T.to(BF16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 65, 129])
def test_any_number_of_tokens(tokens: int, layout: str, host: host_cuda.Host) -> None:
    weight = pruned(values(16, 64), mask(layout, 16, 64))
    x = activations(tokens, 64, BF16, tokens)
    y = masked.matmul_packets(x, packets_of(weight))
    assert y.shape == (tokens, 16)
    close(y, x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 5, 16, 48, 81])
@pytest.mark.parametrize("columns", [16, 64, 96, 144, 192, 896])
def test_any_shape(rows: int, columns: int, layout: str, host: host_cuda.Host) -> None:
    x = activations(3, columns, BF16, columns)
    for base in (values(rows, columns), uniform(rows, columns, 4, columns // 2 if columns % 64 == 0 else columns, zero=True)):
        weight = pruned(base, mask(layout, rows, columns, rows))
        p = packets_of(weight)
        assert p.layout == LAYOUTS[layout]
        close(masked.matmul_packets(x, p), x, weight)
        close(masked.matmul_dense(x, p), x, weight, rounded_weight=True)
        assert torch.equal(masked.weight_rows(p, BF16, 0, rows), weight.dequantize().to(BF16))


@pytest.mark.parametrize("columns", [1, 7, 100])
def test_columns_that_are_no_multiple_of_anything(columns: int, host: host_cuda.Host) -> None:
    x = activations(3, columns, BF16)
    for base in (values(9, columns), uniform(9, columns, 4, columns, zero=True)):
        weight = pruned(base, mask("single", 9, columns))
        close(masked.matmul_packets(x, packets_of(weight)), x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processors", [1, 4, 64])
def test_parts_of_the_columns_are_added_in_order(processors: int, layout: str, host: host_cuda.Host) -> None:
    host.device, host.seed = replace(host_cuda.DEVICE, processors=processors), processors
    weight = pruned(values(20, 2880), mask(layout, 20, 2880))
    x, p = activations(5, 2880, BF16), packets_of(weight)
    before = len(host.launched)
    y = masked.matmul_packets(x, p)
    assert host.launched[before][1][1] == min(2 * processors, 45 // 8)
    close(y, x, weight)
    host.seed += 100
    assert torch.equal(masked.matmul_packets(x, p), y)
    host.check_counters()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [13, 29, 61])
@pytest.mark.parametrize("rows", [16, 81, 176])
def test_teams_of_warps(rows: int, tokens: int, layout: str, host: host_cuda.Host) -> None:
    """Warps without rows, tokens that are not there, blocks that share the columns."""
    host.device = replace(host_cuda.DEVICE, shared=227 << 10, processors=8)
    weight = pruned(uniform(rows, 1152, 4, 64, zero=True), mask(layout, rows, 1152, rows))
    x, p = activations(tokens, 1152, BF16, tokens), packets_of(weight)
    y = masked.matmul_packets(x, p)
    close(y, x, weight)
    host.seed += 1
    assert torch.equal(masked.matmul_packets(x, p), y)
    host.check_counters()


@pytest.mark.parametrize(
    ("kind", "shared", "tokens"), [("single", 227, "64"), ("single", 100, "64"), ("single", 64, "32"), ("single none", 30, "16")]
)
def test_blocks_fit_the_shared_memory_there_is(kind: str, shared: int, tokens: str, host: host_cuda.Host) -> None:
    host.device = replace(host_cuda.DEVICE, shared=shared << 10)
    weight = WEIGHTS[f"values, {kind}"]
    x = activations(64, 256, BF16)
    close(masked.matmul_packets(x, packets_of(weight)), x, weight)
    assert host.launched[-1][0].name.split(", ")[-1].rstrip(">") == tokens


def test_no_block_fits(host: host_cuda.Host) -> None:
    host.device = replace(host_cuda.DEVICE, shared=8 << 10)
    with pytest.raises(KernelError, match="8192 bytes of shared memory"):
        masked.matmul_packets(torch.ones(1, 256, dtype=BF16), packets_of(WEIGHTS["values, single"]))


def test_every_kind_fits_a_small_gpu() -> None:
    """99 kB of shared memory, as Ada and consumer Blackwell have, hold a block of 8 tokens of every kind."""
    small = replace(host_cuda.DEVICE, shared=99 << 10)
    for name, weight in WEIGHTS.items():
        assert masked.plan(1, packets_of(weight), small)[0] == 8, name


def test_addend_and_bias_and_strides(host: host_cuda.Host) -> None:
    weight, generator = WEIGHTS["4 bits and zeros, single"], torch.Generator().manual_seed(1)
    p, x = packets_of(weight), torch.randn(9, 256, generator=generator).to(BF16)
    addend, bias = 30 * torch.randn(9, 40, generator=generator), 30 * torch.randn(40, generator=generator).to(BF16)
    y = masked.matmul_packets(x, p, addend, bias)
    close(y, x, weight, addend.double() + bias.double())
    wide = torch.full((9, 300), torch.nan, dtype=BF16)
    for begin in (8, 3):  # aligned to 16 bytes, and not
        wide[:, begin : begin + 256] = x
        assert torch.equal(masked.matmul_packets(wide[:, begin : begin + 256], p, addend, bias), y)
    assert torch.equal(masked.matmul_packets(x.view(3, 3, 256), p, addend, bias).view(9, 40), y)
    with pytest.raises(KernelError, match="expected contiguous"):
        masked.matmul_packets(x, p, addend.T)


def test_nothing_but_the_result_is_written(host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Tensor, Tensor]] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        whole = torch.full((torch.Size(shape).numel() + 256,), torch.nan, dtype=dtype)
        made.append((whole, whole[128:-128].view(shape)))
        return made[-1][1]

    packets = {kind: packets_of(WEIGHTS[f"values, {kind}"]) for kind in LAYOUTS}
    monkeypatch.setattr(masked.torch, "empty", empty)
    for kind, p in packets.items():
        x = activations(5, 256, BF16)
        close(masked.matmul_packets(x, p), x, WEIGHTS[f"values, {kind}"])
        assert torch.equal(masked.weight_rows(p, BF16, 16, 33), WEIGHTS[f"values, {kind}"].dequantize()[16:33].to(BF16))
    assert len(made) >= 6
    assert all(bool(whole[:128].isnan().all() and whole[-128:].isnan().all()) for whole, _ in made)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 256), "float32"),
        (torch.zeros(2, 256, dtype=FP16), "type of the weight's values, BF16"),
        (torch.zeros(2, 255, dtype=BF16), "255 columns; expected in=256"),
    ],
)
def test_activations_that_do_not_fit(x: Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        masked.matmul_packets(x, packets_of(WEIGHTS["values, single"]))


def test_what_has_no_kernel_is_said() -> None:
    three = packing.pack(pruned(values(16, 64, torch.float32), mask("2:4", 16, 64)))
    assert "values of F32" in str(masked.reason(three[1]))
    narrow = packing.pack(pruned(uniform(16, 64, 4, 8), mask("2:4", 16, 64)))
    assert "groups of 8 columns" in str(masked.reason(narrow[1]))
    for tensors, spec in (three, narrow):
        with pytest.raises(KernelError, match="masked: "):
            masked.prepare(spec, tensors)
    wide = replace(uniform(16, 64, 4, 32), scale=torch.ones(16, 2, dtype=FP16))
    assert "scales of F16" in str(masked.reason(packing.pack(pruned(wide, mask("2:4", 16, 64)))[1]))
    tensors, spec = packing.pack(CompressedWeight(uniform(16, 64, 4, 32)))
    with pytest.raises(KernelError, match="no mask"):
        masked.prepare(spec, tensors)
    with pytest.raises(KernelError, match="multiple of 16"):
        masked.weight_rows(packets_of(WEIGHTS["values, single"]), BF16, 8, 16)


def test_large_weights_are_made_whole_some_rows_at_a_time(host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHTS["values, 2:4"]
    monkeypatch.setattr(masked, "_DENSE", 16 * 256)
    before, x = len(host.launched), activations(5, 256, BF16)
    close(masked.matmul_dense(x, packets_of(weight)), x, weight, rounded_weight=True)
    assert len(host.launched) - before == 3


@pytest.mark.parametrize(
    "name", ["values, 2:4", "4 bits and zeros, single", "3 bits and offsets, runs 16", "4 bits scattered, 2:4"]
)
def test_the_operator(name: str) -> None:
    weight = WEIGHTS[name]
    p, x = packets_of(weight), activations(4, 256, torch.float32)
    torch.library.opcheck(torch.ops.compress.masked.default, (x, *vars(p).values(), None, None))
    addend, bias = torch.randn(4, 40), torch.randn(40)

    @torch.compile(fullgraph=True, backend="eager")
    def twice(x: Tensor) -> Tensor:
        return 2 * masked.product(x, p, addend, bias)

    torch.testing.assert_close(twice(x), 2 * (x @ weight.dequantize().T + addend + bias), rtol=1e-4, atol=1e-2)


def test_the_file_counts_its_templates() -> None:
    assert host_cuda.templates("masked") == ["masked_products", "masked_weight"]
    assert weight_only.TOKENS == (8, 16, 32, 64)
