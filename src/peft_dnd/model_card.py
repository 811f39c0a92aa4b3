# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Model cards: data and a template. No figure stands in a card that was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData


if TYPE_CHECKING:
    from .configuration import PromptConditionedLoraGeneratorConfig


# A card with this line is ours to write anew; whoever edits a card takes the line out and keeps the text.
GENERATED_MARK = "<!-- Written by peft_dnd at every save. Remove this line to keep your own text. -->"
CARD_NAME = "README.md"

_TEMPLATE = """---
{data}
---
{mark}

# {title}

Writes a LoRA adapter for {base} from a handful of a task's unlabelled prompts, in one forward pass
([Drag-and-Drop LLMs](https://arxiv.org/abs/2506.16406)), with [peft_dnd](https://github.com/peft-dnd/peft-dnd).

```python
from peft import get_peft_model
from peft_dnd import DnDConfig

model = get_peft_model(base_model, DnDConfig(generator="{name}", prompts=prompts))
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
    base = config.base_model_name_or_path
    layout = config.adapter_layout
    named_base = base if base and not Path(base).is_absolute() else None
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
        "reads": f"{config.num_prompts} prompts of up to {config.max_prompt_length} tokens at once "
        f"({config.condition})",
    }
    return _TEMPLATE.format(
        data=data.to_yaml(),
        mark=GENERATED_MARK,
        title="Prompt-conditioned LoRA generator",
        base=facts["base model"] if named_base else "its base model",
        name="path-or-hub-id",
        facts="\n".join(f"| {what} | {value} |" for what, value in facts.items()),
        measured=_measured_section(measured),
    )


def may_write_card(folder: Path) -> bool:
    """Whether a folder has no card yet, or one that is still as we wrote it."""
    card = folder / CARD_NAME
    return not card.is_file() or GENERATED_MARK in card.read_text(encoding="utf-8", errors="replace")


def _encoder_name(config: PromptConditionedLoraGeneratorConfig) -> str:
    if config.text_encoder_in_folder:
        return "in `text_encoder/`"
    if config.text_encoder is None or Path(config.text_encoder).is_absolute():
        return "not recorded"
    return f"`{config.text_encoder}`"


def _measured_section(measured: Mapping[str, Any]) -> str:
    if not measured:
        return "Nothing has been measured of this generator yet."
    rows = [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in measured.items()
    ]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])
