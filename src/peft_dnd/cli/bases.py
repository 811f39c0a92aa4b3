# SPDX-License-Identifier: Apache-2.0
"""Base models as the verbs need them: loaded with their tokenizer, or as a skeleton without weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import CommandError, one_paragraph


if TYPE_CHECKING:
    from torch import nn

    from peft_dnd.adapters import AdapterLayout


def load_base(name: str, task_type: str | None = None, device: str | None = None) -> nn.Module:
    """Load a base model in the dtype that it is stored in, onto a device.

    Args:
        name: Folder or Hub id.
        task_type: PEFT's task type, which says which head is wanted.
        device: The device; by default the first GPU if there is one.

    Raises:
        CommandError: If there is none there, or no such device.
    """
    import torch
    import transformers

    from peft_dnd.storage.cards import AUTO_CLASSES
    from peft_dnd.storage.hub import commit_in_cache

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    auto: Any = getattr(transformers, AUTO_CLASSES.get(task_type, "AutoModel"))
    try:
        model = auto.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise CommandError(_not_there("base model", name, error)) from error
    # Under this name transformers up to 5.1 noted the commit, and layouts are told it; later versions do not.
    if getattr(model.config, "_commit_hash", None) is None:
        model.config._commit_hash = commit_in_cache(name, ("config.json",))
    try:
        moved: nn.Module = model.to(where)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"The base cannot be put on the device {where!r}: {one_paragraph(error)}") from error
    return moved


def load_tokenizer(name: str) -> Any:
    """Load a base model's tokenizer.

    Raises:
        CommandError: If there is none there.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CommandError(_not_there("tokenizer", name, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(name: str) -> nn.Module:
    """A base model on the meta device, from its configuration alone.

    Raises:
        CommandError: If there is no configuration there, or of no architecture that transformers knows.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CommandError(_not_there("base model", name, error)) from error
    kind = getattr(transformers, str((config.architectures or [None])[0]), None)
    with torch.device("meta"):
        made: nn.Module = kind(config) if kind is not None else transformers.AutoModel.from_config(config)
    return made


def fit_to_skeleton(layout: AdapterLayout, name: str) -> tuple[dict[str, str], str | None]:
    """Hold a layout against a base model of which the configuration alone is read.

    Returns:
        Name of a module in the layout -> its name in the base, where they differ; and what is in the way of putting
        such adapters on the base, `None` if nothing is.

    Raises:
        CommandError: As in `skeleton`.
    """
    from peft_dnd.adapters import AdapterLayout
    from peft_dnd.adapters.matching import lora_config_for, match_modules
    from peft_dnd.engines import names_in_served_class
    from peft_dnd.errors import BaseModelMismatchError

    base = skeleton(name)
    try:
        found = match_modules(base, layout)
        needed = AdapterLayout.from_lora_config(lora_config_for(base, layout, found), base)
    except BaseModelMismatchError as error:
        with suppress(BaseModelMismatchError):
            found = names_in_served_class(base, layout)
            return {module: there for module, there in found.items() if module != there}, str(error)
        return {}, str(error)
    here = replace(layout, modules=tuple(replace(module, name=found[module.name]) for module in layout.modules))
    difference = here.difference(needed)
    renamed = {module: there for module, there in found.items() if module != there}
    return renamed, difference and f"the adapters (the first) do not fit {name!r} (the second): {difference}"


def example_of(tokenizer: Any, question: str, answer: str, max_length: int) -> dict[str, list[int]]:
    """A question and its answer as the base is trained on them: what it reads, and the loss on the answer alone.

    The question is put into the tokenizer's chat template where it has one, otherwise a line of its own, as
    `AnswerScorer` asks it.

    Args:
        tokenizer: The base's tokenizer.
        question: The question.
        answer: The answer.
        max_length: Tokens after which the example is cut.

    Raises:
        CommandError: If nothing of the answer is left.
    """
    from peft_dnd.text.prompts import uses_chat_template

    if uses_chat_template(tokenizer):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        # Some templates drop parts of an answer, or write another opening for it.
        whole = whole if whole.startswith(asked) else f"{asked}{answer}{tokenizer.eos_token or ''}"
        special = False
    else:
        asked, special = f"{question}\n", True
        whole = f"{asked}{answer}"
    start = tokenizer(asked, add_special_tokens=special)["input_ids"]
    end = tokenizer(whole.removeprefix(asked), add_special_tokens=False)["input_ids"]
    stop = tokenizer.eos_token_id
    if special and stop is not None:
        start = start[:-1] if start and start[-1] == stop else start
        end = [*end, stop]
    ids = [*start, *end][:max_length]
    if len(start) >= len(ids):
        raise CommandError(
            f"Of the example {question!r:.60} nothing is left of the answer within {max_length} tokens: the question "
            f"alone takes {len(start)}. Raise max_length, or leave it out."
        )
    return {"input_ids": ids, "labels": [*([-100] * len(start)), *ids[len(start) :]]}


def _not_there(what: str, name: str, error: Exception) -> str:
    from peft_dnd.generator.summary import SUMMARY_NAME

    # transformers lists all of its architectures, some three hundred.
    why = one_paragraph(error).split(" Model type should be one of", maxsplit=1)[0]
    if not Path(name).is_dir():
        return (
            f"There is no {what} at {name!r} (there is no such folder, and the Hub gave none; {why}). Check the "
            "spelling, and from where the path is counted."
        )
    if what == "tokenizer" and not any(Path(name).glob("*token*")):  # the library's own error speaks of others
        return (
            f"The base's folder {name!r} holds no tokenizer: expected tokenizer.json and tokenizer_config.json beside "
            f"the model. Save it there: AutoTokenizer.from_pretrained(...).save_pretrained({name!r})."
        )
    if what == "base model" and Path(name, SUMMARY_NAME).is_file():
        why = "it is a generator's folder; name the model that it writes adapters for"
    return f"There is no {what} at {name!r} ({why})."
