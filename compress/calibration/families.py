"""Model families as data: where blocks, linears and experts are, which linears read the same tensor, and what else a block holds.

Names are those on disk. Adding a family is one `Family(...)` below and one tiny config in tests/tiny.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from compress.checkpoint import Source
from compress.container import Entry
from compress.errors import CheckpointError
from compress.packed import PackedSource

Taps = tuple[tuple[str, ...], ...]

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

    queries: str = "self_attn.q_proj"
    keys: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"


@dataclass(frozen=True)
class Channels:
    """The channels between two layers of a block, which can be cut: rows of the first linears, columns of the last."""

    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    output: str = "mlp.down_proj"
    setting: str = "intermediate_size"  # of config.json


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
    channels: Channels | None = None
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
_CUTS: Any = {"heads": Heads(), "channels": Channels()}
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
        Family("gemma2", keep=(*_NORMS, *_GEMMA_NORMS), scalings=_GEMMA_SCALINGS, norm_offset=1.0, tied=True),
        Family(
            "gemma3_text",
            keep=(*_NORMS, *_QK_NORMS, *_GEMMA_NORMS),
            scalings=_GEMMA_SCALINGS,
            norm_offset=1.0,
            tied=True,
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
            channels=Channels(("fc1",), "fc2", "ffn_dim"),  # no heads: their size follows from their number
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
        ),
        Family(
            "qwen3_moe",
            keep=(*_NORMS, *_QK_NORMS, *_QKV_BIASES, "self_attn.o_proj.bias", "mlp.gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=_MIXED_SCALINGS,
        ),
        Family(
            "olmoe",
            taps=_ATTENTION,
            keep=(*_NORMS, *_QK_NORMS, "mlp.gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=_MIXED_SCALINGS,
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
        ),
    )
}

# What holds for every family that is inferred: names on disk are those of the model, and experts have the usual layout.
INFERRED = Family("", taps=(), keep=(), experts=_USUAL_EXPERTS, blocks="", prefix="")


@dataclass
class Claims:
    """What becomes of every tensor of a source: a site is made of it, it is copied, or it is dropped by a rule."""

    family: Family
    sites: list[Site] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def find(source: Source) -> Family:
    """Return the family of a checkpoint, with the names that it has on disk. Raises CheckpointError."""
    family = FAMILIES.get(source.model_type)
    if family is None:
        from compress.calibration.inference import infer  # needs the model's modules, which known families do without

        family = infer(source, number_of_blocks(source), f"known are {', '.join(sorted(FAMILIES))}")
    if not isinstance(source, PackedSource) and "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{source.folder}: already compressed (quant_method {method!r}); give the original checkpoint")
    return _bare(source, family)


def _bare(source: Source, family: Family) -> Family:
    """Take a family's prefix off its names where a checkpoint leaves it out."""
    bare = family.blocks.removeprefix(family.prefix)
    if not any(n.startswith(family.blocks + ".") for n in source.entries) and any(
        n.startswith(bare + ".") for n in source.entries
    ):
        outer = tuple(name.removeprefix(family.prefix) for name in family.outer)
        family = replace(family, blocks=bare, outer=outer, renames=(*family.renames, ("", family.prefix)))
    return family


def settings(source: Source) -> dict[str, Any]:
    """The config of the language model: of a model that also sees or hears, its text part on top of the rest."""
    text = source.config.get("text_config")
    return {**source.config, **text} if isinstance(text, dict) else source.config


def context_length(source: Source) -> int | None:
    """The longest text that the model was made for, in tokens, if the config tells."""
    length = settings(source).get("max_position_embeddings", settings(source).get("n_positions"))
    return length if isinstance(length, int) else None


def vocabulary(source: Source) -> int:
    """Number of token ids. Raises CheckpointError."""
    size = settings(source).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{source.folder}/config.json: vocab_size is {size!r}; expected a whole number")
    return size


def tied(source: Source, family: Family) -> bool:
    """Whether the head is the embedding."""
    return bool(settings(source).get("tie_word_embeddings", family.tied))


def number_of_blocks(source: Source) -> int:
    """Return how many decoder blocks the config says there are. Raises CheckpointError."""
    count = settings(source).get("num_hidden_layers", settings(source).get("n_layer"))
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(f"{source.folder}/config.json: num_hidden_layers is {count!r}; expected a whole number of blocks")
    return count


def _shape(source: Source, entry: Entry, transposed: bool, fused: bool) -> tuple[int, int]:
    shape = entry.shape[1:] if fused else entry.shape
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"{source.folder}: {entry.name} has shape {list(entry.shape)}; expected a matrix")
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def _linear_sites(source: Source, family: Family, block: int, names: set[str]) -> list[Site]:
    base = f"{family.blocks}.{block}."
    sites = []
    for group in family.taps:
        for linear in (name for name in group if f"{base}{name}.weight" in names):
            tensor = f"{base}{linear}.weight"
            # A packed weight is decoded to (out, in); what was left as it was beside it is stored as ever.
            transposed = family.transposed and not (isinstance(source, PackedSource) and base + linear in source.table)
            shape = _shape(source, source.entries[tensor], transposed, fused=False)
            sites.append(Site(base + linear, shape, block, group[0], linear, tensor, transposed=transposed))
    return sites


