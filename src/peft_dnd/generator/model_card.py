# SPDX-License-Identifier: Apache-2.0
"""A generator's model card: data and a template. No figure stands in it that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ..storage.cards import GENERATED_MARK
from ..storage.hub import hub_id
from .configuration import PromptConditionedLoraGeneratorConfig


# Under this name a configuration's `measured` holds the rows of the held-out protocol.
EVALUATION = "evaluation"

_TEMPLATE = """---
{data}
---
{mark}

# Prompt-conditioned LoRA generator

Writes a LoRA adapter for {base} from a handful of a task's unlabelled prompts, in one forward pass
([Drag-and-Drop LLMs](https://arxiv.org/abs/2506.16406)), with [peft_dnd](https://github.com/peft-dnd/peft-dnd).

```python
from peft import get_peft_model
from peft_dnd import DnDConfig

model = get_peft_model(base_model, DnDConfig(generator="path-or-hub-id", prompts=prompts))
```

| what | value |
| --- | --- |
{facts}

## Measured

{measured}
"""


def generator_card(
    config: PromptConditionedLoraGeneratorConfig, *, num_parameters: int, measured: Mapping[str, Any]
) -> str:
    """Write a generator's model card.

    Args:
        config: Its configuration.
        num_parameters: Parameters of the decoder.
        measured: Metric -> value, as measured by the trainer or an evaluation; may be empty, and the card says so.
    """
    layout = config.adapter_layout
    named_base = hub_id(config.base_model_name_or_path)
    data = ModelCardData(
        library_name="peft_dnd",
        base_model=named_base,
        tags=["peft", "lora", "peft_dnd", "drag-and-drop-llms"],
    )
    facts = {
        "base model": f"`{named_base}`" if named_base else "not recorded",
        "adapter": f"LoRA, {len(layout.modules)} modules, rank up to {layout.max_rank}, "
        f"{layout.num_parameters:,} parameters",
        "decoder": f"{config.decoder_type}, {num_parameters:,} parameters",
        "text encoder": _encoder_name(config),
        "reads": f"{config.num_prompts} {_texts_read(config)} of up to {config.max_prompt_length} tokens at once "
        f"({config.condition})",
    }
    return _TEMPLATE.format(
        data=data.to_yaml(),
        mark=GENERATED_MARK,
        base=facts["base model"] if named_base else "its base model",
        facts="\n".join(f"| {what} | {value} |" for what, value in facts.items()),
        measured=_measured_section(measured),
    )


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
    if not measured:
        return "Nothing has been measured of this generator yet."
    facts = {name: value for name, value in measured.items() if name != EVALUATION}
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
        for name, what in (
            ("share_of_gap_closed", "share of the gap from base to ceiling that is closed"),
            ("conditioning_gain", "conditioning gain, generated minus the best of rows 9"),
        )
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
