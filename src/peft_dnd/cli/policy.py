# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd policy`: a generator's policy shown, set and taken away; and adapters held against one, for `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .bases import load_base, load_tokenizer
from .console import CommandError, Device, Json, Quiet, Revision, named_places, progress, report, suggestion
from .prompt_files import read_rows, texts_of


if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from peft_dnd.adapters import GeneratedAdapter
    from peft_dnd.generator import PromptConditionedLoraGenerator
    from peft_dnd.pairs import PromptCheckpointDataset

# As `GeneratorPolicy` calls them.
_PARTS = ("norms", "never_written", "refused", "classifier", "gate")
_ALL = "all"


def policy(
    generator: Annotated[str, typer.Argument(help="Folder of a generator; to show its policy a Hub id as well.")],
    norms: Annotated[
        bool,
        typer.Option(
            "--norms", help="Bound the norms of updates, as the training adapters' are; with --base relative."
        ),
    ] = False,
    above: Annotated[
        Literal["shrink", "refuse"] | None,
        typer.Option(help="With --norms: what becomes of adapters above a bound. [default: shrink]"),
    ] = None,
    never_write: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Modules that are never written, '*.down_proj' for one; may be repeated."
        ),
    ] = None,
    refuse: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=FILE", help="A class of prompts to refuse, and examples of it; may be repeated."),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="With --refuse: a fitted task that is of such a class; may be repeated."),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts on which an adapted base must answer nearly as --base itself."),
    ] = None,
    gate_bound: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --gate: nats a token; by default what the generator's own adapters of its fitted tasks give.",
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="The training pairs, folder or Hub id; by default what the generator keeps of them itself."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, with its tokenizer.")] = None,
    false_alarms: Annotated[
        float | None,
        typer.Option(help="Share of new tasks like the fitted ones that a bound may stop. [default: 0.01]"),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="norms, never-written, refused, classifier, gate or all; may be repeated."),
    ] = None,
    column: Annotated[str, typer.Option(help="Field or column of the prompts in files.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="And of answers, for a generator that reads them.")] = "answer",
    device: Device = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show, set or take away a generator's policy: what it does not do, whoever asks.

    Without options that set something it is shown. What is set replaces that part of the policy; the other parts stay.
    Configuration, checksums, summary and card in the folder follow; the weights are not touched.

    Example:
      peft-dnd policy generator --norms --base Qwen/Qwen2.5-0.5B --never-write '*.down_proj'
      peft-dnd policy generator --refuse "medical advice=medical.txt" --pairs pairs --leave-out med
      peft-dnd policy generator --gate safety.jsonl --gate-bound 0.5 --base Qwen/Qwen2.5-0.5B
      peft-dnd policy generator --remove gate
    """
    _check_options(norms, above, refuse, leave_out, gate, gate_bound, pairs, base, false_alarms)
    files = named_places(refuse, "--refuse", "CLASS=FILE")
    examples = {name: read_rows(file, column) for name, file in files.items()}  # before the library is loaded
    asked = None if gate is None else texts_of(read_rows(gate, column), column, gate)
    gone = _removed(remove)
    if not (norms or never_write or examples or asked or gone):
        _show(generator, revision, as_json=as_json, quiet=quiet)
        return
    if not Path(generator).is_dir():
        raise CommandError(
            f"{generator!r} is no folder here, and a policy is set in one. Download the generator first (hf download "
            f"{generator} --local-dir FOLDER), set it there, and upload it."
        )
    with progress(quiet):
        from peft_dnd.generator import PromptConditionedLoraGenerator
        from peft_dnd.generator.policy_files import write_policy
        from peft_dnd.policy.bounds import FALSE_ALARMS

        alarms = FALSE_ALARMS if false_alarms is None else false_alarms
        loaded = PromptConditionedLoraGenerator.from_pretrained(generator)
        kept = _Kept(loaded, pairs)
        model = None if base is None else load_base(base, _task_type(loaded), device)
        parts = _without(loaded, gone)
        if norms:
            from peft_dnd.policy import NormBounds

            parts["norms"] = NormBounds.calibrate(kept.adapters, model, above=above or "shrink", false_alarms=alarms)
        if never_write:
            parts["never_written"] = tuple(never_write)
        if examples:
            parts["refused"] = loaded.fit_refused_prompts(
                {name: _as_read(loaded, rows, column, answer_column, name) for name, rows in examples.items()},
                kept.prompts(leave_out or []),
                false_alarms=alarms,
            )
        if asked and model is not None and base is not None:
            parts["gate"] = _gate(asked, model, base, gate_bound, kept, alarms)
        _set(loaded, parts)
        with_card = write_policy(loaded, generator)
    _report(generator, loaded.config.policy, as_json=as_json, quiet=quiet, card=with_card)


class _Kept:
    """What bounds are calibrated on: the pairs that were named, or what the generator itself keeps of its tasks."""

    def __init__(self, generator: PromptConditionedLoraGenerator, name: str | None) -> None:
        self.generator = generator
        self._given: PromptCheckpointDataset | None = None
        if name is not None:
            from peft_dnd.pairs import PromptCheckpointDataset

            from_place = (
                PromptCheckpointDataset.from_folder if Path(name).exists() else PromptCheckpointDataset.from_hub
            )
            self._given = from_place(name)

    @property
    def adapters(self) -> PromptCheckpointDataset | Mapping[str, GeneratedAdapter]:
        """Their adapters; of a generator that was fitted without any those that it writes itself."""
        from peft_dnd.errors import NotFittedError

        if self._given is None:
            try:
                return self.generator.stored_pairs()
            except NotFittedError:
                return self.generator.fitted_adapters(self.prompts([]))
        return self._given if self._given.has_checkpoints else self.generator.fitted_adapters(self.prompts([]))

    def prompts(self, leave_out: list[str]) -> dict[str, tuple[str, ...]]:
        """Task -> the texts of it that the generator reads, but for some tasks."""
        config, store = self.generator.config, self.generator.replay_store if self._given is None else None
        if self._given is not None:
            given = self._given.with_condition(config.condition_text, config.answer_ratio)
            found = {task: given.prompts(task) for task in given.tasks}
        elif store is not None:
            found = {name: task.texts for name, task in store.tasks.items()}
        else:
            raise CommandError(
                "The generator keeps no prompts of its fitted tasks, which bounds are calibrated on. Name the "
                "training pairs: --pairs FOLDER"
            )
        for task in leave_out:
            if task not in found:
                from peft_dnd.errors import did_you_mean

                raise CommandError(f"--leave-out {task!r} is no fitted task.{did_you_mean(task, found)}")
        return {task: texts for task, texts in found.items() if task not in leave_out}


def _check_options(
    norms: bool,
    above: str | None,
    refuse: list[str] | None,
    leave_out: list[str] | None,
    gate: str | None,
    gate_bound: float | None,
    pairs: str | None,
    base: str | None,
    false_alarms: float | None,
) -> None:
    for given, name, needed, what in (
        (above, "--above", norms, "--norms"),
        (leave_out, "--leave-out", refuse, "--refuse"),
        (gate_bound is not None, "--gate-bound", gate, "--gate"),
        (gate, "--gate", base, "--base, which answers the prompts"),
        (base, "--base", norms or gate, "--norms or --gate"),
        (pairs, "--pairs", norms or refuse or gate, "--norms, --refuse or --gate"),
        (false_alarms is not None, "--false-alarms", norms or refuse or gate, "--norms, --refuse or --gate"),
    ):
        if given and not needed:
            raise typer.BadParameter(f"{name} goes with {what}.")


def _task_type(generator: PromptConditionedLoraGenerator) -> str | None:
    task_type: str | None = next(iter(generator.config.layouts.values())).task_type
    return task_type


def _removed(remove: list[str] | None) -> tuple[str, ...]:
    """The parts that are to be taken away, as a policy calls them."""
    names = [part.replace("-", "_") for part in remove or []]
    for given, name in zip(remove or [], names, strict=True):
        if name not in (*_PARTS, _ALL):
            known = [part.replace("_", "-") for part in (*_PARTS, _ALL)]
            raise typer.BadParameter(f"--remove {given!r} is no part of a policy.{suggestion(given, known)}")
    return _PARTS if _ALL in names else tuple(names)


def _without(generator: PromptConditionedLoraGenerator, gone: tuple[str, ...]) -> dict[str, Any]:
    """The parts of a generator's policy but for those that are to be taken away."""
    parts = {} if generator.policy is None else {name: getattr(generator.policy, name) for name in _PARTS}
    for name in gone if gone != _PARTS else ():
        if not parts.get(name):
            raise CommandError(f"--remove {name.replace('_', '-')}: the policy has no such part.")
    return {name: part for name, part in parts.items() if name not in gone}


def _as_read(
    generator: PromptConditionedLoraGenerator, rows: list[dict[str, Any]], column: str, answer_column: str, name: str
) -> tuple[str, ...]:
    """Examples of a class in the form that the generator reads."""
    what = f"the examples of {name!r}"
    answers = None
    if generator.config.condition_text != "prompts":
        answers = texts_of(rows, answer_column, what, are_answers=True)
    return generator.condition_texts(texts_of(rows, column, what), answers, what=what)


def _gate(
    prompts: list[str], model: nn.Module, base: str, bound: float | None, kept: _Kept, false_alarms: float
) -> Any:
    from peft_dnd.policy import BehaviourGate

    gate = BehaviourGate.from_prompts(prompts, model, load_tokenizer(base), bound=bound)
    if bound is not None:
        return gate
    return gate.calibrate(kept.generator.fitted_adapters(kept.prompts([])), model, false_alarms=false_alarms)


def _set(generator: PromptConditionedLoraGenerator, parts: dict[str, Any]) -> None:
    from peft_dnd.policy import GeneratorPolicy

    generator.set_policy(GeneratorPolicy(**parts) if any(parts.values()) else None)


def _show(generator: str, revision: str | None, *, as_json: bool, quiet: bool) -> None:
    from transformers.utils import CONFIG_NAME

    from peft_dnd.generator import PromptConditionedLoraGeneratorConfig
    from peft_dnd.storage.hub import find_generator

    folder, _ = find_generator(generator, (CONFIG_NAME,), revision=revision)
    _report(
        generator, PromptConditionedLoraGeneratorConfig.from_pretrained(folder).policy, as_json=as_json, quiet=quiet
    )


def _report(generator: str, data: dict[str, Any], *, as_json: bool, quiet: bool, card: bool | None = None) -> None:
    from peft_dnd.policy.policy import policy_in_words

    words = policy_in_words(data) or ["There is no policy: it writes whatever it is asked for."]
    if card is not None:
        words.append(f"Written to {generator}.")
    if card is False:
        words.append("Its README.md was edited by hand and stays as it is: see `peft-dnd card`.")
    facts = {"generator": generator, "policy": data or None, "card_written": card}
    report(facts, "\n".join(words), as_json=as_json, quiet=quiet)


def held_against_policy(
    kind: str, what: str, generator: str, gate_base: str | None, revision: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Hold an adapter against a generator's policy, of which configuration and policy alone are read.

    Args:
        kind: What lies there, as `inspect` tells it.
        what: Folder or Hub id of the adapter.
        generator: Folder or Hub id of the generator.
        gate_base: Folder or Hub id of the base for the behaviour gate.
        revision: The adapter's on the Hub.

    Returns:
        What is known of the check, and what is wrong.

    Raises:
        CommandError: If it is no adapter, or the generator has no policy.
    """
    from transformers.utils import CONFIG_NAME

    from peft_dnd.generator import PromptConditionedLoraGeneratorConfig
    from peft_dnd.policy import GeneratorPolicy, check_adapter
    from peft_dnd.policy.policy import POLICY_NAME
    from peft_dnd.storage.hub import find_adapter, find_generator

    if kind != "adapter":
        raise CommandError(f"--policy-of is for adapters, and {what!r} holds a {kind}.")
    folder, _ = find_generator(generator, (CONFIG_NAME, POLICY_NAME))
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(folder)
    if not config.policy:
        raise CommandError(f"The generator {generator!r} has no policy to hold an adapter against.")
    policy = GeneratorPolicy.load(config.policy, folder / POLICY_NAME)
    layouts = list(config.layouts.values())
    base = None if gate_base is None else load_base(gate_base, layouts[0].task_type)
    adapter = find_adapter(what, ("adapter_*", "peft_dnd_provenance.json"), revision=revision)
    found = check_adapter(adapter, policy, layouts, base)
    facts = {"of": generator, "kept": not found.problems, "not_checked": "; ".join(found.not_checked) or None}
    return facts, [f"policy: {problem}" for problem in found.problems]
