# SPDX-License-Identifier: Apache-2.0
"""Many adapters in one pass of the base: the losses and gradients of item by item, in fewer passes, or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.fitting.adapted_base import AdaptedBase
from peft_dnd.fitting.rows import Places, Rows
from peft_dnd.fitting.task_loss import TaskLoss
from peft_dnd.pairs.collator import ExampleCollator


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **SIZES))


def gemma() -> nn.Module:
    config = Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        vocab_size=50,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=2.0,
        attn_logit_softcapping=3.0,
    )
    return Gemma3ForCausalLM(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=12, n_layer=2, n_head=2))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(vocab_size=50, **SIZES))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


PATTERNS = {"rank_pattern": {"v_proj": 4, "q_proj": 1}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True}
BASES = {
    "Llama": (llama, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"), "narrow"),
    "Llama, patterns": (llama, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], **PATTERNS), "narrow"),
    "Gemma 3": (gemma, LoraConfig(r=3, target_modules="all-linear"), "narrow"),
    "Gemma 3, embedding": (gemma, LoraConfig(r=2, target_modules=["embed_tokens", "k_proj"]), "narrow"),
    "GPT-2": (gpt2, LoraConfig(r=3, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True), "narrow"),
    "adapted head": (llama, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), "whole"),
    "BERT": (bert, LoraConfig(r=2, target_modules=["query", "value", "word_embeddings"]), "narrow"),
    "T5": (t5, LoraConfig(r=2, target_modules=["q", "v", "wo"]), "whole"),
}


def made(name: str) -> tuple[nn.Module, AdapterLayout]:
    torch.manual_seed(0)
    make, config, _ = BASES[name]
    base = make()
    return base, AdapterLayout.from_lora_config(config, base)


def draw(layout: AdapterLayout, items: int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return {t.key: (torch.randn(items, *t.shape, generator=chance) * scale).requires_grad_() for t in layout.tensors}


def examples(rows_of_items: Sequence[int], longest: int = 12) -> list[dict[str, torch.Tensor]]:
    """For each item so many rows of lengths drawn by chance, of which the second half or more is labelled."""
    chance = torch.Generator().manual_seed(2)
    batches = []
    for rows in rows_of_items:
        made = []
        for _ in range(rows):
            length = int(torch.randint(2, longest, (), generator=chance))
            ids = torch.randint(0, 50, (length,), generator=chance).tolist()
            asked = int(torch.randint(1, length, (), generator=chance))
            made.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
        batches.append(ExampleCollator()(made))
    return batches


class Counts:
    """How many rows each pass of a model has, and for how many places its head is computed."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.places: list[int] = []
        model.register_forward_pre_hook(self._read, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(self._write)

    def _read(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows.append(len(kwargs["input_ids"]))
        self.tokens.append(kwargs["input_ids"].numel())

    def _write(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.places.append(output.shape[:-1].numel())

    def clear(self) -> None:
        for counted in (self.rows, self.tokens, self.places):
            counted.clear()


def assert_as_one_by_one(
    loss_of: TaskLoss, matrices: dict[str, torch.Tensor], batches: list[Any], dtype: torch.dtype = torch.float32
) -> None:
    """Losses and gradients, each loss weighing otherwise in what comes after it."""
    weights = torch.arange(1.0, len(batches) + 1)
    shared = loss_of.losses(matrices, batches)
    ours = torch.autograd.grad((shared * weights).sum(), list(matrices.values()))
    one_by_one = [
        loss_of({key: value[i] for key, value in matrices.items()}, batch) for i, batch in enumerate(batches)
    ]
    theirs = torch.autograd.grad((torch.stack(one_by_one) * weights).sum(), list(matrices.values()))
    torch.testing.assert_close(shared, torch.stack(one_by_one), rtol=1e-5, atol=1e-6)
    for key, mine, other in zip(matrices, ours, theirs, strict=True):
        assert other.abs().max() > 0, key
        assert (mine - other).norm() <= 1e-5 * other.norm(), key
    with torch.no_grad():
        torch.testing.assert_close(loss_of.losses(matrices, batches), shared, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [[3, 3, 3], [2, 5, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize("name", BASES)
def test_loss_and_gradient_are_those_of_item_by_item(name: str, rows: list[int]) -> None:
    base, layout = made(name)
    loss_of, matrices, batches = TaskLoss(base, layout), draw(layout, 3), examples(rows)
    counts = Counts(loss_of.model)
    assert_as_one_by_one(loss_of, matrices, batches)
    counts.clear()
    loss_of.losses(matrices, batches)
    labels = sum(int((batch["labels"][:, int(name not in ("BERT", "T5")) :] != -100).sum()) for batch in batches)
    assert counts.rows == [sum(rows)]
    assert counts.places == [labels if BASES[name][2] == "narrow" else counts.tokens[0]]


@pytest.mark.parametrize("rows", [[3, 3, 3], [2, 5, 1], [1, 1, 9]], ids=["even", "uneven", "very uneven"])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("name", ["Llama, patterns", "Gemma 3, embedding", "GPT-2"])
def test_a_matrix_that_all_items_have_need_not_be_repeated(name: str, side: str, rows: list[int]) -> None:
    base, layout = made(name)
    loss_of, batches = TaskLoss(base, layout), examples(rows)
    sides = {tensor.key: tensor.side for tensor in layout.tensors}
    once = {
        key: (value[:1] if sides[key] == side else value).detach().requires_grad_()
        for key, value in draw(layout, 3).items()
    }
    repeated = {
        key: value.detach().expand(3, *value.shape[1:]).clone().requires_grad_() for key, value in once.items()
    }
    losses, expected = loss_of.losses(once, batches), loss_of.losses(repeated, batches)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(of.mean(), list(given.values())) for of, given in ((losses, once), (expected, repeated))
    )
    for key, mine, other in zip(once, ours, theirs, strict=True):
        wanted = other.sum(0, keepdim=True) if sides[key] == side else other
        assert (mine - wanted).norm() <= 1e-5 * wanted.norm(), key


def test_items_that_share_a_matrix_must_weigh_alike() -> None:
    base, layout = made("Llama")
    once = {key: value[:1] for key, value in draw(layout, 2).items()}
    losses = TaskLoss(base, layout).losses(once, examples([2, 2]))
    with pytest.raises(GeneratorConfigError, match=r"must weigh alike .*\[1\.0, 2\.0\]"):
        (losses * torch.tensor([1.0, 2.0])).sum().backward()


def test_a_shared_matrix_where_items_are_taken_one_by_one() -> None:
    base, layout = made("Llama")
    batches = examples([2, 3])
    matrices = draw(layout, 2)
    once = {key: value[:1] if ".lora_A." in key else value for key, value in matrices.items()}
    repeated = {key: value.expand(2, *value.shape[1:]) for key, value in once.items()}
    by_hand = TaskLoss(base, layout, lambda model, batch: model(**batch).loss)
    torch.testing.assert_close(by_hand.losses(once, batches), TaskLoss(base, layout).losses(repeated, batches))


@pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_are_bounded_and_change_nothing(name: str, checkpointing: bool) -> None:
    base, layout = made(name)
    batches = examples([4, 1, 6], longest=20)
    loss_of = TaskLoss(base, layout, tokens_per_pass=40, gradient_checkpointing=checkpointing)
    counts = Counts(loss_of.model)
    assert_as_one_by_one(loss_of, draw(layout, 3), batches)
    counts.clear()
    loss_of.losses(draw(layout, 3), batches)
    assert sum(counts.rows) == 11 and len(counts.rows) > 3
    assert all(tokens <= 40 or rows == 1 for tokens, rows in zip(counts.tokens, counts.rows, strict=True))


def test_rows_of_like_lengths_go_together_where_it_saves_padding() -> None:
    lengths = [3] * 100 + [200] * 3
    batch = ExampleCollator()([{"input_ids": [1] * n, "labels": [1] * n} for n in lengths])
    rows = Rows([batch], [batch["labels"] == 1], pad_token_id=0, masks=True)
    passes = list(rows.passes(tokens=8192, places=10**6))
    assert sorted(one.batch["input_ids"].shape for one in passes) == [(3, 200), (100, 3)]
    # Neither is there a pass for each length where padding is cheap.
    short = ExampleCollator()([{"input_ids": [1] * n, "labels": [1] * n} for n in range(1, 12)])
    assert len(list(Rows([short], [short["labels"] == 1], pad_token_id=0, masks=True).passes(8192, 10**6))) == 1
    # What is held at once of logits is bounded too, and no place is lost.
    some = list(rows.passes(tokens=8192, places=50))
    assert max(len(one.row) for one in some if len(one.item) > 1) <= 50
    assert sum(len(one.row) for one in some) == sum(lengths)


@pytest.mark.parametrize("conditions", ["left padding", "own fields"])
def test_what_stands_in_the_batches_is_what_the_base_reads(conditions: str) -> None:
    base, layout = made("Llama")
    batches = examples([2, 3])
    if conditions == "left padding":
        for batch in batches:
            for name, filling in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
                batch[name] = nn.functional.pad(batch[name], (3, 0), value=filling)
    else:
        for batch in batches:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).repeat(len(batch["labels"]), 1) * 2
    assert_as_one_by_one(TaskLoss(base, layout), draw(layout, 2), batches)


def test_an_adapted_convolution() -> None:
    class Patches(nn.Module):
        """Reads a picture's columns as tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1)
            self.head = nn.Linear(12, 50)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
            features = self.conv(input_ids.float().transpose(1, 2).unflatten(1, (4, -1)))
            logits = self.head(features.flatten(1, 2).transpose(1, 2)[..., :12])
            if labels is None:
                return {"logits": logits}
            return {"logits": logits, "loss": nn.functional.cross_entropy(logits.mT, labels)}

    torch.manual_seed(0)
    base = Patches()
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["conv"]), base)
    for rows in ([2, 2], [1, 3]):
        batches = [{"input_ids": torch.randn(n, 5, 16), "labels": torch.randint(0, 50, (n, 5))} for n in rows]
        loss_of = TaskLoss(base, layout)
        counts = Counts(loss_of.model)
        assert_as_one_by_one(loss_of, draw(layout, 2), batches)
        counts.clear()
        loss_of.losses(draw(layout, 2), batches)
        assert counts.rows == [4] and counts.places == [20]


class Routed(nn.Module):
    """A base that one cannot tell the rows in: it shuffles them, or goes on with tokens apart."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.layer, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50)
        if how == "head twice":
            self.other = nn.Linear(50, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        states = self.embed(input_ids)
        if self.how == "shuffled":
            states = states + self.layer(states.flip(0)).flip(0)
        elif self.how == "apart":
            states = states + self.layer(states.flatten(0, 1)).view_as(states)
        else:
            states = states + self.layer(states)
        logits = self.head(states)
        if self.how == "head twice":
            logits = logits + self.head(self.other(logits))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.mT, labels)
        return {"logits": logits, "loss": loss + (0.01 * states.square().mean() if self.how == "own loss" else 0)}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shuffled", "logits differ"),
        ("apart", r"input of shape \(\d+, 8\)"),
        ("head twice", "head"),
        ("own loss", "not the mean cross-entropy"),
    ],
)
def test_bases_that_do_not_allow_it_are_found_out(how: str, said: str, caplog: Any) -> None:
    torch.manual_seed(0)
    base = Routed(how)
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["layer"]), base)
    loss_of = TaskLoss(base, layout)
    with caplog.at_level(logging.INFO, logger="peft_dnd"):
        assert_as_one_by_one(loss_of, draw(layout, 3), examples([2, 2, 3]))
    assert re.search(said, caplog.text), caplog.text


