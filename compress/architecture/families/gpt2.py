"""GPT-2, whose linears are stored (in, out)."""

from __future__ import annotations

from compress.architecture.family import Channels, Family, Scaling

FAMILIES = (
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
        # No heads: their size follows from their number.
        channels=(Channels(("mlp.c_fc",), "mlp.c_proj", "n_inner", width="n_embd"),),
        blocks="transformer.h",
        outer=("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.*"),
        drop=("*.attn.bias", "*.attn.masked_bias"),
        transposed=True,
        tied=True,
        prefix="transformer.",
    ),
)
