"""Experts one by one: the only place that knows how transformers calls the experts of a block.

transformers 5 holds all experts of a block in 3-D parameters and runs them fused, where hooks on linears see nothing.
`ExpertLoop` takes the place of such a module: it has a linear per expert and matrix, named as on disk, and gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.architecture.family import Experts
from compress.errors import CheckpointError

# Products of all experts at once: the matrix's name, rows sorted by expert, where those of each begin, the most that one can
# have; None where experts have to run one by one.
Products = Callable[[str, Tensor, Tensor, int], Tensor | None]
MakeLinear = Callable[[int, str, int, int], nn.Module | None]  # expert, name, in, out; None: stays part of the fused tensor


class ExpertLoop(nn.Module):
    """Runs experts in turn over the tokens that were routed to them.

    `experts` is the fused module (on meta): its sizes, activation and gate are kept, its weights are let go.
    """

    def __init__(self, experts: nn.Module, layout: Experts, make: MakeLinear) -> None:
        super().__init__()
        self.layout = layout
        transposed = is_transposed(experts)
        joined, down = _sizes(experts, transposed)  # rows of the joined inputs; (out, in) of the output
        width = joined // len(layout.inputs)
        self.num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        self.transposed = transposed
        fused = set()
        for expert in range(self.num_experts):
            linears = nn.Module()
            for name, rows, columns in (*((name, width, down[0]) for name in layout.inputs), (layout.output, *down)):
                linear = make(expert, name, columns, rows)
                if linear is None:
                    fused.add(name)
                else:
                    linears.add_module(name, linear)
            self.add_module(str(expert), linears)
        gone = dict(experts.named_parameters(recurse=False))
        for name, parameter in gone.items():
            delattr(experts, name)
            if name.endswith("_bias") or name in fused:  # biases stay joined, as they are on disk
                self.register_parameter(name, parameter)
        self.listener: Callable[[int, Tensor], None] | None = None  # told each expert's outputs (tokens, width) as they count
        self.products: Products | None = None  # set where the model runs, if anything is faster than experts in turn
        # A bound method, so that the emptied module is kept without becoming a child with state of its own.
        gated = hasattr(experts, "gate_up_proj") or "gate_up_proj" in gone
        self.apply_gate: Callable[[Tensor], Tensor] = _gate(experts) if gated else experts.act_fn  # type: ignore[assignment]

    def linear(self, expert: int, name: str) -> nn.Module:
        """One matrix of one expert."""
        return self.get_submodule(f"{expert}.{name}")

    def _product(self, expert: int, name: str, rows: Tensor) -> Tensor:
        fused = self._parameters.get(name)
        if fused is None:
            result: Tensor = self.linear(expert, name)(rows)
            return result
        return rows @ (fused[expert] if self.transposed else fused[expert].T)

    def _run(self, expert: int, rows: Tensor) -> Tensor:
        outputs = [self._product(expert, name, rows) for name in self.layout.inputs]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if (bias := getattr(self, f"{self.layout.inputs[0]}_bias", None)) is not None:
            joined = joined + bias[expert]
        result = self._product(expert, self.layout.output, self.apply_gate(joined))
        if (bias := getattr(self, f"{self.layout.output}_bias", None)) is not None:
            result = result + bias[expert]
        return result

    def forward(self, hidden: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """hidden (tokens, width), index and weights (tokens, experts per token) -> (tokens, width).

        Without an index, hidden (experts * tokens, width) has the rows of each expert, and so has the result.
        """
        if index is None or weights is None:
            own = hidden.view(self.num_experts, -1, hidden.shape[-1])
            return torch.cat([self._run(expert, rows) for expert, rows in enumerate(own)])
        if self.products is not None and hidden.is_cuda:
            together = self.together(hidden, index, weights, self.products)
            if together is not None:
                return together
        output = torch.zeros_like(hidden)
        # One sort brings the tokens of each expert together; within an expert they keep their order.
        flat = index.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        tokens = order // index.shape[1]
        scales = weights.flatten()[order]
        start = 0
        for expert, count in enumerate(counts[: self.num_experts]):
            if count == 0:
                continue
            mine = tokens[start : start + count]
            result = self._run(expert, hidden[mine]) * scales[start : start + count, None]
            if self.listener is not None:
                self.listener(expert, result)
            output.index_add_(0, mine, result.to(output.dtype))
            start += count
        return output

    def together(self, hidden: Tensor, index: Tensor, weights: Tensor, products: Products) -> Tensor | None:
        """As `forward`, by products of all experts at once and with nothing read back from the device; None if that cannot be."""
        flat, most = index.flatten(), hidden.shape[0]
        order = torch.argsort(flat, stable=True)
        experts = flat[order]
        starts = torch.searchsorted(experts, torch.arange(self.num_experts + 1, device=flat.device, dtype=flat.dtype)).int()
        own = experts.clamp(max=self.num_experts - 1)
        rows = hidden[order // index.shape[1]]
        outputs = []
        for name in self.layout.inputs:
            if (one := products(name, rows, starts, most)) is None:
                return None
            outputs.append(one)
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if (bias := getattr(self, f"{self.layout.inputs[0]}_bias", None)) is not None:
            joined = joined + bias[own]
        if (result := products(self.layout.output, self.apply_gate(joined), starts, most)) is None:
            return None
        if (bias := getattr(self, f"{self.layout.output}_bias", None)) is not None:
            result = result + bias[own]
        # An index beyond the last expert is that of none.
        scales = torch.where(experts < self.num_experts, weights.flatten()[order], 0)
        places = torch.argsort(order)
        scaled = (result * scales.unsqueeze(1))[places].view(*index.shape, -1)
        return scaled.sum(1, dtype=torch.float32).to(hidden.dtype)


def is_transposed(experts: nn.Module) -> bool:
    """Whether a fused module holds its parameters (experts, in, out)."""
    stated = getattr(experts, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    parameters = dict(experts.named_parameters(recurse=False))
    if "gate_up_proj" not in parameters or "down_proj" not in parameters:
        return False
    joined, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
    return (joined[2], joined[1]) != (down[1], 2 * down[2]) and (joined[1], joined[2]) == (down[2], 2 * down[1])


def _gate(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """What is between the two products of an expert: the module's own, or the usual product of two halves."""
    if hasattr(experts, "_apply_gate"):
        own: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
        return own

    def apply(joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        result: Tensor = experts.act_fn(gate) * up  # type: ignore[operator]
        return result

    return apply


def _sizes(experts: nn.Module, transposed: bool) -> tuple[int, tuple[int, int]]:
    parameters = dict(experts.named_parameters(recurse=False))
    first = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    if (
        first not in parameters
        or "down_proj" not in parameters
        or not (hasattr(experts, "_apply_gate") or hasattr(experts, "act_fn"))
    ):
        raise CheckpointError(
            f"{type(experts).__name__}: holds {', '.join(parameters) or 'no parameters'}; expected gate_up_proj and "
            "down_proj, as in the tested range of transformers. Install a version in that range"
        )
    joined, down = parameters[first].shape, parameters["down_proj"].shape
    return (joined[2], (down[2], down[1])) if transposed else (joined[1], (down[1], down[2]))
