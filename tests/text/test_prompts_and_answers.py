# SPDX-License-Identifier: Apache-2.0
"""Prompts, prompts with answers, a mix, answers: from pairs folder to generated adapter; and how many of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.collecting import adapter, fresh_adapter, train

from peft_dnd import (
    AdapterLayout,
    CheckpointCollector,
    DnDConfig,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointCollator,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.cli.app import main
from peft_dnd.errors import CorruptFileError, GeneratorConfigError, PairsFolderError, PromptError, PromptTypeError
from peft_dnd.pairs.writer import PairWriter
from peft_dnd.text.prompts import ConditionText, check_prompts
from peft_dnd.text.prompts_and_answers import condition_texts


FORMS = ("prompts_and_answers", "mixed", "answers")
TASKS = {
    "law": [("what is the law ?", "a tax"), ("what court ?", "the court"), ("a court please", "in word")] * 4,
    "med": [("what is medicine ?", "a doctor"), ("doctor please", "the medicine"), ("a doctor", "is a doctor")] * 4,
}
PROMPTS = {task: [f"{prompt} {i}" for i, (prompt, _) in enumerate(rows)] for task, rows in TASKS.items()}
ANSWERS = {task: [f"{answer} {i}" for i, (_, answer) in enumerate(rows)] for task, rows in TASKS.items()}


@pytest.fixture
def answered(layout: AdapterLayout, tmp_path: Path) -> Path:
    """A pairs folder of two tasks of twelve prompts with their answers."""
    for number, task in enumerate(TASKS):
        writer = PairWriter(tmp_path / "pairs" / task, PROMPTS[task], layout, answers=ANSWERS[task])
        writer.begin("sha256:0")
        for step in (1, 2):
            writer.add(adapter(layout, 10 * number + step), step)
        writer.close()
    return tmp_path / "pairs"


@pytest.fixture
def reading(generator: PromptConditionedLoraGenerator) -> Any:
    """Makes a generator that passes for one fitted to texts of another form."""

    def make(condition_text: str, **settings: Any) -> PromptConditionedLoraGenerator:
        other = copy.deepcopy(generator)
        for name, value in {"condition_text": condition_text, **settings}.items():
            setattr(other.config, name, value)
        return other

    return make


def same(first: GeneratedAdapter, second: GeneratedAdapter) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


class TestForms:
    def test_each_form(self):
        prompts, answers = ["a ?", "b ?"], ["1", "2"]
        assert condition_texts(prompts, None, "prompts") == ("a ?", "b ?")
        assert condition_texts(prompts, answers, "prompts_and_answers") == ("a ?\n1", "b ?\n2")
        assert condition_texts(prompts, answers, "answers") == ("1", "2")

    @pytest.mark.parametrize("ratio", [0, 0.2, 0.5, 0.35, 1])
    def test_a_mix_has_the_stated_share(self, ratio):
        prompts, answers = [f"{i} ?" for i in range(40)], [str(i) for i in range(40)]
        texts = condition_texts(prompts, answers, "mixed", answer_ratio=ratio, seed=3)
        assert sum("\n" in text for text in texts) == round(40 * ratio)
        assert [text.split("\n")[0] for text in texts] == prompts
        assert all(text.split("\n")[1:] in ([], [str(i)]) for i, text in enumerate(texts))

    def test_which_ones_is_the_seeds_choice(self):
        prompts, answers = [f"{i} ?" for i in range(40)], [str(i) for i in range(40)]
        mixes = [condition_texts(prompts, answers, "mixed", seed=seed) for seed in (0, 0, 1)]
        assert mixes[0] == mixes[1] != mixes[2]

    @pytest.mark.parametrize("form", FORMS)
    def test_missing_answers_say_what_to_do(self, form):
        with pytest.raises(PromptError, match=r"prompts came without answers\. Pass answers=.*ConditionText\(text\)"):
            condition_texts(["a ?"], None, form)

    def test_texts_that_are_formed_already_are_taken(self):
        texts = condition_texts(["a ?", "b ?"], ["1", "2"], "prompts_and_answers")
        assert condition_texts(list(texts)[:1], None, "mixed") == texts[:1]
        assert all(type(text) is ConditionText for text in check_prompts(texts))
        assert type(check_prompts(["a"])[0]) is str
        with pytest.raises(PromptError, match="without answers"):
            condition_texts([texts[0], "b ?"], None, "answers")

    def test_answers_that_nobody_reads(self):
        with pytest.raises(PromptError, match=r"reads prompts alone, .* came with answers\. Leave them out"):
            condition_texts(["a ?"], ["1"], "prompts")

    @pytest.mark.parametrize(
        ("answers", "error", "words"),
        [
            (["1"], PromptError, r"There are 1 answers to 2 prompts"),
            (["1", ""], PromptError, r"the answers to prompts\[1\] is empty"),
            (["1", None], PromptTypeError, r"the answers to prompts\[1\] must be a string"),
            ("12", PromptTypeError, r"the answers to prompts must be a list"),
        ],
    )
    def test_unusable_answers(self, answers, error, words):
        with pytest.raises(error, match=words):
            condition_texts(["a ?", "b ?"], answers, "answers")


class TestPairs:
    def test_answers_are_read_as_they_were_written(self, answered):
        pairs = PromptCheckpointDataset.from_folder(answered)
        for task in TASKS:
            assert pairs.prompts(task) == tuple(PROMPTS[task])
            assert pairs.answers(task) == tuple(ANSWERS[task])
        row = json.loads((answered / "law" / "prompts.jsonl").read_text().splitlines()[0])
        assert row == {"prompt": "what is the law ? 0", "answer": "a tax 0"}

    def test_folders_without_answers_are_read_as_ever(self, pairs):
        assert [pairs.answers(task) for task in pairs.tasks] == [None] * 4
        with pytest.raises(PromptError, match="the prompts of task 'art' came without answers"):
            pairs.with_condition("answers")

    def test_collector_writes_them(self, fresh_base, lora_config, tmp_path):
        collector = CheckpointCollector(tmp_path / "pairs" / "law", ["a ?", "b ?"], answers=["1", "2"], last=1)
        train(fresh_adapter(fresh_base, lora_config), tmp_path / "out", collector, max_steps=1)
        pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
        assert (pairs.prompts("law"), pairs.answers("law")) == (("a ?", "b ?"), ("1", "2"))
        with pytest.raises(PromptError, match="There are 1 answers to 2 prompts"):
            CheckpointCollector(tmp_path / "pairs" / "tax", ["a ?", "b ?"], answers=["1"])

    @pytest.mark.parametrize(
        ("line", "error", "words"),
        [
            ('{"prompt": "a ?"}', PairsFolderError, r"Line 2 of .* has no answer, and 11 of its 12 lines have one"),
            ('{"prompt": "a ?", "answer": 4}', CorruptFileError, r'Line 2 of .* is not {"answer": "\.\.\."}'),
        ],
    )
    def test_files_edited_by_hand(self, answered, line, error, words):
        path = answered / "law" / "prompts.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], line, *lines[2:]]))
        with pytest.raises(error, match=words):
            PromptCheckpointDataset.from_folder(answered)

    @pytest.mark.parametrize("form", FORMS)
    def test_texts_stand_in_place_of_the_prompts(self, answered, form):
        pairs = PromptCheckpointDataset.from_folder(answered)
        formed = pairs.with_condition(form, 0.25)
        for task in TASKS:
            texts = formed.prompts(task)
            with_answer = [text for text in texts if "\n" in text]
            assert len(with_answer) == {"prompts_and_answers": 12, "mixed": 3, "answers": 0}[form]
            assert set(texts) <= {
                *PROMPTS[task],
                *ANSWERS[task],
                *(f"{p}\n{a}" for p, a in zip(PROMPTS[task], ANSWERS[task], strict=True)),
            }
        assert formed[0]["prompts"] is formed.prompts("law")
        assert torch.equal(*(next(iter(each[3]["state_dict"].values())) for each in (pairs, formed)))
        assert formed.with_condition(form, 0.25) is formed
        with pytest.raises(PairsFolderError, match=rf"stand texts of the form '{form}' already"):
            formed.with_condition("prompts")

    def test_a_mix_is_each_tasks_own_and_survives_a_split(self, answered):
        mixed = PromptCheckpointDataset.from_folder(answered).with_condition("mixed")
        alone = PromptCheckpointDataset.from_folder(answered, tasks=["med"]).with_condition("mixed")
        assert mixed.prompts("med") == alone.prompts("med") == mixed.split(["law"])[0].prompts("med")
        other = PromptCheckpointDataset.from_folder(answered, seed=5).with_condition("mixed")
        assert mixed.prompts("med") != other.prompts("med")


class NoStates:
    """A collator needs somebody to read prompts, even if only the prompts are looked at."""

    def states(self, task: str, prompts: Any) -> Any:
        raise NotImplementedError


def drawn(pairs: PromptCheckpointDataset, collator: Any, epochs: int = 12) -> list[tuple[str, ...]]:
    """What every item of the task law reads, in some epochs."""
    return [tuple(collator([pairs[epoch, item]])["prompts"][0]) for epoch in range(epochs) for item in (0, 1)]


class TestNumberOfPrompts:
    @pytest.fixture
    def collator(self, generator: PromptConditionedLoraGenerator) -> PromptCheckpointCollator:
        return PromptCheckpointCollator(NoStates(), generator.weight_tokenizer, 4, 16, encode=False)

    def test_a_fixed_set_stays_fixed(self, answered, collator):
        pairs = PromptCheckpointDataset.from_folder(answered).with_condition(prompt_pool_size=4)
        sets = drawn(pairs, collator)
        assert set(sets) == {pairs.prompts("law")}
        assert list(sets[0]) == [prompt for prompt in PROMPTS["law"] if prompt in sets[0]]
        whole = drawn(PromptCheckpointDataset.from_folder(answered), collator)
        assert len(set(whole)) > 20

    def test_n_are_drawn_of_x(self, answered, collator):
        pairs = PromptCheckpointDataset.from_folder(answered).with_condition(prompt_pool_size=7)
        sets = drawn(pairs, collator)
        assert len(pairs.prompts("law")) == 7
        assert len(set(sets)) > 12
        assert {prompt for each in sets for prompt in each} == set(pairs.prompts("law"))

    def test_answers_stay_with_their_prompts(self, answered):
        pairs = PromptCheckpointDataset.from_folder(answered).with_condition("prompts_and_answers", prompt_pool_size=5)
        known = dict(zip(PROMPTS["law"], ANSWERS["law"], strict=True))
        assert all(known[prompt] == answer for prompt, answer in (text.split("\n") for text in pairs.prompts("law")))
        assert [text.split("\n")[1] for text in pairs.prompts("law")] == list(pairs.answers("law"))

    def test_pools_are_seeded_and_larger_ones_are_all(self, answered):
        pairs = PromptCheckpointDataset.from_folder(answered)
        assert pairs.with_condition(prompt_pool_size=5).prompts("law") == pairs.with_condition(
            prompt_pool_size=5
        ).prompts("law")
        other = PromptCheckpointDataset.from_folder(answered, seed=1)
        assert pairs.with_condition(prompt_pool_size=5).prompts("law") != other.with_condition(
            prompt_pool_size=5
        ).prompts("law")
        assert pairs.with_condition(prompt_pool_size=12) is pairs
        with pytest.raises(GeneratorConfigError, match="prompt_pool_size must be at least 1, got 0"):
            pairs.with_condition(prompt_pool_size=0)


class TestTrainer:
    def trainer(self, pairs: Any, encoder_folder: Path, tmp_path: Path, held_out: Any = None, **settings: Any) -> Any:
        config = PromptConditionedLoraGeneratorConfig.from_adapters(
            pairs,
            str(encoder_folder),
            num_prompts=4,
            decoder_type="hyper_convolution",
            decoder_config={"kernel_size": 3},
            **settings,
        )
        arguments = DnDTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            prompt_pool_size=6,
        )
        return DnDTrainer(
            PromptConditionedLoraGenerator(config),
            arguments,
            pairs,
            held_out,
            adapter_scorer=lambda task, adapter: 1.0,
        )

    def test_reads_what_the_configuration_says(self, answered, encoder_folder, tmp_path):
        train_pairs, held_out = PromptCheckpointDataset.from_folder(answered).split(["med"])
        settings = {"condition_text": "mixed", "answer_ratio": 0.5}
        trainer = self.trainer(train_pairs, encoder_folder, tmp_path / "out", held_out, **settings)
        texts = trainer.pairs.prompts("law")
        assert len(texts) == 6
        assert sum("\n" in text for text in texts) == 3
        assert len(trainer.eval_dataset.prompts("med")) == 12
        trainer.train()
        assert trainer.evaluate()["eval_score"] == 1.0
        saved = PromptConditionedLoraGenerator(trainer.generator.config)
        assert (saved.config.condition_text, saved.config.answer_ratio) == ("mixed", 0.5)

    def test_length_is_that_of_the_texts(self, answered, encoder_folder):
        pairs = PromptCheckpointDataset.from_folder(answered)
        lengths = {
            form: PromptConditionedLoraGeneratorConfig.from_adapters(
                pairs, str(encoder_folder), condition_text=form
            ).max_prompt_length
            for form in ("prompts", "prompts_and_answers")
        }
        assert lengths["prompts"] < lengths["prompts_and_answers"]

    def test_tasks_without_answers_are_refused_before_the_fit(self, pairs, encoder_folder, tmp_path):
        with pytest.raises(PromptError, match="the prompts of task 'art' came without answers"):
            self.trainer(pairs, encoder_folder, tmp_path, condition_text="answers")

    def test_impossible_pool(self, tmp_path):
        with pytest.raises(GeneratorConfigError, match="prompt_pool_size must be at least 1, got 0"):
            DnDTrainingArguments(output_dir=str(tmp_path), prompt_pool_size=0)


class TestGeneration:
    prompts, answers = PROMPTS["law"][:4], ANSWERS["law"][:4]

    @pytest.mark.parametrize("form", FORMS)
    def test_reads_the_texts_of_its_form(self, generator, reading, form):
        texts = condition_texts(self.prompts, self.answers, form, seed=7)
        expected = generator.generate_adapter([str(text) for text in texts], seed=7)
        other = reading(form)
        assert same(other.generate_adapter(self.prompts, answers=self.answers, seed=7), expected)
        assert same(other.generate_adapter(texts, seed=7), expected)
        many = other.generate_adapter({"law": self.prompts}, answers={"law": self.answers}, seed=7)
        assert same(many["law"], expected)

    def test_forms_are_read_differently(self, reading):
        written = [reading(form).generate_adapter(self.prompts, answers=self.answers) for form in FORMS]
        assert not any(same(written[i], written[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    def test_the_card_says_what_is_read(self, reading):
        assert "| 4 prompts, 20% of them with their answers, of up to 16 tokens" in reading("mixed").model_card()
        assert "layer 3 |" in reading("prompts", text_encoder_layer=3, text_encoder="org/model").model_card()

    def test_missing_and_unread_answers(self, generator, reading):
        with pytest.raises(PromptError, match=r"reads prompts with their answers, and prompts came without answers"):
            reading("prompts_and_answers").generate_adapter(self.prompts)
        with pytest.raises(PromptError, match=r"the prompts of task 'med' came without answers"):
            reading("answers").generate_adapters({"law": self.prompts, "med": ["a"]}, answers={"law": self.answers})
        with pytest.raises(PromptError, match="reads prompts alone"):
            generator.generate_adapter(self.prompts, answers=self.answers)

    def test_through_peft(self, reading, fresh_base):
        from peft import get_peft_model

        other = reading("prompts_and_answers")
        config = DnDConfig(generator=other, prompts=self.prompts, answers=self.answers)
        model = get_peft_model(fresh_base(), config)
        weights = dict(model.state_dict())
        for key, tensor in other.generate_adapter(self.prompts, answers=self.answers).state_dict().items():
            assert torch.equal(weights[f"{key.removesuffix('.weight')}.default.weight"], tensor)
        assert "answers" not in config.to_dict()
        with pytest.raises(PromptError, match="came without answers"):
            DnDConfig(generator=other, prompts=self.prompts)

    def test_from_the_shell(self, reading, tmp_path, capsys):
        other = reading("prompts_and_answers")
        other.save_pretrained(tmp_path / "generator")
        rows = [{"prompt": p, "answer": a} for p, a in zip(self.prompts, self.answers, strict=True)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (tmp_path / "prompts.txt").write_text("\n".join(self.prompts), encoding="utf-8")
        arguments = ["generate", str(tmp_path / "generator"), str(tmp_path / "rows.jsonl"), str(tmp_path / "adapter")]
        assert main(arguments) == 0
        expected = other.generate_adapter(self.prompts, answers=self.answers)
        assert same(GeneratedAdapter.from_pretrained(tmp_path / "adapter"), expected)
        assert main([*arguments[:2], str(tmp_path / "prompts.txt"), str(tmp_path / "none")]) == 1
        assert 'one {"prompt": "...", "answer": "..."} a line' in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
