# SPDX-License-Identifier: Apache-2.0
"""What the tiny models of the tests are made with: words, prompts, a LoRA configuration."""

from __future__ import annotations

from peft import LoraConfig


WORDS = ("what", "is", "the", "capital", "river", "colour", "of", "a", "law", "medicine", "tax", "court")
WORDS += ("doctor", "please", "answer", "in", "one", "word", "?", ".", ",")
LORA_CONFIG = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
TASK_PROMPTS = {
    "law": ["what is the law of the court ?", "what is tax law ?", "a court please", "what court ?", "law of tax ."],
    "med": ["what is the medicine of a doctor ?", "doctor please", "what is medicine ?", "medicine please ."],
    "geo": ["what is the capital ?", "the river please", "what is a river ?", "capital in one word .", "river ?"],
    "art": ["what is the colour ?", "answer in one word , colour", "a colour please", "colour of a river ?"],
}
