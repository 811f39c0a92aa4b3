# SPDX-License-Identifier: Apache-2.0
"""The page itself: how it is served, and what happens when a visitor presses a button."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from threading import Event
from traceback import extract_tb
from typing import Any

from ..errors import GeneratorConfigError, PeftDndError, PromptError
from .components import PageComponents, put_in
from .kept import BoundedUploads, KeptAdapters
from .limits import PageLimits
from .page_generator import MadeAdapter, PageGenerator
from .wording import title_of


logger = logging.getLogger(__name__)

# File of prompts, the name of their field, whether answers are wanted -> the prompts, and their answers if wanted.
ReadFile = Callable[[Path, str, bool], tuple[list[str], list[str] | None]]
Turn = tuple[str, str, str]

_HOW_OFTEN_CLEARED = 600
# What runs the models waits in one line, first come, first served.
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}


class PromptPage:
    """A page in the browser, made with Gradio: prompts in, an adapter out, the base with and without it side by side.

    Visitors are kept apart: what one makes is in that one's session alone. Files are written into a temporary folder,
    which [`close`][PromptPage.close] removes; prompts, questions and answers are neither logged nor kept.

    Args:
        generators: The generators to choose from; the first is chosen at first.
        read_file: Reads a file of prompts: given its path, the name of their field and whether answers are wanted, it
            gives prompts, and answers or `None`; it raises errors of `peft_dnd.errors` about what is wrong with it.
        limits: How much each visitor may ask for.

    Raises:
        GeneratorConfigError: If there is no generator, or two have one name.
    """

    def __init__(
        self, generators: Sequence[PageGenerator], read_file: ReadFile, limits: PageLimits | None = None
    ) -> None:
        self._generators: Mapping[str, PageGenerator] = {one.name: one for one in generators}
        if not generators or len(self._generators) < len(generators):
            raise GeneratorConfigError(
                f"A page shows one or more generators of different names, got {[one.name for one in generators]}."
            )
        self._read_file = read_file
        self.limits = limits or PageLimits()
        self._folder = tempfile.TemporaryDirectory(prefix="peft-dnd-page-")
        # Where Gradio keeps uploads. What lies in it is served as it is, and not copied first.
        self._served = Path(self._folder.name) / "gradio"
        self._kept = KeptAdapters(self._served / "made", self.limits.adapters)
        self._blocks: Any = None

    def build(self) -> Any:
        """The page as a `gradio.Blocks`, made at the first call.

        Raises:
            ImportError: If Gradio is not installed.
        """
        if self._blocks is None:
            # Gradio reads it when components are made, and again when it serves them.
            os.environ["GRADIO_TEMP_DIR"] = str(self._served)
            # Gradio loads matplotlib where that is installed, which would write a list of fonts into the home folder.
            os.environ.setdefault("MPLCONFIGDIR", str(Path(self._folder.name) / "matplotlib"))
            self._blocks = self._built()
        return self._blocks

    def launch(self, *, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
        """Serve the page.

        Args:
            host: Address to listen on; `None`: this machine alone, or where the environment of a Space says.
            port: Port; `None`: the first free one from 7860.
            wait: Whether to stay until the process is interrupted; the page is closed then.

        Returns:
            The page's address.

        Raises:
            OSError: If the port is taken.
        """
        from gradio import themes
        from starlette.middleware import Middleware

        blocks = self.build()
        bounded = Middleware(
            BoundedUploads,
            folder=self._served,
            apart=self._served / "made",
            most=self.limits.uploads,
            seconds=self.limits.idle_seconds,
        )
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            quiet=True,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            show_error=True,
            max_file_size=self.limits.upload_bytes,
            app_kwargs={"middleware": [bounded]},
            enable_monitoring=False,
            run_history=False,
            footer_links=["gradio", "settings"],
            # The fonts of the visitor's machine: nothing is fetched from elsewhere.
            theme=themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="orange"
            ),
        )
        if wait:
            self.wait()
        return str(address)

    def wait(self) -> None:
        """Stay until the process is interrupted, and then close the page."""
        try:
            Event().wait()
        finally:
            self.close()

    def close(self) -> None:
        """Stop serving, and remove what was written."""
        if self._blocks is not None:
            self._blocks.close(verbose=False)
        self._folder.cleanup()

    def _make(
        self, before: str | None, name: str, pasted: str, file: str | None, column: str, seed: float, tell: Any
    ) -> tuple[str, MadeAdapter]:
        """Make an adapter of what a visitor gave; the visitor's former one goes when the new one is there."""
        chosen = self._generators.get(name)
        if chosen is None:
            raise PromptError(f"There is no generator {name!r} here. Choose one of the list.")
        prompts, answers = self._prompts(chosen, pasted, file, column.strip() or "prompt")
        folder = self._kept.new_folder()
        try:
            made = chosen.make(prompts, folder, answers=answers, seed=max(0, int(seed or 0)), tell=tell)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._kept.drop(before)
        return self._kept.keep(made), made

    def _prompts(
        self, chosen: PageGenerator, pasted: str, file: str | None, column: str
    ) -> tuple[list[str], list[str] | None]:
        wants_answers = chosen.generator.config.condition_text != "prompts"
        if file is None:
            prompts, answers = [line.strip() for line in pasted.split("\n") if line.strip()], None
            if prompts and wants_answers:
                raise PromptError(
                    "This generator reads answers too, which cannot be pasted. Drop a .jsonl file with one "
                    '{"prompt": "...", "answer": "..."} a line, or a .csv with both columns.'
                )
        elif pasted.strip():
            raise PromptError("There are prompts in the box and in a file. Clear one of the two.")
        else:
            self.limits.check_file(Path(file))
            prompts, answers = self._read_file(Path(file), column, wants_answers)
        self.limits.check_prompts(prompts)
        if answers is not None:
            self.limits.check_prompts(answers)
        return prompts, answers

    def _ask(self, mine: str | None, turns: Sequence[Turn], question: str) -> Iterator[list[Turn]]:
        """The turns after a question, first with the base's answer alone and then with both."""
        made = self._kept.get(mine)
        if made is None:
            raise PromptError("There is no adapter of yours yet, or it was cleared meanwhile. Make one.")
        self.limits.check_question(question)
        said = list(turns)[1 - self.limits.turns :] if self.limits.turns > 1 else []
        found: list[str] = []
        for text in self._generators[made.generator].answers(question, made, said, self.limits.answer_tokens):
            found.append(text)
            yield [*said, (question, found[0], found[1] if len(found) > 1 else "…")]

    def _built(self) -> Any:
        import gradio as gr

        with gr.Blocks(
            title="Prompts to adapter",
            analytics_enabled=False,
            delete_cache=(_HOW_OFTEN_CLEARED, self.limits.idle_seconds),
        ) as blocks:
            generators = list(self._generators.values())
            self._connect(gr, PageComponents.placed(gr, generators, self.limits, self._kept.drop))
        return blocks.queue(max_size=self.limits.waiting, default_concurrency_limit=1)

    def _connect(self, gr: Any, page: PageComponents) -> None:
        """Say what happens when a visitor does something. `api_name` is what programs call, see the how-to guide."""

        def describe(chosen: str) -> str:
            return title_of(self._generators[chosen]) if chosen in self._generators else ""

        def make(
            before: Any, chosen: str, text: str, path: str | None, field: str, number: float,
            progress: Any = gr.Progress(),  # noqa: B008  (Gradio looks for it among the defaults)
        ) -> Any:  # fmt: skip
            with _told(gr.Error):
                mine, new = self._make(before, chosen, text or "", path, field or "", number, progress)
                return put_in(gr, mine, new, self._generators[new.generator])

        def ask(mine: Any, said: list[Turn], text: str) -> Iterator[Any]:
            with _told(gr.Error):
                for now in self._ask(mine, said, text or ""):
                    yield now, _messages(now, 1), _messages(now, 2), ""

        page.name.change(describe, page.name, page.about, api_visibility="private", show_progress="hidden")
        talk = [page.turns, *page.chats]
        for chat in page.chats:
            chat.clear(lambda: ([], None, None), None, talk, api_visibility="private")
        page.button.click(
            make,
            [page.made, page.name, *page.prompts],
            page.of_an_adapter,
            api_name="make",
            show_progress_on=[page.result[0]],
            **_ONE_AT_A_TIME,
        )
        page.question.submit(
            ask, [page.made, page.turns, page.question], [*talk, page.question], api_name="ask", **_ONE_AT_A_TIME
        )


class _told:
    """Within this context errors reach the visitor in words; of a bug the visitor, and the log, get the kind alone."""

    def __init__(self, kind: Callable[..., Exception]) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        foreseen = isinstance(error, PeftDndError)
        if not foreseen:
            # Where it happened, but not what it says: that may hold what the visitor wrote.
            places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in extract_tb(error.__traceback__)]
            logger.error("A request failed with %s at %s.", type(error).__name__, " < ".join(reversed(places)))
        text = " ".join(str(error).split()) if foreseen else f"Something went wrong here ({type(error).__name__})."
        raise self._kind(escape(text, quote=False), duration=20, print_exception=False) from None


def _messages(turns: Sequence[Turn], side: int) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn[0]), ("assistant", turn[side] or "(nothing)"))
    ]
