"""Loading with transformers, by `from_pretrained` of `AutoModelForCausalLM` and its like, after `import compress`.

The format is registered with transformers when this module has been loaded.
Modules are built on meta with packed buffers of the right shapes, and transformers fills them: no dense copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.architecture.family import Experts, Family
from compress.architecture.known import family_of
from compress.checkpoint import packing, site_table
from compress.checkpoint.tensor_file import DTYPE_NAMES, read_header
from compress.errors import FormatError
from compress.model import layer_sizes as uneven
from compress.model.disk_names import DiskNames, fused_experts
from compress.model.expert_loop import ExpertLoop, MakeLinear
from compress.runtime.experts import ExpertProducts
from compress.runtime.linear import CompressedLinear

FUSED = ("gate_up_proj", "down_proj")  # the 3-D parameters of all experts of a block


class CompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, as it stands in config.json."""

    def __init__(self, **values: Any) -> None:
        values.pop("quant_method", None)
        self.quant_method: Any = packing.METHOD  # not one of transformers' own
        site_table.read_table(values)  # a damaged or newer table fails here, before anything is built
        for key, value in values.items():
            setattr(self, key, value)


class Places:
    """Where the sites of a checkpoint are in a model that is still as transformers builds it."""

    def __init__(self, model: Any) -> None:
        self.model, self.names = model, DiskNames(model)
        self.fused = fused_experts(model)

    def of(self, site: str) -> tuple[str, tuple[str, int, str] | None]:
        """Return the module path of a site; for an expert also its experts' module, its number and the matrix's name."""
        owner, _, leaf = self.names.parameter(f"{site}.weight").rpartition(".")
        _, number, name = ("", "", *site.rsplit(".", 2))[-3:]
        if leaf != "weight" and owner in self.fused:  # joined with those of other experts
            return f"{owner}.{number}.{name}", (owner, int(number), name)
        module, _, _ = owner.rpartition(f".{number}.{name}")
        if number.isdecimal() and module in self.fused:  # one of a tensor that is fused on disk too
            return owner, (module, int(number), name)
        return owner, None

    def layout(self, module: str) -> Experts:
        """How the experts of a fused module are called, one by one."""
        inputs, output = self.fused[module]
        single = [self.names.joined(f"{module}.{name}") for name in (inputs, output)]
        if single[0] is not None and single[1] is not None:
            return Experts(module, module, single[0], single[1][0])
        return Experts(module, module, (inputs,), output, fused=True)


def without_absent_head(model: nn.Module, table: Mapping[str, packing.Spec]) -> dict[str, packing.Spec]:
    """Return a table without the head's entry where a model has none, as those of `AutoModel` and of classifiers."""
    head = family_of(getattr(model.config, "model_type", "")).head
    return {site: spec for site, spec in table.items() if site != head or hasattr(model, head)}


