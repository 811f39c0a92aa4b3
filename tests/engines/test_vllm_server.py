# SPDX-License-Identifier: Apache-2.0
"""vLLM itself, served over HTTP with the plugin in it, says what PEFT says: `make test-engines`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
from support.engine_stand_ins import StandIn, tar_of
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_dnd import (
    AdapterLayout,
    GeneratedAdapter,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.cli.app import main
from peft_dnd.engines import renamed_modules


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
    command += ["--max-model-len", "64", "--max-num-seqs", "8", "--enable-lora", *options]
    # One slot more than there are adapters: vLLM's code for processors takes -1, which stands for no adapter, as an
    # index, so that a request for the base in a batch with others gets what is in the last slot.
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--max-loras", "4"]
    few = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_PLUGINS": "peft_dnd", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**os.environ, **few, **allowed, **variables}
    with log.open("wb") as out:
        # A session of its own, since it starts processes that do not end with it when it is killed.
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            _wait_for(server, process)
            yield server
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 1800
    while time.monotonic() < ends:
        assert process.poll() is None, server.log.read_text()[-5000:]
        try:
            if server.get("/health").status == 200:
                return
        except (URLError, ConnectionError):
            pass
        time.sleep(1)
    raise AssertionError(f"vLLM did not start in half an hour: {server.log.read_text()[-5000:]}")


def told_by_peft(base: Path, adapters: Mapping[str, Path]) -> dict[tuple[str, int], list[int]]:
    """Greedy tokens of PEFT in float32, by adapter and number of the input; `""` is the base without one."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    said = {("", number): _generated(model, ids) for number, ids in enumerate(INPUTS)}
    for name, folder in adapters.items():
        peft_model = PeftModel.from_pretrained(model, str(folder)).eval()
        said.update({(name, number): _generated(peft_model, ids) for number, ids in enumerate(INPUTS)})
        model = peft_model.unload()
    return said


def _generated(model: torch.nn.Module, ids: list[int]) -> list[int]:
    asked = torch.tensor([ids])
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), eos_token_id=None, **settings)
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


def ask_for_all_at_once(server: Server, base: str, names: Sequence[str]) -> dict[tuple[str, int], list[int]]:
    """What all say to all inputs, asked for at the same time; `""` is the base."""
    asked = [(name, number) for number in range(len(INPUTS)) for name in ("", *names)]
    with ThreadPoolExecutor(len(asked)) as threads:
        said = threads.map(lambda pair: server.complete(pair[0] or base, INPUTS[pair[1]]), asked)
        return dict(zip(asked, said, strict=True))


def check_three_tasks(
    base: Path, encoder_folder: Path, lora: LoraConfig, tasks: Path, folder: Path, scale: float
) -> None:
    generator = generator_for(base, encoder_folder, lora, scale)
    generator.save_pretrained(folder / "generator")
    places = {"GENERATOR": folder / "generator", "TASKS": tasks, "CACHE": folder / "cache"}
    variables = {f"PEFT_DND_{name}": str(place) for name, place in places.items()}
    with serving(base, "served", folder / "log", variables, "--max-lora-rank", "8") as server:
        said = ask_for_all_at_once(server, "served", TASKS)
        listed = {model["id"] for model in server.get("/v1/models").body["data"]}
        for name in ("nobody", "../law", "dnd:../../etc", "/etc/passwd", "dnd:", "law.txt"):
            assert server.get("/v1/completions", {"model": name, "prompt": [5]}).status == 404
    for task in TASKS:
        generator.generate_adapter(TASK_PROMPTS[task]).save_pretrained(folder / "direct" / task)
    assert said == told_by_peft(base, {task: folder / "direct" / task for task in TASKS})
    each = {str([said[name, number] for number in range(len(INPUTS))]) for name in ("", *TASKS)}
    assert len(each) == 4, "they must say different things"
    assert listed == {"served", *TASKS}


def test_three_tasks_at_once_by_name(tiny_base: Path, encoder_folder: Path, task_files: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    check_three_tasks(tiny_base, encoder_folder, lora, task_files, tmp_path, scale=0.1)


@pytest.mark.skipif(not os.environ.get("ENGINES_BASE"), reason="ENGINES_BASE names no base, such as Gemma's folder")
def test_three_tasks_on_a_real_base(encoder_folder: Path, task_files: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = Path(os.environ["ENGINES_BASE"])
    check_three_tasks(base, encoder_folder, lora, task_files, tmp_path, scale=0.02)


def test_what_a_service_gives(
    tiny_base: Path, encoder_folder: Path, service: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By id and by task; one of several ranks; one whose modules vLLM does not know, and one for another base."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    several = LoraConfig(
        r=2,
        lora_alpha=8,
        rank_pattern={"q_proj": 6, "up_proj": 4},
        alpha_pattern={"q_proj": 3, "v_proj": 20},
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )
    plain = generator_for(tiny_base, encoder_folder, lora, 0.1).generate_adapter(TASK_PROMPTS["law"])
    uneven = generator_for(tiny_base, encoder_folder, several, 0.1).generate_adapter(TASK_PROMPTS["med"])
    names = {module.name: f"language_model.{module.name}" for module in plain.layout.modules}
    elsewhere = renamed_modules(plain, names)
    other = GeneratedAdapter(replace(plain.layout, base_model_name_or_path="org/other"), plain.state_dict())
    ids = {}
    for digit, (name, adapter) in enumerate(
        {"plain": plain, "uneven": uneven, "elsewhere": elsewhere, "other": other}.items()
    ):
        adapter.save_pretrained(tmp_path / name)
        ids[name] = f"{digit:x}" * 64
        files = {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
        service.says(f"/v1/adapters/{ids[name]}", tar_of(files))
    service.says("/v1/adapters", {"id": ids["plain"]})
    variables = {"PEFT_DND_SERVICE_URL": service.url, "PEFT_DND_CACHE": str(tmp_path / "cache")}
    asked = ("law", f"dnd:{ids['uneven']}", f"dnd:{ids['elsewhere']}")
    with serving(tiny_base, "served", tmp_path / "log", variables, "--max-lora-rank", "8") as server:
        said = ask_for_all_at_once(server, "served", asked)
        refused = server.get("/v1/completions", {"model": f"dnd:{ids['other']}", "prompt": [5]})
        service.says("/v1/adapters", {"detail": "busy"}, status=503)
        unreachable = server.get("/v1/completions", {"model": "dnd:med", "prompt": [5]})
        unknown = server.get("/v1/completions", {"model": "med", "prompt": [5]})
        assert server.complete("served", INPUTS[0]) == said["", 0], "it runs on"
    log = (tmp_path / "log").read_text(encoding="utf-8")
    expected = told_by_peft(tiny_base, {"law": tmp_path / "plain", asked[1]: tmp_path / "uneven"})
    assert {key: said[key] for key in expected} == expected
    for number in range(len(INPUTS)):
        # vLLM's silence, which `peft-dnd inspect --for vllm --base` breaks.
        assert said[asked[2], number] == said["", number] != said["law", number]
    assert refused.status == 404 and "PEFT_DND_BASE=org/other" in log
    assert unreachable.status == 500 and "503" in str(unreachable.body), unreachable
    assert unknown.status == 404
    assert main(["inspect", str(tmp_path / "elsewhere"), "--for", "vllm", "--base", str(tiny_base)]) == 1
    assert "other names in the served model" in capsys.readouterr().out
