# SPDX-License-Identifier: Apache-2.0
"""From seeds to prompts and tasks: what is asked, what passes, who answers, and going on after a pass was cut off."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import PromptCheckpointDataset
from peft_dnd.errors import (
    CorruptFileError,
    GeneratorConfigError,
    PairsFolderError,
    PromptError,
    PromptTypeError,
    SynthesisError,
)
from peft_dnd.pairs.folder import read_task
from peft_dnd.synthesis import (
    AnswerAsked,
    ModelWriter,
    PromptFilter,
    SynthesisSettings,
    TaskSeeds,
    Written,
    synthesize_prompts,
    synthesize_task,
)
from peft_dnd.synthesis.answers import answers_to
from peft_dnd.synthesis.filtering import nearness
from peft_dnd.synthesis.wording import context_for_answers, end_of_list, prompts_in, request_for_prompts


SEEDS = TaskSeeds(
    ("what is the law of w1 ?", "what is the law of w2 ?", "which law has w3 ?", "say the law of w4 please ?"),
    answers=("court", "court", "judge", "court"),
)


class BagOfWords:
    """An encoder that counts words."""

    sentence_embedding_size = 256

    def encode_tokens(self, prompts: Sequence[str]) -> Any:
        raise AssertionError("nobody asks for it")

    def encode_sentences(self, prompts: Sequence[str]) -> torch.Tensor:
        found = torch.zeros(len(prompts), self.sentence_embedding_size)
        for row, prompt in zip(found, prompts, strict=True):
            for word in prompt.split():
                row[zlib.crc32(word.encode()) % len(row)] += 1.0
        return found


class Script:
    """A writer that has its answers at hand: of requests for prompts, each round a list; of others, by the prompt."""

    def __init__(self, *rounds: Sequence[str], answers: Any = None, chats: bool = False) -> None:
        self.name, self.chats = "script", chats
        self.rounds, self.answers = list(rounds), answers or (lambda prompt, draw: "court")
        self.asked: list[tuple[str, int]] = []

    def write(self, texts: Sequence[str], *, temperature: float = 0.0, seed: int = 0, **_: Any) -> list[Written]:
        self.asked += [(text, seed) for text in texts]
        if not texts[0].rstrip().endswith("."):  # a request for prompts ends in the next number
            prompts = [text.strip().splitlines()[-1] for text in texts]
            return [Written(self.answers(prompt, place), True) for place, prompt in enumerate(prompts)]
        lines = self.rounds.pop(0) if self.rounds else []
        count = len(texts[0].splitlines())
        text = " " + "\n".join(lines[:1] + [f"{count + place}. {line}" for place, line in enumerate(lines[1:], 1)])
        return [Written(text + "\n", True), *(Written("", True) for _ in texts[1:])]


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def of_task(*numbers: int) -> list[str]:
    return [f"what is the law of w{number} ?" for number in numbers]


def test_what_is_not_of_the_task_or_not_new_is_left_out_and_it_is_said_why() -> None:
    passing = PromptFilter(BagOfWords(), SEEDS.prompts, others={"tax": ["what is the tax of w1 ?"]})
    verdicts = passing(
        [
            "what is the law of w5 ?",
            "What is  the law of w5 ?",  # but for case and white space
            "the what is law of w5 ?",  # the same words
            "the law ?" + " of w6" * 60,
            "how many rivers are there in europe",
            "what is the tax of w4 ?",
            "which law of w7 ?",
        ]
    )
    assert verdicts == [
        None,
        "repeated",
        "near-duplicate",
        "unusual length",
        "unlike the seeds",
        "nearer to another task",
        None,
    ]
    assert passing(["which law of w7 ?"]) == ["repeated"], "what passed is known from then on"
    likeness = passing.likeness(["what is the law of w5 ?", "how many rivers"])
    assert likeness[0] > passing.least_likeness > likeness[1]


def test_bounds_of_the_filter_are_the_users_where_they_give_any() -> None:
    assert PromptFilter(BagOfWords(), SEEDS.prompts[:2]).least_likeness is None, "two seeds say nothing of their kind"
    wide = PromptFilter(BagOfWords(), SEEDS.prompts, closest=1.0, least_likeness=-1.0)
    assert (
        wide(["the what is law of w1 ?", "rivers flow down"]) == ["near-duplicate", None] or wide.least_likeness == -1
    )
    with pytest.raises(GeneratorConfigError, match="closest"):
        PromptFilter(BagOfWords(), SEEDS.prompts, closest=95)
    for wrong in ({"closest": 95}, {"least_likeness": "high"}, {"temperature": "hot"}, {"temperature": 0}):
        with pytest.raises(GeneratorConfigError, match=next(iter(wrong))):
            SynthesisSettings(**wrong)
    with pytest.raises(GeneratorConfigError, match="others must be a dictionary"):
        SynthesisSettings(others=["what is the tax ?"])
    assert nearness(BagOfWords(), ["a b", "a b", "c d"]) == pytest.approx(1.0)
    assert nearness(BagOfWords(), ["a"]) is None


def test_a_list_is_read_up_to_where_the_writer_went_on_with_something_else_or_had_to_stop() -> None:
    shown = ["one ?", "two ?"]
    assert (
        request_for_prompts(TaskSeeds(("x",), "Do it."), shown, 9, chats=False) == "Do it.\n\n1. one ?\n2. two ?\n3."
    )
    text = ' three ?\n4. "four ?"\n5. fi'
    assert prompts_in(Written(text, False), shown, chats=False) == ["three ?", "four ?"]
    assert prompts_in(Written(text + "ve ?\n\nAnswers:\n1. no", True), shown, chats=False)[-1] == "five ?"
    chatty = "Sure, here they are:\n\n1) three ?\n2) **four** ?\n\nHope that helps."
    assert prompts_in(Written(chatty, True), shown, chats=True) == ["three ?", "**four** ?"]
    long = ["first line\nsecond", "other"]
    assert prompts_in(Written("a\nb\n---\nc\n---\nd", False), long, chats=False) == ["a\nb", "c"]
    assert end_of_list(shown, chats=False) == "\n\n" and end_of_list(long, chats=False) is None
    asked = request_for_prompts(TaskSeeds((), "Do it."), [], 9, chats=True)
    assert "Do it." in asked and "9 more" in asked


def test_whoever_answers_has_the_description_and_the_solved_seeds_in_the_window() -> None:
    known = TaskSeeds(("a ?", "b ?", "a ?"), "Say it.", ("x", "y", "z"))
    assert known.prompts == ("a ?", "b ?") and known.answers == ("x", "y")
    assert context_for_answers(known, chats=False) == "Say it.\n\na ?\nx\n\nb ?\ny\n\n"
    assert "Request: b ?\nAnswer: y" in context_for_answers(known, chats=True)
    for wrong in ({}, {"prompts": ("a",), "answers": ("x", "y")}, {"prompts": ("",)}):
        with pytest.raises(PromptError):
            TaskSeeds(**wrong)


def test_prompts_whose_drawn_answers_differ_are_left_out() -> None:
    votes = {"one ?": ["a", "b", "a"], "two ?": ["a", "b", "c"], "three ?": ["", "", ""]}
    writer = Script(answers=lambda prompt, place: votes[prompt][place % 3])
    found = answers_to(list(votes), SEEDS, writer, AnswerAsked(votes=3), seed=0)
    assert found == [("a", None), (None, "answers differ"), (None, "not answered")]
    with pytest.raises(GeneratorConfigError):
        AnswerAsked(votes=0)


def test_prompts_and_answers_become_a_file_that_collect_takes(tmp_path: Path) -> None:
    file = tmp_path / "law.jsonl"
    answers = {"what is the law of w6 ?": ""}
    writer = Script(of_task(5, 6, 5), of_task(7, 8), answers=lambda prompt, _: answers.get(prompt, "judge"))
    done = synthesize_prompts(file, SEEDS, writer=writer, text_encoder=BagOfWords(), count=3, answerer=writer)
    assert done.prompts == tuple(of_task(5, 7, 8)) and done.complete
    assert done.left_out == {"repeated": 1, "not answered": 1} and done.rounds == 2
    rows = rows_of(file)
    assert rows[:1] == [{"prompt": SEEDS.prompts[0], "answer": "court"}] and len(rows) == 7
    assert rows[-1] == {"prompt": "what is the law of w8 ?", "answer": "judge"}
    again = Script()
    assert synthesize_prompts(file, SEEDS, writer=again, text_encoder=BagOfWords(), count=3, answerer=again) == done
    assert not again.asked, "what is complete is not asked for again"
    with pytest.raises(PairsFolderError, match="count was 3 and is 4"):
        synthesize_prompts(file, SEEDS, writer=again, text_encoder=BagOfWords(), count=4, answerer=again)
    other = synthesize_prompts(
        file, SEEDS, writer=Script(of_task(9)), text_encoder=BagOfWords(), count=1, overwrite=True
    )
    assert other.answers is None and rows_of(file)[-1] == {"prompt": "what is the law of w9 ?"}


def test_a_pass_that_was_cut_off_comes_to_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    rounds = [of_task(5, 6), of_task(6, 7), of_task(5, 8, 9)]
    whole = Script(*rounds)
    expected = synthesize_prompts(tmp_path / "whole.jsonl", SEEDS, writer=whole, text_encoder=BagOfWords(), count=5)

    class Broken(Script):
        def write(self, texts: Sequence[str], **how: Any) -> list[Written]:
            if len(self.rounds) == 1:
                raise KeyboardInterrupt
            return super().write(texts, **how)

    file, first = tmp_path / "cut.jsonl", Broken(*rounds)
    with pytest.raises(KeyboardInterrupt):
        synthesize_prompts(file, SEEDS, writer=first, text_encoder=BagOfWords(), count=5)
    record = tmp_path / "cut.synthesis.jsonl"
    assert not file.exists() and len(record.read_bytes().splitlines()) == 3
    with record.open("ab") as stream:
        stream.write(b'{"kept": [{"prom')  # killed within a line
    rest = Script(rounds[2])
    assert synthesize_prompts(file, SEEDS, writer=rest, text_encoder=BagOfWords(), count=5) == expected
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert first.asked + rest.asked == whole.asked, "the same is shown, and drawn by the same seeds"


def test_what_is_there_of_others_is_left_as_it_is(tmp_path: Path) -> None:
    file, record = tmp_path / "law.jsonl", tmp_path / "law.synthesis.jsonl"
    file.write_text("mine", encoding="utf-8")
    for wanted in ("law.jsonl", "law.txt"):
        with pytest.raises((PairsFolderError, GeneratorConfigError)):
            synthesize_prompts(tmp_path / wanted, SEEDS, writer=Script(), text_encoder=BagOfWords())
    record.write_text("mine\nhalf", encoding="utf-8")
    with pytest.raises(CorruptFileError, match="no record of a synthesis"):
        synthesize_prompts(file, SEEDS, writer=Script(), text_encoder=BagOfWords(), overwrite=True)
    assert file.read_text(encoding="utf-8") == "mine" and record.read_text(encoding="utf-8") == "mine\nhalf"


def test_seeds_alone_are_to_be_put_into_what_is_known_of_a_task(tmp_path: Path, base_model, word_tokenizer) -> None:
    with pytest.raises(PromptTypeError, match=r"must be TaskSeeds, got a tuple.*TaskSeeds\(prompts"):
        synthesize_prompts(tmp_path / "a.jsonl", SEEDS.prompts, writer=Script(), text_encoder=BagOfWords())
    with pytest.raises(PromptTypeError, match="must be TaskSeeds"):
        synthesize_task(
            tmp_path / "a", SEEDS.prompts, teacher=base_model, tokenizer=word_tokenizer, text_encoder=BagOfWords()
        )


def test_a_writer_that_gives_nothing_is_given_up_with_the_reasons_and_tried_again_on_another_call(
    tmp_path: Path,
) -> None:
    file = tmp_path / "law.jsonl"
    writer = Script(of_task(5), *[["how many rivers are there in europe"]] * 20)
    with pytest.raises(SynthesisError, match=r"1 of 2 prompts .*8 unlike the seeds"):
        synthesize_prompts(file, SEEDS, writer=writer, text_encoder=BagOfWords(), count=2)
    assert not file.exists()
    done = synthesize_prompts(file, SEEDS, writer=Script(of_task(6)), text_encoder=BagOfWords(), count=2)
    assert done.prompts == tuple(of_task(5, 6)) and done.rounds == 10


def test_a_whole_task_of_seeds_whose_answers_are_the_bases_own(
    tmp_path: Path, base_model: nn.Module, word_tokenizer: PreTrainedTokenizerFast, layout: Any
) -> None:
    # The base's vocabulary is closed, and it answers with any of its words.
    folder = tmp_path / "pairs" / "law"
    options: dict[str, Any] = {
        "teacher": base_model,
        "tokenizer": word_tokenizer,
        "text_encoder": BagOfWords(),
        "apply_chat_template": False,
        "count": 3,
        "asked": AnswerAsked(max_new_tokens=3, stop=" "),
        "top_tokens": 2,
    }

    class Broken(Script):
        def write(self, texts: Sequence[str], **how: Any) -> list[Written]:
            if not self.rounds:
                raise KeyboardInterrupt
            return super().write(texts, **how)

    with pytest.raises(KeyboardInterrupt):
        synthesize_task(folder, SEEDS, writer=Broken(of_task(5, 6)), **options)
    assert not read_task(folder).complete
    with pytest.raises(PairsFolderError, match="incomplete"):
        PromptCheckpointDataset.from_folder(folder.parent, layout=layout)
    done = synthesize_task(folder, SEEDS, writer=Script(of_task(7, 8)), **options)
    assert done.prompts == tuple(of_task(5, 6, 7))
    pairs = PromptCheckpointDataset.from_folder(folder.parent, layout=layout)
    assert pairs.prompts("law") == (*SEEDS.prompts, *done.prompts)
    row = pairs.distillation("law")[4]
    asked = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert asked == word_tokenizer(done.prompts[0] + "\n")["input_ids"], "the student sees the prompt alone"
    assert synthesize_task(folder, SEEDS, writer=Script(), **options) == done
    with pytest.raises(PairsFolderError, match="another request"):
        synthesize_task(folder, SEEDS, writer=Script(), **{**options, "count": 2})
    with pytest.raises(SynthesisError, match="nothing in its window"):
        synthesize_task(tmp_path / "x", TaskSeeds(("a ?",)), writer=Script(), **options)
    assert not (tmp_path / "x").exists()
    shorter = {**options, "count": 1, "overwrite": True}
    with pytest.raises(KeyboardInterrupt):
        synthesize_task(folder, SEEDS, writer=Broken(), **shorter)
    assert not read_task(folder).complete, "from here on it is the new request's, and goes on without being told"
    shorter["overwrite"] = False
    assert synthesize_task(folder, SEEDS, writer=Script(of_task(9)), **shorter).prompts == tuple(of_task(9))
    assert len(PromptCheckpointDataset.from_folder(folder.parent, layout=layout).prompts("law")) == 5


def test_a_task_that_was_collected_is_not_replaced(
    tmp_path: Path, pairs_folder: Path, base_model: nn.Module, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(PairsFolderError, match="not made by a synthesis"):
        synthesize_task(
            pairs_folder / "law",
            SEEDS,
            teacher=base_model,
            tokenizer=word_tokenizer,
            text_encoder=BagOfWords(),
            overwrite=True,
        )


def test_a_model_writes_the_same_with_the_same_seed_and_leaves_the_drawing_of_others_alone(
    base_model: nn.Module, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    writer = ModelWriter(base_model, word_tokenizer, apply_chat_template=False, rows_at_once=2)
    state = torch.get_rng_state()
    how: dict[str, Any] = {"max_new_tokens": 4, "temperature": 2.0}
    first, other = (writer.write(["what is law", "a", "the court"], seed=seed, **how) for seed in (1, 2))
    assert first == writer.write(["what is law", "a", "the court"], seed=1, **how) != other
    assert torch.equal(torch.get_rng_state(), state)
    (greedy,) = writer.write(["what is law"], max_new_tokens=3)
    ids = torch.tensor([word_tokenizer("what is law")["input_ids"]])
    with torch.no_grad():
        expected = base_model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=2)
    assert greedy.text == word_tokenizer.decode(expected[0, 3:], skip_special_tokens=True)
    with pytest.raises(PromptError, match="window of 64"):
        writer.write(["law " * 63], max_new_tokens=4)
    assert ModelWriter(base_model, word_tokenizer).chats, "its tokenizer has a chat template"
