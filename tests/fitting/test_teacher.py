# SPDX-License-Identifier: Apache-2.0
"""A teacher's pass over a task: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.constants import LORA_CONFIG
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import PromptCheckpointDataset
from peft_dnd.errors import CorruptFileError, GeneratorConfigError, PairsFolderError, PromptError, PromptTypeError
from peft_dnd.fitting import teacher as teacher_module
from peft_dnd.fitting.teacher import base_digest, distil_task
from peft_dnd.pairs.collator import DistillationCollator
from peft_dnd.pairs.distillation import PARTIAL_NAME, RECORD_NAME, ROWS_NAME, load_distillation


INPUTS = ["what is the law ?", "a court please", "the capital ?", "medicine , doctor", "what colour is the river ?"]
CONTEXT = "answer in one word , please . "


@pytest.fixture
def distil(base_model: nn.Module, word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    def run(folder: str = "law", inputs=INPUTS, **options) -> Path:
        options = {
            "teacher": base_model,
            "tokenizer": word_tokenizer,
            "context": CONTEXT,
            "max_new_tokens": 4,
            "apply_chat_template": False,
            **options,
        }
        distil_task(tmp_path / folder, inputs, top_tokens=3, rows_at_once=2, **options)
        return tmp_path / folder

    return run


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / ROWS_NAME).read_text().splitlines()]


def test_rows_are_what_the_teacher_does_with_the_context_in_its_window(distil, base_model, word_tokenizer):
    folder = distil()
    for text, row in zip(INPUTS, rows_of(folder), strict=True):
        student = word_tokenizer(text)["input_ids"]
        answer = [label for label in row["labels"] if label != -100]
        assert row["input_ids"] == student + answer
        assert row["labels"] == [-100] * len(student) + answer
        window = word_tokenizer(CONTEXT + text)["input_ids"]
        with torch.no_grad():
            logits = base_model(input_ids=torch.tensor([window + answer])).logits[0, len(window) - 1 : -1]
        top = logits.log_softmax(-1).topk(3)
        assert row["top_tokens"] == top.indices.tolist()
        torch.testing.assert_close(torch.tensor(row["top_log_probs"]), top.values, atol=2e-4, rtol=0)
        assert answer == logits.argmax(-1).tolist()


def test_the_folder_is_a_task_without_labels_or_checkpoints(distil, layout, tmp_path):
    distil()
    distil("tax", prompts=["what is tax law ?"])
    pairs = PromptCheckpointDataset.from_folder(tmp_path, layout=layout)
    assert pairs.prompts("law") == tuple(CONTEXT + text for text in INPUTS)
    assert pairs.prompts("tax") == ("what is tax law ?",)
    assert not pairs.has_checkpoints and pairs.examples("law") is None
    assert len(pairs.distillation("law")) == len(INPUTS)
    assert pairs[0]["distillation"].draw(2, seed=0)[0]["top_tokens"]


def test_a_task_that_exists_keeps_what_it_has(distil, pairs_folder, tmp_path, layout):
    shutil.copytree(pairs_folder / "law", tmp_path / "law")
    before = PromptCheckpointDataset.from_folder(tmp_path)
    distil()
    after = PromptCheckpointDataset.from_folder(tmp_path)
    assert after.prompts("law") == before.prompts("law")
    assert after.checkpoints("law") == before.checkpoints("law")
    assert before.distillation("law") is None and after.distillation("law") is not None
    with pytest.raises(PairsFolderError, match="has prompts of its own"):
        distil(prompts=["other"], overwrite=True)


def test_a_killed_pass_goes_on_and_gives_the_same_bytes(distil, tmp_path, monkeypatch):
    whole = (distil("whole") / ROWS_NAME).read_bytes()
    add, calls = teacher_module.DistillationWriter.add, []

    def killed(self, rows):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(add(self, rows))

    with monkeypatch.context() as patch:
        patch.setattr(teacher_module.DistillationWriter, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            distil()
    folder = tmp_path / "law"
    assert load_distillation(folder) is None and not (folder / ROWS_NAME).exists()
    with pytest.raises(PairsFolderError, match="incomplete"):
        PromptCheckpointDataset.from_folder(tmp_path, ["law"])
    with (folder / PARTIAL_NAME).open("a") as file:
        file.write('{"input_ids":[1,')  # as a kill in the middle of a line leaves it
    rows = teacher_module._Answering.rows
    asked = []
    monkeypatch.setattr(teacher_module._Answering, "rows", lambda self, w, i: asked.extend(i) or rows(self, w, i))
    distil()
    assert (folder / ROWS_NAME).read_bytes() == whole
    assert asked == INPUTS[2:]
    asked.clear()
    distil()
    assert not asked


def test_batches_of_any_size_say_the_same(distil, base_model, word_tokenizer, tmp_path):
    one = rows_of(distil("one"))
    distil_task(
        tmp_path / "five", INPUTS, teacher=base_model, tokenizer=word_tokenizer, context=CONTEXT, max_new_tokens=4,
        top_tokens=3, rows_at_once=5, apply_chat_template=False,
    )  # fmt: skip
    for first, second in zip(one, rows_of(tmp_path / "five"), strict=True):
        assert first["input_ids"] == second["input_ids"] and first["top_tokens"] == second["top_tokens"]


def test_another_teacher_or_other_inputs_are_refused_and_overwritten_when_asked(distil, base_model, fresh_base):
    folder = distil()
    other = fresh_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.5)
    adapted = get_peft_model(fresh_base(), copy.deepcopy(LORA_CONFIG))
    before = (folder / ROWS_NAME).read_bytes()
    for changed, message in (
        ({"teacher": other}, "another base"),
        ({"teacher": adapted}, "another adapter"),
        ({"inputs": INPUTS[::-1]}, "windows was"),
        ({"context": "please . "}, "windows was"),
        ({"max_new_tokens": 3}, "max_new_tokens was 4 and is 3"),
    ):
        with pytest.raises(PairsFolderError, match=message):
            distil(**changed)
    assert (folder / ROWS_NAME).read_bytes() == before
    distil(inputs=INPUTS[:2], overwrite=True)
    assert rows_of(folder) == [json.loads(line) for line in before.decode().splitlines()[:2]]


def test_a_teacher_may_carry_an_adapter(distil, trained_like, base_model):
    teacher = trained_like()
    folder = distil(teacher=teacher)
    record = json.loads((folder / RECORD_NAME).read_text())
    assert record["teacher"]["base"] == base_digest(base_model) and record["teacher"]["adapter"]
    assert rows_of(folder) != rows_of(distil("plain"))


def test_the_digest_is_of_the_base_in_any_dtype(base_model, fresh_base, trained_like):
    assert base_digest(fresh_base().to(torch.bfloat16).float()) == base_digest(base_model)
    assert base_digest(trained_like()) == base_digest(base_model)
    changed = fresh_base()
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.1)
    assert base_digest(changed) != base_digest(base_model)


def test_chat_models_are_asked_in_their_template_unless_it_is_declined(distil, word_tokenizer):
    asked = word_tokenizer(f"{INPUTS[0]} . answer")["input_ids"]
    for folder, apply in (("as asked", True), ("by default", None)):
        row = rows_of(distil(folder, apply_chat_template=apply))[0]
        assert row["input_ids"][: len(asked)] == asked
    plain = copy.deepcopy(word_tokenizer)
    plain.chat_template = None
    for folder, options in (("declined", {"apply_chat_template": False}), ("plain", {"tokenizer": plain})):
        row = rows_of(distil(folder, **{"apply_chat_template": None, **options}))[0]
        assert row["input_ids"][: len(asked)] != asked
    with pytest.raises(GeneratorConfigError, match=r"apply_chat_template=True .* has no chat template"):
        distil("none", tokenizer=plain, apply_chat_template=True)


def test_an_answer_ends_with_what_brings_the_stop(distil, fresh_base, word_tokenizer):
    teacher = fresh_base()
    teacher.lm_head = nn.Linear(24, 50, bias=False)  # one tied to the embedding repeats what it reads
    nn.init.normal_(teacher.lm_head.weight, generator=torch.Generator().manual_seed(0))
    free = [[label for label in row["labels"] if label >= 0] for row in rows_of(distil(teacher=teacher))]
    answer = next(answer for answer in free if answer[1] != answer[0])
    stop = word_tokenizer.decode([answer[1]])
    options = {"teacher": teacher, "inputs": [INPUTS[free.index(answer)]], "stop": stop}
    (stopped,) = rows_of(distil("stopped", **options))
    assert [label for label in stopped["labels"] if label >= 0] == answer[:2]


def test_an_empty_answer_is_named(distil, fresh_base):
    silent = fresh_base()
    silent.generation_config.eos_token_id = list(range(50))
    with pytest.raises(PairsFolderError, match=r"answers 'what is the law \?' with nothing"):
        distil(teacher=silent)


def test_a_context_longer_than_the_window_is_named(distil, tmp_path):
    contexts = [CONTEXT] * 4 + ["please " * 80]
    with pytest.raises(PromptError, match=r"Input 4 takes 86 tokens .* window of 64"):
        distil(context=contexts)
    assert not (tmp_path / "law").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": [CONTEXT]}, PromptError, "5 inputs, but 1 contexts"),
        ({"context": None}, PromptTypeError, "context must be a text, or a list"),
        (
            {"teacher": "org/base"},
            GeneratorConfigError,
            "teacher must be loaded.*AutoModelForCausalLM.from_pretrained",
        ),
        ({"tokenizer": Path("x")}, GeneratorConfigError, r"tokenizer must be loaded.*AutoTokenizer"),
        ({"max_new_tokens": 0}, GeneratorConfigError, "max_new_tokens must be a positive integer"),
        ({"inputs": []}, PromptError, "inputs"),
        ({"inputs": ["a", " "]}, PromptError, "inputs"),
    ],
)
def test_impossible_settings_are_refused(distil, options, error, message):
    with pytest.raises(error, match=message):
        distil(**options)


def test_damaged_rows_are_found(distil, tmp_path, layout):
    folder = distil()
    lines = (folder / ROWS_NAME).read_text().splitlines(keepends=True)
    (folder / ROWS_NAME).write_text("".join(lines[:-1]))
    with pytest.raises(CorruptFileError, match=r"holds 4 rows, but distillation\.json says 5"):
        PromptCheckpointDataset.from_folder(tmp_path, layout=layout)
    (folder / RECORD_NAME).write_text('{"format_version": 1}')
    with pytest.raises(CorruptFileError, match="does not describe"):
        PromptCheckpointDataset.from_folder(tmp_path, layout=layout)


def test_a_batch_has_the_top_tokens_of_its_labelled_positions(distil):
    rows = rows_of(distil())[:3]
    batch = DistillationCollator(pad_token_id=1)(rows)
    assert batch["top_tokens"].shape == batch["top_log_probs"].shape == (int((batch["labels"] >= 0).sum()), 3)
    assert batch["top_tokens"][:, 0].tolist() == batch["labels"][batch["labels"] >= 0].tolist()  # it was greedy
    del rows[0]["top_tokens"][0]
    with pytest.raises(PairsFolderError, match="answer tokens, but"):
        DistillationCollator()(rows)


def test_what_is_refused_leaves_an_unfinished_task_as_it_was(distil, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module.DistillationWriter, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distil()
    before = {path.name: path.read_bytes() for path in (tmp_path / "law").iterdir()}
    with pytest.raises(PairsFolderError, match="windows was"):
        distil(inputs=INPUTS[::-1])
    assert {path.name: path.read_bytes() for path in (tmp_path / "law").iterdir()} == before


def test_a_pass_killed_before_its_last_record_keeps_its_rows(distil, tmp_path, monkeypatch):
    folder = distil()
    whole = (folder / ROWS_NAME).read_bytes()
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps({**record, "complete": False}))
    monkeypatch.setattr(teacher_module._Answering, "rows", lambda *_: pytest.fail("the teacher was asked again"))
    distil()
    assert (folder / ROWS_NAME).read_bytes() == whole and load_distillation(folder) is not None
