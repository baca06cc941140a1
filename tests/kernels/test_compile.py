"""Kernels compiled by NVRTC for GPUs that are not here: no spills, registers within bounds, the instructions that were meant."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator

import nvrtc
import pytest
import torch

from compress.kernels import _cuda, bit_serial, int8, masked, nearest, round_columns, sparse_rows, weight_only

BF16, FP16 = torch.bfloat16, torch.float16
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# What is compiled at each run: the widest and the narrowest of what there is, for the first and the last generation but one.
FEW: list[tuple[_cuda.Kernel, tuple[str, ...]]] = [
    (weight_only.instance("wqmm", BF16, 4, "SYMMETRIC", False, 8), ARCHITECTURES),
    (weight_only.instance("wqmm", FP16, 8, "SHIFT", False, 64), ARCHITECTURES),
    (weight_only.instance("wqmm", BF16, 4, "WIDE", False, 64), ("sm_90",)),
    (weight_only.instance("wqmm", BF16, 3, "ZERO", False, 16), ("sm_80", "sm_90")),
    (weight_only.instance("wqmm", BF16, 1, "HALF", False, 32), ("sm_90",)),
    (weight_only.instance("wqmm", BF16, 7, "TWO_LEVEL", False, 64), ("sm_80", "sm_90")),
    (weight_only.instance("wqmm", BF16, 7, "SHIFT", False, 32), ("sm_80", "sm_90")),
    (weight_only.instance("wqmm", BF16, 8, "WIDE", False, 16, tiles=1), ("sm_89",)),
    (weight_only.instance("wqmm", BF16, 4, "SELECT", True, 64), ("sm_80", "sm_90")),
    (weight_only.instance("dequantize", BF16, 8, "ZERO", False), ("sm_80", "sm_90")),
    (weight_only.instance("dequantize", FP16, 3, "SELECT", True), ("sm_80",)),
    (sparse_rows.instance(BF16, torch.int16), ("sm_80", "sm_90")),
    (round_columns.instance(), ("sm_90",)),
    (nearest.instance(8, False), ("sm_80", "sm_90")),
    (nearest.instance(16, True), ("sm_90",)),
    (weight_only.instance("wqmm", BF16, 4, "ZERO", False, 64, True), ("sm_80", "sm_90", "sm_120")),
    (weight_only.instance("wqmm", FP16, 8, "SHIFT", False, 8, True), ("sm_90",)),
    (int8.instance(BF16), ("sm_90",)),
    (bit_serial.pack_instance(FP16), ("sm_90",)),
    (bit_serial.instance(BF16, 8, 8), ("sm_80", "sm_90")),
    (bit_serial.instance(BF16, 2, 2), ("sm_90", "sm_120")),
    (masked.instance("masked_products", BF16, "TWO_OF_FOUR", 16, "BF16", 8), ARCHITECTURES),
    (masked.instance("masked_products", BF16, "TWO_OF_FOUR", 4, "ZERO", 64), ("sm_80", "sm_90")),
    (masked.instance("masked_products", FP16, "SINGLE", 16, "FP16", 64), ("sm_90",)),
    (masked.instance("masked_products", BF16, "SINGLE", 7, "SHIFT", 64), ("sm_80", "sm_90")),
    (masked.instance("masked_products", BF16, "RUNS", 7, "ZERO", 64), ("sm_80", "sm_120")),
    (masked.instance("masked_products", BF16, "RUNS", 4, "SYMMETRIC", 8), ("sm_90",)),
    (masked.instance("masked_weight", BF16, "TWO_OF_FOUR", 4, "ZERO"), ("sm_90",)),
    (masked.instance("masked_weight", FP16, "SINGLE", 3, "SHIFT"), ("sm_80",)),
    (masked.instance("masked_weight", BF16, "SINGLE", 1, "SHIFT"), ("sm_90",)),
]


def every(dtype: torch.dtype, bits: int) -> Iterator[_cuda.Kernel]:
    """All instantiations for weights of a width that the package can ask for."""
    kinds = [(kind, False) for kind in ("SYMMETRIC", "HALF", "ZERO", "SHIFT", "WIDE", "TWO_LEVEL")]
    kinds += [(kind, True) for kind in ("SYMMETRIC", "SELECT") if bits in (3, 4)]
    for of in kinds:
        yield weight_only.instance("dequantize", dtype, bits, *of)
        for tokens in weight_only.TOKENS:
            for tiles in weight_only.pieces(tokens):
                yield weight_only.instance("wqmm", dtype, bits, *of, tokens, tiles=tiles)
                if not of[1]:
                    yield weight_only.instance("wqmm", dtype, bits, *of, tokens, True, tiles)
    yield from (bit_serial.instance(dtype, bits, others) for others in range(1, 9))
    for layout in ("SINGLE", "RUNS", "TWO_OF_FOUR"):
        for width, kind in ((bits, "ZERO"), (bits, "SHIFT"), *([(16, "")] if bits == 8 else [])):
            yield masked.instance("masked_weight", dtype, layout, width, kind)
            yield from (masked.instance("masked_products", dtype, layout, width, kind, tokens) for tokens in weight_only.TOKENS)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if nvrtc.library() is None:
        if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            pytest.fail("nvidia-cuda-nvrtc is not installed; it comes with the extra `dev`: make test, or pip install -e .[dev]")
        pytest.skip(f"NVRTC is not among the development dependencies on {platform.system()} {platform.machine()}")


def check(kernel: _cuda.Kernel, architecture: str) -> nvrtc.Compiled:
    compiled = nvrtc.compile_for(kernel, architecture)
    assert (compiled.stack, compiled.spills) == (0, 0)
    # 65536 registers of a multiprocessor, for the blocks that a launch bound asks for; 255 is what the assembler may give.
    assert compiled.registers * kernel.threads <= 65536
    return compiled


@pytest.mark.parametrize(("kernel", "architecture"), [(k, a) for k, of in FEW for a in of], ids=lambda v: getattr(v, "name", v))
def test_some_for_each_architecture(kernel: _cuda.Kernel, architecture: str) -> None:
    check(kernel, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_instantiation(dtype: torch.dtype, bits: int, architecture: str) -> None:
    for kernel in every(dtype, bits):
        check(kernel, architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_instructions_are_those_meant(architecture: str) -> None:
    """Tensor cores, copies past the registers, fragments by ldmatrix; for 4 bits, few operations on integers besides."""
    counts = Counter(
        nvrtc.instructions(nvrtc.compile_for(weight_only.instance("wqmm", BF16, 4, "SYMMETRIC", False, 16), architecture))
    )
    twice = 2  # the loop is there for one group in a piece of two tiles, and for several
    assert counts["HMMA.16816.F32.BF16"] == twice * 2 * 2 * 8  # row-blocks, tokens / 8, steps
    assert counts["LDSM.16.M88.4"] == twice * 2 * 2 * 2
    assert counts["LDGSTS.E.BYPASS.128"] > 0
    assert counts["HFMA2.BF16_V2"] == twice * 2 * 32  # one per pair of weights
    assert counts["LDS.128"] >= twice * 2 * 2  # the words of a lane, one access per row-block and tile
    assert not any(name.startswith(("LDL", "STL")) for name in counts)


@pytest.mark.parametrize(("bits", "most"), [(2, 260), (3, 410), (4, 290), (8, 570)])
def test_a_round_costs_few_instructions(bits: int, most: int) -> None:
    """For up to 8 tokens they, and not memory, may set the speed: 4096 weights in groups of 128, see docs/kernels.md."""
    kernel = weight_only.instance("wqmm", BF16, bits, "SYMMETRIC", False, 8)
    names = nvrtc.shortest_round(nvrtc.compile_for(kernel, "sm_90"), "HMMA", 2 * 8)
    assert len(names) <= most, Counter(names).most_common()


def test_integers_and_bits_go_to_their_own_tensor_cores() -> None:
    """Where the device has them; later ones than sm_90 have none for single bits."""
    octets = nvrtc.compile_for(weight_only.instance("wqmm", BF16, 4, "SYMMETRIC", False, 16, True), "sm_90")
    # For one group in a piece and several; row-blocks and sums of x, tokens / 8, steps.
    assert Counter(nvrtc.instructions(octets))["IMMA.16832.U8.S8"] == 2 * (2 + 1) * 2 * 4
    bits = bit_serial.instance(BF16, 2, 3)
    found = Counter(nvrtc.instructions(nvrtc.compile_for(bits, "sm_90")))["BMMA.168256.AND.POPC"]
    assert found > 0
    assert found % (2 * 3) == 0  # as often as the compiler unrolls the loop
    assert not any("BMMA" in name for name in nvrtc.instructions(nvrtc.compile_for(bits, "sm_120")))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("bits", [16, 4])
def test_two_of_four_goes_to_sparse_tensor_cores(bits: int, architecture: str) -> None:
    """One product for 32 columns, and none that is dense."""
    kernel = masked.instance("masked_products", BF16, "TWO_OF_FOUR", bits, "SYMMETRIC", 16)
    counts = Counter(nvrtc.instructions(nvrtc.compile_for(kernel, architecture)))
    steps = 2 if bits == 16 else 4
    assert counts["HMMA.SP.16832.F32.BF16"] == 2 * 2 * steps  # row-blocks, tokens / 8, steps
    assert counts["HMMA.16816.F32.BF16"] == 0
    assert counts["LDGSTS.E.BYPASS.128"] > 0


def test_a_source_has_no_includes() -> None:
    """CuPy's cache does not look into included files, and NVRTC comes without any."""
    for stem in ("weight_only", "masked", "sparse_rows", "round_columns", "nearest", "int8", "bit_serial"):
        assert "#include" not in _cuda.source(stem)


def test_an_error_of_the_compiler_is_seen() -> None:
    with pytest.raises(AssertionError, match="Integer<4>"):
        nvrtc.compile_for(_cuda.Kernel("weight_only", "wqmm<BFloat16, Integer<4>, NO_SUCH, 8>", 256), "sm_90")
