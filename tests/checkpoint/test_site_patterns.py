"""Site names folded into patterns and back: nothing is lost or invented, and hostile patterns are refused."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import PROCESSOR, quickly
from table_damage import any_names, spec

from compress.checkpoint.site_table import fold, read_table, unfold
from compress.errors import FormatError

fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def unfolded(patterns: list[str]) -> list[str]:
    return [name for pattern in patterns for name in unfold(pattern)]


def check_fold(names: set[str]) -> list[str]:
    patterns = fold(sorted(names))
    assert sorted(unfolded(patterns)) == sorted(names)  # each once
    assert sorted(unfolded(fold(reversed(sorted(names))))) == sorted(names)
    return patterns


@fuzz
@given(names=any_names)
def test_folding_loses_and_invents_nothing(names: set[str]) -> None:
    check_fold(names)


@fuzz
@given(
    layers=st.integers(1, 6),
    experts=st.integers(1, 9),
    gone=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 8), st.sampled_from(["up", "down"]))),
)
def test_folding_experts(layers: int, experts: int, gone: set[tuple[int, int, str]]) -> None:
    whole = {(layer, expert, kind) for layer in range(layers) for expert in range(experts) for kind in ("up", "down")}
    patterns = check_fold({f"model.layers.{layer}.experts.{expert}.{kind}" for layer, expert, kind in whole - gone})
    if not whole & gone:
        assert len(patterns) == 2


def test_folded_names_look_as_documented() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(32) for expert in (0, 1, 2, 5)]
    assert fold(names) == ["model.layers.{0-31}.mlp.experts.{0-2,5}.up_proj"]
    assert fold(["lm_head"]) == ["lm_head"]
    assert fold([]) == []
    assert unfold("a.{3,1-2}.b{0}c") == ["a.3.b0c", "a.1.b0c", "a.2.b0c"]
    assert unfold("") == [""]


@pytest.mark.parametrize("name", ["a{", "a}", "a.{0-1}", "{}"])
def test_names_with_braces_cannot_be_folded(name: str) -> None:
    with pytest.raises(FormatError, match="braces"):
        fold(["model.layers.0.q_proj", name])


HOSTILE_PATTERNS = [
    "a.{0-99999999}",
    "a.{0-9999999}",
    "a.{0-9999999}.{0-9999999}",
    "a" + ".{0-999}" * 3,
    "a" + ".{0-1}" * 100,
    "a" + ".{0-9999999}" * 1000,
    "a" + ".{0}" * 100_000,
    "a.{" + ",".join(["0-9999999"] * 100_000) + "}",
    "a.{" + "1" * 1_000_000 + "}",
    "a.{" + "0," * 100_000 + "0}}",
    "n" * 1_000_000,
    "n" * 1_000_000 + ".{0-9}",
    "{{0-1}}",
    "{0-{1-2}}",
    "a.{0-1",
    "a.0-1}",
    "a.}{",
    "{}",
    "{,}",
    "{0,}",
    "{,0}",
    "{-}",
    "{-1}",
    "{1-}",
    "{1--2}",
    "{1-2-3}",
    "{5-3}",
    "{a}",
    "{0x1}",
    "{1.0}",
    "{1_0}",
    "{ 1}",
    "{1 }",
    "{1\n}",
    "{+1}",
    "{٣}",
    "{²}",
    "{1,٣-٤}",
]


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS, ids=lambda p: p[:20].encode("ascii", "backslashreplace").decode())
def test_hostile_patterns(pattern: str) -> None:
    with quickly(nbytes=(16 << 20) + 100 * len(pattern), timer=PROCESSOR), pytest.raises(FormatError) as caught:
        unfold(pattern)
    assert len(str(caught.value)) < 300
    with quickly(20.0, timer=PROCESSOR), pytest.raises(FormatError):
        read_table({"format_version": 1, "specs": [spec()], "sites": {"b": 0, pattern: 0}})


@fuzz
@given(pattern=st.text(alphabet="a.{}0129-,", max_size=30) | st.text(max_size=10))
def test_fuzzed_patterns(pattern: str) -> None:
    try:
        with quickly(timer=PROCESSOR):
            names = unfold(pattern, 5000)
    except FormatError:
        return
    assert 1 <= len(names) <= 5000
    assert all("{" not in name and "}" not in name for name in names)
    if len(set(names)) == len(names):  # what it stands for can be written again
        check_fold(set(names))
