# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, as visitors use it; the pictures of the how-to guide are taken here.

They are taken of the worked example, after `make demo`:

    PAGE_GENERATOR=demo_output/seed-0/generator PAGE_PICTURES=docs/how-to/images \
        python -m pytest -m slow tests/page/test_page_in_browser.py

Without these variables a small generator of random weights is shown, and pictures are thrown away.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.constants import TASK_PROMPTS
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator
from peft_dnd.page import PageGenerator


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOOR = [sys.executable, "-c", "import sys, peft_dnd_cli; sys.exit(peft_dnd_cli.main())", "demo"]
PEOPLE = ("Zorpa", "Fenva", "Rirte", "Dilpina", "Nezo", "Lunviko", "Gurmelo", "Larpelo")
# Prompts of two tasks that the worked example's generator was not fitted on.
CITY = [f"Which city does {name} live in? Answer in a full sentence." for name in PEOPLE]
CITY += [f"In what town does {name} live? Use a whole sentence." for name in PEOPLE]
JOB = [f"What is the job of {name}? Reply with a grammatical sentence." for name in PEOPLE]
QUESTION = "What is the home city of Zorpa? Give the answer as a full sentence."
PATIENCE = 180_000  # milliseconds, where processors are shared
LARGEST_PICTURE = 200 * 1024


