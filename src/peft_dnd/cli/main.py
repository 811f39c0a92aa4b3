# SPDX-License-Identifier: Apache-2.0
"""The `peft-dnd` command: thin, argument parsing only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..decoders import check_decoder_type
from ..errors import PeftDndError, PromptError
from ..generator.configuration import PromptConditionedLoraGeneratorConfig
from ..generator.modeling import PromptConditionedLoraGenerator
from ..generator.paper_settings import available_settings
from ..generator.streaming import StreamedLoraGenerator
from ..published.files import read_published_prompts
from ..published.importer import import_published_adapters, load_published_generator
from ..text.out_of_distribution import ACTIONS
from ..version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name; `None` reads the real one.

    Returns:
        0; 1 with a message on standard error if something is wrong with the input, or it cannot be saved; 130 if it
        was interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("peft-dnd: interrupted.", file=sys.stderr)
        return 130
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
    generate.add_argument(
        "prompts",
        help="text file with one prompt a line, or a .jsonl with {'prompt': ...} a line, and 'answer' if that is read",
    )
    generate.add_argument("adapter", help="folder to save the adapter to")
    generate.add_argument("--revision", help="branch, tag or commit of the generator on the Hub")
    generate.add_argument("--seed", type=int, default=0, help="decides which prompts are read if there are too many")
    generate.add_argument(
        "--stream", action="store_true", help="read the decoder's weights from disk as it runs, to save memory"
    )
    generate.add_argument(
        "--out-of-distribution",
        choices=ACTIONS,
        default="ignore",
        help="what to do if the prompts are unlike those of the tasks that the generator was fitted on",
    )
    generate.set_defaults(run=_generate)

    show = commands.add_parser("show", help="say what a generator reads and writes")
    show.add_argument("generator", help="folder or Hub id of the generator")
    show.add_argument("--revision", help="branch, tag or commit on the Hub")
    show.set_defaults(run=_show)

    settings = f"settings that it was made with: {', '.join(available_settings())}, or a JSON file of your own"
    generator = commands.add_parser(
        "import-generator", help="turn a generator of the paper's release into one of ours"
    )
    generator.add_argument("file", help="the released .pth file")
    generator.add_argument("generator", help="folder to save the generator to")
    generator.add_argument("--settings", required=True, help=settings)
    generator.add_argument("--text-encoder", help="folder or Hub id of the text encoder, if not the settings' own")
    generator.add_argument("--base-model", help="folder or Hub id of the base model, if not the settings' own")
    generator.set_defaults(run=_import_generator)

    adapters = commands.add_parser("import-adapters", help="turn released adapters into a folder of pairs")
    adapters.add_argument("adapters", help="folder with one folder of checkpoints for each task")
    adapters.add_argument("pairs", help="pairs folder to write to")
    adapters.add_argument("--settings", required=True, help=settings)
    adapters.add_argument(
        "--prompts",
        action="append",
        required=True,
        metavar="TASK=FILE",
        help="a task and its prompts: a .txt or .jsonl as for generate, or a .json of the release; once for each task",
    )
    adapters.set_defaults(run=_import_adapters)
    return parser


def _generate(options: argparse.Namespace) -> None:
    prompts = _read_prompts(Path(options.prompts))
    generator_class = StreamedLoraGenerator if options.stream else PromptConditionedLoraGenerator
    generator = generator_class.from_pretrained(options.generator, revision=options.revision)
    # A file may hold answers that the generator does not read, as a pairs folder's prompts.jsonl does.
    answers = None if generator.config.condition_text == "prompts" else _read_answers(Path(options.prompts))
    adapter = generator.generate_adapter(
        prompts, seed=options.seed, answers=answers, out_of_distribution=options.out_of_distribution
    )
    adapter.save_pretrained(options.adapter)
    print(f"{adapter!r} from {len(prompts)} prompts, saved to {options.adapter}")


def _show(options: argparse.Namespace) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(options.generator, revision=options.revision)
    check_decoder_type(config.decoder_type)  # what would not load must not be shown as if it were fine
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
        "condition_text": config.condition_text,
        "measured": config.measured,
    }
    print(json.dumps(facts, indent=2, ensure_ascii=False))


def _import_generator(options: argparse.Namespace) -> None:
    generator = load_published_generator(
        options.file, options.settings, text_encoder=options.text_encoder, base_model=options.base_model
    )
    generator.save_pretrained(options.generator)
    print(f"Generator for {generator.config.base_model_name_or_path}, saved to {options.generator}")


def _import_adapters(options: argparse.Namespace) -> None:
    prompts = {}
    for given in options.prompts:
        task, equals, file = given.partition("=")
        if not equals:
            raise PromptError(f"--prompts {given!r} is not of the form TASK=FILE.")
        if task in prompts:
            raise PromptError(f"--prompts names the task {task!r} twice. Give each task one file.")
        prompts[task] = _read_prompts(Path(file))
    tasks = import_published_adapters(options.adapters, options.pairs, prompts=prompts, settings=options.settings)
    print(f"{len(tasks)} task(s), saved to {options.pairs}: {', '.join(tasks)}")


def _read_answers(path: Path) -> list[str]:
    try:
        lines = _read_text(path).split("\n")
        return [json.loads(line)["answer"] for line in lines if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PromptError(
            f"The generator reads answers too, and {str(path)!r} does not hold them ({error!r}). Give a .jsonl file "
            'with one {"prompt": "...", "answer": "..."} a line.'
        ) from error


def _read_text(path: Path) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PromptError(
            f"The prompts' file {str(path)!r} {what}. Give a text file with one prompt a line, or a .jsonl."
        )
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompts' file {str(path)!r} is not in UTF-8 ({error}). Save it in UTF-8, or give another file."
        ) from error


def _read_prompts(path: Path) -> list[str]:
    if path.suffix == ".json":
        return read_published_prompts(path)
    text = _read_text(path)
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
