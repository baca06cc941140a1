"""CompressedLinear with its codes laid out for kernels: as on a GPU after the first product, here on the CPU."""

from __future__ import annotations

import copy

import host_cuda
import pytest
import torch
from examples.low_rank import low_rank
from examples.mixed import mixed as mixed_part
from examples.sparse import sparse
from kernel_parts import Part, kinds
from masks import pruned
from torch import Tensor, nn

from compress.errors import KernelError
from compress.kernels import _activations, _cuda, int8, masked, mixed, sparse_rows, weight_only
from compress.kernels.kernel import Laid, Use, choose_kernel
from compress.runtime.linear import CompressedLinear, round_activations
from compress.weights.mixed import Mixed
from compress.weights.weight import CompressedWeight

PARTS: dict[str, Part | Mixed] = {
    name: part for name, part in kinds().items() if name in ("4 bits", "3 bits, zeros", "4 bits, scattered", "nf4")
}


PARTS["mixed"] = mixed_part(48, [1, 3, 4, 3], 48, zero=True)
PARTS["mixed, scattered"] = mixed_part(48, [8, 2, 4, 2, 2, 2], 32, zero=False, scattered=True)


PRUNED = {
    f"{base}, {mask}": (base, mask)
    for mask in ("2:4", "ragged", "balanced", "runs", "1:4", "none")
    for base in ("bf16", "f16", "4-bit", "3-bit zeros", "2-bit offsets", "5-bit scattered", "8-bit row")
}


def linear_of(part: Part | Mixed, outliers: bool = True, rank: bool = False) -> CompressedLinear:
    extra = sparse(*part.shape, 0.05) if outliers else None
    bias = nn.Parameter(torch.randn(part.shape[0]).to(torch.bfloat16), requires_grad=False)
    thin = low_rank(*part.shape, 3, torch.bfloat16) if rank else None
    return CompressedLinear.of(CompressedWeight(part, extra, low_rank=thin), bias)


def lay_out(linear: CompressedLinear) -> Laid:
    """Lay the weight out as the first product on a GPU does, here on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "obstacle", lambda where: None)
        laid = linear.lay_out(gpu_use(linear))
    assert linear._laid is laid
    return laid


def gpu_use(linear: CompressedLinear) -> Use:
    values = linear.get_buffer("values").dtype if "values" in linear.leaves else torch.bfloat16
    return Use(torch.device("cuda", 0), values, 1, linear.activation_bits)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", PARTS)
def test_packed_tensors_are_there_for_who_asks(name: str) -> None:
    linear = linear_of(PARTS[name])
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    whole = linear.compressed().dequantize()
    lay_out(linear)
    assert all(linear.get_buffer(leaf).numel() == 0 for leaf in linear.leaves if leaf.startswith("codes"))  # in memory once
    same(dict(linear.state_dict()), before)
    same(linear.tensors, {leaf: before[leaf] for leaf in linear.leaves})
    assert torch.equal(linear.compressed().dequantize(), whole)
    lay_out(linear)
    for moved in (copy.deepcopy(linear), copy.deepcopy(linear).to(torch.float16), copy.deepcopy(linear).to("cpu")):
        assert torch.equal(moved.compressed().dequantize(), whole)
        same({leaf: moved.state_dict()[leaf] for leaf in linear.leaves}, {leaf: before[leaf] for leaf in linear.leaves})
    linear.restore()
    same(dict(linear.named_buffers()), {leaf: before[leaf] for leaf in linear.leaves} | {"weight": linear.get_buffer("weight")})


def test_loading_takes_the_place_of_what_was_laid_out() -> None:
    one, other = linear_of(PARTS["3 bits, zeros"], False), linear_of(kinds(48, 192)["3 bits, zeros"], False)
    lay_out(other)
    other.load_state_dict({**one.state_dict(), "scale": 2 * one.get_buffer("scale")})
    torch.testing.assert_close(other.compressed().dequantize(), 2 * one.compressed().dequantize())
    x = torch.randn(3, 192)
    torch.testing.assert_close(
        other.product(x, lay_out(other)), x @ other.compressed().dequantize().T + other.bias, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("name", PRUNED)
def test_packed_tensors_of_pruned_weights(name: str) -> None:
    base, mask = PRUNED[name]
    linear = CompressedLinear.of(pruned(base, mask, 70, more=base == "4-bit"))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    whole = linear.compressed().dequantize()
    lay_out(linear)
    gone = [leaf for leaf in linear.leaves if linear.get_buffer(leaf).numel() == 0]
    assert {"values" if base in ("bf16", "f16") else "codes", "keep_choice" if ":" in mask else "keep_bits"} <= set(gone)
    same(dict(linear.state_dict()), before)
    assert torch.equal(linear.compressed().dequantize(), whole)
    moved = copy.deepcopy(linear).to(torch.float16)
    same({leaf: moved.state_dict()[leaf] for leaf in linear.leaves}, {leaf: before[leaf] for leaf in linear.leaves})
    linear.restore()
    assert linear._laid is None
    same(linear.tensors, before)


@pytest.mark.parametrize("name", ["bf16, 2:4", "4-bit, ragged", "3-bit zeros, balanced"])
@pytest.mark.parametrize("more", [False, True])
def test_products_of_pruned_weights(name: str, more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base under its mask, single weights, the low-rank part and the bias are added and rounded once."""
    weight = pruned(*PRUNED[name], 40, more=more)
    bias = nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16), requires_grad=False)
    linear = CompressedLinear.of(weight, bias)
    host = host_cuda.Host().install(monkeypatch)
    monkeypatch.setattr(masked, "product", masked.matmul_packets)
    laid = lay_out(linear)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    y = linear.product(x, laid)
    assert len(host.launched) == 1
    whole = x.double() @ weight.dequantize().double().T + bias.double()
    assert y.shape == (2, 3, 40)
    assert float((y.double() - whole).norm() / whole.norm()) < 3e-3


