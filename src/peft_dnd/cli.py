# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The `peft-dnd` command: thin, argument parsing only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .configuration import PromptConditionedLoraGeneratorConfig
from .errors import PeftDndError, PromptError
from .modeling import PromptConditionedLoraGenerator
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name; `None` reads the real one.

    Returns:
        0, or 1 with a message on standard error if something is wrong with the input.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (PeftDndError, OSError) as error:
        print(f"peft-dnd: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-dnd", description="LoRA adapters from prompts.")
    parser.add_argument("--version", action="version", version=f"peft-dnd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="write a task's adapter from its prompts")
    generate.add_argument("generator", help="folder or Hub id of the generator")
    generate.add_argument("prompts", help="text file with one prompt a line, or a .jsonl with {'prompt': ...} a line")
    generate.add_argument("adapter", help="folder to save the adapter to")
    generate.add_argument("--revision", help="branch, tag or commit of the generator on the Hub")
    generate.add_argument("--seed", type=int, default=0, help="decides which prompts are read if there are too many")
    generate.set_defaults(run=_generate)

    show = commands.add_parser("show", help="say what a generator reads and writes")
    show.add_argument("generator", help="folder or Hub id of the generator")
    show.add_argument("--revision", help="branch, tag or commit on the Hub")
    show.set_defaults(run=_show)
    return parser


def _generate(options: argparse.Namespace) -> None:
    prompts = _read_prompts(Path(options.prompts))
    generator = PromptConditionedLoraGenerator.from_pretrained(options.generator, revision=options.revision)
    adapter = generator.generate_adapter(prompts, seed=options.seed)
    adapter.save_pretrained(options.adapter)
    print(f"{adapter!r} from {len(prompts)} prompts, saved to {options.adapter}")


def _show(options: argparse.Namespace) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(options.generator, revision=options.revision)
    layout = config.adapter_layout
    facts = {
        "base_model": config.base_model_name_or_path,
        "modules": len(layout.modules),
        "max_rank": layout.max_rank,
        "adapter_parameters": layout.num_parameters,
        "decoder": config.decoder_type,
        "text_encoder": config.text_encoder,
        "num_prompts": config.num_prompts,
        "max_prompt_length": config.max_prompt_length,
        "measured": config.measured,
    }
    print(json.dumps(facts, indent=2, ensure_ascii=False))


def _read_prompts(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix != ".jsonl":
        return [line.rstrip("\r") for line in lines]
    try:
        return [json.loads(line)["prompt"] for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PromptError(
            f'{str(path)!r} is not a .jsonl file with one {{"prompt": "..."}} a line ({error!r}). Mend the line, '
            "or give a text file with one prompt a line."
        ) from error
