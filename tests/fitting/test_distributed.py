# SPDX-License-Identifier: Apache-2.0
"""Two processes fit what one with twice the accumulation fits, whole or sharded, and one of them writes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.distributed_fit import fit
from torch import nn
from transformers import HfArgumentParser
from transformers.integrations import deepspeed

from peft_dnd import (
    AdapterLayout,
    DnDTrainingArguments,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_examples,
)
from peft_dnd.decoders import DECODERS
from peft_dnd.errors import GeneratorConfigError, WeightValueError
from peft_dnd.storage.files import read_json
from peft_dnd.storage.processes import agree, check_sharding, check_whole, is_first_process, loaded_whole


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distributed"
ON_CPU = ROOT / "tests" / "support" / "sharding_on_cpu.py"
FITTING = (
    *("--max_steps", "6", "--per_device_train_batch_size", "2", "--learning_rate", "3e-3", "--threads", "1"),
    *("--condition_noise", "0", "--target_noise", "0", "--logging_steps", "1", "--save_steps", "3"),
    *("--generator", '{"num_prompts": 3, "decoder_type": "hyper_convolution", "decoder_config": {"kernel_size": 3}}'),
    *("--disable_tqdm", "true", "--report_to", "none"),
)


@pytest.fixture(scope="module")
def world(pairs_folder: Path, encoder_folder: Path, base_model: nn.Module, tmp_path_factory: Any) -> Path:
    """A folder with pairs that have examples, an encoder, and a base."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(pairs_folder, folder / "pairs")
    for number, task in enumerate(("law", "med", "geo", "art")):
        rows = [{"input_ids": [number, 5, 9, 3 + i], "labels": [-100, 5, 9, 3 + i]} for i in range(6)]
        write_examples(folder / "pairs" / task, rows)
    shutil.copytree(encoder_folder, folder / "encoder")
    base_model.save_pretrained(folder / "base")
    return folder


