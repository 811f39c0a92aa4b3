# SPDX-License-Identifier: Apache-2.0
"""`DnDConfig` and generated adapters in the libraries that build on PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
from support.live_models import PROMPTS, TOKENS, assert_holds, logits
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_dnd.adapters.generated_adapter import GeneratedAdapter
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.generator.modeling import PromptConditionedLoraGenerator
from peft_dnd.peft_integration.config import DnDConfig


pytest_plugins = ("support.adapter_fixtures",)

FreshBase = Callable[[], nn.Module]
MakeConfig = Callable[..., DnDConfig]
GeneratorFor = Callable[[AdapterLayout], PromptConditionedLoraGenerator]


def test_transformers_add_adapter(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, expected: torch.Tensor, tmp_path: Path
) -> None:
    model = fresh_base()
    model.add_adapter(dnd(), "law")
    assert_holds(model, "law", adapter)
    assert torch.equal(logits(model), expected)
    model.add_adapter(dnd(), "again")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "plain")
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert '"dnd"' not in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(), tmp_path)), expected)


def test_transformers_load_adapter(
    dnd: MakeConfig,
    fresh_base: FreshBase,
    adapter: GeneratedAdapter,
    other_adapter: GeneratedAdapter,
    adapter_folder: str,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = fresh_base()
    model.load_adapter(adapter_folder)
    assert torch.equal(logits(model), expected)
    other_adapter.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    assert torch.equal(logits(model), logits(other_adapter.load_into(fresh_base())))
    assert adapter.load_into(model) is model
    assert torch.equal(logits(model), expected)
    model = fresh_base()
    model.load_adapter(peft_config=adapter.peft_config, adapter_state_dict=adapter.state_dict())
    assert torch.equal(logits(model), expected)


def test_sentence_transformers_add_adapter(encoder_folder: Path, generator_for: GeneratorFor) -> None:
    model = SentenceTransformer(str(encoder_folder), device="cpu")
    before = model.encode(PROMPTS)
    lora = LoraConfig(r=2, target_modules=["query", "value"])
    generator = generator_for(AdapterLayout.from_lora_config(lora, model[0].auto_model))
    model.add_adapter(DnDConfig(generator=generator, prompts=PROMPTS), "law")
    assert_holds(model[0].auto_model, "law", generator.generate_adapter(PROMPTS))
    assert abs(model.encode(PROMPTS) - before).max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(torch.tensor(model.encode(PROMPTS)), torch.tensor(before))


def test_training_goes_on_from_the_generated_start(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, expected: torch.Tensor, tmp_path: Path
) -> None:
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()] * 2
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
    }

    def start() -> nn.Module:
        return get_peft_model(fresh_base(), dnd())

    model = start()
    assert torch.equal(logits(model), expected)
    base_before = copy.deepcopy(model.get_base_model().model.embed_tokens.weight)
    Trainer(model, TrainingArguments(**arguments, max_steps=4), train_dataset=Dataset.from_list(rows)).train()
    trained = live_state_dict(model, "default")
    assert not any(torch.equal(trained[key], tensor) for key, tensor in adapter.state_dict().items())
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, base_before)
    resumed = start()
    trainer = Trainer(resumed, TrainingArguments(**arguments, max_steps=4), train_dataset=Dataset.from_list(rows))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed), logits(model))
    reloaded = PeftModel.from_pretrained(fresh_base(), str(tmp_path / "checkpoint-4"), is_trainable=True)
    assert torch.equal(logits(reloaded), logits(model))


def test_trl_takes_the_configuration(
    dnd: MakeConfig, fresh_base: FreshBase, adapter: GeneratedAdapter, encoder_folder: Path, tmp_path: Path
) -> None:
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder_folder)
    tokenizer.eos_token = "[SEP]"
    rows = Dataset.from_list([{"text": "what is the law ?"}, {"text": "a river please"}])
    trainer = SFTTrainer(
        model=fresh_base(), args=arguments, train_dataset=rows, peft_config=dnd(), processing_class=tokenizer
    )
    assert_holds(trainer.model, "default", adapter)
    trainer.train()
    live = live_state_dict(trainer.model, "default")
    assert not all(torch.equal(live[key], tensor) for key, tensor in adapter.state_dict().items())
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(), tmp_path / "saved")), logits(trainer.model))
