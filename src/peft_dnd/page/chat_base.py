# SPDX-License-Identifier: Apache-2.0
"""A base model that answers for many visitors, with and without the adapter of the one who asks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..adapters.matching import check_fits, match_modules
from ..errors import BaseModelMismatchError, GeneratorConfigError, PromptError
from ..storage.progress import short_bars_hidden
from ..text.prompts import uses_chat_template


_STOP = "\n"


class ChatBase:
    """A causal language model and its tokenizer. One question is answered at a time, whoever asks.

    There is one place for an adapter of each kind in the model. The asking visitor's own is written into it before
    each answer and nobody else's is read, so that what a visitor sees does not depend on who else is there.

    Args:
        model: The base, in evaluation mode. It is the page's own from now on.
        tokenizer: Its tokenizer. If it has a chat template, questions and earlier turns are put into it; otherwise
            each question stands alone, on a line of its own, and the answer ends with its line.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model: Any = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._has_adapter = False
        self._lock = Lock()

    @classmethod
    def from_pretrained(cls, name: str, *, device: str | None = None) -> ChatBase:
        """Load a base and its tokenizer, in the dtype that it is stored in.

        Args:
            name: Folder or Hub id.
            device: Where it is to run; the first GPU if there is one.

        Raises:
            BaseModelMismatchError: If there is none, or none that writes.
            GeneratorConfigError: If there is no such device.
        """
        try:
            with short_bars_hidden():
                model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
                tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise BaseModelMismatchError(
                f"There is no base model that could be talked with at {name!r} ({' '.join(str(error).split())})."
            ) from error
        try:
            return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)
        except (RuntimeError, AssertionError) as error:
            raise GeneratorConfigError(
                f"The base cannot be put on the device {device!r}: {' '.join(str(error).split())}"
            ) from error

    @property
    def keeps_turns(self) -> bool:
        """Whether earlier questions and answers are read again."""
        return uses_chat_template(self._tokenizer)

    def check_fits(self, layout: AdapterLayout) -> None:
        """Make sure that adapters of a layout can be put on this base.

        Raises:
            BaseModelMismatchError: Otherwise.
        """
        check_fits(self._model, layout, match_modules(self._model, layout))

    def answer(
        self,
        question: str,
        *,
        adapter: GeneratedAdapter | None = None,
        kind: str = "default",
        turns: Sequence[tuple[str, str]] = (),
        most_tokens: int = 64,
    ) -> str:
        """Answer a question by greedy decoding.

        Args:
            question: The question.
            adapter: The adapter to answer with; `None`: the base alone.
            kind: Names the adapter's place in the model: that of adapters of one layout and scaling.
            turns: Earlier questions, each with what this side answered.
            most_tokens: After how many tokens the answer is cut.

        Raises:
            PromptError: If the question is longer than the base can read.
            BaseModelMismatchError: If the adapter does not fit the base.
        """
        ids = self._ids(question, turns)
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None:
            most_tokens = min(most_tokens, limit - ids.shape[1])
        if most_tokens < 1:
            raise PromptError(
                f"The question, with what was said before, has {ids.shape[1]} tokens, and the base reads {limit} with "
                "its answer. Shorten it, or make the adapter again to begin anew."
            )
        with self._lock, torch.no_grad():
            if adapter is not None:
                self._model = adapter.load_into(self._model, kind)
                self._model.set_adapter(kind)
                self._has_adapter = True
            bare = adapter is None and self._has_adapter
            with self._model.disable_adapter() if bare else nullcontext():
                return self._written(ids, most_tokens)

    def _ids(self, question: str, turns: Sequence[tuple[str, str]]) -> torch.Tensor:
        if not self.keeps_turns:
            found: torch.Tensor = self._tokenizer(question + _STOP, return_tensors="pt")["input_ids"]
            return found
        said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        messages = [{"role": role, "content": text} for role, text in (*said, ("user", question))]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        written: torch.Tensor = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return written

    def _written(self, ids: torch.Tensor, most_tokens: int) -> str:
        ends = [] if self.keeps_turns else [_LineEnd(self._tokenizer, ids.shape[1])]
        there = ids.to(self._model.device)
        written = self._model.generate(
            input_ids=there,
            attention_mask=torch.ones_like(there),
            max_new_tokens=most_tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList(ends),
        )
        text = str(self._tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
        return (text if self.keeps_turns else text.partition(_STOP)[0]).strip()


class _LineEnd(StoppingCriteria):
    """Stops where the answer's line ends. transformers' own `stop_strings` does not take every kind of tokenizer."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self._tokenizer = tokenizer
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ended = [_STOP in self._tokenizer.decode(ids[self._start :]) for ids in input_ids]
        return torch.tensor(ended, device=input_ids.device)
