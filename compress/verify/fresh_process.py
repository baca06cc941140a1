"""The last step of a run: a fresh process loads the result as a user would and repeats one batch.

The process starts while the checkpoint is being written, so that the run does not wait for most of its cost, importing torch and
transformers. Its losses are compared with those that the run measured in another way, one block at a time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import VerificationError
from compress.system import memory

_START = "from compress.verify import fresh_process; fresh_process.serve()"
_ROOT = Path(__file__).parent.parent.parent
_LIBRARIES = 1 << 30  # bytes that Python, torch and transformers take in a process of their own
Ask = Callable[[dict[str, Any]], dict[str, Any]]


def load_and_run(request: dict[str, Any]) -> dict[str, Any]:
    """Load `folder` with transformers in `dtype` on `device` and return the losses of `ids` in nats, and time and memory."""
    import torch
    import transformers

    from compress.architecture.config import sees
    from compress.system.device import DTYPES

    start = time.perf_counter()
    device = torch.device(request["device"])
    ids = torch.tensor([request["ids"]], device=device)
    config = json.loads((Path(request["folder"]) / "config.json").read_text(encoding="utf-8"))
    build = transformers.AutoModelForImageTextToText if sees(config) else transformers.AutoModelForCausalLM
    model: Any = build.from_pretrained(request["folder"], dtype=DTYPES[request["dtype"]]).eval()
    model.to(device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return {
        "losses": losses.tolist(),
        "seconds": time.perf_counter() - start,
        "peak_memory": memory.peak(),
        "device": device.type,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def serve() -> None:
    """Answer one request, a line of JSON on standard input, with a line on standard output; runs in the child process."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    line = sys.stdin.readline()
    if line:  # no request comes if the run has failed in the meantime
        print(json.dumps(load_and_run(json.loads(line))), flush=True)


@contextmanager
def fresh_process() -> Iterator[Ask]:
    """Start an interpreter that shares nothing with this one; yield a function that sends it a request and returns the answer.

    The answer is {"error": ...} where loading failed.
    """
    path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],  # -P: nothing is imported from the folder it runs in
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            answer, _ = child.communicate(json.dumps(request) + "\n")
            if child.returncode == 0:
                found: dict[str, Any] = json.loads(answer.splitlines()[-1])
                return found
            said.seek(0)
            lines = [line.strip() for line in said.read().splitlines() if line.strip()]
            errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]  # the last line of a traceback
            return {"error": (errors or lines or [f"ended by signal {-child.returncode}"])[-1][:400]}

        try:
            yield ask
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None and not stream.closed:
                    stream.close()


@contextmanager
def not_at_all() -> Iterator[None]:
    """A stand-in for `fresh_process` where the check is switched off."""
    yield None


def check(
    ask: Ask | None, folder: Path, ids: Sequence[int], losses: Sequence[float], dtype: str, device: str, size: int, limit: float
) -> dict[str, Any]:
    """Return the summary's entry on the reload; {"skipped": reason} where it was not done. Raises VerificationError.

    `losses` (nats) are those that the run measured for `ids`, `limit` is the largest mean difference from them, and `size` the
    bytes of the checkpoint.
    """
    if ask is None:
        return {"skipped": "it was switched off"}
    if (room := memory.available()) is not None and size + _LIBRARIES > room:
        return {"skipped": f"loading needs about {(size + _LIBRARIES) >> 20} MiB and {room >> 20} MiB of memory are free"}
    answer = ask({"folder": str(folder.absolute()), "ids": list(ids), "dtype": dtype, "device": device})
    if "error" in answer:
        raise VerificationError(
            f"{folder}: a fresh process cannot load what was written: {answer['error']}. It is not published; its parts are "
            "kept. --no-reload goes on without this check"
        )
    theirs = answer.pop("losses")
    difference = sum(abs(a - b) for a, b in zip(theirs, losses, strict=True)) / max(len(losses), 1)
    if not difference <= limit:
        raise VerificationError(
            f"{folder}: loaded with transformers {answer['transformers']}, the losses of one batch differ by {difference:.3g} "
            f"nats in the mean from those of the run; expected at most {limit}. The result is not published; please report this"
        )
    return {"tokens": len(ids), "mean_difference_nats": difference, **answer}
