# SPDX-License-Identifier: Apache-2.0
"""What a sentence-transformers model gives for texts: how many tokens, their states, a sentence embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import TextEncoderError
from .blockwise_encoder import windows


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


_TOKENIZING_BATCH = 256


@dataclass(frozen=True)
class TextOutput:
    """What a model gives for one text.

    Attributes:
        sentence_embedding: `(sentence_embedding_size,)`.
        token_states: `(tokens, C)`, without padding; `None` if the model has none.
        num_tokens: How many tokens the model read; 1 where it does not tell.
    """

    sentence_embedding: Tensor
    token_states: Tensor | None
    num_tokens: int


def text_outputs(
    module: SentenceTransformer,
    texts: list[str],
    *,
    window_tokens: int | None,
    trainable: bool,
    max_tokens: int | None = None,
) -> list[TextOutput]:
    """Put texts of equal token length through a model.

    Args:
        module: The model.
        texts: The texts.
        window_tokens: The most tokens that go through the model at once; longer texts are cut into windows of so many.
        trainable: Whether to keep the graph, and the model in the mode that it is in.
        max_tokens: Leave out the windows in which none of so many first tokens is.

    Raises:
        TextEncoderError: If there are to be windows, and the model does not tell what is padding.
    """
    features = _features(module, texts)
    mask = features.get("attention_mask")
    if mask is None:
        if window_tokens is not None:
            raise TextEncoderError(
                f"window_tokens={window_tokens} needs a text encoder that gives an attention mask, and this one gives "
                f"{sorted(features)}. Load it without flash attention."
            )
        return _one_pass(module, features, trainable)
    length = mask.shape[1]
    parts = [
        _one_pass(module, _window_of(features, length, window), trainable)
        for window in windows(length, window_tokens, max_tokens)
    ]
    return parts[0] if len(parts) == 1 else [_joined(outputs) for outputs in zip(*parts, strict=True)]


def token_lengths(module: SentenceTransformer, texts: Sequence[str]) -> list[int | None]:
    """How many tokens each text has, special ones included; `None` where the model does not tell."""
    lengths: list[int | None] = []
    for start in range(0, len(texts), _TOKENIZING_BATCH):
        batch = list(texts[start : start + _TOKENIZING_BATCH])
        features = _features(module, batch)
        if "attention_mask" in features:
            lengths += features["attention_mask"].sum(dim=1).tolist()
        elif static_table(module) is not None:
            lengths += [len(ids) for ids in _split(features["input_ids"], features)]
        else:
            lengths += [None] * len(batch)
    return lengths


def whole_lengths(module: SentenceTransformer, texts: Sequence[str]) -> list[int]:
    """How many tokens each text would have if none were cut; 0 where the model's tokenizer cuts none."""
    tokenizer = getattr(module, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return [0] * len(texts)
    instruction = _instruction(module)
    return [len(tokenizer(instruction + text, truncation=False, verbose=False)["input_ids"]) for text in texts]


def measured_sizes(module: SentenceTransformer) -> tuple[int | None, int]:
    """Sizes of token states (`None` if there are none) and sentence embeddings, from one short text.

    Raises:
        TextEncoderError: If the model gives no sentence embedding.
    """
    module.eval()
    with torch.no_grad():
        output = module(_features(module, ["a"]))
    if "sentence_embedding" not in output:
        raise TextEncoderError(
            f"The text encoder gives no sentence embedding, only {sorted(output)}. Use a sentence-transformers "
            "model that ends in a pooling module."
        )
    states = output.get("token_embeddings", static_table(module))
    sentence_size = output["sentence_embedding"][..., : module.truncate_dim].shape[-1]
    return None if states is None else states.shape[-1], sentence_size


def static_table(module: SentenceTransformer) -> Tensor | None:
    """The vectors of all tokens, if the model begins with a static embedding: a table of one for each."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    first = module[0]
    return first.embedding.weight if isinstance(first, StaticEmbedding) else None


def _one_pass(module: SentenceTransformer, features: dict[str, Any], trainable: bool) -> list[TextOutput]:
    if trainable:
        return _outputs_of(module, module(features))
    # A parent module's `train()` may have changed the mode, and inside a mixed-precision training step autocast would
    # change the states.
    module.eval()
    with torch.no_grad(), torch.autocast(module.device.type, enabled=False):
        return _outputs_of(module, module(features))


def _outputs_of(module: SentenceTransformer, output: dict[str, Any]) -> list[TextOutput]:
    sentences = output["sentence_embedding"][..., : module.truncate_dim]
    table, mask = static_table(module), output.get("attention_mask")
    states: Sequence[Tensor | None] = [None] * len(sentences)
    if table is not None:
        # The model itself gives the mean of these rows only.
        states = _split(table[output["input_ids"]], output)
    elif "token_embeddings" in output:
        every = output["token_embeddings"]
        states = list(every) if mask is None else [each[kept] for each, kept in zip(every, mask.bool(), strict=True)]
    tokens = [1] * len(sentences) if mask is None else mask.sum(dim=1).tolist()
    return [TextOutput(*parts) for parts in zip(sentences, states, tokens, strict=True)]


def _split(flat: Tensor, features: dict[str, Any]) -> list[Tensor]:
    """What belongs to each text, of what a static embedding holds of all texts in a row."""
    return list(flat.tensor_split(features["offsets"].cpu()[1:]))


def _window_of(features: dict[str, Any], length: int, window: slice) -> dict[str, Any]:
    """Of features what belongs to a window: whatever is as long as the token sequence is cut with it."""
    if window == slice(0, length):
        return features
    return {
        name: value[:, window] if isinstance(value, Tensor) and value.shape[1:2] == (length,) else value
        for name, value in features.items()
        # How long the model's own instruction is, which stands in the first window.
        if window.start == 0 or name != "prompt_length"
    }


def _joined(parts: tuple[TextOutput, ...]) -> TextOutput:
    """A text's output from those of its windows."""
    states = [part.token_states for part in parts if part.token_states is not None]
    total = sum(part.num_tokens for part in parts)
    mean = torch.stack([part.sentence_embedding * (part.num_tokens / total) for part in parts]).sum(0)
    return TextOutput(mean, torch.cat(states) if states else None, total)


def _features(module: SentenceTransformer, texts: list[str]) -> dict[str, Any]:
    """Tokenize as `SentenceTransformer.encode` does, onto the device of the model."""
    features = module.preprocess(texts, prompt=_instruction(module) or None)
    return {name: value.to(module.device) if isinstance(value, Tensor) else value for name, value in features.items()}


def _instruction(module: SentenceTransformer) -> str:
    """What the model by its own configuration puts before each text; mostly nothing."""
    return module.prompts.get(module.default_prompt_name or "") or ""
