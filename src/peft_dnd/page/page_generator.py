# SPDX-License-Identifier: Apache-2.0
"""A generator as a page holds it: it makes adapters one at a time, is watched meanwhile, and packs them."""

from __future__ import annotations

import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ..errors import BaseModelMismatchError, NotFittedError
from ..generator.conditioning import SET_LIMIT
from ..generator.modeling import PromptConditionedLoraGenerator
from ..text.out_of_distribution import read_points
from .chat_base import ChatBase
from .task_map import TaskMap


Tell = Callable[[float, str], None]
# Zip files hold the time of each file; the same adapter is to give the same bytes.
_ALWAYS = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class MadeAdapter:
    """An adapter that a visitor has made.

    Attributes:
        adapter: The adapter.
        generator: Name of the generator that wrote it.
        folder: Where its files are; [`discard`][MadeAdapter.discard] removes it.
        points: Where its prompts lie, float32 (n, C).
        prompts: How many prompts it was made of.
        seconds: How long reading them and writing it took.
    """

    adapter: GeneratedAdapter
    generator: str
    folder: Path
    points: Tensor
    prompts: int
    seconds: float

    @property
    def archive(self) -> Path:
        """The zip file with the adapter's folder in it."""
        return self.folder / "adapter.zip"

    @property
    def files(self) -> list[Path]:
        """The two files that PEFT reads."""
        return [self.folder / "adapter" / name for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)]

    @property
    def bytes(self) -> int:
        """The size of the weights' file."""
        return self.files[1].stat().st_size

    def discard(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(eq=False)
class PageGenerator:
    """A generator, and the base that its adapters are tried on.

    Attributes:
        name: What visitors choose it by.
        generator: The generator.
        base: The base; `None` if it is not there, and adapters can only be taken away.
        why_no_base: What is the matter with it then.
        map: Where the fitted tasks lie; `None` if the generator keeps nothing of them.
    """

    name: str
    generator: PromptConditionedLoraGenerator
    base: ChatBase | None = None
    why_no_base: str = ""
    map: TaskMap | None = field(init=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        reference = self.generator.prompt_reference
        self.map = None if reference is None else TaskMap(reference)

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        *,
        name: str | None = None,
        base: str | None = None,
        device: str | None = None,
        bases: dict[str, ChatBase] | None = None,
    ) -> PageGenerator:
        """Load a generator and its base. One that has no base here is loaded without.

        Args:
            folder: Folder or Hub id of the generator.
            name: What visitors choose it by; the same by default.
            base: Folder or Hub id of the base, where it is not what the generator names.
            device: Where the base is to run.
            bases: Bases that are loaded already, by name; a new one is put there, so that generators share it.

        Raises:
            GeneratorNotFoundError: If there is no generator there.
            CorruptFileError: If its files are damaged.
            TextEncoderError: If its text encoder cannot be loaded.
            NotFittedError: If it has never been fitted.
            BaseModelMismatchError: If `base` is given, and there is none, or none that the adapters fit.
        """
        generator = PromptConditionedLoraGenerator.from_pretrained(folder)
        generator.load_text_encoder()  # now, rather than for the first visitor
        if not generator.normalization.fitted:
            raise NotFittedError(f"The generator {folder!r} has never been fitted. Fit it with DnDTrainer first.")
        try:
            found, why = _base_for(generator, base, device, {} if bases is None else bases), ""
        except BaseModelMismatchError as error:
            if base is not None:
                raise
            found, why = None, str(error)
        return cls(name or folder, generator, found, why)

    def make(
        self,
        prompts: Sequence[str],
        folder: Path,
        *,
        answers: Sequence[str] | None = None,
        seed: int = 0,
        tell: Tell = lambda share, what: None,
    ) -> MadeAdapter:
        """Write the adapter of a task, and its files.

        Args:
            prompts: The task's prompts.
            folder: Where the files go; a new folder.
            answers: Their answers, if the generator reads them.
            seed: As for [`generate_adapter`][peft_dnd.PromptConditionedLoraGenerator.generate_adapter].
            tell: Called with how much is done, from 0 to 1, and what is being done.

        Raises:
            PromptError: If there are no prompts, or answers are missing.
            SavingError: If the files cannot be written.
        """
        tell(0.0, "Waiting for the generator")
        with self._lock, _watched(self.generator, self._read_of(prompts), tell) as seen:
            began = time.perf_counter()
            adapter = self.generator.generate_adapter(
                prompts, seed=seed, answers=answers, out_of_distribution="ignore"
            )
            seconds = time.perf_counter() - began
        tell(0.95, "Saving the adapter")
        made = MadeAdapter(adapter, self.name, folder, seen[0], len(prompts), seconds)
        adapter.save_pretrained(folder / "adapter")
        _pack(folder / "adapter", made.archive)
        return made

    def answers(self, question: str, made: MadeAdapter, turns: Sequence[tuple[str, str, str]], most: int) -> Any:
        """What the base answers, and then what it answers with the adapter, as each is there.

        Args:
            question: The question.
            made: The visitor's adapter.
            turns: Earlier questions, with the answers of both.
            most: The most tokens of an answer.

        Raises:
            BaseModelMismatchError: If there is no base.
            PromptError: If the question is too long.
        """
        if self.base is None:
            # Why is for whoever serves the page: it names folders.
            raise BaseModelMismatchError(
                "The base of these adapters is not here. Download the adapter, and try it where its base is."
            )
        alone = [(asked, bare) for asked, bare, _ in turns]
        adapted = [(asked, with_it) for asked, _, with_it in turns]
        yield self.base.answer(question, turns=alone, most_tokens=most)
        yield self.base.answer(question, adapter=made.adapter, kind=self._kind, turns=adapted, most_tokens=most)

    def _read_of(self, prompts: Sequence[str]) -> int:
        """How many prompts are read: a decoder of the paper's family draws as many as it was built for."""
        most = SET_LIMIT if self.generator.decoder.reads_sets else self.generator.config.num_prompts
        return max(1, min(most, len(set(prompts))))

    @property
    def _kind(self) -> str:
        return f"generator_{id(self)}"


def _base_for(
    generator: PromptConditionedLoraGenerator, given: str | None, device: str | None, bases: dict[str, ChatBase]
) -> ChatBase:
    name = given or generator.config.base_model_name_or_path
    if name is None:
        raise BaseModelMismatchError("The generator does not say which base model its adapters are for.")
    if name not in bases:
        bases[name] = ChatBase.from_pretrained(name, device=device)
    bases[name].check_fits(generator.config.adapter_layout)
    return bases[name]


@contextmanager
def _watched(generator: PromptConditionedLoraGenerator, prompts: int, tell: Tell) -> Iterator[list[Tensor]]:
    """Within this context what the generator does is told; what its decoder reads is kept, as points, in the list.

    Reading the prompts takes most of the time: a language model's embedding is called once for each block of them.
    """
    seen: list[Tensor] = []
    read = 0

    def on_embedding(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal read
        read = min(prompts, read + len(inputs[0]))
        tell(0.9 * read / prompts, f"Reading prompt {read} of {prompts}")

    def on_decoder(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        seen.append(read_points(inputs[0][0].cpu(), inputs[1][0].cpu()))  # of the one task
        tell(0.9, "Writing the adapter's matrices")

    words = next((part for part in generator.text_encoder.module.modules() if isinstance(part, nn.Embedding)), None)
    hooks = [] if words is None else [words.register_forward_pre_hook(on_embedding)]
    hooks.append(generator.decoder.register_forward_pre_hook(on_decoder))
    try:
        with torch.no_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _pack(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(f"{folder.name}/{path.name}", _ALWAYS)
            entry.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(entry, path.read_bytes())
