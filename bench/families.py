"""Which models of transformers work: a tiny one of each type is looked at, quantized with and without text, and loaded again.

    python bench/families.py [TYPE ...] [--state FILE] [--again] [--failed]

Every causal and image-text type of the installed transformers, or those that are named. Each is built with random weights,
shown by `inspect`, quantized at 8 bits in groups of 32 by quant/rtn and quant/gptq, loaded with transformers, and its logits are
compared with the original's. What is done is kept in FILE and skipped the next time; `--failed` tries again what did not work,
`--again` all.
Prints a table with the first line of what fails. Each type runs in a process of its own: a fault in one stops no other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
STEPS = ("build", "inspect", "rtn", "gptq")
# Of the norm of the original's logits: 8 bits change less, also where tokens go to other experts; a wrong weight changes more.
NEAR = 0.3
SECONDS = 240


def types() -> list[str]:
    """Every causal and image-text model type of the installed transformers."""
    from transformers.models.auto import modeling_auto as names

    return sorted({*names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def logits(folder: Path) -> Any:
    """Logits of a fixed batch, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    ids = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    seeing = "vision_config" in json.loads((folder / "config.json").read_text())
    build: Any = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    loaded, said = build.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(said[kind])[:3] for kind in ("missing_keys", "mismatched_keys") if said.get(kind)}
    if wrong:
        raise RuntimeError(f"transformers loads it with {wrong}")
    with torch.no_grad():
        return loaded.eval()(input_ids=ids, use_cache=False).logits.float()


def quantized(model: Path, out: Path, method: str, data: Path, expected: Any) -> str:
    """Quantize and load again; return what is worth saying."""
    from compress import api

    options = api.RunOptions(reload=False)
    recipe = api.quantization_recipe(
        method, {"bits": 8, "group_size": 32}, data=str(data) if method == "gptq" else None, dtype="float32"
    )
    found = api.run(recipe, str(model), str(out), options=options)
    difference = float((logits(out) - expected).norm() / expected.norm())
    if not difference < NEAR:
        raise RuntimeError(f"logits differ by {difference:.2g} from the original's")
    return f"{found.summary['sites']} weights, {difference:.1g}"


def attempt(model_type: str, folder: Path) -> dict[str, str]:
    """Take one type through all steps; {step: "ok ..." or the first line of the error}."""
    import numpy as np
    import torch
    from any_tiny import any_checkpoint

    from compress.inspection.contents import contents

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model, data = folder / "model", folder / "ids.npy"
    np.save(data, np.random.default_rng(0).integers(1, 96, (8, 32)))
    found: dict[str, str] = {}
    expected: list[Any] = []

    def build() -> str:
        any_checkpoint(model, model_type)
        expected.append(logits(model))
        return ""

    steps: dict[str, Callable[[], str]] = {
        "build": build,
        "inspect": lambda: f"{contents(str(model)).other_tensors} others",
        "rtn": lambda: quantized(model, folder / "rtn", "rtn", data, expected[0]),
        "gptq": lambda: quantized(model, folder / "gptq", "gptq", data, expected[0]),
    }
    for name, step in steps.items():
        try:
            found[name] = f"ok {step()}".strip()
        except Exception as error:  # whatever a model of someone else's raises is the result
            text = " ".join((str(error) or type(error).__name__).replace(str(folder), "").split())
            found[name] = f"{type(error).__name__}: {text}"[:400]
            if name == "build":
                break
    return found


def _child(model_type: str, send: Any) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        send.send(attempt(model_type, Path(folder)))


def apart(model_type: str) -> dict[str, str]:
    """`attempt` in a process of its own, which is ended if it takes too long."""
    context = get_context("fork")  # what this process has imported need not be imported again
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(model_type, send))
    child.start()
    send.close()
    try:
        return dict(receive.recv()) if receive.poll(SECONDS) else {"build": f"takes more than {SECONDS} seconds"}
    except EOFError:
        return {"build": "the process ended without an answer"}
    finally:
        child.kill()
        child.join()


def works(found: dict[str, str]) -> bool:
    """Whether all steps did."""
    return all(found.get(step, "").startswith("ok") for step in STEPS)


def table(state: dict[str, dict[str, str]]) -> str:
    """What works, and for the rest the first step that fails and its message."""
    lines = [f"{sum(map(works, state.values()))} of {len(state)} types work"]
    lines.append("works: " + " ".join(name for name in sorted(state) if works(state[name])))
    for name in sorted(state):
        failed = next((step for step in STEPS if not state[name].get(step, "").startswith("ok")), None)
        if failed is not None:
            lines.append(f"{name:24} {failed:8} {state[name].get(failed, 'not tried')}")
    return "\n".join(lines)


def main() -> None:
    """Try what is not tried yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--state", type=Path, default=Path("families.json"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--failed", action="store_true")
    given = parser.parse_args()
    state: dict[str, dict[str, str]] = json.loads(given.state.read_text()) if given.state.exists() else {}
    wanted = given.types or types()

    import torch
    import transformers  # noqa: F401  before the fork

    import compress.runs.prepared  # noqa: F401

    torch.set_num_threads(1)
    for name in wanted:
        if name in state and not (given.again or (given.failed and not works(state[name]))):
            continue
        start = time.perf_counter()
        state[name] = apart(name)
        given.state.write_text(json.dumps(state, indent=1))
        failed = next((f"{step}: {said}" for step, said in state[name].items() if not said.startswith("ok")), "ok")
        print(f"{name} {time.perf_counter() - start:.1f} s {failed}", flush=True)
    print(table({name: state[name] for name in wanted if name in state}))


if __name__ == "__main__":
    main()
