# SPDX-License-Identifier: Apache-2.0
"""Collect prompt-checkpoint pairs for many tasks: all of them, or one slice, in one process or several.

    python collect.py --base MODEL --tasks tasks --pairs pairs                     # all, one after another
    python collect.py --base MODEL --tasks tasks --pairs pairs --workers 4         # four at a time on this machine
    python collect.py --base MODEL --tasks tasks --pairs pairs --slice 3/16        # the third of an array of 16 jobs
    python collect.py --base MODEL --tasks tasks --pairs pairs --ray               # on a Ray cluster

A task is a file `tasks/<name>.jsonl` with one `{"prompt": ..., "answer": ...}` a line. For each one a LoRA adapter is
trained, and its last checkpoints are kept in `pairs/<name>`. Tasks that are complete are passed over, so that the same
command, run again, does what is left; an interrupted task starts anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_dnd import CheckpointCollector
from peft_dnd.pairs import tasks_of_slice, uncollected


logger = logging.getLogger("collect")


def main() -> int:
    """Collect what is left of the slice; 1 if a task failed, when all others are done."""
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    names = [path.stem for path in options.tasks.glob("*.jsonl")]
    mine = tasks_of_slice(names, options.slice)
    left = uncollected(mine, options.pairs)
    logger.info("%d tasks, %d of them in slice %s, %d left", len(names), len(mine), options.slice, len(left))
    if options.ray:
        failed = collect_on_ray(options, left)
    elif options.workers > 1:
        failed = collect_in_workers(options, left)
    else:
        failed = [name for name in left if not collected(options, name)]
    if failed:
        logger.error("%d tasks failed: %s. Run the command again when they are mended.", len(failed), failed)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The options. Jobs of one pairs folder must agree in all but --slice, --workers and --ray."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--base", required=True, help="folder or Hub id of the base model")
    made.add_argument("--tasks", type=Path, required=True, help="folder with a .jsonl for each task")
    made.add_argument("--pairs", type=Path, required=True, help="pairs folder, which all jobs share")
    made.add_argument("--slice", default="1/1", help="which part of the tasks, k/n")
    made.add_argument("--workers", type=int, default=1, help="how many tasks at a time, in processes of their own")
    made.add_argument("--ray", action="store_true", help="spread the tasks over a Ray cluster")
    made.add_argument("--gpus", type=float, default=0, help="GPUs that a task takes on that cluster")
    made.add_argument("--threads", type=int, help="CPU threads of each process")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=int, default=16)
    made.add_argument("--target-modules", default="all-linear", help="a pattern, or names with commas between")
    made.add_argument("--steps", type=int, default=125)
    made.add_argument("--checkpoints", type=int, default=50, help="how many of the last steps to keep")
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--learning-rate", type=float, default=1e-4)
    made.add_argument("--seed", type=int, default=0, help="of each task's start, so that it is the same everywhere")
    made.add_argument("--max-length", type=int, default=512, help="tokens of an example")
    return made


def collected(options: argparse.Namespace, name: str) -> bool:
    """Collect a task; false, with the error in the log, if that fails, so that the others still get their turn."""
    try:
        collect_task(options, name)
    except Exception:
        logger.exception("Task %s failed.", name)
        return False
    logger.info("Task %s is complete.", name)
    return True


def collect_in_workers(options: argparse.Namespace, names: list[str]) -> list[str]:
    """Collect tasks in several processes on this machine; those that failed."""
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[bool], str] = {pool.submit(collected, options, name): name for name in names}
        return [running[future] for future in as_completed(running) if future.exception() or not future.result()]


def collect_on_ray(options: argparse.Namespace, names: list[str]) -> list[str]:
    """Collect tasks on a Ray cluster whose machines see the same folders; those that failed."""
    import ray  # pip install "peft-dnd[ray]"

    ray.init()
    work = ray.remote(num_cpus=options.threads or 1, num_gpus=options.gpus)(collected)
    done = ray.get([work.remote(options, name) for name in names])
    return [name for name, succeeded in zip(names, done, strict=True) if not succeeded]


def collect_task(options: argparse.Namespace, name: str) -> None:
    """Train an adapter on a task and keep its last checkpoints."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in (options.tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base)
    set_seed(options.seed)  # the fresh adapter is then the same for every task, whichever comes first
    targets = options.target_modules.split(",") if "," in options.target_modules else options.target_modules
    lora = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    collector = CheckpointCollector(
        options.pairs / name, [row["prompt"] for row in rows], last=options.checkpoints, task=name
    )
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            model=get_peft_model(base, lora),
            args=arguments,
            train_dataset=[as_example(tokenizer, row, options.max_length) for row in rows],
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[collector],
        ).train()


def as_example(tokenizer: PreTrainedTokenizerBase, row: dict[str, str], max_length: int) -> dict[str, Any]:
    """Token ids of a prompt and its answer, by the model's chat template if it has one; the answer alone counts."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        question = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        answer = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(question)
    else:
        question, answer = f"{row['prompt']}\n", f"{row['answer']}{tokenizer.eos_token or ''}"
    ids = tokenizer(question, add_special_tokens=False).input_ids
    labels = tokenizer(answer, add_special_tokens=False).input_ids
    return {"input_ids": (ids + labels)[:max_length], "labels": ([-100] * len(ids) + labels)[:max_length]}


if __name__ == "__main__":
    raise SystemExit(main())
