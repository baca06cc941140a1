"""OPT."""

from __future__ import annotations

from compress.architecture.family import ATTENTION, Channels, Family, Scaling

FAMILIES = (
    Family(
        "opt",
        taps=(ATTENTION[0], ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        keep=("self_attn.*.bias", "fc?.bias", "self_attn_layer_norm.*", "final_layer_norm.*"),
        scalings=(
            # Norms that follow what they belong to give the residual stream, which the whole rest of the model reads.
            Scaling("self_attn_layer_norm", ATTENTION[0], where=(("do_layer_norm_before", True),)),
            Scaling("self_attn.v_proj", ("self_attn.out_proj",), "values"),
            Scaling("final_layer_norm", ("fc1",), where=(("do_layer_norm_before", True),)),
            Scaling("fc1", ("fc2",), where=(("activation_function", "relu"),)),
        ),
        channels=(Channels(("fc1",), "fc2", "ffn_dim"),),  # no heads: their size follows from their number
        blocks="model.decoder.layers",
        tied=True,
        outer=("model.decoder.embed_*.weight", "model.decoder.final_layer_norm.*", "model.decoder.project_*.weight"),
    ),
)
