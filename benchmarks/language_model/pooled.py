# SPDX-License-Identifier: Apache-2.0
"""Several splits of the world as one: python benchmarks/language_model/pooled.py language_model_seed_0 ..._1 ..._2.

Reads records of `run.py` in `benchmarks/results` and puts their counted tasks together, so that intervals rest on all
of them. A row is kept where all records have it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import RESULTS, write_result  # noqa: E402

from language_model.judging import KINDS  # noqa: E402
from language_model.report import report_of, table  # noqa: E402
from peft_dnd.storage.files import read_json  # noqa: E402


def main() -> None:
    """Read, put together, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="RECORD", help="name of a record, without .json")
    parser.add_argument("--name", default="language_model_seeds", help="that of the new record")
    options = parser.parse_args()
    records = [dict(read_json(RESULTS / f"{name}.json")) for name in options.records]
    reports = pooled(records)
    result = {
        "records": options.records,
        "examples_seen": [record["examples_seen"] for record in records],
        "kinds": reports,
    }
    write_result(
        options.name,
        result,
        f"python benchmarks/language_model/pooled.py {' '.join(options.records)} --name {options.name}",
    )
    print(f"\n{table(reports)}")


def pooled(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The report of each kind over the tasks of all records.

    A question is right or wrong, so a task's share of the questions of a record gives them back, in another order:
    intervals are to be read over tasks alone.
    """
    reports = {}
    for kind in (kind for kind in KINDS if all(kind in record["kinds"] for record in records)):
        of_seed = {record["seed"]: record["kinds"][kind]["rows"] for record in records}
        questions = {record["seed"]: record["settings_of"]["asked"]["rows"] for record in records}
        shared = [key for key in records[0]["kinds"][kind]["rows"] if all(key in rows for rows in of_seed.values())]
        found = {key: _together({seed: rows[key] for seed, rows in of_seed.items()}, questions) for key in shared}
        reports[kind] = report_of(found)
        reports[kind]["tasks"] = sum(record["kinds"][kind]["tasks"] for record in records)
    return reports


def _together(row: Mapping[int, Mapping[str, Any]], questions: Mapping[int, int]) -> dict[str, Any]:
    """One row of all records as what the judging finds."""
    scores = {
        f"{task} (seed {seed})": _answers(share, questions[seed])
        for seed, of in row.items()
        for task, share in of["by_task"].items()
    }
    return {
        "scores": scores,
        "tokens_read": round(fmean(of["tokens_read"] for of in row.values()), 1),
        "seconds": sum(of["seconds"] for of in row.values()),
    }


def _answers(share: float, questions: int) -> list[int]:
    right = round(share * questions)
    if abs(right - share * questions) > 1e-6:
        raise ValueError(f"{share} is no share of {questions} questions that are right or wrong.")
    return [1] * right + [0] * (questions - right)


if __name__ == "__main__":
    main()
