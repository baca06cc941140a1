"""Models whose blocks differ in size, as `compress cut --uneven` makes them: which linears are smaller than the config says.

transformers' configs have one number of heads and channels for all blocks. So config.json lists the sizes of single linears, and
callers that build the model make these smaller: the streamed model, and the quantizer, which `quantization_config` names although
nothing is quantized. Attention still works, because it takes the number of heads from the outputs of the linears; the number of
heads per KV group must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from compress.checkpoint.site_table import config_with as packed_config
from compress.checkpoint.site_table import write_table
from compress.checkpoint.source import SIZES_KEY
from compress.errors import FormatError

_MAX_AXIS = 2**31 - 1


def config_with(config: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return config.json for a model whose linears have these sizes (out, in), by disk name; unchanged if there are none."""
    if not sizes:
        return dict(config)
    return packed_config({**config, SIZES_KEY: {n: list(size) for n, size in sizes.items()}}, write_table({}, None))


def sizes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the sizes (out, in) that a config names, by disk name. Raises FormatError."""
    found = config.get(SIZES_KEY) or {}
    if not isinstance(found, dict) or not all(_is_size(size) for size in found.values()):
        raise FormatError(f"config.json: {SIZES_KEY} is {found!r:.80}; expected [out, in] by the name of a linear")
    return {name: (size[0], size[1]) for name, size in found.items()}


def _is_size(size: Any) -> bool:
    if not isinstance(size, list) or len(size) != 2:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= _MAX_AXIS for n in size)


def resize(model: nn.Module, sizes: Mapping[str, tuple[int, int]], path_of: Callable[[str], str]) -> None:
    """Shrink linears of a model on meta to (out, in), by disk name. Raises FormatError for one that is missing or smaller."""
    for name, (rows, columns) in sizes.items():
        try:
            linear = model.get_submodule(path_of(name))
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or rows > linear.out_features or columns > linear.in_features:
            raise FormatError(
                f"config.json: {SIZES_KEY} has {name} as {[rows, columns]}; the model has no linear to make that of"
            )
        smaller = nn.Linear(columns, rows, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        model.set_submodule(path_of(name), smaller.requires_grad_(linear.weight.requires_grad))
