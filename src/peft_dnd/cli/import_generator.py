# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd import-generator`: a generator of the paper's release, or of Text-to-LoRA, made into one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import CommandError, Json, Quiet, existing_file, progress, report


# The file of weights in a folder of Text-to-LoRA's.
_TEXT_TO_LORA = "hypermod.pt"


def import_generator(
    file: Annotated[
        Path, typer.Argument(help="The released .pth file; or the folder of a checkpoint of Text-to-LoRA.")
    ],
    generator: Annotated[str, typer.Argument(help="Folder to save the generator to.")],
    settings: Annotated[
        str | None,
        typer.Option(help="Of a .pth file, the settings that it was made with: common-sense-0.5b, or a JSON file."),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the text encoder, if not its own.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base model, if not its own.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a generator of the paper's release, or of Text-to-LoRA, into one of ours.

    Example:
      peft-dnd import-generator qwen0.5lora__ARC-c.pth generator --settings common-sense-0.5b
      peft-dnd import-generator trained_t2l/gemma_2b_t2l generator
    """
    theirs = file.name == _TEXT_TO_LORA or file.is_dir()
    if theirs and settings is not None:
        raise typer.BadParameter("--settings is for the .pth files of the paper's release: leave it out.")
    if not theirs and settings is None:
        raise typer.BadParameter(
            f"{str(file)!r} is no folder of Text-to-LoRA's. Of a .pth file of the paper's release, name the settings "
            "that it was made with: --settings common-sense-0.5b, say."
        )
    if not file.is_dir():
        existing_file(file, "The released file")
    elif not (file / _TEXT_TO_LORA).is_file():
        raise CommandError(f"The folder {str(file)!r} holds no {_TEXT_TO_LORA}. Name a folder of Text-to-LoRA's.")
    from peft_dnd.published import load_published_generator, load_text_to_lora

    with progress(quiet):
        if settings is None:
            loaded = load_text_to_lora(file, text_encoder=text_encoder, base_model=base)
        else:
            loaded = load_published_generator(file, settings, text_encoder=text_encoder, base_model=base)
        loaded.save_pretrained(generator)
    base_model = loaded.config.base_model_name_or_path
    report(
        {"generator": generator, "base_model": base_model},
        f"Generator for {base_model}, saved to {generator}",
        as_json=as_json,
        quiet=quiet,
    )
