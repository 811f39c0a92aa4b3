# SPDX-License-Identifier: Apache-2.0
"""Prompts that belong to no task: junk of several kinds, and sensible text of other kinds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from peft_dnd.evaluation import junk_prompts


_LOREM = (
    "lorem ipsum dolor sit amet",
    "consectetur adipiscing elit sed do",
    "eiusmod tempor incididunt ut labore",
    "et dolore magna aliqua enim",
    "ad minim veniam quis nostrud",
    "exercitation ullamco laboris nisi aliquip",
    "ex ea commodo consequat",
)
_MASHED = ("asdf", "aaaa", "1234", "test", "foo", "...", "qwerty", "lol", "xx")
# Everyday questions in languages that no task's prompts are in.
_OTHER_LANGUAGES = (
    "Wie spät ist es jetzt in Hamburg?",
    "Kannst du mir den Weg zum Bahnhof erklären?",
    "Warum ist der Himmel am Abend rot?",
    "Welche Bücher soll ich im Urlaub lesen?",
    "Où se trouve la pharmacie la plus proche?",
    "Combien coûte un billet pour Lyon?",
    "Quel temps fera-t-il demain matin?",
    "Peux-tu me raconter une histoire drôle?",
    "Hvor mange dager er det til jul?",
    "Kan du hjelpe meg med matten?",
    "Jaka jest stolica Australii?",
    "Gdzie mogę kupić świeży chleb?",
    "Сколько лет этому дому?",
    "Как приготовить хороший борщ?",
    "明天会下雨吗？",
    "请告诉我最近的地铁站在哪里。",
    "この本の作者は誰ですか？",
    "駅までどのくらいかかりますか？",
    "오늘 저녁에 뭐 먹을까요?",
    "ما هي عاصمة البرازيل؟",
    "आज मौसम कैसा है?",
    "Bugün hava nasıl olacak?",
    "Wat is de snelste weg naar Utrecht?",
    "Quanto tempo devo cozinhar o arroz?",
)


def strange_prompts(count: int, vocabulary: Sequence[str], *, seed: int) -> dict[str, list[str]]:
    """Make prompts that belong to no task.

    Args:
        count: How many of each kind.
        vocabulary: Words of the tasks' own prompts, for the kind of junk that is hardest to tell.
        seed: Seed of all of them.

    Returns:
        Kind -> prompts.
    """
    chance = random.Random(f"strange {seed}")
    return {
        "characters": junk_prompts(count, seed=seed, kind="characters"),
        "invented words": junk_prompts(count, seed=seed, kind="words"),
        "the tasks' own words at random": [" ".join(chance.choices(vocabulary, k=10)) for _ in range(count)],
        "lorem ipsum": [" ".join(chance.choices(_LOREM, k=2)) for _ in range(count)],
        "keyboard": [" ".join(chance.choices(_MASHED, k=chance.randint(1, 4))) for _ in range(count)],
        "source code": chance.sample(_code(), count),
        "other languages": [_OTHER_LANGUAGES[i % len(_OTHER_LANGUAGES)] for i in range(count)],
    }


def _code() -> list[str]:
    lines = (line.strip() for line in Path(json.__file__).read_text(encoding="utf-8").splitlines())
    more = (line.strip() for line in Path(random.__file__).read_text(encoding="utf-8").splitlines())
    return sorted({line for line in [*lines, *more] if 25 < len(line) < 120 and not line.startswith("#")})
