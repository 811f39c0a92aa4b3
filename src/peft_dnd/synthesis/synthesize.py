# SPDX-License-Identifier: Apache-2.0
"""From a few seeds to a file of prompts, with or without answers, or to a whole task of a pairs folder."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import GeneratorConfigError, PairsFolderError, SynthesisError
from ..fitting.teacher import distil_task
from ..pairs.folder import TaskRecord, write_task
from ..pairs.writer import task_record
from ..storage.digests import texts_digest
from ..storage.files import PathLike, write_text
from ..text.encoder import TextEncoder
from .answers import AnswerAsked, answers_to
from .filtering import PromptFilter
from .record import Round, Synthesis, SynthesisLog
from .settings import SynthesisSettings, check_count
from .wording import (
    TaskSeeds,
    asked_prompt,
    check_seeds,
    context_for_answers,
    end_of_list,
    prompts_in,
    request_for_prompts,
)
from .writers import ModelWriter, TextWriter


logger = logging.getLogger(__name__)

RECORD_NAME = "synthesis.jsonl"
_SHOWN = 6
_WANTED = 10
_OWN_SHARE = 3  # of how many shown prompts one at most is the writer's own, as in Self-Instruct
_PATIENCE = 8  # rounds that give nothing
_REQUESTS = 8  # in a round


def synthesize_prompts(
    file: PathLike,
    seeds: TaskSeeds,
    *,
    writer: TextWriter,
    text_encoder: TextEncoder,
    count: int = 64,
    answerer: TextWriter | None = None,
    asked: AnswerAsked | None = None,
    settings: SynthesisSettings | None = None,
    overwrite: bool = False,
) -> Synthesis:
    """Have more prompts of a task written, and answered if someone is to, into a `.jsonl` file.

    Round by round the writer is shown some seeds, up to a third of them prompts of its own, and writes on;
    [`PromptFilter`][peft_dnd.synthesis.PromptFilter] passes what is of the task and new. The file appears when there
    are enough: first the seeds (with an answerer only the solved ones), a row each, `{"prompt": ...}` or
    `{"prompt": ..., "answer": ...}`, which `peft-dnd collect` takes. Beside it `<name>.synthesis.jsonl` records what
    was asked for, kept and left out; a pass that was interrupted goes on from there when the same call is made again,
    and draws what an uninterrupted one would have drawn; one that is complete does nothing.

    Args:
        file: Where to. Its name must end in `.jsonl`.
        seeds: The task.
        writer: Who writes prompts.
        text_encoder: A text encoder, a generator's for one, to tell prompts apart.
        count: How many new prompts are wanted.
        answerer: Who answers them, the writer itself or another; by default nobody.
        asked: How answers are asked for.
        settings: How prompts are written, and which of them pass.
        overwrite: Whether to begin anew where something else was asked for before.

    Raises:
        SynthesisError: If several rounds in a row give nothing that passes. What was kept stays, and the same call
            tries on.
        PairsFolderError: If the file is there already and no synthesis made it, or for another request, and
            `overwrite` is off.
        GeneratorConfigError: If a setting is impossible.
        PromptTypeError: If the seeds are no `TaskSeeds`.
        EngineError: If the writer's server fails.
    """
    check_seeds(seeds)
    file = Path(file)
    if file.suffix != ".jsonl":
        raise GeneratorConfigError(f"The file of synthetic prompts must be named *.jsonl, got {str(file)!r}.")
    record = file.with_suffix(".synthesis.jsonl")
    if file.exists() and not record.is_file() and not overwrite:
        raise PairsFolderError(
            f"{str(file)!r} is there already, and no synthesis made it. Name another file, or pass overwrite=True "
            "(--overwrite)."
        )
    settings, asked = settings or SynthesisSettings(), asked or AnswerAsked()
    synthesizing = _Synthesizing(seeds, count, settings, writer, answerer, asked, text_encoder)
    done = synthesizing.run(SynthesisLog(record, synthesizing.request(), overwrite=overwrite))
    rows: list[dict[str, str]] = [{"prompt": prompt} for prompt in (*seeds.prompts, *done.prompts)]
    if answerer is not None:
        pairs = [
            *zip(seeds.prompts, seeds.answers or (), strict=False),
            *zip(done.prompts, done.answers or (), strict=True),
        ]
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return done


def synthesize_task(
    folder: PathLike,
    seeds: TaskSeeds,
    *,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: TextEncoder,
    writer: TextWriter | None = None,
    apply_chat_template: bool | None = None,
    count: int = 64,
    asked: AnswerAsked | None = None,
    settings: SynthesisSettings | None = None,
    top_tokens: int = 16,
    task: str | None = None,
    overwrite: bool = False,
) -> Synthesis:
    """Make a whole task of a pairs folder from a few seeds.

    More prompts are written, and the base's own answers to them, with the task's text in its window, become what the
    generator is fitted to (context distillation).

    The prompts are written, filtered and tried on the teacher as by `synthesize_prompts`; what it answers with nothing
    is left out. Then [`distil_task`][peft_dnd.fitting.distil_task] has it answer seeds and new prompts. The
    generator's pool is both, without the task's text. Until all is done the task is incomplete, and a fit refuses it;
    a pass that was interrupted goes on when the same call is made again.

    Args:
        folder: The task's folder inside the pairs folder.
        seeds: The task. What the teacher has in its window is the description and the solved seeds, so it needs one of
            them.
        teacher: The base that the generator writes for, with or without an adapter of its own.
        tokenizer: Its tokenizer.
        text_encoder: As for `synthesize_prompts`.
        writer: Who writes prompts; by default the teacher.
        apply_chat_template: Whether the teacher reads and answers in its chat template; by default if it has one.
        count: How many new prompts are wanted.
        asked: How the teacher answers; `votes` do not count here. Without chat template `stop` is a line end.
        settings: As for `synthesize_prompts`.
        top_tokens: As for `distil_task`.
        task: The task's name; by default the folder's.
        overwrite: Whether to replace what was made of another request.

    Raises:
        SynthesisError: As for `synthesize_prompts`, and if the teacher would have nothing in its window.
        PairsFolderError: If the folder holds a task that no synthesis made, or something else; or what was made of
            another request, and `overwrite` is off.
        GeneratorConfigError: If a setting is impossible.
        PromptTypeError: If the seeds are no `TaskSeeds`.
        EngineError: If the writer's server fails.
    """
    check_seeds(seeds)
    folder = Path(folder).absolute()
    answerer = ModelWriter(teacher, tokenizer, apply_chat_template=apply_chat_template)
    chats = answerer.chats
    settings = settings or SynthesisSettings()
    asked = AnswerAsked(stop=None if chats else "\n") if asked is None else replace(asked, votes=1)
    context = context_for_answers(seeds, chats=chats)
    if not context.strip():
        raise SynthesisError(
            "The teacher would have nothing in its window but the prompt, so its answers would teach nothing. Give a "
            "description or answers to the seeds; or have another model answer into a .jsonl file, with "
            "synthesize_prompts(..., answerer=...) or --endpoint."
        )
    record = folder / RECORD_NAME
    found = task_record(folder)
    if found is not None and not record.is_file():
        raise PairsFolderError(
            f"Task {found.task!r} in {str(folder)!r} was not made by a synthesis, and is left as it is. Name another "
            "folder, or remove that one."
        )
    synthesizing = _Synthesizing(seeds, count, settings, writer or answerer, answerer, asked, text_encoder)
    log = SynthesisLog(record, synthesizing.request(), overwrite=overwrite)
    if found is None or not found.complete or not log.rows:
        # First of all, so that whatever stops the rest, the folder passes for what it is: a task that is not done.
        write_task(folder, TaskRecord(folder.name if task is None else task))
    done = synthesizing.run(log)
    prompts = [*seeds.prompts, *done.prompts]
    distil_task(
        folder,
        [asked_prompt(prompt, chats=chats) for prompt in prompts],
        teacher=teacher,
        tokenizer=tokenizer,
        context=context,
        prompts=prompts,
        apply_chat_template=chats,
        max_new_tokens=asked.max_new_tokens,
        top_tokens=top_tokens,
        stop=asked.stop,
        task=task,
        # What a task that is not done holds of another request is of no use to anybody.
        overwrite=overwrite or found is None or not found.complete,
    )
    return done


class _Synthesizing:
    """Rounds of writing, filtering and answering, until there are enough prompts."""

    def __init__(
        self,
        seeds: TaskSeeds,
        count: int,
        settings: SynthesisSettings,
        writer: TextWriter,
        answerer: TextWriter | None,
        asked: AnswerAsked,
        text_encoder: TextEncoder,
    ) -> None:
        check_count("count", count)
        self._seeds = seeds
        self._count = count
        self._settings = settings
        self._writer = writer
        self._answerer = answerer
        self._asked = asked
        self._passing = PromptFilter(
            text_encoder,
            seeds.prompts,
            others=settings.others,
            closest=settings.closest,
            least_likeness=settings.least_likeness,
        )

    def request(self) -> dict[str, Any]:
        """What is asked for, as the record keeps it."""
        seeds = self._seeds
        told = [seeds.description or "", *seeds.prompts, *(seeds.answers or ())]
        return {
            "count": self._count,
            **self._settings.to_dict(),
            "seeds": texts_digest(told),
            "writer": self._writer.name,
            "answers": None if self._answerer is None else {"by": self._answerer.name, **asdict(self._asked)},
        }

    def run(self, log: SynthesisLog) -> Synthesis:
        """Go on from where the record stands.

        Raises:
            SynthesisError: If several rounds in a row give nothing.
        """
        count = self._count
        log.begin()
        done = log.state(count)
        if done.prompts:
            logger.info("%s: %d of %d prompts are written already.", log.path, len(done.prompts), count)
        self._passing.let_pass(log.passed())
        fruitless = 0
        with transformers_logging.tqdm(
            total=count, initial=len(done.prompts), desc="Writing prompts", disable=done.complete
        ) as bar:
            while not done.complete:
                before = len(done.prompts)
                log.add(self._round(len(log.rows), done.prompts))
                done = log.state(count)
                bar.update(len(done.prompts) - before)
                fruitless = 0 if len(done.prompts) > before else fruitless + 1
                if fruitless == _PATIENCE:
                    raise SynthesisError(self._too_few(done))
        return done

    def _round(self, number: int, written: Sequence[str]) -> Round:
        drawn = random.Random(f"synthesis {self._settings.seed} {number}")
        shown = [self._shown(drawn, written) for _ in range(_REQUESTS)]
        texts = [request_for_prompts(self._seeds, some, _WANTED, chats=self._writer.chats) for some in shown]
        given = self._writer.write(
            texts,
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            seed=drawn.getrandbits(31),
            stop=end_of_list(self._seeds.prompts, chats=self._writer.chats),
        )
        found = [
            prompt
            for one, some in zip(given, shown, strict=True)
            for prompt in prompts_in(one, some, chats=self._writer.chats)
        ]
        verdicts = self._passing(found)
        left_out = Counter(verdict for verdict in verdicts if verdict is not None)
        passed = [prompt for prompt, verdict in zip(found, verdicts, strict=True) if verdict is None]
        if self._answerer is None or not passed:
            return Round(passed, None, (), left_out)
        answers = answers_to(passed, self._seeds, self._answerer, self._asked, drawn.getrandbits(31))
        left_out.update(reason for _, reason in answers if reason is not None)
        answered = {prompt: given for prompt, (given, _) in zip(passed, answers, strict=True) if given is not None}
        unanswered = [prompt for prompt in passed if prompt not in answered]
        return Round(list(answered), list(answered.values()), unanswered, left_out)

    def _shown(self, drawn: random.Random, written: Sequence[str]) -> list[str]:
        own = drawn.sample(list(written), min(len(written), _SHOWN // _OWN_SHARE)) if self._seeds.prompts else []
        own = own or drawn.sample(list(written), min(len(written), _SHOWN))
        seeds = drawn.sample(self._seeds.prompts, min(len(self._seeds.prompts), _SHOWN - len(own)))
        shown = [*seeds, *own]
        drawn.shuffle(shown)
        return shown

    def _too_few(self, done: Synthesis) -> str:
        why = ", ".join(f"{number} {reason}" for reason, number in sorted(done.left_out.items(), key=lambda x: -x[1]))
        return (
            f"{len(done.prompts)} of {self._count} prompts were written, and then nothing in {_PATIENCE} rounds that "
            f"passes (left out so far: {why or 'nothing'}). Give more seeds or other ones, another writer, or other "
            "bounds (closest, least_likeness), or ask for fewer. What was written is kept, and the same call tries on."
        )
