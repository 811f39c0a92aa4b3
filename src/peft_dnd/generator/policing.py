# SPDX-License-Identifier: Apache-2.0
"""The part of a generator that holds it to its policy: before prompts are decoded, and before an adapter is given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..errors import PolicyError
from ..policy.behaviour import at_hand
from ..policy.bounds import FALSE_ALARMS
from ..policy.checking import PolicyCheck, check_adapter
from ..policy.disguises import views
from ..policy.policy import POLICY_NAME, GeneratorPolicy
from ..policy.refused_prompts import RefusedPrompts
from ..storage.files import PathLike
from ..text.out_of_distribution import prompt_points
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import check_prompts, prompts_digest
from .conditioning import PromptReadingMixin
from .configuration import FORMAT_VERSION, NEWER_FORMAT_VERSION


# Texts -> for each the name of a class that is refused, or `None`.
PromptClassifier = Callable[[Sequence[str]], Sequence[str | None]]
# Where a generator reads whole sentences, its own limit does not say how many words of a prompt count.
_MOST_WORDS = 512

logger = logging.getLogger(__name__)


class PolicyMixin(PromptReadingMixin):
    """Gives a generator its policy; see [`GeneratorPolicy`][peft_dnd.policy.GeneratorPolicy].

    Attributes:
        policy: The policy; `None` if there is none. [`set_policy`] sets it.
    """

    policy: GeneratorPolicy | None = None
    # In tuples, since torch would take a module for a part of this one.
    _classifiers: tuple[PromptClassifier, ...] = ()
    _gate_bases: tuple[nn.Module, ...] = ()

    @property
    def prompt_classifier(self) -> PromptClassifier | None:
        """What [`set_prompt_classifier`] was given."""
        return self._classifiers[0] if self._classifiers else None

    def set_prompt_classifier(self, classify: PromptClassifier | None) -> None:
        """Have a classifier of yours asked about all prompts, with or without a policy. It is not saved.

        Args:
            classify: Takes the texts that are read, gives for each the name of a class that is refused, or `None`.
        """
        if classify is not None and not callable(classify):
            raise PolicyError(f"A classifier of prompts is a function, got {classify!r:.80}.", "classifier")
        self._classifiers = () if classify is None else (classify,)

    @property
    def gate_base(self) -> nn.Module | None:
        """What [`set_gate_base`] was given."""
        return self._gate_bases[0] if self._gate_bases else None

    def set_gate_base(self, base_model: nn.Module | None) -> None:
        """Say on which base the policy's behaviour gate is checked for every adapter. It is not saved."""
        self._gate_bases = () if base_model is None else (base_model,)

    def set_policy(self, policy: GeneratorPolicy | None) -> None:
        """Give the generator a policy, in its configuration and card, or take it away; then save or upload it.

        Earlier versions of the library, which know no policies, refuse to load a generator that has one.

        Raises:
            PolicyError: If its adapters cannot hold such a policy.
        """
        if policy is not None:
            if not isinstance(policy, GeneratorPolicy):
                raise PolicyError(f"A policy is a GeneratorPolicy or None, got {policy!r:.80}.")
            if self.config.bases and (policy.norms is not None or policy.never_written):
                raise PolicyError(
                    "Norms and never_written are of the modules of one base; this generator has several, "
                    f"{', '.join(map(repr, self.config.base_names))}. Leave them out; refused prompts and a "
                    "classifier hold for all."
                )
            for layout in self.config.layouts.values():
                policy.check_layout(layout)
        self.policy = policy
        self.config.policy = {} if policy is None else policy.to_dict()
        newer = policy is not None or self.config.bases
        self.config.format_version = NEWER_FORMAT_VERSION if newer else FORMAT_VERSION

    def fit_refused_prompts(
        self,
        examples: Mapping[str, PromptsLike],
        allowed: Any,
        *,
        false_alarms: float = FALSE_ALARMS,
    ) -> RefusedPrompts:
        """Learn classes of prompts to be refused, for a policy, as this generator's text encoder reads them.

        Args:
            examples: Class -> examples of its prompts, a few dozen; of a generator that reads answers, in the form
                that it reads, see [`condition_texts`][peft_dnd.text.prompts_and_answers.condition_texts].
            allowed: The training pairs, or training task -> its prompts; leave out tasks that are to be refused.
            false_alarms: The probability with which a new task like the training tasks may be refused, for each class.

        Raises:
            PolicyError: If there are too few examples or tasks.
            PromptError: If there are no prompts, or empty ones.
        """
        tasks = allowed if isinstance(allowed, Mapping) else {task: allowed.prompts(task) for task in allowed.tasks}
        return RefusedPrompts.fit(
            {name: check_prompts(prompts, f"the examples of {name!r}") for name, prompts in examples.items()},
            {task: check_prompts(prompts, f"the prompts of task {task!r}") for task, prompts in tasks.items()},
            self._points_of_texts,
            self._views(),
            false_alarms=false_alarms,
        )

    def check_adapter(self, adapter: GeneratedAdapter | PathLike, base_model: nn.Module | None = None) -> PolicyCheck:
        """Hold an adapter, which may have been edited, against this generator's policy.

        Args:
            adapter: The adapter, or its folder or Hub id.
            base_model: The base, for the behaviour gate; by default the one that adapters are checked on.

        Raises:
            PolicyError: If there is no policy.
            FileNotFoundError: If there is no adapter.
            CorruptFileError: If it cannot be read.
        """
        self._check_policy_is_there()
        if self.policy is None:
            raise PolicyError("The generator has no policy to hold an adapter against. Give it one with set_policy.")
        layouts = list(self.config.layouts.values())
        return check_adapter(adapter, self.policy, layouts, base_model or self.gate_base)

    def hold_to_policy(
        self, adapter: GeneratedAdapter, base_model: nn.Module | None = None, *, scale: float = 1.0
    ) -> GeneratedAdapter:
        """What the policy leaves of an adapter.

        Args:
            adapter: The adapter.
            base_model: The base that it is for, if that is at hand: for the behaviour gate.
            scale: A factor by which its updates will be multiplied besides, by another alpha for instance.

        Returns:
            The adapter, or one with smaller updates; its provenance says what was done and which policy it was.

        Raises:
            PolicyError: If it is to be refused.
        """
        policy = self.policy
        if policy is None:
            return adapter
        try:
            return self._held(policy, adapter, base_model, scale)
        except PolicyError as error:
            facts = {"reason": error.reason, "prompts_sha256": adapter.provenance.get("prompts_sha256")}
            logger.warning("adapter refused: %s", error.reason, extra={"facts": facts})
            raise

    def _held(
        self, policy: GeneratorPolicy, adapter: GeneratedAdapter, base_model: nn.Module | None, scale: float
    ) -> GeneratedAdapter:
        layout = adapter.layout
        matrices, done = policy.hold(layout, adapter.state_dict(), scale=scale)
        before = dict(adapter.provenance.get("policy") or {})
        facts: dict[str, Any] = {**before, "sha256": policy.sha256, **done}
        held = GeneratedAdapter(layout, matrices, {**adapter.provenance, "policy": facts})
        if policy.gate is not None:
            base = base_model if base_model is not None else self.gate_base
            if base is not None and at_hand(base):
                facts["divergence"] = policy.gate.check(held, base, scale=scale)
            else:
                logger.info("the policy's behaviour gate was not checked: the base is not at hand")
                facts.setdefault("divergence", None)
        return GeneratedAdapter(layout, matrices, {**adapter.provenance, "policy": facts})

    def _refuse_prompts(self, prompts: Sequence[str], seed: int, what: str) -> None:
        """Refuse prompts that the policy, or a classifier, does not allow; those that are not read do not count."""
        self._check_policy_is_there()
        policy, classify = self.policy, self.prompt_classifier
        if policy is not None and policy.classifier is not None and classify is None:
            raise PolicyError(
                f"The generator's policy wants prompts to be classified by {policy.classifier!r} first. Load it, "
                "and pass generator.set_prompt_classifier a function: texts -> for each a refused class, or None.",
                "classifier",
            )
        texts = list(dict.fromkeys(self._choose(prompts, seed)))
        counts: dict[str, int] = {}
        if policy is not None and policy.refused is not None:
            counts = policy.refused.refused(texts, self._points_of_texts, self._views())
        if classify is not None:
            counts |= _counted(classify(texts), len(texts))
        if not counts:
            return
        name = next(iter(counts))
        facts = {"reason": "refused_prompts", "classes": counts, "prompts": len(texts)}
        logger.warning(
            "prompts refused: %d of %d of the class %r",
            counts[name],
            len(texts),
            name,
            extra={"facts": {**facts, "prompts_sha256": prompts_digest(prompts)}},
        )
        raise PolicyError(
            f"The generator's policy refuses {counts[name]} of {len(texts)} prompts of {what}: class {name!r}. "
            "No adapter is written. If they are not of that class, tell the generator's publisher.",
            "refused_prompts",
        )

    def _check_policy_is_there(self) -> None:
        if self.config.policy and self.policy is None:
            raise PolicyError(
                "The generator's configuration says that it has a policy, and the policy was not loaded. Load the "
                "whole generator with from_pretrained."
            )

    def _views(self) -> Callable[[str], Sequence[str]]:
        whole = self.config.condition == "sentence_embeddings"
        most = (self.text_encoder.max_length or _MOST_WORDS) if whole else self.config.max_prompt_length
        return partial(views, most_words=most)

    @torch.no_grad()
    def _points_of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return prompt_points(self.read_states(self.text_encoder, texts))

    def load_policy(self, folder: Path) -> None:
        """Read the policy from a generator's folder, if its configuration says that there is one.

        Raises:
            CorruptFileError: If it is not as it was saved.
        """
        data = self.config.policy
        self.policy = GeneratorPolicy.load(data, folder / POLICY_NAME) if data else None
        if self.policy is not None:
            for layout in self.config.layouts.values():
                self.policy.check_layout(layout)

    def save_policy(self, folder: Path) -> None:
        """Write what of the policy is not in the configuration."""
        self._check_policy_is_there()
        if self.policy is not None:
            self.policy.save(folder / POLICY_NAME)


def _counted(classes: Sequence[str | None], expected: int) -> dict[str, int]:
    if isinstance(classes, str) or len(classes) != expected:
        raise PolicyError(
            f"The classifier of prompts must give the name of a class, or None, for each of {expected} texts; it gave "
            f"{type(classes).__name__} of length {len(classes)}.",
            "classifier",
        )
    counts: dict[str, int] = {}
    for name in classes:
        if name is not None:
            counts[str(name)] = counts.get(str(name), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
