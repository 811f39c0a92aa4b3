# SPDX-License-Identifier: Apache-2.0
"""The space in which refused prompts are compared: what prompts of one task differ in counts for little there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
import torch

from peft_dnd.policy import RefusedPrompts
from peft_dnd.policy.prompt_space import PromptSpace


WIDTH, NUISANCES = 48, 6
Points = dict[str, torch.Tensor]


def worlds(width: int) -> tuple[Callable[[torch.Tensor, int], torch.Tensor], torch.Generator]:
    """Draws texts about a topic, which differ in a few directions that all topics share, as names do, and in noise."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(NUISANCES, width, generator=draw) / width**0.5

    def texts(topic: torch.Tensor, count: int) -> torch.Tensor:
        rows = topic + 1.5 * torch.randn(count, NUISANCES, generator=draw) @ shared
        rows = rows + 0.3 * torch.randn(count, width, generator=draw) / width**0.5
        return torch.nn.functional.normalize(rows, dim=1)

    return texts, draw


def topics(count: int, width: int, draw: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=draw), dim=1)


@pytest.mark.parametrize("width", [WIDTH, 500])
def test_texts_on_one_topic_lie_nearer_and_those_on_others_no_nearer(width: int) -> None:
    texts, draw = worlds(width)
    known = [texts(topic, 24) for topic in topics(30, width, draw)]
    space = PromptSpace.fit(known)
    assert space.axes.shape == (width, min(width, 384)) and space.is_usable()
    first, second = topics(2, width, draw)
    one, again, other = texts(first, 100), texts(first, 100), texts(second, 100)

    def likeness(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
        return float((a @ b.T).mean()), float((space.place(a) @ space.place(b).T).mean())

    (before, after), (before_other, after_other) = likeness(one, again), likeness(one, other)
    assert after > before + 0.05 and after - after_other > before - before_other + 0.05
    placed = space.place(one)
    assert (placed.norm(dim=1) < 1.001).all()
    if width == WIDTH:
        assert torch.allclose(placed.norm(dim=1), torch.ones(100), atol=2e-3)


def test_what_lies_beside_all_axes_is_like_nothing() -> None:
    texts, draw = worlds(500)
    flat = torch.zeros(500)
    known = [texts(topic, 4) for topic in topics(10, 500, draw)]  # 40 texts: as many axes at the most
    space = PromptSpace.fit(known)
    rest = torch.randn(500, generator=draw)
    rest -= space.axes.float() @ (space.axes.float().T @ rest)
    beside = torch.nn.functional.normalize(flat + rest, dim=0)[None]
    assert float((space.place(beside) @ space.place(torch.cat(known)).T).abs().max()) < 0.05


@pytest.mark.parametrize("width", [WIDTH, 1500])
def test_far_wordings_of_a_class_are_caught_more_often_at_no_more_false_alarms(width: int) -> None:
    texts, draw = worlds(width)
    space: Points = {}

    def named(rows: torch.Tensor) -> list[str]:
        names = [f"text {len(space) + number}" for number in range(len(rows))]
        space.update(zip(names, rows, strict=True))
        return names

    def read(given: Sequence[str]) -> torch.Tensor:
        return torch.stack([space[text] for text in given])

    def views(text: str) -> tuple[str, ...]:
        return (text,)

    every = topics(60, width, draw)
    examples = named(texts(every[0], 32))
    allowed = {str(number): named(texts(topic, 16)) for number, topic in enumerate(every[1:20])}
    near = named(texts(every[0], 100))
    far = named(texts(torch.nn.functional.normalize(every[0] + 0.7 * every[20], dim=0), 100))
    welcome = [one for topic in every[21:] for one in named(texts(topic, 8))]

    def shares() -> tuple[float, float, float]:
        known = RefusedPrompts.fit({"class": examples}, allowed, read, views, false_alarms=0.05)
        found = [[bool(known.refused([one], read, views)) for one in given] for given in (near, far, welcome)]
        return tuple(sum(caught) / len(caught) for caught in found)  # type: ignore[return-value]

    in_space = shares()
    with patch.object(PromptSpace, "fit", lambda *_: PromptSpace(torch.eye(width).half(), torch.ones(width + 1))):
        as_it_is = shares()
    assert in_space[0] >= as_it_is[0] and in_space[1] > as_it_is[1] + 0.1
    assert in_space[2] <= max(0.05, as_it_is[2])
