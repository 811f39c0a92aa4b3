# SPDX-License-Identifier: Apache-2.0
"""Making pairs of adapters that exist already, whoever trained them: brought to one layout, with their origin kept."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapters.layout import AdapterLayout
from ..adapters.one_layout import Conversion, common_layout, convert_adapter
from ..errors import GeneratorConfigError, LayoutError, PairsFolderError, PromptError, did_you_mean
from ..pairs.folder import INITIALIZATION_FOLDER, adapter_digest, load_task, may_be_task
from ..pairs.writer import PairWriter, task_record
from ..storage.files import PathLike, read_json, staged_directory, write_json
from ..storage.progress import with_progress
from ..text.prompts import check_prompts, prompts_digest
from ..text.prompts_and_answers import check_answers
from .adapter_cards import texts_of_card
from .adapter_files import ExistingAdapter, FoundAdapter, find_adapters
from .imported import (
    FACTORS,
    KEPT,
    ORIGIN_NAME,
    SHARED,
    check_neighbours,
    factors_of,
    has_no_other_tasks,
    rank_of_initialization,
    shared_start,
)


logger = logging.getLogger(__name__)

FROM_CARD = "card"
_REFUSE, _ZEROS = "refuse", "zeros"
# Adapters that were trained by themselves were seen to lose half of their updates to a shared A, and still do their
# tasks (benchmarks/results/existing_adapters_seed_0.json).
_MUCH_LOST = 0.75

OneOrMore = PathLike | ExistingAdapter | Sequence[PathLike | ExistingAdapter]


@dataclasses.dataclass(frozen=True)
class ImportedTask:
    """A task of a pairs folder that was made of adapters that existed already.

    Attributes:
        name: Its name.
        written: Whether it was written now; otherwise it was there, made of the same adapters in the same way.
        adapters: What its `origin.json` says of each: `step`, `adapter`, `commit`, `sha256`, `base_model`,
            `lora_alpha`, `use_rslora`, and the fields of [`Conversion`][peft_dnd.adapters.one_layout.Conversion].
    """

    name: str
    written: bool
    adapters: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A task that is to be written."""

    name: str
    found: list[FoundAdapter]
    prompts: tuple[str, ...]
    answers: tuple[str, ...] | None
    prompts_from: str


