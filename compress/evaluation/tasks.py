"""Tasks, run by lm-eval: they show what perplexity does not, such as whether a model still finds a fact in its prompt.

Tasks are local, a folder of YAML files and their data, so that they run offline; lm-eval's own tasks work by name where their
data can be fetched.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress.errors import CalibrationError, RecipeError

_METRICS = ("acc_norm", "acc", "exact_match", "f1", "rouge", "bleu")  # the first of these that a task has is shown
Scores = dict[str, dict[str, Any]]


def split(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the folders that hold tasks, and the names of tasks; a folder gives all that its YAML files name."""
    import yaml

    folders, names = [], []
    for item in wanted:
        path = Path(item)
        if not path.exists():
            if os.sep in item or path.suffix in (".yaml", ".yml"):
                raise RecipeError(f"--tasks {item}: no such file or folder; expected task files in YAML, or names of lm-eval's")
            names.append(item)
            continue
        files = [path] if path.is_file() else sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        found = []
        for file in files:
            try:
                values = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise RecipeError(f"--tasks {file}: cannot be read ({error}); expected a task of lm-eval in YAML") from error
            if isinstance(values, dict) and isinstance(values.get("task"), str):
                found.append(values["task"])
        if not found:
            raise RecipeError(f"--tasks {item}: holds no task; expected YAML files with `task:`, as lm-eval reads them")
        folders.append(str(path if path.is_dir() else path.parent))
        names += found
    return folders, names


def scores(model: str, wanted: Sequence[str], device: torch.device, limit: int | None = None, batch: int = 8) -> Scores:
    """Return each task's metric, value, standard error and chance level, for the checkpoint in a folder. Raises RecipeError."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f"--tasks: lm-eval is not installed ({error}); pip install 'compress-llm[eval]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders, names = split(wanted)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    loaded.to(device)
    adapter = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=batch)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    places = [place for path in folders for place in (str(Path(path).absolute()),)]
    try:
        # lm-eval prints while it works; this process's standard output is for its own readers.
        with contextlib.redirect_stdout(io.StringIO()), _within(places):
            manager = TaskManager(include_path=places or None, include_defaults=len(names) > 0 and not places)
            found = simple_evaluate(
                model=adapter, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=100, verbosity="ERROR"
            )
    except (OSError, KeyError, ValueError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"--tasks {', '.join(wanted)}: lm-eval cannot run them ({first}); check the task files") from error
    return {
        name: _primary(values)
        | {"chance": _chance(found.get("configs", {}).get(name, {}), found.get("samples", {}).get(name, []))}
        for name, values in sorted(found["results"].items())
    }


def _chance(config: dict[str, Any], samples: Sequence[dict[str, Any]]) -> float:
    """The score of guessing: the mean of one over the number of endings to choose from; 0 where text is generated."""
    if config.get("output_type") != "multiple_choice" or not samples:
        return 0.0
    return sum(1 / max(len(sample["resps"]), 1) for sample in samples) / len(samples)


def retained(value: float, before: float | None, chance: float) -> float | None:
    """The share of the original's score above chance that is retained, (value - chance) / (before - chance) (LLM-KICK).

    None where the original does not beat chance, or was not measured.
    """
    return None if before is None or before <= chance else (value - chance) / (before - chance)


@contextlib.contextmanager
def _within(places: Sequence[str]) -> Any:
    """Run in the folder of the tasks where there is one: their YAML names data relative to it."""
    before = os.getcwd()
    if len(places) == 1:
        os.chdir(places[0])
    try:
        yield
    finally:
        os.chdir(before)


def _primary(values: dict[str, Any]) -> dict[str, Any]:
    """The metric shown for a task, with its value and standard error."""
    known = {key.partition(",")[0]: (key, value) for key, value in values.items() if isinstance(value, float | int)}
    known = {name: pair for name, pair in known.items() if not name.endswith("_stderr")}
    metric = next((name for name in _METRICS if name in known), next(iter(known), ""))
    if not metric:
        return {"metric": "none", "value": float("nan"), "standard_error": None}
    key, value = known[metric]
    error = values.get(key.replace(metric, f"{metric}_stderr", 1))
    return {"metric": metric, "value": float(value), "standard_error": float(error) if isinstance(error, float | int) else None}
