# SPDX-License-Identifier: Apache-2.0
"""One A for all adapters that are imported: what it holds, when it is taken, and when it is found anew."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.comparing import bytes_below
from support.existing_adapters import PROMPTS, WEIGHTS, assert_same, rewrite, updates_of, updates_of_task

from peft_dnd import PromptCheckpointDataset, import_adapters
from peft_dnd.adapters.layout import AdapterLayout, LoraModule
from peft_dnd.adapters.shared_factors import SharedInputs
from peft_dnd.errors import LayoutError


Make = Callable[..., Path]


def test_one_a_for_all(make: Make, tmp_path: Path) -> None:
    """Adapters that agree in some inputs: a shared A of as many finds just these, and of more loses nothing."""
    adapters = {task: make(task, seed, r=4, lora_alpha=4 * 2**seed) for seed, task in enumerate(("law", "tax", "med"))}
    common, draw = load_file(adapters["law"] / WEIGHTS), torch.Generator().manual_seed(0)

    def agree(state: dict[str, torch.Tensor]) -> None:
        for key, matrix in state.items():
            if "lora_A" in key:
                matrix[:3] = torch.randn(3, 3, generator=draw) @ common[key][:3]
                matrix[3:] *= 0.03

    for folder in adapters.values():
        rewrite(folder, agree)
    pairs = tmp_path / "pairs"
    done = import_adapters(adapters, pairs, prompts=PROMPTS, factors="shared", rank=3)
    data = PromptCheckpointDataset.from_folder(pairs)
    start = load_file(pairs / "initialization" / WEIGHTS)
    for task, folder in adapters.items():
        state, expected = data.state_dict(task), updates_of(folder)
        found = updates_of_task(pairs / task)
        kept, whole = 0.0, 0.0
        for key, matrix in state.items():
            if "lora_A" in key:
                assert torch.equal(matrix, start[key])
                torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), rtol=0, atol=1e-5)
            else:
                assert not start[key].any()
        for name, update in expected.items():
            a = start[f"base_model.model.{name}.lora_A.weight"].double()
            torch.testing.assert_close(found[name], update @ a.T @ a, rtol=0, atol=1e-4)
            kept, whole = kept + (update @ a.T).square().sum().item(), whole + update.square().sum().item()
        (origin,) = next(task_.adapters for task_ in done if task_.name == task)
        assert 1e-5 < origin["lost_share"] < 0.01
        assert origin["lost_share"] == pytest.approx(1 - kept / whole, rel=0.02)
    assert len({data._tasks[task].initialization for task in data.tasks}) == 1
    assert data._tasks["law"].initialization is not None
    again = import_adapters({"law": adapters["law"]}, pairs, prompts={"law": PROMPTS["law"]}, factors="shared")
    assert not again[0].written
    more = {"geo": make("geo", 7, target_modules=["q_proj"])}
    (geo,) = import_adapters(
        more, pairs, prompts={"geo": ["river ?"]}, factors="shared", layout=data.layout, missing_modules="zeros"
    )
    assert geo.adapters[0]["lost_share"] > 0.3 and len(geo.adapters[0]["zero_modules"]) == 12
    state = PromptCheckpointDataset.from_folder(pairs).state_dict("geo")
    assert all(torch.equal(matrix, start[key]) for key, matrix in state.items() if "lora_A" in key)
    import_adapters(adapters, tmp_path / "whole", prompts=PROMPTS, factors="shared", rank=24)
    assert_same(updates_of_task(tmp_path / "whole" / "tax"), updates_of(adapters["tax"]))
    with pytest.raises(LayoutError, match="rank 24 in the first and 5 in the second"):
        import_adapters({"art": adapters["law"]}, tmp_path / "whole", prompts={"art": ["x"]}, factors="shared", rank=5)


def test_factors_are_shared_unless_the_folder_has_others(
    make: Make, three: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One A for all in a new folder; afterwards, and beside tasks that were made otherwise, what these have."""
    few = {task: three[task] for task in ("law", "tax")}
    prompts = {task: PROMPTS[task] for task in few}
    import_adapters(few, tmp_path / "pairs", prompts=prompts)
    import_adapters(few, tmp_path / "asked", prompts=prompts, factors="shared", rank=10)  # twice the largest
    assert bytes_below(tmp_path / "pairs") == bytes_below(tmp_path / "asked")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (med,) = import_adapters({"med": three["med"]}, tmp_path / "pairs", prompts={"med": PROMPTS["med"]})
    data = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    a_of_tasks = [{k: m for k, m in data.state_dict(task).items() if "lora_A" in k} for task in data.tasks]
    assert all(torch.equal(each[key], matrix) for each in a_of_tasks for key, matrix in a_of_tasks[0].items())
    # Random inputs, of which two adapters have other ones: hardly anything can be kept, which is no silent matter.
    assert med.adapters[0]["lost_share"] > 0.5
    assert ("loses" in caplog.text) == (med.adapters[0]["lost_share"] > 0.75)

    import_adapters(few, tmp_path / "whole", prompts=prompts, factors="canonical")
    layout = PromptCheckpointDataset.from_folder(tmp_path / "whole").layout
    same = import_adapters(few, tmp_path / "whole", prompts=prompts)
    assert not any(task.written for task in same) and not (tmp_path / "whole" / "initialization").exists()
    more = {"more": make("more", 9, r=5)}
    import_adapters(more, tmp_path / "whole", prompts={"more": ["more ?"]}, layout=layout)
    assert_same(updates_of_task(tmp_path / "whole" / "more"), updates_of(more["more"]))


def test_a_shared_a_is_found_anew_where_all_is_replaced(three: dict[str, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    law = {"law": three["law"]}
    import_adapters(law, pairs, prompts={"law": PROMPTS["law"]}, rank=5)
    before = load_file(pairs / "initialization" / WEIGHTS)
    rewrite(three["law"], lambda state: {key: matrix.flip(-1) for key, matrix in state.items()})
    (done,) = import_adapters(law, pairs, prompts={"law": PROMPTS["law"]}, rank=5, overwrite=True)
    assert done.written and done.adapters[0]["lost_share"] == 0.0
    assert_same(updates_of_task(pairs / "law"), updates_of(three["law"]))
    tax = {"tax": three["tax"]}
    after = load_file(pairs / "initialization" / WEIGHTS)
    assert any(not torch.equal(after[key], matrix) for key, matrix in before.items())
    import_adapters(tax, pairs, prompts={"tax": PROMPTS["tax"]}, overwrite=True)  # another task's A stays
    assert all(torch.equal(load_file(pairs / "initialization" / WEIGHTS)[key], after[key]) for key in after)


def test_the_shared_a_of_many_adapters_takes_bounded_memory() -> None:
    layout = AdapterLayout((LoraModule("q", "linear", (2, 30), (20, 2), 2),))
    basis = torch.linalg.qr(torch.randn(30, 2, generator=torch.Generator().manual_seed(0))).Q.T
    inputs = SharedInputs(2)
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        a = torch.randn(2, 2, generator=draw) @ basis + 0.01 * torch.randn(2, 30, generator=draw)
        key_a, key_b = (tensor.key for tensor in layout.tensors)
        inputs.add(layout, {key_a: a, key_b: torch.randn(20, 2, generator=draw)})
        assert len(inputs._rows["q"]) <= 16
    found = inputs.matrices(layout)[key_a]
    torch.testing.assert_close(found @ basis.T @ basis @ found.T, torch.eye(2), rtol=0, atol=0.02)
