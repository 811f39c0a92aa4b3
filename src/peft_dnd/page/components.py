# SPDX-License-Identifier: Apache-2.0
"""What stands on the page: Gradio's components, where they stand, and what an adapter puts into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .limits import PageLimits
from .page_generator import MadeAdapter, PageGenerator
from .task_map import FITTED, PROMPT, TASK
from .wording import HEAD, facts_of, map_caption, title_of


_COLOURS = {FITTED: "#9ca3af", PROMPT: "#fb923c", TASK: "#b91c1c"}


@dataclass(frozen=True)
class PageComponents:
    """The components that something is read from or put into, and the two that keep what is one visitor's.

    Attributes:
        made: The name of the visitor's adapter.
        turns: What the visitor asked, with both answers.
        name: The generator that is chosen.
        about: What it is.
        prompts: The prompts' box, file and column, and the seed.
        button: Has the adapter made.
        result: Facts, picture, its caption, archive and files of the adapter.
        chats: The base alone, and with the adapter.
        question: The box for questions.
    """

    made: Any
    turns: Any
    name: Any
    about: Any
    prompts: Sequence[Any]
    button: Any
    result: Sequence[Any]
    chats: Sequence[Any]
    question: Any

    @classmethod
    def placed(
        cls, gr: Any, generators: Sequence[PageGenerator], limits: PageLimits, forget: Callable[[Any], None]
    ) -> PageComponents:
        """Put the components onto the page that is being made.

        Args:
            gr: Gradio.
            generators: Those to choose from.
            limits: How much each visitor may ask for.
            forget: Is called with a visitor's adapter when the visitor is gone.
        """
        gr.Markdown(HEAD)
        made = gr.State(None, time_to_live=limits.idle_seconds, delete_callback=forget)
        turns = gr.State([], time_to_live=limits.idle_seconds)
        with gr.Row():
            with gr.Column():
                names = [one.name for one in generators]
                name = gr.Dropdown(names, value=names[0], label="Generator", elem_id="generator")
                about = gr.Markdown(title_of(generators[0]))
                prompts = _prompts(gr)
                button = gr.Button("Make the adapter", variant="primary", elem_id="make")
            with gr.Column():
                result = _result(gr)
        with gr.Row():
            chats = _chats(gr)
        question = gr.Textbox(
            label="Ask both",
            placeholder="Make an adapter first",
            interactive=False,
            max_length=limits.question_characters,
            submit_btn=True,
            elem_id="question",
        )
        return cls(made, turns, name, about, prompts, button, result, chats, question)

    @property
    def of_an_adapter(self) -> list[Any]:
        """What changes when an adapter is made, in the order of `put_in`."""
        return [self.made, self.turns, *self.result, *self.chats, self.question]


def put_in(gr: Any, mine: str, new: MadeAdapter, by: PageGenerator) -> tuple[Any, ...]:
    """What a new adapter, by the name under which it is kept, puts into `PageComponents.of_an_adapter`."""
    can_be_asked = by.base is not None
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
            interactive=can_be_asked,
            placeholder="Ask something" if can_be_asked else "There is no base here to ask",
        ),
    )


def _prompts(gr: Any) -> list[Any]:
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
    return [pasted, file, column, seed]


def _result(gr: Any) -> list[Any]:
    return [
        gr.Markdown("The adapter will be described here.", elem_id="facts", min_height=120),
        gr.ScatterPlot(
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
        ),
        gr.Markdown(elem_id="caption"),
        gr.DownloadButton("Download the adapter (.zip)", visible=False, elem_id="archive"),
        gr.Files(label="or its two files", visible=False, interactive=False, elem_id="files"),
    ]


def _chats(gr: Any) -> list[Any]:
    # What models write is shown as it stands, and not offered for sharing elsewhere.
    plain: Any = {"height": 300, "render_markdown": False, "buttons": ["copy"], "feedback_options": None}
    return [
        gr.Chatbot(label="Base alone", elem_id="base", **plain),
        gr.Chatbot(label="With the adapter", elem_id="adapted", **plain),
    ]


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


def _picture(gr: Any, by: PageGenerator, made: MadeAdapter) -> Any:
    if by.map is None:
        return gr.ScatterPlot(visible=False)
    import pandas as pd

    return gr.ScatterPlot(value=pd.DataFrame(by.map.rows(made.points)), visible=True)
