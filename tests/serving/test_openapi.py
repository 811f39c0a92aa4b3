# SPDX-License-Identifier: Apache-2.0
"""The description is right: schemathesis sends the running service what it allows and what it does not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from support.serving import serving


TOKEN = "a-token-of-the-tests"
CONFIGURATION = """
[checks]
# Answers must go with the prompts, and with what the generator reads: a schema cannot say so.
positive_data_acceptance.expected-statuses = ["2xx", "404", "409", "410", "422"]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_schemathesis_finds_nothing(generator_folder: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION, encoding="utf-8")
    environment = {"PEFT_DND_TOKENS": f"me:{TOKEN}"}
    with serving(generator_folder, tmp_path / "cache", "--remember-prompts", environment=environment) as service:
        service.wait_until_ready()
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration), "run"]
        options = ["--header", f"Authorization: Bearer {TOKEN}", "--max-examples", "25", "--seed", "0", "--no-color"]
        url = f"{str(service.client.base_url).rstrip('/')}/openapi.json"
        ran = subprocess.run([*command, url, *options], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert service.client.get("/health/ready").status_code == 200
    assert '"status": 500' not in service.log
