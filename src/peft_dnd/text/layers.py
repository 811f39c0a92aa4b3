# SPDX-License-Identifier: Apache-2.0
"""Which layer of a transformers model gives the token states: its number, and a model cut down to what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import GeneratorConfigError


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def chosen_layer(module: SentenceTransformer) -> int | None:
    """The layer whose hidden states a model gives as token states; `None` if it gives its output."""
    output = _modalities(module).get("text", {}).get("method_output_name")
    return int(output[1]) if isinstance(output, list | tuple) and output[0] == "hidden_states" else None


def choose_layer(module: SentenceTransformer, layer: int) -> None:
    """Make a model give the hidden states of a layer as token states, and drop the layers that this does not need.

    Sentence embeddings become their mean, before whatever the model has after its pooling: how it pooled its output
    (by the last token, for a language model) need not suit another layer. Texts are read as they are, even if the
    model has a chat template.

    Raises:
        GeneratorConfigError: If there is no such layer.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = getattr(module, "transformers_model", None)
    if not isinstance(model, PreTrainedModel) or "text" not in _modalities(module):
        raise GeneratorConfigError(
            f"layer={layer} cannot be chosen: the text encoder ({type(module[0]).__name__}) has no layers. Leave it "
            "out."
        )
    layer = layer_from_front(model.config, layer)
    # sentence-transformers' own way of naming what a model gives; it is saved with the model. Were chat messages left
    # among what it takes, every text would be put into the chat template first.
    text = {**_modalities(module)["text"], "method_output_name": ["hidden_states", layer]}
    transformer: Any = module[0]
    transformer.modality_config = {"text": text}
    transformer.input_formatter.supported_modalities = ["text"]
    for name, part in module.named_children():
        if isinstance(part, Pooling):
            module.register_module(name, Pooling(part.get_embedding_dimension(), "mean"))
    drop_layers(model, layer + 1)


def layer_from_front(config: PretrainedConfig, layer: int) -> int:
    """A layer's number in transformers' `hidden_states`, counted from the front.

    Raises:
        GeneratorConfigError: If there is no such layer.
    """
    count = config.get_text_config().num_hidden_layers
    if not isinstance(layer, int) or not -count - 1 <= layer <= count:
        raise GeneratorConfigError(
            f"There is no layer {layer!r}: the text encoder has {count}, so that layer must be from 0 (the "
            f"embeddings) to {count} (its output), or from -1 back to {-count - 1}."
        )
    return layer % (count + 1)


def _modalities(module: SentenceTransformer) -> dict[str, dict[str, Any]]:
    return getattr(module[0], "modality_config", {})


def drop_layers(model: PreTrainedModel, keep: int) -> None:
    """Keep a model's first layers alone, if it can be told which they are."""
    # What layer k gives is among a model's hidden states as it is only if a layer follows; after the last one
    # transformers gives the model's output, which mostly has gone through a norm. So the caller keeps one more.
    config = model.config.get_text_config()
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    # Models that share one layer's weights (ALBERT) have no such list; two of equal length cannot be told apart.
    if len(places) != 1 or keep >= config.num_hidden_layers:
        return
    parent, name = places[0]
    setattr(parent, name, getattr(parent, name)[:keep])
    config.num_hidden_layers = keep
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:keep]