def import_adapters(
    adapters: Mapping[str, OneOrMore],
    pairs: PathLike,
    *,
    prompts: Mapping[str, Sequence[str] | Literal["card"]],
    answers: Mapping[str, Sequence[str]] | None = None,
    rank: int | None = None,
    layout: AdapterLayout | None = None,
    base_model: str | Sequence[str] | None = None,
    missing_modules: Literal["refuse", "zeros"] = "refuse",
    factors: Literal["shared", "canonical", "kept"] | None = None,
    pickles: bool = False,
    overwrite: bool = False,
) -> tuple[ImportedTask, ...]:
    """Make a pairs folder of LoRA adapters that exist already, which `PromptCheckpointDataset.from_folder` reads.

    They may differ in alpha, rsLoRA, rank and modules: all are brought to one layout, with a scaling of 1, as
    [`convert_adapter`][peft_dnd.adapters.one_layout.convert_adapter] says. Keys may be as PEFT writes them or as other
    tools do; see [`peft_keys`][peft_dnd.adapters.foreign_keys.peft_keys]. All configurations and headers are read
    before anything is written. Each task appears whole or not at all, with an `origin.json` that says where it came
    from and what was lost; a call that was interrupted is made again, and passes over the tasks that are done.

    Args:
        adapters: Task -> its adapter, or several: folder, Hub id or [`ExistingAdapter`]. A folder with a Trainer's
            `checkpoint-10`, `checkpoint-20`, ... in it and no adapter is all of these.
        pairs: The pairs folder. Other tasks may be there already, if they have the same layout.
        prompts: Task -> its pool of unlabelled prompts; or `"card"`, to take what the card of its first adapter says
            in their place.
        answers: Task -> the answers to its prompts, one each.
        rank: The rank to bring all to; by default the largest of any, at which nothing is lost; with a shared A twice
            that.
        layout: The layout to bring them to, in place of the one that is worked out: that of a generator, say.
        base_model: The name of the base that all adapters are for, or several names that it goes by, of which the
            first is kept. By default they must all name the same.
        missing_modules: What becomes of a module that some adapters have and others lack: an error (`"refuse"`), or a
            zero update (`"zeros"`). One that an adapter's own configuration targets is missed in any case.
        factors: Which factors of the updates to write. Adapters that were trained by themselves share no
            initialisation, so that their own (`"kept"`) cannot be compared. `"shared"`: one A for all adapters, of the
            inputs that their updates share most of, so that Bs alone differ; what else is in an update is lost, and
            said. That A becomes the pairs folder's common initialisation, or is that which is there already.
            `"canonical"`: those that follow from the update alone; nothing is lost, and they are harder to generate.
            `None`: as the tasks that are there were made, and shared in a new folder.
        pickles: Whether to read an `adapter_model.bin` where there is no safetensors file, tensors alone.
        overwrite: Whether to replace tasks that are complete, but were made of other adapters or in another way. If
            they are all that the folder has, a shared A is found anew too.

    Returns:
        The tasks, in the order given.

    Raises:
        PromptError: If a task has no prompts, or they are empty, or two tasks' cards say the same.
        FileNotFoundError: If there is no such adapter, or one of its files is missing.
        CorruptFileError: If a file cannot be read, or does not have its SHA-256.
        LayoutError: If an adapter is no plain LoRA, is for another base, lacks modules, or its configuration
            contradicts its matrices.
        WeightValueError: If one holds what are no usable weights.
        PairsFolderError: If a task is complete and was made otherwise, or its folder holds something else.
        GeneratorConfigError: If an option is impossible.
    """
    if missing_modules not in (_REFUSE, _ZEROS):
        raise GeneratorConfigError(f"missing_modules must be 'refuse' or 'zeros', got {missing_modules!r}.")
    if factors is not None and factors not in FACTORS:
        raise GeneratorConfigError(f"factors must be one of {FACTORS}, got {factors!r}.")
    if layout is not None and rank is not None:
        raise GeneratorConfigError("A layout says its rank itself: give rank=... or layout=..., not both.")
    pairs = Path(pairs)
    wanted_factors = factors or factors_of(pairs)
    sources = _sources(adapters)
    pools = _checked_pools(sources, prompts, answers or {})
    found = {
        task: [each for source in of_task for each in find_adapters(source, pickles=pickles)]
        for task, of_task in with_progress(sources.items(), "Reading adapters' headers")
    }
    plans = [_plan(task, found[task], *pools[task]) for task in sources]
    _check_cards(plans)
    every = [adapter for of_task in found.values() for adapter in of_task]
    bases = {adapter.name: adapter.layout.base_model_name_or_path for adapter in every}
    if layout is not None and layout.base_model_name_or_path is not None:
        bases = {"the given layout": layout.base_model_name_or_path, **bases}
    base = _base_of(bases, base_model)
    own = {adapter.name: adapter.layout for adapter in every}
    target = common_layout(own, rank) if layout is None else layout
    names = {plan.name for plan in plans}
    renew = overwrite and wanted_factors == SHARED and has_no_other_tasks(pairs, names)
    if wanted_factors == SHARED and rank is None and layout is None:
        there = None if renew else rank_of_initialization(pairs)
        target = common_layout(own, there or 2 * target.max_rank)
    if base is not None:
        target = dataclasses.replace(target, base_model_name_or_path=base)
    _check_modules(every, target, missing_modules)
    check_neighbours(pairs, names, target)
    shared = shared_start(pairs, every, target, renew=renew) if wanted_factors == SHARED else None
    made_as = {
        "factors": wanted_factors,
        "rank": target.max_rank,
        "initialization": None if shared is None else adapter_digest(shared),
    }
    done = {plan.name: _done(pairs / plan.name, plan, target, made_as, overwrite) for plan in plans}
    return tuple(
        done[plan.name] or _write(pairs, plan, target, made_as, shared)
        for plan in with_progress(plans, "Importing adapters")
    )


