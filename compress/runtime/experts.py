"""Products of all experts of a block at once, where kernels can."""

from __future__ import annotations

from torch import Tensor

from compress.calibration.experts import ExpertLoop
from compress.errors import KernelError
from compress.kernels import experts, weight_only
from compress.kernels._weights import Tiles
from compress.runtime.linear import CompressedLinear


class ExpertProducts:
    """What an `ExpertLoop` calls: groups of experts by the name of the matrix, made when it is first used."""

    def __init__(self, loop: ExpertLoop) -> None:
        self.loop = loop
        self._made: dict[str, tuple[list[Tiles], list[experts.Group] | None]] = {}

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
        tiles = [linear.plain_tiles for linear in packed]
        known, groups = self._made.get(name, ([], None))
        if len(known) != len(tiles) or any(a is not b for a, b in zip(known, tiles, strict=True)):
            whole = [one for one in tiles if one is not None]
            try:
                groups = experts.group(dict(enumerate(whole))) if len(whole) == len(tiles) else None
            except KernelError:  # scattered columns: one by one
                groups = None
            self._made[name] = whole, groups
        return None if groups is None else experts.matmul(rows, starts, groups, most)
