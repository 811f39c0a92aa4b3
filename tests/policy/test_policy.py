# SPDX-License-Identifier: Apache-2.0
"""A policy: where its bounds come from, that they are held, and that they travel with the generator."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.constants import LORA_CONFIG
from support.hub_state import HubServer

from peft_dnd import (
    AdapterLayout,
    DnDConfig,
    GeneratedAdapter,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    StreamedLoraGenerator,
)
from peft_dnd.adapters import layout_from_config
from peft_dnd.errors import CorruptFileError, FormatVersionError, PolicyError
from peft_dnd.generator import renew_checksums
from peft_dnd.policy import BehaviourGate, GeneratorPolicy, NormBounds, RefusedPrompts, upper_bound

from .conftest import REFUSED, TASKS, WELCOME


pytest_plugins = ("support.hub_server",)


def update(layout: AdapterLayout, matrices: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    module = next(module for module in layout.modules if module.name == name)
    a, b = (matrices[tensor.key].double() for tensor in module.tensors)
    return layout.scaling(module) * b @ a


def scaled(adapter: GeneratedAdapter, factor: float) -> GeneratedAdapter:
    matrices = {key: m * (factor if "lora_B" in key else 1) for key, m in adapter.state_dict().items()}
    return GeneratedAdapter(adapter.layout, matrices, adapter.provenance)


class TestBounds:
    def test_a_new_value_is_above_the_bound_as_often_as_is_said(self) -> None:
        draws = torch.randn(9, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        above = (draws[8] > upper_bound(draws[:8], 0.05)).double().mean()
        # Never below the largest value seen, which makes it a little rarer.
        assert 0.035 < float(above) <= 0.055

    def test_norms_are_those_of_the_updates_to_those_of_the_base(self, bounds, pairs, base_model) -> None:
        layout, name = pairs.layout, pairs.layout.modules[3].name
        weight = base_model.get_submodule(name).weight.detach().double()
        seen = [
            float(update(layout, pairs.state_dict(task, number), name).norm() / weight.norm())
            for task in pairs.tasks
            for number in range(3)
        ]
        assert bounds.modules[name] >= max(seen) and bounds.base[name] == pytest.approx(float(weight.norm().detach()))
        assert bounds.tasks == 4 and not any(bounds.excess(layout, pairs.state_dict(task)) for task in pairs.tasks), (
            "what it was calibrated on is within"
        )
        absolute = NormBounds.calibrate(pairs)
        assert absolute.modules[name] == pytest.approx(bounds.modules[name] * bounds.base[name], rel=1e-6)
        assert NormBounds.calibrate(pairs, false_alarms=0.2).modules[name] < absolute.modules[name]

    def test_what_is_above_is_shrunk_to_its_bound_and_no_other_way(self, bounds, pairs) -> None:
        layout, name = pairs.layout, pairs.layout.modules[0].name
        matrices = pairs.state_dict("law")
        key = layout.modules[0].tensors[1].key
        matrices[key] = matrices[key] * 1000
        held, factors = bounds.hold(layout, matrices)
        assert set(factors) == {name} or set(factors) == {name, "all modules together"}
        before, after = update(layout, matrices, name), update(layout, held, name)
        assert float(after.norm()) <= bounds.modules[name] * bounds.base[name]
        cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), 0)
        assert float(cosine) == pytest.approx(1)
        assert bounds.excess(layout, held) == {}
        with pytest.raises(PolicyError, match=name) as refusal:
            replace(bounds, above="refuse").hold(layout, matrices)
        assert refusal.value.reason == "norm"

    def test_too_little_to_calibrate_on(self, pairs) -> None:
        two, _ = pairs.split(["geo", "art"])
        with pytest.raises(PolicyError, match="3 tasks with checkpoints or more, got 2"):
            NormBounds.calibrate(two)
        with pytest.raises(PolicyError, match="false_alarms"):
            NormBounds.calibrate(pairs, false_alarms="0.1")
        with pytest.raises(PolicyError, match="'shrink'"):
            NormBounds.calibrate(pairs, above="shrnk")


class TestThresholds:
    """In a made-up space, where as many new tasks as one likes can be drawn."""

    @pytest.fixture
    def space(self) -> dict[str, torch.Tensor]:
        return {}

    @staticmethod
    def drawn(space: dict[str, torch.Tensor], centre: torch.Tensor, count: int, chance: torch.Generator) -> list[str]:
        rows = centre + 0.5 * torch.randn(count, len(centre), generator=chance) / len(centre) ** 0.5
        names = [f"text {len(space) + number}" for number in range(count)]
        space.update(zip(names, torch.nn.functional.normalize(rows, dim=1), strict=True))
        return names

    def test_welcome_tasks_are_refused_as_rarely_as_is_said_and_a_class_as_a_whole(self, space) -> None:
        chance = torch.Generator().manual_seed(0)
        common, refused = torch.nn.functional.normalize(torch.randn(2, 32, generator=chance), dim=1)

        def task(count: int = 16, towards: float = 0.0) -> list[str]:
            own = torch.nn.functional.normalize(torch.randn(32, generator=chance), dim=0)
            return self.drawn(space, common + own + towards * refused, count, chance)

        def read(texts: Sequence[str]) -> torch.Tensor:
            return torch.stack([space[text] for text in texts])

        def views(text: str) -> tuple[str, ...]:
            return (text,)

        known = RefusedPrompts.fit(
            {"class": self.drawn(space, common + refused, 32, chance)},
            {f"task {number}": task() for number in range(16)},
            read,
            views,
            false_alarms=0.1,
        )

        def share(sets: list[list[str]]) -> float:
            return sum(bool(known.refused(prompts, read, views)) for prompts in sets) / len(sets)

        assert share([task() for _ in range(400)]) < 0.13
        assert share([task(1) for _ in range(400)]) < 0.13
        assert share([self.drawn(space, common + refused, 16, chance) for _ in range(20)]) == 1
        far = [task(towards=0.5) for _ in range(200)]
        limit = known.classes[0].threshold
        by_one_alone = sum(bool((known.scores(prompts, read, views) > limit).any()) for prompts in far) / len(far)
        assert share(far) > by_one_alone + 0.05 and share(far) > 0.6, "together they are told where none is by itself"


class TestGenerating:
    def test_modules_that_are_never_written(self, own, base_model) -> None:
        plain = own.generate_adapter(WELCOME).state_dict()
        own.set_policy(GeneratorPolicy(never_written=["*.mlp.*", "model.layers.1.self_attn.q_proj"]))
        adapter = own.generate_adapter(WELCOME)
        for tensor in adapter.layout.tensors:
            unwritten = ".mlp." in tensor.module or tensor.module == "model.layers.1.self_attn.q_proj"
            found = adapter.state_dict()[tensor.key]
            assert torch.equal(found, plain[tensor.key] * 0 if unwritten and tensor.side == "B" else plain[tensor.key])
        assert adapter.provenance["policy"]["never_written"] == 7

    def test_a_bound_of_the_generators(self, own, bounds) -> None:
        plain = own.generate_adapter(WELCOME)
        tight = replace(bounds, total=bounds.total / 1e3)
        own.set_policy(GeneratorPolicy(norms=tight))
        adapter = own.generate_adapter(WELCOME)
        assert (
            tight.excess(adapter.layout, adapter.state_dict()) == {} != tight.excess(plain.layout, plain.state_dict())
        )
        assert adapter.provenance["policy"]["shrunk_to_bound"]["all modules together"] < 1
        own.set_policy(None)
        assert "policy" not in own.generate_adapter(WELCOME).provenance

    def test_a_refused_class(self, own, refused, caplog) -> None:
        own.set_policy(GeneratorPolicy(refused=refused))
        with caplog.at_level(logging.INFO), pytest.raises(PolicyError, match="class 'health'") as refusal:
            own.generate_adapter({"fine": WELCOME, "other": ["Which medicine does the court take?"]})
        assert refusal.value.reason == "refused_prompts" and "'other'" in str(refusal.value)
        (record,) = [record for record in caplog.records if record.name.startswith("peft_dnd")]
        assert record.facts["classes"] == {"health": 1} and len(record.facts["prompts_sha256"]) == 64
        told = record.getMessage() + str(record.facts) + str(refusal.value)
        assert "medicine" not in told and "court take" not in told
        for prompts in TASKS.values():
            own.generate_adapter(prompts)
        assert refused.classes[0].caught == 1

    def test_what_is_not_read_is_not_judged(self, own, refused) -> None:
        own.set_policy(GeneratorPolicy(refused=refused))
        asked = REFUSED["health"][0]
        prompts = [*WELCOME, asked]  # it reads four of them
        read = {seed: asked in own._choose(prompts, seed) for seed in range(20)}
        assert set(read.values()) == {True, False}
        for seed, is_read in read.items():
            if is_read:
                with pytest.raises(PolicyError):
                    own.generate_adapter(prompts, seed=seed)
            else:
                own.generate_adapter(prompts, seed=seed)

    def test_a_classifier_of_the_users(self, own) -> None:
        own.set_policy(GeneratorPolicy(classifier="org/prompt-guard"))
        with pytest.raises(PolicyError, match="org/prompt-guard") as refusal:
            own.generate_adapter(WELCOME)
        assert refusal.value.reason == "classifier"
        own.set_prompt_classifier(lambda texts: ["rivers" if "river" in text else None for text in texts])
        own.generate_adapter(TASKS["law"])
        with pytest.raises(PolicyError, match=r"4 of 4 prompts.*'rivers'"):
            own.generate_adapter(TASKS["river"])
        own.set_prompt_classifier(lambda texts: [None])
        with pytest.raises(PolicyError, match="for each of 4 texts"):
            own.generate_adapter(TASKS["river"])
        with pytest.raises(PolicyError, match="a function"):
            own.set_prompt_classifier("org/prompt-guard")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"never_written": ["*.qproj"]}, r"no module of the generator's.*'\*' is any part"),
            ({"never_written": ["*"]}, "leaves no module"),
            ({"norms": NormBounds({"model.x": 1.0}, 1.0)}, "of other modules than the generator's"),
        ],
    )
    def test_what_its_adapters_cannot_hold(self, own, values, message) -> None:
        with pytest.raises(PolicyError, match=message):
            own.set_policy(GeneratorPolicy(**values))
        assert own.policy is None and not own.config.policy

    @pytest.mark.parametrize(
        "values", [{"never_written": "*.q_proj"}, {"classifier": ""}, {"norms": 1.0}, {"gate": {"bound": 1}}]
    )
    def test_values_that_are_none(self, values) -> None:
        with pytest.raises(PolicyError, match="must be"):
            GeneratorPolicy(**values)


class TestGate:
    def test_divergence(self, gate, generator, base_model) -> None:
        adapter = generator.generate_adapter(WELCOME)
        before = copy.deepcopy(base_model.state_dict())
        none = scaled(adapter, 0.0)
        assert float(gate.divergences(none, base_model).amax()) == 0
        found, larger = (gate.divergences(scaled(adapter, factor), base_model) for factor in (1.0, 3.0))
        assert (found > 0).all() and not torch.allclose(larger, found, rtol=0.05)
        assert torch.allclose(gate.divergences(adapter, base_model, scale=3.0), larger, rtol=1e-3)
        # By hand, for one prompt.
        tokens, start, stop = gate.tokens[1], int(gate.starts[1]), int(gate.stops[1])
        adapted = adapter.load_into(copy.deepcopy(base_model)).eval()
        with torch.no_grad():
            plain, moved = (
                m(tokens[None, :stop]).logits[0, start - 1 : stop - 1].log_softmax(-1) for m in (base_model, adapted)
            )
        assert float(found[1]) == pytest.approx(float((plain.exp() * (plain - moved)).sum(-1).mean()), rel=1e-4)
        after = base_model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before) and not hasattr(base_model, "peft_config")
        # Adapters that are in it already are no part of the untouched base.
        other = scaled(adapter, 5.0).load_into(copy.deepcopy(base_model))
        assert torch.allclose(gate.divergences(adapter, other), found, rtol=1e-4)

    def test_calibrated_on_training_adapters(self, gate, pairs, base_model) -> None:
        calibrated = gate.calibrate(pairs, base_model)
        for task in pairs.tasks:
            assert calibrated.check(GeneratedAdapter(pairs.layout, pairs.state_dict(task)), base_model) > 0
        loud = scaled(GeneratedAdapter(pairs.layout, pairs.state_dict("law")), 1e3)
        tight = replace(calibrated, bound=float(gate.divergences(loud, base_model).amax()) / 2)
        with pytest.raises(PolicyError, match="nats a token") as refusal:
            tight.check(loud, base_model)
        assert refusal.value.reason == "behaviour"

    def test_calibrated_on_what_the_generator_writes_itself(self, own, gate, full, base_model, monkeypatch) -> None:
        written = own.generate_adapters(TASKS)
        expected = gate.calibrate(written, base_model).bound
        own.set_policy(full)  # which must not be in the way
        calibrated = gate.calibrate(own.fitted_adapters(TASKS), base_model)
        assert calibrated.bound == pytest.approx(expected, rel=1e-5) and calibrated.tasks == len(TASKS)
        norms = NormBounds.calibrate(own.fitted_adapters(TASKS), base_model)
        for adapter in written.values():
            calibrated.check(adapter, base_model)
            assert norms.excess(adapter.layout, adapter.state_dict(), slack=1e-6) == {}
        assert norms.excess(adapter.layout, adapter.state_dict(), scale=10.0)
        monkeypatch.setattr("peft_dnd.policy.bounds._MOST_TASKS", 3)
        turned = (TASKS, reversed(TASKS.items()))
        few = [gate.calibrate(own.fitted_adapters(dict(tasks)), base_model) for tasks in turned]
        assert few[0].tasks == 3 and few[0].bound == few[1].bound, "whichever come first"
        two = own.fitted_adapters(dict(list(TASKS.items())[:2]))
        for calibrate in (gate.calibrate, NormBounds.calibrate):
            with pytest.raises(PolicyError, match=r"3 tasks .*or more, got 2"):
                calibrate(two, base_model)

    def test_where_the_base_is_at_hand(self, own, gate, fresh_base) -> None:
        own.set_policy(GeneratorPolicy(gate=replace(gate, bound=1e-6)))
        adapter = own.generate_adapter(WELCOME)
        assert adapter.provenance["policy"]["divergence"] is None, "no base, no check"
        model = fresh_base()
        with pytest.raises(PolicyError, match="must not be used"):
            get_peft_model(model, DnDConfig(generator=own, prompts=WELCOME))
        assert not any("lora" in name for name, _ in model.named_modules()), "the model is untouched"
        own.set_gate_base(fresh_base())
        with pytest.raises(PolicyError):
            own.generate_adapter(WELCOME)
        assert not any("lora" in key or key.startswith("model.") for key in own.state_dict())
        own.set_policy(GeneratorPolicy(gate=replace(gate, bound=1e6)))
        assert own.generate_adapter(WELCOME).provenance["policy"]["divergence"] > 0
        get_peft_model(model, DnDConfig(generator=own, prompts=WELCOME))

    def test_mistakes(self, base_model, word_tokenizer, gate, own) -> None:
        with pytest.raises(PolicyError, match="number of nats"):
            BehaviourGate.from_prompts(WELCOME, base_model, word_tokenizer, bound=-1)
        with pytest.raises(PolicyError, match="no bound yet"):
            GeneratorPolicy(gate=replace(gate, bound=None))
        with pytest.raises(PolicyError, match="writes text"):
            BehaviourGate.from_prompts(WELCOME, torch.nn.Linear(2, 2), word_tokenizer)
        with pytest.raises(PolicyError, match="another base"):
            replace(gate, tokens=gate.tokens + 100).divergences(own.generate_adapter(WELCOME), base_model)


class TestTravelling:
    def test_all_of_it_is_saved_and_said(self, own, reader, full, tmp_path, hub: HubServer) -> None:
        own.set_policy(full)
        own.save_pretrained(tmp_path / "here")
        again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "here", text_encoder=reader)
        assert again.policy.sha256 == full.sha256 == again.generate_adapter(WELCOME).provenance["policy"]["sha256"]
        streamed = StreamedLoraGenerator.from_pretrained(tmp_path / "here", text_encoder=reader)
        for loaded in (again, streamed):
            with pytest.raises(PolicyError, match="health"):
                loaded.generate_adapter(REFUSED["health"][:3])
        card = (tmp_path / "here" / "README.md").read_text(encoding="utf-8")
        assert "## Policy" in card and "`*.mlp.down_proj`" in card and "health (from 8 examples" in card
        assert "On 3 held-out prompts" in card and "relative to the base's weights" in card
        texts = "".join(p.read_text() for p in (tmp_path / "here").iterdir() if p.suffix in (".json", ".md"))
        assert "medicine" not in texts, "examples go as points, not as words"
        again.push_to_hub("me/generator")
        there = PromptConditionedLoraGenerator.from_pretrained("me/generator")
        assert there.policy.sha256 == full.sha256
        again.set_policy(None)
        again.save_pretrained(tmp_path / "here")
        assert not (tmp_path / "here" / "policy.safetensors").exists()
        assert PromptConditionedLoraGenerator.from_pretrained(tmp_path / "here").policy is None
        assert "## Policy" not in (tmp_path / "here" / "README.md").read_text(encoding="utf-8")

    def test_a_version_that_knows_no_policies_refuses_it(self, own, full, monkeypatch) -> None:
        assert own.config.format_version == 1
        own.set_policy(full)
        assert own.config.format_version == 2
        monkeypatch.setattr("peft_dnd.generator.configuration.NEWER_FORMAT_VERSION", 1)
        with pytest.raises(FormatVersionError):
            PromptConditionedLoraGeneratorConfig.from_dict(own.config.to_dict())

    def test_a_configuration_alone_writes_nothing(self, own, full) -> None:
        own.set_policy(full)
        bare = PromptConditionedLoraGenerator(PromptConditionedLoraGeneratorConfig.from_dict(own.config.to_dict()))
        bare.normalization.load_state_dict(own.normalization.state_dict())
        with pytest.raises(PolicyError, match="was not loaded"):
            bare.generate_adapter(WELCOME)

    def test_a_copy_has_it_too(self, own, full) -> None:
        own.set_policy(full)
        with pytest.raises(PolicyError, match="health"):
            copy.deepcopy(own).generate_adapter(REFUSED["health"][:3])


class TestEditedPolicies:
    """Who holds the folder can edit it: what is seen of that, and what is not."""

    @pytest.fixture
    def folder(self, own, full, tmp_path: Path) -> Path:
        own.set_policy(full)
        own.save_pretrained(tmp_path / "generator")
        return tmp_path / "generator"

    @staticmethod
    def edit(folder: Path, change) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        change(config)
        path.write_text(json.dumps(config), encoding="utf-8")

    @pytest.mark.parametrize(
        "change",
        [
            lambda config: config["policy"]["norms"].update(total=1e9),
            lambda config: config["policy"].update(never_written=[]),
            lambda config: config["policy"]["refused"]["classes"]["health"].update(threshold=9.0),
            lambda config: config["policy"].update(gate=None),
            lambda config: config["policy"].update(norms=[]),
            lambda config: config["policy"].update(norms={"modules": {"a": "x"}}),
            lambda config: config["policy"].update(refused={"classes": 3}),
            lambda config: config["policy"].update(unknown=True),
            lambda config: config.update(policy={"never_written": 3}),
        ],
    )
    def test_a_bound_that_was_edited(self, folder, change) -> None:
        self.edit(folder, change)
        with pytest.raises(CorruptFileError, match="checksum"):
            PromptConditionedLoraGenerator.from_pretrained(folder)
        renew_checksums(folder)
        with pytest.raises(CorruptFileError, match=r"policy.*not as it was saved"):
            PromptConditionedLoraGenerator.from_pretrained(folder)

    def test_a_file_that_is_gone(self, folder) -> None:
        (folder / "policy.safetensors").unlink()
        with pytest.raises(CorruptFileError, match="policy"):
            PromptConditionedLoraGenerator.from_pretrained(folder)

    def test_not_seen_is_a_policy_taken_out_with_new_checksums(self, folder) -> None:
        self.edit(folder, lambda config: config.pop("policy"))
        with pytest.raises(CorruptFileError, match="'policy'"):
            PromptConditionedLoraGenerator.from_pretrained(folder)
        renew_checksums(folder)
        assert PromptConditionedLoraGenerator.from_pretrained(folder).policy is None


def test_another_method_than_lora_can_refuse_and_be_gated(own, bounds, base_model) -> None:
    dora = copy.deepcopy(LORA_CONFIG)
    dora.use_dora = True
    layout = layout_from_config(dora, base_model)
    with pytest.raises(PolicyError, match="for plain LoRA"):
        GeneratorPolicy(norms=bounds).check_layout(layout)
    GeneratorPolicy(classifier="guard").check_layout(layout)
