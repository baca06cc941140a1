"""How long a run still takes: as predicted in the beginning, then at its own pace."""

from __future__ import annotations

import pytest
from rich.progress import Progress

from compress.screen import progress
from compress.screen.progress import _TimeLeft, seconds_left


def test_what_was_predicted_gives_way_to_what_is_measured() -> None:
    """Ten blocks said to take 10 s each, which take 40 s on a machine that is busy."""
    assert seconds_left(0, 0, 10, 10) == pytest.approx(100)
    assert seconds_left(40, 1, 9, 10) == pytest.approx(9 * 30)
    assert seconds_left(160, 4, 6, 10) == pytest.approx(6 * 40, rel=0.1)
    assert seconds_left(360, 9, 1, 10) == pytest.approx(40, rel=0.05)
    assert seconds_left(400, 10, 0, 10) == 0


def test_without_a_prediction_the_pace_alone_counts() -> None:
    assert seconds_left(0, 0, 10, None) is None
    assert seconds_left(5, 0, 10, None) is None
    assert seconds_left(40, 2, 8, None) == pytest.approx(160)


def test_lines_say_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress(False, 20.0) as listen:
        for block in range(2):
            listen(block, 2, "loading", 0.0)
            listen(block, 2, "calibrating", 0.5)
            now[0] += 30
        listen(2, 2, "writing", 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("peak")[1] for line in lines] == [", about 20.0 s left)", ", about 23.3 s left)", ")"]
    with progress.show_progress(False) as listen:
        listen(0, 2, "calibrating", 0.5)
    assert "left" not in capsys.readouterr().err


@pytest.mark.parametrize(("done", "shown"), [(0.0, "1:40 left"), (1.0, ""), (1.5, "")])
def test_what_comes_after_the_last_block_has_no_time_left(done: float, shown: str) -> None:
    """Checks at the end report shares beyond the last block: no time is less than none."""
    bar = Progress()
    task = bar.add_task("", total=1.0, completed=done, begun=0.0, blocks=1, predicted=100.0)
    assert str(_TimeLeft().render(bar.tasks[task])) == shown
