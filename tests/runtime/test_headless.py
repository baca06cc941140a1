"""`AutoModel` and other classes without the language model's head load compressed checkpoints, equal to the model within."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compress as run
from runs import steps
from thorough import some
from tiny import VOCABULARY
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import compress  # noqa: F401  registers the format

Tiny = Callable[..., Path]
PROBE = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
CLEAN = ("missing_keys", "mismatched_keys", "error_msgs")


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint in 4 bits, head included where it is a weight of its own."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("headless") / family
            run(tiny(family), made[family], None, steps("quant/rtn", match="*", bits=4, group_size=-1))
        return made[family]

    return get


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(PROBE).last_hidden_state)


@pytest.mark.parametrize("family", some(["llama", "gpt2", "opt", "gemma3", "mixtral", "gpt_oss"], "llama", "gpt_oss"))
def test_the_model_within_is_the_same(family: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    folder = packed(family)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in CLEAN), info
    assert all(name.startswith("lm_head") for name in info["unexpected_keys"])
    assert any(type(module).__name__ == "CompressedLinear" for module in model.modules())
    expected = hidden(whole.base_model)
    assert torch.equal(hidden(model), expected)
    model.save_pretrained(tmp_path / "again")
    again, info = AutoModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[kind] for kind in CLEAN), info
    assert torch.equal(hidden(again), expected)


def test_a_classifier_has_a_new_head_and_nothing_else(packed: Callable[[str], Path]) -> None:
    folder = packed("llama")
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert torch.equal(hidden(model.model), hidden(AutoModel.from_pretrained(folder)))
