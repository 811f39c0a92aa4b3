# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd inspect`: what a generator, an adapter or a pairs folder is, what it fits, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .bases import fit_to_skeleton
from .console import CommandError, Json, Quiet, Revision, report
from .policy import held_against_policy


if TYPE_CHECKING:
    from peft_dnd.adapters import AdapterLayout

Kind = Literal["generator", "adapter", "pairs"]


def inspect(
    what: Annotated[str, typer.Argument(help="Folder or Hub id of a generator or an adapter, or a pairs folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Folder or Hub id of a base model: say whether the adapters fit it.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another of these: say in what the adapters' layouts differ first.")
    ] = None,
    engine: Annotated[
        Literal["vllm"] | None, typer.Option("--for", help="Find what this engine would pass over without a word.")
    ] = None,
    served: Annotated[
        str | None, typer.Option(help="With --for: the name under which the engine serves the base.")
    ] = None,
    max_rank: Annotated[
        int, typer.Option(min=1, help="With --for: the largest rank that the engine takes, vLLM's max_lora_rank.")
    ] = 16,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="With --for: a module that the engine adapts, if not all, as it was told; may be repeated.",
        ),
    ] = None,
    policy_of: Annotated[
        str | None,
        typer.Option(metavar="GENERATOR", help="Of an adapter: hold its weights against this generator's policy."),
    ] = None,
    gate_base: Annotated[
        str | None,
        typer.Option(help="With --policy-of: the base, to be loaded, on which the behaviour gate is checked."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a generator, an adapter or a pairs folder is: its layout, sizes, base and origin. Loads no weights.

    Of a generator's folder it also says whether it is as it was saved, by its checksums.

    Ends with 1 if anything is wrong: it does not fit the base, differs from the other, an engine would be silently
    wrong with it, tasks of a pairs folder are incomplete or differ in their layouts.
    With --policy-of an adapter is loaded, and held against a generator's policy.

    Example:
      peft-dnd inspect org/generator --base Qwen/Qwen2.5-0.5B
      peft-dnd inspect adapter --for vllm --served Qwen/Qwen2.5-0.5B --json
    """
    if engine is None and (served is not None or target_modules):
        raise typer.BadParameter(
            "--served and --target-modules say how an engine serves the base: they go with --for."
        )
    if gate_base is not None and policy_of is None:
        raise typer.BadParameter("--gate-base is for a policy's behaviour gate: it goes with --policy-of.")
    kind = what_is(what, revision)
    facts, layout, problems = _LOOKS[kind](what, revision)
    renamed: dict[str, str] = {}
    if facts.get("bases") and (base, against, engine) != (None, None, None):
        layout, found = _layout_of_one_base(what, revision, base)
        facts["fits_base"] = None if base is None else found is None
        problems += [found] if found else []
    elif layout is None and not problems and (base, against, engine) != (None, None, None):
        problems.append("there are no adapters in it to be held against anything")
    if layout is not None and base is not None:
        renamed, found = fit_to_skeleton(layout, base)
        facts["fits_base"] = found is None
        problems += [found] if found else []
    if engine is not None:
        from peft_dnd.engines import vllm_problems

        found_by_engine = vllm_problems(
            _engine_config(kind, what, revision, layout),
            modules=[] if layout is None else [module.name for module in layout.modules],
            served=served,
            max_rank=max_rank,
            renamed=renamed,
            target_modules=target_modules,
        )
        facts[f"taken_by_{engine}"] = layout is not None and not found_by_engine
        problems += found_by_engine
    if layout is not None and against is not None:
        found = _difference(layout, what, against, base)
        facts |= {"same_layout": found is None, "difference": found}
        problems += [found] if found else []
    if policy_of is not None:
        facts["policy"], found_of_policy = held_against_policy(kind, what, policy_of, gate_base, revision)
        problems += found_of_policy
    facts = {"kind": kind, "name": what, **facts, "problems": problems}
    report(facts, _in_words(facts), as_json=as_json, quiet=quiet and not problems)
    if problems:
        raise typer.Exit(1)


def _difference(layout: AdapterLayout, what: str, against: str, base: str | None) -> str | None:
    """In what the layouts of two things differ, in words."""
    facts, other, _ = _LOOKS[what_is(against, None)](against, None)
    if facts.get("bases"):
        other, problem = _layout_of_one_base(against, None, base)
        if problem is not None:
            return f"{against!r} cannot be compared: {problem}"
    difference = layout.difference(other) if other is not None else "it has no layout"
    return difference and f"the layouts of {what!r} (the first) and {against!r} (the second) differ: {difference}"


def what_is(name: str, revision: str | None) -> Kind:
    """Which of the things that the library knows lies in a folder, or in a repository of the Hub.

    Raises:
        CommandError: If none of them does.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise CommandError(f"{name!r} is a file. Name the folder of a generator, an adapter or pairs.")
        return _on_hub(name, revision)
    if (folder / "task.json").is_file():  # it has an adapter's configuration as well
        raise CommandError(f"{name!r} is the folder of one task. Name the pairs folder that it lies in.")
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "generator"  # whose configuration says so, or whose error says what it is instead
    if any(folder.glob("*/task.json")):
        return "pairs"
    raise CommandError(
        f"{name!r} holds neither a generator (config.json) nor an adapter (adapter_config.json), nor pairs (folders "
        "with a task.json)."
    )


def layout_of(name: str) -> AdapterLayout:
    """The layout of a generator's, an adapter's or a pairs folder's adapters.

    Raises:
        CommandError: If there is nothing of the kind, or it has none.
    """
    _, layout, problems = _LOOKS[what_is(name, None)](name, None)
    if layout is None:
        raise CommandError(
            f"{name!r} has no layout of adapters: {problems[0] if problems else 'there are none in it'}."
        )
    return layout


def _on_hub(name: str, revision: str | None) -> Kind:
    from transformers.utils import CONFIG_NAME

    from peft_dnd.adapters.lora import ADAPTER_CONFIG_NAME
    from peft_dnd.errors import GeneratorNotFoundError
    from peft_dnd.storage.hub import find_adapter, find_generator

    try:
        find_generator(name, (CONFIG_NAME,), revision=revision)
    except GeneratorNotFoundError as error:
        try:
            folder = find_adapter(name, (ADAPTER_CONFIG_NAME,), revision=revision)
        except OSError:
            folder = None
        if folder is None or not (folder / ADAPTER_CONFIG_NAME).is_file():
            raise CommandError(
                f"{name!r} is neither a generator nor an adapter, nor a pairs folder. {error}"
            ) from error
        return "adapter"
    return "generator"


def _look_at_generator(name: str, revision: str | None) -> tuple[dict[str, Any], AdapterLayout | None, list[str]]:
    from transformers.utils import CONFIG_NAME

    from peft_dnd.decoders import check_decoder_type
    from peft_dnd.generator import PromptConditionedLoraGeneratorConfig
    from peft_dnd.generator.checksums import checksum_differences
    from peft_dnd.generator.summary import SUMMARY_NAME, read_summary
    from peft_dnd.policy.policy import policy_in_words
    from peft_dnd.storage.files import read_safetensors_shapes
    from peft_dnd.storage.hub import find_generator
    from peft_dnd.text.out_of_distribution import REFERENCE_NAME

    folder, commit = find_generator(name, (CONFIG_NAME, SUMMARY_NAME), revision=revision)
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(folder)
    check_decoder_type(config.decoder_type)  # what would not load must not be shown as if it were fine
    layout = None if config.bases else config.adapter_layout
    problems: list[str] = []
    if commit is None:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    else:
        # Of what lies on the Hub the weights stay there: their sizes are in the summary beside them.
        sizes = read_summary(folder).get("files", {})
    weights = [file for file in sizes if fnmatch(file, "model*.safetensors")]
    for file in weights if commit is None else ():
        read_safetensors_shapes(folder / file)
    if commit is None and not weights:
        problems.append("it has a configuration but no weights in safetensors format")
    differing = checksum_differences(folder) if commit is None and weights else None
    problems += [f"{what} is not as it was saved: it was damaged or edited" for what in differing or []]
    facts = {
        **({} if layout is None else _facts_of(layout)),
        "bases": {name: _facts_of(of_base) for name, of_base in config.layouts.items()} if config.bases else {},
        "commit": commit,
        "decoder": config.decoder_type,
        "weights_bytes": sum(sizes[file] for file in weights) if weights else None,
        "as_saved": None if differing is None else not differing,
        "text_encoder": "in its folder" if config.text_encoder_in_folder else config.text_encoder,
        "num_prompts": config.num_prompts,
        "max_prompt_length": config.max_prompt_length,
        "condition": config.condition,
        "condition_text": config.condition_text,
        "policy": "; ".join(policy_in_words(config.policy)) or None,
        "knows_its_tasks": REFERENCE_NAME in sizes if sizes else None,
        "measured": config.measured,
    }
    return facts, layout, problems


def _layout_of_one_base(name: str, revision: str | None, base: str | None) -> tuple[AdapterLayout | None, str | None]:
    """The layout of the base that a model is, of a generator of several, or what is in the way of telling it."""
    from transformers.utils import CONFIG_NAME

    from peft_dnd.errors import GeneratorConfigError
    from peft_dnd.generator import PromptConditionedLoraGeneratorConfig
    from peft_dnd.storage.hub import find_generator

    config = PromptConditionedLoraGeneratorConfig.from_pretrained(
        find_generator(name, (CONFIG_NAME,), revision=revision)[0]
    )
    if base is None:
        return None, f"it has {len(config.base_names)} bases: say by --base which one is to be looked at"
    layouts = config.layouts
    problems = {of: fit_to_skeleton(layout, base)[1] for of, layout in layouts.items()}
    fitting = [of for of, problem in problems.items() if problem is None]
    if not fitting:
        return None, f"{base!r} is none of its bases; the first: {problems[config.base_names[0]]}"
    try:
        return layouts[config.choose_among(fitting, base)], None
    except GeneratorConfigError as error:
        return None, str(error)


def _look_at_adapter(name: str, revision: str | None) -> tuple[dict[str, Any], AdapterLayout | None, list[str]]:
    from peft_dnd.adapters.generated_adapter import PROVENANCE_NAME
    from peft_dnd.adapters.layouts import layout_from_folder
    from peft_dnd.adapters.lora import ADAPTER_WEIGHTS_NAME
    from peft_dnd.errors import LayoutError
    from peft_dnd.storage.files import read_json

    folder = _adapter_folder(name, revision)
    provenance = folder / PROVENANCE_NAME
    facts: dict[str, Any] = {"provenance": read_json(provenance) if provenance.is_file() else None}
    try:
        layout = layout_from_folder(folder)
    except LayoutError as error:  # an adapter, but none that a generator could have written
        return facts, None, [str(error)]
    bytes_ = (folder / ADAPTER_WEIGHTS_NAME).stat().st_size
    return {**_facts_of(layout), "weights_bytes": bytes_, **facts}, layout, []


def _look_at_pairs(name: str, revision: str | None) -> tuple[dict[str, Any], AdapterLayout | None, list[str]]:
    from peft_dnd.pairs.folder import find_tasks, load_task, read_task

    layout, first, problems, bases = None, "", [], Counter[str]()
    tasks: dict[str, dict[str, Any]] = {}
    for task, folder in find_tasks(name).items():
        record = read_task(folder)
        if not record.complete:
            problems.append(f"task {task!r} is incomplete: train it again, or resume it")
            tasks[task] = {"complete": False}
            continue
        found = load_task(folder)
        tasks[task] = {
            "complete": True,
            "prompts": len(found.prompts),
            "answers": found.answers is not None,
            "checkpoints": len(found.checkpoints),
            "examples": len(found.examples) if found.examples is not None else 0,
            "distilled": len(found.distillation) if found.distillation is not None else 0,
        }
        if found.layout is None:
            continue
        bases.update([str(found.layout.base_model_name_or_path)])
        if layout is None:
            layout, first = found.layout, task
        elif (difference := layout.difference(found.layout)) is not None:
            problems.append(f"tasks {first!r} (the first) and {task!r} (the second) differ: {difference}")
    if len(bases) > 1:
        problems.append(f"its tasks are of different base models: {', '.join(sorted(bases))}")
    return {**({} if layout is None else _facts_of(layout)), "tasks": tasks}, layout, problems


_LOOKS = {"generator": _look_at_generator, "adapter": _look_at_adapter, "pairs": _look_at_pairs}


def _facts_of(layout: AdapterLayout) -> dict[str, Any]:
    from peft_dnd.adapters.summary import layout_facts

    base = {"base_model": layout.base_model_name_or_path, "base_model_revision": layout.base_model_revision}
    return {**base, **layout_facts(layout)}


def _adapter_folder(name: str, revision: str | None) -> Path:
    from peft_dnd.adapters.generated_adapter import PROVENANCE_NAME
    from peft_dnd.adapters.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
    from peft_dnd.storage.hub import find_adapter

    files = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, PROVENANCE_NAME)
    return find_adapter(name, files, revision=revision)


def _engine_config(kind: Kind, what: str, revision: str | None, layout: AdapterLayout | None) -> dict[str, Any]:
    """The `adapter_config.json` that an engine would read."""
    if kind != "adapter":
        return {} if layout is None else layout.peft_config().to_dict()
    from peft_dnd.adapters.lora import ADAPTER_CONFIG_NAME
    from peft_dnd.storage.files import read_json

    config: dict[str, Any] = read_json(_adapter_folder(what, revision) / ADAPTER_CONFIG_NAME)
    return config


def _in_words(facts: dict[str, Any]) -> str:
    lines = [f"{facts['name']}: {facts['kind']}"]
    for name, value in facts.items():
        if name in ("kind", "name", "problems") or value in (None, {}):
            continue
        label = name.replace("_", " ")
        if isinstance(value, dict):
            lines.append(f"  {label}:")
            lines += [f"    {key}: {_value_in_words(of)}" for key, of in value.items()]
        else:
            lines.append(f"  {label}: {_value_in_words(value)}")
    lines += [f"  wrong: {problem}" for problem in facts["problems"]]
    return "\n".join(lines)


def _value_in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_value_in_words(of)}" for name, of in value.items())
    if isinstance(value, list):
        parts = (" ".join(map(_value_in_words, of)) if isinstance(of, list) else _value_in_words(of) for of in value)
        return ", ".join(parts) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
