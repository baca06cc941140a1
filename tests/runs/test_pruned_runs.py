"""Pruned models from end to end: run, load with transformers, save and load again, inspect, verify."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, TESTS
from roundtrip import assert_round_trip
from runs import compress, digests, ids_file, steps
from thorough import some

from compress.checkpoint.packed_source import PackedSource
from compress.inspection.contents import contents
from compress.report.rows import read_rows
from compress.verify.verify import verify

CASES: dict[str, dict[str, Any]] = {
    "matrix": {"sparsity": 0.6},
    "rows": {"sparsity": 0.5, "within": "row"},
    "2:4": {"pattern": "2:4"},
    "runs": {"sparsity": 0.5, "group": 8},
    "matrix, 4 bits": {"sparsity": 0.5, "bits": 4, "group_size": 16},
    "2:4, 3 bits": {"pattern": "2:4", "bits": 3, "group_size": 32, "symmetric": False},
    "rows of runs, 4 bits": {"group": 8, "within": "row", "bits": 4, "group_size": 8},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_pruned_model_loads_as_it_was_streamed(options: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    assert_round_trip(tiny("llama"), tmp_path, None, steps("prune/magnitude", **options))
    source = PackedSource.open_packed(tmp_path / "out")
    for row in read_rows(tmp_path / "out" / "report.jsonl"):
        decoded = source.compressed(row.site)
        assert decoded.sparsity == row.notes["sparsity"]
        assert 0.4 <= row.notes["sparsity"] <= 0.61
        assert not decoded.dequantize()[~decoded.keep.mask()].any()
    verify(tmp_path / "out", "cpu", lambda *_: None)
    stored = {kind.stored for kind in contents(str(tmp_path / "out")).kinds}
    wanted = options.get("pattern") or "mask"
    assert any(wanted in text for text in stored)


@pytest.mark.parametrize("family", some(["gpt2", "opt", "mixtral", "gpt_oss"], "gpt2", "gpt_oss"))
def test_families_and_experts(family: str, tiny: Any, tmp_path: Path) -> None:
    data = ids_file(tmp_path / "ids.npy")
    assert_round_trip(tiny(family), tmp_path, data, steps("prune/magnitude", pattern="2:4", update=True))


def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(tiny: Any, ids: Path, tmp_path: Path) -> None:
    """Killed at the middle of what an uninterrupted run writes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS / "support")])}
    code = (
        "import sys; from pathlib import Path; from runs import killed_at, steps; event, model, out, data = sys.argv[1:]\n"
        "killed_at(int(event), Path(model), Path(out), Path(data), steps('prune/alps', pattern='2:4', bits=3, group_size=16), {})"
    )

    def run(event: int, out: Path) -> int:
        command = [sys.executable, "-c", code, str(event), str(tiny("llama")), str(out), str(ids)]
        return subprocess.run(command, env=environment, check=False).returncode

    assert run(0, tmp_path / "whole") == 0
    events = int((tmp_path / "whole.events").read_text())
    out = tmp_path / "killed"
    assert run(events // 2, out) != 0
    assert not out.exists()
    compress(tiny("llama"), out, ids, steps("prune/alps", pattern="2:4", bits=3, group_size=16))
    assert digests(out) == digests(tmp_path / "whole")
