# SPDX-License-Identifier: Apache-2.0
"""Answer questions of many tasks with one base model; a task's adapter is written when it is first asked for.

    python generate_and_serve.py --model MODEL --generator GENERATOR --tasks tasks < questions.jsonl > answers.jsonl

A task is a file `tasks/<name>.txt` with a prompt on each line; a question is `{"task": "law", "question": "..."}`. An
answer has the question's line with `answer` added, or `error`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from peft_dnd import AdapterPool, PromptConditionedLoraGenerator
from peft_dnd.errors import PeftDndError


def main(arguments: Sequence[str] | None = None, questions: TextIO = sys.stdin) -> None:
    """Answer one line after another."""
    options = parse(arguments)
    pool = make_pool(options)
    # The base model, in which PEFT has put the adapters: pipelines know its class.
    answerer = pipeline(
        "text-generation", model=pool.model.get_base_model(), tokenizer=AutoTokenizer.from_pretrained(options.model)
    )
    for line in questions:
        print(json.dumps(answered(pool, answerer, line, options.max_new_tokens), ensure_ascii=False), flush=True)
    print(f"{dict(pool.counts)}", file=sys.stderr)


def make_pool(options: argparse.Namespace) -> AdapterPool:
    base = AutoModelForCausalLM.from_pretrained(options.model)
    generator = PromptConditionedLoraGenerator.from_pretrained(options.generator)
    pool = AdapterPool(base, generator, size=options.size, kept=options.kept)
    for path in sorted(options.tasks.glob("*.txt")) or sys.exit(f"There is no .txt file in {options.tasks}."):
        pool.add(path.stem, [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()])
    return pool


def answered(pool: AdapterPool, answerer: Any, line: str, max_new_tokens: int) -> dict[str, Any]:
    """One line of what came in, with its answer, or what is wrong with it."""
    try:
        asked = json.loads(line)
        with pool.use(asked["task"]):
            (found,) = answerer(
                asked["question"], max_new_tokens=max_new_tokens, do_sample=False, return_full_text=False
            )
    except (ValueError, KeyError, TypeError, PeftDndError) as error:
        return {"line": line.rstrip("\n"), "error": f"{type(error).__name__}: {error}"}
    return {**asked, "answer": found["generated_text"]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the base model")
    parser.add_argument("--generator", required=True, help="folder or Hub id of a generator for it")
    parser.add_argument("--tasks", type=Path, required=True, help="folder with a .txt of prompts for each task")
    parser.add_argument("--size", type=int, default=8, help="adapters in the model at once")
    parser.add_argument("--kept", type=int, default=64, help="adapters in main memory besides")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
