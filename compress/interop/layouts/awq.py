"""AWQ, version gemm (`quant_method: awq`), read by vLLM, SGLang and GPTQModel. Four bits, zero points, no act-order.

    qweight  I32 (in, out / 8)       codes along the output, eight to a word
    qzeros   I32 (groups, out / 8)   zero codes likewise, as they are
    scales   F16 (groups, out)

Word j holds outputs 8 j + 0, 2, 4, 6, 1, 3, 5, 7 in its fields 0 to 7. `value = (code - zero) * scale`.
"""

from __future__ import annotations

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

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output within a word, by field
_ALL_EIGHT = 0x88888888 - (1 << 32)  # a word of zero codes in the middle of the grid
_INVERSE = tuple(ORDER.index(n) for n in range(8))


def _interleave(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Reorder the columns (rows, n) of each run of eight."""
    result: Tensor = codes.unflatten(1, (-1, 8))[:, :, list(order)].flatten(1)
    return result


class Awq(Layout[Scheme]):
    """The layout of AutoAWQ's gemm kernels."""

    name = "awq"
    holds = "codes of up to 4 bits, in groups of one size, without act-order"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    scales = ("F16",)
    narrowest = 4
    readers = "vLLM, SGLang, GPTQModel, transformers (with the package gptqmodel)"

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> Scheme:
        """Return how a described site is stored. Raises FormatError with the reason where it cannot be."""
        found = _grid.scheme(spec, (4,), zeros=True, scattered=False, scale=scale)
        rows, columns = found.shape
        if rows % 8 or columns % 8:
            raise FormatError(f"has shape {rows} x {columns}, which are no multiples of 8")
        return found

    def layout(self, scheme: Scheme) -> Tensors:
        """Return dtype and shape of the tensors of a site."""
        rows, columns = scheme.shape
        return {
            "qweight": (torch.int32, (columns, rows // 8)),
            "qzeros": (torch.int32, (scheme.groups, rows // 8)),
            "scales": (_grid.DTYPES[scheme.scale], (scheme.groups, rows)),
        }

    def tensors(self, scheme: Scheme, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site. Raises FormatError where its scales do not fit."""
        part = _grid.grid(weight, scheme)
        return {
            "qweight": _grid.words(_interleave(part.codes.T.contiguous(), ORDER), 4),
            "qzeros": _grid.words(_interleave(_grid.zero_codes(part).T.contiguous(), ORDER), 4),
            "scales": part.scale.T.contiguous(),
        }

    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str], head: str) -> dict[str, Any]:
        """Return `quantization_config`. Raises FormatError where sites differ in what there is one setting for."""
        partial = {found.group_size for found in schemes.values() if found.group_size < found.shape[1]}
        whole = {found.group_size for found in schemes.values() if found.group_size == found.shape[1]}
        if len(partial) > 1 or (partial and whole - partial):
            raise FormatError(
                f"group sizes are {', '.join(map(str, sorted(partial | whole)))}; AWQ has one for all sites. "
                "Give all steps of the recipe one group_size, or export to compressed-tensors"
            )
        return {
            "quant_method": self.name,
            "bits": 4,
            "group_size": next(iter(partial), -1),
            "zero_point": True,  # they are always stored; kernels of some readers are for that only
            "version": "gemm",
            "modules_to_not_convert": sorted(dense),
        }

    def find(
        self, config: Mapping[str, Any], entries: Mapping[str, tuple[str, tuple[int, ...]]], read: _names.Read
    ) -> dict[str, Scheme]:
        """Return how each site is stored, from a checkpoint's config and headers {name: (dtype, shape)}. Raises FormatError."""
        bits, size = _names.whole(config, "bits", "AWQ"), _names.whole(config, "group_size", "AWQ")
        version = str(config.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise FormatError(f"quantization_config: AWQ {version} with {bits} bits; expected gemm with 4 bits")
        found: dict[str, Scheme] = {}
        for tensor, (_, shape) in entries.items():
            if not tensor.endswith(".qweight") or len(shape) != 2:
                continue
            site = tensor.removesuffix(".qweight")
            columns, rows = shape[0], shape[1] * 8
            group = columns if size == -1 else size
            _names.whole_groups(site, columns, group, [x for x in ("qzeros", "scales") if f"{site}.{x}" not in entries])
            scale = _names.scale_of(entries[f"{site}.scales"][0], site)
            zero = bool((read(f"{site}.qzeros") != _ALL_EIGHT).any())  # if not, the grid is symmetric
            found[site] = Scheme((rows, columns), 4, group, zero, scale=scale)
        return found

    def leaves(self, scheme: Scheme) -> tuple[str, ...]:
        """Tensors that are read of a site."""
        return ("qweight", "qzeros", "scales")

    def read(self, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CompressedWeight:
        """Return the weight of a site. Raises FormatError where tensors do not fit the config."""
        _names.check(self.layout(scheme), tensors)
        rows = scheme.shape[0]
        codes = _interleave(_grid.fields(tensors["qweight"], 4, rows), _INVERSE).T.contiguous()
        zero = _interleave(_grid.fields(tensors["qzeros"], 4, rows), _INVERSE).T.contiguous()
        if not scheme.zero and not bool((zero == 8).all()):
            raise FormatError("zero points are not 8, as they were when the checkpoint was opened; the file has changed")
        scale = tensors["scales"].T.contiguous()
        return CompressedWeight(Uniform(codes, scale, 4, scheme.group_size, zero if scheme.zero else None))


EXPORT = Awq()
