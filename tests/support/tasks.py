"""Small tasks as lm-eval reads them, made for a tokenizer and a model: what perplexity hides.

cloze      which of two endings goes on from a sentence, the right one or its words in another order (knowledge)
retrieval  a line `key: value` among others in the prompt, asked for at the end (context)
copying    a sentence in the prompt, to be said again (summaries that keep to their text)
agreement  what the original model says next, word for word (generation)
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _generated(tokens: int) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": False}],
    }


def write_tasks(folder: Path, model: Path, texts: list[str], count: int = 12, tokens: int = 6) -> Path:
    """Write the four tasks, `count` documents each, made of `texts` and of what the model in a folder says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    texts = [" ".join(text.split()[:24]) for text in texts if len(text.split()) >= 24][:count]
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})

    def task(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder.absolute() / f"{name}.jsonl")}},
            "test_split": "test",
            "target_delimiter": "",
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    cloze = []
    for text in texts:
        half = text.split()
        ends = [" " + " ".join(half[12:]), " " + " ".join(draw.sample(half[12:], len(half[12:])))]
        label = draw.randrange(2)
        cloze.append({"text": " ".join(half[:12]), "choices": ends if label == 0 else ends[::-1], "label": label})
    task("cloze", _CHOICE, cloze)
    retrieval = []
    for _ in range(count):
        keys, values = draw.sample(words, 4), draw.sample(words, 4)
        lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
        asked = draw.randrange(4)
        prompt = "\n".join([*lines, *lines, f"{keys[asked]}:"])
        retrieval.append({"text": prompt, "choices": [f" {value}" for value in values], "label": asked})
    task("retrieval", _CHOICE, retrieval)
    copying = []
    for number, text in enumerate(texts):
        other = texts[(number + 1) % len(texts)]
        ends = [text, other]
        label = draw.randrange(2)
        prompt = f"{text}\n\n{text}\n\n"
        copying.append({"text": prompt, "choices": ends if label == 0 else ends[::-1], "label": label})
    task("copying", _CHOICE, copying)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    agreement = []
    for text in texts:
        given = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            said = dense.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        agreement.append({"text": text, "answer": tokenizer.decode(said[0, given["input_ids"].shape[1] :])})
    task("agreement", _generated(tokens), agreement)
    return folder
