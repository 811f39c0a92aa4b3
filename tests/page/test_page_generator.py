# SPDX-License-Identifier: Apache-2.0
"""What stands behind the page: adapters made, drawn and packed, and a base that answers many without mixing them."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.constants import TASK_PROMPTS
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator
from peft_dnd.errors import BaseModelMismatchError, GeneratorConfigError, PromptError
from peft_dnd.page import ChatBase, PageGenerator, PageLimits, TaskMap
from peft_dnd.page.task_map import FITTED, PROMPT, TASK
from peft_dnd.page.wording import facts_of, map_caption, title_of


TASKS = {name: list(prompts) for name, prompts in TASK_PROMPTS.items()}
GIVEN = TASKS["med"]  # as many as the small generator reads
QUESTIONS = ["what is the law ?", "a court , please", "the river"]


@pytest.fixture
def knowing(generator: PromptConditionedLoraGenerator) -> PromptConditionedLoraGenerator:
    """The small generator, which knows its tasks' prompts."""
    made = copy.deepcopy(generator)
    made.fit_out_of_distribution(TASKS)
    return made


@pytest.fixture
def plain_tokenizer(word_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The small base's tokenizer, without a chat template."""
    made = copy.deepcopy(word_tokenizer)
    made.chat_template = None
    return made


@pytest.fixture
def page_generator(knowing, fresh_base: Callable[[], nn.Module], plain_tokenizer) -> PageGenerator:
    return PageGenerator("small", knowing, ChatBase(fresh_base(), plain_tokenizer))


def different(generator: PromptConditionedLoraGenerator) -> list[GeneratedAdapter]:
    """Two adapters that are far enough apart to be told by what a model writes."""
    return [
        GeneratedAdapter(made.layout, {key: value * scale for key, value in made.state_dict().items()})
        for made, scale in zip(generator.generate_adapters(TASKS).values(), (8.0, -8.0), strict=False)
    ]


def test_makes_what_the_generator_makes_and_tells_how_far_it_is(page_generator: PageGenerator, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    made = page_generator.make(GIVEN, tmp_path, tell=lambda share, what: told.append((share, what)))
    expected = page_generator.generator.generate_adapter(GIVEN)
    assert made.adapter.provenance == expected.provenance and made.adapter.out_of_distribution is not None
    weights = load_file(made.files[1])
    assert all(torch.equal(weights[key], value) for key, value in expected.state_dict().items())
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert [what for _, what in told if "Reading" in what] == [f"Reading prompt {n} of 4" for n in (1, 2, 3, 4)]
    before = len(told)
    page_generator.generator.generate_adapter(GIVEN)
    assert len(told) == before, "nothing is told once it is made"


def test_packs_the_adapter_to_the_same_bytes(page_generator: PageGenerator, tmp_path: Path) -> None:
    first, again = (page_generator.make(GIVEN, tmp_path / name) for name in ("first", "again"))
    with zipfile.ZipFile(first.archive) as packed:
        packed.extractall(tmp_path / "unpacked")
    assert GeneratedAdapter.from_pretrained(tmp_path / "unpacked" / "adapter").layout == first.adapter.layout
    assert first.archive.read_bytes() == again.archive.read_bytes()
    first.discard()
    assert not (tmp_path / "first").exists() and again.archive.is_file()


def test_visitors_at_once_get_what_each_would_get_alone(
    knowing, fresh_base: Callable[[], nn.Module], plain_tokenizer
) -> None:
    adapters: list[GeneratedAdapter | None] = [None, *different(knowing)]

    def alone(adapter: GeneratedAdapter | None, question: str) -> str:
        return ChatBase(fresh_base(), plain_tokenizer).answer(question, adapter=adapter, most_tokens=8)

    asked = [(adapter, question) for adapter in adapters for question in QUESTIONS]
    expected = [alone(*one) for one in asked]
    assert len(set(expected)) > len(QUESTIONS), "the adapters must make a difference"
    shared = ChatBase(fresh_base(), plain_tokenizer)
    with ThreadPoolExecutor(4) as visitors:
        found = list(visitors.map(lambda one: shared.answer(one[1], adapter=one[0], most_tokens=8), asked * 4))
    assert found == expected * 4


def test_generators_of_other_layouts_share_a_base(fresh_base, plain_tokenizer, knowing) -> None:
    base = ChatBase(fresh_base(), plain_tokenizer)
    (one, other) = different(knowing)
    before = base.answer(QUESTIONS[0], most_tokens=8)
    first = base.answer(QUESTIONS[0], adapter=one, kind="one", most_tokens=8)
    base.answer(QUESTIONS[0], adapter=other, kind="other", most_tokens=8)
    assert base.answer(QUESTIONS[0], adapter=one, kind="one", most_tokens=8) == first
    assert base.answer(QUESTIONS[0], most_tokens=8) == before


def test_earlier_turns_are_read_where_there_is_a_chat_template(fresh_base, word_tokenizer, plain_tokenizer) -> None:
    base = ChatBase(fresh_base(), word_tokenizer)
    assert base.keeps_turns and not ChatBase(fresh_base(), plain_tokenizer).keeps_turns
    ids = base._ids("the river", [("a court", "please")])
    assert word_tokenizer.decode(ids[0]) == "a court . please . the river . answer"
    with pytest.raises(PromptError, match="has 86 tokens, and the base reads 64 with its answer"):
        base.answer("law " * 84)


def test_the_picture_has_the_tasks_and_the_new_one_among_them(page_generator: PageGenerator, tmp_path: Path) -> None:
    picture = page_generator.map
    assert isinstance(picture, TaskMap) and 0 < picture.kept <= 1
    made = page_generator.make(GIVEN, tmp_path)
    rows = picture.rows(made.points)
    assert rows["what"] == [FITTED] * len(TASKS) + [PROMPT] * len(made.points) + [TASK]
    new = torch.tensor([rows["x"][-1], rows["y"][-1]])
    distances = (picture.tasks - new).norm(dim=1)
    assert int(distances.argmin()) == list(TASKS).index("med") and float(distances.min()) < 1e-3
    assert picture.nearest(made.points) == (len(made.points), 1)
    said = facts_of(made, page_generator)
    assert f"from {len(GIVEN)} prompts" in said and f"to {len(made.points)} of {len(made.points)} prompts" in said
    assert f"{len(TASKS)} fitted tasks" in map_caption(page_generator)
    assert not any(prompt in said for prompt in GIVEN)


def test_a_generator_whose_base_is_not_there_still_makes_adapters(generator_folder: Path, tmp_path: Path) -> None:
    loaded = PageGenerator.from_pretrained(str(generator_folder))
    assert loaded.base is None and "does not say which base" in loaded.why_no_base and loaded.map is None
    assert "Its base is not here" in title_of(loaded)
    made = loaded.make(GIVEN, tmp_path)
    assert "unknown" in facts_of(made, loaded) and map_caption(loaded) == ""
    with pytest.raises(BaseModelMismatchError, match=r"is not here\. Download the adapter"):
        next(loaded.answers("the river", made, [], 8))
    with pytest.raises(BaseModelMismatchError, match=r"There is no base model .* at 'nowhere'"):
        PageGenerator.from_pretrained(str(generator_folder), base="nowhere")


def test_limits_are_told_with_the_mend(tmp_path: Path) -> None:
    limits = PageLimits(upload_bytes=10, prompts=2, prompt_characters=5, question_characters=4)
    (tmp_path / "large.txt").write_text("a" * 11, encoding="utf-8")
    for check, given, message in (
        (limits.check_file, tmp_path / "large.txt", "has 11 bytes, and this page takes 10"),
        (limits.check_prompts, [], "There are no prompts"),
        (limits.check_prompts, ["a"] * 3, "There are 3 prompts, and this page takes 2"),
        (limits.check_prompts, ["a", "a" * 6], "Prompt 2 has 6 characters"),
        (limits.check_question, " ", "There is no question"),
        (limits.check_question, "a" * 5, "has 5 characters, and this page takes 4"),
    ):
        with pytest.raises(PromptError, match=message):
            check(given)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(GeneratorConfigError, match="prompts must be a whole number from 1"):
            PageLimits(prompts=wrong)
