"""Options that all methods of pruning share: what a recipe or a command line says of them, and what is announced."""

from __future__ import annotations

import pytest
import yaml
from options import bits_known

from compress.methods.prune.alps import METHOD as ALPS
from compress.methods.prune.wanda import METHOD as WANDA
from compress.methods.pruning import Pruning
from compress.methods.solvers.mask_selection import Target
from compress.planning.candidates import parse_candidates


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "8:16", "3:4"])
def test_a_pattern_without_quotes_is_not_a_time(text: str) -> None:
    """YAML 1.1 reads 2:4 as 124 seconds."""
    assert isinstance(yaml.safe_load(text), int)
    assert WANDA(pattern=yaml.safe_load(text)).pattern == text
    found = parse_candidates([f"prune/alps:pattern={text},bits=4"])
    assert found[0].build == ALPS(pattern=text, bits=4)


def test_targets() -> None:
    assert WANDA().target == Target(0.5, None, 1, "row")
    assert ALPS(sparsity=0.7, group=8, within="row").target == Target(0.7, None, 8, "row")
    assert ALPS(pattern="1:4").target == Target(0.75, (1, 4))
    assert ALPS(sparsity=0.0).target.pruned(10) == 0


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"pattern": "2:4", "dtype": "bfloat16"}, 0.75 + 8),
        ({"pattern": "2:4", "dtype": "float32"}, 0.75 + 16),
        ({"pattern": "8:16", "dtype": "float16"}, 1 + 8),
        ({"sparsity": 0.75, "dtype": "bfloat16"}, 1 + 4),
        ({"sparsity": 0.5, "group": 16, "dtype": "bfloat16"}, 1 / 16 + 8),
        ({"pattern": "2:4", "bits": 4, "group_size": 128}, 0.75 + 2 + 16 / 128),
        ({"pattern": "2:4", "bits": 4, "group_size": 64, "symmetric": False}, 0.75 + 2 + 20 / 64),
        ({"sparsity": 0.5, "group": 16, "bits": 4, "group_size": 16}, 1 / 16 + 2 + 0.5),
        ({"sparsity": 0.5, "group": 32, "bits": 4, "group_size": 16}, 1 / 32 + 2 + 0.5),
        ({"sparsity": 0.25, "bits": 3, "group_size": -1}, 1 + 2.25 + 16 / 1024),
    ],
)
def test_announced_sizes_by_hand(options: dict[str, object], bits: float) -> None:
    assert bits_known(WANDA(**options), (256, 1024)) == bits * 256 * 1024


def test_sizes_that_depend_on_values_are_likely_ones() -> None:
    unknown: list[Pruning] = [
        WANDA(),  # the type of the values
        ALPS(dtype="bfloat16"),  # where rows differ
        WANDA(bits=4, group_size=16),  # whether a group loses all its weights
    ]
    for method in unknown:
        assert bits_known(method, (256, 1024)) is None
    assert WANDA().describe((256, 1024)).likely == 9 * 256 * 1024
    assert ALPS(dtype="bfloat16").describe((256, 1024)).likely == 9 * 256 * 1024 + 32 * 9
    assert ALPS(bits=4).describe((256, 1024)).likely == (1 + 2 + 0.125) * 256 * 1024 + 32 * 9 + 8 * 16 * 4
