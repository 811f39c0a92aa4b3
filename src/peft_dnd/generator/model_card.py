# SPDX-License-Identifier: Apache-2.0
"""A generator's model card: data and a template. No figure stands in it that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..adapters.layout import AdapterLayout
from ..policy.policy import policy_in_words
from ..storage.cards import GENERATED_MARK, PLACE, check_card_metadata, loading_the_base
from ..storage.hub import hub_id
from .configuration import PromptConditionedLoraGeneratorConfig
from .revision_history import REVISIONS, revisions_section


# Under this name a configuration's `measured` holds the rows of the held-out protocol.
EVALUATION = "evaluation"

_HEADLINES = {
    "share_of_gap_closed": "share of the gap from base to ceiling that is closed",
    "conditioning_gain": "conditioning gain, generated minus the best of rows 9",
}

_TEMPLATE = """---
{data}
---
{mark}

# Prompt-conditioned LoRA generator

Writes a LoRA adapter for {base} from a handful of a task's unlabelled prompts, in one forward pass
([Drag-and-Drop LLMs](https://arxiv.org/abs/2506.16406)), with [peft_dnd](https://github.com/peft-dnd/peft-dnd).

```python
{snippet}
```

| what | value |
| --- | --- |
{facts}
{policy}
## Measured

{measured}
{revisions}"""


def generator_card(
    config: PromptConditionedLoraGeneratorConfig,
    *,
    num_parameters: int,
    measured: Mapping[str, Any],
    name: str | None = None,
) -> str:
    """Write a generator's model card.

    Args:
        config: Its configuration.
        num_parameters: Parameters of the decoder.
        measured: Metric -> value, as measured by the trainer or an evaluation; may be empty, and the card says so.
        name: The folder or Hub id that the snippet names, if that is known.

    Raises:
        GeneratorConfigError: If `config.card_metadata` holds what is no metadata of a card.
    """
    layouts = config.layouts
    layout = next(iter(layouts.values()))
    named_base, revision = public_base(layout)
    public = [base for base, _ in map(public_base, layouts.values()) if base]
    authors = check_card_metadata(config.card_metadata)
    own_tags = authors.pop("tags", [])
    results = _results(measured)
    data = ModelCardData(
        library_name="peft_dnd",
        base_model=public if len(public) > 1 else named_base or (public[0] if public else None),
        base_model_revision=revision if len(layouts) == 1 else None,
        base_model_relation="adapter" if public else None,
        tags=[
            "peft",
            "lora",
            "peft_dnd",
            "drag-and-drop-llms",
            *([own_tags] if isinstance(own_tags, str) else own_tags),
        ],
        model_name=(name or "generator").rpartition("/")[2] if results else None,
        eval_results=results or None,
        **authors,
    )
    facts = {
        **_facts_of_bases(layouts),
        "decoder": f"{config.decoder_type}, {num_parameters:,} parameters",
        "text encoder": _encoder_name(config),
        "reads": f"{config.num_prompts} {_texts_read(config)} of up to {config.max_prompt_length} tokens at once "
        f"({config.condition})",
    }
    return _TEMPLATE.format(
        data=data.to_yaml(),
        mark=GENERATED_MARK,
        base=f"{len(layouts)} base models"
        if len(layouts) > 1
        else f"`{named_base}`"
        if named_base
        else "its base model",
        snippet=_snippet(config, named_base, revision, name or PLACE),
        facts="\n".join(f"| {what} | {value} |" for what, value in facts.items()),
        policy=_policy_section(config.policy),
        measured=_measured_section(measured),
        revisions=f"\n{told}\n" if (told := revisions_section(measured)) else "",
    )


def _policy_section(policy: Mapping[str, Any]) -> str:
    """What the generator does not do; nothing where it has no policy."""
    lines = [f"- {line}" for line in policy_in_words(policy)]
    return "\n" + "\n".join(["## Policy", "", *lines, ""]) if lines else ""


def public_base(layout: AdapterLayout) -> tuple[str | None, str | None]:
    """The base model's Hub id and revision, as far as they are known and mean anything to others."""
    base = hub_id(layout.base_model_name_or_path)
    return base, layout.base_model_revision if base else None


def _facts_of_bases(layouts: Mapping[str, AdapterLayout]) -> dict[str, str]:
    facts = {}
    for name, layout in layouts.items():
        of = f" of {name}" if len(layouts) > 1 else ""
        facts[f"base model{of}"] = _base_in_words(layout)
        facts[f"adapter{of}"] = f"{layout.in_words()}, {layout.num_parameters:,} parameters"
    return facts


def _base_in_words(layout: AdapterLayout) -> str:
    base, revision = public_base(layout)
    if base is not None:
        return f"`{base}`" + (f" at `{revision}`" if revision else "")
    name = layout.base_model_name_or_path
    return f"`{Path(name).name}`, a folder where it was fitted" if name else "not recorded"


def _snippet(config: PromptConditionedLoraGeneratorConfig, base: str | None, revision: str | None, name: str) -> str:
    """Python that gives a task its adapter, as it stands; where no base is known it writes the adapter to a folder."""
    texts = ['prompts = ["A prompt of your task", "Another prompt of your task"]  # a handful, unlabelled']
    given = "prompts"
    if config.condition_text != "prompts":
        texts.append('answers = ["Its answer", "The answer to the other"]')
        given = "prompts, answers=answers"
    if base is None:
        lines = ["from peft_dnd import PromptConditionedLoraGenerator", "", *texts]
        lines.append(f'generator = PromptConditionedLoraGenerator.from_pretrained("{name}")')
        named = f", base={config.base_names[0]!r}" if config.bases else ""
        lines.append(f'generator.generate_adapter({given}{named}).save_pretrained("adapter")')
        return "\n".join(lines)
    imported, loaded = loading_the_base(base, revision, next(iter(config.layouts.values())).task_type)
    lines = ["from peft import get_peft_model", "from peft_dnd import DnDConfig", imported, "", *texts, loaded]
    lines.append(f'model = get_peft_model(base_model, DnDConfig(generator="{name}", prompts={given}))')
    return "\n".join(lines)


def _results(measured: Mapping[str, Any]) -> list[EvalResult]:
    """What was measured on held-out tasks, for the card's `model-index`, which the Hub reads.

    Its newer `.eval_results` files are for benchmarks that are data sets on the Hub, which these tasks are not.
    """
    named = [
        ("Held-out tasks while fitting", name, name, value)
        for name, value in measured.items()
        if name.startswith("eval_") and isinstance(value, int | float)
    ]
    evaluation = measured.get(EVALUATION)
    if evaluation:
        tasks = f"Held-out tasks: {', '.join(evaluation['tasks'])}"
        named += [
            (tasks, f"mean_score_row_{number}", label.replace("**", ""), value)
            for label, number, value, _ in evaluation["rows"]
        ]
        named += [
            (tasks, name, name.replace("_", " "), evaluation[name][0])
            for name in _HEADLINES
            if evaluation[name] is not None
        ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-tasks",
            dataset_name=tasks,
            metric_type=kind,
            metric_name=label,
            metric_value=value,
        )
        for tasks, kind, label, value in named
    ]


def _encoder_name(config: PromptConditionedLoraGeneratorConfig) -> str:
    layer = "" if config.text_encoder_layer is None else f", hidden states of layer {config.text_encoder_layer}"
    if config.text_encoder_in_folder:
        return "in `text_encoder/`" + layer
    name = hub_id(config.text_encoder)
    return f"`{name}`{layer}" if name else "not recorded"


def _texts_read(config: PromptConditionedLoraGeneratorConfig) -> str:
    return {
        "prompts": "prompts",
        "prompts_and_answers": "prompts with their answers",
        "mixed": f"prompts, {config.answer_ratio:.0%} of them with their answers,",
        "answers": "answers",
    }[config.condition_text]


def _measured_section(measured: Mapping[str, Any]) -> str:
    if not set(measured) - {REVISIONS}:
        return "Nothing has been measured of this generator yet."
    facts = {name: value for name, value in measured.items() if name not in (EVALUATION, REVISIONS)}
    rows = [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in facts.items()
    ]
    table = ["\n".join(["| metric | value |", "| --- | --- |", *rows])] if rows else []
    evaluation = [_evaluation_section(measured[EVALUATION])] if EVALUATION in measured else []
    return "\n\n".join(table + evaluation)


def _evaluation_section(evaluation: Mapping[str, Any]) -> str:
    """The held-out protocol's rows, as `EvaluationReport.model_card_rows` gives them."""
    rows = "\n".join(
        f"| {number} | {label} | {_with_interval(value, interval)} |"
        for label, number, value, interval in evaluation["rows"]
    )
    figures = [
        f"- {what}: {_with_interval(*evaluation[name])}"
        for name, what in _HEADLINES.items()
        if evaluation[name] is not None
    ]
    missing = "; ".join(f"{what} ({why})" for what, why in evaluation["not_measured"].items())
    parts = [
        "### On held-out tasks",
        f"Mean score on {', '.join(evaluation['tasks'])}, whose data and adapters were used nowhere in fitting, with "
        f"{evaluation['confidence']:.0%} bootstrap intervals over their examples.",
        f"| | adapter | mean score |\n| ---: | --- | ---: |\n{rows}",
        "\n".join(figures),
        f"Not measured: {missing}." if missing else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
