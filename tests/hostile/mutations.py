# SPDX-License-Identifier: Apache-2.0
"""What an attacker, or a bad disk, makes of good files: strategies of hypothesis that spoil them a little or a lot."""

from __future__ import annotations

import copy
import json
from typing import Any

import yaml
from hypothesis import strategies as st


HUGE = 10**15
# Numbers and texts on which readers stumble.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 2**31, 2**63, HUGE, -HUGE, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.integers(-10, 10**6),
    st.sampled_from(
        ["", "..", "../../etc/passwd", "/etc/passwd", "a/../../b", "\x00", "1²2", "9" * 5000, "é\ud800", "x" * 300]
    ),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=6), SCALARS.map(str)), inner, max_size=4),
    ),
    max_leaves=8,
)


def places(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a JSON document, its own first."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [prefix, *(path for key, value in inside for path in places(value, (*prefix, key)))]


@st.composite
def spoiled(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document in which one to three values are others, or gone, or there twice."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        *outer, last = path
        holder = document
        for key in outer:
            holder = holder[key]
        act = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if act == "replace":
            holder[last] = draw(VALUES)
        elif act == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            holder.insert(last, draw(VALUES))
    return document


def as_json(document: Any) -> bytes:
    """A document as a file, also of what JSON could not say."""
    return json.dumps(document, ensure_ascii=True).encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are others, missing or in excess."""
    spoil = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # Mostly near the beginning, where headers are.
        at = draw(st.integers(0, len(spoil) if draw(st.booleans()) else min(len(spoil), 64)))
        act = draw(st.sampled_from(["change", "cut", "end", "insert"]))
        if act == "change":
            spoil[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif act == "cut":
            del spoil[at : at + draw(st.integers(1, 40))]
        elif act == "end":
            del spoil[at:]
        else:
            spoil[at:at] = draw(
                st.one_of(st.binary(max_size=12), st.sampled_from([b"[" * 100_000, b"\xff\xfe", b"\x00" * 9]))
            )
    return bytes(spoil)


@st.composite
def lying(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header says something else than what follows it."""
    length = int.from_bytes(content[:8], "little")
    header = as_json(draw(spoiled(json.loads(content[8 : 8 + length]))))
    said = draw(st.sampled_from([len(header)] * 6 + [0, 1, 2**63, 2**64 - 1, 10**8, len(header) - 1, len(content)]))
    return said.to_bytes(8, "little") + header + content[8 + length :]


def json_files(content: bytes) -> st.SearchStrategy[bytes]:
    """What a JSON file may have become."""
    return st.one_of(spoiled(json.loads(content)).map(as_json), damaged(content))


def lines_of_json(content: bytes) -> st.SearchStrategy[bytes]:
    """What a file with a JSON value a line may have become."""
    lines = [json.loads(line) for line in content.splitlines()]
    return st.one_of(
        spoiled(lines).map(lambda rows: b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows])) + b"\n"),
        damaged(content),
    )


def yaml_files(content: bytes) -> st.SearchStrategy[bytes]:
    """What a YAML file may have become; JSON is YAML too."""
    oddities = [
        b"a: 2001-99-99\n",
        b"a: &a [*a]\n",
        b"? [a]\n: b\n",
        b"a: !!python/name:os.system\n",
        b"a: 1" + b"0" * 9000,
    ]
    return st.one_of(
        spoiled(yaml.safe_load(content)).map(as_json), damaged(content), st.sampled_from(oddities).map(content.__add__)
    )


@st.composite
def gguf_files(draw: st.DrawFn, content: bytes) -> bytes:
    """What a GGUF file may have become: bytes of it are others, or a number in its header lies."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(content))
    spoil = bytearray(content)
    at = draw(st.integers(4, min(len(spoil), 1000) - 8))
    number = draw(st.sampled_from([0, 1, 9, 2**16, 10**8, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]))
    size = draw(st.sampled_from([4, 8]))
    spoil[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(spoil)


def safetensors_files(content: bytes) -> st.SearchStrategy[bytes]:
    """What a safetensors file may have become."""
    return st.one_of(lying(content), damaged(content))
