# SPDX-License-Identifier: Apache-2.0
"""A base that is added to a generator learns of a base that the generator knows, which answers with its adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.constants import TASK_PROMPTS
from support.several_bases import base_of, layout_for, make
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import DnDTrainer, DnDTrainingArguments, PromptCheckpointDataset
from peft_dnd.errors import (
    BaseModelMismatchError,
    GeneratorConfigError,
    PairsFolderError,
    PromptError,
    PromptTypeError,
)
from peft_dnd.fitting import distil_generator, distil_task
from peft_dnd.fitting.teacher import base_digest
from peft_dnd.pairs.distillation import RECORD_NAME, ROWS_NAME
from peft_dnd.pairs.writer import PairWriter


pytest_plugins = ("support.several_bases",)

NEW = "org/new"


@pytest.fixture(scope="module")
def new_base() -> nn.Module:
    return base_of(NEW, (32, 1))


@pytest.fixture
def generator(layouts: Any, encoder_folder: Path) -> Any:
    found = make(layouts, encoder_folder)
    found.decoder.centered.fill_(True)  # as one that was fitted is
    return found


@pytest.fixture
def hand_on(generator: Any, bases: Any, new_base: nn.Module, word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    def run(**changed: Any) -> Path:
        options = {
            "prompts": TASK_PROMPTS,
            "inputs": TASK_PROMPTS,
            "generator": generator,
            "teacher": bases["org/wide"],
            "tokenizer": word_tokenizer,
            "student": new_base,
            "student_tokenizer": copy.deepcopy(word_tokenizer),
            "max_new_tokens": 3,
            "top_tokens": 4,
            "apply_chat_template": False,
            **changed,
        }
        distil_generator(tmp_path / "pairs", **options)
        return tmp_path / "pairs"

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS_NAME).read_text().splitlines()]


def arguments(folder: Path, **options: Any) -> DnDTrainingArguments:
    given = {"max_steps": 60, "distillation_weight": 1.0, "task_examples": 4, "learning_rate": 1e-2, **options}
    return DnDTrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, **given
    )


def test_the_old_base_answers_with_the_adapter_of_each_task(hand_on, generator, bases, new_base, word_tokenizer):
    before = {key: value.clone() for key, value in bases["org/wide"].state_dict().items()}
    folder = hand_on()
    after = bases["org/wide"].state_dict()
    assert list(after) == list(before) and all(torch.equal(value, after[key]) for key, value in before.items())
    for task, prompts in TASK_PROMPTS.items():
        adapter = generator.generate_adapter(prompts, base="wide")
        adapted = adapter.load_into(copy.deepcopy(bases["org/wide"])).eval()
        for text, row in zip(prompts, rows_of(folder / task), strict=True):
            ids = word_tokenizer(text)["input_ids"]
            with torch.no_grad():
                logits = adapted(input_ids=torch.tensor([row["input_ids"]])).logits[0, len(ids) - 1 : -1]
            top = logits.log_softmax(-1).topk(4)
            torch.testing.assert_close(torch.tensor(row["top_log_probs"]), top.values, atol=2e-4, rtol=0)
        record = json.loads((folder / task / RECORD_NAME).read_text())
        assert record["student"] == base_digest(new_base)
        assert record["teacher"]["base"] == base_digest(bases["org/wide"]) and record["teacher"]["adapter"]
    assert rows_of(folder / "law")[0]["top_log_probs"] != rows_of(folder / "med")[0]["top_log_probs"]


def test_a_head_learns_of_another_base_what_it_has_no_adapters_for(hand_on, generator, new_base, tmp_path):
    pairs = PromptCheckpointDataset.from_folder(hand_on(), layout=layout_for(new_base))
    one = generator.add_base(pairs.layout, name="new")
    others = {
        name: generator.generate_adapter(TASK_PROMPTS["law"], base=name).state_dict() for name in ("wide", "deep")
    }
    trainer = DnDTrainer(one, arguments(tmp_path / "out"), pairs, pairs, base_model=new_base)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_distillation_loss"] < 0.8 * metrics["eval_mean_adapter_distillation_loss"]
    for name, adapter in others.items():
        again = generator.generate_adapter(TASK_PROMPTS["law"], base=name).state_dict()
        assert all(torch.equal(value, again[key]) for key, value in adapter.items())


def test_a_task_with_checkpoints_of_the_new_base_keeps_them(hand_on, generator, new_base, tmp_path):
    layout = layout_for(new_base)
    writer = PairWriter(tmp_path / "pairs" / "law", TASK_PROMPTS["law"][:3], layout)
    writer.begin()
    writer.add({tensor.key: torch.randn(tensor.shape) * 0.1 for tensor in layout.tensors}, 1)
    writer.close()
    pairs = PromptCheckpointDataset.from_folder(hand_on())
    assert pairs.prompts("law") == tuple(TASK_PROMPTS["law"][:3])
    assert [len(pairs.checkpoints(task)) for task in pairs.tasks] == [0, 0, 1, 0]
    assert all(pairs.distillation(task) is not None for task in pairs.tasks)
    one = generator.add_base(pairs, name="new")
    trainer = DnDTrainer(one, arguments(tmp_path / "out", rebuild_weight=0.5, max_steps=2), pairs, base_model=new_base)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_base_with_other_tokens_learns_the_answers_as_text(hand_on, generator, new_base, word_tokenizer, tmp_path):
    words = word_tokenizer.get_vocab()
    theirs = Tokenizer(models.WordLevel({word: 49 - place for word, place in words.items()}, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=theirs, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    folder = hand_on(student_tokenizer=other, top_tokens=0)
    mine = {task: rows_of(folder / task) for task in TASK_PROMPTS}
    plain = {task: rows_of(hand_on(top_tokens=0, overwrite=True) / task) for task in TASK_PROMPTS}
    for task, rows in mine.items():
        for row, same in zip(rows, plain[task], strict=True):
            assert set(row) == {"input_ids", "labels"}
            assert row["input_ids"] == [49 - token for token in same["input_ids"]]
            assert row["labels"] == [label if label < 0 else 49 - label for label in same["labels"]]
    pairs = PromptCheckpointDataset.from_folder(folder, layout=layout_for(new_base))
    one = generator.add_base(pairs.layout, name="new")
    with pytest.raises(PairsFolderError, match=r"'art' the teacher's answers alone .*distillation_targets='answers'"):
        DnDTrainer(one, arguments(tmp_path / "out"), pairs, base_model=new_base).train()
    options = {"distillation_targets": "answers", "max_steps": 40}
    trainer = DnDTrainer(one, arguments(tmp_path / "out", **options), pairs, pairs, base_model=new_base)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_distillation_loss"] < metrics["eval_mean_adapter_distillation_loss"] - 0.01


def test_a_pass_goes_on_and_asks_nothing_twice(hand_on, monkeypatch):
    from peft_dnd.fitting import teacher as module

    answered: list[str] = []
    rows = module._Answering.rows

    def counting(self: Any, windows: Any, inputs: Any) -> Any:
        if len(answered) >= 2 * len(TASK_PROMPTS["law"]):
            raise KeyboardInterrupt
        answered.extend(inputs)
        return rows(self, windows, inputs)

    monkeypatch.setattr(module._Answering, "rows", counting)
    with pytest.raises(KeyboardInterrupt):
        hand_on()
    first = list(answered)
    answered.clear()
    monkeypatch.setattr(module._Answering, "rows", lambda *given: answered.extend(given[2]) or rows(*given))
    folder = hand_on()
    assert sorted(first + answered) == sorted(text for prompts in TASK_PROMPTS.values() for text in prompts)
    assert all(len(rows_of(folder / task)) == len(prompts) for task, prompts in TASK_PROMPTS.items())


def test_what_was_answered_for_one_base_does_not_pass_for_another(hand_on, generator, bases, new_base, tmp_path):
    folder = hand_on()
    pairs = PromptCheckpointDataset.from_folder(folder, layout=layout_for(new_base))
    one = generator.add_base(pairs.layout, name="new")
    other = copy.deepcopy(new_base)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(PairsFolderError, match=r"'art' was answered for another base .* student=base_model"):
        DnDTrainer(one, arguments(tmp_path / "out"), pairs, base_model=other).train()
    with pytest.raises(PairsFolderError, match="but for another student: the base with the digest"):
        hand_on(student=other)
    hand_on(student=other, overwrite=True)
    DnDTrainer(one, arguments(tmp_path / "out", max_steps=1), pairs, base_model=other).train()


def test_what_cannot_be_handed_on_is_refused(hand_on, generator, bases, new_base, word_tokenizer, tmp_path):
    lacking = copy.deepcopy(word_tokenizer)
    lacking.add_tokens(["<extra>"])
    law = {"law": TASK_PROMPTS["law"]}
    adapted = generator.generate_adapter(TASK_PROMPTS["law"], base="deep").load_into(copy.deepcopy(bases["org/deep"]))
    for changed, kind, message in (
        ({"student_tokenizer": lacking}, GeneratorConfigError, r"'<extra>' is number 50 .* and None.*top_tokens=0"),
        ({"inputs": TASK_PROMPTS["law"]}, PromptTypeError, r"inputs of many tasks are a dictionary.*distil_task"),
        ({"inputs": law}, PromptError, r"of the same tasks.*\['art', 'geo', 'med'\]"),
        ({"prompts": {}, "inputs": {}}, PromptError, "at least one"),
        ({"inputs": {**TASK_PROMPTS, "geo": []}}, PromptError, "the inputs of task 'geo'"),
        ({"prompts": {**TASK_PROMPTS, "geo": ["what", " "]}}, PromptError, "the prompts of task 'geo'"),
        ({"prompts": {"../law": ["what"]}, "inputs": {"../law": ["what"]}}, PromptError, r"cannot be '\.\./law'"),
        ({"teacher": new_base}, BaseModelMismatchError, "fits none of the generator's bases"),
        ({"teacher": adapted}, GeneratorConfigError, "The teacher has an adapter"),
        ({"max_new_tokens": 0}, GeneratorConfigError, "max_new_tokens"),
        ({"top_tokens": -1}, GeneratorConfigError, "top_tokens must be a positive integer, or 0"),
        ({"student": base_of(NEW, (32, 1), window=4)}, PromptError, "the student's window of 4"),
    ):
        with pytest.raises(kind, match=message):
            hand_on(**changed)
        assert not (tmp_path / "pairs").exists(), message
    with pytest.raises(GeneratorConfigError, match="Give both student and student_tokenizer"):
        distil_task(
            tmp_path / "law", ["what"], teacher=new_base, tokenizer=word_tokenizer, context="", student=new_base
        )
