# SPDX-License-Identifier: Apache-2.0
"""A generated adapter's card: data and a template. It says where the adapter came from, and not from which prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..errors import PromptError
from ..storage.cards import GENERATED_MARK, PLACE, loading_the_base
from ..storage.digests import texts_digest
from ..storage.hub import hub_id
from .layout import AdapterLayout


_TEMPLATE = """---
{data}
---
{mark}

# LoRA adapter{for_base}

Written by a prompt-conditioned generator ([Drag-and-Drop LLMs](https://arxiv.org/abs/2506.16406)) with
[peft_dnd](https://github.com/peft-dnd/peft-dnd), not trained. It is an ordinary PEFT adapter: nothing but `peft` is
needed to load it.

```python
{snippet}
```

{provenance}
"""


def adapter_card(
    layout: AdapterLayout,
    provenance: Mapping[str, Any],
    *,
    name: str | None = None,
    prompts: Sequence[str] | None = None,
) -> str:
    """Write a generated adapter's card.

    Args:
        layout: Its layout, which knows the base model.
        provenance: Where it came from.
        name: The folder or Hub id that the snippet loads it from, if that is known.
        prompts: The prompts that it was generated from, to be listed.

    Raises:
        PromptError: If the prompts are not those that it was generated from.
    """
    base = hub_id(layout.base_model_name_or_path)
    revision = layout.base_model_revision if base else None
    data = ModelCardData(
        library_name="peft",
        base_model=base,
        base_model_revision=revision,
        base_model_relation="adapter" if base else None,
        pipeline_tag="text-generation" if layout.task_type == "CAUSAL_LM" else None,
        tags=[*([f"base_model:adapter:{base}"] if base else []), "drag-and-drop-llms", "lora", "peft_dnd"],
    )
    facts = {"base_model": base, "base_model_revision": revision, **provenance}
    rows = [
        f"| {what.replace('_', ' ')} | `{_in_words(value)}` |"
        for what, value in facts.items()
        if value is not None and not Path(str(value)).is_absolute()  # where it lay on this machine tells nobody
    ]
    table = "\n".join(["| what | value |", "| --- | --- |", *rows])
    parts = [table if provenance else "Its origin is not recorded."]
    if prompts is not None:
        parts.append(_prompts_section(prompts, provenance))
    return _TEMPLATE.format(
        data=data.to_yaml(),
        mark=GENERATED_MARK,
        for_base=f" for {base}" if base else "",
        snippet=_snippet(layout, base, revision, name or PLACE),
        provenance="\n\n".join(parts),
    )


def _in_words(value: Any) -> str:
    """A value of the provenance; the nearest tasks with their shares, as they are recorded."""
    if isinstance(value, list) and value and all(isinstance(of, list | tuple) and len(of) == 2 for of in value):
        return ", ".join(
            f"{name!r} {share:.2f}" if isinstance(share, float) else f"{name!r} {share}" for name, share in value
        )
    return str(value)


def _snippet(layout: AdapterLayout, base: str | None, revision: str | None, name: str) -> str:
    wrapped = f'model = PeftModel.from_pretrained(base_model, "{name}")'
    if base is None:
        return f"from peft import PeftModel\n\n{wrapped}"
    imported, loaded = loading_the_base(base, revision, layout.task_type)
    return f"from peft import PeftModel\n{imported}\n\n{loaded}\n{wrapped}"


def _prompts_section(prompts: Sequence[str], provenance: Mapping[str, Any]) -> str:
    expected = provenance.get("prompts_sha256")
    if expected is not None and texts_digest(prompts) != expected:
        raise PromptError(
            f"These {len(prompts)} prompts are not those that the adapter was generated from: their SHA-256 is "
            f"{texts_digest(prompts)[:16]}..., and the adapter records {str(expected)[:16]}... Give the same ones in "
            "the same order, or leave them out."
        )
    fence = "`" * 3
    while any(fence in prompt for prompt in prompts):
        fence += "`"  # a prompt must not end its own block
    return "\n".join(["## Prompts", *(f"\n{fence}text\n{prompt}\n{fence}" for prompt in prompts)])
