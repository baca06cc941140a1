"""Statistics that a transform has taken, used again where only scales moved: equal to those that would be observed anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import compress as run
from runs import steps

from compress.calibration.statistics import Hessian
from compress.report.rows import read_rows
from compress.runs.pipeline import Settings

Tiny = Callable[..., Path]
EQUALIZE = [{"method": "transform/equalize"}]


def test_a_divided_hessian_is_that_of_divided_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, scales = torch.randn(40, 6, generator=generator), torch.rand(6, generator=generator) + 0.5
    whole, divided = Hessian(6, torch.device("cpu")), Hessian(6, torch.device("cpu"))
    whole.add(rows)
    divided.add(rows / scales)
    assert whole.divided(scales).tokens == 40
    torch.testing.assert_close(whole.divided(scales).matrix(), divided.matrix())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_run_gives_the_errors_of_one_that_observes_again(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    errors = []
    for memory in (1 << 30, 1):  # with a byte every tensor is observed in a pass of its own, and nothing is kept
        out = tmp_path / str(memory)
        run(
            tiny(family),
            out,
            ids,
            steps("quant/gptq", bits=3, group_size=16),
            transforms=EQUALIZE,
            settings=Settings(memory=memory),
        )
        rows = read_rows(out / "report.jsonl")
        assert any(row.notes["transform/equalize"].get("strength") for row in rows)
        errors.append([row.error for row in rows])
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
