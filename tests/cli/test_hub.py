# SPDX-License-Identifier: Apache-2.0
"""The command and the cards' snippets, from one repository of the Hub to another, over the Hub's own HTTP."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli.conftest import Run
from peft import PeftModel
from support.hub_server import settings_for
from support.hub_state import OWNER, HubServer
from support.live_models import PROMPTS
from torch import nn

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator


pytest_plugins = ("support.hub_server",)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    (tmp_path / "law.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return tmp_path / "law.txt"


@pytest.fixture
def on_hub(generator: PromptConditionedLoraGenerator, base_folder: Path, hub: HubServer) -> HubServer:
    """The Hub with a generator that carries its text encoder, and the base that it is for."""
    own = copy.deepcopy(generator)
    own.config.base_model_name_or_path = "me/base"
    own.config.base_model_revision = hub.put("me/base", base_folder)
    own.push_to_hub("me/generator", include_text_encoder=True)
    return hub


def test_generates_from_a_repository_into_another(run: Run, on_hub: HubServer, prompt_file: Path, generator) -> None:
    ran = run("generate", "me/generator", prompt_file, "--push-to-hub", "me/law", "--private", "--json")
    assert ran.code == 0, ran.err
    assert ran.facts["repository"] == "me/law" and on_hub.repos["models", "me/law"].private
    head = on_hub.repos["models", "me/generator"].branches["main"]
    assert ran.facts["provenance"]["generator_revision"] == head
    read, expected = GeneratedAdapter.from_pretrained("me/law").state_dict(), generator.generate_adapter(PROMPTS)
    assert all(torch.equal(read[key], tensor) for key, tensor in expected.state_dict().items())
    card = on_hub.files("me/law")["README.md"].decode()
    for named in ("me/base", "me/generator", head, ran.facts["provenance"]["prompts_sha256"]):
        assert named in card
    assert not any(prompt in card for prompt in PROMPTS)
    ran = run("generate", "me/generator", prompt_file, "--push-to-hub", "me/law", "--prompts-in-card")
    assert ran.code == 0 and all(prompt in on_hub.files("me/law")["README.md"].decode() for prompt in PROMPTS)


def test_several_tasks_and_a_revision(run: Run, on_hub: HubServer, task_files: Path) -> None:
    first = on_hub.repos["models", "me/generator"].branches["main"]
    ran = run("generate", "me/generator", task_files, "--push-to-hub", "me/tasks", "--revision", first, "--json")
    assert ran.code == 0, ran.err
    repositories = [made["repository"] for made in ran.facts["adapters"]]
    assert repositories == ["me/tasks-art", "me/tasks-geo", "me/tasks-law", "me/tasks-med"]
    assert all(("models", name) in on_hub.repos for name in repositories)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["me/genrator"], "'me/genrator'.*no such repository"),
        (["me/generator", "--revision", "v9"], "no revision 'v9'"),
        (["me/generator", "--push-to-hub", "you/law"], "403.*namespace 'you'"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    run: Run, on_hub: HubServer, prompt_file: Path, tmp_path: Path, given: list[str], words: str
) -> None:
    place = [] if "--push-to-hub" in given else [tmp_path / "adapter"]
    ran = run("generate", given[0], prompt_file, *place, *given[1:])
    assert ran.code == 1 and not ran.out
    (line,) = [line for line in ran.err.splitlines() if line.startswith("peft-dnd:")]
    assert re.search(words, line)
    assert not (tmp_path / "adapter").exists() and ("models", "you/law") not in on_hub.repos


def test_inspect_and_card_look_without_fetching_weights(run: Run, on_hub: HubServer) -> None:
    on_hub.asked.clear()
    ran = run("inspect", "me/generator", "--json")
    assert ran.code == 0, ran.err
    assert not any(asked.path.startswith("/large/") for asked in on_hub.asked)
    assert ran.facts["weights_bytes"] == len(on_hub.files("me/generator")["model.safetensors"])
    assert ran.facts["commit"] == on_hub.repos["models", "me/generator"].branches["main"]
    assert ran.facts["base_model_revision"] == on_hub.repos["models", "me/base"].branches["main"]
    assert run("card", "me/generator").out.strip() == on_hub.files("me/generator")["README.md"].decode().strip()


def snippet(card: bytes) -> str:
    found = re.search(r"```python\n(.*?)```", card.decode(), flags=re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_the_cards_snippets_run_as_they_stand(
    run: Run, on_hub: HubServer, prompt_file: Path, fresh_base: Callable[[], nn.Module], tmp_path: Path
) -> None:
    assert run("generate", "me/generator", prompt_file, "--push-to-hub", "me/law").code == 0
    generators, adapters = (snippet(on_hub.files(name)["README.md"]) for name in ("me/generator", "me/law"))
    look = "print(model.peft_config['default'].r)\n"
    tokens = "import torch\nprint(float(model(input_ids=torch.tensor([[1, 5, 9]])).logits.abs().sum()))\n"
    script = generators + look + "import sys\nassert 'peft_dnd' in sys.modules\n" + adapters + look + tokens
    (tmp_path / "elsewhere").mkdir()
    on_hub.put("me/base", tmp_path / "elsewhere")  # the base's main branch goes on: the snippets name its commit
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **settings_for(on_hub, tmp_path / "home"), "HF_TOKEN": OWNER},
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *looks, total = ran.stdout.splitlines()
    assert looks == ["3", "3"]
    model = PeftModel.from_pretrained(fresh_base(), "me/law")
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([[1, 5, 9]])).logits.abs().sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def test_collect_records_which_commit_of_the_base_it_was(
    run, base_folder: Path, task_files: Path, hub: HubServer, tmp_path: Path
) -> None:
    commit = hub.put("me/base", base_folder)
    task = f"law={task_files / 'law.jsonl'}"
    options = ["--max-steps", "2", "--last", "1", "--rank", "2", "--device", "cpu", "-q"]
    ran = run("collect", "--base", "me/base", "-o", tmp_path / "pairs", "--task", task, *options)
    assert ran.code == 0, ran.err
    layout = PromptCheckpointDataset.from_folder(tmp_path / "pairs").layout
    assert (layout.base_model_name_or_path, layout.base_model_revision) == ("me/base", commit)
    assert json.loads((tmp_path / "pairs" / "law" / "adapter_config.json").read_text())["revision"] == commit
