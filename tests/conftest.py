"""Fixtures for all tests: everything runs offline, on the CPU, on models made on the fly."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


@pytest.fixture(autouse=True)
def reload_in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs load their result in the process of the tests, unless a test is marked `fresh_process`: that takes seconds."""
    from compress.verify import fresh_process as reload

    @contextmanager
    def here() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
        yield reload.load_and_run

    if "fresh_process" not in request.keywords:
        monkeypatch.setattr(reload, "fresh_process", here)


@pytest.fixture(autouse=True)
def without_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts out of reports and plans; the tests of reports have them, and those that are marked `charts`."""
    if "report" not in request.path.parts and "charts" not in request.keywords:
        from charts import leave_out

        leave_out(monkeypatch.setattr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU, or minutes, and say why."""
    import torch

    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU that torch sees")
    slow = pytest.mark.skip(reason="takes minutes; set COMPRESS_SLOW=1")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not os.environ.get("COMPRESS_SLOW"):
            item.add_marker(slow)


@pytest.fixture(autouse=True)
def tables_as_wide_as_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take COLUMNS out of the environment, which worker processes of the tests have."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the folder of a tiny checkpoint of a family; the same settings give the same folder."""
    from tiny import tiny_checkpoint
    from transformers.utils import logging

    logging.disable_progress_bar()
    made: dict[str, Path] = {}

    def get(family: str, **settings: object) -> Path:
        key = f"{family} {sorted(settings.items())}"
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(family), family, **settings)
        return made[key]

    return get


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs a command line in this process and says how it ended."""
    from command_line import command

    return partial(command, monkeypatch, capsys)


@pytest.fixture(scope="session")
def forks() -> Any:
    """A context whose processes are forked from one that has imported everything, so that each starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    # Until Python 3.13 the server does not take over sys.path, and does not say so when it fails to preload.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "support"), prepend=os.pathsep)
        process = context.Process(target=print)
        process.start()
        process.join()
    return context


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of calibration ids for the tiny models' vocabulary."""
    from runs import ids_file

    return ids_file(tmp_path_factory.mktemp("data") / "ids.npy")
