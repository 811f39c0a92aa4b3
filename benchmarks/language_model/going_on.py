# SPDX-License-Identifier: Apache-2.0
"""A fitted generator that is fitted further: it starts as it is, and learns to read more of its prompts.

More of the directions in which tasks lie apart are read beside the old ones, at first with weights of zero, so that
the wider generator writes what the old one writes until it is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from peft_dnd import PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from peft_dnd.decoders.discriminants import discriminants
from peft_dnd.text import AnswerStatesTextEncoder


_READING = "decoder.reading.1.weight"
_DIRECTIONS = "decoder.directions"


def reading_more(
    folder: Path, encoder: AnswerStatesTextEncoder, prompts_of_tasks: Mapping[str, Iterable[torch.Tensor]], more: int
) -> PromptConditionedLoraGenerator:
    """A fitted generator whose reader has further directions, which count for nothing yet.

    Args:
        folder: The fitted generator, with the `"core"` decoder.
        encoder: What reads its prompts.
        prompts_of_tasks: For each task the states of its prompts in all its wordings and languages, (any number, C)
            each: what lies between these is what is not read.
        more: How many directions.
    """
    old: PromptConditionedLoraGenerator = PromptConditionedLoraGenerator.from_pretrained(folder, text_encoder=encoder)
    if not more:
        return old
    state = old.state_dict()
    center, spread = state["decoder.center"], state["decoder.spread"]
    standardised = [(torch.cat(list(states)) - center) / spread for states in prompts_of_tasks.values()]
    state[_DIRECTIONS] = torch.cat([state[_DIRECTIONS], discriminants(standardised, more)])
    state[_READING] = torch.nn.functional.pad(state[_READING], (0, more))
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(folder)
    config.decoder_config = {**config.decoder_config, "num_directions": len(state[_DIRECTIONS])}
    wider = PromptConditionedLoraGenerator(config, encoder)
    wider.load_state_dict(state)
    return wider