def test_values_are_multiplied_by_their_own_type_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding values to the type of x is left to the reference."""
    linear = CompressedLinear.of(pruned("bf16", "2:4", 40))
    monkeypatch.setattr(_cuda, "obstacle", lambda where: None)
    half = Use(torch.device("cuda", 0), torch.float16, 1)
    assert choose_kernel(linear.spec, half._replace(dtype=torch.bfloat16)).kernel.name == "masked"
    choice = choose_kernel(linear.spec, half)
    assert choice.kernel.name == "torch_reference"
    assert "torch.bfloat16" in choice.refused["masked"]
    assert not lay_out(linear).takes(half)
    assert choose_kernel(CompressedLinear.of(pruned("4-bit", "2:4", 40)).spec, half).kernel.name == "masked"
    assert round_activations(linear, 8) == 0  # and pruned weights keep activations of 16 bits


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("outliers", [False, True])
def test_products(name: str, outliers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' kernels run on the CPU; base, single weights and bias are rounded once, together."""
    linear = linear_of(PARTS[name], outliers, rank=not outliers)
    expected = linear.compressed().dequantize().double()
    host = host_cuda.Host().install(monkeypatch)

    def on_host(x: Tensor, tiles: weight_only.Tiles, addend: Tensor | None, bias: Tensor | None) -> Tensor:
        return weight_only.matmul_tiles(x, tiles, addend, bias)

    def sparse_on_host(x: Tensor, *pieces: Tensor) -> Tensor:
        return sparse_rows.product_kernel(x.reshape(-1, x.shape[-1]), sparse_rows.Sparse(*pieces, x.shape[-1]))

    monkeypatch.setattr(weight_only, "product", on_host)
    monkeypatch.setattr(mixed, "product", mixed.matmul_tiles)
    monkeypatch.setattr(sparse_rows, "product", sparse_on_host)
    x = torch.randn(2, 3, 192, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    whole = x.double() @ expected.T + linear.bias.double()
    laid = lay_out(linear)
    y = linear.product(x, laid)
    assert y.shape == (2, 3, 48)
    assert len(host.launched) == len(laid.replaces) + outliers
    assert float((y.double() - whole).norm() / whole.norm()) < 3e-3
    linear.bias = nn.Parameter(linear.bias.float(), requires_grad=False)  # of another type: added afterwards
    assert float((linear.product(x, laid).double() - whole).norm() / whole.norm()) < 3e-3


def test_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = linear_of(PARTS["4 bits"])
    choice = linear.explain(torch.ones(1, 192))
    assert choice.kernel.name == "torch_reference"
    assert "cpu" in choice.refused["weight_only"]
    use = gpu_use(linear)
    assert "CUDA" in choose_kernel(linear.spec, use).refused["weight_only"]  # there is none here
    monkeypatch.setattr(_cuda, "obstacle", lambda where: None)
    assert choose_kernel(linear.spec, use).kernel.name == "weight_only"
    linear.spec = {**linear.spec, "unheard_of": {"format": "unheard_of"}}
    choice = choose_kernel(linear.spec, use)
    assert choice.kernel.name == "torch_reference"
    assert "unheard_of" in choice.refused["weight_only"]
    assert not int8.rounds(linear.spec)


def test_each_kind_of_weight_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "obstacle", lambda where: None)
    for name, part in PARTS.items():
        linear = linear_of(part)
        assert choose_kernel(linear.spec, gpu_use(linear)).kernel.name == ("mixed" if "mixed" in name else "weight_only")
        rounded = choose_kernel(linear.spec, gpu_use(linear)._replace(activation_bits=8)).kernel.name
        assert rounded == ("int8" if int8.rounds(linear.spec) else "torch_reference")
        for other in ({"dtype": torch.float32}, {"gradient": True}):
            assert choose_kernel(linear.spec, gpu_use(linear)._replace(**other)).kernel.name == "torch_reference"
    for base, mask in PRUNED.values():
        linear = CompressedLinear.of(pruned(base, mask, 70))
        assert choose_kernel(linear.spec, gpu_use(linear)).kernel.name == "masked"


