"""Products of all experts of a block at once, where kernels can."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compress.kernels import experts, weight_only
from compress.kernels.kernel import Laid
from compress.model.expert_loop import ExpertLoop
from compress.runtime.linear import CompressedLinear


class ExpertProducts:
    """What an `ExpertLoop` calls: groups of experts by the name of the matrix, made when it is first used."""

    def __init__(self, loop: ExpertLoop) -> None:
        self.loop = loop
        self._made: dict[str, tuple[list[Laid], list[experts.Group] | None]] = {}

    def __call__(self, name: str, rows: Tensor, starts: Tensor, most: int) -> Tensor | None:
        """Rows (rows, in) sorted by expert -> (rows, out), or None where experts have to run one by one."""
        linears = [self.loop._modules[str(number)]._modules.get(name) for number in range(self.loop.num_experts)]  # type: ignore[union-attr]
        packed = [linear for linear in linears if isinstance(linear, CompressedLinear)]
        if len(packed) < len(linears) or len(rows) >= weight_only.CROSSOVER * len(linears):
            return None
        if any(linear.bias is not None or not experts.takes(linear.kernel(linear.use(rows))) for linear in packed):
            return None
        laid = [linear.lay_out(linear.use(rows)) for linear in packed]
        known, groups = self._made.get(name, ([], None))
        if len(known) != len(laid) or any(a is not b for a, b in zip(known, laid, strict=True)):
            laid, groups = self._grouped(packed, laid)
            self._made[name] = laid, groups
        return None if groups is None else experts.product(rows, starts, groups, most)

    @staticmethod
    def _grouped(linears: Sequence[CompressedLinear], laid: list[Laid]) -> tuple[list[Laid], list[experts.Group] | None]:
        """Bring the weights of experts together, or no groups where they have to run one by one."""
        found = experts.together(laid)
        if found is None:
            return laid, None
        groups, views = found
        for linear, view in zip(linears, views, strict=True):
            linear.hold(view)  # so that the codes are in memory once
        return views, groups