def test_a_layer_that_meets_other_rows_later_is_found_out_then(caplog: Any) -> None:
    torch.manual_seed(0)
    base = Routed("plain")
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["layer"]), base)
    loss_of, matrices, batches = TaskLoss(base, layout), draw(layout, 3), examples([2, 2, 3])
    assert_as_one_by_one(loss_of, matrices, batches)
    loss_of.model.how = "apart"
    with caplog.at_level(logging.WARNING, logger="peft_dnd"):
        assert_as_one_by_one(loss_of, matrices, batches)
    assert "one by one" in caplog.text


def test_batches_that_do_not_go_together_are_taken_apart() -> None:
    base, layout = made("Llama")
    loss_of, matrices = TaskLoss(base, layout), draw(layout, 2)
    batches = examples([2, 3])
    assert_as_one_by_one(loss_of, matrices, batches)
    batches[1]["position_ids"] = torch.arange(batches[1]["input_ids"].shape[1])[None]
    assert_as_one_by_one(loss_of, matrices, batches)
    # And whole batches of which no place can be told.
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SIZES))
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["query"]), classifier)
    for batch in batches:
        batch.pop("position_ids", None)
        batch["labels"] = torch.randint(0, 3, (len(batch["labels"]),))
    assert_as_one_by_one(TaskLoss(classifier, layout), draw(layout, 2), batches)


