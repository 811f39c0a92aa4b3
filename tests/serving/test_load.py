# SPDX-License-Identifier: Apache-2.0
"""The service at its bounds under a load tool: nothing but 200, 201 and 429, no broken connection, flat memory."""

from __future__ import annotations

import shutil
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk, a load generator")
def test_ten_thousand_requests_beyond_what_it_may_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_serving

    kept = []
    monkeypatch.setattr(sys, "argv", ["bench_serving.py"])
    monkeypatch.setattr(bench_serving, "write_result", lambda name, result: kept.append(result))
    bench_serving.main()  # it ends with an error where the service did not keep what is promised
    (result,) = kept
    assert result["beyond_bounds"]["requests"] == 10_000
    assert result["beyond_bounds"]["statuses"]["429"] > 0
