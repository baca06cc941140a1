"""From a choice for every weight to few steps of a recipe: globs where they say the same, names where they do not."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import translate

Choices = dict[str, int]  # site name -> number of its candidate


def fold(choices: Choices, others: Iterable[str] = ()) -> list[tuple[int, list[str]]]:
    """Return (candidate, patterns) in the order of a recipe's steps: with the first match winning, each name gets its choice.

    `others` are names that no pattern may match. The most frequent candidate comes last, so that it can take what is left.
    """
    others = [name for name in others if name not in choices]
    left = dict(choices)
    steps = []
    counts = Counter(choices.values())
    for candidate in sorted(counts, key=lambda c: (counts[c], c)):
        mine = [name for name, c in choices.items() if c == candidate]
        if len(left) == len(mine) and not _hits("*.*", others) and len(_hits("*.*", mine)) == len(mine):
            patterns = ["*.*"]
        else:
            patterns = _cover(mine, [name for name, c in left.items() if c != candidate] + others)
        steps.append((candidate, patterns))
        for name in mine:
            del left[name]
    return steps


def _hits(pattern: str, names: Sequence[str]) -> list[str]:
    match = re.compile(translate(pattern)).match
    return [name for name in names if match(name)]


def _cover(mine: Sequence[str], foreign: Sequence[str]) -> list[str]:
    """Patterns that match all of `mine` and none of `foreign`, the widest first."""
    waiting = dict.fromkeys(mine)
    patterns = []
    everywhere = Counter(kind for name in (*mine, *foreign) for kind in _wider(name))
    for pattern, count in Counter(kind for name in mine for kind in _wider(name)).most_common():
        if count < 2 or everywhere[pattern] != count:
            continue  # one name says it as well; or a name like these is foreign
        if (found := _hits(pattern, list(waiting))) and len(found) > 1 and not _hits(pattern, foreign):
            patterns.append(pattern)
            for name in found:
                del waiting[name]
    return patterns + _numbers(list(waiting))


def _wider(name: str) -> list[str]:
    """Globs that a name is one of many of: any block, any expert, all of a module, all of a block."""
    words = name.split(".")
    numbers = [k for k, word in enumerate(words) if word.isdigit()]
    starred = {tuple("*" if k in chosen else glob.escape(w) for k, w in enumerate(words)) for chosen in _subsets(numbers)}
    kinds = {".".join(pattern) for pattern in starred}
    if numbers:
        first = numbers[0]
        kinds.add("*." + ".".join("*" if w.isdigit() else glob.escape(w) for w in words[first + 1 :]))
        kinds |= {".".join(map(glob.escape, words[: k + 1])) + ".*" for k in range(first, len(words) - 1)}
    return sorted(kinds)


def _subsets(numbers: Sequence[int]) -> list[set[int]]:
    """All subsets but the empty one, of the first two."""
    found = [{k} for k in numbers[:2]]
    return [*found, set(numbers[:2])] if len(found) == 2 else found


def _numbers(names: Sequence[str]) -> list[str]:
    """Names that differ in the last digit of their first number, as one pattern with a set of digits."""
    groups: dict[tuple[str, str], list[str]] = {}
    order: list[tuple[str, str]] = []
    for name in names:
        words = name.split(".")
        at = next((k for k, word in enumerate(words) if word.isdigit()), None)
        head, digit = ("", "") if at is None else (".".join([*words[:at], words[at][:-1]]), words[at][-1])
        tail = name if at is None else ".".join(["", *words[at + 1 :]])
        key = (head, tail)
        order += [key] if key not in groups else []
        groups.setdefault(key, []).append(digit)
    patterns = []
    for head, tail in order:
        digits = "".join(sorted(groups[head, tail]))
        patterns.append(glob.escape(head) + (f"[{digits}]" if len(digits) > 1 else digits) + glob.escape(tail))
    return patterns