def test_a_half_precision_base() -> None:
    base, layout = made("Gemma 3")
    matrices, batches = draw(layout, 3), examples([3, 2, 3])
    exact = TaskLoss(base, layout).losses(matrices, batches)
    loss_of = TaskLoss(base.to(torch.bfloat16), layout)
    counts = Counts(loss_of.model)
    with torch.autocast("cpu", torch.float16):
        half = loss_of.losses(matrices, batches)
    assert half.dtype == torch.float32 and counts.rows[-1] == 8
    torch.testing.assert_close(half, exact, rtol=3e-2, atol=0)
    assert all(g.any() for g in torch.autograd.grad(half.sum(), list(matrices.values())))


def test_an_item_without_a_label_is_refused() -> None:
    base, layout = made("Llama")
    batches = examples([2, 2])
    batches[1]["labels"][:] = -100
    with pytest.raises(GeneratorConfigError, match=r"Item 1 .*label"):
        TaskLoss(base, layout).losses(draw(layout, 2), batches)


def test_any_loss_of_places_and_the_base_without_adapters() -> None:
    """What other objectives are made of: a divergence at places of their own, and logits with and without adapters."""
    base, layout = made("Gemma 3")
    adapted, matrices = AdaptedBase(base, layout, tokens_per_pass=30), draw(layout, 3)
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in examples([2, 3, 1])]
    at = [torch.ones_like(batch["input_ids"]).bool() for batch in batches]
    found: dict[str, dict[tuple[int, ...], torch.Tensor]] = {"with": {}, "without": {}}
    for name, given in (("with", matrices), ("without", None)):
        for places, logits in adapted.logits_at(given, batches, at):
            numbers = torch.stack([places.item, places.row, places.column], 1).tolist()
            found[name].update((tuple(place), row) for place, row in zip(numbers, logits, strict=True))
    base.eval()
    for item, (batch, wanted) in enumerate(zip(batches, at, strict=True)):
        plain = base(**batch).logits
        with adapted.in_place([value[item] for value in matrices.values()]):
            expected = adapted.model(**batch).logits
        for row, column in wanted.nonzero().tolist():
            torch.testing.assert_close(found["with"][item, row, column], expected[row, column], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["without"][item, row, column], plain[row, column], rtol=1e-4, atol=1e-5)

    def squares(logits: torch.Tensor, places: Places) -> torch.Tensor:
        return logits.square().mean(-1) * (places.item + 1)

    losses = adapted.losses(matrices, batches, at, squares)
    for item in range(3):
        mine = [row.square().mean() for place, row in found["with"].items() if place[0] == item]
        torch.testing.assert_close(losses[item], torch.stack(mine).mean() * (item + 1), rtol=1e-4, atol=0)
    assert all(g.any() for g in torch.autograd.grad(losses.sum(), list(matrices.values())))
