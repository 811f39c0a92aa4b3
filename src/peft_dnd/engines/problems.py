# SPDX-License-Identifier: Apache-2.0
"""What serving engines would pass over in an adapter without a word, or refuse only when it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


# Layers that vLLM fuses into one: it adapts all of them, or none.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def vllm_problems(
    config: Mapping[str, Any],
    *,
    modules: Sequence[str] = (),
    served: str | None,
    max_rank: int,
    renamed: Mapping[str, str],
    target_modules: Collection[str] | None = None,
) -> list[str]:
    """What is in the way of an adapter's being served by vLLM as PEFT would run it.

    Older releases of vLLM take one rank and one alpha for all modules, from `r` and `lora_alpha`; all look modules up
    by the names that the served model has, and pass over what they do not find.

    Args:
        config: The adapter's `adapter_config.json`.
        modules: Names of its modules.
        served: The name under which the base is served, if it is known.
        max_rank: vLLM's `max_lora_rank`.
        renamed: Name of a module in the adapter -> its name in the served model, where they differ.
        target_modules: vLLM's `lora_target_modules`: endings or whole names; `None` if it adapts all.

    Returns:
        A sentence for each; none if all is well.
    """
    problems = []
    for field, scale in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        if config.get(field):
            problems.append(
                f"older releases of vLLM ignore {field} (0.32 follows it), which gives {len(config[field])} module(s) "
                f"a {scale} of their own: they would be scaled wrongly. Write the adapter anew with one {scale}: "
                "peft-dnd export --to vllm."
            )
    for field in ("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters"):
        if config.get(field):
            problems.append(f"vLLM does not take {field}, which is {config[field]!r} here. Train without it.")
    if config.get("bias", "none") != "none":
        problems.append(f"vLLM does not take trained biases, and bias is {config['bias']!r} here. Train without them.")
    ranks = [rank for rank in (config.get("r"), *dict(config.get("rank_pattern") or {}).values()) if rank]
    if ranks and max(ranks) > max_rank:
        problems.append(f"the rank of {max(ranks)} is above vLLM's limit of {max_rank}: serve with --max-lora-rank.")
    recorded = config.get("base_model_name_or_path")
    if served is not None and recorded != served:
        problems.append(
            f"it records the base {recorded!r} and the base is served as {served!r}: vLLM's folder resolver passes "
            "over it without a word. Serve the base under that name, or write the adapter anew with this one: "
            "peft-dnd export --to vllm --served."
        )
    if renamed:
        name, there = next(iter(renamed.items()))
        problems.append(
            f"{len(renamed)} module(s) have other names in the served model, {name!r} is {there!r} there: vLLM looks "
            "for them by name, and applies nothing of what it does not find. Generate for the class that is served, "
            "or write the adapter anew with its names: peft-dnd export --to vllm --base."
        )
    left_out = [name for name in modules if target_modules is not None and not _is_adapted(name, target_modules)]
    if left_out:
        problems.append(
            f"{len(left_out)} module(s), {left_out[0]!r} the first, are none of those that vLLM was told to adapt "
            f"({', '.join(sorted(target_modules or ()))}): it leaves them out without a word. Name them in its "
            "--lora-target-modules too."
        )
    return problems


def _is_adapted(name: str, target_modules: Collection[str]) -> bool:
    last = name.rpartition(".")[2]
    if last in target_modules or name in target_modules:
        return True
    return any(
        last in parts and (whole in target_modules or any(part in target_modules for part in parts))
        for whole, parts in _FUSED.items()
    )