def _module_at(model: nn.Module, path: str, site: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise FormatError(f"{site}: named in quantization_config, but the model has no such module; check config.json") from None


def _linear_at(model: nn.Module, path: str, site: str) -> tuple[Any, list[int]]:
    """Return a dense linear and its shape [out, in]."""
    dense = _module_at(model, path, site)
    if type(dense).__name__ == "Conv1D":  # GPT-2's linear
        return dense, [dense.nf, dense.nx]
    if not isinstance(dense, nn.Linear):
        raise FormatError(
            f"{site}: named in quantization_config, but it is a {type(dense).__name__}, not a linear; check config.json"
        )
    return dense, list(dense.weight.shape)


def check_files(family: Family, table: Mapping[str, packing.Spec], files: Iterable[str | Path], blocks: int = 0) -> None:
    """Raise FormatError where the files lack a packed tensor or a block, or have a tensor in another type or shape.

    transformers would warn, and leave memory as it found it, or cast.
    """
    stored = {name: entry for file in files for name, entry in read_header(Path(file))[0].items()}
    if not stored:
        return
    for site, spec in table.items():
        spelled = {site, family.prefix + site, site.removeprefix(family.prefix)}  # the last as `AutoModel` saves them
        for leaf, (dtype, shape) in packing.layout(spec).items():
            entry = next((stored[name] for name in (f"{name}.{leaf}" for name in spelled) if name in stored), None)
            if entry is None:
                raise FormatError(f"{site}.{leaf}: named in quantization_config, but no file has it; fetch the checkpoint again")
            if (entry.dtype, entry.shape) != (DTYPE_NAMES[dtype], shape):
                raise FormatError(
                    f"{site}.{leaf}: is {entry.dtype} {list(entry.shape)} in {entry.file.name}; quantization_config says "
                    f"{DTYPE_NAMES[dtype]} {list(shape)}. Fetch the checkpoint again"
                )
    within = (family.blocks.removeprefix(family.prefix), family.blocks)
    there = {name[len(start) + 1 :].partition(".")[0] for name in stored for start in within if name.startswith(f"{start}.")}
    if there and (lacking := [block for block in range(blocks) if str(block) not in there]):
        raise FormatError(
            f"config.json: has {blocks} blocks, and no file has a tensor of block {lacking[0]}; fetch the checkpoint again"
        )


def replace_modules(model: Any, table: Mapping[str, packing.Spec], guard: str | None, places: Places | None = None) -> bool:
    """Give every compressed site of a model on meta its packed module; return whether single experts on disk stay single.

    Raises FormatError for a site that the model does not have.
    """
    places = places or Places(model)
    experts: dict[str, dict[tuple[int, str], packing.Spec]] = {}
    at = {name: places.of(name) for name in table}
    beside = None if guard is None else places.of(guard.rpartition(".")[0])[0]
    for site, spec in table.items():
        path, expert = at[site]
        if expert is not None:
            module, number, name = expert
            experts.setdefault(module, {})[number, name] = spec
            continue
        dense, shape = _linear_at(model, path, site)
        if shape != spec["shape"]:
            raise FormatError(f"{site}: shape {spec['shape']} in quantization_config; the model has {shape}")
        model.set_submodule(path, CompressedLinear(spec, dense.bias))
    layouts = {path: places.layout(path) for path in places.fused}
    single = any(not layouts[path].fused for path in experts)
    if single:
        # Then those of all blocks: transformers joins tensors of single experts by their names, in all blocks or in none.
        for path, layout in layouts.items():
            if not layout.fused:
                experts.setdefault(path, {})
    for path, specs in experts.items():
        loop = ExpertLoop(_module_at(model, path, path), layouts[path], _make(specs, model.dtype, layouts[path].fused))
        loop.products = ExpertProducts(loop)
        model.set_submodule(path, loop)
        for number, name in specs:
            _module_at(model, f"{path}.{number}.{name}", f"{path}.{number}.{name}")
    if guard is not None and beside is not None:
        _stand_in(model, beside, guard)
    return single


def _make(specs: Mapping[tuple[int, str], packing.Spec], dtype: torch.dtype, fused: bool) -> MakeLinear:
    def make(expert: int, name: str, columns: int, rows: int) -> nn.Module | None:
        spec = specs.get((expert, name))
        if spec is None:  # an expert that was left dense
            if fused:
                return None
            return nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
        if tuple(spec["shape"]) != (rows, columns):
            raise FormatError(
                f"expert {expert} {name}: shape {spec['shape']} in quantization_config; the model has {[rows, columns]}"
            )
        return CompressedLinear(spec)

    return make


def _stand_in(model: nn.Module, path: str, guard: str) -> None:
    """Make a place for the guard, so that it is loaded and saved again."""
    owner = _module_at(model, path, guard)
    if not isinstance(owner, CompressedLinear | ExpertLoop):
        raise FormatError(f"{guard}: guard of quantization_config, but that is not compressed; check config.json")
    owner.register_buffer(guard.rpartition(".")[2], torch.empty(0, device="meta"))


class CompressQuantizer(HfQuantizer):
    """Builds packed modules before weights are loaded."""

    requires_calibration = True  # a dense checkpoint is compressed by `compress quantize`, not while it is loaded
    _single_experts = False

    def update_attn_implementation(self, config: Any) -> Any:
        """Take out the name of the file that is not there, before files are looked for."""
        if getattr(config, site_table.FILE_KEY, None) in site_table.ABSENT_FILES:
            setattr(config, site_table.FILE_KEY, None)
        return super().update_attn_implementation(config)  # type: ignore[no-untyped-call]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.to_dict()
        table = without_absent_head(model, site_table.read_table(config))
        guard = config.get("guard")
        if guard is not None and not without_absent_head(model, {guard.removesuffix(".weight"): {}}):
            guard = None
        family = family_of(model.config.model_type)
        places = Places(model)
        uneven.resize(model, uneven.sizes_of(model.config.to_dict()), lambda name: places.of(name)[0])
        self._single_experts = replace_modules(model, table, guard, places)
        blocks = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        check_files(family, table, kwargs.get("checkpoint_files") or (), blocks)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Look at every number that a kernel follows, and at every scale, before the first product."""
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) and not any(tensor.is_meta for tensor in module.tensors.values()):
                packing.check(module.spec, module.tensors, name)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *rest: Any) -> Any:
        """Take out what would join the tensors of single experts: there is no fused parameter to join them into."""
        if self._single_experts:
            joined = tuple(f"experts.{name}" for name in FUSED)
            weight_conversions = [
                conversion
                for conversion in weight_conversions
                if not (isinstance(conversion, WeightConverter) and any(t.endswith(joined) for t in conversion.target_patterns))
            ]
        return super().update_weight_conversions(weight_conversions, *rest)  # type: ignore[no-untyped-call]

    def is_serializable(self) -> bool:
        """Packed tensors are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed tensors get no gradient."""
        return False


if packing.METHOD not in AUTO_QUANTIZER_MAPPING:  # a module that is loaded a second time finds itself there
    register_quantization_config(packing.METHOD)(CompressConfig)
    register_quantizer(packing.METHOD)(CompressQuantizer)
