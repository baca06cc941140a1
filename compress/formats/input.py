"""`input`: a `SiteInput` part as bytes, the transform and rounding of a site's input before the product.

factors  BF16, F16 or F32 (in,)     of a diagonal transform
signs    I32 (words,)               of a Hadamard transform: one bit per column, 1 for -1; a dense stream
left     BF16, F16 or F32 (a, a)    of a Kronecker product
right    the same type, (b, b)
scale    F32 (1,) or (groups,)      static scales of rounding
zero     U8, the same shape         their zero codes, on asymmetric grids

A description has `transform`, with `kind`, or `activation`, with `datatype`, `per`, `symmetric` and `static`, or both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights import bit_stream as _bits
from compress.weights.activation import Activation, activation_problem
from compress.weights.dense import DENSE_DTYPES
from compress.weights.input_transform import Diagonal, Hadamard, InputTransform, Kronecker, hadamard_problem
from compress.weights.site_input import SiteInput

_NAMES = {dtype: name for name, dtype in DENSE_DTYPES.items()}
_KEYS = ("format", "transform", "activation")
_TRANSFORM_KEYS = {"diagonal": ("kind", "dtype"), "hadamard": ("kind", "block"), "kronecker": ("kind", "dtype", "left", "right")}
_ACTIVATION_KEYS = ("datatype", "per", "group_size", "symmetric", "static")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _described_transform(transform: InputTransform) -> dict[str, Any]:
    if isinstance(transform, Hadamard):
        return {"kind": "hadamard", "block": transform.block}
    if isinstance(transform, Diagonal):
        return {"kind": "diagonal", "dtype": _NAMES[transform.factors.dtype]}
    assert isinstance(transform, Kronecker)
    left, right = transform.left.shape[0], transform.right.shape[0]
    return {"kind": "kronecker", "dtype": _NAMES[transform.left.dtype], "left": left, "right": right}


def _described_activation(activation: Activation) -> dict[str, Any]:
    described = {"datatype": activation.datatype, "per": activation.per, "symmetric": activation.symmetric}
    if activation.group_size is not None:
        described["group_size"] = activation.group_size
    return {**described, "static": activation.scale is not None}


def _check_keys(what: str, described: Any, known: tuple[str, ...]) -> None:
    """Raise FormatError if a description is not an object or has an unknown key."""
    if not isinstance(described, dict):
        raise FormatError(f"input: {what} is {described!r:.80}; expected an object. The config is damaged")
    if unknown := sorted(described.keys() - known):
        raise FormatError(f"input: {unknown[0]!r:.80} is not known; expected {', '.join(known)}. Written by a newer compress?")


def _transform_layout(described: Any, columns: int) -> Layout:
    """Return dtype and shape of the tensors of a described transform. Raises FormatError."""
    kind = described.get("kind") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in _TRANSFORM_KEYS:
        raise FormatError(
            f"input: transform has the kind {kind!r:.80}; known are {', '.join(_TRANSFORM_KEYS)}. Written by a newer compress?"
        )
    _check_keys("transform", described, _TRANSFORM_KEYS[kind])
    if kind == "hadamard":
        if (problem := hadamard_problem(described.get("block"), columns)) is not None:
            raise FormatError(f"input: {problem}")
        return {"signs": (torch.int32, (_bits.words(columns, 1),))}
    name = described.get("dtype")
    if not isinstance(name, str) or name not in DENSE_DTYPES:
        raise FormatError(f"input: dtype is {name!r:.80}; expected one of {', '.join(DENSE_DTYPES)}")
    dtype = DENSE_DTYPES[name]
    if kind == "diagonal":
        return {"factors": (dtype, (columns,))}
    sizes = [described.get(key) for key in ("left", "right")]
    left, right = (size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 0 for size in sizes)
    if left * right != columns:
        raise FormatError(f"input: left and right are {sizes!r:.80}; expected sizes of matrices whose product is in={columns}")
    return {"left": (dtype, (left, left)), "right": (dtype, (right, right))}


def _activation_layout(described: Any, columns: int) -> Layout:
    """Return dtype and shape of the tensors of a described rounding. Raises FormatError."""
    _check_keys("activation", described, _ACTIVATION_KEYS)
    if described.get("group_size", 1) is None:
        raise FormatError("input: group_size is None; expected a number, or no group_size")
    datatype, per, size, symmetric, static = (described.get(key) for key in _ACTIVATION_KEYS)
    if (problem := activation_problem(datatype, per, size, symmetric, static, columns)) is not None:
        raise FormatError(f"input: {problem}")
    if not static:
        return {}
    shape = (columns // (size or columns),)
    scale: Layout = {"scale": (torch.float32, shape)}
    return scale if symmetric else scale | {"zero": (torch.uint8, shape)}


class Input:
    """The bijection between a SiteInput part and named tensors."""

    name = "input"
    part = SiteInput
    roles = ("input",)

    def describe(self, part: SiteInput) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        described: dict[str, Any] = {"format": self.name}
        if part.transform is not None:
            described["transform"] = _described_transform(part.transform)
        if part.activation is not None:
            described["activation"] = _described_activation(part.activation)
        return described

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        words = []
        if (transform := described.get("transform")) is not None:
            size = {"hadamard": " {block}", "kronecker": " {left}x{right}"}.get(transform["kind"], "")
            words.append(transform["kind"] + size.format(**transform))
        if (activation := described.get("activation")) is not None:
            per = f"g{activation['group_size']}" if "group_size" in activation else f"per {activation['per']}"
            words.append(f"{activation['datatype']} inputs {per}" + (" static" if activation["static"] else ""))
        return ", ".join(words)

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        _check_keys("the part", described, _KEYS)
        if not described.keys() & {"transform", "activation"}:
            raise FormatError("input: neither transform nor activation is there; expected one of them. The config is damaged")
        layout = _transform_layout(described["transform"], shape[1]) if "transform" in described else {}
        return layout | (_activation_layout(described["activation"], shape[1]) if "activation" in described else {})

    def pack(self, part: SiteInput) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        tensors: dict[str, Tensor] = {}
        if isinstance(part.transform, Hadamard):
            tensors["signs"] = _bits.pack(part.transform.negative.to(torch.uint8), 1)
        elif isinstance(part.transform, Diagonal):
            tensors["factors"] = part.transform.factors.contiguous()
        elif isinstance(part.transform, Kronecker):
            tensors |= {"left": part.transform.left.contiguous(), "right": part.transform.right.contiguous()}
        for name in ("scale", "zero"):
            if (tensor := getattr(part.activation, name, None)) is not None:
                tensors[name] = tensor.contiguous()
        return tensors

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        scale = tensors.get("scale")
        if scale is not None and not bool(((scale > 0) & scale.isfinite()).all()):
            raise FormatError("input: scale is not above 0 everywhere; the file is damaged, fetch it again")

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> SiteInput:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        layout = self.layout(described, shape)
        self.check(described, shape, tensors)
        columns = shape[1]
        transform: InputTransform | None = None
        if "transform" in described:
            kind = described["transform"]["kind"]
            if kind == "hadamard":
                transform = Hadamard(_bits.unpack(tensors["signs"], 1, columns).bool(), described["transform"]["block"])
            elif kind == "diagonal":
                transform = Diagonal(tensors["factors"])
            else:
                transform = Kronecker(tensors["left"], tensors["right"])
        activation = None
        if (rounding := described.get("activation")) is not None:
            scale, zero = (tensors[name] if name in layout else None for name in ("scale", "zero"))
            settings = rounding["datatype"], rounding["per"], rounding.get("group_size"), rounding["symmetric"]
            activation = Activation(columns, *settings, scale, zero)
        return SiteInput(columns, transform, activation)

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop of a weight: the same for all rows."""
        return described, tensors


FORMAT = Input()
