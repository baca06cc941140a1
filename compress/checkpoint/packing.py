"""A compressed weight as named tensors and a JSON description, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compress import registry
from compress.checkpoint.source import check_finite
from compress.checkpoint.tensor_file import bytes_of
from compress.errors import FormatError, RecipeError
from compress.weights.site_input import SiteInput
from compress.weights.weight import ROLES, CompressedWeight

METHOD = "compress"
FORMAT_VERSION = 1
Spec = dict[str, Any]
_MAX_AXIS = 2**31 - 1


def _prefix(role: str) -> str:
    return "" if role == "base" else f"{role}_"


def _format_of(part: Any) -> Any:
    for name in registry.names("formats"):
        form = registry.lookup("formats", name)
        if isinstance(part, form.part):
            return form
    raise FormatError(f"{type(part).__name__}: no format stores such a part; known are {', '.join(registry.names('formats'))}")


def pack(weight: CompressedWeight) -> tuple[dict[str, Tensor], Spec]:
    """Return a compressed weight's tensors, by name within the site, and the description needed to read them."""
    tensors: dict[str, Tensor] = {}
    spec: Spec = {"shape": list(weight.shape)}
    for role, part in weight.parts.items():
        form = _format_of(part)
        under = (weight.keep.mask(),) if role == "base" and weight.keep is not None else ()
        spec[role] = form.describe(part, *under)
        tensors |= {_prefix(role) + name: tensor for name, tensor in form.pack(part, *under).items()}
    return tensors, spec


def digest(weight: CompressedWeight) -> str:
    """SHA-256 of a weight's values before packing, to compare with those decoded from the file: float32, row by row."""
    result = hashlib.sha256(bytes_of(weight.exact().cpu()))
    for factor in weight.low_rank.factors() if weight.low_rank is not None else ():
        result.update(bytes_of(factor.cpu().contiguous()))
    if weight.input is not None:
        described = _format_of(weight.input).describe(weight.input)
        result.update(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
        for values in weight.input.values():
            result.update(bytes_of(values.cpu().contiguous()))
    return result.hexdigest()


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _shape(spec: Spec) -> tuple[int, int]:
    shape = spec.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_whole(n, 1, _MAX_AXIS) for n in shape):
        raise FormatError(f"quantization_config: shape is {shape!r:.80}; expected [out, in]")
    return shape[0], shape[1]


def _parts(spec: Spec) -> dict[str, Spec]:
    parts = {role: spec[role] for role in ROLES if role in spec}
    if "base" not in parts or spec.keys() - {"shape", *ROLES} or not all(isinstance(part, dict) for part in parts.values()):
        raise FormatError(
            f"quantization_config: a site has the parts {sorted(spec.keys() - {'shape'})!s:.80}; expected base, and of others "
            f"only {', '.join(ROLES[1:])}. Written by a newer compress?"
        )
    if "keep" in parts and not getattr(_format("base", parts["base"]), "masked", False):
        name = parts["base"].get("format")
        raise FormatError(
            f"quantization_config: a base of the format {name!r:.80} is there with a mask, and it is stored whole. Written by "
            "a newer compress?"
        )
    return parts


def _format(role: str, described: Spec) -> Any:
    name = described.get("format")
    try:
        form = registry.lookup("formats", name if isinstance(name, str) else "")
        if role not in form.roles:
            raise FormatError(f"quantization_config: {role} has the format {name}, which is for {', '.join(form.roles)}")
        return form
    except RecipeError:
        known = ", ".join(registry.names("formats"))
        raise FormatError(
            f"quantization_config: format is {name!r:.80}; known are {known}. Written by a newer compress?"
        ) from None


def base_type(spec: Mapping[str, Any]) -> type | None:
    """Return the class of the base in a description, or None if no format has its name."""
    name = spec["base"]["format"]
    return registry.lookup("formats", name).part if name in registry.names("formats") else None


def short(spec: Spec) -> str:
    """Return a short description of how a site is stored, for tables. Raises FormatError."""
    return " + ".join(str(_format(role, described).short(described)) for role, described in _parts(spec).items())


def layout(spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a site, by name within the site. Raises FormatError."""
    result: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for role in _parts(spec):
        result |= _layout_of(spec, role)
    return result


def _layout_of(spec: Spec, role: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the same of one part, which is there. Raises FormatError."""
    described = spec[role]
    found = _format(role, described).layout(described, _shape(spec))
    return {_prefix(role) + name: value for name, value in found.items()}


def check(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], site: str) -> None:
    """Raise FormatError where packed tensors of a site do not fit their description, name what is not there, or are not finite.

    What it costs grows with scales, masks and single weights, not with codes.
    """
    described = dict(spec)
    for role, part in _parts(described).items():
        mine = _tensors_of(role, tensors)
        try:
            _format(role, part).check(part, _shape(described), mine)
        except FormatError as error:
            raise FormatError(f"{site}: {role}: {error.message}") from error
        for leaf, tensor in mine.items():
            if tensor.is_floating_point():
                check_finite(tensor, f"{site}.{_prefix(role)}{leaf}")


def unpack(spec: Spec, tensors: Mapping[str, Tensor]) -> CompressedWeight:
    """Return the compressed weight that was packed, equal bit for bit. Raises FormatError."""
    parts: dict[str, Any] = {}
    for role, form, described, under in _in_turn(spec, parts):
        parts[role] = form.unpack(described, _shape(spec), _tensors_of(role, tensors), *under)
    return CompressedWeight(**parts)


def site_input(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SiteInput | None:
    """Return the transform and rounding of a packed site's input before the product, or None if it has neither."""
    if "input" not in spec:
        return None
    described = dict(spec)
    part: SiteInput = _format("input", described["input"]).unpack(
        described["input"], _shape(described), _tensors_of("input", tensors)
    )
    return part


def rounded_input(spec: Spec, read: Callable[[str], Tensor]) -> SiteInput | None:
    """Return what a site's input goes through, where that rounds it, else None; `read` gives a tensor by its name in the site."""
    if "activation" not in spec.get("input", {}):
        return None
    return site_input(spec, {leaf: read(leaf) for leaf in _layout_of(spec, "input")})


def unpack_base(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Return the base of a weight without a mask, as it was packed. Raises FormatError."""
    return unpack({"shape": spec["shape"], "base": spec["base"]}, _tensors_of("base", tensors)).base


def _in_turn(spec: Spec, parts: Mapping[str, Any]) -> Iterator[tuple[str, Any, Spec, tuple[Tensor, ...]]]:
    """Yield role, format, description and mask of each part; the mask comes first, since the base is read with it."""
    described = _parts(spec)
    for role in sorted(described, key=lambda role: role != "keep"):
        under = (parts["keep"].mask(),) if role == "base" and "keep" in described else ()
        yield role, _format(role, described[role]), described[role], under


def _tensors_of(role: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, by name within the part."""
    others = tuple(_prefix(other) for other in ROLES if other not in ("base", role))
    prefix = _prefix(role)
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and not n.startswith(others)}


def unpack_rows(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], start: int, stop: int) -> CompressedWeight:
    """Return rows start..stop of a packed weight; `start` must be a multiple of 32, which begins on a word in every stream."""
    rows, columns = _shape(dict(spec))
    if (start, stop) == (0, rows):
        return unpack(dict(spec), tensors)
    parts: dict[str, Any] = {}
    for role, form, described, under in _in_turn(dict(spec), parts):
        fewer, cut = form.cut_rows(described, (rows, columns), _tensors_of(role, tensors), start, stop, *under)
        parts[role] = form.unpack(fewer, (stop - start, columns), cut, *under)
    return CompressedWeight(**parts)
