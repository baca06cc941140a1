"""Loading with transformers: `AutoModelForCausalLM.from_pretrained` of a compressed checkpoint, after `import compress`.

Modules are built on meta with packed buffers of the right shapes, and transformers fills them: no dense copy of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress import packed
from compress.calibration.experts import ExpertLoop
from compress.calibration.families import FAMILIES, Family, parameter_name
from compress.errors import FormatError
from compress.runtime.linear import CompressedLinear


class CompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint, as it stands in config.json."""

    def __init__(self, **values: Any) -> None:
        values.pop("quant_method", None)
        self.quant_method = packed.METHOD
        packed.read_table(values)  # a damaged or newer table fails here, before anything is built
        for key, value in values.items():
            setattr(self, key, value)


def _within(family: Family | None, site: str) -> tuple[str, tuple[str, int, str] | None]:
    """Return the module path of a site; for an expert also its experts' module, its number and the matrix's name."""
    if family is None:
        return site, None
    bare = family.blocks.removeprefix(family.prefix)
    if not site.startswith(family.blocks + ".") and site.startswith(bare + "."):
        site = family.prefix + site
    if family.experts is not None and f".{family.experts.disk}." in site:
        base, _, rest = site.rpartition(f".{family.experts.disk}.")
        number, _, name = rest.partition(".")
        if number.isdecimal():
            module = f"{base}.{family.experts.module}"
            return f"{module}.{number}.{name}", (module, int(number), name)
    return parameter_name(family, site), None


def _linear_at(model: nn.Module, path: str, site: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise FormatError(f"{site}: described in quantization_config, but the model has no such module; check config.json") from None


def replace_modules(model: Any, table: Mapping[str, packed.Spec], guard: str | None) -> None:
    """Give every compressed site of a model on meta its packed module. Raises FormatError for a site the model does not have."""
    family = FAMILIES.get(model.config.model_type)
    experts: dict[str, dict[tuple[int, str], packed.Spec]] = {}
    for site, spec in table.items():
        path, expert = _within(family, site)
        if expert is not None:
            module, number, name = expert
            experts.setdefault(module, {})[number, name] = spec
            continue
        dense: Any = _linear_at(model, path, site)
        shape = (dense.nx, dense.nf) if type(dense).__name__ == "Conv1D" else tuple(reversed(dense.weight.shape))
        if shape != tuple(reversed(spec["shape"])):
            raise FormatError(f"{site}: shape {spec['shape']} in quantization_config; the model has {list(reversed(shape))}")
        model.set_submodule(path, CompressedLinear(spec, dense.bias, guard=site == guard))
    for path, specs in experts.items():
        assert family is not None and family.experts is not None
        model.set_submodule(path, ExpertLoop(_linear_at(model, path, path), family.experts, _make(specs, model.dtype)))


def _make(specs: Mapping[tuple[int, str], packed.Spec], dtype: torch.dtype) -> Any:
    def make(expert: int, name: str, columns: int, rows: int) -> nn.Module:
        spec = specs.get((expert, name))
        if spec is None:  # an expert that was left dense
            return nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
        if tuple(spec["shape"]) != (rows, columns):
            raise FormatError(f"expert {expert} {name}: shape {spec['shape']} in quantization_config; the model has {[rows, columns]}")
        return CompressedLinear(spec)

    return make


class CompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds packed modules before weights are loaded."""

    requires_calibration = True  # a dense checkpoint is compressed by `compress quantize`, not while it is loaded

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.to_dict()
        replace_modules(model, packed.read_table(config), config.get("guard"))

    def is_serializable(self) -> bool:
        """Packed tensors are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed tensors get no gradient."""
        return False


def register() -> None:
    """Make the format known to transformers; a second call does nothing."""
    if packed.METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(packed.METHOD)(CompressConfig)
        register_quantizer(packed.METHOD)(CompressQuantizer)