def _sources(adapters: Mapping[str, OneOrMore]) -> dict[str, list[ExistingAdapter]]:
    if not adapters:
        raise PairsFolderError("No adapters are given: expected a dictionary of each task's adapter.")
    found: dict[str, list[ExistingAdapter]] = {}
    for task, given in adapters.items():
        if not isinstance(task, str) or not may_be_task(task) or not task or set(task) & {"/", "\\", os.sep, "\0"}:
            raise PairsFolderError(
                f"A task cannot be called {task!r}: its name becomes a folder's. Expected a plain name without "
                f"slashes or a full stop at its start, and not {INITIALIZATION_FOLDER!r}."
            )
        several = [given] if isinstance(given, (str, os.PathLike, ExistingAdapter)) else list(given)
        if not several:
            raise PairsFolderError(f"Task {task!r} has no adapter. Name one, or leave the task out.")
        found[task] = [each if isinstance(each, ExistingAdapter) else ExistingAdapter(each) for each in several]
    return found


def _checked_pools(
    sources: Mapping[str, Any], prompts: Mapping[str, Any], answers: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...] | None, tuple[str, ...] | None]]:
    """Task -> its prompts, or `None` for those of the card, and their answers."""
    for what, given in (("prompts", prompts), ("answers", answers)):
        for task in given:
            if task not in sources:
                raise PromptError(
                    f"There are {what} of a task {task!r}, which has no adapter.{did_you_mean(str(task), sources)}"
                )
    pools: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...] | None]] = {}
    for task in sources:
        pool = prompts.get(task)
        if pool is None:
            raise PromptError(
                f"Task {task!r} has no prompts. Give some of its unlabelled prompts, or take what its adapter's card "
                "says: prompts={...: 'card'} (--prompts-from-card)."
            )
        if isinstance(pool, str) and pool == FROM_CARD:
            if task in answers:
                raise PromptError(f"The prompts of task {task!r} come from a card, so they have no answers.")
            pools[task] = None, None
            continue
        checked = check_prompts(pool, f"the prompts of task {task!r}")
        pools[task] = checked, check_answers(checked, answers[task]) if task in answers else None
    return pools


def _plan(
    task: str, found: list[FoundAdapter], pool: tuple[str, ...] | None, answers: tuple[str, ...] | None
) -> _Plan:
    if pool is not None:
        return _Plan(task, found, pool, answers, "given")
    return _Plan(task, found, texts_of_card(found[0].card, found[0].name), None, FROM_CARD)


def _check_cards(plans: Sequence[_Plan]) -> None:
    """Refuse tasks whose cards say the same: no generator could tell them apart."""
    seen: dict[tuple[str, ...], str] = {}
    for plan in plans:
        if plan.prompts_from == FROM_CARD and (other := seen.setdefault(plan.prompts, plan.name)) != plan.name:
            raise PromptError(
                f"The cards of tasks {other!r} and {plan.name!r} say the same, so that no generator could tell the "
                "two apart. Give their prompts."
            )


def _base_of(bases: Mapping[str, str | None], given: str | Sequence[str] | None) -> str | None:
    """The one base that all are for, by name; `bases` says what each calls it."""
    names = [given] if isinstance(given, str) else list(given or ())
    allowed = {_plain(name) for name in names}
    others = f"the base is called {' or '.join(map(repr, names))}"
    for source, base in bases.items():
        if base is None:
            logger.warning("%s does not say what base it is for: only modules' names and sizes tell.", source)
            continue
        if not names:
            allowed, names, others = {_plain(base)}, [base], f"{source} is for {base!r}"
        if _plain(base) not in allowed:
            raise LayoutError(
                f"{source} is for the base {base!r}, and {others}. An adapter of another base means nothing on this "
                "one, though its shapes may fit: leave it out. If both names are of the same weights, give both: "
                f"base_model={[*names, base]!r} (--base, repeated)."
            )
    return names[0] if names else None


def _plain(name: str) -> str:
    return name.rstrip("/").casefold()


