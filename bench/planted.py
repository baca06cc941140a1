"""Variants of Llama-style models that compute the same function with the activations of larger models.

python bench/planted.py MODEL DEST outliers:40:0
python bench/planted.py MODEL DEST sink:1000:0

outliers:FACTOR:SEED: six channels of every norm are larger, by 0.5 to 1.5 times the factor, and the linears that read them
smaller.

sink:FACTOR:SEED: the first token has massive activations. The model becomes 64 channels and 64 neurons wider. Sixty-one channels
are split into two halves of equal energy, and three are new: the token bos alone has something in one of them, which a neuron of
the first block turns into plus and minus FACTOR times the median hidden state in the other two; a neuron of the last block takes
it away. What the normalization shrinks at this token is made up for in the columns of the new channels, which no other token
sees. So all logits are the original's wherever bos stands in front and nowhere else.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

PLANTS = ("outliers", "sink")
CHANNELS = 6  # of each norm that become outliers
WIDER = 64  # channels and neurons that a model with a sink has more of
PLUS, MINUS, MARK = -1, -2, -3  # origins of the new channels: the massive two, and the one that bos alone has
FIRED = 10  # times the factor: the sink's neuron over the median neuron


def plant(model: Path, dest: Path, name: str) -> None:
    """Write the variant `name` of a model, in float32, to the folder `dest`."""
    kind, factor, seed = name.split(":")
    generator = torch.Generator().manual_seed(int(seed))
    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    with torch.no_grad():
        made = {"outliers": outliers, "sink": sink}[kind](loaded, float(factor), generator)
    made.save_pretrained(str(dest))
    AutoTokenizer.from_pretrained(str(model)).save_pretrained(str(dest))


def readers(layer: Any) -> list[tuple[str, list[str]]]:
    """The norms of a layer, each with the linears that read it."""
    return [
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ]


def outliers(model: Any, factor: float, generator: torch.Generator) -> Any:
    """Scale channels of every norm up and the columns of the linears that read it down."""
    for layer in model.model.layers:
        for norm, linears in readers(layer):
            weight = layer.get_submodule(norm).weight
            chosen = torch.randperm(weight.numel(), generator=generator)[:CHANNELS]
            scale = factor * torch.rand(CHANNELS, generator=generator).add(0.5)
            weight[chosen] *= scale
            for name in linears:
                layer.get_submodule(name).weight[:, chosen] /= scale
    return model


@dataclass(frozen=True)
class Wider:
    """New channels as shares of old ones: the value of channel i is `share[i]` times that of channel `origin[i]`."""

    origin: Tensor  # negative: a new channel
    share: Tensor  # 0 for new ones

    @classmethod
    def of(cls, width: int, more: int, new: list[int], generator: torch.Generator) -> Wider:
        """Split as many channels as with the new ones make `more`, and mix them all."""
        twice = torch.randperm(width, generator=generator)[: more - len(new)]
        origin = torch.cat([torch.arange(width), twice, torch.tensor(new)])
        origin = origin[torch.randperm(len(origin), generator=generator)]
        share = torch.where(torch.isin(origin, twice), 0.5**0.5, 1.0)
        return cls(origin, share * (origin >= 0))

    def of_columns(self, weight: Tensor) -> Tensor:
        """Spread the last axis."""
        return weight[..., self.origin.clamp_min(0)] * self.share

    def at(self, origin: int) -> int:
        """Where a new channel stands."""
        return int((self.origin == origin).nonzero()[0])


@dataclass(frozen=True)
class Seen:
    """What the original computes at a bos that stands alone, and how large its values are on other tokens."""

    before: dict[str, Tensor]  # of each norm, by its name: its input
    after: dict[str, Tensor]  # its output
    hidden: float  # median magnitude of the hidden state after the first block
    neuron: float  # of the input of down_proj

    @classmethod
    def by(cls, model: Any, bos: int, generator: torch.Generator) -> Seen:
        """Run the model over bos, and over random tokens for the magnitudes."""
        before, after, sizes = {}, {}, {}
        norms = [(name, module) for name, module in model.named_modules() if name.endswith("norm")]

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                before[name], after[name] = args[0][0, -1].clone(), output[0, -1].clone()

            return hook

        def size(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[module] = float(args[0].abs().median())

        handles = [module.register_forward_hook(keep(name)) for name, module in norms]
        model(torch.tensor([[bos]]))
        for handle in handles:
            handle.remove()
        layers = model.model.layers
        watched = [layers[1].input_layernorm.register_forward_pre_hook(size)]
        watched += [layer.mlp.down_proj.register_forward_pre_hook(size) for layer in layers]
        model(torch.randint(0, model.config.vocab_size, (4, 64), generator=generator))
        for handle in watched:
            handle.remove()
        neurons = [sizes[layer.mlp.down_proj] for layer in layers]
        return cls(before, after, sizes[layers[1].input_layernorm], sum(neurons) / len(neurons))


def sink(model: Any, factor: float, generator: torch.Generator, more: int = WIDER) -> Any:
    """Make the hidden state of bos massive in two channels, from the first block to the last, in a model `more` wider."""
    config, bos = model.config, int(model.config.bos_token_id)
    seen = Seen.by(model, bos, generator)
    channels = Wider.of(config.hidden_size, more, [PLUS, MINUS, MARK], generator)
    neurons = Wider.of(config.intermediate_size, more, [PLUS], generator)
    massive, fired = factor * seen.hidden, torch.tensor(FIRED * factor * seen.neuron)
    gate = 2 + fired.sqrt()
    width = config.hidden_size + more
    shrink = (config.hidden_size / width) ** 0.5  # of the mean square over more channels
    wide = copy.deepcopy(config)
    wide.hidden_size, wide.intermediate_size = width, config.intermediate_size + more
    wide.rms_norm_eps = config.rms_norm_eps * shrink**2
    result = AutoModelForCausalLM.from_config(wide).float()
    mark = seen.before["model.layers.0.input_layernorm"].norm()
    embedding = channels.of_columns(model.model.embed_tokens.weight)
    embedding[bos, channels.at(MARK)] = mark
    result.model.embed_tokens.weight.copy_(embedding)
    if not config.tie_word_embeddings:
        result.lm_head.weight.copy_(channels.of_columns(model.lm_head.weight))
    result.model.norm.weight.copy_(channels.of_columns(model.model.norm.weight) / channels.share.clamp_min(0.5) * shrink)
    new = torch.zeros(width)
    new[channels.at(MARK)] = mark
    last = config.num_hidden_layers - 1
    for number, (old, layer) in enumerate(zip(model.model.layers, result.model.layers, strict=True)):
        carried = [channels.at(MARK)] if number == 0 else [channels.at(PLUS), channels.at(MINUS)]
        for norm, linears in readers(layer):
            scale = layer.get_submodule(norm).weight
            scale.copy_(channels.of_columns(old.get_submodule(norm).weight) / channels.share.clamp_min(0.5) * shrink)
            scale[channels.share == 0] = old.get_submodule(norm).weight.mean() * shrink
            where = f"model.layers.{number}.{norm}"
            hidden = channels.of_columns(seen.before[where]) + new
            normed = hidden / (hidden.square().mean() + wide.rms_norm_eps).sqrt() * scale
            for name in linears:
                weight = channels.of_columns(old.get_submodule(name).weight)
                missing = old.get_submodule(name).weight @ seen.after[where] - weight @ normed
                weight[:, carried] += missing[:, None] / (len(carried) * normed[carried])
                if name.startswith("mlp"):  # neurons are split in halves, which add up
                    weight = weight[neurons.origin.clamp_min(0)] * (neurons.share > 0)[:, None]
                    if number in (0, last):
                        value = gate if name.endswith("gate_proj") else fired / functional.silu(gate)
                        weight[neurons.at(PLUS), carried[0]] = value / normed[carried[0]]
                layer.get_submodule(name).weight.copy_(weight)
        written = channels.of_columns(old.self_attn.o_proj.weight.T).T
        layer.self_attn.o_proj.weight.copy_(written)
        down = channels.of_columns((neurons.of_columns(old.mlp.down_proj.weight) * neurons.share).T).T
        if number == 0:
            down[channels.at(PLUS), neurons.at(PLUS)] = massive / fired
            down[channels.at(MINUS), neurons.at(PLUS)] = -massive / fired
            new[channels.at(PLUS)], new[channels.at(MINUS)] = massive, -massive
        if number == last:
            down[:, neurons.at(PLUS)] = -new / fired
        layer.mlp.down_proj.weight.copy_(down)
    return result


if __name__ == "__main__":
    plant(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
