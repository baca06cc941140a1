"""The native format as a target of conversions: what another tool has written becomes a checkpoint of ours, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from compress.checkpoint import packing, site_table
from compress.interop.layout import Layout, Tensors
from compress.weights.weight import CompressedWeight


class Native(Layout[packing.Spec]):
    """The layout of checkpoints that `compress` makes."""

    name = "native"
    holds = "everything"
    readers = "transformers, after `pip install compress-llm` and `import compress`"
    own = True

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> packing.Spec:
        """Return how a described site is stored: as described."""
        return dict(spec)

    def layout(self, scheme: packing.Spec) -> Tensors:
        """Return dtype and shape of the tensors of a site."""
        return packing.layout(scheme)

    def tensors(self, scheme: packing.Spec, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site."""
        return packing.pack(weight)[0]

    def scale_of(self, scheme: packing.Spec) -> str:
        """Return the dtype of a site's scales."""
        return str(scheme["base"].get("scale", "BF16"))

    def config(self, schemes: Mapping[str, packing.Spec], dense: Sequence[str], head: str) -> dict[str, Any]:
        """Return `quantization_config`; the guard is the weight of the first site, which is stored empty."""
        return site_table.write_table(schemes, f"{next(iter(schemes))}.weight")

    def model_config(self, original: Mapping[str, Any], table: dict[str, Any]) -> dict[str, Any]:
        """Return config.json, which names a file that programs without the package look for in vain."""
        return site_table.config_with(original, table)


EXPORT = Native()