def _check_modules(found: Sequence[FoundAdapter], target: AdapterLayout, missing_modules: str) -> None:
    for adapter in found:
        own = {module.name for module in adapter.layout.modules}
        for module in target.modules:
            if module.name in own:
                continue
            if adapter.targets(module.name):
                raise LayoutError(
                    f"{adapter.name} lacks the matrices of {module.name!r}, though its configuration targets that "
                    "module: its file is incomplete, or of another base. Fetch it again, or leave it out."
                )
            if missing_modules == _REFUSE:
                raise LayoutError(
                    f"{adapter.name} does not adapt {module.name!r}, which other adapters do. Leave it out, or have "
                    "its update be zero there: missing_modules='zeros' (--missing-modules zeros)."
                )
        # Named now rather than when the weights are read: a module that the layout lacks, or has in another size.
        common_layout({"the layout that all are to have": target, adapter.name: adapter.layout})
        strange = own - {module.name for module in target.modules}
        if strange:
            raise LayoutError(
                f"{adapter.name} adapts {min(strange)!r}, which the given layout does not: its update there would be "
                "lost. Give a layout that has it, or leave the adapter out."
            )


def _origin_of(plan: _Plan, made_as: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a task to pass for the one that is asked for."""
    return {
        **made_as,
        "prompts_from": plan.prompts_from,
        "prompts": prompts_digest(plan.prompts),
        "answers": None if plan.answers is None else prompts_digest(plan.answers),
        "sha256": [adapter.source["sha256"] for adapter in plan.found],
    }


def _done(
    folder: Path, plan: _Plan, target: AdapterLayout, made_as: Mapping[str, Any], overwrite: bool
) -> ImportedTask | None:
    """The task as it is there already, if it was made of just these adapters, in this way."""
    record = task_record(folder)
    if record is None or not record.complete:
        return None
    path = folder / ORIGIN_NAME
    origin = read_json(path) if path.is_file() else {}
    if origin.get("made_as") == _origin_of(plan, made_as):
        layout = load_task(folder).layout
        if layout is not None and layout.difference(target) is None:
            return ImportedTask(plan.name, False, tuple(origin["adapters"]))
    if overwrite:
        return None
    raise PairsFolderError(
        f"Task {plan.name!r} in {str(folder)!r} is complete, and was made of other adapters, other prompts or in "
        "another way. Pass overwrite=True (--overwrite) to make it again, or name another folder."
    )


def _write(
    pairs: Path,
    plan: _Plan,
    target: AdapterLayout,
    made_as: Mapping[str, Any],
    shared: Mapping[str, torch.Tensor] | None,
) -> ImportedTask:
    known = [adapter.step for adapter in plan.found if adapter.step is not None]
    steps = known if len(set(known)) == len(plan.found) else list(range(1, len(plan.found) + 1))
    origins: list[dict[str, Any]] = []
    with staged_directory(pairs) as staged:
        writer = PairWriter(staged / plan.name, plan.prompts, target, task=plan.name, answers=plan.answers)
        writer.begin(initialization=made_as["initialization"])
        for step, adapter in zip(steps, plan.found, strict=True):
            converted, conversion = convert_adapter(
                adapter.read(), adapter.layout, target, canonical=made_as["factors"] != KEPT, shared=shared
            )
            writer.add(converted, step)
            if shared is not None and conversion.lost_share > _MUCH_LOST:
                logger.warning(
                    "%s loses %.0f%% of its update to the A that all adapters of %s share: it works on other inputs "
                    "than those whose A that is. Import all adapters at once, into a new folder, or with "
                    "factors='canonical' (--factors canonical).",
                    adapter.name,
                    100 * conversion.lost_share,
                    pairs,
                )
            origins.append({"step": step, **adapter.source, **_in_json(conversion)})
        write_json(staged / plan.name / ORIGIN_NAME, {"adapters": origins, "made_as": _origin_of(plan, made_as)})
        writer.close()
        if (pairs / plan.name).exists():
            shutil.rmtree(pairs / plan.name)
    return ImportedTask(plan.name, True, tuple(origins))


def _in_json(conversion: Conversion) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(conversion).items()
    }
