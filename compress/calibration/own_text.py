"""Calibration text that the model itself writes: windows sampled token by token from its predictions, at temperature 1.

A plain text begins as the tokenizer begins one, or after a token that ends a text, which is then left out. With a chat template
a window is a conversation: the template opens a turn of the user, the model writes it, the template opens the answer, and so on;
a turn ends where the model ends it, or after `TURN` tokens if it is the user's (sampling the user's turn is Magpie's idea, Xu et
al. 2024). `TOGETHER` windows are written at once, one forward pass per token with a cache of keys and values, so the whole model
has to be in memory. Tokens are drawn on the CPU from one seeded generator.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.system import memory
from compress.system.device import pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TURN = 128  # tokens of a user's turn at most
TOGETHER = 64  # windows that are written at once: their keys and values are in memory
MARKS = ("\u27e6first\u27e7", "\u27e6second\u27e7", "\u27e6third\u27e7")  # stand for contents while a template is taken apart


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around contents, as token ids."""

    opening: list[int]  # before the first content of a user
    answer: list[int]  # between a user's content and the answer
    question: list[int]  # between an answer and the next content of a user


def write(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    samples: int,
    length: int,
    chat: bool | None,
    generator: torch.Generator,
) -> Tensor:
    """Return windows (samples, length) int64 that the model in `folder` writes; `prefix` are the ids before every text.

    `chat`: whether with the chat template; None: if there is one. Raises CalibrationError for a model that does not fit into
    memory, and for a template that is asked for and not there.
    """
    turns = None if chat is False else turns_of(tokenizer)
    if chat and turns is None:
        raise CalibrationError(
            f"chat_template: true, but {folder} has no template with turns of user and assistant; leave it out"
        )
    start = [] if turns is None else turns.opening
    if turns is not None and prefix and start[: len(prefix)] != prefix:
        start = [*prefix, *start]
    start = start or prefix
    before = [] if start else [_any_start(tokenizer)]  # not part of the windows
    model = _loaded(folder)
    ends = _ends(model, tokenizer)
    with torch.no_grad():
        parts = [
            _written(model, [*before, *start], min(TOGETHER, samples - first), length + len(before), turns, ends, generator)
            for first in range(0, samples, TOGETHER)
        ]
    logger.info("self: the model wrote %d windows of %d tokens", samples, length)
    return torch.cat(parts)[:, len(before) :]


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Take the tokenizer's chat template apart; None where there is none, or none with turns of user and assistant."""
    if not tokenizer.chat_template:
        return None
    import jinja2

    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    try:
        asked = str(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
    if any(mark not in whole for mark in MARKS) or MARKS[0] not in asked:
        return None
    opening, _, answer = asked.partition(MARKS[0])
    question = whole.partition(MARKS[1])[2].partition(MARKS[2])[0]
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (opening, answer, question)]
    return Turns(*pieces) if all(pieces) else None


def _any_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token behind which a text begins."""
    known = (tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return next(int(token) for token in known if token is not None)


def _loaded(folder: Path) -> Any:
    """The model, in float32 on a CPU. Raises CalibrationError."""
    from transformers import AutoModelForCausalLM

    device = pick_device("auto")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * (1 if device.type == "cuda" else 2)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available()
    if free is not None and size > free:
        raise CalibrationError(
            f"--data self: the whole model needs {size / 1e9:.1f} GB of memory to write its text, and {free / 1e9:.1f} GB are "
            "free; use --data builtin, or a file"
        )
    dtype = "auto" if device.type == "cuda" else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, local_files_only=True
        )
        return model.to(device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CalibrationError(
            f"--data self: transformers cannot load {folder} ({str(error).splitlines()[0]}); use --data builtin, or a file"
        ) from error


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = found if isinstance(found, list) else [found]
    return sorted({int(token) for token in (*named, tokenizer.eos_token_id) if token is not None})


def _written(
    model: Any, start: list[int], count: int, length: int, turns: Turns | None, ends: list[int], generator: torch.Generator
) -> Tensor:
    """Write windows (count, length) that all begin with `start`."""
    ids = torch.tensor(start[:length]).expand(count, -1)
    forced: list[list[int]] = [[] for _ in range(count)]  # tokens of the template that come next
    asking, said = [True] * count, [0] * count  # whose turn it is, and its tokens so far
    column, cache = ids, None
    while ids.shape[1] < length:
        found = model(input_ids=column.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = found.past_key_values
        drawn = torch.multinomial(found.logits[:, -1].float().cpu().softmax(-1), 1, generator=generator)[:, 0].tolist()
        for row, token in enumerate(drawn):
            if forced[row]:
                drawn[row] = forced[row].pop(0)
            elif turns is not None and (token in ends or (asking[row] and said[row] >= TURN)):
                follows = turns.answer if asking[row] else turns.question
                drawn[row], forced[row] = follows[0], follows[1:]
                asking[row], said[row] = not asking[row], 0
            else:
                said[row] += 1
        column = torch.tensor(drawn)[:, None]
        ids = torch.cat([ids, column], dim=1)
    return ids
