# SPDX-License-Identifier: Apache-2.0
"""Prompts in the shapes in which people have them: the same strings come out, and what holds no prompt is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from peft_dnd import DnDConfig, PromptConditionedLoraGenerator
from peft_dnd.cli.app import main
from peft_dnd.errors import PromptError, PromptTypeError
from peft_dnd.pairs import PairWriter
from peft_dnd.text import condition_texts, prompt_texts
from peft_dnd.text.prompts import check_prompts, prompts_digest


TEXTS = ("what is the law ?", "a court please")


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def chats(**more: Any) -> list[list[dict[str, Any]]]:
    return [[user(text) | more] for text in TEXTS]


def shapes() -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    rows = [{"prompt": text} for text in TEXTS]
    chat_rows = [{"prompt": chat} for chat in chats()]
    array = np.empty(2, dtype=object)
    array[:] = [np.array(chat, dtype=object) for chat in chats()]  # as a table read from Parquet has them
    return {
        "conversations": chats(),
        "with other fields": chats(name="me"),
        "in parts": [[user([{"type": "text", "text": text}])] for text in TEXTS],
        "rows": rows,
        "rows of conversations": chat_rows,
        "column": datasets.Dataset.from_list(rows)["prompt"],
        "data set": datasets.Dataset.from_list(rows),
        "prompt-only data set": datasets.Dataset.from_list(chat_rows),
        "with more columns": datasets.Dataset.from_list([row | {"answer": "x"} for row in chat_rows]),
        "array": np.array(TEXTS),
        "array of conversations": array,
        "series": pandas.Series(TEXTS, index=[5, 3]),
        "series of conversations": pandas.Series(array, index=[5, 3]),
        "frame": pandas.DataFrame(rows, index=[5, 3]),
        "frame of conversations": pandas.DataFrame({"prompt": array, "n": [1, 2]}),
    }


SHAPES = [
    "conversations", "with other fields", "in parts", "rows", "rows of conversations", "column", "data set",
    "prompt-only data set", "with more columns", "array", "array of conversations", "series",
    "series of conversations", "frame", "frame of conversations",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_come_to_the_same_strings(shape: str) -> None:
    found = check_prompts(shapes()[shape])
    assert found == TEXTS
    assert {type(text) for text in found} == {str}


def test_a_generator_takes_them_all(
    generator: PromptConditionedLoraGenerator, generator_folder: Path, layout: Any, tmp_path: Path
) -> None:
    expected = generator.generate_adapter(list(TEXTS))
    for shape in shapes().values():
        assert generator.generate_adapter(shape).provenance == expected.provenance
    several = generator.generate_adapters({"law": shapes()["data set"], "court": chats()})
    assert {found.provenance["prompts_sha256"] for found in several.values()} == {prompts_digest(TEXTS)}
    assert DnDConfig(generator=generator_folder, prompts=chats()).prompts == list(TEXTS)
    assert PairWriter(tmp_path / "law", shapes()["prompt-only data set"], layout).prompts == TEXTS


def test_messages_of_a_conversation_are_joined() -> None:
    chat = [
        {"role": "system", "content": "be brief"},
        user("hi"),
        {"role": "assistant", "content": "hello"},
        user("why ?"),
    ]
    assert prompt_texts([chat, "plain"]) == ("be brief\nhi\nhello\nwhy ?", "plain")
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    assert prompt_texts([[user("hi"), calls, {"role": "tool", "content": "42"}]]) == ("hi\n42",)


def test_a_column_of_another_name() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"question": text, "prompt": "no"} for text in TEXTS]
    assert prompt_texts(rows, column="question") == TEXTS
    assert prompt_texts(datasets.Dataset.from_list(rows), column="question") == TEXTS
    with pytest.raises(PromptTypeError, match=r"no column 'questoin'; it has .*Did you mean 'question'"):
        prompt_texts(datasets.Dataset.from_list(rows), column="questoin")
    with pytest.raises(PromptTypeError, match=r"no column 'prompt'; it has 'question'.*prompts=data\["):
        check_prompts(datasets.Dataset.from_dict({"question": list(TEXTS)}))
    with pytest.raises(PromptTypeError, match=r"prompts\[0\] must be a string, not dict.*name the field"):
        check_prompts([{"question": "x"}])


def test_a_chat_template_when_asked(word_tokenizer: PreTrainedTokenizerFast) -> None:
    word_tokenizer = copy.deepcopy(word_tokenizer)
    expected = tuple(f"{text} . answer" for text in TEXTS)
    assert prompt_texts(chats(), tokenizer=word_tokenizer) == expected
    assert prompt_texts(TEXTS, tokenizer=word_tokenizer) == expected
    word_tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(PromptError, match="no system here"):
        prompt_texts(chats(), tokenizer=word_tokenizer)
    word_tokenizer.chat_template = None
    with pytest.raises(PromptError, match="leave the tokenizer out"):
        prompt_texts(chats(), tokenizer=word_tokenizer)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([user("hi")], PromptTypeError, r"prompts\[0\] must be a string, not dict .*A chat message alone"),
        ([[user("hi"), {"role": "assistant", "content": "x"}]], PromptError, r"prompts\[0\] ends with the assistant"),
        ([[user([{"type": "image", "url": "x"}])]], PromptError, r"prompts\[0\]\[0\] holds other things .*'image'"),
        ([[user("hi"), "there"]], PromptTypeError, r"prompts\[0\]\[1\] is no chat message"),
        ([[{"content": "hi"}]], PromptTypeError, "is no chat message"),
        ([[user(" ")]], PromptError, r"prompts\[0\] is only white space"),
        ([[]], PromptTypeError, "must be a string, not list"),
        ([{"prompt": 3}], PromptTypeError, r"prompts\[0\] must be a string, not int"),
    ],
)
def test_what_holds_no_prompt(prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_prompts(prompts)


def test_answers_may_be_the_assistants() -> None:
    answers = [[{"role": "assistant", "content": "yes"}], "no"]
    assert condition_texts(chats(), answers, "answers") == ("yes", "no")


def test_on_the_command_line(
    generator_folder: Path,
    word_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": chat}) for chat in chats()), encoding="utf-8")
    assert main(["generate", str(generator_folder), str(file), str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["prompts_sha256"] == prompts_digest(TEXTS)
    word_tokenizer.save_pretrained(tmp_path / "base")
    template = ["--chat-template", str(tmp_path / "base"), "--json"]
    assert main(["generate", str(generator_folder), str(file), str(tmp_path / "adapter"), *template]) == 0
    expected = prompts_digest([f"{text} . answer" for text in TEXTS])
    assert json.loads(capsys.readouterr().out)["provenance"]["prompts_sha256"] == expected
    file.write_text(json.dumps({"prompt": [*chats()[0], {"role": "assistant", "content": "x"}]}), encoding="utf-8")
    assert main(["generate", str(generator_folder), str(file), str(tmp_path / "adapter")]) == 1
    assert "'prompt' in row 1" in (told := capsys.readouterr().err) and "ends with the assistant" in told
