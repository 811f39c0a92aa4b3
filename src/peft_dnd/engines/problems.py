# SPDX-License-Identifier: Apache-2.0
"""What serving engines would pass over in an adapter without a word, or refuse only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def vllm_problems(
    config: Mapping[str, Any], *, served: str | None, max_rank: int, renamed: Mapping[str, str]
) -> list[str]:
    """What is in the way of an adapter's being served by vLLM as PEFT would run it.

    vLLM takes one rank and one alpha for all modules, from `r` and `lora_alpha`, and looks modules up by the names
    that the served model has.

    Args:
        config: The adapter's `adapter_config.json`.
        served: The name under which the base is served, if it is known.
        max_rank: vLLM's `max_lora_rank`.
        renamed: Name of a module in the adapter -> its name in the served model, where they differ.

    Returns:
        A sentence for each; none if all is well.
    """
    problems = []
    for field, scale in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        if config.get(field):
            problems.append(
                f"vLLM ignores {field}, which gives {len(config[field])} module(s) a {scale} of their own: they would "
                f"be scaled wrongly. Give all modules one {scale}."
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
            "over it without a word. Serve the base under that name, or set base_model_name_or_path."
        )
    if renamed:
        name, there = next(iter(renamed.items()))
        problems.append(
            f"{len(renamed)} module(s) have other names in the served model, {name!r} is {there!r} there: vLLM looks "
            "for them by name. Generate for the class that is served."
        )
    return problems
