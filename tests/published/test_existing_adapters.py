# SPDX-License-Identifier: Apache-2.0
"""Adapters that exist already become pairs: whatever their form, with the updates that they had."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.comparing import bytes_below
from support.existing_adapters import (
    BASE,
    CONFIG,
    PROMPTS,
    WEIGHTS,
    assert_same,
    reconfigure,
    rewrite,
    updates_of,
    updates_of_task,
)
from support.released import save

import peft_dnd.published.existing
import peft_dnd.storage.hub
from peft_dnd import ExistingAdapter, PromptCheckpointDataset, import_adapters
from peft_dnd.adapters.factors import canonical_state_dict
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.errors import (
    CorruptFileError,
    GeneratorConfigError,
    LayoutError,
    MissingFileError,
    PairsFolderError,
    PromptError,
)
from peft_dnd.pairs.writer import PairWriter


Make = Callable[..., Path]
import_whole = partial(import_adapters, factors="canonical")  # so that no update loses anything


def test_alpha_and_rank_become_one_layout_and_updates_stay(three: dict[str, Path], tmp_path: Path) -> None:
    done = import_whole(three, tmp_path / "pairs", prompts=PROMPTS)
    assert [(task.name, task.written) for task in done] == [("law", True), ("tax", True), ("med", True)]
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert {(module.rank, pairs.layout.scaling(module)) for module in pairs.layout.modules} == {(6, 1.0)}
    assert pairs.layout.base_model_name_or_path == BASE and pairs.prompts("law") == tuple(PROMPTS["law"])
    for task, folder in three.items():
        assert_same(updates_of_task(tmp_path / "pairs" / task), updates_of(folder))
        state = pairs.state_dict(task)
        canonical = canonical_state_dict(pairs.layout, state)
        for key, matrix in state.items():
            torch.testing.assert_close(canonical[key], matrix, rtol=1e-4, atol=1e-6)
    origin = json.loads((tmp_path / "pairs" / "med" / "origin.json").read_text())["adapters"]
    assert origin[0]["adapter"] == str(three["med"]) and origin[0]["ranks"] == [4, 6]
    assert origin[0]["sha256"][WEIGHTS] == hashlib.sha256((three["med"] / WEIGHTS).read_bytes()).hexdigest()
    assert origin == list(done[2].adapters) and origin[0]["lost_share"] == 0.0


def test_stock_peft_makes_the_same_of_them(three: dict[str, Path], tmp_path: Path, fresh_base: Any) -> None:
    import_whole(three, tmp_path / "pairs", prompts=PROMPTS)
    tokens = torch.arange(12)[None]
    for task, folder in three.items():
        expected = PeftModel.from_pretrained(fresh_base(), folder)(tokens).logits
        shutil.copy(
            tmp_path / "pairs" / task / "checkpoints" / "step-00000001.safetensors", tmp_path / "x.safetensors"
        )
        as_adapter = tmp_path / "as-adapter" / task
        as_adapter.mkdir(parents=True)
        shutil.move(tmp_path / "x.safetensors", as_adapter / WEIGHTS)
        shutil.copy(tmp_path / "pairs" / task / CONFIG, as_adapter / CONFIG)
        found = PeftModel.from_pretrained(fresh_base(), as_adapter)(tokens).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_factors_can_be_kept_and_powers_of_two_are_exact(make: Make, tmp_path: Path) -> None:
    adapters = {"law": make("law", r=2, lora_alpha=16), "tax": make("tax", 1, r=4, lora_alpha=4)}
    import_adapters(adapters, tmp_path / "pairs", prompts={t: PROMPTS[t] for t in adapters}, factors="kept")
    own = load_file(adapters["law"] / WEIGHTS)
    for key, found in PromptCheckpointDataset.from_folder(tmp_path / "pairs").state_dict("law").items():
        rank_first = found if "lora_A" in key else found.T
        expected = own[key] if "lora_A" in key else 8 * own[key].T
        assert torch.equal(rank_first[:2], expected) and not rank_first[2:].any()


def test_a_higher_rank_is_cut_to_the_nearest_update_and_what_is_lost_is_said(make: Make, tmp_path: Path) -> None:
    adapters = {"law": make("law", r=6, lora_alpha=9), "tax": make("tax", 1, r=2)}
    done = import_whole(adapters, tmp_path / "pairs", prompts={t: PROMPTS[t] for t in adapters}, rank=2)
    whole, lost, shares = 0.0, 0.0, {}
    found = updates_of_task(tmp_path / "pairs" / "law")
    for name, update in updates_of(adapters["law"]).items():
        u, s, v = torch.linalg.svd(update)
        torch.testing.assert_close(found[name], u[:, :2] * s[:2] @ v[:2], rtol=0, atol=1e-5)
        whole, lost = whole + s.square().sum(), lost + s[2:].square().sum()
        shares[name] = (s[2:].square().sum() / s.square().sum()).item()
    (of_law,), (of_tax,) = (task.adapters for task in done)
    assert of_law["lost_share"] == pytest.approx((lost / whole).item(), rel=1e-6)
    assert of_law["lost_most"] == max(shares, key=lambda name: shares[name])
    assert of_law["lost_share_there"] == pytest.approx(max(shares.values()), rel=1e-6)
    assert of_tax["lost_share"] == 0.0
    assert_same(updates_of_task(tmp_path / "pairs" / "tax"), updates_of(adapters["tax"]))


RENAMINGS: dict[str, Callable[[str], str]] = {
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: "_orig_mod." + key,
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "each layer compiled": lambda key: key.replace(".self_attn", "._orig_mod.self_attn").replace(
        ".mlp", "._checkpoint_wrapped_module.mlp"
    ),
    "data parallel": lambda key: "module." + key,
    "data parallel, compiled": lambda key: "module._orig_mod." + key,
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "as loralib": lambda key: key.removesuffix(".weight").removeprefix("base_model.model."),
}


@pytest.mark.parametrize("how", RENAMINGS)
def test_keys_of_other_tools(how: str, make: Make, tmp_path: Path) -> None:
    folder = make("law")
    expected = updates_of(folder)
    rewrite(folder, lambda state: {RENAMINGS[how](key): matrix for key, matrix in state.items()})
    import_whole({"law": folder}, tmp_path / "pairs", prompts={"law": PROMPTS["law"]})
    assert_same(updates_of_task(tmp_path / "pairs" / "law"), expected)


def test_embeddings_and_half_precision(make: Make, tmp_path: Path) -> None:
    folder = make("law", target_modules=["embed_tokens", "q_proj"])
    own = load_file(folder / WEIGHTS)
    rewrite(folder, lambda state: {key: matrix.bfloat16() for key, matrix in state.items()})
    import_whole({"law": folder}, tmp_path / "pairs", prompts={"law": PROMPTS["law"]}, rank=4)
    found = PromptCheckpointDataset.from_folder(tmp_path / "pairs").state_dict("law")
    start = "base_model.model.model.embed_tokens.lora_embedding_"
    expected = 2 * own[f"{start}B"].bfloat16().float() @ own[f"{start}A"].bfloat16().float()
    torch.testing.assert_close(found[f"{start}B"] @ found[f"{start}A"], expected, rtol=1e-4, atol=1e-4)


def test_modules_that_some_lack(make: Make, tmp_path: Path) -> None:
    adapters = {"law": make("law"), "tax": make("tax", 1, target_modules=["q_proj", "v_proj"])}
    options: dict[str, Any] = {"prompts": {task: PROMPTS[task] for task in adapters}}
    with pytest.raises(LayoutError, match=r"tax' does not adapt 'model.layers.0.*missing_modules='zeros'"):
        import_whole(adapters, tmp_path / "pairs", **options)
    assert not (tmp_path / "pairs").exists()
    done = import_whole(adapters, tmp_path / "pairs", missing_modules="zeros", **options)
    assert len(done[1].adapters[0]["zero_modules"]) == 10 and done[0].adapters[0]["zero_modules"] == []
    expected = updates_of(adapters["tax"])
    for name, update in updates_of_task(tmp_path / "pairs" / "tax").items():
        torch.testing.assert_close(update, expected.get(name, torch.zeros_like(update)), rtol=0, atol=1e-5)


def test_one_module_under_two_names_is_no_missing_module(make: Make, tmp_path: Path) -> None:
    some = {"target_modules": ["q_proj", "v_proj"]}
    adapters = {"law": make("law", **some), "tax": make("tax", 1, **some)}
    rewrite(adapters["tax"], lambda state: {key.replace("model.model.", "model."): m for key, m in state.items()})
    with pytest.raises(LayoutError, match="bare model"):
        import_whole(adapters, tmp_path / "pairs", prompts={t: PROMPTS[t] for t in adapters}, missing_modules="zeros")


def test_pickles_are_read_when_asked_for_and_code_never(make: Make, tmp_path: Path) -> None:
    folder = make("law")
    expected = updates_of(folder)
    save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    options: dict[str, Any] = {"prompts": {"law": PROMPTS["law"]}}
    with pytest.raises(MissingFileError, match="pickles=True"):
        import_whole({"law": folder}, tmp_path / "pairs", **options)
    import_whole({"law": folder}, tmp_path / "pairs", pickles=True, **options)
    assert_same(updates_of_task(tmp_path / "pairs" / "law"), expected)
    save({"weights": print}, folder / "adapter_model.bin")
    with pytest.raises(CorruptFileError, match="more or other than tensors"):
        import_whole({"law": folder}, tmp_path / "more", pickles=True, **options)


def test_several_adapters_of_a_task_and_what_a_trainer_leaves(make: Make, tmp_path: Path) -> None:
    for seed, step in enumerate((30, 9)):
        make(f"law/checkpoint-{step}", seed)
    adapters = {"law": tmp_path / "loras" / "law", "tax": [make("tax-a", 4), ExistingAdapter(make("tax-b", 5))]}
    import_whole(adapters, tmp_path / "pairs", prompts={t: PROMPTS[t] for t in adapters})
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert [path.stem[-2:] for path in pairs.checkpoints("law")] == ["09", "30"]
    assert_same(updates_of_task(tmp_path / "pairs/law", 30), updates_of(tmp_path / "loras/law/checkpoint-30"))
    assert_same(updates_of_task(tmp_path / "pairs/tax", 2), updates_of(tmp_path / "loras/tax-b"))


def test_an_interrupted_import_goes_on(
    three: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    import_whole(three, whole, prompts=PROMPTS)
    convert, calls = peft_dnd.published.existing.convert_adapter, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return convert(*arguments, **options)

    monkeypatch.setattr(peft_dnd.published.existing, "convert_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_whole(three, cut, prompts=PROMPTS)
    assert [path.name for path in cut.iterdir()] == ["law"]
    done = import_whole(three, cut, prompts=PROMPTS)
    assert [task.written for task in done] == [False, True, True] and len(calls) == 4
    assert bytes_below(cut) == bytes_below(whole)


def test_what_is_there_is_not_replaced_unasked(three: dict[str, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    import_whole(three, pairs, prompts=PROMPTS)
    for change in ({"prompts": {**PROMPTS, "law": ["other ?"]}}, {"factors": "kept"}):
        with pytest.raises(PairsFolderError, match=r"'law'.*overwrite=True"):
            import_whole(three, pairs, **{"prompts": PROMPTS, **change})
    rewrite(three["tax"], lambda state: {key: 2 * matrix for key, matrix in state.items()})
    with pytest.raises(PairsFolderError, match=r"'tax'.*overwrite=True"):
        import_whole(three, pairs, prompts=PROMPTS)
    done = import_whole(three, pairs, prompts=PROMPTS, overwrite=True)
    assert [task.written for task in done] == [False, True, False]
    assert_same(updates_of_task(pairs / "tax"), updates_of(three["tax"]))
    alone = {"geo": three["law"]}
    with pytest.raises(LayoutError, match=r"'law', which is in.*another layout.*layout="):
        import_whole(alone, pairs, prompts={"geo": ["river ?"]})
    layout = PromptCheckpointDataset.from_folder(pairs).layout
    import_whole(alone, pairs, prompts={"geo": ["river ?"]}, layout=layout)
    assert len(PromptCheckpointDataset.from_folder(pairs).tasks) == 4
    (pairs / "art").mkdir()
    (pairs / "art" / "thesis.txt").write_text("mine")
    with pytest.raises(PairsFolderError, match=r"thesis.txt"):
        import_whole({"art": three["law"]}, pairs, prompts={"art": ["colour ?"]}, layout=layout)
    assert (pairs / "art" / "thesis.txt").read_text() == "mine"


def test_beside_a_collection_that_was_cut_off(make: Make, tmp_path: Path) -> None:
    folder = make("law")
    writer = PairWriter(tmp_path / "pairs" / "law", PROMPTS["law"], AdapterLayout.from_folder(folder))
    writer.begin()
    writer.add(load_file(folder / WEIGHTS), 7)
    import_whole({"law": folder}, tmp_path / "pairs", prompts={"law": PROMPTS["law"]})
    assert [p.name for p in (tmp_path / "pairs/law/checkpoints").iterdir()] == ["step-00000001.safetensors"]


def test_bases_go_by_their_names(three: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reconfigure(three["tax"], base_model_name_or_path="org/base-instruct")
    with pytest.raises(LayoutError, match=r"tax.* is for the base 'org/base-instruct', and .*law.* is for 'org/base'"):
        import_whole(three, tmp_path / "pairs", prompts=PROMPTS)
    with pytest.raises(LayoutError, match=r"the base is called 'org/other'"):
        import_whole(three, tmp_path / "pairs", prompts=PROMPTS, base_model="org/other")
    reconfigure(three["med"], base_model_name_or_path=None)
    import_whole(three, tmp_path / "pairs", prompts=PROMPTS, base_model=[BASE, "org/base-instruct"])
    assert PromptCheckpointDataset.from_folder(tmp_path / "pairs").layout.base_model_name_or_path == BASE
    assert "med' does not say what base" in caplog.text
    layout = AdapterLayout.from_folder(three["law"])
    other = copy.deepcopy(layout)
    object.__setattr__(other, "base_model_name_or_path", "org/third")
    with pytest.raises(LayoutError, match="is for the base 'org/base', and the given layout is for 'org/third'"):
        import_whole({"law": three["law"]}, tmp_path / "x", prompts={"law": ["law ?"]}, layout=other)


def test_from_the_hub_the_commit_is_kept_and_a_damaged_download_seen(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, repository = make("law"), tmp_path / "models--org--law"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    asked: list[dict[str, Any]] = []
    for name in (WEIGHTS, CONFIG):
        content = (folder / name).read_bytes()
        blob = repository / "blobs" / (hashlib.sha256(content).hexdigest() if name == WEIGHTS else "0a1b2c")
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(snapshot)

    monkeypatch.setattr(peft_dnd.storage.hub, "snapshot_download", download)
    source = ExistingAdapter("org/law", revision="v2")
    (task,) = import_whole({"law": source}, tmp_path / "pairs", prompts={"law": PROMPTS["law"]})
    assert task.adapters[0]["adapter"] == "org/law" and task.adapters[0]["commit"] == "c0ffee"
    assert asked[0]["name"] == "org/law" and asked[0]["revision"] == "v2"
    assert not {"adapter_model.bin"} & set(asked[0]["allow_patterns"])
    blob = (snapshot / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptFileError, match="SHA-256"):
        import_whole({"law": source}, tmp_path / "more", prompts={"law": PROMPTS["law"]})


def test_cards_speak_for_their_adapters(make: Make, tmp_path: Path) -> None:
    template = "# Model Card for Model ID\n\n<!-- Provide a quick\n\nsummary of it -->\n\n- **Developed by:** [More "
    template += "Information Needed]\n\n### Framework versions\n\n- PEFT 0.21.2\n"
    prose = f"---\nlibrary_name: peft\n---\n{template}\nIt answers questions of\ntax law briefly.\n"
    prose += "\n```\nx = y z w v\n```\n"
    widgets = (
        "---\nwidget:\n- text: what is law ?\n- messages: [{role: user, content: a court please}]\n---\nIt is good."
    )
    adapters = {"law": make("law", card=widgets), "tax": make("tax", 1, card=prose)}
    import_whole(adapters, tmp_path / "pairs", prompts={"law": "card", "tax": "card"})
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert pairs.prompts("law") == ("what is law ?", "a court please")
    assert pairs.prompts("tax") == ("It answers questions of tax law briefly.",)
    cases: list[tuple[dict[str, Path], str]] = [
        ({"med": make("med", 2, card=template)}, "says nothing"),
        ({"geo": make("geo", 3)}, "no card"),
        ({"one": adapters["tax"], "two": make("two", 4, card=prose)}, "'one' and 'two' say the same"),
    ]
    for given, words in cases:
        with pytest.raises(PromptError, match=words):
            import_whole(given, tmp_path / "more", prompts=dict.fromkeys(given, "card"))


def test_wrong_use_is_named(three: dict[str, Path], tmp_path: Path) -> None:
    law, ask = {"law": three["law"]}, {"law": ["law ?"]}
    layout = AdapterLayout.from_folder(three["law"])
    cases: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        ({}, {"prompts": {}}, PairsFolderError, "No adapters"),
        ({"law": []}, {"prompts": ask}, PairsFolderError, "has no adapter"),
        ({"a/b": three["law"]}, {"prompts": {"a/b": ["law ?"]}}, PairsFolderError, "cannot be called 'a/b'"),
        ({"initialization": three["law"]}, {"prompts": {}}, PairsFolderError, "cannot be called"),
        (law, {"prompts": {}}, PromptError, r"'law' has no prompts.*card"),
        (law, {"prompts": {"law": []}}, PromptError, "empty"),
        (law, {"prompts": {**ask, "laws": ["x"]}}, PromptError, r"'laws', which has no adapter. Did you mean 'law'"),
        (law, {"prompts": ask, "answers": {"law": ["a", "b"]}}, PromptError, "answers"),
        (law, {"prompts": ask, "rank": 0}, GeneratorConfigError, "rank"),
        (law, {"prompts": ask, "rank": 2, "layout": layout}, GeneratorConfigError, "not both"),
        (law, {"prompts": ask, "factors": "common"}, GeneratorConfigError, "'common'"),
        (law, {"prompts": ask, "missing_modules": "zero"}, GeneratorConfigError, "'zero'"),
        ({"law": tmp_path / "typo"}, {"prompts": ask}, MissingFileError, "typo"),
        ({"law": tmp_path}, {"prompts": ask}, MissingFileError, "adapter_config.json"),
    ]
    for adapters, options, error, words in cases:
        with pytest.raises(error, match=words):
            import_whole(adapters, tmp_path / "pairs", **options)
    assert not (tmp_path / "pairs").exists()
