# SPDX-License-Identifier: Apache-2.0
"""A language model's own states where a prompt's answer would begin, and over the prompt, as one vector a prompt.

What a language model is about to do stands in the states of a prompt's last position, in its middle layers (function
vectors, Todd et al., arXiv 2310.15213); what the prompt speaks of stands in those before. A base that reads the
prompts itself knows the languages that it knows, which an English sentence encoder does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..errors import GeneratorConfigError, TextEncoderError
from ..storage.hub import commit_in_cache
from ..storage.processes import loaded_whole
from ..storage.progress import short_bars_hidden
from .hidden_states_encoder import HiddenStatesTextEncoder
from .layers import drop_layers, layer_from_front
from .prompts import check_prompts


class AnswerStatesTextEncoder(HiddenStatesTextEncoder):
    """One vector a prompt: of each layer the state of the last position, and the mean of those of all positions.

        v = concat over the layers l of  h_l[last] / rms,  mean over t of (h_l[t] / rms)

    A state is divided by its root mean square, since those of different layers differ in size; special tokens, whose
    states say nothing of the prompt, are left out of the mean. End prompts where their answer is to begin.

    Args:
        model: The language model, or a `PeftModel` around it; it is read as the base that it is, as
            [`HiddenStatesTextEncoder`] does.
        tokenizer: Its tokenizer.
        layers: The layers, in transformers' own count; negative numbers count from the output.
        name_or_path: The Hub id or folder that the model came from; default: what the model itself says.
        max_length: The most tokens of one prompt; default: as many as the model or its tokenizer can take.
        block_tokens: How many tokens of prompts of equal length may go through the model at once, at least one
            prompt's.

    Attributes:
        commit_hash: The Hub commit that `from_pretrained` loaded the model from; `None` if it is not known.

    Raises:
        GeneratorConfigError: If there are no layers, or one of them does not exist.

    Example:
        ```python
        encoder = AnswerStatesTextEncoder(base_model, tokenizer, layers=[5, 8, 11, 14])
        generator = PromptConditionedLoraGenerator.from_pretrained("org/generator", text_encoder=encoder)
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        *,
        name_or_path: str | None = None,
        max_length: int | None = None,
        block_tokens: int = 1,
    ) -> None:
        super().__init__(model, tokenizer, name_or_path=name_or_path, max_length=max_length, block_tokens=block_tokens)
        self.layer = None  # there is not one
        self.commit_hash: str | None = None
        if not layers:
            raise GeneratorConfigError("layers must name at least one layer of the text encoder, and names none.")
        self.layers = tuple(layer_from_front(self._reader.config, layer) for layer in layers)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        layers: Sequence[int],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype = torch.float32,
        block_tokens: int = 1,
    ) -> AnswerStatesTextEncoder:
        """Load a language model as a text encoder, without the layers beyond the last one that is read.

        Args:
            name_or_path: Hub id or folder.
            layers: See the class.
            revision: Branch, tag or commit on the Hub.
            token: Access token for the Hub.
            dtype: Of the weights.
            block_tokens: See the class.

        Raises:
            TextEncoderError: If it cannot be loaded.
        """
        name = os.fspath(name_or_path)
        try:
            with loaded_whole(), short_bars_hidden():
                model = AutoModel.from_pretrained(
                    name,
                    revision=revision,
                    token=token,
                    dtype=dtype,
                    use_safetensors=True,  # a pickle is never read
                    trust_remote_code=False,  # nor is anybody asked whether a repository's code may run
                )
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, token=token, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise TextEncoderError(
                f"Cannot load {name!r} as a language model with its tokenizer: {error} Name a Hub id or a folder "
                "with both, or pass text_encoder=AnswerStatesTextEncoder(model, tokenizer, layers)."
            ) from error
        encoder = cls(model, tokenizer, layers, name_or_path=name, block_tokens=block_tokens)
        encoder.commit_hash = commit_in_cache(name, (CONFIG_NAME,), revision=revision)
        drop_layers(encoder._reader, max(encoder.layers) + 1)
        return encoder

    @property
    def embedding_size(self) -> int:
        """C, the size of a prompt's vector: twice the model's width for each layer."""
        return 2 * len(self.layers) * super().embedding_size

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """One state a prompt.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`].
        """
        return [1] * len(check_prompts(prompts))

    def _token_states(self, prompts: list[str], max_length: int | None) -> list[Tensor]:
        model = self._reader
        ids = torch.tensor(self._tokenize(prompts), device=cast(Tensor, model.get_input_embeddings().weight).device)
        states = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
        ).hidden_states
        said = ~torch.isin(ids, self._special.to(ids.device))
        said |= ~said.any(1, keepdim=True)  # a prompt of special tokens alone
        share = said / said.sum(1, keepdim=True)
        parts = []
        for layer in self.layers:
            state = states[layer].float()
            state = state * state.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            parts += [state[:, -1], torch.einsum("bt,btc->bc", share, state)]
        return list(torch.cat(parts, -1).unsqueeze(1))
