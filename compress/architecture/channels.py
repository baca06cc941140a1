"""Which rows of a matrix are of which channel: what stays of a layout where channels go, and where they change places."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.architecture.family import Rows


def channel_rows(layout: Rows, channels: int) -> Tensor:
    """Return the rows (parts, channels) that each channel has in a matrix of this layout."""
    channel = torch.arange(channels)
    if layout == "one":
        return channel.unsqueeze(0)
    if layout == "halves":
        return torch.stack([channel, channel + channels])
    return torch.stack([2 * channel, 2 * channel + 1])


def rows_left(layout: Rows, channels: int, kept: Tensor) -> Tensor:
    """Return the rows, in order, of a matrix in which these of so many channels stay, in ascending order."""
    return channel_rows(layout, channels)[:, kept.cpu()].flatten().sort().values.to(kept.device)
