"""How a model calls its blocks, recorded as it is: which arguments come from the block before, from the tokens, or from neither.

The hidden states between two blocks are one tensor (samples, length, width) wherever they are kept, whatever a block takes and
gives: a tensor of more axes, several of them, or what other blocks or the embeddings made of the tokens. `Calls` packs all of
that into the columns of that one tensor, and unpacks it for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.errors import CheckpointError

_HIGH = 256  # whole numbers are kept as two digits of this base, which bfloat16 holds exactly


@dataclass(frozen=True)
class Piece:
    """One tensor of the hidden states: its shape without samples and length, where these two axes are, and its type."""

    shape: tuple[int, ...]
    axis: int  # of the samples; the length follows
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor, samples: int, length: int, place: str) -> Piece:
        """Describe a tensor. Raises CheckpointError if it does not have an axis of samples before one of length."""
        for axis in range(min(value.ndim - 1, 2)):
            if tuple(value.shape[axis : axis + 2]) == (samples, length):
                return cls((*value.shape[:axis], *value.shape[axis + 2 :]), axis, value.dtype)
        raise CheckpointError(
            f"{place}: takes a tensor {list(value.shape)} that differs from text to text, without axes of samples and length; "
            "this architecture cannot be streamed. A method that needs no text, such as quant/rtn, works without"
        )

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers or truth values."""
        return not self.dtype.is_floating_point

    @property
    def columns(self) -> int:
        """Columns that it takes."""
        return torch.Size(self.shape).numel() * (2 if self.whole else 1)

    def pack(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., samples, length, ...) -> (samples, length, columns)."""
        flat = value.movedim((self.axis, self.axis + 1), (0, 1)).flatten(2) if value.ndim > 2 else value.unsqueeze(2)
        if not self.whole:
            return flat.to(dtype)
        number = flat.long()
        return torch.cat([number.div(_HIGH, rounding_mode="floor"), number.remainder(_HIGH)], dim=2).to(dtype)

    def unpack(self, columns: Tensor) -> Tensor:
        """(samples, length, columns) -> (..., samples, length, ...)."""
        if self.whole:
            high, low = columns.long().chunk(2, dim=2)
            columns = high * _HIGH + low
        value = columns.unflatten(2, self.shape) if self.shape else columns.squeeze(2)
        return value.movedim((0, 1), (self.axis, self.axis + 1)).to(self.dtype)


Key = tuple[int, int]  # the block that gave a tensor, -1 for the embeddings, and its place among what that gave
FIRST: Key = (-1, 0)  # what enters the first block


@dataclass
class Call:
    """One block's call: its arguments, flat, and which of them are hidden states; and what it gives, flat, on meta."""

    leaves: list[Any]
    spec: Any
    inputs: dict[int, Key]
    outputs: list[Any]
    output_spec: Any
    gives: int  # the place of the main hidden state among the outputs

    def arguments(self, values: Mapping[Key, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these hidden states."""
        leaves = [values[self.inputs[n]] if n in self.inputs else leaf for n, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def result(self, values: Mapping[int, Tensor], device: torch.device) -> Any:
        """What it gives, in its own structure, with these tensors at their places, and zeros at others."""
        found = [
            values[n]
            if n in values
            else torch.zeros((), dtype=leaf.dtype, device=device).expand(leaf.shape)
            if isinstance(leaf, Tensor)
            else leaf
            for n, leaf in enumerate(self.outputs)
        ]
        return pytree.tree_unflatten(found, self.output_spec)


Forward = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]  # number of a block, its arguments


@contextmanager
def replaced(blocks: Iterable[Any], forward: Forward) -> Iterator[None]:
    """Within a `with` statement, blocks do this in place of what they do."""

    def bound(number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(number, args, kwargs)

    blocks = list(blocks)
    for number, block in enumerate(blocks):
        block.forward = bound(number)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


Outputs = Callable[[int, tuple[Any, ...], dict[str, Any], Tensor], Any]  # what a block gives, as meta tensors; see `outputs_of`


class Recorder:
    """Takes the place of all blocks, notes how they are called, and gives what has the shape of what they give."""

    def __init__(self, path: str, outputs: Outputs, known: Calls | None = None) -> None:
        self.path, self.outputs, self.known = path, outputs, known
        self.calls: dict[int, Call] = {}
        self.main: Tensor | None = None  # what enters the first block
        self._keys: dict[int, Key] = {}  # of tensors that stand for hidden states, by identity
        self._held: list[Tensor] = []  # so that identities stay theirs
        self._before: Key = FIRST

    def __call__(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note a call."""
        place = f"{self.path}.{number}"
        if number in self.calls:
            raise CheckpointError(f"{place}: is called more than once; this architecture cannot be streamed")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.main is None:
            self.main = kwargs.get("hidden_states", args[0] if args else None)
            if not isinstance(self.main, Tensor):
                raise CheckpointError(f"{place}: its first argument is no tensor; this architecture cannot be streamed")
            self._give(self.main, FIRST)
        inputs = {n: self._keys[id(leaf)] for n, leaf in enumerate(leaves) if id(leaf) in self._keys}
        if self._before not in inputs.values():
            raise CheckpointError(f"{place}: does not take what the block before gives; this architecture cannot be streamed")
        if self.known is not None:
            call = replace(self.known.calls[number], leaves=leaves)
        else:
            outputs, output_spec = pytree.tree_flatten(self.outputs(number, args, kwargs, self.main))
            gives = next((n for n, leaf in enumerate(outputs) if isinstance(leaf, Tensor)), 0)
            call = Call(leaves, spec, inputs, outputs, output_spec, gives)
        self.calls[number], self._before = call, (number, call.gives)
        values = {call.gives: self.main[:]}  # a tensor of its own that takes no memory
        for n, leaf in enumerate(call.outputs):
            if isinstance(leaf, Tensor):
                values.setdefault(n, torch.zeros((), dtype=leaf.dtype, device=self.main.device).expand(leaf.shape))
                self._give(values[n], (number, n))
        return call.result(values, self.main.device)

    def _give(self, value: Tensor, key: Key) -> None:
        self._keys[id(value)] = key
        self._held.append(value)


class Calls:
    """The calls of all blocks for batches of one shape, and the layout of the hidden states between them."""

    def __init__(self, calls: dict[int, Call], pieces: dict[Key, Piece], blocks: int, dtype: torch.dtype) -> None:
        self.calls, self.pieces, self.dtype = calls, pieces, dtype
        self.kept: list[list[Key]] = []  # before each block, and after the last: what is in the packed tensor
        main = FIRST
        for number in range(blocks + 1):
            later = [key for n, call in calls.items() if n >= number for key in call.inputs.values()]
            known = [key for key in dict.fromkeys(later) if key[0] < number and key != main]
            self.kept.append([main, *sorted(known)])
            if number in calls:
                main = number, calls[number].gives
        self.width = max(sum(pieces[key].columns for key in keys) for keys in self.kept)

    @classmethod
    def recorded(cls, path: str, shape: tuple[int, int], mine: Recorder, other: Recorder, blocks: int) -> Calls:
        """Make them of two recordings, for different tokens (samples, length). Raises CheckpointError for what cannot be kept."""
        assert mine.main is not None
        samples, length = shape
        pieces = {FIRST: Piece.of(mine.main, samples, length, f"{path}.0")}
        from_tokens: dict[int, Key] = {}  # by identity
        for number, call in mine.calls.items():
            for n, leaf in enumerate(call.leaves):
                if n in call.inputs or not isinstance(leaf, Tensor) or torch.equal(leaf, other.calls[number].leaves[n]):
                    continue
                key = from_tokens.setdefault(id(leaf), (-1, 1 + len(from_tokens)))
                pieces[key] = Piece.of(leaf, samples, length, f"{path}.{number}")
                call.inputs[n] = key
        read = {key for call in mine.calls.values() for key in call.inputs.values()}
        for number, call in mine.calls.items():
            for n, leaf in enumerate(call.outputs):
                if (number, n) in read or n == call.gives:
                    pieces[number, n] = Piece.of(leaf, samples, length, f"{path}.{number}")
            call.leaves = [None if n in call.inputs else leaf for n, leaf in enumerate(call.leaves)]
        return cls(mine.calls, pieces, blocks, mine.main.dtype)

    def entering(self, recorder: Recorder) -> dict[Key, Tensor]:
        """What the blocks take of a batch that does not come from blocks."""
        assert recorder.main is not None
        values = {FIRST: recorder.main}
        for number, call in self.calls.items():
            leaves = recorder.calls[number].leaves
            values |= {key: leaves[n] for n, key in call.inputs.items() if key[0] < 0 and key not in values}
        return values

    def pack(self, number: int, values: Mapping[Key, Tensor]) -> Tensor:
        """What is kept before block `number` -> (samples, length, width)."""
        parts = [self.pieces[key].pack(values[key], self.dtype) for key in self.kept[number]]
        missing = self.width - sum(part.shape[2] for part in parts)
        if len(parts) == 1 and not missing:
            return parts[0]
        return torch.cat([*parts, parts[0].new_zeros(*parts[0].shape[:2], missing)], dim=2)

    def unpack(self, number: int, hidden: Tensor) -> dict[Key, Tensor]:
        """(samples, length, width) -> what is kept before block `number`."""
        result, start = {}, 0
        for key in self.kept[number]:
            piece = self.pieces[key]
            result[key] = piece.unpack(hidden[:, :, start : start + piece.columns])
            start += piece.columns
        return result

    def run(self, number: int, hidden: Tensor, block: Callable[..., Any]) -> Tensor:
        """Call block `number` on packed hidden states, and pack what it gives; one that the model does not call leaves them."""
        values = self.unpack(number, hidden)
        if number in self.calls:
            args, kwargs = self.calls[number].arguments(values)
            outputs, _ = pytree.tree_flatten(block(*args, **kwargs))
            values |= {(number, n): value for n, value in enumerate(outputs) if isinstance(value, Tensor)}
        return self.pack(number + 1, values)

    def at_the_end(self, hidden: Tensor) -> Forward:
        """What takes the place of the blocks so that the last one gives these packed hidden states."""
        last = max(self.calls)
        values = {n: value for (number, n), value in self.unpack(len(self.kept) - 1, hidden).items() if number == last}

        def forward(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.calls[number].result(values if number == last else {}, hidden.device)

        return forward


def outputs_of(
    block: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    main: Tensor,
    skipped: tuple[type, ...],
    tell: Callable[[Mapping[str, Tensor]], None] = lambda state: None,
) -> tuple[Any, bool]:
    """What a block gives for these arguments, as meta tensors, and whether a call showed it; else it is what its code says of it.

    Modules of the classes `skipped` return their input there. `tell` is given the parameters that the block is called with.
    """

    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    replacement = block.__dict__.pop("forward", None)
    inner = [module for module in block.modules() if isinstance(module, skipped)]
    for module in inner:
        module.forward = lambda hidden, *_: torch.empty_like(hidden)
    try:
        state = {name: moved(tensor) for name, tensor in (*block.named_parameters(), *block.named_buffers())}
        given = pytree.tree_map(moved, (tuple(args), dict(kwargs)))
        tell(state)
        with torch.no_grad():
            return torch.func.functional_call(block, state, *given), True
    except Exception:  # what depends on values cannot be called on meta, and says so in many ways
        several = "tuple" in str(type(block).forward.__annotations__.get("return", "")).lower()
        one = torch.empty_like(main, device="meta")
        return (one,) if several else one, False
    finally:
        for module in inner:
            del module.forward
        if replacement is not None:
            block.forward = replacement
