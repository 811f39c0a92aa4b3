# SPDX-License-Identifier: Apache-2.0
"""`DnDConfig`: the LoRA configuration with which PEFT's own functions put a generated adapter into a model."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers.utils import CONFIG_NAME

from ..adapters.layout import AdapterLayout
from ..adapters.method_layout import MethodLayout
from ..errors import GeneratorConfigError
from ..generator.configuration import PromptConditionedLoraGeneratorConfig
from ..generator.modeling import PromptConditionedLoraGenerator
from ..storage.hub import HubOptions, find_generator
from ..text.out_of_distribution import check_action
from ..text.prompts import check_prompts
from ..text.prompts_and_answers import condition_texts


# Where the injection is not in force, PEFT refuses this initialisation rather than making a zero adapter.
SENTINEL = "dnd"

_OWN_FIELDS = (
    "generator",
    "generator_revision",
    "generator_kwargs",
    "prompts",
    "answers",
    "seed",
    "out_of_distribution",
    "threshold",
    "base",
    "init_lora_weights",
)
# The generator's layout decides these; only alpha, which is no property of the matrices, may be overridden.
_WRITTEN_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
)
# These have no bearing on what the matrices are and do. Whatever is in none of the three is refused unless left at its
# default, fields of later PEFT versions included.
_FREE_FIELDS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "modules_to_save",
    "runtime_config",
)
_FREE_OF_METHODS = ("task_type", "base_model_name_or_path", "revision", "inference_mode")
_PEFT_OWN_FIELDS = ("peft_type", "auto_mapping", "peft_version")
# What cannot be among generator_kwargs.
_REFUSED_OPTIONS = ("revision", "config", "text_encoder", "output_loading_info")


class GeneratorKwargs(dict[str, Any]):
    """How a [`DnDConfig`] loads its generator. An access token among it is neither shown nor pickled."""

    def __repr__(self) -> str:
        return repr({name: "***" if name == "token" else value for name, value in self.items()})

    def __copy__(self) -> GeneratorKwargs:
        return GeneratorKwargs(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> GeneratorKwargs:
        return GeneratorKwargs((name, copy.deepcopy(value, memo)) for name, value in self.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return GeneratorKwargs, ({name: value for name, value in self.items() if name != "token"},)


class LiveGenerator:
    """Holds a loaded generator inside a [`DnDConfig`]: copies of the configuration share it, and pickling is refused.

    Attributes:
        model: The generator.
    """

    def __init__(self, model: PromptConditionedLoraGenerator) -> None:
        self.model = model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LiveGenerator) and other.model is self.model

    def __hash__(self) -> int:
        return id(self.model)

    def __repr__(self) -> str:
        return f"<live {type(self.model).__name__} {self.model.name_or_path!r}>"

    def __copy__(self) -> LiveGenerator:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveGenerator:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise GeneratorConfigError(
            "A DnDConfig that holds a loaded generator cannot be pickled. Save the generator with save_pretrained and "
            "give DnDConfig the folder: DnDConfig(generator='path/to/folder', ...)."
        )


@dataclass
class DnDConfig(LoraConfig):
    """A LoRA configuration whose adapter is written by a generator rather than initialised.

    It goes wherever PEFT, transformers, sentence-transformers or TRL take a `LoraConfig` for a new adapter:

        model = get_peft_model(base, DnDConfig(generator="org/generator", prompts=prompts))

    What the model then holds, saves and shows is a plain `LoraConfig`, or where the generator writes adapters of
    another method that method's configuration; this one stays as it is and may be used again.
    Rank, targets and the rest of the adapter's form are the generator's: its `config.json` is read at once, its
    weights when the adapter is made. `lora_dropout`, `modules_to_save`, `task_type`, `inference_mode` and `revision`
    (of the base model) mean what they mean in PEFT; where no `task_type` is given it is that of the adapters which the
    generator was fitted on, so give it for a model with another head, such as a classifier or the bare model.

    Args:
        r: Leave it out: the generator decides. If given, it must be the generator's rank.
        lora_alpha: Another alpha than the generator's, to scale the adapter otherwise; only for a generator with one
            alpha for all modules.
        use_rslora: As `r`.
        fan_in_fan_out: As `r`.
        generator: Hub id or folder of a generator, or a loaded [`PromptConditionedLoraGenerator`]; that one is shared
            by copies of the configuration, which then cannot be pickled. Reading the field gives a holder of it.
        generator_revision: Branch, tag or commit of a generator on the Hub. Its weights are read at the commit at
            which its `config.json` was, even if a branch has moved since.
        generator_kwargs: How a generator that is named is loaded: what
            [`PromptConditionedLoraGenerator.from_pretrained`] takes, `token`, `subfolder`, `cache_dir`, `dtype` or
            `device_map` for instance. Saved with nothing; a token is not even pickled.
        prompts: Unlabelled prompts of the task. They are neither saved nor passed on.
        answers: Their answers, one each, for a generator that reads them. They are not saved either.
        seed: Decides which prompts are read when they are more or fewer than the generator takes at once.
        out_of_distribution: What to do if the prompts are unlike those of the fitted tasks: `"ignore"`, `"warn"`,
            `"shrink"`, `"mean"` or `"refuse"`; `None` warns where the generator can tell. See
            [`PromptConditionedLoraGenerator.generate_adapter`].
        threshold: The score above which they are taken to be; `None` is what the fitted tasks give.
        base: For which of the bases, if the generator has several: its name there, or its model's Hub id or folder. By
            default the one whose layout fits the model that the adapter is put into, each time anew; until then the
            configuration has no rank or targets.

    Raises:
        GeneratorConfigError: If a field contradicts the generator, or asks for more than a generator can write, such
            as DoRA.
        GeneratorNotFoundError: If there is no such generator.
        PromptError: If there are no prompts, or empty ones; or answers are missing, or given and not read.
        PromptTypeError: If the prompts are no strings.
    """

    # These four have defaults of their own in LoraConfig, which cannot be told from a user's choice.
    r: int | None = None  # type: ignore[assignment]
    lora_alpha: int | None = None  # type: ignore[assignment]
    use_rslora: bool | None = None  # type: ignore[assignment]
    fan_in_fan_out: bool | None = None  # type: ignore[assignment]
    generator: str | PromptConditionedLoraGenerator | LiveGenerator | None = field(
        default=None, metadata={"help": "Hub id or folder of a generator, or a loaded one"}
    )
    generator_revision: str | None = field(default=None, metadata={"help": "The generator's version on the Hub"})
    generator_kwargs: Mapping[str, Any] | None = field(
        default=None, metadata={"help": "How the generator is loaded: token, subfolder, cache_dir, dtype, ..."}
    )
    prompts: Sequence[str] | None = field(
        default=None, repr=False, metadata={"help": "Unlabelled prompts of the task"}
    )
    seed: int = field(default=0, metadata={"help": "Decides which prompts are read"})
    answers: Sequence[str] | None = field(
        default=None, repr=False, metadata={"help": "The prompts' answers, for a generator that reads them"}
    )
    out_of_distribution: str | None = field(
        default=None, metadata={"help": "What to do with prompts unlike the fitted tasks'"}
    )
    threshold: float | None = field(default=None, metadata={"help": "The score above which they are taken to be so"})
    base: str | None = field(default=None, metadata={"help": "For which base, if the generator has several"})

    def __post_init__(self) -> None:
        self._refuse_what_no_generator_writes()
        if self.prompts is None:
            raise GeneratorConfigError("DnDConfig needs prompts: a list of unlabelled prompts of the task.")
        self.prompts = list(check_prompts(self.prompts))
        if not isinstance(self.seed, int):
            raise GeneratorConfigError(f"DnDConfig's seed must be an integer, got {self.seed!r}.")
        if self.lora_alpha is not None and not isinstance(self.lora_alpha, (int, float)):
            raise GeneratorConfigError(f"DnDConfig's lora_alpha must be a number, got {self.lora_alpha!r}.")
        check_action(self.out_of_distribution, self.threshold)
        config = self._read_generator_config()
        # The texts themselves are formed when they are read; here what they lack is said, before a model is touched.
        condition_texts(self.prompts, self.answers, config.condition_text, answer_ratio=config.answer_ratio)
        self._layouts = config.layouts
        self._layout: AdapterLayout | None = None
        if config.bases and self.base is None:
            self._leave_to_the_model(config)
        else:
            self._layout = self._layouts[config.find_base(self.base)] if self._layouts else config.adapter_layout
            if isinstance(self._layout, MethodLayout):
                self._become(self._layout)
                return
            self._adopt(self._layout.lora_config())
            if self.task_type is None:
                self.task_type = self._layout.task_type
        super().__post_init__()
        self.init_lora_weights = SENTINEL  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "generator":
            if isinstance(value, PromptConditionedLoraGenerator):
                value = LiveGenerator(value)
            elif isinstance(value, os.PathLike):
                value = os.fspath(value)
        elif name == "generator_kwargs":
            value = _checked_kwargs(value)
        super().__setattr__(name, value)
        if name == "modules_to_save":
            # PEFT sets it on the configuration that it was given, for some task types only after the adapter is made.
            reference: weakref.ref[LoraConfig] | None = self.__dict__.get("_stored")
            stored = reference() if reference is not None else None
            if stored is not None:
                stored.modules_to_save = value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_stored"}

    @property
    def layout(self) -> AdapterLayout:
        """The layout of the adapter, as the generator's configuration gives it.

        Raises:
            GeneratorConfigError: If the generator has several bases, and the model will say which.
        """
        if self._layout is None:
            raise GeneratorConfigError(
                f"The generator {self.generator!r} has the bases {', '.join(map(repr, self._layouts))}, and which is "
                "meant is known when there is a model. Name one: DnDConfig(base=...)."
            )
        return self._layout

    def for_model(self, model: nn.Module) -> DnDConfig:
        """This configuration with the layout of the base that a model is; itself, if it has a layout already.

        Args:
            model: The base model.

        Raises:
            BaseModelMismatchError: If the model fits none of the generator's bases.
            GeneratorConfigError: If it could be more than one, or a field contradicts what is written for it.
        """
        if self._layout is not None:
            return self
        chosen = copy.copy(self)
        chosen.base = self._read_generator_config().find_base(model)
        chosen._layout = self._layouts[chosen.base]
        chosen._adopt(chosen._layout.lora_config())
        return chosen

    @property
    def generator_commit(self) -> str | None:
        """The commit on the Hub at which the generator's configuration was read; its weights are read there too."""
        return self._generator_commit

    def settings(self) -> dict[str, Any]:
        """What this configuration adds to the layout's own, as fields of a plain `LoraConfig`; all copies.

        Raises:
            GeneratorConfigError: If a field has been changed since to something that contradicts the generator.
        """
        if isinstance(self.layout, MethodLayout):
            return {name: copy.deepcopy(getattr(self, name)) for name in _FREE_OF_METHODS}
        self._refuse_what_no_generator_writes()
        self._adopt(self.layout.lora_config())
        settings = {name: copy.deepcopy(getattr(self, name)) for name in _FREE_FIELDS}
        return {**settings, "lora_alpha": self.lora_alpha}

    def to_plain_config(self) -> PeftConfig:
        """The plain configuration of the adapter: what a model shows and saves once the adapter is in it."""
        config = self.layout.peft_config()
        for name, value in self.settings().items():
            setattr(config, name, value)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The plain configuration as a dictionary; nothing of the generator or the prompts is in it."""
        return self.to_plain_config().to_dict()

    def follow_with(self, stored: PeftConfig) -> None:
        """From now on, what is done to `modules_to_save` here is done to a plain configuration that a model stores."""
        if not hasattr(stored, "modules_to_save"):
            return
        self.__dict__["modules_to_save"] = stored.modules_to_save  # the very list: PEFT also extends it in place
        self.__dict__["_stored"] = weakref.ref(stored)

    def _leave_to_the_model(self, config: PromptConditionedLoraGeneratorConfig) -> None:
        """Make sure that PEFT can go as far as to the model without knowing the adapter's form."""
        for name, layout in self._layouts.items():
            if isinstance(layout, MethodLayout):
                raise GeneratorConfigError(
                    f"The generator {self.generator!r} writes {layout.method} adapters for the base {name!r}, and "
                    "PEFT asks for the method before it shows the model. Say which base is meant: "
                    f"DnDConfig(base=...), one of {', '.join(map(repr, config.base_names))}."
                )
        kinds = {layout.task_type for layout in self._layouts.values()}
        if self.task_type is None and len(kinds) == 1:
            self.task_type = kinds.pop()

    def _become(self, layout: MethodLayout) -> None:
        """Take the form of another method's configuration, so that PEFT does with it what it does with that."""
        config = layout.peft_config()
        if config.is_prompt_learning:
            raise GeneratorConfigError(
                f"The generator writes {layout.method} adapters, which PEFT does not inject into a model. Use "
                "generator.generate_adapter(prompts).load_into(model)."
            )
        given = [name for name in _WRITTEN_FIELDS if getattr(self, name) not in (None, {})]
        if given:
            raise GeneratorConfigError(
                f"DnDConfig got {given[0]}={getattr(self, given[0])!r}; the generator writes {layout.method} "
                f"adapters, whose form it decides. Leave {given[0]} out."
            )
        kept = {name: getattr(self, name) for name in _FREE_OF_METHODS}
        vars(self).update(vars(config))
        for name, value in kept.items():
            if value is not None:
                setattr(self, name, value)

    def _refuse_what_no_generator_writes(self) -> None:
        if self.init_lora_weights not in (True, SENTINEL):
            raise GeneratorConfigError(
                f"DnDConfig got init_lora_weights={self.init_lora_weights!r}, but the generator writes the weights. "
                "Leave it out."
            )
        understood = {*_OWN_FIELDS, *_WRITTEN_FIELDS, *_FREE_FIELDS, *_PEFT_OWN_FIELDS}
        plain = LoraConfig()
        for name in (config_field.name for config_field in fields(plain)):
            if name not in understood and getattr(self, name) != getattr(plain, name):
                raise GeneratorConfigError(
                    f"DnDConfig got {name}={getattr(self, name)!r}. A generator writes the A and B matrices of plain "
                    f"LoRA, for the modules that it was fitted for, and nothing else: leave {name} out."
                )

    def _read_generator_config(self) -> PromptConditionedLoraGeneratorConfig:
        generator = self.generator
        options = self.generator_kwargs or {}
        self._generator_commit: str | None = None
        if isinstance(generator, LiveGenerator):
            for name, given in (("generator_revision", self.generator_revision), ("generator_kwargs", options)):
                if given not in (None, {}):
                    raise GeneratorConfigError(
                        f"DnDConfig got a loaded generator and {name}={given!r}. Leave {name} out, or give the "
                        "generator's Hub id."
                    )
            return generator.model.config
        if not isinstance(generator, str) or not generator:
            raise GeneratorConfigError(
                f"DnDConfig needs a generator: a Hub id, a folder or a loaded PromptConditionedLoraGenerator; got "
                f"{generator!r}."
            )
        hub: Any = {name: value for name, value in options.items() if name in HubOptions.__annotations__}
        folder, self._generator_commit = find_generator(
            generator, (CONFIG_NAME,), revision=self.generator_revision, **hub
        )
        return PromptConditionedLoraGeneratorConfig.from_pretrained(folder)

    def _adopt(self, written: LoraConfig) -> None:
        """Take the adapter's form from the generator's; refuse what contradicts it."""
        for name in _WRITTEN_FIELDS:
            given, theirs = getattr(self, name), getattr(written, name)
            given = set(given) if isinstance(given, (list, tuple)) else given
            if name == "lora_alpha" and given is not None and not written.alpha_pattern:
                continue
            if given is None or given == {}:
                setattr(self, name, theirs)
            elif given != theirs:
                raise GeneratorConfigError(
                    f"DnDConfig got {name}={given!r}; the generator {self.generator!r} writes adapters with "
                    f"{name}={theirs!r}. Leave {name} out, or use a generator fitted for yours."
                )


def _checked_kwargs(given: Mapping[str, Any] | None) -> GeneratorKwargs:
    if given is not None and not isinstance(given, Mapping):
        raise GeneratorConfigError(
            "DnDConfig's generator_kwargs must be a dictionary of what PromptConditionedLoraGenerator.from_pretrained "
            f"takes, such as {{'subfolder': 'v1'}}; got {type(given).__name__}."
        )
    for name in given or {}:
        if name in _REFUSED_OPTIONS:
            mend = (
                "Give DnDConfig generator_revision instead."
                if name == "revision"
                else "Load the generator yourself and pass it: DnDConfig(generator=loaded_generator, ...)."
            )
            raise GeneratorConfigError(f"DnDConfig's generator_kwargs cannot hold {name!r}. {mend}")
    return GeneratorKwargs(given or {})
