"""GPTQ (`quant_method: gptq`), read by GPTQModel, by transformers with GPTQModel, vLLM and SGLang. Widths: 2, 3, 4 and 8 bits.

    qweight  I32 (in * bits / 32, out)      codes down each column, least significant bit first
    qzeros   I32 (groups, out * bits / 32)  zero codes along the row
    scales   F16 or BF16 (groups, out)
    g_idx    I32 (in,)                      group of each input

`value = (code - zero) * scale`. `checkpoint_format: gptq` stores zero - 1 modulo 2^bits in each field, `gptq_v2` stores zero.
Symmetric grids are written as `gptq`, which every reader supports, others as `gptq_v2`, because `gptq` has no place for a zero of
0: readers that do not mask take the stored 2^bits - 1 for 2^bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.interop import affine_grid as _grid
from compress.interop import config_patterns as _names
from compress.interop.affine_grid import Scheme
from compress.interop.layout import Layout, Tensors
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

Settings = tuple[int, int, bool, bool]  # bits, group size, symmetric, act-order


class Gptq(Layout[Scheme]):
    """The layout of GPTQModel and AutoGPTQ."""

    name = "gptq"
    holds = "codes of 2, 3, 4 or 8 bits, with or without zero points and act-order"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    scales = ("F16", "BF16")
    readers = "vLLM, SGLang, GPTQModel, transformers (with the packages optimum and gptqmodel)"
    widths = (2, 3, 4, 8)

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> Scheme:
        """Return how a described site is stored. Raises FormatError with the reason where it cannot be."""
        found = _grid.scheme(spec, self.widths, zeros=True, scattered=True, scale=scale)
        for axis, size in zip(("out", "in"), found.shape, strict=True):
            if size % 32:
                raise FormatError(f"has {axis}={size}, which is no multiple of 32")
        return found

    def layout(self, scheme: Scheme) -> Tensors:
        """Return dtype and shape of the tensors of a site."""
        rows, columns = scheme.shape
        return {
            "qweight": (torch.int32, (columns * scheme.bits // 32, rows)),
            "qzeros": (torch.int32, (scheme.groups, rows * scheme.bits // 32)),
            "scales": (_grid.DTYPES[scheme.scale], (scheme.groups, rows)),
            "g_idx": (torch.int32, (columns,)),
        }

    def tensors(self, scheme: Scheme, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site. Raises FormatError where its scales do not fit."""
        part = _grid.grid(weight, scheme)
        stored = _grid.zero_codes(part)
        if not scheme.zero:  # v1
            stored = stored - 1
        group = part.group if part.group is not None else torch.arange(scheme.shape[1]) // scheme.group_size
        return {
            "qweight": _grid.words(part.codes, part.bits).T.contiguous(),
            "qzeros": _grid.words(stored.T.contiguous(), part.bits),
            "scales": part.scale.T.contiguous(),
            "g_idx": group.int(),
        }

    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str], head: str) -> dict[str, Any]:
        """Return `quantization_config`: the most frequent settings as defaults, and exceptions by name. Raises FormatError."""
        asymmetric = {name for name, found in schemes.items() if found.zero}
        if asymmetric and len(asymmetric) < len(schemes):
            place = next(name for name in schemes if name not in asymmetric)
            raise FormatError(
                f"{place}: has no zero points, and {min(asymmetric)} has; a GPTQ checkpoint stores zero points in one way "
                "for all. Compress all sites symmetric or all asymmetric, or export to compressed-tensors"
            )
        settings = {name: _settings(found, schemes) for name, found in schemes.items()}
        common = Counter(settings.values()).most_common(1)[0][0]
        dynamic: dict[str, dict[str, Any]] = {f"-:{_names.pattern(p)}": {} for p in _names.fold(dense) if p != head}
        for other in sorted(set(settings.values()) - {common}):
            names = [name for name, mine in settings.items() if mine == other]
            bits, group_size, sym, desc_act = other
            override = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
            dynamic |= {f"+:{_names.pattern(p)}": override for p in _names.fold(names)}
        bits, group_size, sym, desc_act = common
        config: dict[str, Any] = {
            "quant_method": self.name,
            "bits": bits,
            "group_size": group_size,
            "desc_act": desc_act,
            "sym": sym,
            "checkpoint_format": "gptq_v2" if asymmetric else "gptq",
            "lm_head": head in schemes,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["compress"]},
        }
        return config | ({"dynamic": dynamic} if dynamic else {})

    def files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return JSON files next to config.json: older readers look for the settings in a file of their own."""
        return {"quantize_config.json": {key: value for key, value in config.items() if key != "quant_method"}}

    def find(
        self, config: Mapping[str, Any], entries: Mapping[str, tuple[str, tuple[int, ...]]], read: _names.Read
    ) -> dict[str, Scheme]:
        """Return how each site is stored, from a checkpoint's config and headers {name: (dtype, shape)}. Raises FormatError."""
        found: dict[str, Scheme] = {}
        for tensor, (_, shape) in entries.items():
            if not tensor.endswith(".qweight"):
                continue
            site = tensor.removesuffix(".qweight")
            mine = {**config, **_names.override(config.get("dynamic") or {}, site)}
            bits, size = _names.whole(mine, "bits", site), _names.whole(mine, "group_size", site)
            if bits not in self.widths or len(shape) != 2:
                raise FormatError(f"{site}: {bits} bits and qweight {list(shape)}; expected one of {self.widths}, and a matrix")
            rows, columns = shape[1], shape[0] * 32 // bits
            size = columns if size == -1 else size
            _names.whole_groups(site, columns, size, [x for x in ("qzeros", "scales") if f"{site}.{x}" not in entries])
            scattered = False
            if mine.get("desc_act") and f"{site}.g_idx" in entries:
                scattered = not torch.equal(read(f"{site}.g_idx").long(), torch.arange(columns) // size)
            scale = _names.scale_of(entries[f"{site}.scales"][0], site)
            found[site] = Scheme((rows, columns), bits, size, not mine.get("sym", True), scattered, scale)
        return found

    def leaves(self, scheme: Scheme) -> tuple[str, ...]:
        """The tensors to read for a site; g_idx may be missing where groups are in order."""
        return ("qweight", "qzeros", "scales", *(("g_idx",) if scheme.scattered else ()))

    def read(self, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CompressedWeight:
        """Return the weight of a site. Raises FormatError where tensors do not match the config."""
        rows, columns = scheme.shape
        bits = scheme.bits
        _names.check(self.layout(scheme), tensors)
        codes = _grid.fields(tensors["qweight"].T.contiguous(), bits, columns)
        zero = _grid.fields(tensors["qzeros"], bits, rows).T.contiguous()
        if (config.get("checkpoint_format") or config.get("format") or "gptq") == "gptq":
            zero = (zero + 1) & ((1 << bits) - 1)
        if not scheme.zero and not bool((zero == 1 << bits - 1).all()):
            raise FormatError("sym is true, but zero points are not the middle of the grid; the config does not fit the weights")
        group = None
        if scheme.scattered:
            group = tensors["g_idx"].to(_grid.group_dtype(scheme.groups))
            if not bool(((tensors["g_idx"] >= 0) & (tensors["g_idx"] < scheme.groups)).all()):
                raise FormatError(f"g_idx names a group outside 0..{scheme.groups - 1}; the file is damaged")
        scale = tensors["scales"].T.contiguous()
        return CompressedWeight(Uniform(codes, scale, bits, scheme.group_size, zero if scheme.zero else None, group))


def _settings(found: Scheme, schemes: Mapping[str, Scheme]) -> Settings:
    whole = found.group_size == found.shape[1] and not any(
        other.group_size == found.group_size < other.shape[1] for other in schemes.values()
    )
    return found.bits, -1 if whole else found.group_size, not found.zero, found.scattered


EXPORT = Gptq()
