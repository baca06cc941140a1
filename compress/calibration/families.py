"""Model families as data: where blocks, linears and experts are, which linears read the same tensor, and what else a block holds.

Names are those on disk. Adding a family is one `Family(...)` below and one tiny config in tests/tiny.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Taps = tuple[tuple[str, ...], ...]
Rows = Literal["one", "halves", "pairs"]

_ATTENTION: Taps = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_MLP: Taps = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_GEMMA_NORMS = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
_QKV_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")


@dataclass(frozen=True)
class Experts:
    """Where the experts of a block are on disk, and the module of transformers that holds them fused."""

    disk: str = "mlp.experts"  # per-expert tensors are {disk}.{expert}.{linear}.weight
    module: str = "mlp.experts"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")  # read the block's tokens; their outputs are joined in this order
    output: str = "down_proj"
    fused: bool = False  # on disk one (experts, in, out) tensor {disk}.{linear} for all experts
    routers: tuple[str, ...] = ("mlp.gate.weight",)  # tensors of a block with a row or number for each expert


@dataclass(frozen=True)
class Scaling:
    """A norm or linear and all that reads its output, which stays what it is if one is divided by what the others' columns get.

    Between them is nothing, or what keeps channels apart and their scale: attention on values, a product with the gate, ReLU.
    Names are those within the block, without ".weight". A producer with a star is one per expert, as are its readers then.
    `rows` are those of the producer that the readers' columns come from:
        all         one by one
        values      of v_proj; heads of a group read the same
        stacked     the values below queries and keys, as in qkv_proj
        interleaved the values below keys, head by head, as in kv_b_proj
        second half as of gate_up_proj
    """

    producer: str
    readers: tuple[str, ...]  # globs: every matrix that reads it, also those that are copied, such as routers
    rows: Literal["all", "values", "stacked", "interleaved", "second half"] = "all"
    # Values that settings of config.json must have, which are also those of a config that does not name them.
    where: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Heads:
    """The heads of attention, which can be cut: rows of what makes queries, keys and values, columns of what reads heads."""

    queries: tuple[str, ...] = ("self_attn.q_proj",)  # rows head by head
    keys: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")  # rows KV group by KV group
    output: str = "self_attn.o_proj"
    joint: str | None = None  # queries, keys and values one below the other in one linear
    single: tuple[str, ...] = ()  # tensors of a block with a number for each head
    setting: str | None = "head_dim"  # of config.json: the width of a head; None: it does not follow from the number of heads


@dataclass(frozen=True)
class Channels:
    """The channels between two layers of a block, which can be cut or change places: rows of the first, columns of the last.

    Names are kinds of sites: of experts without their number, since every expert has channels of its own. `rows` says which rows
    of each of the first linears a channel c of n has:
        one     c
        halves  c and c + n, as of gate_up_proj
        pairs   2 c and 2 c + 1
    """

    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    output: str = "mlp.down_proj"
    setting: str = "intermediate_size"  # of config.json: the number of channels, or what that is a multiple of
    size: Literal["channels", "expert_channels", "shared_channels"] = "channels"  # what the setting counts
    rows: Rows = "one"
    width: str | None = None  # setting of the model's width, a fourth of the channels where config.json has no number of them


_ATTENTION_SCALINGS = (
    Scaling("input_layernorm", _ATTENTION[0]),
    Scaling("self_attn.v_proj", _ATTENTION[1], "values"),
)
_MLP_NORM = Scaling("post_attention_layernorm", _MLP[0])
_UP_DOWN = Scaling("mlp.up_proj", _MLP[1])
_SCALINGS = (*_ATTENTION_SCALINGS, _MLP_NORM, _UP_DOWN)
_GEMMA_SCALINGS = (*_ATTENTION_SCALINGS, Scaling("pre_feedforward_layernorm", _MLP[0]), _UP_DOWN)
_EXPERT_INPUTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate")
_EXPERT_UP_DOWN = Scaling("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",))
_MIXED_SCALINGS = (
    *_ATTENTION_SCALINGS,
    Scaling("post_attention_layernorm", (*_MLP[0], *_EXPERT_INPUTS)),
    _UP_DOWN,
    _EXPERT_UP_DOWN,
)


@dataclass(frozen=True)
class Family:
    """One architecture. `taps` groups the linears of a block that read one tensor; a block that has none of a group skips it."""

    model_type: str
    taps: Taps = _ATTENTION + _MLP
    keep: tuple[str, ...] = _NORMS  # globs of block tensors that are copied byte for byte
    experts: Experts | None = None
    scalings: tuple[Scaling, ...] = ()  # where scales can move from one tensor to others; none are known if it is empty
    heads: Heads | None = None  # what `compress cut` may cut; None: not at all
    channels: tuple[Channels, ...] = ()  # what it may cut and `transform/permute` put in another order
    biases: tuple[tuple[str, tuple[str, ...]], ...] = ()  # settings of config.json, and the linears that they give a bias
    norm_offset: float = 0.0  # norms multiply by this plus their weight
    blocks: str = "model.layers"
    outer: tuple[str, ...] = ("model.embed_tokens.weight", "model.norm.weight")  # globs outside the blocks, copied
    head: str = "lm_head"
    aside: tuple[str, ...] = ()  # globs of tensors that text does not pass through (a vision tower), copied and never loaded
    tied: bool = False  # whether the head is the embedding where config.json does not say
    drop: tuple[str, ...] = ("*.rotary_emb.inv_freq",)  # globs of tensors that no current model reads
    transposed: bool = False  # weights are stored (in, out)
    renames: tuple[tuple[str, str], ...] = ()  # text of a disk name -> text of the module's parameter name
    prefix: str = "model."  # what old checkpoints leave out in front of every name but the head's


@dataclass(frozen=True)
class Site:
    """One 2-D weight: the unit of work, of the report and of distribution."""

    name: str  # disk name without ".weight"
    shape: tuple[int, int]  # (out, in)
    block: int | None  # None: the head, after the last block
    tap: str  # name of the tensor it reads; sites of one block with one tap share statistics
    kind: str  # name within the block, experts unnumbered
    tensor: str  # disk name of the tensor it is read from
    expert: int | None = None
    slice: int | None = None  # element of the tensor's first axis, where experts are fused on disk
    transposed: bool = False  # the tensor is stored (in, out)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


_USUAL_EXPERTS = Experts()
_MIXTRAL_EXPERTS = Experts(
    "block_sparse_moe.experts",
    "mlp.experts",
    ("w1", "w3"),
    "w2",
    routers=("block_sparse_moe.gate.weight",),
)
_DEEPSEEK_EXPERTS = Experts(routers=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"))
_FUSED_EXPERTS = Experts(inputs=("gate_up_proj",), fused=True, routers=("mlp.router.weight", "mlp.router.bias"))
_ATTENTION_BIASES = ("attention_bias", (*_ATTENTION[0], *_ATTENTION[1]))
_CUTS: Any = {"heads": Heads(), "channels": (Channels(),)}


def _expert_channels(setting: str = "moe_intermediate_size", layout: Experts = _USUAL_EXPERTS, rows: Rows = "one") -> Channels:
    """The channels of experts."""
    inputs = tuple(f"{layout.disk}.{name}" for name in layout.inputs)
    return Channels(inputs, f"{layout.disk}.{layout.output}", setting, "expert_channels", rows)


def _shared_channels(module: str, setting: str, size: Literal["expert_channels", "shared_channels"]) -> Channels:
    """The channels of experts that see all tokens."""
    return Channels((f"{module}.gate_proj", f"{module}.up_proj"), f"{module}.down_proj", setting, size)


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            keep=(*_NORMS, *_QKV_BIASES, "self_attn.o_proj.bias", "mlp.*_proj.bias"),
            scalings=_SCALINGS,
            biases=(_ATTENTION_BIASES, ("mlp_bias", (*_MLP[0], *_MLP[1]))),
            **_CUTS,
        ),
        Family("mistral", scalings=_SCALINGS, **_CUTS),
        Family("qwen2", keep=(*_NORMS, *_QKV_BIASES), scalings=_SCALINGS, **_CUTS),
        Family(
            "qwen3",
            keep=(*_NORMS, *_QK_NORMS, *_QKV_BIASES, "self_attn.o_proj.bias"),
            scalings=_SCALINGS,
            biases=(_ATTENTION_BIASES,),
            **_CUTS,
        ),
        Family("gemma2", keep=(*_NORMS, *_GEMMA_NORMS), scalings=_GEMMA_SCALINGS, norm_offset=1.0, tied=True, **_CUTS),
        Family(
            "gemma3_text",
            keep=(*_NORMS, *_QK_NORMS, *_GEMMA_NORMS),
            scalings=_GEMMA_SCALINGS,
            norm_offset=1.0,
            tied=True,
            **_CUTS,
        ),
        Family(
            "gemma3",  # the text of a model that also sees
            keep=(*_NORMS, *_QK_NORMS, *_GEMMA_NORMS),
            scalings=_GEMMA_SCALINGS,
            norm_offset=1.0,
            blocks="language_model.model.layers",
            outer=("language_model.model.embed_tokens.weight", "language_model.model.norm.weight"),
            head="language_model.lm_head",
            aside=("vision_tower.*", "multi_modal_projector.*"),
            tied=True,
            renames=(("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")),
            prefix="",
            **_CUTS,
        ),
        Family(
            "phi3",
            taps=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
            scalings=(
                Scaling("input_layernorm", ("self_attn.qkv_proj",)),
                Scaling("self_attn.qkv_proj", ("self_attn.o_proj",), "stacked"),
                Scaling("post_attention_layernorm", ("mlp.gate_up_proj",)),
                Scaling("mlp.gate_up_proj", ("mlp.down_proj",), "second half"),
            ),
            heads=Heads((), (), joint="self_attn.qkv_proj"),
            channels=(Channels(("mlp.gate_up_proj",), rows="halves"),),
        ),
        Family(
            "opt",
            taps=(_ATTENTION[0], ("self_attn.out_proj",), ("fc1",), ("fc2",)),
            keep=("self_attn.*.bias", "fc?.bias", "self_attn_layer_norm.*", "final_layer_norm.*"),
            scalings=(
                # Norms that follow what they belong to give the residual stream, which the whole rest of the model reads.
                Scaling("self_attn_layer_norm", _ATTENTION[0], where=(("do_layer_norm_before", True),)),
                Scaling("self_attn.v_proj", ("self_attn.out_proj",), "values"),
                Scaling("final_layer_norm", ("fc1",), where=(("do_layer_norm_before", True),)),
                Scaling("fc1", ("fc2",), where=(("activation_function", "relu"),)),
            ),
            channels=(Channels(("fc1",), "fc2", "ffn_dim"),),  # no heads: their size follows from their number
            blocks="model.decoder.layers",
            tied=True,
            outer=("model.decoder.embed_*.weight", "model.decoder.final_layer_norm.*", "model.decoder.project_*.weight"),
        ),
        Family(
            "gpt2",
            taps=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
            keep=("attn.c_*.bias", "mlp.c_*.bias", "ln_?.*"),
            scalings=(
                Scaling("ln_1", ("attn.c_attn",)),
                Scaling("attn.c_attn", ("attn.c_proj",), "stacked"),
                Scaling("ln_2", ("mlp.c_fc",)),
                Scaling("mlp.c_fc", ("mlp.c_proj",), where=(("activation_function", "relu"),)),
            ),
            channels=(Channels(("mlp.c_fc",), "mlp.c_proj", "n_inner", width="n_embd"),),  # heads as with opt
            blocks="transformer.h",
            outer=("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.*"),
            drop=("*.attn.bias", "*.attn.masked_bias"),
            transposed=True,
            tied=True,
            prefix="transformer.",
        ),
        Family(
            "mixtral",
            taps=_ATTENTION,
            keep=(*_NORMS, "block_sparse_moe.gate.weight"),
            experts=_MIXTRAL_EXPERTS,
            scalings=(
                *_ATTENTION_SCALINGS,
                Scaling(
                    "post_attention_layernorm",
                    ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3", "block_sparse_moe.gate"),
                ),
                Scaling("block_sparse_moe.experts.*.w3", ("block_sparse_moe.experts.*.w2",)),
            ),
            heads=Heads(),
            channels=(_expert_channels("intermediate_size", _MIXTRAL_EXPERTS),),
            renames=(("block_sparse_moe.", "mlp."),),
        ),
        Family(
            "qwen2_moe",
            taps=(
                *_ATTENTION,
                *_MLP,
                ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                ("mlp.shared_expert.down_proj",),
            ),
            keep=(*_NORMS, *_QKV_BIASES, "mlp.gate.weight", "mlp.shared_expert_gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=(
                *_ATTENTION_SCALINGS,
                Scaling(
                    "post_attention_layernorm",
                    (
                        *_MLP[0],
                        *_EXPERT_INPUTS,
                        "mlp.shared_expert.gate_proj",
                        "mlp.shared_expert.up_proj",
                        "mlp.shared_expert_gate",
                    ),
                ),
                _UP_DOWN,
                _EXPERT_UP_DOWN,
                Scaling("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
            ),
            heads=Heads(),
            channels=(
                Channels(),
                _expert_channels(),
                _shared_channels("mlp.shared_expert", "shared_expert_intermediate_size", "shared_channels"),
            ),
        ),
        Family(
            "qwen3_moe",
            keep=(*_NORMS, *_QK_NORMS, *_QKV_BIASES, "self_attn.o_proj.bias", "mlp.gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=_MIXED_SCALINGS,
            heads=Heads(),
            channels=(Channels(), _expert_channels()),
        ),
        Family(
            "olmoe",
            taps=_ATTENTION,
            keep=(*_NORMS, *_QK_NORMS, "mlp.gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=_MIXED_SCALINGS,
            channels=(_expert_channels("intermediate_size"),),  # no heads: norms over all of them
        ),
        Family(
            "deepseek_v3",
            taps=(
                ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
                ("self_attn.q_b_proj",),
                ("self_attn.kv_b_proj",),
                ("self_attn.o_proj",),
                *_MLP,
                ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                ("mlp.shared_experts.down_proj",),
            ),
            keep=(
                *_NORMS,
                "self_attn.q_a_layernorm.weight",
                "self_attn.kv_a_layernorm.weight",
                "self_attn.*.bias",
                "mlp.gate.weight",
                "mlp.gate.e_score_correction_bias",
            ),
            experts=_DEEPSEEK_EXPERTS,
            scalings=(
                Scaling("input_layernorm", ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
                Scaling("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
                Scaling("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
                Scaling("self_attn.kv_b_proj", ("self_attn.o_proj",), "interleaved"),
                Scaling(
                    "post_attention_layernorm",
                    (*_MLP[0], *_EXPERT_INPUTS, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                ),
                _UP_DOWN,
                _EXPERT_UP_DOWN,
                Scaling("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
            ),
            heads=Heads(("self_attn.q_proj", "self_attn.q_b_proj"), ("self_attn.kv_b_proj",), setting=None),
            channels=(
                Channels(),
                _expert_channels(),
                _shared_channels("mlp.shared_experts", "moe_intermediate_size", "expert_channels"),
            ),
        ),
        Family(
            "gpt_oss",
            taps=_ATTENTION,
            keep=(*_NORMS, "self_attn.*.bias", "self_attn.sinks", "mlp.router.*", "mlp.experts.*_bias"),
            experts=_FUSED_EXPERTS,
            scalings=(  # none from gate_up_proj to down_proj: what lies between clamps and adds one
                *_ATTENTION_SCALINGS,
                Scaling("post_attention_layernorm", ("mlp.experts.*.gate_up_proj", "mlp.router")),
            ),
            heads=Heads(single=("self_attn.sinks",)),
            channels=(_expert_channels("intermediate_size", _FUSED_EXPERTS, "pairs"),),
        ),
    )
}

# What holds for every family that is inferred: names on disk are those of the model, and experts have the usual layout.
INFERRED = Family("", taps=(), keep=(), experts=_USUAL_EXPERTS, blocks="", prefix="")
