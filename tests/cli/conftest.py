# SPDX-License-Identifier: Apache-2.0
"""A base with its tokenizer on disk, tasks as files, and a way to run the command."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.constants import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from peft_dnd.cli.app import main


class Ran(NamedTuple):
    """What a run of the command came to."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict:
        """Standard output as the one JSON object that it must be."""
        return json.loads(self.out)


Run = Callable[..., Ran]
QUESTIONS = ("law", "tax", "medicine", "river", "capital", "a")
ANSWERS = {"law": "court", "med": "doctor", "geo": "river", "art": "colour"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def base_folder(base_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base and a tokenizer of whole words, as they would lie on disk."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    base_model.save_pretrained(folder)
    words = ["<unk>", "<pad>", "</s>", *WORDS, *(f"w{number}" for number in range(50 - 3 - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of questions and answers for each of four tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, answer in ANSWERS.items():
        lines = [json.dumps({"prompt": f"what {answer} is {word} ?", "answer": answer}) for word in QUESTIONS]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def collected(base_folder: Path, task_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pairs folder that `collect` made of them, of three checkpoints a task."""
    pairs = tmp_path_factory.mktemp("collected") / "pairs"
    files = [option for task in ANSWERS for option in ("--task", f"{task}={task_files / task}.jsonl")]
    options = ["--max-steps", "4", "--last", "3", "--learning-rate", "1e-2", "--rank", "2", "--device", "cpu", "-q"]
    assert main(["collect", "--base", str(base_folder), "-o", str(pairs), *files, *options]) == 0
    return pairs


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Takes away the handlers that a service has put in, once the test is over."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.basicConfig(handlers=handlers, level=level, force=True)
    logging.captureWarnings(False)
    transformers_logging.enable_default_handler()
    transformers_logging.disable_propagation()
