"""Tensors in other tools' layouts against slow readers written from the description of each layout, and against golden words.

Nothing here is shared with `compress/export`: a field is looked up bit by bit in the words that hold it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import times

from compress.checkpoint import packing
from compress.errors import FormatError
from compress.interop import affine_grid as _grid
from compress.interop import config_patterns as _names
from compress.interop.layouts.awq import EXPORT as AWQ
from compress.interop.layouts.compressed_tensors import EXPORT as CT
from compress.interop.layouts.gptq import EXPORT as GPTQ
from compress.weights.table import DATATYPES, Table, select_bits
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

FORMS = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": CT}
law = settings(max_examples=times(15, 60), deadline=None, derandomize=True)
Array = np.ndarray[Any, Any]


# ------------------------------------------------------------------------------------------------ slow readers


def field(words: list[int], bits: int, index: int) -> int:
    """Field `index` of a bit stream of 32-bit words, least significant bit first."""
    value = 0
    for bit in range(bits):
        place = index * bits + bit
        value |= ((words[place // 32] >> (place % 32)) & 1) << bit
    return value


def unsigned(words: torch.Tensor) -> Array:
    return words.numpy().astype(np.int64) & 0xFFFFFFFF


def slow_gptq(tensors: dict[str, torch.Tensor], bits: int, v1: bool) -> Array:
    """W[n, k] = scales[g, n] * (q[k, n] - z[g, n]) with g = g_idx[k]; v1 stores z - 1."""
    qweight, qzeros = unsigned(tensors["qweight"]), unsigned(tensors["qzeros"])
    scales, g_idx = tensors["scales"].double().numpy(), tensors["g_idx"].tolist()
    rows, columns = qweight.shape[1], len(g_idx)
    result = np.zeros((rows, columns))
    for n in range(rows):
        for k in range(columns):
            group = g_idx[k]
            zero = field(qzeros[group].tolist(), bits, n) + (1 if v1 else 0)
            result[n, k] = scales[group, n] * (field(qweight[:, n].tolist(), bits, k) - zero)
    return result


def slow_awq(tensors: dict[str, torch.Tensor], size: int) -> Array:
    """Output 8 j + i lies in the nibble of word j that the order 0 2 4 6 1 3 5 7 gives it."""
    nibble = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    qweight, qzeros = unsigned(tensors["qweight"]), unsigned(tensors["qzeros"])
    scales = tensors["scales"].double().numpy()
    columns, rows = qweight.shape[0], scales.shape[1]
    result = np.zeros((rows, columns))
    for n in range(rows):
        shift = 4 * nibble[n % 8]
        for k in range(columns):
            code, zero = (int(w[n // 8]) >> shift & 15 for w in (qweight[k], qzeros[k // size]))
            result[n, k] = scales[k // size, n] * (code - zero)
    return result


def slow_pack_quantized(tensors: dict[str, torch.Tensor], bits: int, size: int) -> Array:
    """Signed code q = u - 2^(b-1) in rows of whole words, signed zeros likewise down the columns; W = (q - z) * s."""
    words = unsigned(tensors["weight_packed"])
    scales = tensors["weight_scale"].double().numpy()
    rows, columns = tensors["weight_shape"].tolist()
    assert words.shape == (rows, -(-columns * bits // 32))
    result = np.zeros((rows, columns))
    for n in range(rows):
        for k in range(columns):
            zero = 0
            if "weight_zero_point" in tensors:
                column = unsigned(tensors["weight_zero_point"])[:, k // size].tolist()
                zero = field(column, bits, n) - (1 << bits - 1)
            code = field(words[n].tolist(), bits, k) - (1 << bits - 1)
            result[n, k] = (code - zero) * scales[n, k // size]
    return result


def decode(name: str, scheme: Any, tensors: dict[str, torch.Tensor]) -> Array:
    if name == "gptq":
        return slow_gptq(tensors, scheme.bits, v1=not scheme.zero)
    return slow_awq(tensors, scheme.group_size) if name == "awq" else slow_pack_quantized(tensors, scheme.bits, scheme.group_size)


# ------------------------------------------------------------------------------------------------ weights


def uniform(bits: int, zero: bool = False, group: bool = False, bipolar: bool = False, rows: int = 32, seed: int = 0) -> Uniform:
    """A random part of 64 columns in groups of 16, with scales that float16 and bfloat16 hold."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 64), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 256, (rows, 4), generator=generator).float().mul(2.0**-12).bfloat16()
    scale *= torch.where(torch.rand(rows, 4, generator=generator) < 0.2, -1.0, 1.0)
    zeros = torch.randint(0, 1 << bits, (rows, 4), generator=generator, dtype=torch.uint8) if zero else None
    order = (torch.randperm(64, generator=generator) // 16).to(torch.uint8) if group else None
    return Uniform(codes, scale, bits, 16, zeros, order, bipolar=bipolar)


def table(datatype: str) -> Table:
    generator = torch.Generator().manual_seed(3)
    count = len(DATATYPES[datatype][0])
    codes = torch.randint(0, count, (32, 64), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 256, (32, 2), generator=generator).float().mul(2.0**-12).bfloat16()
    choice = torch.randint(0, len(DATATYPES[datatype]), (32, 2), generator=generator, dtype=torch.uint8)
    return Table(codes, scale, datatype, 32, select=choice if select_bits(datatype) else None)


def written(name: str, part: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    weight = CompressedWeight(part)
    spec, form = packing.pack(weight)[1], FORMS[name]
    scheme = form.scheme(spec, form.scales[0] if form.scales else None)
    tensors = form.tensors(scheme, weight)
    layout = {leaf: (tensor.dtype, tuple(tensor.shape)) for leaf, tensor in tensors.items()}
    assert layout == form.layout(scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return scheme, tensors


KEPT = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": (2, 3, 4, 5, 6, 7, 8)}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name in FORMS for bits in range(1, 9) if bits < 5 or name != "awq"])
def test_a_slow_reader_gets_the_values(name: str, bits: int, zero: bool) -> None:
    part = uniform(bits, zero)
    scheme, tensors = written(name, part)
    assert np.array_equal(decode(name, scheme, tensors), part.dequantize().double().numpy())
    if bits in KEPT[name]:
        back = FORMS[name].read(scheme, tensors, {"checkpoint_format": "gptq_v2" if zero else "gptq"}).base
        assert torch.equal(back.codes, part.codes)
        assert torch.equal(back.scale.float(), part.scale.float())
        assert (back.zero is None and not zero) or torch.equal(back.zero, part.zero)
        assert (back.bits, back.group_size) == (part.bits, part.group_size)
    else:
        assert scheme.bits == min(width for width in KEPT[name] if width > bits)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bits", [2, 3])
def test_bipolar_grids_are_codes_of_one_bit_more(name: str, bits: int) -> None:
    part = uniform(bits, bipolar=True)
    scheme, tensors = written(name, part)
    assert scheme.bits == (4 if name == "awq" else bits + 1)
    assert np.array_equal(decode(name, scheme, tensors), part.dequantize().double().numpy())


@pytest.mark.parametrize("datatype", ["fp3", "fp4", "bitmod-fp3", "bitmod-fp4"])
@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_tables_of_multiples_are_codes(name: str, datatype: str) -> None:
    part = table(datatype)
    scheme, tensors = written(name, part)
    assert np.array_equal(decode(name, scheme, tensors), part.dequantize().double().numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_act_order_of_gptq(bits: int, zero: bool) -> None:
    part = uniform(bits, zero, group=True)
    scheme, tensors = written("gptq", part)
    assert scheme.scattered
    assert np.array_equal(decode("gptq", scheme, tensors), part.dequantize().double().numpy())
    back = GPTQ.read(scheme, tensors, {"checkpoint_format": "gptq_v2" if zero else "gptq"}).base
    assert torch.equal(back.group, part.group)
    assert back.group.dtype == part.group.dtype


def test_golden_words_of_all_layouts() -> None:
    """N = K = g = 8, 4 bits, u[n, k] = (3 n + k) mod 16, zeros 8 but for row 3, which has 5."""
    n, k = torch.arange(8).unsqueeze(1), torch.arange(8)
    codes = ((3 * n + k) % 16).to(torch.uint8)
    zero = torch.full((8, 1), 8, dtype=torch.uint8)
    zero[3] = 5
    weight = CompressedWeight(Uniform(codes, torch.ones(8, 1).half(), 4, 8, zero))
    scheme = _grid.Scheme((8, 8), 4, 8, True, scale="F16")

    def words(tensor: torch.Tensor) -> str:
        return " ".join(f"{int(value):08X}" for value in unsigned(tensor).flatten())

    rows = "76543210 A9876543 DCBA9876 0FEDCBA9 3210FEDC 6543210F 98765432 CBA98765"
    found = CT.tensors(scheme, weight)
    assert (words(found["weight_packed"]), words(found["weight_zero_point"])) == (rows, "88885888")
    found = GPTQ.tensors(scheme, weight)
    assert (words(found["qweight"]), words(found["qzeros"])) == (rows, "88885888")
    assert tuple(found["qweight"].shape) == (1, 8)
    found = AWQ.tensors(scheme, weight)
    assert words(found["qweight"]) == "5F932C60 60A43D71 71B54E82 82C65F93 93D760A4 A4E871B5 B5F982C6 C60A93D7"
    assert words(found["qzeros"]) == "88588888"


def test_zeros_of_symmetric_gptq_are_those_that_everything_reads() -> None:
    scheme, tensors = written("gptq", uniform(4))
    assert {f"{int(v):08X}" for v in unsigned(tensors["qzeros"]).flatten()} == {"77777777"}
    assert not scheme.zero


def test_gptq_zeros_are_read_field_by_field() -> None:
    """v1 stores z - 1 modulo 16: zeros 0 1 7 15 8 8 8 8 are the fields 15 0 6 14 7 7 7 7; a borrow would corrupt neighbours."""
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    zero = torch.tensor([[0], [1], [7], [15], [8], [8], [8], [8]], dtype=torch.uint8)
    scheme = _grid.Scheme((8, 8), 4, 8, True, scale="F16")
    tensors = GPTQ.tensors(scheme, CompressedWeight(Uniform(codes, torch.ones(8, 1).half(), 4, 8, zero)))
    assert f"{int(unsigned(tensors['qzeros'])[0, 0]):08X}" == "8888F710"
    first = tensors | {"qzeros": torch.tensor([[0x7777E60F]], dtype=torch.int32)}
    for config, stored in (({"checkpoint_format": "gptq_v2"}, tensors), ({"checkpoint_format": "gptq"}, first), ({}, first)):
        part = GPTQ.read(scheme, stored, config).base
        assert torch.equal(part.zero, zero)


@law
@given(bits=st.integers(2, 8), rows=st.integers(1, 40), columns=st.integers(1, 80), zero=st.booleans(), seed=st.integers(0, 99))
def test_pack_quantized_takes_any_shape(bits: int, rows: int, columns: int, zero: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (rows, 1), generator=generator, dtype=torch.uint8) if zero else None
    part = Uniform(codes, torch.ones(rows, 1), bits, columns, zeros)
    scheme, tensors = written("compressed-tensors", part)
    assert np.array_equal(decode("compressed-tensors", scheme, tensors), part.dequantize().double().numpy())
    back = CT.read(scheme, tensors, {}).base
    assert torch.equal(back.codes, codes)
    assert zeros is None or torch.equal(back.zero, zeros)


# ------------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("awq", uniform(5), r"has codes that need 5 bits"),
        ("awq", uniform(4, group=True), r"act-order"),
        ("compressed-tensors", uniform(4, group=True), r"act-order"),
        ("compressed-tensors", uniform(8, bipolar=True), r"has codes that need 9 bits"),
        ("awq", uniform(4, bipolar=True), r"has codes that need 5 bits"),
        ("gptq", uniform(4, rows=33), r"has out=33, which is no multiple of 32"),
        ("awq", uniform(4, rows=33), r"has shape 33 x 64"),
        ("gptq", table("nf4"), r"is nf4, whose values are on no grid"),
        ("awq", table("bitmod-fp4"), r"need 6 bits"),
    ],
)
def test_what_a_layout_cannot_hold(name: str, part: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        written(name, part)


def test_scales_that_do_not_fit_are_refused_and_never_rounded() -> None:
    part = uniform(4)
    part.scale[3, 1] = 2.0**-30
    with pytest.raises(FormatError, match=r"1 of 128 scales that F16 cannot hold, such as 9.31322575e-10"):
        written("gptq", part)
    spec = packing.pack(CompressedWeight(part))[1]
    scheme = GPTQ.scheme(spec, "BF16")
    assert GPTQ.tensors(scheme, CompressedWeight(part))["scales"].dtype == torch.bfloat16


@pytest.mark.parametrize("offset", [True, False])
def test_offsets_and_outliers_have_no_place(offset: bool) -> None:
    spec: dict[str, Any] = packing.pack(CompressedWeight(uniform(4)))[1]
    if offset:
        spec["base"]["offset"] = True
    else:
        spec["outliers"] = {"format": "sparse", "nnz": 0}
    for form in FORMS.values():
        with pytest.raises(FormatError, match="offsets that are no codes" if offset else "has outliers beside the grid"):
            form.scheme(spec, "F16")


@pytest.mark.parametrize("change", [lambda t: t.to(torch.int64), lambda t: t[:-1]])
@pytest.mark.parametrize("name", FORMS)
def test_tensors_that_do_not_fit_their_scheme(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    scheme, tensors = written(name, uniform(4))
    first = next(iter(tensors))
    with pytest.raises(FormatError, match=f"{first} is"):
        FORMS[name].read(scheme, tensors | {first: change(tensors[first])}, {})


def test_a_config_that_says_symmetric_of_zeros_that_are_not() -> None:
    scheme, tensors = written("gptq", uniform(4, zero=True))
    wrong = _grid.Scheme(scheme.shape, 4, 16, False, scale="F16")
    with pytest.raises(FormatError, match="sym is true, but zero points"):
        GPTQ.read(wrong, tensors, {"checkpoint_format": "gptq_v2"})
    scheme, tensors = written("awq", uniform(4, zero=True))
    with pytest.raises(FormatError, match="zero points are not 8"):
        AWQ.read(wrong, tensors, {})


def test_g_idx_outside_the_groups() -> None:
    scheme, tensors = written("gptq", uniform(4, group=True))
    with pytest.raises(FormatError, match=r"outside 0\.\.3"):
        GPTQ.read(scheme, tensors | {"g_idx": tensors["g_idx"] + 1}, {"checkpoint_format": "gptq"})


# ------------------------------------------------------------------------------------------------ configs


def test_patterns_match_their_names_and_no_other() -> None:
    names = [f"model.layers.{n}.mlp.up_proj" for n in (0, 1, 2, 11)] + ["lm_head"]
    patterns = [_names.pattern(folded) for folded in _names.fold(names)]
    others = ["model.layers.3.mlp.up_proj", "model.layers.1.mlp.up_proj.x", "xlm_head", "modelXlayers.0.mlp.up_proj"]
    assert len(patterns) == 2
    assert all(any(re.match(p, name) for p in patterns) for name in names)
    assert not any(re.match(p, name) for p in patterns for name in others)


def test_config_of_several_widths() -> None:
    wide, narrow = _grid.Scheme((32, 64), 8, 64, False), _grid.Scheme((32, 64), 4, 16, False)
    schemes = {"a.0.q": wide, "a.0.k": narrow, "a.1.k": narrow}
    config = GPTQ.config(schemes, ["gate"], "lm_head")
    assert (config["bits"], config["group_size"], config["sym"], config["checkpoint_format"]) == (4, 16, True, "gptq")
    override = {"bits": 8, "group_size": -1, "sym": True, "desc_act": False}
    assert config["dynamic"] == {"-:^gate$": {}, r"+:^a\.0\.q$": override}
    groups = CT.config(schemes, ["gate", "lm_head"], "lm_head")
    assert groups["ignore"] == ["lm_head", "re:^gate$"]
    assert [g["targets"] for g in groups["config_groups"].values()] == [[r"re:^a\.0\.q$"], [r"re:^a\.(0|1)\.k$"]]
    assert [g["weights"]["strategy"] for g in groups["config_groups"].values()] == ["channel", "group"]
    with pytest.raises(FormatError, match="group sizes are 16, 64"):
        AWQ.config({"a": _grid.Scheme((32, 64), 4, 64, True), "b": narrow}, [], "lm_head")
    with pytest.raises(FormatError, match=r"a: has no zero points, and b has"):
        GPTQ.config({"a": narrow, "b": _grid.Scheme((32, 64), 4, 16, True)}, [], "lm_head")
