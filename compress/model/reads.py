"""Who reads what in a block, seen in one call on meta: linears that read one tensor, and places where scales can move.

Every operation of the call is noted with the tensors that it takes. Views of a tensor count as that tensor. Of a norm, readers
are known if nothing but matrices takes its output; of a linear, if all that takes its output is one product with something that
does not come from it, and one linear takes that; of values, if attention takes them, and one linear what attention gives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.model.block_calls import outputs_of

_SAME = {"view", "reshape", "contiguous", "to", "float", "type_as", "detach", "flatten", "unflatten", "clone", "type", "bfloat16"}
# What keeps channels apart between values and what reads heads.
_MOVED = _SAME | {"transpose", torch.permute.__name__, "expand", "unsqueeze", "__getitem__", "squeeze", "movedim"}


@dataclass
class Reads:
    """What one call showed, by paths within the block."""

    taps: list[tuple[str, ...]] = field(default_factory=list)  # linears that read one tensor
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)  # norm -> every matrix that reads it
    products: dict[str, str] = field(default_factory=dict)  # linear -> the linear that reads a product with its output
    values: dict[str, str] = field(default_factory=dict)  # linear that makes values -> the linear that reads the heads


class _Trace(TorchFunctionMode):
    """Notes operations on tensors, by identity."""

    def __init__(self, matrices: Mapping[int, str]) -> None:
        super().__init__()
        self.matrices = matrices  # by identity of a weight that is no linear's: its name
        self.same: dict[int, int] = {}  # a view -> what it is of
        self.moved: dict[int, int] = {}  # the same, where axes may have changed places
        self.taken: dict[int, list[tuple[str, int]]] = {}  # tensor -> operations that take it, and what these give
        self.parents: dict[int, list[int]] = {}
        self.attended: dict[int, int] = {}  # what attention gives -> values
        self.held: list[Tensor] = []
        self.within = 0  # modules that are one operation

    def whole(self, tensor: Tensor, moved: bool = False) -> int:
        """The tensor that this is a view of."""
        found, links = id(tensor), self.moved if moved else self.same
        while found in links:
            found = links[found]
        return found

    def behind(self, tensor: int) -> int:
        """What this was before its axes changed places."""
        while tensor in self.moved:
            tensor = self.moved[tensor]
        return tensor

    def note(self, name: str, given: Iterable[Any], result: Any) -> None:
        """Note an operation."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        results = [value for value in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(value, Tensor)]
        if not results or not tensors:
            return
        self.held += [*tensors, *results]
        for one in results:
            cut = name == "__getitem__" and one.numel() != tensors[0].numel()
            if name in _MOVED and one is not tensors[0] and not cut:
                self.moved[id(one)] = id(tensors[0])
            if name in _SAME and len(results) == 1:
                if one is not tensors[0]:
                    self.same[id(one)] = id(tensors[0])
                continue
            self.parents[id(one)] = [self.whole(tensor) for tensor in tensors]
        if name not in _SAME:
            for tensor in tensors:
                self.taken.setdefault(self.whole(tensor), []).append((name, id(results[0])))

    def comes_from(self, tensor: int, source: int) -> bool:
        """Whether a tensor was made of another."""
        seen, left = set(), [tensor]
        while left:
            one = left.pop()
            if one == source:
                return True
            if one not in seen:
                seen.add(one)
                left += self.parents.get(one, [])
        return False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self.within or name == "__get__":
            return result
        given = [*args, *(kwargs or {}).values()]
        if name == "linear" and id(args[1]) in self.matrices:
            name = f"matrix {self.matrices[id(args[1])]}"
            given = [args[0]]
        if name == "scaled_dot_product_attention":
            self.attended[id(result)] = self.whole(args[2] if len(args) > 2 else kwargs["value"], moved=True)
        self.note(name, [v for value in given for v in (value if isinstance(value, (tuple, list)) else (value,))], result)
        return result


