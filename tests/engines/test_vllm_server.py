# SPDX-License-Identifier: Apache-2.0
"""vLLM itself, served over HTTP with the plugin in it, says what PEFT says: `make test-engines`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.constants import TASK_PROMPTS
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig


pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-engines"),
]

TASKS = ("law", "med", "geo")
NEW_TOKENS = 12
INPUTS = ([5, 9, 12, 7], [3, 14, 4], [20, 8, 6, 11, 10], [17])


class Answered(NamedTuple):
    status: int
    body: dict[str, Any]


class Server:
    """A running vLLM."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self.log = url, log

    def get(self, path: str, body: Mapping[str, Any] | None = None) -> Answered:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, {"Content-Type": "application/json"}), timeout=300) as answer:
                content = answer.read()
                return Answered(answer.status, json.loads(content) if content else {})
        except HTTPError as error:
            return Answered(error.code, json.loads(error.read() or b"{}"))

    def complete(self, model: str, ids: list[int]) -> list[int]:
        """Greedy tokens after a prompt of tokens."""
        asked = {"model": model, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = self.get("/v1/completions", {**asked, "return_token_ids": True})
        assert answer.status == 200, f"{answer} {self.log.read_text()[-3000:]}"
        return answer.body["choices"][0]["token_ids"]


@contextmanager
def serving(base: Path, name: str, log: Path, variables: Mapping[str, str], *options: str) -> Iterator[Server]:
    """Run vLLM's OpenAI-compatible server on few threads and in little memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", name, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "64", "--max-num-seqs", "8", "--enable-lora", "--max-loras", "3", *options]
    few = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_PLUGINS": "peft_dnd", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **few, **allowed, **variables}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            _wait_for(server, process)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 600
    while time.monotonic() < ends:
        assert process.poll() is None, server.log.read_text()[-5000:]
        try:
            if server.get("/health").status == 200:
                return
        except (URLError, ConnectionError):
            pass
        time.sleep(1)
    raise AssertionError(f"vLLM did not start in ten minutes: {server.log.read_text()[-5000:]}")


def told_by_peft(base: Path, adapter: Path | None, ids: list[int]) -> list[int]:
    """Greedy tokens of PEFT in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    asked = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


def generator_for(base: Path, encoder_folder: Path, lora: LoraConfig, scale: float) -> PromptConditionedLoraGenerator:
    """A generator with random weights, whose adapters are large enough to change what the base says."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    layout = replace(AdapterLayout.from_lora_config(lora, model), base_model_name_or_path=str(base))
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        str(encoder_folder),
        num_prompts=4,
        max_prompt_length=16,
        decoder_type="set_transformer",
        decoder_config={"hidden_size": 32, "num_layers": 1, "zero_init_output": False},
    )
    torch.manual_seed(0)
    generator = PromptConditionedLoraGenerator(config).eval()
    with torch.no_grad():
        for parameter in generator.decoder.parameters():
            parameter.normal_(0, 0.3)  # as made it says nearly the same whatever the prompts
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.randn(shape) * scale, torch.full((shape[0],), scale))
    return generator


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama whose heads have a size that vLLM takes on processors, and whose next tokens are far from ties."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = LlamaConfig(
        **sizes, **heads, initializer_range=0.3, max_position_embeddings=64, tie_word_embeddings=False
    )
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        (folder / f"{task}.txt").write_text("\n".join(TASK_PROMPTS[task]), encoding="utf-8")
    return folder


def ask_for_all_at_once(server: Server) -> dict[tuple[str, int], list[int]]:
    asked = [(task, number) for number in range(len(INPUTS)) for task in TASKS]
    with ThreadPoolExecutor(len(asked)) as threads:
        return dict(
            zip(asked, threads.map(lambda pair: server.complete(pair[0], INPUTS[pair[1]]), asked), strict=True)
        )


def test_three_tasks_at_once_by_name(tiny_base: Path, encoder_folder: Path, task_files: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    generator = generator_for(tiny_base, encoder_folder, lora, scale=0.1)
    generator.save_pretrained(tmp_path / "generator")
    variables = {"PEFT_DND_GENERATOR": str(tmp_path / "generator"), "PEFT_DND_TASKS": str(task_files)}
    variables["PEFT_DND_CACHE"] = str(tmp_path / "cache")
    with serving(tiny_base, "tiny", tmp_path / "log", variables, "--max-lora-rank", "8") as server:
        said = ask_for_all_at_once(server)
        said_by_base = [server.complete("tiny", ids) for ids in INPUTS]
        listed = {model["id"]: model for model in server.get("/v1/models").body["data"]}
        assert server.get("/v1/completions", {"model": "nobody", "prompt": [5]}).status == 404
        for hostile in ("../law", "dnd:../../etc", "/etc/passwd", "dnd:", "law.txt"):
            assert server.get("/v1/completions", {"model": hostile, "prompt": [5]}).status == 404
    places = {task: tmp_path / "direct" / task for task in TASKS}
    for task, place in places.items():
        generator.generate_adapter(TASK_PROMPTS[task]).save_pretrained(place)
    expected = {(t, n): told_by_peft(tiny_base, places[t], ids) for t in TASKS for n, ids in enumerate(INPUTS)}
    assert said == expected
    assert said_by_base == [told_by_peft(tiny_base, None, ids) for ids in INPUTS]
    each = {str([said[task, number] for number in range(len(INPUTS))]) for task in TASKS}
    assert len(each) == 3 and str(said_by_base) not in each, "the adapters must say different things"
    assert set(listed) == {"tiny", *TASKS}
