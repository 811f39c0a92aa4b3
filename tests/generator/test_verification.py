# SPDX-License-Identifier: Apache-2.0
"""Making an adapter again: what passes for the same, and which edits are caught."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator, StreamedLoraGenerator
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.generator import Verification, verify_adapter
from peft_dnd.generator.rounding import MARGIN


PROMPTS = ["what is the law of the court ?", "a court please", "tax law ."]


@pytest.fixture
def adapter(generator: PromptConditionedLoraGenerator) -> GeneratedAdapter:
    return generator.generate_adapter(PROMPTS)


def edited(adapter: GeneratedAdapter, key: str, place: int, by: float) -> GeneratedAdapter:
    weights = adapter.state_dict()
    weights[key].view(-1)[place] += by
    return GeneratedAdapter(adapter.layout, weights, adapter.provenance)


def with_provenance(adapter: GeneratedAdapter, **values: object) -> GeneratedAdapter:
    kept = {name: value for name, value in {**adapter.provenance, **values}.items() if value is not ...}
    return GeneratedAdapter(adapter.layout, adapter.state_dict(), kept)


def failed(found: Verification) -> list[str]:
    assert not found.passed
    return [check.what for check in found.failed]


def test_an_adapter_is_the_same_wherever_the_weights_lie(
    generator: PromptConditionedLoraGenerator, adapter: GeneratedAdapter, tmp_path: Path
) -> None:
    adapter.save_pretrained(tmp_path)
    read = GeneratedAdapter.from_pretrained(tmp_path)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    for other in (generator, copy.deepcopy(generator)):
        found = verify_adapter(read, other, PROMPTS)
        assert found.passed and not found.failed, found.checks
        # An honest difference stays well below what is allowed, and that is little beside the weights themselves.
        for key, tensor in read.state_dict().items():
            assert MARGIN * found.differences[key] < found.tolerances[key] < 2e-3 * float(tensor.abs().max())
    # Varying the weights left them as they were.
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())
    assert verify_adapter(read.to(torch.bfloat16), generator, PROMPTS).passed


def test_an_edit_of_one_weight_is_caught_from_the_tolerance_on(
    generator: PromptConditionedLoraGenerator, adapter: GeneratedAdapter
) -> None:
    allowed = verify_adapter(adapter, generator, PROMPTS).tolerances
    for key in (min(allowed, key=allowed.__getitem__), max(allowed, key=allowed.__getitem__)):
        caught = verify_adapter(edited(adapter, key, 3, 1.5 * allowed[key]), generator, PROMPTS)
        assert failed(caught) == ["weights"] and repr(key) in caught.failed[0].said
        # What lies below is not seen: so much is promised, and no more.
        assert verify_adapter(edited(adapter, key, 3, -0.5 * allowed[key]), generator, PROMPTS).passed
    assert failed(verify_adapter(edited(adapter, key, 0, 1e3), generator, PROMPTS)) == ["weights"]


def test_other_prompts_generators_and_stories_are_caught(
    generator: PromptConditionedLoraGenerator, adapter: GeneratedAdapter
) -> None:
    assert failed(verify_adapter(adapter, generator, PROMPTS[::-1])) == ["prompts"]
    assert failed(verify_adapter(adapter, generator, PROMPTS[:2])) == ["prompts"]
    other = copy.deepcopy(generator)
    with torch.no_grad():
        max(other.decoder.parameters(), key=torch.Tensor.numel).mul_(1.01)
    assert failed(verify_adapter(adapter, other, PROMPTS)) == ["generator", "weights"]
    assert failed(verify_adapter(with_provenance(adapter, seed=...), generator, PROMPTS)) == ["provenance"]
    assert failed(verify_adapter(with_provenance(adapter, generator_sha256="0" * 64), generator, PROMPTS)) == [
        "generator"
    ]
    # An earlier version's says less, and is compared all the same.
    old = verify_adapter(with_provenance(adapter, generator_sha256=...), generator, PROMPTS)
    assert old.passed and [check.passed for check in old.checks if check.what == "generator"] == [None]


def test_what_was_drawn_towards_the_mean_adapter_is_made_again(generator: PromptConditionedLoraGenerator) -> None:
    knowing = copy.deepcopy(generator)
    knowing.fit_out_of_distribution({"law": PROMPTS, "med": ["a doctor", "medicine ?"], "geo": ["river", "a capital"]})
    junk = ["b c d e f g h", "? ? . , ?"]
    for action in ("shrink", "mean", "ignore"):
        made = knowing.generate_adapter(junk, out_of_distribution=action, threshold=0.01)
        assert verify_adapter(made, knowing, junk).passed
    shrunk = knowing.generate_adapter(junk, out_of_distribution="shrink", threshold=0.01)
    # The weights of one story, and another story told of them.
    assert failed(verify_adapter(with_provenance(shrunk, shrunk_by=...), knowing, junk)) == ["fallback", "weights"]
    liar = with_provenance(shrunk, out_of_distribution_action="none")
    assert failed(verify_adapter(liar, knowing, junk)) == ["fallback"]
    assert "score" in failed(verify_adapter(with_provenance(shrunk, out_of_distribution=0.2), knowing, junk))


def test_a_scale_that_was_edited_is_caught(
    generator: PromptConditionedLoraGenerator, adapter: GeneratedAdapter, tmp_path: Path
) -> None:
    adapter.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "lora_alpha": 64}), encoding="utf-8")
    assert failed(verify_adapter(GeneratedAdapter.from_pretrained(tmp_path), generator, PROMPTS)) == ["layout"]


def test_a_streamed_generator_is_refused(generator_folder: Path, adapter: GeneratedAdapter) -> None:
    with pytest.raises(GeneratorConfigError, match="does not hold"):
        verify_adapter(adapter, StreamedLoraGenerator.from_pretrained(generator_folder), PROMPTS)
