# SPDX-License-Identifier: Apache-2.0
"""Running checksums: of any pieces alike, and changed by any small damage."""

from __future__ import annotations

import random

import numpy as np
import pytest

from peft_dnd.storage.sums import SUMS, GridSums


ROW = 8 * 1024


def taken(content: bytes, *cuts: int, algorithm: str = "grid64") -> str:
    running = SUMS[algorithm](b"float32 [3] ")
    for start, stop in zip((0, *cuts), (*cuts, len(content)), strict=True):
        running.update(memoryview(content)[start:stop])
    return running.hexdigest()


@pytest.mark.parametrize("algorithm", list(SUMS))
@pytest.mark.parametrize("size", [0, 1, 7, ROW - 1, ROW, ROW + 1, 300 * ROW + 5])
def test_it_does_not_matter_in_which_pieces_the_bytes_come(size: int, algorithm: str) -> None:
    content = random.Random(size).randbytes(size)
    whole = taken(content, algorithm=algorithm)
    for seed in range(5):
        cuts = sorted(random.Random(seed).randint(0, size) for _ in range(4))
        assert taken(content, *cuts, algorithm=algorithm) == whole
    assert taken(content + b"\0", algorithm=algorithm) != whole


def test_they_are_the_sums_of_rows_and_columns() -> None:
    content = np.random.default_rng(0).integers(0, 2**64, (3, 1024), np.uint64)
    moved = content.copy()
    # Two rows and two columns of one rectangle: what no sum can see.
    moved[0, 1] += np.uint64(5)
    moved[2, 1] -= np.uint64(5)
    moved[0, 7] -= np.uint64(5)
    moved[2, 7] += np.uint64(5)
    assert taken(moved.tobytes()) == taken(content.tobytes())
    moved[2, 7] += np.uint64(1)
    assert taken(moved.tobytes()) != taken(content.tobytes())


@pytest.mark.parametrize("size", [40, 5 * ROW + 40])
def test_small_damage_always_shows(size: int) -> None:
    draw = random.Random(0)
    content = draw.randbytes(size)
    whole = taken(content)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(size)] ^= 1 << draw.randrange(8)
        assert (taken(bytes(damaged)) != whole) == (bytes(damaged) != content)
    for _ in range(100):
        words = np.frombuffer(content, "<u8").copy()
        first, second = draw.sample(range(len(words)), 2)
        words[[first, second]] = words[[second, first]]
        assert taken(words.tobytes()) != whole


def test_damage_of_whole_stretches_shows() -> None:
    floats = np.random.default_rng(0).standard_normal(8 * 2048, np.float32)
    whole = taken(floats.tobytes())
    grid = floats.reshape(8, 2048)
    for damaged in (-floats, grid[::-1], grid[:, ::-1], np.zeros_like(floats), np.roll(floats, 1), np.abs(floats)):
        assert taken(np.ascontiguousarray(damaged).tobytes()) != whole
    for stop in (1, 2, 1023, 2048, 5000):
        cleared = floats.copy()
        cleared[:stop] = 0
        assert taken(cleared.tobytes()) != whole


def test_what_stands_before_the_bytes_counts() -> None:
    assert GridSums(b"float32 [1] ").hexdigest() != GridSums(b"float16 [2] ").hexdigest()
    assert len(GridSums().hexdigest()) == 16
