"""Specs of packed sites, and random damage to what holds them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from compress.checkpoint import packing


def spec(bits: int = 4, rows: int = 64, columns: int = 64, size: int = 32, **more: Any) -> packing.Spec:
    return {"shape": [rows, columns], "base": {"format": "bitpack", "bits": bits, "group_size": size, "zero": False, **more}}


numbers = st.integers(-2, 70) | st.sampled_from([2**31, 2**63, 2**64, 10**4000])


odd = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.sampled_from(["", "a", "bitpack", "U8", "_bits", "a.{0-1}.q", "h", "\ud800"])
)


anything = st.recursive(odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


def damage(value: Any, data: st.DataObject) -> Any:
    """Change one value somewhere inside: replaced, removed, or joined by another."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 9)) > 0:
        key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        kind = data.draw(st.sampled_from(["inside", "inside", "inside", "remove", "add"]))
        if kind == "inside":
            value[key] = damage(value[key], data)
        elif kind == "remove":
            del value[key]
        elif isinstance(value, dict):
            value[data.draw(st.text(max_size=3) | st.sampled_from(sorted(value)))] = data.draw(anything)
        else:
            value.append(data.draw(anything))
        return value
    return data.draw(anything)


words = st.sampled_from(
    ["model", "q_proj", "#", "", "-", "1-2", "0,1", "00", "007", "+1", "1_0", " 1", "1 ", "-1", "1.5", "٣", "²", "½", "1e3"]
)

long = st.sampled_from(["9999999", "10000000", "1" * 20, "1" * 900])

pieces = st.integers(0, 12).map(str) | words | long

any_names = st.sets(st.lists(pieces, min_size=1, max_size=4).map(".".join).filter(lambda name: len(name) < 990), max_size=30)
