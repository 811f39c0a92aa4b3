# SPDX-License-Identifier: Apache-2.0
"""Who writes synthetic text: a language model in memory, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from ..adapters.matching import base_model_of
from ..engines.http_client import HttpClient
from ..errors import EngineError, PromptError
from ..text.prompts import uses_chat_template


_SEEDS = 2**31
_TOP_P = 0.95


@dataclass(frozen=True)
class Written:
    """What a writer gave.

    Attributes:
        text: The text, up to where it was to stop.
        finished: Whether it came to its end, rather than to the most tokens that it might take.
    """

    text: str
    finished: bool


class TextWriter(Protocol):
    """What is asked of a writer."""

    @property
    def name(self) -> str:
        """What it is called, in records and errors."""

    @property
    def chats(self) -> bool:
        """Whether it follows an instruction. Otherwise it continues a text."""

    def write(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: str | None = None,
    ) -> list[Written]:
        """Answer, or continue, each of some texts.

        Args:
            texts: The texts.
            max_new_tokens: The most tokens of an answer.
            temperature: 0: the likeliest token at each step.
            seed: The same texts and seed give the same answers, as far as the writer can see to it.
            stop: A text at whose first appearance an answer ends; it is no part of it.
        """


class ModelWriter:
    """A language model in memory as a writer.

    Args:
        model: A causal language model of transformers, with or without an adapter. It is not changed.
        tokenizer: Its tokenizer.
        apply_chat_template: Whether texts are put into its tokenizer's chat template, as instructions that it was
            tuned to follow; by default if it has one.
        rows_at_once: How many texts it continues at once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        apply_chat_template: bool | None = None,
        rows_at_once: int = 16,
    ) -> None:
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self.chats = uses_chat_template(tokenizer, apply_chat_template)
        self._rows_at_once = rows_at_once
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        padding = tokenizer.pad_token_id
        self._padding = int(padding if padding is not None else min(self._ends, default=0))

    @property
    def name(self) -> str:
        """The name of its folder, or on the Hub."""
        config: Any = getattr(base_model_of(self._model), "config", None)
        return Path(getattr(config, "_name_or_path", None) or "model").name

    def write(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: str | None = None,
    ) -> list[Written]:
        """Continue each text, several at once; see [`TextWriter`].

        Raises:
            PromptError: If a text does not fit into the model's window.
        """
        training = self._model.training
        self._model.eval()
        devices = sorted({p.device.index for p in self._model.parameters() if p.device.type == "cuda"})
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(seed % _SEEDS)
                written: list[Written] = []
                for start in range(0, len(texts), self._rows_at_once):
                    block = [self._ids(text) for text in texts[start : start + self._rows_at_once]]
                    written += self._continue(block, max_new_tokens, temperature, stop)
        finally:
            self._model.train(training)
        return written

    def _ids(self, text: str) -> list[int]:
        if not self.chats:
            return list(self._tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        read = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(read["input_ids"])

    def _continue(
        self, rows: list[list[int]], max_new_tokens: int, temperature: float, stop: str | None
    ) -> list[Written]:
        longest = max(map(len, rows))
        self._check_length(longest, max_new_tokens)
        device = next(self._model.parameters()).device
        ids = torch.tensor([[self._padding] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": _TOP_P, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._padding,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )

        def stopped(now: torch.Tensor, _: Any) -> torch.Tensor:
            # transformers' own stop strings want a tokenizer whose tokens can be put together letter by letter.
            found = [stop is not None and stop in self._tokenizer.decode(row) for row in now[:, longest:].tolist()]
            return torch.tensor(found, device=device)

        given = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopped] if stop is not None else []),
        )[:, longest:].tolist()
        return [self._written(row, stop) for row in given]

    def _written(self, ids: list[int], stop: str | None) -> Written:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        text = str(self._tokenizer.decode(ids if end is None else ids[:end], skip_special_tokens=True))
        if stop is not None and stop in text:
            return Written(text.partition(stop)[0], finished=True)
        return Written(text, finished=end is not None)

    def _check_length(self, longest: int, max_new_tokens: int) -> None:
        config: Any = getattr(base_model_of(self._model), "config", None)
        most = getattr(config.get_text_config() if config is not None else None, "max_position_embeddings", None)
        if most is not None and longest + max_new_tokens > most:
            raise PromptError(
                f"What the writer reads takes {longest} tokens, which with {max_new_tokens} more to be written is "
                f"more than the window of {most} of {self.name!r}. Show it fewer seeds, or ask for less at once."
            )


class EndpointWriter:
    """A chat or completion model behind a server of OpenAI's protocol: vLLM, llama.cpp, Ollama, or one that is hosted.

    Args:
        url: Where the protocol begins, such as `"http://localhost:8000/v1"`.
        model: The model's name there.
        token: Bearer token, if the server wants one. It goes to this server alone, and into no record.
        chats: Whether to ask as in a chat (`/chat/completions`) rather than to have a text continued (`/completions`).

    Raises:
        EngineError: If the URL is none of HTTP.
    """

    def __init__(self, url: str, model: str, *, token: str | None = None, chats: bool = True) -> None:
        mend = "Check the URL, which commonly ends in /v1, and that the server runs; what was written is kept."
        self._client = HttpClient(url, token, what="The writer", mend=mend)
        self._model = model
        self.chats = chats

    @property
    def name(self) -> str:
        """The model's name at the server."""
        return self._model

    def write(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: str | None = None,
    ) -> list[Written]:
        """Have each text answered, one after the other; see [`TextWriter`].

        Raises:
            EngineError: If the server cannot be reached, refuses, or answers something else.
        """
        asked: dict[str, Any] = {"model": self._model, "max_tokens": max_new_tokens, "temperature": temperature}
        if stop is not None:
            asked["stop"] = [stop]
        return [
            self._answer({**asked, "seed": (seed + place) % _SEEDS}, text, stop) for place, text in enumerate(texts)
        ]

    def _answer(self, asked: dict[str, Any], text: str, stop: str | None) -> Written:
        path, said = "/completions", {"prompt": text}
        if self.chats:
            path, said = "/chat/completions", {"messages": [{"role": "user", "content": text}]}  # type: ignore[dict-item]
        with self._client.ask(path, {**asked, **said}, not_there=()) as response:
            assert response is not None
            facts = self._client.facts_in(response)
        try:
            choice = facts["choices"][0]
            found = choice["message"]["content"] if self.chats else choice["text"]
            finished = choice.get("finish_reason") == "stop"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self._client.name} answered no choice with a text ({error!r}), as OpenAI's protocol has it. Check "
                "the URL, and whether it wants to be asked as in a chat."
            ) from error
        found = found if isinstance(found, str) else ""  # a refusal has none
        # Some servers leave the stop in.
        return Written(found.partition(stop)[0] if stop else found, finished)
