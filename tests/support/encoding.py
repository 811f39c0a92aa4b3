# SPDX-License-Identifier: Apache-2.0
"""What tests of text encoders share."""

from __future__ import annotations

from peft_dnd.text.token_states import TokenStates


PROMPTS = ["what is the capital ?", "a river", "law", "what is tax law ? please answer in one word .", "of a", "a law"]


def bytes_of(states: TokenStates) -> list[bytes]:
    """Each prompt's states to the bit."""
    return [states[i].numpy().tobytes() for i in range(len(states))]