class Served(NamedTuple):
    """A page served by a process of its own."""

    address: str
    process: subprocess.Popen[str]
    home: Path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, the system's or Playwright's own."""
    pytest.importorskip("gradio")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        known = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
        path = next((name for name in known if name), playwright.chromium.executable_path)
        if not Path(path).is_file():
            pytest.skip("no Chromium here")
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def shown(
    generator: PromptConditionedLoraGenerator,
    base_model: nn.Module,
    word_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of the generator that is shown."""
    if os.environ.get("PAGE_GENERATOR"):
        return Path(os.environ["PAGE_GENERATOR"]).resolve()
    folder = tmp_path_factory.mktemp("shown")
    base_model.save_pretrained(folder / "base")
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "base")
    made = copy.deepcopy(generator)
    made.config.base_model_name_or_path = str(folder / "base")
    made.fit_out_of_distribution({name: list(prompts) for name, prompts in TASK_PROMPTS.items()})
    made.save_pretrained(folder / "generator", include_text_encoder=True)
    return folder / "generator"


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Runs a command that serves a page, with a home and a working folder of its own."""
    running = []

    def start(*command: object, **variables: str) -> Served:
        home = tmp_path_factory.mktemp("home")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "HOME": str(home), "GRADIO_SERVER_PORT": str(port), **variables}
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=home,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        running.append(process)
        _wait_for(process, port)
        return Served(f"http://127.0.0.1:{port}", process, home)

    yield start
    for process in running:
        process.kill()
        process.wait()


def _wait_for(process: subprocess.Popen[str], port: int) -> None:
    for _ in range(10 * PATIENCE // 1000):  # it imports torch and Gradio first, which takes its time where many do
        assert process.poll() is None, process.stdout and process.stdout.read()
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    raise AssertionError(f"nothing answers at port {port} after {10 * PATIENCE // 1000} s")


@pytest.fixture(scope="module")
def served(browser: Any, serve: Callable[..., Served], shown: Path) -> Served:
    return serve(*DOOR, shown)


@pytest.fixture
def visitor(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    """Opens the page in a window of its own; in the end no window may have met an error, or asked another machine."""
    contexts, wrong = [], []

    def arrive(address: str = served.address) -> Any:
        context = browser.new_context(viewport={"width": 1160, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda asked: wrong.append(asked.url) if asked.url.split("/")[2:3] != [address[7:]] and
            asked.url.startswith(("http", "ws")) else None,
        )  # fmt: skip
        page.goto(address)
        page.locator("#prompts textarea").wait_for()
        return page

    yield arrive
    for context in contexts:
        context.close()
    assert wrong == []


def paste(page: Any, prompts: list[str]) -> None:
    page.fill("#prompts textarea", "\n".join(prompts))
    page.click("#make")


def digest_shown(page: Any, prompts: list[str]) -> None:
    """Wait until the page tells of the adapter of these prompts."""
    digest = prompts_hash(prompts)[:16]
    page.locator("#facts", has_text=digest).wait_for()


def prompts_hash(prompts: list[str]) -> str:
    from peft_dnd.text.prompts import prompts_digest

    return prompts_digest(prompts)


def ask(page: Any, question: str, answers: int = 1) -> tuple[str, str]:
    """Ask a question; the last answers of the base alone and with the adapter."""
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    found = []
    for side in ("#base", "#adapted"):
        last = page.locator(f"{side} [data-testid=bot]").nth(answers - 1)
        last.wait_for()
        page.wait_for_function(
            "([side, n]) => { const all = document.querySelectorAll(side + ' [data-testid=bot]');"
            " return all.length === n && !['…', ''].includes(all[n - 1].innerText.trim()) }",
            arg=[side, answers],
        )
        found.append(last.inner_text().strip())
    return found[0], found[1]


def picture(page: Any, name: str, tmp_path: Path, *, clip: Any = None) -> None:
    """Take a picture for the documents."""
    folder = Path(os.environ.get("PAGE_PICTURES") or tmp_path)
    page.mouse.move(0, 0)
    page.screenshot(path=folder / name, full_page=True, clip=clip, animations="disabled")
    assert (folder / name).stat().st_size < LARGEST_PICTURE


@pytest.fixture(scope="module")
def alone(shown: Path) -> PageGenerator:
    """What the page shows, in this process, with nobody else there."""
    return PageGenerator.from_pretrained(str(shown))


def answers_of(alone: PageGenerator, prompts: list[str], folder: Path) -> tuple[str, str]:
    base, adapted = alone.answers(QUESTION, alone.make(prompts, folder), [], 64)
    return base or "(nothing)", adapted or "(nothing)"


def test_paste_make_compare_and_download(visitor, alone: PageGenerator, tmp_path: Path) -> None:
    page = visitor()
    paste(page, CITY)
    digest_shown(page, CITY)
    assert f"from {len(CITY)} prompts" in page.inner_text("#facts")
    page.locator("#map canvas, #map svg").first.wait_for()
    files = page.locator("#files").bounding_box()
    top = {
        "x": 0,
        "y": 0,
        "width": 1160,
        "height": files["y"] + files["height"] + page.evaluate("window.scrollY") + 12,
    }
    picture(page, "page-made.png", tmp_path, clip=top)

    expected = alone.generator.generate_adapter(CITY)
    with page.expect_download() as caught:
        page.click("#archive")
    caught.value.save_as(tmp_path / "adapter.zip")
    with zipfile.ZipFile(tmp_path / "adapter.zip") as packed:
        packed.extractall(tmp_path)
    found = GeneratedAdapter.from_pretrained(tmp_path / "adapter").state_dict()
    # In a thread of a web server torch may add with another number of threads, in another order.
    assert all(torch.allclose(found[key], value, rtol=1e-4, atol=1e-6) for key, value in expected.state_dict().items())
    with page.expect_download() as caught:
        page.locator("#files a").last.click()
    single = Path(caught.value.path()).read_bytes()
    whole = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(single).digest() == hashlib.sha256(whole).digest()

    assert ask(page, QUESTION) == answers_of(alone, CITY, tmp_path / "alone")
    page.locator("#base").scroll_into_view_if_needed()
    box = page.locator("#base").bounding_box()
    height = page.locator("#question").bounding_box()["y"] + page.locator("#question").bounding_box()["height"]
    offset = page.evaluate("window.scrollY")
    clip = {"x": 0, "y": box["y"] + offset - 12, "width": 1160, "height": height - box["y"] + 24}
    picture(page, "page-compared.png", tmp_path, clip=clip)


def test_wrong_input_is_told_and_the_page_goes_on(visitor, tmp_path: Path) -> None:
    page = visitor()
    page.click("#make")
    page.get_by_text("There are no prompts. Paste some").wait_for()
    (tmp_path / "bad.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    page.set_input_files("#file input[type=file]", tmp_path / "bad.txt")
    page.locator("#file .file-preview", has_text="bad").wait_for()
    page.click("#make")
    page.get_by_text("is not in UTF-8").wait_for()
    (tmp_path / "large.txt").write_text("a court\n" * 200_000, encoding="utf-8")
    page.locator("#file button[aria-label*='lear'], #file button[aria-label*='emove']").first.click()
    page.set_input_files("#file input[type=file]", tmp_path / "large.txt")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    assert "SHA-256" not in page.inner_text("#facts")
    (tmp_path / "good.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in JOB), encoding="utf-8")
    page = visitor()
    page.set_input_files("#file input[type=file]", tmp_path / "good.jsonl")
    page.locator("#file .file-preview", has_text="good").wait_for()
    page.click("#make")
    digest_shown(page, JOB)


def test_two_visitors_at_once(visitor, alone: PageGenerator, tmp_path: Path) -> None:
    tasks = {"city": CITY, "job": JOB}
    pages = {task: visitor() for task in tasks}
    for task, page in pages.items():
        paste(page, tasks[task])  # the second does not wait for the first
    for task, page in pages.items():
        digest_shown(page, tasks[task])
    for page in pages.values():
        page.fill("#question textarea", QUESTION)
    for page in pages.values():
        page.press("#question textarea", "Enter")
    for task, page in pages.items():
        expected = answers_of(alone, tasks[task], tmp_path / task)
        for side, answer in zip(("#base", "#adapted"), expected, strict=True):
            page.locator(f"{side} [data-testid=bot]", has_text=answer).wait_for()


def test_a_generator_without_its_base_and_the_space(visitor, serve, shown: Path, tmp_path: Path) -> None:
    """`app.py` as a Space runs it, on a copy of the generator that names a base which is not there."""
    space = tmp_path / "space"
    shutil.copytree(ROOT / "examples" / "space", space)
    shutil.copytree(shown, space / "generator")
    config = (space / "generator" / "config.json").read_text(encoding="utf-8")
    named = PromptConditionedLoraGenerator.config_class.from_pretrained(space / "generator").base_model_name_or_path
    (space / "generator" / "config.json").write_text(config.replace(str(named), "org/absent"), encoding="utf-8")
    page = visitor(serve(sys.executable, space / "app.py").address)
    assert "Its base is not here" in page.inner_text("body")
    paste(page, JOB)
    digest_shown(page, JOB)
    assert page.locator("#question textarea").is_disabled()


def test_nothing_is_left_when_it_stops(served: Served) -> None:
    """Comes last: it ends the server that the others have used."""
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    mine = [path for path in temporary.glob("peft-dnd-page-*") if path.stat().st_mtime > time.time() - 36_000]
    assert mine, "while it runs there is a folder"
    served.process.send_signal(signal.SIGTERM)
    out, _ = served.process.communicate(timeout=PATIENCE / 1000)
    assert served.process.returncode == 0
    assert "The page is at" in out and "Traceback" not in out
    for text in (*CITY, *JOB, QUESTION):
        assert text not in out
    assert [path for path in served.home.rglob("*") if path.is_file()] == []
