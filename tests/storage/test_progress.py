# SPDX-License-Identifier: Apache-2.0
"""What we load and save in a moment shows no bars; a user's own loads keep theirs."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from peft_dnd import PromptConditionedLoraGenerator
from peft_dnd.storage.progress import short_bars_hidden


pytestmark = pytest.mark.skipif(
    not hasattr(transformers_logging, "set_tqdm_hook"), reason="bars cannot be told apart in this transformers"
)


def test_loading_using_and_saving_a_generator_is_quiet(
    generator_folder: Path, base_model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
    generator.generate_adapter(["solve"]).save_pretrained(tmp_path / "adapter")
    generator.save_pretrained(tmp_path / "generator", include_text_encoder=True)
    assert capsys.readouterr().err == ""
    base_model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert "Loading weights" in capsys.readouterr().err


def test_what_takes_long_still_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with short_bars_hidden(), transformers_logging.tqdm(total=10, desc="long") as progress:
        progress.update(5)
        assert capsys.readouterr().err == ""
        now += 2
        progress.update(1)
        assert "long:  60%" in capsys.readouterr().err


def test_a_hook_of_somebody_else_stays() -> None:
    seen: list[Any] = []

    def hook(factory: Any, args: Any, kwargs: Any) -> Any:
        seen.append(kwargs)
        return factory(*args, **kwargs, disable=True)

    before = transformers_logging.set_tqdm_hook(hook)
    try:
        with short_bars_hidden(), short_bars_hidden():
            transformers_logging.tqdm(total=1)
        transformers_logging.tqdm(total=2)
    finally:
        assert transformers_logging.set_tqdm_hook(before) is hook
    assert seen == [{"total": 1}, {"total": 2}]


def test_other_threads_show_their_bars_and_end_nobodys_silence(capsys: pytest.CaptureFixture[str]) -> None:
    def load(hides: bool) -> None:
        with short_bars_hidden() if hides else nullcontext():
            for _ in transformers_logging.tqdm(range(2), desc="hidden" if hides else "shown"):
                pass

    with short_bars_hidden():
        for hides in (True, False):
            thread = threading.Thread(target=load, args=(hides,))
            thread.start()
            thread.join()
        load(False)
    assert capsys.readouterr().err.count("shown: 100%") == 1
    load(False)
    assert transformers_logging.set_tqdm_hook(None) is None
    assert "shown: 100%" in capsys.readouterr().err
