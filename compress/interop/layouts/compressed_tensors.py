"""compressed-tensors, format pack-quantized (`quant_method: compressed-tensors`), for transformers, vLLM, SGLang. 2 to 8 bits.

    weight_packed      I32 (out, ceil(in * bits / 32))      codes row by row, least significant bit first, rows begin on words
    weight_scale       BF16, F16 or F32 (out, groups)
    weight_shape       I64 (2,)                             (out, in)
    weight_zero_point  I32 (ceil(out * bits / 32), groups)  zero codes down each column, only on asymmetric grids

`value = (code - zero) * scale`; both are stored without sign, as ours are. Widths that do not divide 32 are packed densely, as
versions from 0.15 on do; older ones pad every word, which shows in the number of words and is refused when read.
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
from compress.weights import bit_stream as _bits
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

VERSION = "0.15.0"  # the first that packs every width densely
PACKED = "pack-quantized"


class CompressedTensors(Layout[Scheme]):
    """The layout of llm-compressor."""

    name = "compressed-tensors"
    holds = "codes of 2 to 8 bits, with or without zero points, without act-order"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    readers = "transformers (with the package compressed-tensors), vLLM, SGLang"
    widths = (2, 3, 4, 5, 6, 7, 8)

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> Scheme:
        """Return how a described site is stored. Raises FormatError with the reason where it cannot be."""
        return _grid.scheme(spec, self.widths, zeros=True, scattered=False)

    def layout(self, scheme: Scheme) -> Tensors:
        """Return dtype and shape of the tensors of a site."""
        rows, columns = scheme.shape
        layout: Tensors = {
            "weight_packed": (torch.int32, (rows, _bits.words(columns, scheme.bits))),
            "weight_scale": (_grid.DTYPES[scheme.scale], (rows, scheme.groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if scheme.zero:
            layout["weight_zero_point"] = (torch.int32, (_bits.words(rows, scheme.bits), scheme.groups))
        return layout

    def tensors(self, scheme: Scheme, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site. Raises FormatError where its scales do not fit."""
        part = _grid.grid(weight, scheme)
        tensors = {
            "weight_packed": _grid.words(part.codes, part.bits),
            "weight_scale": part.scale.contiguous(),
            "weight_shape": torch.tensor(scheme.shape),
        }
        if part.zero is not None:
            tensors["weight_zero_point"] = _grid.words(part.zero.T.contiguous(), part.bits).T.contiguous()
        return tensors

    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str], head: str) -> dict[str, Any]:
        """Return `quantization_config`: all linears, if they are stored in one way, or else groups of names."""
        groups: dict[tuple[int, int, bool], list[str]] = {}
        for name, found in schemes.items():
            size = -1 if found.group_size == found.shape[1] and not _partial(found.group_size, schemes) else found.group_size
            groups.setdefault((found.bits, size, found.zero), []).append(name)
        described = {}
        for number, ((bits, size, zero), names) in enumerate(groups.items()):
            targets = ["Linear"] if len(groups) == 1 else [f"re:{_names.pattern(p)}" for p in _names.fold(names)]
            weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": not zero, "dynamic": False}
            weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
            described[f"group_{number}"] = {
                "targets": targets,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        ignore = sorted({head} - set(schemes)) + [f"re:{_names.pattern(p)}" for p in _names.fold(set(dense) - {head})]
        return {
            "quant_method": self.name,
            "version": VERSION,
            "format": PACKED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "ignore": ignore,
            "config_groups": described,
        }

    def find(
        self, config: Mapping[str, Any], entries: Mapping[str, tuple[str, tuple[int, ...]]], read: _names.Read
    ) -> dict[str, Scheme]:
        """Return how each site is stored, from a checkpoint's config and headers {name: (dtype, shape)}. Raises FormatError.

        Width and shape are those of the tensors, which a config can only repeat: targets may be classes of a model's modules.
        """
        if config.get("format") != PACKED:
            raise FormatError(
                f"quantization_config: format is {config.get('format')!r:.80}; of compressed-tensors, compress reads {PACKED}"
            )
        widths = {_group(values, place) for place, values in _groups(config).items()}
        found: dict[str, Scheme] = {}
        for tensor, (_, packed) in entries.items():
            if not tensor.endswith(".weight_packed") or len(packed) != 2:
                continue
            site = tensor.removesuffix(".weight_packed")
            if f"{site}.weight_g_idx" in entries:
                raise FormatError(f"{site}: has weight_g_idx; act-order of old compressed-tensors files is not read")
            if lacking := [leaf for leaf in ("weight_shape", "weight_scale") if f"{site}.{leaf}" not in entries]:
                raise FormatError(f"{site}.{lacking[0]}: missing; the checkpoint is incomplete, fetch it again")
            rows, columns = (int(n) for n in read(f"{site}.weight_shape").tolist())
            dtype, scales = entries[f"{site}.weight_scale"]
            zero = f"{site}.weight_zero_point" in entries
            fits = {
                (bits, columns if size == -1 else size)
                for bits, size, symmetric in widths
                if _bits.words(columns, bits) == packed[1]
                and symmetric != zero
                and scales == (rows, 1 if size == -1 else columns // max(size, 1))
            }
            if len(fits) != 1 or packed[0] != rows:
                raise FormatError(
                    f"{site}: {rows} x {columns} in {packed[1]} words a row with scales {list(scales)}; config_groups has "
                    f"(bits, group size, symmetric) {sorted(widths)}, of which {len(fits)} fit. Written by compressed-tensors "
                    "before 0.15?"
                )
            bits, size = fits.pop()
            found[site] = Scheme((rows, columns), bits, size, zero, scale=_names.scale_of(dtype, site))
        return found

    def leaves(self, scheme: Scheme) -> tuple[str, ...]:
        """Tensors that are read of a site."""
        return tuple(self.layout(scheme))

    def read(self, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CompressedWeight:
        """Return the weight of a site. Raises FormatError where tensors do not fit the config."""
        _names.check(self.layout(scheme), tensors)
        rows, columns = scheme.shape
        codes = _grid.fields(tensors["weight_packed"], scheme.bits, columns)
        zero = None
        if scheme.zero:
            zero = _grid.fields(tensors["weight_zero_point"].T.contiguous(), scheme.bits, rows).T.contiguous()
        return CompressedWeight(Uniform(codes, tensors["weight_scale"].contiguous(), scheme.bits, scheme.group_size, zero))


def _partial(size: int, schemes: Mapping[str, Scheme]) -> bool:
    """Whether some site has groups of this size that are less than its row."""
    return any(found.group_size == size < found.shape[1] for found in schemes.values())


def _groups(config: Mapping[str, Any]) -> dict[str, Any]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError("quantization_config: no config_groups; the config is damaged, fetch the checkpoint again")
    return groups


def _group(values: Any, place: str) -> tuple[int, int, bool]:
    """Bits, group size (-1: the row) and symmetry of a config group. Raises FormatError."""
    weights = values.get("weights") if isinstance(values, dict) else None
    if not isinstance(weights, dict) or weights.get("type", "int") != "int":
        raise FormatError(f"quantization_config: {place} has weights {weights!r:.80}; expected integers")
    size = weights.get("group_size")
    bits = _names.whole(weights, "num_bits", place)
    return bits, -1 if size is None else _names.whole(weights, "group_size", place), bool(weights.get("symmetric", True))


EXPORT = CompressedTensors()
