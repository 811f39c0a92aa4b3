# SPDX-License-Identifier: Apache-2.0
"""What the scripts beside `run.py` take alike on the command line, and what they set up before they begin."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import transformers


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that all of them take.

    Args:
        description: The script's docstring.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the world; that of a fitted generator that is given")
    parser.add_argument("--output", type=Path, default=Path("language_model_output"), help="where everything goes")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folders of data, as run.py was given")
    parser.add_argument("--base", type=Path, help="where the base is, or goes; default: in the output folder")
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's own choice")
    return parser


def set_up(options: argparse.Namespace) -> None:
    """Plain logging, a quiet transformers, and as many threads as are asked for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
