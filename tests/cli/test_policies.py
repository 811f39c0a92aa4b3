# SPDX-License-Identifier: Apache-2.0
"""Policies on the command line: adapters held against one, and services that do not start without what one needs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.constants import TASK_PROMPTS

from peft_dnd.policy import BehaviourGate, GeneratorPolicy, NormBounds


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


def test_a_service_does_not_start_without_the_base_of_a_gate(run, guarded, tmp_path) -> None:
    start = ("serve", "--generator", f"demo={guarded}", "--cache", tmp_path / "cache", "--port", 0)
    ran = run(*start)
    assert ran.code == 1 and "--gate-base demo=PLACE" in ran.err
    ran = run(*start, "--gate-base", "dmeo=somewhere")
    assert ran.code == 2 and "Did you mean 'demo'?" in ran.err
    ran = run(*start, "--gate-base", "nowhere")
    assert ran.code == 1 and "no base model at 'nowhere'" in ran.err
    assert not list((tmp_path / "cache" / "work").iterdir()), "nothing is left behind"
