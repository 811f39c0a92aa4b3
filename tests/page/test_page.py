# SPDX-License-Identifier: Apache-2.0
"""The page as programs call it: what is asked for is done or refused in words, and visitors are kept apart."""

from __future__ import annotations

import copy
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.constants import TASK_PROMPTS

from peft_dnd.cli.app import main
from peft_dnd.cli.demo import page_of, read_file
from peft_dnd.errors import GeneratorConfigError, PromptError
from peft_dnd.page import ChatBase, MadeAdapter, PageGenerator, PageLimits, PromptPage
from peft_dnd.page.kept import KeptAdapters


GIVEN = TASK_PROMPTS["med"]
SECRET = "capital"
LIMITS = PageLimits(upload_bytes=2000, uploads=12, adapters=6, prompts=20, prompt_characters=200, answer_tokens=4)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    def call(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        read = capsys.readouterr()
        return SimpleNamespace(code=code, out=read.out, err=read.err)

    return call


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_file_is_read_as_generate_reads_it_and_its_place_is_not_told(tmp_path: Path) -> None:
    rows = '{"question": "a court", "answer": "law"}\n{"question": "the river", "answer": "of"}\n'
    good = Path(write(tmp_path, "good.jsonl", rows))
    assert read_file(good, "question", False) == (["a court", "the river"], None)
    assert read_file(good, "question", True) == (["a court", "the river"], ["law", "of"])
    for name, content, message in (
        ("picture.png", b"\x89PNG\r\n\x1a\n\xff", "is not in UTF-8"),
        ("empty.txt", "", "is empty"),
        ("other.csv", "number\n1\n", "has no 'question'"),
        ("broken.jsonl", "{", "Line 1 of"),
        ("large.parquet", b"PAR1", "takes no Parquet files"),
        ("wrong.json", "[1", "is not readable JSON"),
    ):
        with pytest.raises(PromptError, match=message) as caught:
            read_file(Path(write(tmp_path, name, content)), "question", False)
        assert str(tmp_path) not in str(caught.value)


def test_the_verb_names_what_is_wrong(run, generator_folder: Path, tmp_path: Path) -> None:
    assert run("demo").code == 2
    ran = run("demo", generator_folder, "--prot", "80")
    assert ran.code == 2 and "--port" in ran.err
    pytest.importorskip("gradio")
    ran = run("demo", f"{generator_folder}x")
    assert ran.code == 1 and f"{generator_folder}x" in ran.err and "Traceback" not in ran.err
    ran = run("demo", generator_folder, "--base", tmp_path / "nowhere")
    assert ran.code == 1 and "There is no base model" in ran.err and "nowhere" in ran.err


def test_a_page_has_generators_of_different_names(generator, generator_folder: Path) -> None:
    one = PageGenerator("small", generator)
    for wrong in ([], [one, one]):
        with pytest.raises(GeneratorConfigError, match="one or more generators of different names"):
            PromptPage(wrong, read_file)
    pytest.importorskip("gradio")
    page = page_of([str(generator_folder), str(generator_folder)], prompts=7)
    assert page.limits.prompts == 7 and list(page._generators) == ["/".join(generator_folder.parts[-2:])]
    page.close()


def test_without_gradio_the_verb_says_what_to_install(run, generator_folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    ran = run("demo", generator_folder)
    assert ran.code == 1 and 'pip install "peft-dnd[page]"' in ran.err


@pytest.fixture(scope="module")
def served(generator, base_model, word_tokenizer) -> Iterator[SimpleNamespace]:
    """A page that is being served, and a way to be one of its visitors."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    knowing = copy.deepcopy(generator)
    knowing.fit_out_of_distribution({name: list(prompts) for name, prompts in TASK_PROMPTS.items()})
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = None
    base = ChatBase(copy.deepcopy(base_model), tokenizer)
    page = PromptPage([PageGenerator("small", knowing, base), PageGenerator("no base", generator)], read_file, LIMITS)
    address = page.launch(wait=False)
    yield SimpleNamespace(page=page, base=base, address=address, visitor=lambda: Client(address, verbose=False))
    page.close()
    assert not Path(page._folder.name).exists()


def make(visitor: Any, pasted: str = "", file: str | None = None, *, generator: str = "small", column: str = "prompt"):
    from gradio_client import handle_file

    dropped = None if file is None else handle_file(file)
    found = visitor.predict(generator, pasted, dropped, column, 0, api_name="/make")
    return SimpleNamespace(facts=found[0], archive=found[3]["value"], files=found[4]["value"], all=found)


def test_what_is_made_is_what_the_generator_makes(served, generator, tmp_path: Path) -> None:
    visitor = served.visitor()
    rows = "".join(f'{{"prompt": "{prompt}"}}\n' for prompt in GIVEN)
    expected = generator.generate_adapter(GIVEN).state_dict()
    for made in (make(visitor, "\n".join(GIVEN)), make(visitor, file=write(tmp_path, "med.jsonl", rows))):
        config, weights = made.files
        assert Path(config).name == "adapter_config.json"
        found = load_file(weights)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert "from 4 prompts" in made.facts and Path(made.archive).suffix == ".zip"


def test_two_visitors_see_their_own_adapters(served, generator) -> None:
    first, second = served.visitor(), served.visitor()
    mine = make(first, "\n".join(GIVEN))
    other = make(second, "\n".join(TASK_PROMPTS["art"]))
    assert mine.facts != other.facts
    for visitor, prompts in ((first, GIVEN), (second, TASK_PROMPTS["art"]), (first, GIVEN)):
        alone, adapted, _ = visitor.predict("the river", api_name="/ask")
        answer = served.base.answer("the river", adapter=generator.generate_adapter(prompts), most_tokens=4)
        assert adapted[-1]["content"][0]["text"] == answer
        assert alone[-1]["content"][0]["text"] == served.base.answer("the river", most_tokens=4)
    assert len(first.predict("a court", api_name="/ask")[0]) == 6, "three questions, three answers"
    assert len(second.predict("a court", api_name="/ask")[0]) == 4


def test_what_is_refused_is_told_and_nothing_is_left(served, tmp_path: Path, caplog) -> None:
    from gradio_client.exceptions import AppError

    visitor = served.visitor()
    with pytest.raises(AppError, match="There is no adapter of yours yet"):
        visitor.predict("the river", api_name="/ask")
    made_in = served.page._served / "made"
    before = sorted(made_in.glob("*"))
    one_line = f"{SECRET} of <b>a</b>"
    for given, message in (
        ({}, "There are no prompts"),
        ({"pasted": " \n\n"}, "There are no prompts"),
        ({"pasted": "\n".join("abc"), "file": write(tmp_path, "a.txt", "a court")}, "in the box and in a file"),
        ({"pasted": "a\n" * 21}, "There are 21 prompts, and this page takes 20"),
        ({"pasted": "a" * 201}, "Prompt 1 has 201 characters"),
        ({"file": write(tmp_path, "b.txt", b"\xff\xfe")}, "is not in UTF-8"),
        ({"file": write(tmp_path, "c.jsonl", f'["{one_line}"]\n')}, "&lt;b&gt;"),
        ({"pasted": "a court", "generator": "smal"}, "no generator|not in the list"),
    ):
        with pytest.raises(AppError, match=message):
            make(visitor, **given)
    made = make(visitor, one_line, generator="no base")
    with pytest.raises(AppError, match=r"is not here\. Download the adapter"):
        visitor.predict(SECRET, api_name="/ask")
    make(visitor, "a court", generator="no base")
    assert "unknown" in made.facts
    left = {path for path in made_in.iterdir() if path not in before}
    assert len(left) == 1, "the second adapter's folder; the first one's went, and nothing refused has one"
    assert SECRET not in caplog.text and not caplog.records


def test_the_server_itself_takes_no_large_file_and_reads_no_file_of_its_own(served) -> None:
    """What `gradio_client` checks before it asks, other programs need not."""
    import httpx

    api = f"{served.address}gradio_api"
    with httpx.Client(trust_env=False, timeout=60) as web:
        assert web.post(f"{api}/upload", files={"files": ("large.txt", b"a court\n" * 300)}).status_code == 413
        address = f"{served.address}config"
        for path in ("/etc/hostname", str(Path(__file__)), "../app.py", address, "https://example.org/a.txt"):
            dropped = {"path": path, "meta": {"_type": "gradio.FileData"}}
            asked = web.post(f"{api}/call/make", json={"data": ["small", "", dropped, "prompt", 0]})
            said = web.get(f"{api}/call/make/{asked.json()['event_id']}").text
            assert "event: error" in said and "event: complete" not in said
            assert "://" not in path or "not named by its address" in said
            if "://" not in path:
                assert web.get(f"{api}/file={path}").status_code in (403, 404)
        sent = [web.post(f"{api}/upload", files={"files": (f"{n}.txt", b"law")}).status_code for n in range(13)]
        assert sent == sorted(sent) and sent[0] == 200 and sent[-1] == 429
        for path in served.page._served.glob("*/*.txt"):
            os.utime(path, (0, 0))
        assert web.post(f"{api}/upload", files={"files": ("new.txt", b"law")}).status_code == 200, "old ones go"


def test_a_bug_is_told_by_its_kind_alone(served, monkeypatch, caplog) -> None:
    from gradio_client.exceptions import AppError

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"about {SECRET}")

    monkeypatch.setattr(PageGenerator, "make", broken)
    with caplog.at_level(logging.INFO), pytest.raises(AppError, match=r"Something went wrong here \(RuntimeError\)"):
        make(served.visitor(), "a court")
    assert SECRET not in caplog.text and "RuntimeError at test_page.py" in caplog.text


def test_progress_reaches_the_visitor(served, monkeypatch) -> None:
    seen, real = Event(), PageGenerator.make

    def slow(self: PageGenerator, *args: Any, tell: Any, **options: Any) -> MadeAdapter:
        tell(0.5, "Reading prompt 2 of 4")
        assert seen.wait(60)
        return real(self, *args, **options)

    monkeypatch.setattr(PageGenerator, "make", slow)
    job = served.visitor().submit("small", "a court", None, "prompt", 0, api_name="/make")
    for _ in range(300):
        told = job.status().progress_data
        if told and told[0].desc == "Reading prompt 2 of 4":
            break
        time.sleep(0.1)
    seen.set()
    assert told[0].desc == "Reading prompt 2 of 4" and "from 1 prompts" in job.result()[0]


def test_the_verb_says_that_a_port_is_taken(run, generator_folder: Path) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = run("demo", generator_folder, "--port", taken.getsockname()[1])
    assert ran.code == 1 and "port" in ran.err and "Traceback" not in ran.err


def test_no_more_adapters_are_kept_than_the_limit(tmp_path: Path, generator) -> None:
    kept, shown = KeptAdapters(tmp_path, 2), PageGenerator("small", generator)
    first, second, third = (kept.keep(shown.make(GIVEN, kept.new_folder())) for _ in range(3))
    assert kept.get(first) is None and kept.get(second) and kept.get(third)
    kept.get(second)
    fourth = kept.keep(shown.make(GIVEN, kept.new_folder()))
    assert kept.get(third) is None, "the one that was not used for longest goes"
    kept.drop(second)
    kept.drop(None)
    assert kept.get(None) is None and [path.name for path in tmp_path.iterdir()] == [fourth]
