# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd export`: an adapter in the form that a serving engine takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .bases import skeleton
from .console import CommandError, Json, Quiet, Revision, adapter_place, report


if TYPE_CHECKING:
    from peft_dnd.adapters import GeneratedAdapter


def export(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter.")],
    place: Annotated[str, typer.Argument(help="File to write for gguf, folder for vllm.")],
    to: Annotated[
        Literal["gguf", "vllm"], typer.Option(help="gguf: one file for llama.cpp and Ollama; vllm: a folder for vLLM.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="The base: folder or Hub id, or for gguf also its GGUF file. vllm: the class served."
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="gguf: llama.cpp's name of the base's architecture, where it has another.")
    ] = None,
    served: Annotated[str | None, typer.Option(help="vllm: the name under which the base is served.")] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter anew in the form that a serving engine takes. The update is the same.

    For llama.cpp and Ollama that is a GGUF file. For vLLM it is a folder in which all modules have one rank and one
    scaling, the names that they have in the served class (--base), and the served base's name (--served).

    Example:
      peft-dnd export adapter adapter.gguf --to gguf --base Qwen/Qwen2.5-0.5B
      peft-dnd export adapter law --to vllm --base google/gemma-3-4b-it --served google/gemma-3-4b-it
    """
    if to == "gguf" and base is None:
        raise typer.BadParameter("To write a GGUF file the base is needed: --base FOLDER, HUB_ID or FILE.gguf.")
    if to == "gguf" and served is not None:
        raise typer.BadParameter("--served is for --to vllm.")
    if to == "vllm" and architecture is not None:
        raise typer.BadParameter("--architecture is for --to gguf.")
    if to == "gguf" and Path(place).is_dir():
        raise CommandError(f"{place!r} is a folder. Name the file to write, {str(Path(place, 'adapter.gguf'))!r} say.")
    from peft_dnd.adapters import GeneratedAdapter

    found = GeneratedAdapter.from_pretrained(adapter, revision=revision)
    facts: dict[str, Any] = {"adapter": adapter, "format": to, "place": place}
    if to == "gguf":
        from peft_dnd.engines import write_gguf

        write_gguf(found, place, str(base), architecture=architecture)
        facts["bytes"] = Path(place).stat().st_size
    else:
        written = _for_vllm(found, base, served)
        written.save_pretrained(adapter_place(place))
        facts |= _changes(found, written)
    report(facts, f"{adapter}: written to {place} for {to}", as_json=as_json, quiet=quiet)


def _for_vllm(adapter: GeneratedAdapter, base: str | None, served: str | None) -> GeneratedAdapter:
    from peft_dnd.engines import names_in_served_class, recorded_base, renamed_modules, with_one_rank

    if base is not None:
        adapter = renamed_modules(adapter, names_in_served_class(skeleton(base), adapter.layout))
    if served is not None:
        adapter = recorded_base(adapter, served)
    return with_one_rank(adapter)


def _changes(before: GeneratedAdapter, after: GeneratedAdapter) -> dict[str, Any]:
    names = {module.name for module in before.layout.modules}
    return {
        "base_model": after.layout.base_model_name_or_path,
        "rank": after.layout.max_rank,
        "renamed_modules": sum(module.name not in names for module in after.layout.modules),
    }
