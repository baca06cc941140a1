"""A model without weights, filled one block at a time.

Parameters are on the meta device and buffers are real: with everything on meta, buffers that are not stored in checkpoints
(rotary frequencies, Gemma's embedding scale) would come back as garbage without an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.architecture.config import tied, vocabulary
from compress.architecture.family import Site
from compress.architecture.inventory import Inventory
from compress.architecture.names import matches, parameter_name
from compress.checkpoint.source import Source
from compress.errors import CheckpointError
from compress.model import layer_sizes as uneven
from compress.model.block_calls import Calls, Recorder, outputs_of, replaced
from compress.model.expert_loop import ExpertLoop
from compress.model.meta import build_model
from compress.model.rounded_inputs import RoundedInputs
from compress.system import memory
from compress.weights.site_input import SiteInput
from compress.weights.weight import CompressedWeight


class _Linear(nn.Linear):
    """An expert's matrix on meta, without the initialisation of nn.Linear."""

    def __init__(self, columns: int, rows: int, dtype: torch.dtype) -> None:
        super().__init__(columns, rows, bias=False, device="meta", dtype=dtype)


@dataclass(frozen=True)
class Weights:
    """Replacements of a block's own tensors: weights (out, in) by site, other tensors by disk name."""

    sites: Mapping[str, Tensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, SiteInput] = field(default_factory=dict)  # what rounds the input of some of the sites

    @classmethod
    def of(
        cls,
        weights: Iterable[tuple[str, CompressedWeight]],
        others: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Weights:
        """Decode compressed weights, by site; they are in memory one at a time."""
        sites: dict[str, Tensor] = {}
        inputs: dict[str, SiteInput] = {}
        for name, weight in weights:
            sites[name] = weight.dequantize().to(dtype)
            if weight.rounded_input is not None:
                inputs[name] = weight.rounded_input
        return cls(sites, others or {}, inputs)


class StreamedModel:
    """The model of a source, with one block filled at a time."""

    def __init__(self, source: Source, inventory: Inventory, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.inventory, self.family = source, inventory, inventory.family
        self.dtype, self.device = dtype, device
        self.model: Any = build_model(source.config, str(source.folder), dtype)
        uneven.resize(self.model, uneven.sizes_of(source.config), lambda name: parameter_name(self.family, name))
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        path = parameter_name(self.family, f"{self.family.blocks}.0").removesuffix(".0")
        self.path = path
        self.blocks: Any = self.model.get_submodule(path)
        self.sites: dict[int | None, list[Site]] = {}
        for site in inventory.sites:
            self.sites.setdefault(site.block, []).append(site)
        self._split_experts()
        self._copied: dict[str, list[str]] = {}
        for name in inventory.copied:
            if matches(name, self.family.aside):
                continue
            block, _, rest = name.removeprefix(self.family.blocks + ".").partition(".")
            inside = name.startswith(self.family.blocks + ".") and block.isdigit()
            self._copied.setdefault(block if inside else "", []).append(rest if inside else name)
        self._rounded = RoundedInputs()
        self._calls: dict[tuple[int, ...], Calls] = {}  # by samples and length

    def _empty_aside(self) -> None:
        """Give what text does not pass through empty parameters, as models ask the first that they have for their device."""
        for name in (name for name in self.inventory.copied if matches(name, self.family.aside)):
            path, _, leaf = parameter_name(self.family, name).rpartition(".")
            try:
                owner = self.model.get_submodule(path)
            except AttributeError:  # the model's class has no place for it
                continue
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(torch.empty(0, device=self.device, dtype=self.dtype), requires_grad=False)

    def _split_experts(self) -> None:
        layout = self.family.experts
        if layout is None:
            return

        def make(expert: int, name: str, columns: int, rows: int) -> nn.Module:
            return _Linear(columns, rows, self.dtype)

        for number, block in enumerate(self.blocks):
            if any(site.expert is not None for site in self.sites[number]):
                block.set_submodule(layout.module, ExpertLoop(block.get_submodule(layout.module), layout, make))

    def linear(self, site: Site) -> nn.Module:
        """Return the module that has a site's weight."""
        if site.block is None:
            module: nn.Module = self.model.get_submodule(parameter_name(self.family, site.name))
            return module
        inner: nn.Module = self.blocks[site.block].get_submodule(self._within(site))
        return inner

    def expert_loops(self, number: int) -> list[nn.Module]:
        """The modules of a block that send tokens to experts."""
        return [module for module in self.blocks[number].modules() if isinstance(module, ExpertLoop)]

    def _within(self, site: Site) -> str:
        """Path of a site's module within its block."""
        layout = self.family.experts
        if site.expert is not None and layout is not None:
            rest = site.name.removeprefix(f"{self.family.blocks}.{site.block}.")
            return layout.module + rest.removeprefix(layout.disk)
        return parameter_name(self.family, site.name).removeprefix(f"{self.path}.{site.block}.")

    def weight(self, site: Site) -> Tensor:
        """Read a site's weight (out, in) from the source, in its own dtype."""
        tensor = self.source.tensor(site.tensor, site.slice)
        return tensor.T.contiguous() if site.transposed else tensor

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Set the weight (out, in) of a site's module, cast to the dtype that the model computes in."""
        module: Any = self.linear(site)
        weight = weight.to(self.device, self.dtype)
        if type(module).__name__ == "Conv1D":  # GPT-2's linear, which holds (in, out)
            weight = weight.T.contiguous()
        if tuple(module.weight.shape) != tuple(weight.shape):
            raise CheckpointError(
                f"{site.name}: shape {list(weight.shape)} on disk; expected {list(module.weight.shape)} by config.json"
            )
        module.weight = nn.Parameter(weight, requires_grad=False)

    def _fill(self, site: Site) -> None:
        """Give a site's module the weight that the source has, and the rounding of its input."""
        self.set_weight(site, self.weight(site))
        self._rounded.set(self.linear(site), self.source.rounded_input(site.tensor))

    def load(self, number: int) -> nn.Module:
        """Fill block `number` from the source and return it.

        Raises CheckpointError if a parameter is left without a value or a tensor has no parameter.
        """
        block: nn.Module = self.blocks[number]
        for site in self.sites[number]:
            self._fill(site)
        base = f"{self.family.blocks}.{number}."
        joined: dict[str, list[str]] = {}
        for rest in self._copied.get(str(number), []):
            joined.setdefault(self._inside(number, base + rest), []).append(base + rest)
        for inside, names in joined.items():
            self._assign(block, inside, *(names if len(names) == 1 else sorted(names, key=list(self.family.names).index)))
        self._complete(block, base)
        return block

    def set_weights(self, number: int, weights: Weights) -> None:
        """Replace weights and other tensors of a filled block."""
        by_name = {site.name: site for site in self.sites[number]}
        for name, weight in weights.sites.items():
            self.set_weight(by_name[name], weight)
            self._rounded.set(self.linear(by_name[name]), weights.inputs.get(name))
        self.set_tensors(number, weights.others)

    def _assign(self, module: nn.Module, inside: str, name: str, *more: str) -> None:
        """Set the parameter or buffer `inside` of a module to the tensor `name` of the source, or to several joined by rows."""
        path, _, leaf = inside.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            owner = nn.Module()
        value = torch.cat([self.source.tensor(one) for one in (name, *more)]) if more else self.source.tensor(name)
        known = {**owner._parameters, **owner._buffers}.get(leaf)
        if known is None or tuple(known.shape) != tuple(value.shape):
            expected = "no such parameter" if known is None else f"shape {list(known.shape)}"
            raise CheckpointError(
                f"{self.source.folder}: {name} has shape {list(value.shape)}, but the model expects {expected}; check config.json"
            )
        value = value.to(self.device, known.dtype if known.is_floating_point() else value.dtype)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _complete(self, module: nn.Module, base: str) -> None:
        empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        if empty:
            raise CheckpointError(
                f"{self.source.folder}: nothing fills {base}{empty[0]} ({len(empty)} in all); the checkpoint is incomplete"
            )

    def release(self, number: int) -> None:
        """Free the weights of a block."""
        _to_meta(self.blocks[number])
        memory.give_back()

    @contextmanager
    def embeddings_and_head(self) -> Iterator[None]:
        """Fill the embeddings, the last norm and the head within a `with` statement."""
        self._empty_aside()
        known = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        for name in self._copied.get("", []):
            module = parameter_name(self.family, name)
            if module in known:  # prediction heads that are copied have no module
                self._assign(self.model, module, name)
        for site in self.sites.get(None, []):
            self._fill(site)
        self._tie()
        try:
            yield
        finally:
            for module_name, module in self.model.named_modules():
                if module is not self.model and not module_name.startswith(self.path):
                    _to_meta(module, recurse=False)

    def _tie(self) -> None:
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and head.weight.is_meta and tied(self.source, self.family):
            head.weight = table.weight

    def _calls_of(self, ids: Tensor) -> Calls:
        """How the model calls its blocks for ids of this shape; needs `embeddings_and_head`."""
        shape = (ids.shape[0], ids.shape[1])
        if shape not in self._calls:
            # What differs for other tokens comes from the tokens.
            other = (ids + 1) % vocabulary(self.source)
            self._calls[shape] = Calls.recorded(self.path, shape, self._bypass(ids), self._bypass(other), len(self.blocks))
        return self._calls[shape]

    def _bypass(self, ids: Tensor, known: Calls | None = None) -> Recorder:
        """Run the model without its blocks and record how it calls them."""

        def outputs(number: int, args: tuple[Any, ...], kwargs: dict[str, Any], main: Tensor) -> Any:
            return outputs_of(self.blocks[number], args, kwargs, main, (ExpertLoop,))[0]

        recorder = Recorder(self.path, outputs, known)
        with torch.no_grad(), replaced(self.blocks, recorder):
            self.model.get_decoder()(input_ids=ids.to(self.device), use_cache=False)
        return recorder

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (samples, length) -> hidden states before the first block (samples, length, width).

        Needs `embeddings_and_head`. The width is that of the model, and more where blocks take more than one tensor.
        """
        calls = self._calls_of(ids)
        return calls.pack(0, calls.entering(self._bypass(ids, calls)))

    def forward(self, number: int, hidden: Tensor) -> Tensor:
        """Run a filled block on hidden states (samples, length, width); a batch of this shape must have been embedded before."""
        with torch.no_grad():
            return self._calls[tuple(hidden.shape[:2])].run(number, hidden, self.blocks[number])

    def differentiable(self, number: int, hidden: Tensor, weights: Mapping[Site, Tensor], others: Mapping[str, Tensor]) -> Tensor:
        """Run a filled block with some weights (out, in) and other tensors (by disk name) replaced; gradients pass through."""
        given: dict[str, Tensor] = {}
        for site, weight in weights.items():
            turned = type(self.linear(site)).__name__ == "Conv1D"
            given[f"{self._within(site)}.weight"] = (weight.T if turned else weight).to(self.dtype)
        for name, value in others.items():
            inside = self._inside(number, name)
            given[inside] = value.to(self.blocks[number].get_parameter(inside).dtype)
        block = self.blocks[number]

        def called(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(block, given, args, kwargs)

        return self._calls[tuple(hidden.shape[:2])].run(number, hidden, called)

    @contextmanager
    def all_blocks(self) -> Iterator[None]:
        """Fill all blocks, the embeddings, the last norm and the head within a `with` statement."""
        with self.embeddings_and_head():
            for number in range(len(self.blocks)):
                self.load(number)
            try:
                yield
            finally:
                for number in range(len(self.blocks)):
                    self.release(number)

    def parameter_names(self) -> dict[str, str]:
        """The copied tensors that are parameters of the model: disk name -> name of the parameter."""
        known = {name for name, _ in self.model.named_parameters()}
        names = {name: parameter_name(self.family, name) for name in self.inventory.copied}
        return {name: inside for name, inside in names.items() if inside in known and not matches(name, self.family.aside)}

    def whole(
        self, ids: Tensor, weights: Mapping[Site, Tensor] | None = None, others: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Token ids (samples, length) -> logits (samples, length, vocabulary), with some weights (out, in) and other tensors (by
        disk name) replaced; gradients pass through. Needs `all_blocks`.
        """
        paths = {id(module): path for path, module in self.model.named_modules()}
        given: dict[str, Tensor] = {}
        for site, weight in (weights or {}).items():
            module: Any = self.linear(site)
            turned = weight.T if type(module).__name__ == "Conv1D" else weight
            given[f"{paths[id(module)]}.weight"] = turned.to(module.weight)
        names = self.parameter_names()
        for name, value in (others or {}).items():
            if name in names:
                given[names[name]] = value.to(self.model.get_parameter(names[name]))
        call = {"input_ids": ids.to(self.device), "use_cache": False}
        result: Tensor = torch.func.functional_call(self.model, given, (), call).logits
        return result

    def _inside(self, number: int, name: str) -> str:
        """Disk name of a tensor of a block -> path of the parameter within the block."""
        return parameter_name(self.family, name).removeprefix(f"{self.path}.{number}.")

    def others(self, number: int) -> dict[str, Tensor]:
        """The copied floating-point parameters of a filled block by disk name, in float32."""
        base, parameters = f"{self.family.blocks}.{number}.", dict(self.blocks[number].named_parameters())
        names = [base + rest for rest in self._copied.get(str(number), [])]
        inside = Counter(self._inside(number, name) for name in names)
        found = {n: parameters.get(self._inside(number, n)) for n in names if inside[self._inside(number, n)] == 1}
        return {name: value.detach().float() for name, value in found.items() if value is not None and value.is_floating_point()}

    def holds(self, number: int, name: str) -> bool:
        """Whether a block has a parameter for a tensor of this disk name."""
        return name.startswith(f"{self.family.blocks}.{number}.") and not matches(name, self.family.aside)

    def set_tensors(self, number: int, others: Mapping[str, Tensor]) -> None:
        """Replace parameters of a filled block by tensors, by disk name."""
        for name, value in others.items():
            path, _, leaf = self._inside(number, name).rpartition(".")
            owner = self.blocks[number].get_submodule(path)
            known = owner._parameters[leaf]
            owner._parameters[leaf] = nn.Parameter(value.to(self.device, known.dtype), requires_grad=False)

    def rows_to_head(self, ids: Tensor, hidden: Tensor) -> None:
        """Send the output of the last block to the head, for the hooks on it, without computing logits.

        Needs `embeddings_and_head`.
        """
        head = self.model.get_output_embeddings()
        head.forward = lambda rows: rows[..., :1]
        try:
            self.logits(ids, hidden)
        finally:
            del head.forward

    def logits(self, ids: Tensor, hidden: Tensor, gradients: bool = False) -> Tensor:
        """Output of the last block (samples, length, width) -> logits (samples, length, vocabulary).

        Needs `embeddings_and_head`.
        """
        calls = self._calls_of(ids)
        with torch.set_grad_enabled(gradients), replaced(self.blocks, calls.at_the_end(hidden)):
            result: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        return result


def _to_meta(module: nn.Module, recurse: bool = True) -> None:
    for part in module.modules() if recurse else (module,):
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
