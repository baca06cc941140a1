"""Whether the tensors of a source fill the whole model, which is known before one of them is read."""

from __future__ import annotations

from compress.architecture.config import tied
from compress.architecture.names import parameter_name
from compress.errors import CheckpointError
from compress.model.meta import decoder_path
from compress.model.streamed import StreamedModel


def unfilled(streamed: StreamedModel) -> list[str]:
    """Return the parameters of a model that no tensor of its source fills; of one that also sees, those of its language model."""
    family = streamed.family
    filled: set[str | int] = {parameter_name(family, name) for name in streamed.inventory.copied}
    for site in streamed.inventory.sites:
        try:
            filled.add(id(streamed.linear(site).weight))
        except AttributeError:  # a linear that the model does not have, which is another fault
            continue
    head = streamed.model.get_output_embeddings()
    if head is not None and tied(streamed.source, family):
        filled.add(id(head.weight))
    text = decoder_path(streamed.model) if family.aside else ""
    mine = [(name, parameter) for name, parameter in streamed.model.named_parameters() if name.startswith((text, "lm_head."))]
    return [name for name, parameter in mine if not filled & {name, id(parameter)}]


def complete(streamed: StreamedModel) -> StreamedModel:
    """Return a model whose every parameter has a tensor. Raises CheckpointError where one has none."""
    if empty := unfilled(streamed):
        raise CheckpointError(
            f"{streamed.source.folder}: nothing fills {empty[0]} ({len(empty)} in all); the checkpoint is incomplete, fetch it "
            "again"
        )
    return streamed
