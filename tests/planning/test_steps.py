"""Folding choices into steps: whatever was chosen comes back, site by site."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import times

from compress.planning.steps import fold

DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def names(blocks: int, experts: int) -> list[str]:
    result = []
    for block in range(blocks):
        result += [f"model.layers.{block}.{kind}" for kind in DENSE]
        result += [f"model.layers.{block}.mlp.experts.{e}.{w}" for e in range(experts) for w in ("w1", "w2")]
        result += [f"model.layers.{block}.mlp.shared_experts.down_proj"] if experts else []
    return result


def unfold(steps: list[tuple[int, list[str]]], name: str) -> int | None:
    """First match wins, as in a recipe."""
    return next((c for c, patterns in steps if any(fnmatchcase(name, p) for p in patterns)), None)


@st.composite
def planned(draw: st.DrawFn) -> tuple[dict[str, int], list[str]]:
    sites = names(draw(st.sampled_from([1, 2, 3, 12, 23])), draw(st.sampled_from([0, 0, 3, 11])))
    rule = draw(st.sampled_from(["any", "kind", "block", "one", "mixed"]))
    chance = draw(st.randoms(use_true_random=False))
    table: dict[str, int] = {}
    choices = {}
    for name in sites:
        words = name.split(".")
        key = {"any": name, "kind": words[-1], "block": words[2], "one": ""}.get(
            rule, name if chance.random() < 0.1 else words[-1]
        )
        choices[name] = table.setdefault(key, chance.randrange(4))
    others = draw(st.sampled_from([[], ["lm_head"], ["language_model.lm_head"], ["model.layers.0.self_attn.extra"]]))
    return choices, others


@settings(max_examples=times(37, 150), deadline=None)
@given(planned())
def test_every_choice_comes_back(case: tuple[dict[str, int], list[str]]) -> None:
    choices, others = case
    steps = fold(choices, others)
    assert {name: unfold(steps, name) for name in choices} == choices
    assert [unfold(steps, name) for name in others] == [None] * len(others)
    assert len(steps) == len(set(choices.values()))
    assert all(any(unfold(steps, name) == c for name in choices) for c, _ in steps)


@settings(max_examples=times(12, 50), deadline=None)
@given(st.dictionaries(st.text("ab[]*?!.01-", min_size=1, max_size=6), st.integers(0, 2), min_size=1, max_size=8))
def test_names_that_look_like_globs_are_taken_as_they_are(choices: dict[str, int]) -> None:
    steps = fold(choices)
    assert {name: unfold(steps, name) for name in choices} == choices


def test_the_most_frequent_comes_last_and_takes_the_rest() -> None:
    choices = dict.fromkeys(names(12, 0), 0)
    choices |= {f"model.layers.{b}.self_attn.v_proj": 2 for b in range(12)}
    choices |= {f"model.layers.{b}.mlp.down_proj": 1 for b in (0, 1, 10, 11)}
    assert fold(choices) == [
        (1, ["model.layers.[01].mlp.down_proj", "model.layers.1[01].mlp.down_proj"]),
        (2, ["*.self_attn.v_proj"]),
        (0, ["*.*"]),
    ]


def test_whole_blocks_are_one_pattern() -> None:
    choices = {name: int(".3." in name) for name in names(6, 0)}
    assert fold(choices) == [(1, ["model.layers.3.*"]), (0, ["*.*"])]


def test_no_pattern_takes_what_was_not_planned() -> None:
    choices = dict.fromkeys(names(3, 0), 0)
    ((_, patterns),) = fold(choices, ["language_model.lm_head"])
    assert "*.*" not in patterns
    assert len(patterns) <= len(DENSE)


def test_a_star_that_reaches_over_a_dot_takes_no_more_than_its_own() -> None:
    """`model.layers.*.a.w` also matches `model.layers.0.b.a.w`, which is to be something else."""
    choices = {f"model.layers.{b}.a.w": 1 for b in range(3)} | {f"model.layers.{b}.b.a.w": 0 for b in range(3)}
    choices |= {f"model.layers.{b}.c": 0 for b in range(3)}
    steps = fold(choices)
    assert {name: unfold(steps, name) for name in choices} == choices
    assert steps[0] == (1, ["model.layers.[012].a.w"])
