"""Tables of values: which entry is nearest, which scales there are, and what a grid of them becomes in a part."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import tables
import torch
from problems import problem
from torch import Tensor

from compress.errors import FormatError
from compress.formats.table import FORMAT
from compress.methods.solvers import table_grid
from compress.methods.solvers.error_feedback import BLOCK, ColumnRounding, factorise
from compress.methods.solvers.table_grid import Codebook, Scales, TableLayout, encode, fit
from compress.weights.table import DATATYPES, SCALE_TYPES, ScaleType, Table, code_bits, select_bits

DOUBLE = torch.zeros(1, dtype=torch.float64)
quantize = partial(table_grid.quantize, block=BLOCK)
every_datatype = pytest.mark.parametrize("datatype", DATATYPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- values


def test_values() -> None:
    for datatype in ("fp3", "fp4", "bitmod-fp3", "bitmod-fp4"):
        for stored, expected in zip(DATATYPES[datatype], tables.tables(datatype), strict=True):
            assert len(stored) == 1 << code_bits(datatype)
            spare = len(stored) // 2
            assert {code: value for code, value in enumerate(stored) if code != spare or value} == expected
    assert math.copysign(1, DATATYPES["fp4"][0][8]) == -1  # the code 8 of E2M1 is -0
    assert {name: (code_bits(name), select_bits(name)) for name in DATATYPES} == {
        "fp3": (3, 0),
        "fp4": (4, 0),
        "nf4": (4, 0),
        "bitmod-fp3": (3, 2),
        "bitmod-fp4": (4, 2),
    }


def test_values_of_e2m1_follow_from_its_fields() -> None:
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert DATATYPES["fp4"][0][code] == (-value if sign else value)


# ---------------------------------------------------------------------------------------------------- rounding


@every_datatype
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_value_and_its_ties(datatype: str, dtype: torch.dtype) -> None:
    for number, table in enumerate(tables.tables(datatype)):
        book = Codebook(datatype, torch.zeros(1, dtype=dtype))
        ordered = torch.tensor(sorted(table.values()), dtype=dtype)
        middle = (ordered[1:] + ordered[:-1]) / 2
        below, above = (middle.nextafter(torch.full_like(middle, side)) for side in (-math.inf, math.inf))
        asked = torch.cat([torch.linspace(-20, 20, 801, dtype=dtype), ordered])
        if datatype != "nf4":  # whose middles are not numbers of few bits: a rounded middle is no tie
            asked = torch.cat([asked, middle, below, above])
        select = torch.tensor(number) if book.special else None
        found = book.place(asked, select)
        assert book.code(found).tolist() == [tables.nearest(x, table) for x in asked.double().tolist()]
        assert torch.equal(book.value(found), torch.tensor(DATATYPES[datatype][number], dtype=dtype)[book.code(found).long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_of_e2m1_go_to_the_even_mantissa(dtype: torch.dtype) -> None:
    book = Codebook("fp4", torch.zeros(1, dtype=dtype))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=dtype)
    wanted = torch.tensor([0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0], dtype=dtype)
    assert torch.equal(book.value(book.place(ties, None)), wanted)
    assert torch.equal(book.value(book.place(-ties, None)), -wanted)


def test_ties_of_special_values() -> None:
    book = Codebook("bitmod-fp4", DOUBLE)
    # 9 lies between 8 (code 6) and 10 (code 8), both even: the lower. 11 between 10 (8) and 12 (7): the even. 14: 12 or 16 (8).
    asked = torch.tensor([[9.0, 11.0, 14.0], [-9.0, -11.0, -14.0]], dtype=torch.float64)
    assert book.value(book.place(asked, torch.tensor([0, 0]))).tolist() == [[8, 10, 12], [-8, -12, -12]]
    assert book.value(book.place(asked, torch.tensor([1, 1]))).tolist() == [[8, 12, 12], [-10, -10, -12]]
    assert book.value(book.place(asked, torch.tensor([2, 3]))).tolist() == [[8, 12, 16], [-8, -12, -16]]


@every_datatype
def test_zeros_and_small_weights_never_get_the_code_of_negative_zero(datatype: str) -> None:
    book = Codebook(datatype, DOUBLE)
    small = torch.tensor([0.0, -0.0, 1e-9, -1e-9, -1e-300, -0.04], dtype=torch.float64)
    for number in range(len(DATATYPES[datatype])):
        codes = book.code(book.place(small, torch.tensor(number) if book.special else None))
        assert codes.tolist() == [7 if datatype == "nf4" else 0] * 6


@every_datatype
def test_errors_are_squared_distances_to_the_nearest_value(datatype: str) -> None:
    book, asked = Codebook(datatype, DOUBLE), 6 * normal(3, 4, 50)
    found = list(book.errors(asked))
    assert len(found) == len(DATATYPES[datatype])
    for error, values in zip(found, DATATYPES[datatype], strict=True):
        expected = (asked.unsqueeze(-1) - torch.tensor(values, dtype=torch.float64)).square().amin(-1)
        torch.testing.assert_close(error, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- scales


def test_e4m3_scales_are_those_of_torch_bit_for_bit() -> None:
    octets = torch.arange(127, dtype=torch.uint8)
    assert octets.view(torch.float8_e4m3fn).double().tolist() == tables.E4M3
    part = Table(
        torch.full((127, 1), 2, dtype=torch.uint8),  # the code of 1
        octets.view(torch.float8_e4m3fn).unsqueeze(1),
        "fp4",
        1,
        torch.full((127,), 0.25),
    )
    assert part.dequantize().flatten().tolist() == [value / 4 for value in tables.E4M3]
    scales = Scales("e4m3", torch.tensor(0.25, dtype=torch.float64))
    kept = torch.tensor(tables.E4M3[1:], dtype=torch.float64) / 4
    assert torch.equal(scales.nearest(kept), kept)
    assert torch.equal(scales.pack(kept).view(torch.uint8), octets[1:])
    # Each is the nearest one, also among the subnormal ones, on both sides of every middle.
    middle = (kept[1:] + kept[:-1]) / 2
    assert torch.equal(scales.nearest(middle * (1 - 1e-6)), kept[:-1])
    assert torch.equal(scales.nearest(middle * (1 + 1e-6)), kept[1:])


def test_scales_beyond_their_type_are_held_at_its_ends() -> None:
    asked = torch.tensor([0.0, 1e-40, 1e-3, 1e3, 1e30], dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert Scales("e4m3", one).nearest(asked).tolist()[:2] == [2.0**-9] * 2
    assert Scales("e4m3", one).nearest(asked).tolist()[3:] == [448.0] * 2
    assert Scales("uint8", one).nearest(asked).tolist() == [1, 1, 1, 255, 255]
    assert Scales("e8m0").nearest(asked).tolist() == [2.0**-60, 2.0**-60, 2.0**-10, 2.0**10, 2.0**100]
    assert Scales("uint8", one).nearest(-asked).tolist() == [1] * 5
    assert Scales("e4m3", one).nearest(-asked).tolist() == [2.0**-9] * 5


def test_powers_of_two() -> None:
    scales = Scales("e8m0")
    asked = torch.tensor([1.0, 1.49, 1.5, 1.51, 2.0, 0.74, 0.76], dtype=torch.float64)
    assert scales.nearest(asked).tolist() == [1, 1, 2, 2, 2, 0.5, 1]
    assert scales.covering(asked).tolist() == [1, 2, 2, 2, 2, 1, 1]
    assert scales.pack(torch.tensor([[1.0, 2.0, 2.0**-60, 2.0**127]])).tolist() == [[127, 128, 67, 254]]
    codes = torch.arange(255, dtype=torch.uint8).unsqueeze(0)
    part = Table(torch.full((1, 255), 2, dtype=torch.uint8), codes, "fp4", 1)
    assert part.dequantize()[0].double().tolist() == [math.ldexp(1, code - 127) for code in range(255)]
    six = Table(torch.tensor([[7, 15]], dtype=torch.uint8), torch.tensor([[127]], dtype=torch.uint8), "fp4", 2)
    assert six.dequantize().tolist() == [[6, -6]]


def test_scales_of_rows() -> None:
    weight = normal(64, 4, 16) * torch.logspace(-12, 12, 64, dtype=torch.float64).view(-1, 1, 1)
    cover = weight.abs().amax((1, 2)) / 4
    eight = Scales.of("uint8", weight, 4.0)
    row = eight.pack_row()
    assert row is not None
    assert row.dtype == torch.bfloat16
    assert (row.double() * 255 >= cover).all()
    assert (row.double() * 255 <= cover * (1 + 2**-7)).all()
    assert torch.equal(row.double().unsqueeze(1), eight.row)
    floats = Scales.of("e4m3", weight, 4.0)
    row = floats.pack_row()
    assert row is not None
    assert row.dtype == torch.float32
    assert (torch.frexp(row).mantissa == 0.5).all()  # powers of two
    assert (row.double() * 448 >= 1.5 * cover).all()
    assert (row.double() * 224 < 1.5 * cover).all()
    zero = torch.zeros(2, 1, 4)
    assert Scales.of("bfloat16", zero, 4.0).row is Scales.of("e8m0", zero, 4.0).row is None
    for kind in ("uint8", "e4m3"):
        assert (Scales.of(kind, zero, 4.0).row > 0).all()  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("kind", SCALE_TYPES)
@every_datatype
def test_what_is_fitted_can_be_stored(datatype: str, kind: ScaleType) -> None:
    weight = (normal(9, 48) * torch.logspace(-3, 3, 9, dtype=torch.float64).unsqueeze(1)).float()
    weight[0] = 0
    weight[1, :16] = 0
    for search, dtype in itertools.product((False, True), (torch.float32, torch.float64)):
        values = weight.to(dtype)
        book = Codebook(datatype, values)
        grid = fit(values, book, kind, 16, search, None)
        codes = encode(values, grid, book, 16)
        part = grid.part(codes, datatype, 16)
        assert part.scale_type == kind
        # What scales were taken for is what they are.
        assert torch.equal(part.scales().double(), grid.scale.double())
        back = FORMAT.unpack(FORMAT.describe(part), part.shape, FORMAT.pack(part))
        assert torch.equal(back.dequantize(), part.dequantize())
        assert (part.dequantize()[0] == 0).all()
        assert (part.dequantize()[1, :16] == 0).all()
        assert torch.equal(encode(part.dequantize().to(dtype), grid, book, 16), codes)


@pytest.mark.parametrize("kind", SCALE_TYPES)
def test_search_is_never_worse_than_covering(kind: ScaleType) -> None:
    importance = normal(64).exp()
    for datatype, weight in itertools.product(DATATYPES, (normal(40, 64), normal(40, 64) ** 3, normal(40, 64).abs())):
        book = Codebook(datatype, weight)
        errors = []
        for search in (False, True):
            grid = fit(weight, book, kind, 16, search, importance)
            decoded = grid.part(encode(weight, grid, book, 16), datatype, 16).dequantize().double()
            errors.append(((weight - decoded).square() * importance).unflatten(1, (-1, 16)).sum(2))
        assert (errors[1] <= errors[0] * (1 + 1e-9)).all()
        assert float(errors[1].sum()) < 0.99 * float(errors[0].sum())


@pytest.mark.parametrize("kind", SCALE_TYPES)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e37])
def test_huge_and_tiny_weights(kind: ScaleType, size: float) -> None:
    weight = normal(4, 32).clamp(-3, 3).float() * size
    for datatype, hessian in itertools.product(DATATYPES, (None, torch.eye(32))):
        made = quantize(weight, hessian, datatype=datatype, scale_type=kind, group_size=16, range="mse", damp=0.01, refinements=1)
        decoded = made.weight.dequantize()
        assert torch.isfinite(decoded).all()
        assert decoded.abs().max() <= 4 * weight.abs().max() + 1e-15
        if size > 1:
            assert float(((decoded - weight) / size).square().mean()) < 0.2 * float((weight / size).square().mean())


# ---------------------------------------------------------------------------------------------------- solving


@every_datatype
def test_the_sweep_rounds_and_encodes_by_the_table_of_each_row(datatype: str) -> None:
    weight, hessian = problem(rows=5, columns=24)
    book, factor = Codebook(datatype, weight), factorise(hessian, 0.01, descending=True)
    grid = fit(weight, book, "bfloat16", 8, True, None)
    levels = TableLayout.of(grid, book)
    target = weight.T[factor.order]
    delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
    ColumnRounding(target, delta, codes, factor.feedback, levels, factor.order // 8, 5).run(0, 24)
    inverse = torch.argsort(factor.order)
    decoded = grid.part(codes[inverse].T, datatype, 8).dequantize().double()
    torch.testing.assert_close(weight - delta[inverse].T, decoded, rtol=1e-6, atol=1e-9)
    # What each column cost when it was rounded is all that it costs.
    rounded = weight.T[factor.order] - delta
    swept = float((factor.pivots.square().unsqueeze(1) * (target - rounded).square()).sum())
    ordered = (weight.T[factor.order] - rounded).T
    whole = float(((ordered @ factor.hessian[factor.order][:, factor.order]) * ordered).sum())
    assert math.isclose(swept, whole, rel_tol=1e-9)


@pytest.mark.parametrize("kind", SCALE_TYPES)
@pytest.mark.parametrize("datatype", ["nf4", "bitmod-fp3"])
def test_block_does_not_change_the_codes(datatype: str, kind: ScaleType) -> None:
    weight, hessian = problem(rows=16, columns=144)
    made = [
        quantize(
            weight,
            hessian,
            datatype=datatype,
            scale_type=kind,
            group_size=24,
            range="mse",
            damp=0.01,
            refinements=2,
            block=block,
        ).weight.base
        for block in (144, 1, 7, 32, 1000)
    ]
    for base in made[1:]:
        assert torch.equal(base.codes, made[0].codes)
        assert torch.equal(base.scales(), made[0].scales())


@pytest.mark.parametrize("kind", SCALE_TYPES)
@pytest.mark.parametrize("datatype", ["fp4", "bitmod-fp4"])
def test_refinement_lowers_the_damped_loss(datatype: str, kind: ScaleType) -> None:
    for seed in range(8):
        weight, hessian = problem(rows=12, columns=64, seed=seed)
        full = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(64, dtype=torch.float64)
        losses = []
        for refinements in range(4):
            made = quantize(
                weight,
                hessian,
                datatype=datatype,
                scale_type=kind,
                group_size=16,
                range="mse",
                damp=0.01,
                refinements=refinements,
            )
            delta = weight - made.weight.dequantize().double()
            losses.append(float(((delta @ full) * delta).sum()))
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses)), (kind, losses)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", SCALE_TYPES)
@every_datatype
def test_identity_hessian_is_rounding_to_nearest(datatype: str, kind: ScaleType) -> None:
    weight, _ = problem(rows=8, columns=64)
    options: dict[str, Any] = {"datatype": datatype, "scale_type": kind, "group_size": 16, "range": "mse", "damp": 0.0}
    plain = quantize(weight, None, refinements=0, **options).weight.base
    for hessian in (torch.eye(64, dtype=torch.float64) * 3, torch.zeros(64, 64, dtype=torch.float64)):
        base = quantize(weight, hessian, refinements=0, **options).weight.base
        assert torch.equal(base.codes, plain.codes)
        assert torch.equal(base.scales(), plain.scales())


# ---------------------------------------------------------------------------------------------------- the part and its format


def test_decoding_one_value_at_a_time() -> None:
    from examples.table import fixed

    for part in list(fixed())[1::9]:
        scale = part.scales()
        decoded = part.dequantize()
        for r, c in itertools.product(range(part.shape[0]), range(part.shape[1])):
            group = c // part.group_size
            table = 0 if part.select is None else int(part.select[r, group])
            value = torch.tensor(DATATYPES[part.datatype][table][int(part.codes[r, c])]) * scale[r, group]
            assert torch.equal(decoded[r, c], value)


def golden(kind: ScaleType) -> Table:
    from examples.table import golden

    return golden("bitmod-fp3", kind)


@pytest.mark.parametrize(
    "change",
    [{"datatype": value} for value in ("fp5", "", None, 4, True, ["fp4"], {"fp4": 1})]
    + [{"group_size": value} for value in (0, -1, 3, 20, 2**64, True, 5.0, "5", None)]
    + [{"scale": value} for value in ("float16", None, 8, True, ["e8m0"])]
    + [{"bits": value} for value in (4, 0, True, 3.0, "3", None)]
    + [{"zero": True}],
    ids=str,
)
def test_descriptions_that_are_not_written_are_refused(change: dict[str, Any]) -> None:
    described = FORMAT.describe(golden("uint8"))
    FORMAT.layout(described, (3, 10))
    key = next(iter(change))
    with pytest.raises(FormatError, match=f"table: .*{key}"):
        FORMAT.layout({**described, **change}, (3, 10))
    if key in described:
        with pytest.raises(FormatError, match=f"table: {key}"):
            FORMAT.layout({k: v for k, v in described.items() if k != key}, (3, 10))


@pytest.mark.parametrize(("kind", "octet"), [("e8m0", 255), ("e4m3", 127), ("e4m3", 255)])
def test_scales_that_are_not_numbers_are_refused(kind: ScaleType, octet: int) -> None:
    part = golden(kind)
    tensors = FORMAT.pack(part)
    raw = tensors["scale"].view(torch.uint8).clone()
    raw[2, 1] = octet
    with pytest.raises(FormatError, match="table: scale has values that are not numbers"):
        FORMAT.unpack(FORMAT.describe(part), part.shape, {**tensors, "scale": raw.view(tensors["scale"].dtype)})


def test_all_bytes_are_scales_where_they_are_factors() -> None:
    part = golden("uint8")
    tensors = FORMAT.pack(part)
    raw = torch.full_like(tensors["scale"], 255)
    assert torch.equal(FORMAT.unpack(FORMAT.describe(part), part.shape, {**tensors, "scale": raw}).scale, raw)


def test_short() -> None:
    assert FORMAT.short(FORMAT.describe(golden("uint8"))) == "bitmod-fp3 g5 with uint8 scales"
