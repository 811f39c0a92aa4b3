# SPDX-License-Identifier: Apache-2.0
"""`import-generator` and `import-adapters`: what the command adds; the readers have tests of their own."""

from __future__ import annotations

import peft_dnd.errors
import peft_dnd.published


def test_a_generator_goes_through(run, tmp_path, monkeypatch) -> None:
    asked = []

    def load(*arguments: object, **options: object) -> peft_dnd.PromptConditionedLoraGenerator:
        asked.append((arguments, options))
        raise peft_dnd.errors.CorruptFileError("it is damaged")

    monkeypatch.setattr(peft_dnd.published, "load_published_generator", load)
    ran = run("import-generator", tmp_path / "released.pth", tmp_path / "generator", "--settings", "math-1.5b")
    assert ran.code == 1 and "released.pth" in ran.err and not asked
    (tmp_path / "released.pth").write_bytes(b"x")
    ran = run("import-generator", tmp_path / "released.pth", tmp_path / "generator", "--settings", "math-1.5b")
    assert ran.code == 1 and ran.err.endswith("peft-dnd: it is damaged\n")
    assert asked == [((tmp_path / "released.pth", "math-1.5b"), {"text_encoder": None, "base_model": None})]
    assert run("import-generator", tmp_path / "released.pth", "generator").code == 2  # of which settings?
    ran = run("import-generator", "typo", "generator")
    assert ran.code == 2 and "'typo' is no folder of Text-to-LoRA's" in ran.err


def test_adapters_go_through(run, tmp_path, monkeypatch) -> None:
    asked = {}
    monkeypatch.setattr(
        peft_dnd.published,
        "import_published_adapters",
        lambda *_, **options: asked.update(options) or tuple(options["prompts"]),
    )
    (tmp_path / "law.txt").write_text("what is law ?\n", encoding="utf-8")
    start = ("import-adapters", tmp_path, tmp_path / "pairs", "--settings", "math-1.5b")
    ran = run(*start, "--prompts", f"law={tmp_path / 'law.txt'}", "--json")
    assert ran.code == 0 and ran.facts["tasks"] == ["law"] and asked["prompts"] == {"law": ["what is law ?"]}
    assert run(*start, "--prompts", "law.txt").code == 2
    ran = run(*start, "--prompts", "law=typo.txt")
    assert ran.code == 1 and "typo.txt" in ran.err
