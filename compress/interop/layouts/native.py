"""The native format as a target of conversions: what another tool has written becomes a checkpoint of ours, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import packing, site_table
from compress.weights.weight import CompressedWeight

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Native:
    """The layout of `compress.packed`."""

    name = "native"
    holds = "everything"
    scales: tuple[str, ...] = ()

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> packing.Spec:
        """Return how a described site is stored: as described."""
        return dict(spec)

    def layout(self, scheme: packing.Spec) -> Layout:
        """Return dtype and shape of the tensors of a site."""
        return packing.layout(scheme)

    def tensors(self, scheme: packing.Spec, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site."""
        return packing.pack(weight)[0]

    def config(self, schemes: Mapping[str, packing.Spec], dense: Sequence[str], head: str) -> dict[str, Any]:
        """Return `quantization_config`; the guard is the weight of the first site, which is stored empty."""
        return site_table.write_table(schemes, f"{next(iter(schemes))}.weight")

    def files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return JSON files beside config.json: none."""
        return {}


EXPORT = Native()
