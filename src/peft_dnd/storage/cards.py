# SPDX-License-Identifier: Apache-2.0
"""The card beside what is saved, a `README.md`: ours to write anew, unless somebody has made it their own."""

from __future__ import annotations

from pathlib import Path


# A card with this line is ours to write anew; whoever edits a card takes the line out and keeps the text.
GENERATED_MARK = "<!-- Written by peft_dnd at every save. Remove this line to keep your own text. -->"
CARD_NAME = "README.md"


def may_write_card(folder: Path) -> bool:
    """Whether a folder has no card yet, or one that is still as we wrote it."""
    card = folder / CARD_NAME
    return not card.is_file() or GENERATED_MARK in card.read_text(encoding="utf-8", errors="replace")