def trace(
    block: nn.Module, linears: Collection[str], args: Any, kwargs: Any, main: Tensor, skipped: Mapping[str, tuple[str, ...]]
) -> tuple[Any, Reads]:
    """Call a block on meta; return what it gives, and what it showed. `skipped` are modules of experts, each with its readers."""
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    norms: dict[str, int] = {}
    experts: dict[str, int] = {}
    seen = _Trace({})
    handles = []

    def watch(path: str, module: nn.Module, into: dict[str, int], out: dict[str, int] | None) -> None:
        def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.within += 1

        def after(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            seen.within -= 1
            first = given[0] if given else next(iter(named.values()))
            if seen.within == 0:
                into[path] = seen.whole(first)
                seen.note(f"module {path}", [first], result)
                if out is not None and isinstance(result, Tensor):
                    out[path] = id(result)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    read: dict[str, int] = {}
    for path, module in block.named_modules():
        if path in linears:
            watch(path, module, inputs, outputs)
        elif path in skipped:
            watch(path, module, experts, None)
        elif "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            watch(path, module, read, norms)
    matrices = {n: p for n, p in block.named_parameters() if p.ndim == 2 and n.removesuffix(".weight") not in linears}

    def named(state: Mapping[str, Tensor]) -> None:
        seen.matrices = {id(state[name]): name for name in matrices}

    try:
        kinds = tuple({type(block.get_submodule(path)) for path in skipped})
        with seen:
            result, real = outputs_of(block, args, kwargs, main, kinds, named)
    finally:
        for handle in handles:
            handle.remove()
    return result, _found(seen, inputs, outputs, norms, experts, skipped) if real else Reads()


def _found(
    seen: _Trace,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    norms: Mapping[str, int],
    experts: Mapping[str, int],
    skipped: Mapping[str, tuple[str, ...]],
) -> Reads:
    result = Reads()
    by_tensor: dict[int, list[str]] = {}
    for path, tensor in inputs.items():
        by_tensor.setdefault(tensor, []).append(path)
    result.taps = [tuple(paths) for paths in by_tensor.values()]
    for path, tensor in norms.items():
        readers: list[str] = []
        for name, _ in seen.taken.get(tensor, []):
            kind, _, what = name.partition(" ")
            if kind == "module" and what in inputs:
                readers.append(what)
            elif kind == "module" and what in skipped:
                readers += skipped[what]
            elif kind == "matrix":
                readers.append(what.removesuffix(".weight"))
            else:
                break
        else:
            if readers:
                result.norms[path] = tuple(dict.fromkeys(readers))
    for path, tensor in outputs.items():
        taken = seen.taken.get(tensor, [])
        if len(taken) == 1 and taken[0][0] in ("mul", "__mul__", "__rmul__"):
            product = taken[0][1]
            others = [one for one in seen.parents.get(product, []) if one != tensor]
            after = [name.removeprefix("module ") for name, _ in seen.taken.get(product, [])]
            apart = len(others) == 1 and not seen.comes_from(others[0], tensor)
            if apart and len(after) == 1 and after[0] in inputs:
                result.products[path] = after[0]
    for tensor, value in seen.attended.items():
        readers = [p for p, one in inputs.items() if seen.behind(one) == tensor]
        makers = [p for p, one in outputs.items() if one == value]
        if len(readers) == 1 and len(makers) == 1:
            result.values[makers[0]] = readers[0]
    return result


def norm_offset(norm: Any) -> float | None:
    """What a norm adds to its weight before it multiplies by it; None where it does something else with it."""
    width = int(norm.weight.shape[0])
    rows = torch.linspace(-1, 1, width).expand(2, width)

    def out(value: float) -> Tensor:
        state = {name: torch.zeros(tensor.shape) for name, tensor in norm.named_parameters()}
        state["weight"] = torch.full((width,), value)
        with torch.no_grad():
            result: Tensor = torch.func.functional_call(norm, state, (rows,))
        return result

    try:
        zero, one = out(0.0), out(1.0)
    except Exception:  # norms with a second input, such as gates
        return None
    return next((offset for offset in (0.0, 1.0) if torch.allclose(zero, offset * (one - zero), atol=1e-5)), None)
