# SPDX-License-Identifier: Apache-2.0
"""Fit an embedding model to domains that it has never been trained on, from their unlabelled text alone.

    python adapt_embeddings.py fit   --model MODEL --domains domains --pairs pairs --output generator
    python adapt_embeddings.py adapt --model MODEL --generator generator --text new.txt --output adapted

A domain is a file `domains/<name>.txt` with a text on each line. `fit` trains a LoRA adapter for each of them without
labels: a text should be nearer to itself, under other dropout, than to others (SimCSE, arXiv 2104.08821). To these
pairs of texts and adapters it fits a generator. `adapt` writes a new domain's adapter without any training. On texts
that were not read it says how large that loss is without and with the adapter: look at both before you use it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

from peft_dnd import (
    CheckpointCollector,
    DnDConfig,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.pairs import uncollected


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit a generator, or adapt the model with one."""
    options = parse(arguments)
    fit(options) if options.verb == "fit" else adapt(options)


def fit(options: argparse.Namespace) -> None:
    files = sorted(options.domains.glob("*.txt")) or sys.exit(f"There is no .txt file in {options.domains}.")
    for name in uncollected([path.stem for path in files], options.pairs):
        train_adapter(options, name)
    pairs = PromptCheckpointDataset.from_folder(options.pairs)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(pairs, text_encoder=options.model)
    generator = PromptConditionedLoraGenerator(config)
    settings = DnDTrainingArguments(
        str(options.output / "fitting"),
        max_steps=options.fitting_steps,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
    )
    DnDTrainer(generator, settings, train_dataset=pairs).train()
    generator.save_pretrained(options.output, include_text_encoder=True)


def train_adapter(options: argparse.Namespace, name: str) -> None:
    """Train one domain's adapter; the callback keeps the last of its steps."""
    texts = lines_of(options.domains / f"{name}.txt")
    model = SentenceTransformer(options.model)
    lora = LoraConfig(r=options.rank, target_modules=options.target_modules, lora_dropout=0.1)
    model.add_adapter(lora)
    settings = SentenceTransformerTrainingArguments(
        str(options.output / "runs" / name),
        max_steps=options.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        seed=0,  # the same for all domains
        save_strategy="no",
        report_to="none",
    )
    SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=Dataset.from_dict({"anchor": texts, "positive": texts}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[CheckpointCollector(options.pairs / name, texts, last=options.checkpoints)],
    ).train()


def adapt(options: argparse.Namespace) -> None:
    texts = lines_of(options.text)
    read, unread = texts[::2], texts[1::2]
    model = SentenceTransformer(options.model)
    before = loss_on(model, unread)
    model.add_adapter(DnDConfig(generator=options.generator, prompts=read))
    print(f"loss on {len(unread)} texts that were not read: {before:.4f} without, {loss_on(model, unread):.4f} with")
    model.save_pretrained(str(options.output))  # the adapter alone, as PEFT saves it


def loss_on(model: SentenceTransformer, texts: list[str]) -> float:
    """SimCSE's loss on texts, with the dropout of a fixed seed."""
    loss = MultipleNegativesRankingLoss(model)
    features = [model.preprocess(texts), model.preprocess(texts)]
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        found = float(loss(features, torch.zeros(len(texts))))
    model.eval()
    return found


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fitting, adapting = verbs.add_parser("fit"), verbs.add_parser("adapt")
    for verb in (fitting, adapting):
        verb.add_argument("--model", required=True, help="folder or Hub id of a sentence-transformers model")
        verb.add_argument("--output", type=Path, required=True, help="folder for the result")
    fitting.add_argument("--domains", type=Path, required=True, help="folder with a .txt for each domain")
    fitting.add_argument("--pairs", type=Path, required=True, help="the pairs folder")
    fitting.add_argument("--target-modules", nargs="+", default=["query", "key", "value"])
    fitting.add_argument("--rank", type=int, default=8)
    fitting.add_argument("--steps", type=int, default=100)
    fitting.add_argument("--checkpoints", type=int, default=10)
    fitting.add_argument("--fitting-steps", type=int, default=300)
    adapting.add_argument("--generator", required=True, help="folder or Hub id of what `fit` made")
    adapting.add_argument("--text", type=Path, required=True, help="the new domain, a text on each line")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