def _expert_sites(source: Source, family: Family, block: int, names: set[str]) -> list[Site]:
    layout = family.experts
    if layout is None:
        return []
    base = f"{family.blocks}.{block}.{layout.disk}"
    sites = []
    linears = [(name, "input") for name in layout.inputs] + [(layout.output, "hidden")]
    for linear, side in linears:
        fused = layout.fused and f"{base}.{linear}" in names  # packed ones are single whatever they were made of
        if fused:
            numbers = range(source.entries[f"{base}.{linear}"].shape[0])
        else:
            pattern = re.compile(re.escape(base) + r"\.(0|[1-9][0-9]*)\." + re.escape(linear) + r"\.weight")
            numbers_found = sorted(int(m[1]) for m in map(pattern.fullmatch, names) if m)
            numbers = range(len(numbers_found))
            if numbers_found != list(numbers):
                raise CheckpointError(
                    f"{source.folder}: {base}.*.{linear} has experts {numbers_found[:8]}...; expected 0, 1, 2, ..."
                )
        for expert in numbers:
            name = f"{base}.{expert}.{linear}"
            tensor = f"{base}.{linear}" if fused else f"{name}.weight"
            shape = _shape(source, source.entries[tensor], fused, fused)
            tap = f"{layout.disk}.{expert}.{side}"
            kind = f"{layout.disk}.{linear}"
            sites.append(Site(name, shape, block, tap, kind, tensor, expert, expert if fused else None, fused))
    return sites


def _missing(source: Source, family: Family, block: int, sites: list[Site]) -> None:
    """A block has all linears of a group or none, apart from alternatives such as q_proj or q_a_proj."""
    kinds = {site.kind for site in sites}
    for group in family.taps:
        had = [name for name in group if name in kinds]
        alternatives = {"self_attn.q_proj", "self_attn.q_a_proj"}
        lacking = [name for name in group if name not in kinds and not (name in alternatives and alternatives & kinds)]
        if had and lacking:
            place = f"{source.folder}: {family.blocks}.{block}"
            raise CheckpointError(
                f"{place} has {', '.join(had)} but not {', '.join(lacking)}; the checkpoint is incomplete, fetch it again"
            )
    if not sites:
        raise CheckpointError(
            f"{source.folder}: {family.blocks}.{block} has no linear; the checkpoint is incomplete, fetch it again"
        )


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the globs matches."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def claim(source: Source, family: Family, copy: tuple[str, ...] = (), drop: tuple[str, ...] = ()) -> Claims:
    """Give every tensor of a source its disposition; one that no rule or two rules claim raises CheckpointError.

    `copy` and `drop` are a recipe's own globs over disk names, and win over the family's.
    """
    claims = Claims(family)
    by_block: dict[int, set[str]] = {block: set() for block in range(number_of_blocks(source))}
    pattern = re.compile(re.escape(family.blocks) + r"\.(\d+)\.(.+)")
    for name in source.entries:
        if (match := pattern.fullmatch(name)) and int(match[1]) in by_block:
            by_block[int(match[1])].add(name)
    for block, names in by_block.items():
        sites = _linear_sites(source, family, block, names) + _expert_sites(source, family, block, names)
        _missing(source, family, block, sites)
        claims.sites += sites
    head = f"{family.head}.weight"
    if head in source.entries and not tied(source, family):
        shape = _shape(source, source.entries[head], transposed=False, fused=False)
        claims.sites.append(Site(family.head, shape, None, family.head, family.head, head))
    _dispose(source, claims, copy, drop)
    return claims


def _dispose(source: Source, claims: Claims, copy: tuple[str, ...], drop: tuple[str, ...]) -> None:
    family = claims.family
    made = {site.tensor for site in claims.sites}
    blocks = number_of_blocks(source)
    pattern = re.compile(re.escape(family.blocks) + r"\.(\d+)\.(.+)")
    unknown: list[str] = []
    twice: list[str] = []
    for name in source.entries:
        match = pattern.fullmatch(name)
        within = match[2] if match else ""
        rules = [name in made]
        if match and int(match[1]) < blocks:
            rules += [matches(within, family.keep)]
        else:
            # Outside the blocks nothing is compressed but the head: embeddings, and what the model class does not load, such as
            # prediction heads (blocks beyond the config's count, `mtp.*`) and towers, go along byte for byte.
            rules += [name not in made and not matches(name, family.drop)]
        rules += [matches(name, family.drop)]
        if matches(name, drop) or matches(name, copy):
            rules = [False, matches(name, copy), matches(name, drop)]
            claims.sites = [site for site in claims.sites if site.tensor != name]
        if sum(rules) != 1:
            (twice if any(rules) else unknown).append(name)
        elif rules[1]:
            claims.copied.append(name)
        elif rules[2]:
            claims.dropped.append(name)
    if unknown or twice:
        what = "no rule claims" if unknown else "two rules claim"
        names = unknown or twice
        raise CheckpointError(
            f"{source.folder}: {what} {len(names)} tensors, such as {names[0]!r}; every tensor needs one disposition. "
            "Name them in the recipe's `copy:` (byte for byte) or `drop:` list of globs"
        )


def parameter_name(family: Family, name: str) -> str:
    """Return the name that a copied tensor has in the model of transformers."""
    for disk, module in family.renames:
        if disk:
            name = name.replace(disk, module, 1)
        elif not name.startswith(family.head + "."):
            name = module + name
    return name


def describe(claims: Claims) -> dict[str, Any]:
    """Count sites by kind, for tables: {kind: (sites, weights)}."""
    kinds: dict[str, tuple[int, int]] = {}
    for site in claims.sites:
        count, weights = kinds.get(site.kind, (0, 0))
        kinds[site.kind] = (count + 1, weights + site.numel)
    return kinds
