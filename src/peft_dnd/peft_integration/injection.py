# SPDX-License-Identifier: Apache-2.0
"""The one place where the library reaches into PEFT: adapters of a `DnDConfig` are filled where PEFT injects them.

`get_peft_model`, `PeftModel(...)`, `add_adapter` of PEFT, transformers and sentence-transformers, mixed models and
TRL's trainers all pass through `BaseTuner.inject_adapter`, so that is what [`install`] wraps. For any other
configuration than a `DnDConfig` the wrapper does nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftMixedModel
from peft import __version__ as peft_version
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.loading import fill_adapter, real_parameters
from ..adapters.lora import KEY_PREFIX
from ..adapters.matching import check_fits, lora_config_for, match_modules, warn_if_other_base
from ..adapters.method_layout import MethodLayout, trained_tensors
from ..adapters.method_loading import check_method_fits, fill_method_adapter
from ..errors import GeneratorConfigError
from ..generator.modeling import PromptConditionedLoraGenerator
from .config import DnDConfig, LiveGenerator


_MARK = "_fills_dnd_adapters"


def install() -> None:
    """Make PEFT fill the adapters of a `DnDConfig` with generated matrices. Called by `import peft_dnd`; idempotent.

    Raises:
        ImportError: If this version of PEFT injects adapters in another way than the ones known.
    """
    original = BaseTuner.inject_adapter
    if getattr(original, _MARK, False):
        return
    parameters = list(inspect.signature(original).parameters)
    if parameters[:3] != ["self", "model", "adapter_name"]:
        raise ImportError(
            f"peft_dnd does not know how PEFT {peft_version} injects adapters: BaseTuner.inject_adapter takes "
            f"{parameters}, expected it to start with ['self', 'model', 'adapter_name']. Install a PEFT version that "
            "peft-dnd's requirements name, or a newer peft-dnd."
        )

    @functools.wraps(original)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        inject = functools.partial(original, self, model, adapter_name, *args, **kwargs)
        if isinstance(config, DnDConfig):
            _inject_generated(inject, config, self, model, adapter_name)
        else:
            inject()

    setattr(inject_adapter, _MARK, True)
    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


def release_generator() -> None:
    """Free the memory of the generator that was loaded last for a `DnDConfig`.

    One generator is kept, so that several adapters in a row need it loaded only once.
    """
    _kept.clear()


def _inject_generated(
    inject: Callable[[], None], config: DnDConfig, tuner: BaseTuner, model: nn.Module, adapter_name: str
) -> None:
    base = tuner.model  # `model` may be a PeftMixedModel around it
    given = config
    try:
        config = given.for_model(base)
        if isinstance(config.layout, MethodLayout):
            _inject_method(inject, config, config.layout, tuner, adapter_name)
            return
        names = match_modules(base, config.layout)
        check_fits(base, config.layout, names)
        stored = lora_config_for(
            base,
            config.layout,
            names,
            settings=config.settings(),
            key_prefix=KEY_PREFIX if isinstance(model, PeftMixedModel) else "",
        )
        warn_if_other_base(base, config.layout)
        adapter = _generate(config, base)
        # Until here the model is untouched. It never sees the DnDConfig: what it stores is plain LoRA.
        tuner.peft_config[adapter_name] = stored
        given.follow_with(stored)
        inject()
        fill_adapter(base, adapter_name, config.layout, adapter.state_dict(), names)
    except BaseException:
        _withdraw(tuner, adapter_name)
        raise


def _inject_method(
    inject: Callable[[], None], config: DnDConfig, layout: MethodLayout, tuner: BaseTuner, adapter_name: str
) -> None:
    """The same for an adapter of another method than plain LoRA."""
    try:
        check_method_fits(tuner.model, layout)
        adapter = _generate(config, tuner.model)
        tuner.peft_config[adapter_name] = stored = config.to_plain_config()
        config.follow_with(stored)
        inject()
        fill_method_adapter(trained_tensors(tuner, adapter_name), adapter.state_dict())
    except BaseException:
        _withdraw(tuner, adapter_name)
        raise


def _generate(config: DnDConfig, base: nn.Module) -> GeneratedAdapter:
    with real_parameters():
        if isinstance(config.generator, LiveGenerator):
            generator = config.generator.model
        else:
            name = str(config.generator)
            revision = config.generator_commit or config.generator_revision
            generator = _load_generator(name, revision, dict(config.generator_kwargs or {}))
        adapter = generator.generate_adapter(
            config.prompts or (),
            base=config.base,
            seed=config.seed,
            answers=config.answers,
            out_of_distribution=config.out_of_distribution,
            threshold=config.threshold,
        )
    difference = config.layout.difference(adapter.layout)
    if difference is not None:
        raise GeneratorConfigError(
            f"The generator {config.generator!r} has changed since the DnDConfig was made; first is what the "
            f"DnDConfig read, second what the generator wrote: {difference}. Make the DnDConfig anew."
        )
    with real_parameters():
        return generator.hold_to_policy(adapter, base, scale=_scale(config))


def _scale(config: DnDConfig) -> float:
    """By what another alpha than the generator's multiplies its updates."""
    if isinstance(config.layout, MethodLayout):
        return 1.0
    written = config.layout.lora_config().lora_alpha
    return float(config.settings()["lora_alpha"]) / written if written else 1.0


# At most one generator, and what it was loaded from and how.
_kept: list[tuple[tuple[Any, ...], PromptConditionedLoraGenerator]] = []


def _load_generator(name: str, revision: str | None, options: dict[str, Any]) -> PromptConditionedLoraGenerator:
    asked = (name, revision, options, _folder_state(name))
    for known, generator in _kept:
        if known == asked:
            return generator
    release_generator()  # before the next one is loaded, so that there is memory for one only
    loaded: PromptConditionedLoraGenerator = PromptConditionedLoraGenerator.from_pretrained(
        name, revision=revision, **options
    )
    _kept.append((asked, loaded))
    return loaded


def _folder_state(name: str) -> tuple[Any, ...]:
    """What changes when a folder's files do, so that a generator saved anew is loaded anew. Empty for a Hub id."""
    files = (path for path in Path(name).rglob("*") if path.is_file()) if Path(name).is_dir() else ()
    return tuple(sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files))


def _withdraw(tuner: BaseTuner, adapter_name: str) -> None:
    """Take an adapter's configuration back out of a model that did not get the adapter."""
    tuner.peft_config.pop(adapter_name, None)
    base = tuner.model
    # transformers' add_adapter notes that there are adapters before it makes the first one.
    if getattr(base, "_hf_peft_config_loaded", False) and not getattr(base, "peft_config", None):
        base._hf_peft_config_loaded = False
