"""What is known of a model family: where blocks, linears and experts are, which linears read the same tensor, what else is there.

Names are those on disk. The families themselves are in `families/`, one file per maker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Taps = tuple[tuple[str, ...], ...]
Rows = Literal["one", "halves", "pairs"]

# What most decoders have, and the defaults of a family.
ATTENTION: Taps = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
MLP: Taps = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Experts:
    """Where the experts of a block are on disk, and the module of transformers that holds them fused."""

    disk: str = "mlp.experts"  # per-expert tensors are {disk}.{expert}.{linear}.weight
    module: str = "mlp.experts"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")  # read the block's tokens; their outputs are joined in this order
    output: str = "down_proj"
    fused: bool = False  # on disk one tensor {disk}.{linear} for all experts
    turned: bool = True  # which is (experts, in, out), or (experts, out, in)
    tensors: tuple[tuple[str, str], ...] = ()  # linear, and its tensor within the block where that has another name
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


@dataclass(frozen=True)
class Family:
    """One architecture. `taps` groups the linears of a block that read one tensor; a block that has none of a group skips it."""

    model_type: str
    taps: Taps = ATTENTION + MLP
    alternatives: Taps = ()  # linears of one tap of which a block has one
    keep: tuple[str, ...] = NORMS  # globs of block tensors that are copied byte for byte
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
    # Disk names of single tensors -> those of the parameters; of several that are joined into one by rows, in that order.
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model."  # what old checkpoints leave out in front of every name but the head's

    def nested(self, model_type: str, within: str, aside: tuple[str, ...]) -> Family:
        """Return the family of a model that also sees or hears and has this one as its text part; `aside` are globs of the rest.

        On disk `within` precedes every name of the text part; in the model it follows the prefix, and the head stands alone.
        """
        return replace(
            self,
            model_type=model_type,
            blocks=within + self.blocks,
            outer=tuple(within + name for name in self.outer),
            head=within + self.head,
            aside=aside,
            renames=((within + self.prefix, self.prefix + within), (within + self.head, self.head), *self.renames),
            prefix="",
        )


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
