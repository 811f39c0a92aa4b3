# SPDX-License-Identifier: Apache-2.0
"""The teacher of context distillation: a base with a task's text in its window, which answers inputs for the student.

A teacher needs neither labels nor checkpoints: what it does with a text in its window (an instruction, solved
examples, a policy, a document) is what the student, the same base with a generated adapter and without that text, is
fitted to do (Doc-to-LoRA, arXiv 2602.15902, fits its generators so). The student may also be another base:
of one that reads the same tokens it learns the probabilities too, of any other the answers as text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from ..adapters.lora import live_state_dict
from ..adapters.matching import adaptable_modules, base_model_of
from ..errors import GeneratorConfigError, PairsFolderError, PromptError, PromptTypeError
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.distillation import DistillationRecord, DistillationWriter, read_record
from ..pairs.examples import KeptExamples
from ..pairs.folder import TaskRecord, adapter_digest, write_task
from ..pairs.prompt_pool import read_prompts, write_prompts
from ..pairs.writer import task_record
from ..storage.files import PathLike
from ..storage.progress import with_progress
from ..text.prompts import check_prompts, uses_chat_template


logger = logging.getLogger(__name__)

_IGNORED = -100
_SAMPLED = 64


def distil_task(
    folder: PathLike,
    inputs: Sequence[str],
    *,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    context: str | Sequence[str],
    prompts: Sequence[str] | None = None,
    apply_chat_template: bool | None = None,
    max_new_tokens: int = 32,
    top_tokens: int = 16,
    stop: str | None = None,
    rows_at_once: int = 16,
    task: str | None = None,
    student: nn.Module | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> None:
    """Make a task's folder of prompts alone: the teacher answers them, with the task's text in its window.

    The teacher reads `context + input`, and the student, the same base with a generated adapter, is to do with the
    input alone what the teacher did. In a folder that holds a complete task already, its checkpoints and examples
    stay. A pass that was killed goes on where it stopped when the call is made again; one that is complete does
    nothing.

    Args:
        folder: The task's folder inside the pairs folder, for instance `"pairs/support"`.
        inputs: What the student will see, one text each; for a model without chat template just as it will stand in
            its window, for instance `"Question: ... Answer:"`.
        teacher: The frozen base whose answers are wanted: the one that the generator writes for, or another (see
            `student`), with or without an adapter of its own. It is not changed.
        tokenizer: Its tokenizer.
        context: What stands in the teacher's window before the input: one text for all inputs, or one each; `""` where
            it is the teacher's own adapter, or its being another base, that tells it more.
        prompts: What the generator reads, the task's pool of prompts: by default each `context + input`. Of a task
            that exists already its own prompts are kept, and none may be given.
        apply_chat_template: Whether the texts are put into the tokenizer's chat template, the context as the system's
            message and the input as the user's; by default if it has one.
        max_new_tokens: The most tokens of an answer.
        top_tokens: k, of how many of the teacher's likeliest next tokens the probabilities are kept. 0: its answers
            alone, to be fitted to with `distillation_targets="answers"`.
        stop: A text at whose first appearance an answer ends, such as a line end for a base that was not tuned to
            stop by itself.
        rows_at_once: How many inputs go through the teacher at once.
        task: The task's name; by default that of the folder.
        student: The base that the generator writes for, where the teacher is another. If it has other tokens,
            `top_tokens` must be 0: answers go from one to the other as text.
        student_tokenizer: Its tokenizer.
        overwrite: Whether to begin anew where another teacher, or other inputs, were at work before.

    Raises:
        PromptError: If there are no inputs, an empty one, or one that does not fit into the teacher's window.
        PromptTypeError: If they are no sequence of strings, or the context is neither that nor a string.
        PairsFolderError: If the folder holds something else, or what another teacher said, and `overwrite` is off; if
            an answer is empty; if prompts are given for a task that has some.
        GeneratorConfigError: If a setting is impossible, a model or tokenizer is a name, or the student has other
            tokens than the teacher.
    """
    sizes = {"max_new_tokens": max_new_tokens, "top_tokens": top_tokens, "rows_at_once": rows_at_once}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < (name != "top_tokens"):
            what = "a positive integer" if name != "top_tokens" else "a positive integer, or 0"
            raise GeneratorConfigError(f"{name} must be {what}, got {value!r}.")
    _check_loaded(teacher=teacher, tokenizer=tokenizer, student=student, student_tokenizer=student_tokenizer)
    inputs = check_prompts(inputs, "the inputs")
    if not isinstance(context, Iterable):
        raise PromptTypeError(f"context must be a text, or a list of one for each input; got {context!r:.80}.")
    contexts = (context,) * len(inputs) if isinstance(context, str) else tuple(context)
    if len(contexts) != len(inputs):
        raise PromptError(f"There are {len(inputs)} inputs, but {len(contexts)} contexts. Give one text, or one each.")
    same_tokens = _same_tokens(tokenizer, student, student_tokenizer, top_tokens)
    student_tokenizer = student_tokenizer or tokenizer
    windows = _windows(tokenizer, student_tokenizer, inputs, contexts, apply_chat_template)
    _check_lengths(teacher, [ids for ids, _ in windows], max_new_tokens, "teacher")
    if student is not None:
        _check_lengths(student, [ids for _, ids in windows], max_new_tokens, "student")
    folder = Path(folder).absolute()
    found, pool = _task_of(folder, task, prompts, [c + i for c, i in zip(contexts, inputs, strict=True)])
    record = DistillationRecord(
        teacher=teacher_digests(teacher),
        asked={
            "windows": _digest(windows),
            "max_new_tokens": max_new_tokens,
            "top_tokens": top_tokens,
            "stop": stop,
        },
        rows=len(inputs),
        student=None if student is None else base_digest(student),
    )
    writer = DistillationWriter(folder, record, overwrite=overwrite)
    if pool is not None:  # only now: what is refused leaves the folder as it was
        write_task(folder, found)
        write_prompts(folder, pool)
    writer.begin()
    if writer.done:
        logger.info("%s: %d of %d inputs are answered already.", folder, writer.done, record.rows)
    reader = None if same_tokens else student_tokenizer
    answering = _Answering(teacher, tokenizer, max_new_tokens, top_tokens, stop, reader)
    starts = range(writer.done, len(inputs), rows_at_once)
    with _as_teacher(teacher):
        for start in with_progress(starts, f"Teacher on {found.task}"):
            block = windows[start : start + rows_at_once]
            writer.add(answering.rows(block, inputs[start : start + rows_at_once]))
    writer.close()
    write_task(folder, replace(found, complete=True))


def teacher_digests(teacher: nn.Module) -> dict[str, str | None]:
    """Who a teacher is: digests of its base's weights and of its active adapters, and its name.

    The base's is taken of a sample of each weight, rounded to bfloat16, so that it is quick, and the same in whatever
    dtype the base was loaded.
    """
    base = base_model_of(teacher)
    adapter = None
    if isinstance(teacher, PeftModel):
        states = {name: live_state_dict(teacher, name) for name in teacher.active_adapters}
        adapter = adapter_digest({f"{name}/{key}": value for name in states for key, value in states[name].items()})
    name = getattr(getattr(base, "config", None), "_name_or_path", None) or None
    return {"base": base_digest(teacher), "adapter": adapter, "name": Path(name).name if name else None}


def base_digest(model: nn.Module) -> str:
    """A digest of a base model's weights, whatever adapters are in it; see [`teacher_digests`]."""
    digest = hashlib.sha256()
    for name, module in adaptable_modules(model):
        for key, parameter in getattr(module, "base_layer", module).named_parameters(recurse=False):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].to("cpu", torch.bfloat16)
            digest.update(f"{name}.{key} {tuple(parameter.shape)}\n".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def check_teachers(pairs: PromptCheckpointDataset, base_model: nn.Module, *, answers_alone: bool) -> None:
    """Make sure that what teachers said to the tasks was said by the base that is fitted for, or to it.

    Args:
        pairs: The pairs.
        base_model: That base.
        answers_alone: Whether probabilities are not wanted.

    Raises:
        PairsFolderError: If another base said it, and not to this one, or the probabilities were not kept.
    """
    own = base_digest(base_model)
    for task in pairs.tasks:
        rows = pairs.distillation(task)
        # What a generator kept of a teacher's answers was held against this base when it was read.
        record = None if rows is None or isinstance(rows, KeptExamples) else read_record(rows.path.parent)
        if record is not None and not answers_alone and record.asked.get("top_tokens") == 0:
            raise PairsFolderError(
                f"Of task {task!r} the teacher's answers alone were kept, without probabilities. Set "
                "distillation_targets='answers', or have it answered again with top_tokens=16."
            )
        if record is None or (record.student or record.teacher["base"]) == own:
            continue
        if record.student is not None:
            raise PairsFolderError(
                f"Task {task!r} was answered for another base than the trainer's base_model, for the one with the "
                f"digest {record.student}; this has {own}. Have it answered for this one with distil_task(..., "
                "student=base_model, overwrite=True), or pass the base that it was answered for."
            )
        raise PairsFolderError(
            f"Task {task!r} was answered by another base, {record.teacher.get('name')!r} with the digest "
            f"{record.teacher['base']}; the trainer's base_model has {own}. Have it answered by this base with "
            "distil_task(..., overwrite=True), or for it with distil_task(..., student=base_model, ...) if the other "
            "is to be its teacher, or pass the base that answered."
        )


class _Answering:
    """Answers to a block of inputs: greedy, each step's top tokens kept; in the tokens of a `reader`, if given."""

    def __init__(
        self,
        teacher: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        top: int,
        stop: str | None,
        reader: PreTrainedTokenizerBase | None,
    ) -> None:
        self._reader = reader
        self._teacher: Any = teacher
        self._tokenizer = tokenizer
        self._top = top
        self._stop = stop
        own = getattr(self._teacher, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        padding = tokenizer.pad_token_id
        self._padding = int(padding if padding is not None else min(self._ends, default=0))
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._padding,
        )

    def rows(self, windows: Sequence[tuple[list[int], list[int]]], inputs: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of `distillation.jsonl` for teacher's and student's token ids."""
        keeper = _KeepTop(self._top)
        longest = max(len(ids) for ids, _ in windows)
        device = next(self._teacher.parameters()).device
        ids = torch.tensor([[self._padding] * (longest - len(ids)) + ids for ids, _ in windows], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in windows], device=device)
        given = self._teacher.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._config,
            logits_processor=LogitsProcessorList([keeper] if self._top else []),
            stopping_criteria=StoppingCriteriaList([lambda now, _: self._stopped(now[:, longest:])]),
        )[:, longest:].tolist()
        for place, ((_, student), answer) in enumerate(zip(windows, given, strict=True)):
            answer = self._cut(answer, inputs[place])
            steps = range(len(answer))
            read = answer if self._reader is None else self._as_read(answer, self._reader)
            row: dict[str, Any] = {"input_ids": [*student, *read], "labels": [*([_IGNORED] * len(student)), *read]}
            if self._top:
                row["top_tokens"] = [keeper.tokens[step][place].tolist() for step in steps]
                row["top_log_probs"] = [
                    [round(value, 4) for value in keeper.log_probs[step][place].tolist()] for step in steps
                ]
            yield row

    def _as_read(self, answer: list[int], reader: PreTrainedTokenizerBase) -> list[int]:
        """An answer in a student's own tokens; where the teacher ended it, it ends as the student's texts do."""
        text = str(self._tokenizer.decode([token for token in answer if token not in self._ends]))
        read = list(reader(text, add_special_tokens=False)["input_ids"])
        ended = answer[-1] in self._ends and reader.eos_token_id is not None
        return [*read, int(reader.eos_token_id)] if ended else read

    def _stopped(self, given: torch.Tensor) -> torch.Tensor:
        # transformers' own stop strings want a tokenizer whose tokens can be put together letter by letter.
        stop = self._stop
        stopped = [stop is not None and stop in str(self._tokenizer.decode(answer)) for answer in given.tolist()]
        return torch.tensor(stopped, device=given.device)

    def _cut(self, answer: list[int], text: str) -> list[int]:
        """The answer up to its end, which is part of it: the end of text, or the token that brings the stop."""
        kept: list[int] = []
        for token in answer:
            kept.append(token)
            if token in self._ends or (self._stop is not None and self._stop in self._tokenizer.decode(kept)):
                break
        said = str(self._tokenizer.decode([token for token in kept if token not in self._ends]))
        if not (said.partition(self._stop)[0] if self._stop else said).strip():
            raise PairsFolderError(
                f"The teacher answers {text[:60]!r} with nothing. Give it solved examples or a clearer text in its "
                "context, end the input where the answer is to begin, or leave that input out."
            )
        return kept


class _KeepTop(LogitsProcessor):
    """Keeps the top log-probabilities of every step of a generation, and changes nothing."""

    def __init__(self, top: int) -> None:
        self._top = top
        self.tokens: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        top = scores.float().log_softmax(-1).topk(min(self._top, scores.shape[-1]), -1)
        self.tokens.append(top.indices.cpu())
        self.log_probs.append(top.values.cpu())
        return scores


@contextmanager
def _as_teacher(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _check_loaded(**given: object) -> None:
    for argument, value in given.items():
        if isinstance(value, (str, os.PathLike)):
            kind = "AutoTokenizer" if argument.endswith("tokenizer") else "AutoModelForCausalLM"
            raise GeneratorConfigError(
                f"{argument} must be loaded, got the name {os.fspath(value)!r}. Load it: "
                f"{kind}.from_pretrained({os.fspath(value)!r})."
            )


def _same_tokens(
    tokenizer: PreTrainedTokenizerBase,
    student: nn.Module | None,
    own: PreTrainedTokenizerBase | None,
    top_tokens: int,
) -> bool:
    """Whether the student reads the teacher's tokens; if not, no probabilities of them may be wanted."""
    if (student is None) != (own is None):
        raise GeneratorConfigError("Give both student and student_tokenizer, or none where the teacher's base learns.")
    theirs, mine = tokenizer.get_vocab(), (own or tokenizer).get_vocab()
    if theirs != mine and top_tokens:
        token = min(token for token in {**theirs, **mine} if theirs.get(token) != mine.get(token))
        raise GeneratorConfigError(
            f"The student has other tokens than the teacher: {token!r} is number {mine.get(token)} in the one's "
            f"vocabulary and {theirs.get(token)} in the other's, so it cannot learn their probabilities. Keep the "
            "teacher's answers alone, as text, with top_tokens=0, and fit with distillation_targets='answers'; or "
            "take a teacher of the student's family."
        )
    return theirs == mine


def _windows(
    tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str],
    contexts: Sequence[str],
    apply_chat_template: bool | None,
) -> list[tuple[list[int], list[int]]]:
    """Token ids of what the teacher reads, and of what the student reads, input by input."""
    templated, student_templated = (
        uses_chat_template(each, apply_chat_template) for each in (tokenizer, student_tokenizer)
    )
    return [
        (_read(tokenizer, context, text, templated), _read(student_tokenizer, "", text, student_templated))
        for context, text in zip(contexts, inputs, strict=True)
    ]


def _read(tokenizer: PreTrainedTokenizerBase, context: str, text: str, templated: bool) -> list[int]:
    if not templated:
        return list(tokenizer(context + text)["input_ids"])
    messages = [{"role": "system", "content": context}] if context else []
    messages.append({"role": "user", "content": text})
    found: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(found["input_ids"])


def _check_lengths(model: nn.Module, read: Sequence[list[int]], max_new_tokens: int, whose: str) -> None:
    config: Any = getattr(base_model_of(model), "config", None)
    most = getattr(config.get_text_config() if config is not None else None, "max_position_embeddings", None)
    for number, ids in enumerate(read):
        if most is not None and len(ids) + max_new_tokens > most:
            raise PromptError(
                f"Input {number} takes {len(ids)} tokens with its context, which with max_new_tokens={max_new_tokens} "
                f"is more than the {whose}'s window of {most}. Shorten the context, leave the input out, or lower "
                "max_new_tokens."
            )


def _task_of(
    folder: Path, name: str | None, prompts: Sequence[str] | None, default: Sequence[str]
) -> tuple[TaskRecord, Sequence[str] | None]:
    """The folder's task as it is, where it is complete; otherwise a new one, and the prompts that it is to have."""
    found = task_record(folder)
    if found is not None and found.complete:
        if prompts is not None and tuple(prompts) != tuple(read_prompts(folder)):
            raise PairsFolderError(
                f"Task {found.task!r} in {str(folder)!r} has prompts of its own, which are kept: leave prompts= out, "
                "or name another folder."
            )
        return found, None
    return TaskRecord(folder.name if name is None else name), check_prompts(default if prompts is None else prompts)


def _digest(windows: Sequence[tuple[list[int], list[int]]]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(windows).encode()).hexdigest()}"
