# SPDX-License-Identifier: Apache-2.0
"""Records of several splits put together."""

from __future__ import annotations

from typing import Any

import pytest
from language_model.pooled import pooled


def record(seed: int, generated: dict[str, float], **more: dict[str, float]) -> dict[str, Any]:
    """A record of one kind: of each row the share that each task has right, of eight questions."""
    zeros, ones = dict.fromkeys(generated, 0.0), dict.fromkeys(generated, 1.0)
    of_rows = {"base": zeros, "generated": generated, "shuffled": zeros, "trained": ones, **more}
    rows = {key: {"by_task": of, "tokens_read": 10.0 + seed, "seconds": 2.0} for key, of in of_rows.items()}
    kinds = {"new_combinations": {"tasks": 4, "rows": rows}, "real_text": {"tasks": 1, "rows": rows}}
    return {"seed": seed, "settings_of": {"asked": {"rows": 8}}, "kinds": kinds if seed else {**kinds, "new": {}}}


def test_tasks_of_all_splits_count_and_rows_that_all_have() -> None:
    first = record(0, {"plural": 1.0, "capital": 0.5}, multi_task={"plural": 1.0, "capital": 1.0})
    found = pooled([first, record(1, {"plural": 0.0, "emoji": 0.125, "colour": 0.0})])
    assert list(found) == ["new_combinations", "real_text"]
    report = found["new_combinations"]
    assert (report["tasks"], report["counted"]) == (8, 5)
    assert set(report["rows"]) == {"base", "generated", "shuffled", "trained"}
    row = report["rows"]["generated"]
    assert row["by_task"]["plural (seed 0)"] == 1 and row["by_task"]["plural (seed 1)"] == 0
    assert row["mean"]["value"] == pytest.approx(1.625 / 5) and row["tokens_read"] == 10.5
    low, high = row["mean"]["over_tasks"]
    assert low < 1.625 / 5 < high
    assert report["share_of_gap_closed"]["value"] == report["conditioning_gain"]["value"] == pytest.approx(1.625 / 5)


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="no share of 8"):
        pooled([record(0, {"plural": 0.3, "capital": 0.5})])
