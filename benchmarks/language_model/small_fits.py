# SPDX-License-Identifier: Apache-2.0
"""What scripts share that fit several contestants on the small part of the world: arguments, a fit, questions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from language_model import options
from language_model.base import load_base, prepare_base
from language_model.compare import above
from language_model.fitting import FitSettings, fit_generator
from language_model.judging import Contest
from language_model.parts import Part, small_part
from language_model.rivals import OWN, lora_layout
from language_model.run import load_generator
from language_model.tasks import Task
from language_model.world import build_world
from peft_dnd.storage.files import read_json


def parser_of(description: str | None, steps: int) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    parser = options.parser_of(description)
    parser.add_argument("--steps", type=int, default=steps)
    return parser


def prepared(given: argparse.Namespace) -> tuple[Path, Part]:
    """The base's folder, and the small part of the world."""
    options.set_up(given)
    return prepare_base(given.base or given.output / "base"), small_part(build_world(given.seed, given.data))


def path_of(folder: Path, name: str) -> Path:
    """Where what is found of a contestant goes."""
    return folder / name.replace(" ", "-").replace(",", "") / "found.json"


def found_in(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What is there of contestants."""
    return {name: read_json(path_of(folder, name)) for name in names if path_of(folder, name).is_file()}


def fitted(
    where: Path, base: Path, tasks: Sequence[Task], settings: FitSettings, answers: Path | None = None
) -> tuple[Contest, dict[str, Any]]:
    """Fit a generator unless that is done.

    Returns:
        It and the base, to be asked; and what is to be told of the fit.
    """
    if not (where / "generator" / "config.json").is_file() or not (where / "log.json").is_file():
        fit_generator(where, base, tasks, settings, answers)
    model, tokenizer = load_base(base, torch.bfloat16)
    generator = load_generator(str(where / "generator"), base)
    contest = Contest(model=model, tokenizer=tokenizer, generator=generator, own_layout=lora_layout(model, OWN.rank))
    log = read_json(where / "log.json")
    return contest, {
        "seconds of fitting": round(float(log[-1]["train_runtime"]), 1),
        "parameters": generator.num_parameters(),
        "loss of the last steps": last_loss(log),
    }


def last_loss(log: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the last steps that the log has a loss of."""
    return next((float(entry["loss"]) for entry in reversed(log) if "loss" in entry), None)


def above_one(found: Mapping[str, Mapping[str, Any]], first: str) -> dict[str, Any]:
    """By how much each other contestant's adapters are above one's, of each kind."""
    return {
        name: {
            kind: above(rows["generated"], found[first]["kinds"][kind]["generated"])
            for kind, rows in of["kinds"].items()
        }
        for name, of in found.items()
        if name != first and first in found
    }
