# SPDX-License-Identifier: Apache-2.0
"""The page itself: what visitors see, and what happens when they press a button."""

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
from .kept import BoundedUploads, KeptAdapters
from .limits import PageLimits
from .page_generator import MadeAdapter, PageGenerator
from .task_map import FITTED, PROMPT, TASK
from .wording import HEAD, facts_of, map_caption, title_of


logger = logging.getLogger(__name__)

# File of prompts, the name of their field, whether answers are wanted -> the prompts, and their answers if wanted.
ReadFile = Callable[[Path, str, bool], tuple[list[str], list[str] | None]]
Turn = tuple[str, str, str]

_HOW_OFTEN_CLEARED = 600
_COLOURS = {FITTED: "#9ca3af", PROMPT: "#fb923c", TASK: "#b91c1c"}
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

        names = list(self._generators)
        # What models write is shown as it stands, and not offered for sharing elsewhere.
        plain: Any = {"height": 300, "render_markdown": False, "buttons": ["copy"], "feedback_options": None}
        with gr.Blocks(
            title="Prompts to adapter",
            analytics_enabled=False,
            delete_cache=(_HOW_OFTEN_CLEARED, self.limits.idle_seconds),
        ) as blocks:
            gr.Markdown(HEAD)
            made = gr.State(None, time_to_live=self.limits.idle_seconds, delete_callback=self._kept.drop)
            turns = gr.State([], time_to_live=self.limits.idle_seconds)
            with gr.Row():
                with gr.Column():
                    name = gr.Dropdown(names, value=names[0], label="Generator", elem_id="generator")
                    about = gr.Markdown(title_of(self._generators[names[0]]))
                    pasted = gr.Textbox(
                        label="Prompts, one a line",
                        placeholder="Unlabelled questions that are typical of the task",
                        lines=8,
                        max_lines=16,
                        elem_id="prompts",
                    )
                    file = gr.File(label="or a file: .txt, .jsonl, .csv, .tsv", height=120, elem_id="file")
                    _without_addresses(gr, file)
                    with gr.Accordion("Options", open=False):
                        column = gr.Textbox("prompt", label="Field or column of the prompts", max_length=200)
                        seed = gr.Number(0, label="Seed, where prompts are drawn", precision=0, minimum=0)
                    button = gr.Button("Make the adapter", variant="primary", elem_id="make")
                with gr.Column():
                    facts = gr.Markdown("The adapter will be described here.", elem_id="facts", min_height=120)
                    drawn = gr.ScatterPlot(
                        x="x",
                        y="y",
                        color="what",
                        color_map=_COLOURS,
                        color_title=" ",
                        x_title="first principal axis",
                        y_title="second",
                        tooltip=["what"],
                        height=320,
                        visible=False,
                        elem_id="map",
                    )
                    caption = gr.Markdown(elem_id="caption")
                    archive = gr.DownloadButton("Download the adapter (.zip)", visible=False, elem_id="archive")
                    files = gr.Files(label="or its two files", visible=False, interactive=False, elem_id="files")
            with gr.Row():
                alone = gr.Chatbot(label="Base alone", elem_id="base", **plain)
                adapted = gr.Chatbot(label="With the adapter", elem_id="adapted", **plain)
            question = gr.Textbox(
                label="Ask both",
                placeholder="Make an adapter first",
                interactive=False,
                max_length=self.limits.question_characters,
                submit_btn=True,
                elem_id="question",
            )

            # `api_name` names what programs call, see the how-to guide.
            def describe(chosen: str) -> str:
                return title_of(self._generators[chosen]) if chosen in self._generators else ""

            def make(
                before: Any, chosen: str, text: str, path: str | None, field: str, number: float,
                progress: Any = gr.Progress(),  # noqa: B008  (Gradio looks for it among the defaults)
            ) -> Any:  # fmt: skip
                with _told(gr.Error):
                    mine, new = self._make(before, chosen, text or "", path, field or "", number, progress)
                    by = self._generators[new.generator]
                    return (
                        mine,
                        [],
                        facts_of(new, by),
                        _picture(gr, by, new),
                        map_caption(by),
                        gr.DownloadButton(value=str(new.archive), visible=True),
                        gr.Files(value=[str(path) for path in new.files], visible=True, interactive=False),
                        None,
                        None,
                        gr.Textbox(
                            interactive=by.base is not None,
                            placeholder="Ask something" if by.base is not None else "There is no base here to ask",
                        ),
                    )

            def ask(mine: Any, said: list[Turn], text: str) -> Iterator[Any]:
                with _told(gr.Error):
                    for now in self._ask(mine, said, text or ""):
                        yield now, _messages(now, 1), _messages(now, 2), ""

            name.change(describe, name, about, api_visibility="private", show_progress="hidden")
            outputs = [made, turns, facts, drawn, caption, archive, files, alone, adapted, question]
            for chat in (alone, adapted):
                chat.clear(lambda: ([], None, None), None, [turns, alone, adapted], api_visibility="private")
            button.click(
                make,
                [made, name, pasted, file, column, seed],
                outputs,
                api_name="make",
                show_progress_on=[facts],
                **_ONE_AT_A_TIME,
            )
            question.submit(
                ask, [made, turns, question], [turns, alone, adapted, question], api_name="ask", **_ONE_AT_A_TIME
            )
        return blocks.queue(max_size=self.limits.waiting, default_concurrency_limit=1)


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


def _without_addresses(gr: Any, file: Any) -> None:
    """Make a component for files refuse the addresses of files elsewhere, which Gradio would fetch, however large.

    On the one component, not in a class of its own: Gradio writes a stub into the package for each such class.
    """
    move = file.async_move_resource_to_block_cache

    async def move_uploaded(url_or_file_path: Any) -> Any:
        if "://" in str(url_or_file_path):
            raise gr.Error("A file is uploaded, not named by its address.", print_exception=False)
        return await move(url_or_file_path)

    file.async_move_resource_to_block_cache = move_uploaded


def _messages(turns: Sequence[Turn], side: int) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn[0]), ("assistant", turn[side] or "(nothing)"))
    ]


def _picture(gr: Any, by: PageGenerator, made: MadeAdapter) -> Any:
    if by.map is None:
        return gr.ScatterPlot(visible=False)
    import pandas as pd

    return gr.ScatterPlot(value=pd.DataFrame(by.map.rows(made.points)), visible=True)
