"""Names on disk of the parameters of a model, as transformers maps them when it loads and saves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from compress.architecture.family import Experts
from compress.model.expert_loop import is_transposed

_FUSED = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))  # the 3-D parameters of all experts, by kind of module


class DiskNames:
    """From a name on disk to that of the parameter that it fills or, of single experts, that it is joined into."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(model)
        self._renamings = [one for one in found if isinstance(one, WeightRenaming)]
        self._converters = [one for one in found if isinstance(one, WeightConverter)]
        self._prefix = str(model.base_model_prefix or "")
        self.known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
        self._within = any(name.startswith(f"{self._prefix}.") for name in self.known)  # whether the model is more than its base

    def parameter(self, name: str) -> str:
        """Return the name of the parameter."""
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(name, self._renamings, self._converters)[0]
        if renamed in self.known or not self._prefix:
            return renamed
        prefixed = renamed.startswith(f"{self._prefix}.")
        other = renamed.removeprefix(f"{self._prefix}.") if prefixed else f"{self._prefix}.{renamed}"
        # One of several experts is no parameter, where these are one tensor on disk and in the model.
        return other if other in self.known or (prefixed and not self._within) else renamed

    def in_order(self, parameters: Mapping[str, str]) -> list[str]:
        """Names on disk, those that are joined into one parameter in the order in which they are."""

        counts = Counter(parameters.values())

        def place(name: str) -> int:
            if counts[parameters[name]] == 1:
                return 0
            for converter in self._converters:
                for number, source in enumerate(converter.source_patterns):
                    if re.search(source.replace("*.", r".*\.") + r"(?!\w)", name):
                        return number
            return 0

        return sorted(parameters, key=place)

    def joined(self, parameter: str) -> tuple[str, ...] | None:
        """The matrices of single experts that are joined into a fused parameter, in order; None where it is fused on disk too."""
        for converter in self._converters:
            targets, sources = converter.target_patterns, converter.source_patterns
            if len(targets) == 1 and parameter.endswith(targets[0].lstrip(".")) and all("*." in source for source in sources):
                return tuple(source.removesuffix(".weight").rpartition(".")[2].rstrip("\\") for source in sources)
        return None


def fused_experts(block: nn.Module) -> dict[str, tuple[str, str]]:
    """The modules of a block that hold all experts in 3-D parameters, and the names of these: inputs and output."""
    found = {}
    for path, module in block.named_modules():
        axes = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
        for names in _FUSED:
            if all(axes.get(name) == 3 for name in names):
                found[path] = names
                break
    return found


def experts_layout(names: DiskNames, block: nn.Module, base: str, disk: Mapping[str, str]) -> Experts | None:
    """Return the layout of the experts of a block, whose parameters begin with `base`, or None if it has none.

    `disk` are names on disk, those within the block and whole.
    """
    for path, (inputs, output) in fused_experts(block).items():
        parameters = [f"{base}{path}.{name}" for name in (inputs, output)]
        single = [names.joined(parameter) for parameter in parameters]
        if single[0] is not None and single[1] is not None:
            inside = next((name for name, whole in disk.items() if names.parameter(whole) in parameters), "")
            found = re.fullmatch(r"(.+)\.\d+\.[^.]+\.weight", inside)
            return Experts(found[1] if found else path, path, single[0], single[1][0])
        matrices = is_transposed(block.get_submodule(path))
        tensors = {names.parameter(whole): name for name, whole in disk.items()}
        at = tuple((name, tensors[p]) for name, p in zip((inputs, output), parameters, strict=True) if p in tensors)
        return Experts(path, path, (inputs,), output, fused=True, turned=matrices, tensors=at)
    return None
