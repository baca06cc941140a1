"""Originals that were released in FP8 or MXFP4: their weights are decoded to bfloat16 as they are read, one at a time.

    FP8     X.weight in float8_e4m3, times X.weight_scale_inv or X.weight_scale in floats: one, one per row, or one per block of
            the weight (DeepSeek-V3: 128 x 128). Both names mean a factor.
    MXFP4   X_blocks (experts, out, groups, 16) uint8, two codes a byte, the first in the low bits; X_scales (experts, out,
            groups), powers of two with a bias of 127; X is (experts, in, out).

Sources: the model files of DeepSeek-V3 and gpt-oss, and the OCP microscaling formats 1.0. Products are formed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.tensor_file import Coded, Entry
from compress.errors import CheckpointError

_SCALES = ("weight_scale_inv", "weight_scale")
_INPUTS = ("input_scale", "activation_scale")  # of activations, which are not rounded here
_BLOCK = (128, 128)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_METHODS = ("fp8", "fbgemm_fp8", "modelopt", "mxfp4", "compressed-tensors")


def fp8(codes: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Decode (out, in) float8 with one scale, (out,) or (out, 1), or one for each block of rows and columns; bfloat16."""
    factor = scale.float()
    if block is not None:
        rows, columns = codes.shape
        factor = factor.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    elif factor.numel() > 1:
        factor = factor.reshape(-1, 1)
    return (codes.float() * factor).bfloat16()


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode (..., out, groups, 16) bytes with (..., out, groups) scales; (..., in, out) in bfloat16."""
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.ldexp(table[codes.int()], scales.int().unsqueeze(-1) - 127)
    return values.flatten(-2).transpose(-1, -2).contiguous().bfloat16()


def _block(name: str, shape: tuple[int, ...], scale: Entry, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the block of a scale, None where it has one value or one per row. Raises CheckpointError."""
    if scale.numel == 1 or scale.shape in ((shape[0],), (shape[0], 1)):
        return None
    expected = tuple(-(-length // step) for length, step in zip(shape, size, strict=True))
    if scale.shape != expected:
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {list(scale.shape)} beside {name} {list(shape)}; expected one value, one per row, or "
            f"{list(expected)} for blocks of {list(size)}. Fetch the checkpoint again"
        )
    return size


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """The rows and columns of a block, as a config has them."""
    described = [config, *(g.get("weights") or {} for g in (config.get("config_groups") or {}).values() if isinstance(g, dict))]
    found = (d.get(key) for d in described for key in ("weight_block_size", "block_structure"))
    size = next((value for value in found if isinstance(value, list) and len(value) == 2), None)
    whole = size is not None and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    return (size[0], size[1]) if size is not None and whole else _BLOCK


def decoded(config: dict[str, Any], entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, Entry], str | None]:
    """Return config, tensors and what they were stored in, as if the original were in bfloat16; unchanged if nothing is coded.

    Raises CheckpointError where scales are missing or do not fit.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in (None, *_METHODS):
        return config, entries, None
    size = _block_size(quantization)
    result, kinds = dict(entries), set()
    for name, entry in entries.items():
        owner = name.rpartition(".")[0]
        if name.endswith(".weight") and entry.dtype == "F8_E4M3" and len(entry.shape) == 2:
            scales = [entries[key] for leaf in _SCALES if (key := f"{owner}.{leaf}") in entries]
            if not scales:
                if quantization.get("quant_method") != "fp8" and "float" not in str(quantization.get("format", "")):
                    continue  # values as they are: nothing says that weights are in FP8
                raise CheckpointError(f"{entry.file}: {name} is FP8, and there is no scale for it; fetch the checkpoint again")
            call: Any = partial(fp8, block=_block(name, entry.shape, scales[0], size))
            result[name] = Coded.of(name, entry.shape, (entry, scales[0]), call)
            for leaf in (*_SCALES, *_INPUTS):
                result.pop(f"{owner}.{leaf}", None)
            kinds.add("FP8")
        elif name.endswith("_blocks") and (scale := entries.get(name.removesuffix("_blocks") + "_scales")) is not None:
            bare, shape = name.removesuffix("_blocks"), entry.shape
            if entry.dtype != "U8" or len(shape) != 4 or shape[3] != 16 or scale.shape != shape[:3] or scale.dtype != "U8":
                raise CheckpointError(
                    f"{entry.file}: {name} is {entry.dtype} {list(shape)} with scales {list(scale.shape)}; expected U8 "
                    "(experts, out, groups, 16) and (experts, out, groups). Fetch the checkpoint again"
                )
            result[bare] = Coded.of(bare, (shape[0], shape[2] * 32, shape[1]), (entry, scale), mxfp4)
            result.pop(name)
            result.pop(scale.name)
            kinds.add("MXFP4")
    if not kinds:
        return config, entries, None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return plain, result, " and ".join(sorted(kinds))
