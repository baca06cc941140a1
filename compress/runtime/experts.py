"""Products of all experts of a block at once, where kernels can."""

from __future__ import annotations

from torch import Tensor

from compress.errors import KernelError
from compress.kernels import experts, weight_only
from compress.kernels._weights import Tiles
from compress.model.expert_loop import ExpertLoop
from compress.runtime.linear import CompressedLinear


class ExpertProducts:
    """What an `ExpertLoop` calls: groups of experts by the name of the matrix, made when it is first used."""

    def __init__(self, loop: ExpertLoop) -> None:
        self.loop = loop
        self._made: dict[str, tuple[list[Tiles | None], list[experts.Group] | None]] = {}

    def __call__(self, name: str, rows: Tensor, starts: Tensor, most: int) -> Tensor | None:
        """Rows (rows, in) sorted by expert -> (rows, out), or None where experts have to run one by one."""
        linears = [self.loop._modules[str(number)]._modules.get(name) for number in range(self.loop.num_experts)]  # type: ignore[union-attr]
        packed = [linear for linear in linears if isinstance(linear, CompressedLinear)]
        if len(packed) < len(linears) or len(rows) >= weight_only.CROSSOVER * len(linears):
            return None
        if any(linear.path(rows) != "weight_only" for linear in packed):
            return None
        for linear in packed:
            linear.lay_out()
        known, groups = self._made.get(name, ([], None))
        tiles = [linear.plain_tiles for linear in packed]
        if len(known) != len(tiles) or any(a is not b for a, b in zip(known, tiles, strict=True)):
            groups = self._grouped(packed)
            self._made[name] = [linear.plain_tiles for linear in packed], groups
        return None if groups is None else experts.product(rows, starts, groups, most)

    @staticmethod
    def _grouped(linears: list[CompressedLinear]) -> list[experts.Group] | None:
        """Bring the weights of experts together, or None where they have to run one by one."""
        tiles = {number: linear.plain_tiles for number, linear in enumerate(linears)}
        plain = {number: one for number, one in tiles.items() if one is not None}
        if len(plain) < len(tiles):
            return None
        try:
            groups = experts.group(plain)
        except KernelError:  # scattered columns
            return None
        for one in groups:
            for number, view in one.tiles.items():
                linears[number].share(view)
        return groups
