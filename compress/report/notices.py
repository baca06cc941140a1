"""What a user should know of a checkpoint before using it, in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from compress.report import charts
from compress.report.rows import SiteRow
from compress.report.summary import Checkpoint, counted, worst_first
from compress.system.files import human_bytes


@dataclass(frozen=True)
class Notice:
    """A sentence that a user should read before using the checkpoint."""

    text: str
    serious: bool = True


def fallbacks(rows: Sequence[SiteRow]) -> list[str]:
    """Say for each kind of fallback how many weights took it and where."""
    groups: dict[str, list[SiteRow]] = {}
    for row in rows:
        if row.fallback is not None:
            groups.setdefault(re.sub(r":\s*\d+ of \d+ tokens", "", row.fallback), []).append(row)
    sentences = []
    for text, members in groups.items():
        experts = len({(row.block, row.expert) for row in members if row.expert is not None})
        blocks = charts.ranges({row.block for row in members if row.block is not None})
        where = [counted(len(members), "matrix", "matrices"), *([counted(experts, "expert")] if experts else [])]
        where += [f"blocks {blocks}" if "-" in blocks or "," in blocks else f"block {blocks}"] if blocks else ["the head"]
        sentences.append(f"{text}: {', '.join(where)}")
    return sentences


def _tokens_notices(c: Checkpoint) -> list[Notice]:
    """What calibration did not reach."""
    found, s = [], c.summary
    if s["fallbacks"]:
        few = [row.tokens for row in c.rows if row.fallback is not None and row.tokens is not None]
        seen = f" These saw {min(few):,} to {max(few):,} calibration tokens." if few else ""
        text = f"{s['fallbacks']:,} of {s['sites']:,} matrices were compressed by a fallback, not as the recipe asks.{seen}"
        found.append(Notice(text))
    if cold := {(row.block, row.expert) for row in c.rows if row.expert is not None and row.tokens == 0}:
        blocks = len({block for block, _ in cold})
        found.append(Notice(f"No calibration token reached {counted(len(cold), 'expert')} in {counted(blocks, 'block')}."))
    if dead := sum(bool(row.notes.get("dead_columns")) for row in c.rows):
        text = f"{counted(dead, 'matrix', 'matrices')} had input columns that were zero on all calibration tokens."
        found.append(Notice(text + " Nothing is known about how these are used.", False))
    return found


def _massive_notices(c: Checkpoint) -> list[Notice]:
    """What stands out of the hidden states."""
    seen = c.summary.get("massive") or []  # older checkpoints have no entry
    if not seen:
        return []
    top = max(seen, key=lambda one: abs(one["value"]))
    places = charts.ranges({one["block"] for one in seen})
    text = (
        f"The model has massive activations: {top['value']:,.0f} in channel {top['channel']} of token {top['position']} (id "
        f"{top['token']}) before block {top['block']}, where the median magnitude is {top['median']:.3g}; before "
        f"{'blocks' if len(seen) > 1 else 'block'} {places} values are over a thousand times the median."
    )
    return [Notice(text, False)]


def _size_notices(c: Checkpoint) -> list[Notice]:
    """Why the file is not smaller."""
    found = []
    text = c.config.get("text_config") or c.config
    if text.get("tie_word_embeddings") is False and c.rows and all(row.block is not None for row in c.rows):
        size = int(text.get("vocab_size", 0)) * int(text.get("hidden_size", 0))
        how = f" ({charts.compact(size)} weights)" if size else ""
        sentence = f"The output head{how}, not tied to the embeddings, was left as it was: no step of the recipe takes it."
        found.append(Notice(sentence, False))
    after, untouched = c.summary["bytes_after"], c.summary["bytes_after"] - c.compressed_bytes
    if c.rows and untouched > 0.2 * after:
        sentence = f"{untouched / after:.0%} of the file, {human_bytes(untouched)}, was copied as it was, such as embeddings."
        found.append(Notice(sentence, False))
    return found


def notices(c: Checkpoint) -> list[Notice]:
    """What a user should know before using the checkpoint, in sentences."""
    found = []
    if c.evaluation is None:
        found.append(Notice("Quality was not measured. Measure it with compress eval before you rely on this checkpoint."))
    elif c.calibration is not None and c.evaluation["ids_sha256"] == c.calibration.sha256:
        found.append(Notice("Quality was measured on the calibration data itself, so it looks better than it is on other text."))
    if kind := c.summary.get("decoded_from"):
        found.append(Notice(f"The original is stored in {kind}; it was decoded to bfloat16 before it was compressed.", False))
    found += _tokens_notices(c) + _massive_notices(c) + _size_notices(c)
    if c.rows:
        errors = [charts.ordered(row.error) for row in c.rows]
        worst, middle = worst_first(c.rows)[0], median(errors)
        times = f", {worst.error / middle:.1f} times the median" if 0 < middle < math.inf and worst.error > middle else ""
        found.append(Notice(f"The largest error is that of {worst.site}: {worst.error:.3g}{times}.", False))
        if bad := sum(error >= 1 for error in errors):
            few = counted(bad, "matrix has", "matrices have")
            found.append(Notice(f"{few} an error of 1 or more: zeros in their place would be no worse."))
    return found
