# SPDX-License-Identifier: Apache-2.0
"""Signing saved folders with sigstore's model-signing, as the how-to page says; where its command is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from peft import PeftModel

from peft_dnd import GeneratedAdapter


SIGNER, OPENSSL = shutil.which("model_signing"), shutil.which("openssl")
pytestmark = pytest.mark.skipif(SIGNER is None or OPENSSL is None, reason="needs model_signing and openssl")


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


def test_a_signed_adapter_is_an_adapter_and_an_edited_one_is_found(generator, fresh_base, tmp_path: Path) -> None:
    key, public, folder = tmp_path / "key.pem", tmp_path / "public.pem", tmp_path / "adapter"
    call(OPENSSL, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key).check_returncode()
    call(OPENSSL, "ec", "-in", key, "-pubout", "-out", public).check_returncode()
    generator.generate_adapter(["tax law ."]).save_pretrained(folder)
    signature = folder / "model.sig"
    signed = call(SIGNER, "sign", "key", folder, "--private_key", key, "--signature", signature)
    assert signed.returncode == 0, signed.stderr

    def holds() -> bool:
        return call(SIGNER, "verify", "key", folder, "--public_key", public, "--signature", signature).returncode == 0

    assert holds()
    GeneratedAdapter.from_pretrained(folder)
    PeftModel.from_pretrained(fresh_base(), str(folder))  # stock PEFT does not mind the signature
    for name in ("adapter_model.safetensors", "adapter_config.json", "peft_dnd_provenance.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert not holds()
        (folder / name).write_bytes(content)
    (folder / "extra.py").write_text("", encoding="utf-8")
    assert not holds()
    (folder / "extra.py").unlink()
    assert holds()
