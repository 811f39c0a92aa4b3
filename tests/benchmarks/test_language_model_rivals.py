# SPDX-License-Identifier: Apache-2.0
"""The language model benchmark's rivals: own LoRAs trained many at once, and one LoRA for all tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_model import rivals
from language_model.rivals import Training, multi_task_lora, own_loras
from language_model.rows import IGNORED, batch_of, example_row, right
from language_model.sampled_head import SampledHeadBase, with_head
from support.small_world import ANSWERS, TEST, letter_base, letter_tokenizer, small_layout, small_world
from torch import nn

from peft_dnd.fitting.adapted_base import AdaptedBase


QUICK = Training(steps=25, rows=8, learning_rate=3e-2, warm_up=2, rank=4)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return letter_base()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return letter_tokenizer()


@pytest.fixture(scope="module")
def stored(base: nn.Module, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> rivals.StoredLoras:
    folder = tmp_path_factory.mktemp("own")
    return own_loras(base, tokenizer, small_world().of("training"), folder, training=QUICK, adapters_at_once=3)


def drawn_matrices(layout: Any, count: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {t.key: torch.randn(count, *t.shape, generator=chance).mul_(0.2).requires_grad_() for t in layout.tensors}


def rows_of(tokenizer: Any, *answers: str) -> list[Any]:
    return [[example_row(tokenizer, text, answer) for text in ("a", "river", "two words")] for answer in answers]


def test_with_all_other_tokens_the_loss_is_that_of_the_full_softmax(base: nn.Module, tokenizer: Any) -> None:
    layout = small_layout(base)
    matrices, rows = drawn_matrices(layout, 2), rows_of(tokenizer, "yes", "No.")
    found = SampledHeadBase(base, layout).losses(matrices, rows, seed=0)
    whole, batches = AdaptedBase(base, layout), [batch_of(some) for some in rows]
    for number, batch in enumerate(batches):
        with whole.in_place(whole.values({key: value[number] for key, value in matrices.items()})):
            logits = whole.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )
        torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)


def test_a_draw_of_other_tokens_estimates_the_same_loss(base: nn.Module, tokenizer: Any) -> None:
    layout = small_layout(base)
    matrices, rows = drawn_matrices(layout, 1), rows_of(tokenizer, "yes")
    full = SampledHeadBase(base, layout).losses(matrices, rows, seed=0)
    few = SampledHeadBase(base, layout, others=12)
    drawn = torch.stack([few.losses(matrices, rows, seed=seed).detach() for seed in range(40)])
    assert drawn.std() > 0
    assert abs(drawn.mean() - full.item()) < 0.05


def test_a_head_in_float32_leaves_the_base_as_it_is(base: nn.Module, tokenizer: Any) -> None:
    half = letter_base().bfloat16()
    copied = with_head(half)
    ids = torch.tensor([example_row(tokenizer, "river", "yes")["input_ids"]])
    assert copied(ids).logits.dtype == torch.float32
    assert half(ids).logits.dtype == torch.bfloat16
    assert {id(p) for p in half.parameters()} >= {id(p) for n, p in copied.named_parameters() if "lm_head" not in n}


def test_own_loras_trained_together_each_learn_their_task(
    base: nn.Module, tokenizer: Any, stored: rivals.StoredLoras
) -> None:
    adapted = AdaptedBase(base, small_layout(base))
    names = list(ANSWERS)
    rows = [[example_row(tokenizer, text, ANSWERS[name]) for text in TEST] for name in names]
    assert all(all(of) for of in right(adapted, stored.stacked(names), rows))
    swapped = right(adapted, stored.stacked(names[::-1]), rows)
    assert not any(any(of) for of in swapped)


def test_a_block_trained_alone_is_what_it_is_among_others(
    base: nn.Module, tokenizer: Any, stored: rivals.StoredLoras, tmp_path: Path
) -> None:
    """So that AdamW, clipping and draws are each adapter's own."""
    tasks = small_world().of("training")
    alone = own_loras(base, tokenizer, tasks[:1], tmp_path, training=QUICK, adapters_at_once=1)
    for key, value in alone.stacked(["yes"]).items():
        # The draw of other tokens covers the whole small vocabulary, so that only rounding differs.
        torch.testing.assert_close(value, stored.stacked(["yes"])[key], rtol=0.02, atol=0.002)


def test_blocks_that_are_there_are_not_trained_again(
    base: nn.Module, tokenizer: Any, stored: rivals.StoredLoras, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = small_world().of("training")
    kept = rivals.block_path(stored.folder, 0).read_bytes()
    rivals.block_path(stored.folder, 1).unlink()
    trained: list[list[str]] = []
    train = rivals._train_block
    monkeypatch.setattr(rivals, "_train_block", lambda *a: trained.append([t.name for t in a[2]]) or train(*a))
    own_loras(base, tokenizer, tasks, stored.folder, training=QUICK, adapters_at_once=3)
    assert trained == [["red"]]
    assert rivals.block_path(stored.folder, 0).read_bytes() == kept


def test_loras_trained_otherwise_are_refused(base: nn.Module, tokenizer: Any, stored: rivals.StoredLoras) -> None:
    tasks = small_world().of("training")
    with pytest.raises(rivals.RivalError, match=r"another 'seed'.*Remove the folder"):
        own_loras(base, tokenizer, tasks, stored.folder, training=QUICK, adapters_at_once=3, seed=1)
    with pytest.raises(rivals.RivalError, match="no LoRA of task 'unknown'"):
        stored.stacked(["unknown"])


def test_a_lora_for_all_tasks_goes_on_where_it_was_stopped(
    base: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "_STEPS_BETWEEN_SAVES", 2)
    tasks = small_world().of("training")
    how = Training(steps=0, rows=8, learning_rate=1e-2, warm_up=2, rank=4)

    def train(folder: Path) -> rivals.Matrices:
        return multi_task_lora(base, tokenizer, tasks, folder, examples_seen=40, training=how, tasks_a_step=4)

    whole = train(tmp_path / "whole")
    step = rivals._take_step

    def stop_at_the_third(*args: Any) -> float:
        if args[5] == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(rivals, "_take_step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "adapter.safetensors").exists()
    taken: list[int] = []
    monkeypatch.setattr(rivals, "_take_step", lambda *args: taken.append(args[5]) or step(*args))
    gone_on = train(tmp_path / "stopped")
    assert taken == [2, 3, 4]
    for key, value in whole.items():
        torch.testing.assert_close(gone_on[key], value)
    assert train(tmp_path / "stopped").keys() == whole.keys()
    assert taken == [2, 3, 4]


def test_a_lora_for_all_tasks_reads_instructions_or_not(base: nn.Module, tokenizer: Any) -> None:
    import random

    tasks = small_world().of("training")
    texts = [
        [
            tokenizer.decode(row["input_ids"])
            for row in rivals._rows_of_all(tokenizer, tasks, 4, 4, told, random.Random(0))
        ]
        for told in (True, False)
    ]
    assert all("Say" in text or "Write" in text for text in texts[0])
    assert not any("Say" in text or "Write" in text or "Put" in text for text in texts[1])
