# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd import-generator`: a generator of the paper's release made into one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Json, Quiet, existing_file, progress, report


def import_generator(
    file: Annotated[Path, typer.Argument(help="The released .pth file.")],
    generator: Annotated[str, typer.Argument(help="Folder to save the generator to.")],
    settings: Annotated[
        str, typer.Option(help="Settings that it was made with: a name such as common-sense-0.5b, or a JSON file.")
    ],
    text_encoder: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the text encoder, if not the settings' own.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base model, if not the settings' own.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a generator of the paper's release into one of ours.

    Example:
      peft-dnd import-generator qwen0.5lora__ARC-c.pth generator --settings common-sense-0.5b
    """
    existing_file(file, "The released file")
    from peft_dnd.published import load_published_generator

    with progress(quiet):
        loaded = load_published_generator(file, settings, text_encoder=text_encoder, base_model=base_model)
        loaded.save_pretrained(generator)
    base = loaded.config.base_model_name_or_path
    report(
        {"generator": generator, "base_model": base},
        f"Generator for {base}, saved to {generator}",
        as_json=as_json,
        quiet=quiet,
    )
