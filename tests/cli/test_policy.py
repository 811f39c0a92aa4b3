# SPDX-License-Identifier: Apache-2.0
"""Policies on the command line: set, shown and taken away; adapters held against one; services that need its base."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.comparing import bytes_below
from support.constants import TASK_PROMPTS

from peft_dnd import PromptConditionedLoraGenerator
from peft_dnd.cli.policy import _PARTS
from peft_dnd.pairs.store_update import StoreBounds, updated_store
from peft_dnd.policy import BehaviourGate, GeneratorPolicy, NormBounds
from peft_dnd.policy.policy import PARTS


@pytest.fixture
def guarded(generator, pairs, base_model, word_tokenizer, tmp_path: Path) -> Path:
    own = copy.deepcopy(generator)
    gate = BehaviourGate.from_prompts(TASK_PROMPTS["geo"], base_model, word_tokenizer, bound=50.0, answer_tokens=2)
    own.set_policy(GeneratorPolicy(norms=NormBounds.calibrate(pairs, base_model), gate=gate))
    own.save_pretrained(tmp_path / "guarded")
    own.generate_adapter(TASK_PROMPTS["law"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "guarded"


def test_an_adapter_is_held_against_a_policy(run, guarded, base_folder, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    ran = run("inspect", adapter, "--policy-of", guarded, "--json")
    assert ran.code == 0, ran.err
    assert ran.facts["policy"]["kept"] and "the base" in ran.facts["policy"]["not_checked"]
    assert "bounded, relative to the base's weights" in run("inspect", guarded, "--json").facts["policy"]
    ran = run("inspect", adapter, "--policy-of", guarded, "--gate-base", base_folder, "--json")
    assert ran.code == 0 and ran.facts["policy"]["not_checked"] is None, ran.err
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({key: 100 * value for key, value in weights.items()}, adapter / "adapter_model.safetensors")
    ran = run("inspect", adapter, "--policy-of", guarded)
    assert ran.code == 1 and "wrong: policy: the update of" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{adapter}", "--gate-base", "x"), 2, "goes with --policy-of"),
        (("{guarded}", "--policy-of", "{guarded}"), 1, "is for adapters"),
        (("{adapter}", "--policy-of", "{plain}"), 1, "has no policy"),
        (("{adapter}", "--policy-of", "nowhere"), 1, "no generator at 'nowhere'"),
        (("{adapter}", "--policy-of", "{guarded}", "--gate-base", "nowhere"), 1, "no base model at 'nowhere'"),
    ],
)
def test_mistakes(run, guarded, generator_folder, tmp_path, arguments, code, message) -> None:
    places = {"adapter": tmp_path / "adapter", "guarded": guarded, "plain": generator_folder}
    ran = run("inspect", *(argument.format(**places) for argument in arguments))
    assert ran.code == code and message in ran.err, ran.err


def test_the_parts_are_called_as_a_policy_calls_them() -> None:
    assert _PARTS == PARTS  # the command's own copy spares it the library's import


@pytest.mark.usefixtures("logging_as_it_was")
def test_a_service_does_not_start_without_the_base_of_a_gate(run, guarded, tmp_path) -> None:
    start = ("serve", "--generator", f"demo={guarded}", "--cache", tmp_path / "cache", "--port", 0)
    ran = run(*start)
    assert ran.code == 1 and "--gate-base demo=PLACE" in ran.err
    ran = run(*start, "--gate-base", "dmeo=somewhere")
    assert ran.code == 2 and "Did you mean 'demo'?" in ran.err
    ran = run(*start, "--gate-base", "nowhere")
    assert ran.code == 1 and "no base model at 'nowhere'" in ran.err
    assert not list((tmp_path / "cache" / "work").iterdir()), "nothing is left behind"


@pytest.fixture
def own_folder(generator, pairs, tmp_path: Path) -> Path:
    """A generator that keeps all its tasks in a replay store."""
    own = copy.deepcopy(generator)
    own.replay_store = updated_store(None, pairs, pairs.tasks, own.adapter_packing(), "prompts", StoreBounds(1.0))
    own.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


class TestSetting:
    def test_part_by_part_and_taken_away(self, run, own_folder, base_folder, pairs, base_model, tmp_path) -> None:
        before = bytes_below(own_folder)
        ran = run("policy", own_folder)
        assert ran.code == 0 and "There is no policy" in ran.out and bytes_below(own_folder) == before
        ran = run("policy", own_folder, "--norms", "--base", base_folder, "--never-write", "*.down_proj", "--json")
        assert ran.code == 0, ran.err
        assert ran.facts["policy"]["norms"]["tasks"] == 4 and ran.facts["card_written"] is True
        loaded = PromptConditionedLoraGenerator.from_pretrained(own_folder)
        assert loaded.policy.never_written == ("*.down_proj",)
        of_pairs = NormBounds.calibrate(pairs, base_model)  # of all checkpoints, where the store has their mean
        assert loaded.policy.norms.total == pytest.approx(of_pairs.total, rel=0.1)
        (tmp_path / "gate.txt").write_text("what is the law ?\nriver ?\n", encoding="utf-8")
        ran = run("policy", own_folder, "--gate", tmp_path / "gate.txt", "--gate-bound", 0.5, "--base", base_folder)
        assert ran.code == 0 and "On 2 held-out prompts" in ran.out and "Never written" in ran.out, ran.err
        (tmp_path / "med.jsonl").write_text(
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in TASK_PROMPTS["med"]), encoding="utf-8"
        )
        refuse = ("--refuse", f"health={tmp_path / 'med.jsonl'}", "--leave-out", "med")
        ran = run("policy", own_folder, *refuse, "--json", "-q")
        assert ran.code == 0 and ran.facts["policy"]["refused"]["tasks"] == 3, ran.err
        assert ran.facts["policy"]["gate"]["bound"] == 0.5 and ran.facts["policy"]["norms"], "the other parts stay"
        assert "medicine" not in ran.out
        card = (own_folder / "README.md").read_text(encoding="utf-8")
        assert "health (from 4 examples" in card and "`*.down_proj`" in card
        after = bytes_below(own_folder)
        changed = {"README.md", "config.json", "checksums.json", "peft_dnd_summary.json", "policy.safetensors"}
        assert {name for name in after if after[name] != before.get(name)} == changed
        sizes = json.loads(after["peft_dnd_summary.json"])["files"]
        assert sizes["policy.safetensors"] == len(after["policy.safetensors"])
        loaded = PromptConditionedLoraGenerator.from_pretrained(own_folder)
        assert [one.name for one in loaded.policy.refused.classes] == ["health"]
        assert run("policy", own_folder, "--json").facts["policy"] == loaded.config.policy
        ran = run("policy", own_folder, "--remove", "refused", "--remove", "gate")
        assert ran.code == 0 and "Refused" not in ran.out and "bounded" in ran.out
        assert run("policy", own_folder, "--remove", "all").code == 0
        assert bytes_below(own_folder) == before, "as if there had never been one"

    def test_from_pairs_where_the_generator_keeps_nothing(
        self, run, generator_folder, pairs_folder, base_folder, tmp_path
    ) -> None:
        folder = tmp_path / "copy"
        run_copy = bytes_below(generator_folder)
        for name, content in run_copy.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        ran = run("policy", folder, "--norms")
        assert ran.code == 1 and "--pairs FOLDER" in ran.err
        prompts = tmp_path / "gate.txt"
        prompts.write_text("what is the law ?\n", encoding="utf-8")
        asked = ("--gate", prompts, "--base", base_folder)
        ran = run("policy", folder, "--norms", *asked, "--pairs", pairs_folder, "--above", "refuse", "--json")
        assert ran.code == 0, ran.err
        assert ran.facts["policy"]["gate"]["tasks"] == ran.facts["policy"]["norms"]["tasks"] == 4
        assert ran.facts["policy"]["norms"]["above"] == "refuse" and ran.facts["policy"]["norms"]["base"]

    def test_a_card_of_ones_own_stays(self, run, own_folder) -> None:
        (own_folder / "README.md").write_text("Mine.", encoding="utf-8")
        ran = run("policy", own_folder, "--never-write", "*.down_proj")
        assert ran.code == 0 and "stays as it is" in ran.out
        assert (own_folder / "README.md").read_text(encoding="utf-8") == "Mine."

    def test_an_edit_of_something_else_is_not_made_good(self, run, own_folder) -> None:
        config = json.loads((own_folder / "config.json").read_text(encoding="utf-8"))
        (own_folder / "config.json").write_text(json.dumps({**config, "answer_ratio": 0.5}), encoding="utf-8")
        before = bytes_below(own_folder)
        ran = run("policy", own_folder, "--never-write", "*.down_proj")
        assert ran.code == 1 and "answer_ratio" in ran.err and bytes_below(own_folder) == before

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("--never-write", "*.down_prj"), 1, "down_proj"),
            (("--above", "refuse"), 2, "--above goes with --norms"),
            (("--gate", "x.txt"), 2, "--gate goes with --base"),
            (("--false-alarms", "0.1"), 2, "--false-alarms goes with --norms"),
            (("--norms", "--false-alarms", "2"), 1, "between 0 and 1"),
            (("--refuse", "health"), 2, "CLASS=FILE"),
            (("--refuse", "health=nowhere.txt"), 1, "'nowhere.txt' does not exist"),
            (("--refuse", "health={med}", "--leave-out", "mde"), 1, "Did you mean 'med'?"),
            (("--refuse", "health={empty}"), 1, "is empty"),
            (("--refuse", "a={med}", "--refuse", "a={med}"), 2, "--refuse names 'a' twice"),
            (("--remove", "gate"), 1, "no such part"),
            (("--remove", "gat"), 2, "Did you mean 'gate'?"),
            (("--norms", "--pairs", "nowhere/else/at/all"), 1, "nowhere/else/at/all"),
            (("--norms", "--base", "nowhere"), 1, "no base model at 'nowhere'"),
        ],
    )
    def test_what_goes_wrong_leaves_the_folder(self, run, own_folder, tmp_path, arguments, code, message) -> None:
        (tmp_path / "med.txt").write_text("\n".join(TASK_PROMPTS["med"]), encoding="utf-8")
        (tmp_path / "empty.txt").write_text("", encoding="utf-8")
        before = bytes_below(own_folder)
        places = {"med": tmp_path / "med.txt", "empty": tmp_path / "empty.txt"}
        ran = run("policy", own_folder, *(argument.format(**places) for argument in arguments))
        assert ran.code == code and message in ran.err, ran.err
        assert bytes_below(own_folder) == before

    def test_a_hub_id_or_a_wrong_folder(self, run, tmp_path) -> None:
        ran = run("policy", "org/generator", "--never-write", "*.down_proj")
        assert ran.code == 1 and "is no folder here" in ran.err
        ran = run("policy", tmp_path)
        assert ran.code == 1 and "no generator's folder" in ran.err