def test_float32_and_gradients_go_to_the_reference() -> None:
    linear = linear_of(PARTS["4 bits"])
    assert linear.path(torch.ones(1, 192)) == "torch_reference"
    assert linear.path(torch.ones(1, 192, dtype=torch.float16)) == "torch_reference"
    lay_out(linear)
    x = torch.randn(2, 192)
    torch.testing.assert_close(linear(x), x @ linear.compressed().dequantize().T + linear.bias, rtol=1e-5, atol=1e-4)


def test_activations_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel as by the reference: x is rounded per token, and the rest is exact up to the result's rounding."""
    model = nn.ModuleList(linear_of(part) for part in PARTS.values())
    others = ("nf4", "mixed", "mixed, scattered")
    assert round_activations(model, 8) == len(PARTS) - len(others)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    for name, linear in zip(PARTS, model, strict=True):
        assert isinstance(linear, CompressedLinear)
        seen = _activations.rounded(x.float()).double() if name not in others else x.double()
        whole = linear.compressed().dequantize().double()
        expected = seen @ whole.T + linear.bias.double()
        by_reference = linear(x.float()).double()
        assert float((by_reference - expected).norm() / expected.norm()) < 1e-5
        if name in others:
            continue
        host_cuda.Host().install(monkeypatch)
        monkeypatch.setattr(int8, "product", int8.matmul_tiles)
        laid = lay_out(linear)
        assert laid.weight.field == 8  # type: ignore[attr-defined]
        y = linear.product(x, laid).double()
        outliers = (x.double() - seen) @ sparse(48, 192, 0.05).dequantize().double().T  # see x as it is
        assert float((y - expected - outliers).norm() / expected.norm()) < 3e-3
        assert torch.equal(linear.compressed().dequantize().double(), whole)
    round_activations(model, 16)
    assert not any(linear._laid for linear in model)  # type: ignore[union-attr]
    with pytest.raises(KernelError, match="4 bits"):
        round_activations(model, 4)