def launch(*command: Any, launcher: str = "torch.distributed.run", **environment: str) -> None:
    """Run a script in two processes, which talk by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "torch.distributed.run": ["--nproc-per-node", "2", "--master-port", port],
        "accelerate.commands.launch": ["--main_process_port", port],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", launcher, *map(str, options), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same_weights(first: Path, second: Path, atol: float) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor.float(), other[key].float(), atol=atol), key


def test_two_processes_fit_what_one_with_twice_the_accumulation_fits(world: Path, tmp_path: Path) -> None:
    launch(ROOT / "tests" / "support" / "distributed_fit.py", world, tmp_path / "two")
    ranks = [read_json(world / f"rank-{rank}.json") for rank in (0, 1)]
    alone = fit(world, tmp_path / "one", accumulation=2)

    assert alone["wrapped_in"] == "PromptConditionedLoraGenerator"
    for rank in ranks:
        assert rank["wrapped_in"] == "DistributedDataParallel"
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["gradients"] == pytest.approx(alone["gradients"], rel=1e-4)
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=1e-5)

    # Each has pairs of its own: in two epochs the two met each of 12 checkpoints twice, as the one did.
    mine, theirs = (rank["seen"] for rank in ranks)
    assert len(mine) == len(theirs) == 12
    assert all(not set(mine[i : i + 6]) & set(theirs[i : i + 6]) for i in (0, 6))
    assert sorted(mine + theirs) == sorted(alone["seen"])
    assert ranks[0]["noise_seed"] != ranks[1]["noise_seed"]

    assert [rank["may_write"] for rank in ranks] == [True, False]
    two = {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()}
    one = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    states = {path for path in two ^ one if path.name.startswith("rng_state")}  # one for each process
    assert two ^ one == states
    prompts = ["what is the law ?", "a river please"]
    adapters = [
        PromptConditionedLoraGenerator.from_pretrained(tmp_path / name).generate_adapter(prompts).state_dict()
        for name in ("one", "two")
    ]
    assert all(torch.allclose(tensor, adapters[1][key], atol=1e-6) for key, tensor in adapters[0].items())


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: Any) -> Path:
    """What the example fits in one process with an accumulation of two."""
    output = tmp_path_factory.mktemp("alone")
    command = [sys.executable, EXAMPLE / "fit.py", *options_for(world, output), "--gradient_accumulation_steps", "2"]
    subprocess.run([*map(str, command), "--use_cpu"], check=True)
    return output


def options_for(world: Path, output: Path) -> list[str]:
    paths = {"--pairs": world / "pairs", "--text_encoder": world / "encoder", "--output_dir": output}
    return [*FITTING, *(str(part) for pair in paths.items() for part in pair)]


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_json(folder / "trainer_state.json")["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_accelerate_launch_with_the_example_configuration(world: Path, alone: Path, tmp_path: Path) -> None:
    flags = ("--num_processes", "2", "--mixed_precision", "no")
    configured = (*flags, "--config_file", EXAMPLE / "ddp.yaml", EXAMPLE / "fit.py")
    launch(*configured, *options_for(world, tmp_path), "--use_cpu", launcher="accelerate.commands.launch")
    assert losses_of(tmp_path) == pytest.approx(losses_of(alone), rel=1e-5)
    assert_same_weights(alone, tmp_path, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
def test_fsdp_shards_resumes_and_saves_whole(world: Path, alone: Path, tmp_path: Path, mixed: bool) -> None:
    precision = "bf16" if mixed else "no"
    flags = ("--num_processes", "2", "--mixed_precision", precision, "--config_file", EXAMPLE / "fsdp.yaml")
    options = (*options_for(world, tmp_path), "--use_cpu", *(["--bf16"] if mixed else []))
    fitting = (*flags, ON_CPU, EXAMPLE / "fit.py", *options)
    launch(*fitting, launcher="accelerate.commands.launch")
    assert (tmp_path / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file()  # written by FSDP: it was in force
    assert losses_of(tmp_path) == pytest.approx(losses_of(alone), rel=1e-2 if mixed else 1e-5)
    assert_same_weights(alone, tmp_path, atol=2e-2 if mixed else 1e-3)
    whole = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(whole[f"normalization.{name}"], load_file(alone / "model.safetensors")[f"normalization.{name}"])
        for name in ("mean", "scale")
    )
    prompts = ["what is the law ?", "a river please"]
    adapter = PromptConditionedLoraGenerator.from_pretrained(tmp_path).generate_adapter(prompts)
    expected = PromptConditionedLoraGenerator.from_pretrained(alone).generate_adapter(prompts).state_dict()
    for key, tensor in adapter.state_dict().items():
        assert torch.allclose(tensor, expected[key], atol=1e-3), key

    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "model.safetensors").unlink()
    launch(*fitting, "--resume_from_checkpoint", "latest", launcher="accelerate.commands.launch")
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_same(world: Path, alone: Path, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    config = EXAMPLE / f"deepspeed_zero{stage}.json"
    fitting = (ON_CPU, EXAMPLE / "fit.py", *options_for(world, tmp_path), "--deepspeed", config)
    launch(*fitting, DS_ACCELERATOR="cpu")
    assert losses_of(tmp_path) == pytest.approx(losses_of(alone), rel=1e-5)
    assert_same_weights(alone, tmp_path, atol=1e-3)


class Share(torch.Tensor):
    """What FSDP leaves in a module: a tensor of which this process holds a part."""

    def full_tensor(self) -> torch.Tensor:
        return self


@pytest.mark.parametrize("share", [torch.zeros(2).as_subclass(Share), torch.zeros(0)])
def test_shares_of_weights_are_not_written(
    generator: PromptConditionedLoraGenerator, share: torch.Tensor, tmp_path: Path
) -> None:
    weights = {**generator.state_dict(), "normalization.scale": share}
    with pytest.raises(WeightValueError, match=r"normalization\.scale.*sharded.*save_model"):
        generator.save_pretrained(tmp_path / "saved", state_dict=weights)
    assert not (tmp_path / "saved").exists()
    check_whole(generator.state_dict())


def test_what_cannot_be_sharded_is_refused_and_fsdp_on_a_cpu_is_warned_of() -> None:
    args: Any = SimpleNamespace(fsdp=True, device=torch.device("cpu"))
    plugin = SimpleNamespace(cpu_ram_efficient_loading=False)
    check_sharding(args, plugin, fits_text_encoder=False)
    with pytest.raises(GeneratorConfigError, match="freeze_text_encoder"):
        check_sharding(args, plugin, fits_text_encoder=True)
    with pytest.raises(GeneratorConfigError, match="fsdp_cpu_ram_efficient_loading"):
        check_sharding(args, SimpleNamespace(cpu_ram_efficient_loading=True), fits_text_encoder=False)
    with pytest.warns(UserWarning, match="does not shard on CPU"):
        check_sharding(args, None, fits_text_encoder=True)


def test_one_process_is_the_first_and_agrees_with_itself() -> None:
    assert is_first_process()
    value = {"score": 1.0}
    assert agree(value) is value


def test_text_encoders_are_loaded_whole_where_zero_3_would_shard_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    assert deepspeed.is_deepspeed_zero3_enabled()
    with pytest.raises(KeyboardInterrupt), loaded_whole():
        assert not deepspeed.is_deepspeed_zero3_enabled()
        raise KeyboardInterrupt
    assert deepspeed.is_deepspeed_zero3_enabled()


@pytest.mark.parametrize("decoder_type", sorted(DECODERS))
def test_what_is_gathered_at_once_is_part_of_the_decoder(
    layout: AdapterLayout, encoder_folder: Path, decoder_type: str
) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout, str(encoder_folder), num_prompts=2, max_prompt_length=8, decoder_type=decoder_type
    )
    with torch.device("meta"):
        generator = PromptConditionedLoraGenerator(config)
    assert generator._no_split_modules
    assert set(generator._no_split_modules) <= {type(module).__name__ for module in generator.modules()}
    assert generator.get_input_embeddings() is None


def test_arguments_can_come_from_a_command_line(tmp_path: Path) -> None:
    given = ["--output_dir", str(tmp_path), "--loss_weighting", "within_task", "--lr_scheduler_type", "linear"]
    (arguments,) = HfArgumentParser(DnDTrainingArguments).parse_args_into_dataclasses([*given, "--use_cpu"])
    assert (arguments.loss_weighting, arguments.lr_scheduler_type) == ("within_task", "linear")
    (arguments,) = HfArgumentParser(DnDTrainingArguments).parse_args_into_dataclasses([*given[:2], "--use_cpu"])
    assert arguments.lr_scheduler_type == "cosine"
