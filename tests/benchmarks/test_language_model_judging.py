# SPDX-License-Identifier: Apache-2.0
"""The language model benchmark's judging: fair draws, the same rows for everyone, stopped runs that go on, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from language_model import judging
from language_model.in_languages import ENGLISH, draw_in_languages, language_table, score_in_languages
from language_model.judging import ENTRIES, Contest, Questions, Size, draw_questions, prompts_for, score_all
from language_model.report import LABELS, report_of, reports_of, table
from language_model.rivals import Training, lora_layout, multi_task_lora, own_loras
from language_model.rows import BOTH
from support.small_world import TEST, TRAIN, letter_base, letter_tokenizer, small_generator, small_world

from peft_dnd.evaluation import Resampling


SIZE = Size(tasks=4, rows=5, prompts=3)
QUICK = Training(steps=25, rows=8, learning_rate=3e-2, warm_up=2, rank=4)
FEW = Resampling(resamples=50)


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Questions]]:
    return draw_questions(small_world(), SIZE, seed=0)


@pytest.fixture(scope="module")
def contest(questions: dict[str, list[Questions]], tmp_path_factory: pytest.TempPathFactory) -> Contest:
    folder, base, tokenizer = tmp_path_factory.mktemp("contest"), letter_base(), letter_tokenizer()
    tasks = [asked.task for of in questions.values() for asked in of]
    training = small_world().of("training")
    multi = multi_task_lora(base, tokenizer, training, folder / "multi", examples_seen=64, training=QUICK)
    return Contest(
        model=base,
        tokenizer=tokenizer,
        generator=small_generator(base, tokenizer),
        own=own_loras(base, tokenizer, tasks, folder / "own", training=QUICK),
        own_layout=lora_layout(base, 4),
        multi_task=multi,
        multi_task_layout=lora_layout(base, 4),
        mean_of=[task.name for task in training],
    )


@pytest.fixture(scope="module")
def found(contest: Contest, questions: dict[str, list[Questions]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return score_all(contest, questions, tmp_path_factory.mktemp("scores"))


def test_questions_are_of_the_test_split_and_prompts_of_the_train_split(
    questions: dict[str, list[Questions]],
) -> None:
    assert set(questions) == {"new_wordings", "new_combinations"}
    for kind, of in questions.items():
        for asked in of:
            assert {one.input for one in (*asked.asked, *asked.choosing)} <= set(TEST)
            assert len(asked.asked) == SIZE.rows
            assert not {one.input for one in asked.asked} & {one.input for one in asked.choosing}
            assert {text for text, _ in asked.shots} <= set(TRAIN)
            assert asked.wording == ("unseen" if kind == "new_wordings" else "seen")
            for wording, lines in asked.prompts.items():
                assert len(lines) == SIZE.prompts
                assert {line.split("\n")[0] for line in lines} == {asked.instructions[wording]}
                assert {line.split("\n")[1] for line in lines} <= set(TRAIN)
            assert asked.instructions["unseen"].startswith("Put")


def test_the_draw_depends_on_the_seed_alone(questions: dict[str, list[Questions]]) -> None:
    again = draw_questions(small_world(), SIZE, seed=0)
    other = draw_questions(small_world(), SIZE, seed=1)
    asked = [[one.asked for one in of["new_combinations"]] for of in (questions, again, other)]
    assert asked[0] == asked[1] != asked[2]


def test_another_tasks_prompts_are_never_ones_own(questions: dict[str, list[Questions]]) -> None:
    for of in questions.values():
        for number, asked in enumerate(of):
            lines = prompts_for(ENTRIES["shuffled"], of, number)
            assert lines != asked.prompts[asked.wording]
            assert lines in [other.prompts[other.wording] for other in of]


def test_prompts_with_solved_examples_have_those_that_the_base_has_in_its_window() -> None:
    asked = draw_questions(small_world(), Size(tasks=4, rows=5, prompts=8), seed=0)["new_combinations"][0]
    for count in (4, 16):
        shots = asked.shots[:count]
        for way, lines in asked.solved[count].items():
            told = [asked.instructions[asked.wording]] if way == BOTH else []
            assert len(lines) == len(set(lines)) == 8
            said = [line.rstrip("\n").split("\n") for line in lines]
            assert all(of[: len(told)] == told and len(of) == len(told) + 9 for of in said)
            used = {(of[len(told) + 2 * n], of[len(told) + 2 * n + 1]) for of in said for n in range(4)}
            assert used == set(shots)


def test_everyone_is_asked_the_same_rows(found: Any, questions: dict[str, list[Questions]]) -> None:
    for kind, of in found.items():
        names = [asked.task.name for asked in questions[kind]]
        for key in LABELS:
            assert sorted(of[key]["scores"]) == sorted(names)
            assert {len(scores) for scores in of[key]["scores"].values()} == {SIZE.rows}


def test_an_own_lora_answers_and_nobody_else_knows(found: Any) -> None:
    rows = {key: sum(map(sum, of["scores"].values())) for key, of in found["new_combinations"].items()}
    assert rows["trained"] == 2 * SIZE.rows
    assert rows["base"] == rows["shuffled"] == 0


def test_tokens_read_grow_with_what_is_in_the_window(found: Any) -> None:
    read = {key: of["tokens_read"] for key, of in found["new_wordings"].items()}
    # <bos>, five letters, a line end.
    assert read["base"] == read["generated"] == read["trained"] == 7
    assert read["generated_beside"] == read["multi_task"] == read["base_instruction"] > 7
    assert read["in_context_16"] > read["in_context_instruction"] > read["in_context"] > read["base_instruction"]
    assert found["new_wordings"]["generated"]["bytes_an_adapter"] > 0
    assert found["new_wordings"]["generated"]["seconds_an_adapter"] > 0


def test_rows_that_are_there_are_not_scored_again(
    contest: Contest, questions: dict[str, list[Questions]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score_all(contest, questions, tmp_path, ["base", "trained"])
    (tmp_path / "new_combinations" / "base.json").unlink()
    scored: list[Any] = []
    score = judging._score
    monkeypatch.setattr(judging, "_score", lambda *args: scored.append(args[1:]) or score(*args))
    again = score_all(contest, questions, tmp_path, ["base", "trained"])
    assert scored == [(ENTRIES["base"], questions["new_combinations"])]
    assert again["new_combinations"]["base"]["scores"] == first["new_combinations"]["base"]["scores"]


def entry(**scores: list[int]) -> dict[str, Any]:
    return {"scores": scores, "tokens_read": 9.0, "seconds": 1.0}


def test_tasks_that_an_own_lora_cannot_do_are_counted_but_not_scored() -> None:
    found = {
        "base": entry(easy=[0, 0], fair=[0, 0], hard=[1, 1]),
        "generated": entry(easy=[1, 0], fair=[1, 1], hard=[0, 0]),
        "shuffled": entry(easy=[0, 0], fair=[0, 1], hard=[0, 0]),
        "trained": entry(easy=[1, 1], fair=[1, 0], hard=[0, 1]),
        "choosing": entry(easy=[1, 1], fair=[1, 0], hard=[0, 0]),
    }
    report = report_of(found, FEW)
    assert (report["tasks"], report["counted"], report["left_out"]) == (3, 2, ["hard"])
    means = {key: row["mean"]["value"] for key, row in report["rows"].items()}
    assert means == {"base": 0, "generated": 0.75, "shuffled": 0.25, "trained": 0.75}
    assert report["rows"]["base"]["over_all_tasks"] == pytest.approx(1 / 3)
    assert report["share_of_gap_closed"]["value"] == 1
    assert report["conditioning_gain"]["value"] == 0.5
    assert report["rows"]["trained"]["generated_minus_this"]["value"] == 0
    assert "choosing" not in report["rows"]


def test_a_kind_without_a_task_that_can_be_done_says_so() -> None:
    found = {
        key: entry(hard=[0, 0], harder=[0, 0]) for key in ("base", "generated", "shuffled", "trained", "choosing")
    }
    report = report_of(found, FEW)
    assert report["counted"] == 0
    assert "mean" not in report["rows"]["base"]
    assert "new operations (0 of 2)" in table({"new_operations": report})


def test_the_table_has_a_row_for_everyone(found: Any) -> None:
    lines = table(reports_of(found, FEW)).splitlines()
    assert lines[0].split(" | ")[1:3] == ["new wordings (4 of 4)", "new combinations (2 of 2)"]
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [
        *LABELS.values(),
        "share of the gap closed",
        "conditioning gain",
    ]
    assert "100.0 (100 to 100)" in next(line for line in lines if LABELS["trained"] in line)


def test_languages_are_asked_on_the_tasks_that_are_known_in_all_of_them(contest: Contest, tmp_path: Path) -> None:
    world = small_world()
    known = world.of("training")[:2]
    for task in known:
        object.__setattr__(task, "write_in", lambda task, language: [f"{language}: {task.name}"])
    asked = draw_in_languages(world, SIZE, seed=0)
    assert [one.task for one in asked] == known
    for one in asked:
        assert {row.input for row in one.rows} <= set(TEST)
        assert one.prompts[ENGLISH][0].startswith("Put")
        assert one.prompts["German"][0].startswith(f"German: {one.task.name}\n")
        assert {lines[0].split("\n")[1] for lines in one.prompts.values()} <= set(TRAIN)
        inputs = [[line.split("\n")[1] for line in lines] for lines in one.prompts.values()]
        assert inputs == [inputs[0]] * 11  # the instruction is what differs
    result = score_in_languages(contest, asked, tmp_path)
    assert result == score_in_languages(contest, asked, tmp_path)
    assert set(result["languages"]) > {ENGLISH, "German", "Hindi"}
    assert set(result["languages"]["German"]["by_task"]) == {task.name for task in known}
    assert len(language_table(result).splitlines()) == 13


def test_shares_of_english_are_of_the_mean(contest: Contest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from language_model import in_languages

    monkeypatch.setattr(in_languages, "languages", lambda: ["German"])
    monkeypatch.setattr(
        in_languages, "_scores", lambda contest, asked, language: {"a": 0.5, "b": 1.0 if language == ENGLISH else 0.1}
    )
    result = score_in_languages(contest, [None, None], tmp_path)  # type: ignore[list-item]
    assert result["languages"]["German"]["share_of_english"] == pytest.approx(0.4)
    assert "| German | 30.0 | 40 |" in language_table(result)
