# SPDX-License-Identifier: Apache-2.0
"""Holding adapters against the policies of generators, for the verbs."""

from __future__ import annotations

from typing import Any

from .bases import load_base
from .console import CommandError


def held_against_policy(
    kind: str, what: str, generator: str, gate_base: str | None, revision: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Hold an adapter against a generator's policy, of which configuration and policy alone are read.

    Args:
        kind: What lies there, as `inspect` tells it.
        what: Folder or Hub id of the adapter.
        generator: Folder or Hub id of the generator.
        gate_base: Folder or Hub id of the base for the behaviour gate.
        revision: The adapter's on the Hub.

    Returns:
        What is known of the check, and what is wrong.

    Raises:
        CommandError: If it is no adapter, or the generator has no policy.
    """
    from transformers.utils import CONFIG_NAME

    from peft_dnd.generator import PromptConditionedLoraGeneratorConfig
    from peft_dnd.policy import GeneratorPolicy, check_adapter
    from peft_dnd.policy.policy import POLICY_NAME
    from peft_dnd.storage.hub import find_adapter, find_generator

    if kind != "adapter":
        raise CommandError(f"--policy-of is for adapters, and {what!r} holds a {kind}.")
    folder, _ = find_generator(generator, (CONFIG_NAME, POLICY_NAME))
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(folder)
    if not config.policy:
        raise CommandError(f"The generator {generator!r} has no policy to hold an adapter against.")
    policy = GeneratorPolicy.load(config.policy, folder / POLICY_NAME)
    base = None if gate_base is None else load_base(gate_base, config.adapter_layout.task_type)
    adapter = find_adapter(what, ("adapter_*", "peft_dnd_provenance.json"), revision=revision)
    found = check_adapter(adapter, policy, config.adapter_layout, base)
    facts = {"of": generator, "kept": not found.problems, "not_checked": "; ".join(found.not_checked) or None}
    return facts, [f"policy: {problem}" for problem in found.problems]
