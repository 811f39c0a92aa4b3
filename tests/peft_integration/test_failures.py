# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTuner
from support.live_models import OTHER_PROMPTS, PROMPTS, assert_holds, assert_untouched, snapshot
from torch import nn

from peft_dnd.adapters.generated_adapter import GeneratedAdapter
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.errors import BaseModelMismatchError, GeneratorConfigError, PeftDndError
from peft_dnd.generator.modeling import PromptConditionedLoraGenerator
from peft_dnd.peft_integration import injection
from peft_dnd.peft_integration.config import DnDConfig


pytest_plugins = ("support.adapter_fixtures",)

FreshBase = Callable[[], nn.Module]
MakeConfig = Callable[..., DnDConfig]
GeneratorFor = Callable[[AdapterLayout], PromptConditionedLoraGenerator]


@pytest.mark.parametrize("way", ["get", "add", "mixed", "native", "native twice", "inject"])
def test_a_wrong_base_is_refused_untouched(way: str, dnd: MakeConfig, base_model: nn.Module) -> None:
    config = copy.deepcopy(base_model.config)
    config.intermediate_size = 41
    model: Any = type(base_model)(config)
    if way == "add":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    elif way == "mixed":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), mixed=True)
    elif way == "native twice":
        model.add_adapter(LoraConfig(target_modules=["q_proj"]), "first")
    before = snapshot(model)
    with pytest.raises(BaseModelMismatchError, match=r"'model\.layers\.0\.mlp\.down_proj' is a Linear from 41 to 24"):
        if way == "get":
            get_peft_model(model, dnd())
        elif way == "inject":
            inject_adapter_in_model(dnd(), model)
        elif way in ("add", "mixed"):
            model.add_adapter("law", dnd())
        else:
            model.add_adapter(dnd(), "law")
    assert_untouched(model, before)
    if way.startswith("native"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]), "law")  # nothing stale stands in the way


def test_failures_of_the_generator_and_of_peft_leave_no_trace(
    dnd: MakeConfig, fresh_base: FreshBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"]))
    before = snapshot(model)
    with monkeypatch.context() as patched:
        patched.setattr(PromptConditionedLoraGenerator, "generate_adapter", fail)
        with pytest.raises(KeyboardInterrupt):
            model.add_adapter("law", dnd())
    assert_untouched(model, before)
    with monkeypatch.context() as patched:
        patched.setattr(injection, "fill_adapter", fail)
        with pytest.raises(KeyboardInterrupt):
            model.add_adapter("law", dnd())
    assert list(model.peft_config) == ["default"]


def test_without_the_wrapper_nothing_is_made_silently(dnd: MakeConfig, fresh_base: FreshBase) -> None:
    with unwrapped():
        with pytest.raises(ValueError, match="init_lora_weights='dnd'"):
            get_peft_model(fresh_base(), dnd())
        model = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="init_lora_weights='dnd'"):
            model.add_adapter("law", dnd())


def test_a_model_from_before_the_installation_is_served_too(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter
) -> None:
    with unwrapped():
        model = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("law", dnd())
    assert_holds(model, "law", adapter)


def test_installation_happens_once_and_knows_its_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = BaseTuner.inject_adapter
    injection.install()
    assert BaseTuner.inject_adapter is wrapped
    assert list(inspect.signature(wrapped).parameters)[:3] == ["self", "model", "adapter_name"]
    monkeypatch.setattr(BaseTuner, "inject_adapter", lambda self, adapter_name: None)
    with pytest.raises(ImportError, match=r"\['self', 'adapter_name'\].*requirements"):
        injection.install()


def test_a_generator_is_loaded_once_until_its_folder_changes(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = PromptConditionedLoraGenerator.from_pretrained.__func__

    def count(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PromptConditionedLoraGenerator, "from_pretrained", classmethod(count))
    folder = str(tmp_path / "generator")
    generator.save_pretrained(folder)
    model = get_peft_model(fresh_base(), DnDConfig(generator=folder, prompts=PROMPTS), "law")
    model.add_adapter("med", DnDConfig(generator=folder, prompts=OTHER_PROMPTS))
    assert len(loads) == 1
    other = copy.deepcopy(generator)
    with torch.no_grad():
        other.normalization.mean.add_(1.0)
    other.save_pretrained(folder)
    model.add_adapter("new", DnDConfig(generator=folder, prompts=PROMPTS))
    assert len(loads) == 2
    assert_holds(model, "new", other.generate_adapter(PROMPTS))
    injection.release_generator()
    gc.collect()
    model.add_adapter("later", DnDConfig(generator=folder, prompts=PROMPTS))
    assert len(loads) == 3


def test_a_generator_that_changed_its_layout_meanwhile_is_refused(
    generator: PromptConditionedLoraGenerator,
    base_model: nn.Module,
    fresh_base: FreshBase,
    generator_for: GeneratorFor,
    tmp_path: Path,
) -> None:
    generator.save_pretrained(tmp_path)
    config = DnDConfig(generator=str(tmp_path), prompts=PROMPTS)
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["q_proj"]), base_model)
    generator_for(layout).save_pretrained(tmp_path)
    with pytest.raises(GeneratorConfigError, match="Make the DnDConfig anew"):
        get_peft_model(fresh_base(), config)


def test_the_error_is_peft_dnd_s_and_a_builtin_one(dnd: MakeConfig) -> None:
    with pytest.raises(PeftDndError) as error:
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), dnd())  # type: ignore[arg-type]
    assert isinstance(error.value, ValueError)


@contextmanager
def unwrapped() -> Iterator[None]:
    """PEFT as it is without peft_dnd."""
    wrapped = BaseTuner.inject_adapter
    BaseTuner.inject_adapter = wrapped.__wrapped__  # type: ignore[attr-defined, method-assign]
    try:
        yield
    finally:
        BaseTuner.inject_adapter = wrapped  # type: ignore[method-assign]
