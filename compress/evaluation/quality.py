"""Quality of a checkpoint: perplexity, and divergence from and agreement with the model it was made from.

Both models run one block at a time, so that any checkpoint can be measured in the memory of its largest block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture.config import context_length, vocabulary
from compress.blockwise.forward import open_streamed, through_all_blocks
from compress.blockwise.stream import Stream
from compress.calibration.data import fingerprint, load_ids
from compress.checkpoint.source import Source
from compress.errors import CheckpointError, OutputError
from compress.evaluation import tasks
from compress.evaluation.intervals import Interval, interval, resampled_means
from compress.evaluation.speed import tokens_per_second
from compress.interop.foreign import open_any
from compress.recipe.data import Data
from compress.report.redaction import LOCAL, cleaned, data_name
from compress.system.device import DTYPES, pick_device
from compress.system.files import write_json
from compress.system.progress import Progress
from compress.system.side_files import read_object

FILE = "evaluation.json"
TOKENS = 8192  # tokens that pass through a block at a time


@dataclass(frozen=True)
class Quality:
    """The values measured; divergence and agreement are None without an original."""

    model: str
    original: str | None
    data: str
    windows: int
    length: int
    ids_sha256: str
    perplexity: float
    perplexity_before: float | None = None
    kl: float | None = None  # mean over positions of KL(original || model), nats
    kl_standard_error: float | None = None  # over windows
    agreement: float | None = None  # share of positions with the same most likely token
    # 95 % intervals by the bootstrap over windows; None with a single window
    perplexity_interval: Interval | None = None
    perplexity_before_interval: Interval | None = None
    perplexity_ratio: float | None = None  # the model's over the original's
    perplexity_ratio_interval: Interval | None = None
    kl_interval: Interval | None = None
    agreement_interval: Interval | None = None
    tasks: dict[str, Any] | None = None  # scores of --tasks
    tokens_per_second: float | None = None
    tokens_per_second_before: float | None = None
    bytes: int = 0
    bytes_before: int | None = None
    dtype: str = "float32"
    device: str = "cpu"

    def plain(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def base_of(model: str) -> str | None:
    """Return the folder that a compressed checkpoint was made from, if it was made on this machine and the folder exists."""
    path = Path(model) / LOCAL
    if not path.is_file():
        return None
    base = read_object(path).get("base_model")
    return base if isinstance(base, str) and Path(base).is_dir() else None


def compare(
    source: Source, original: Source | None, ids: Tensor, dtype: torch.dtype, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Measure a model over windows of ids (windows, length), position by position, against the original if there is one."""
    models = [open_streamed(one, dtype, device) for one in (source, original) if one is not None]
    total = sum(len(model.blocks) for model in models)
    streams: list[Stream] = []
    for model in models:
        before = sum(len(done.blocks) for done in models[: len(streams)])

        def tell(block: int, step: str, share: float, before: int = before) -> None:
            progress(before + block, total, "evaluating", 0.0)

        streams.append(through_all_blocks(model, ids, TOKENS, tell))
    losses: list[list[float]] = [[] for _ in models]
    divergences, agreements = [], []
    with ExitStack() as filled:
        for model in models:
            filled.enter_context(model.embeddings_and_head())
        for index, logs in enumerate(zip(*(s.logs(m) for s, m in zip(streams, models, strict=True)), strict=True)):
            progress(total, total, "comparing", index / ids.shape[0])
            target = ids[index, 1:].to(device)
            for number, log in enumerate(logs):
                losses[number].append(float(-log.gather(1, target.unsqueeze(1)).double().mean()))
            if original is not None:
                q, p = logs
                divergences.append(float((p.exp() * (p - q)).sum(-1).double().mean()))
                agreements.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    return _summed_up(torch.tensor([*losses, divergences, agreements] if original is not None else losses, dtype=torch.float64).T)


def _summed_up(windows: Tensor) -> dict[str, Any]:
    """Reduce values per window to figures with intervals: (windows, 1) losses, or (windows, 4) with the original's losses,
    divergences and agreements."""
    several = windows.shape[0] > 1
    mean, drawn = windows.mean(0), resampled_means(windows) if several else windows[:0]

    def within(values: Tensor) -> Interval | None:
        return interval(values) if several else None

    result: dict[str, Any] = {"perplexity": float(mean[0].exp()), "perplexity_interval": within(drawn[:, 0].exp())}
    if windows.shape[1] > 1:
        result |= {
            "perplexity_before": float(mean[1].exp()),
            "perplexity_before_interval": within(drawn[:, 1].exp()),
            "perplexity_ratio": float((mean[0] - mean[1]).exp()),
            "perplexity_ratio_interval": within((drawn[:, 0] - drawn[:, 1]).exp()),
            "kl": float(mean[2]),
            "kl_standard_error": float(windows[:, 2].std() / windows.shape[0] ** 0.5) if several else None,
            "kl_interval": within(drawn[:, 2]),
            "agreement": float(mean[3]),
            "agreement_interval": within(drawn[:, 3]),
        }
    return result


def measure(
    model: str,
    original: str | None,
    data: Data,
    device: str,
    dtype: str,
    speed: bool,
    progress: Progress,
    wanted: Sequence[str] = (),
    limit: int | None = None,
) -> Quality:
    """Measure a checkpoint on a text and on tasks. Raises CheckpointError, CalibrationError, RecipeError."""
    tasks.split(wanted)  # missing tasks are reported before hours are spent
    where, kind = pick_device(device), DTYPES[dtype]
    source = open_any(model)
    original = original or base_of(model)
    before = open_any(original) if original is not None else None
    if before is not None and vocabulary(before) != vocabulary(source):
        raise CheckpointError(f"{original}: has another vocabulary than {model}; give the model it was made from")
    ids = load_ids(data, source.folder, vocabulary(source), context_length(source), fewer=True)
    values = compare(source, before, ids, kind, where, progress)
    if wanted:
        progress(1, 1, "tasks", 0.0)
        mine = tasks.scores(str(source.folder), wanted, where, limit)
        theirs = tasks.scores(str(before.folder), wanted, where, limit) if before is not None else {}
        values["tasks"] = {
            name: {
                "metric": score["metric"],
                "model": score["value"],
                "before": theirs[name]["value"] if name in theirs else None,
                "standard_error": score["standard_error"],
                "chance": score["chance"],
                "retained": tasks.retained(score["value"], theirs.get(name, {}).get("value"), score["chance"]),
            }
            for name, score in mine.items()
        }
    if speed:
        progress(1, 1, "timing", 0.0)
        values["tokens_per_second"] = tokens_per_second(str(source.folder), where)
        values["tokens_per_second_before"] = None if before is None else tokens_per_second(str(before.folder), where)
    return Quality(
        model=model,
        original=original,
        data=data.name,
        windows=ids.shape[0],
        length=ids.shape[1],
        ids_sha256=fingerprint(ids),
        bytes=source.stored_nbytes,
        bytes_before=None if before is None else before.stored_nbytes,
        dtype=dtype,
        device=where.type,
        **values,
    )


def save(folder: Path, result: Quality) -> None:
    """Save a result next to the weights of a compressed checkpoint, and in its report and model card. Raises OutputError."""
    from compress.report import card

    if not (folder / "summary.json").is_file():
        raise OutputError(f"{folder}: not a checkpoint that compress wrote; a result can only be saved into one")
    values = {**cleaned(result.plain()), "data": data_name(result.data), "measured": time.strftime("%Y-%m-%d")}
    write_json(folder / FILE, values)
    card.write(folder)
