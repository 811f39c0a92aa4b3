# SPDX-License-Identifier: Apache-2.0
"""The rows of many items' batches, brought to common lengths and divided into passes of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import pad

from .row_groups import UngroupableError


LABEL_PADDING = -100


@dataclass(frozen=True)
class Places:
    """Positions of rows, N of one pass.

    Attributes:
        item: (N,), int64: which item.
        row: (N,), int64: which row of the item's own batch.
        column: (N,), int64: which column of that row.
    """

    item: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    def of(self, stacked: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """What [`stack`] made of something given for each row and column, at these places or so many further on."""
        return stacked[self.item, self.row, self.column + shift]

    def order(self) -> torch.Tensor:
        """A number for each place that grows by item, row and column, (N,), int64."""
        return (self.item * 2**20 + self.row) * 2**20 + self.column


@dataclass(frozen=True)
class Pass:
    """Rows that the base reads at once.

    Attributes:
        batch: What its forward takes.
        item: (R,), int64: each row's item; rows of one item stand together.
        row: (N,), int64: in which row of the pass each of the places is.
        places: The places; their column is that of the pass as well.
        shape: Rows and columns of what the places are in.
    """

    batch: dict[str, torch.Tensor]
    item: torch.Tensor
    row: torch.Tensor
    places: Places
    shape: tuple[int, int]

    def to(self, device: torch.device) -> Pass:
        """The same on a device."""
        places = Places(*(getattr(self.places, name).to(device) for name in ("item", "row", "column")))
        batch = {name: value.to(device) for name, value in self.batch.items()}
        return Pass(batch, self.item.to(device), self.row.to(device), places, self.shape)

    def of_items(self) -> list[Pass]:
        """A pass for each item."""
        return [self._of_item(item) for item in self.item.unique().tolist()]

    def _of_item(self, item: int) -> Pass:
        rows = (self.item == item).nonzero()[:, 0]
        mine = self.places.item == item
        places = Places(*(getattr(self.places, name)[mine] for name in ("item", "row", "column")))
        batch = {name: value[rows] for name, value in self.batch.items()}
        return Pass(batch, self.item[rows], self.row[mine] - rows[0], places, (len(rows), self.shape[1]))


class Rows:
    """The rows of many items' batches.

    Args:
        batches: For each item what the base's forward takes, rows first.
        at: For each item (rows, columns), bool: the places that something is wanted of.
        pad_token_id: What fills up `input_ids`.
        masks: Whether the base's forward takes an `attention_mask`.
        first: The first item's number.

    Raises:
        UngroupableError: If they do not go together.
    """

    def __init__(
        self,
        batches: Sequence[Mapping[str, Any]],
        at: Sequence[torch.Tensor],
        *,
        pad_token_id: int,
        masks: bool,
        first: int = 0,
    ) -> None:
        counts = [len(wanted) for wanted in at]
        self.item = torch.repeat_interleave(torch.tensor(counts)) + first
        self.row = torch.cat([torch.arange(count) for count in counts])
        self.at = _joined("at", [wanted.cpu() for wanted in at], False)
        batches = _with_masks(batches, counts, masks)
        if any(batch.keys() != batches[0].keys() for batch in batches):
            raise UngroupableError("the items' batches have different fields")
        fillings = {"labels": LABEL_PADDING, "input_ids": pad_token_id}
        self.fields: dict[str, torch.Tensor] = {}
        self._sequences = {"input_ids"}
        for name in batches[0]:
            values = [batch[name] for batch in batches]
            _check_rows(name, values, counts)
            if all(_is_sequence(batch, name) for batch in batches):
                self._sequences.add(name)
            elif len({value.shape[1:] for value in values}) > 1 and not name.startswith(("decoder_", "labels")):
                raise UngroupableError(f"the items' {name!r} have different sizes")
            self.fields[name] = _joined(name, values, fillings.get(name, 0))
        self._lengths = self._read_lengths()

    def passes(self, tokens: int, places: int, cost: int = 256) -> Iterator[Pass]:
        """Divide the rows into passes of at most so many tokens, padding included, and places, but one row at least.

        Rows of like lengths go together where that saves more than a pass costs; of one item, where it is all the
        same. Rows of which nothing is wanted are left out.

        Args:
            tokens: Most tokens.
            places: Most places.
            cost: What a pass costs beside its tokens, in tokens: as much padding is worth saving a pass.
        """
        wanted = self.at.sum(1)
        order = sorted(wanted.nonzero()[:, 0].tolist(), key=lambda row: -self._lengths[row])
        lengths = [(length, list(rows)) for length, rows in groupby(order, key=self._lengths.__getitem__)]
        for first, last in _segments([(length, len(rows)) for length, rows in lengths], cost):
            rows = sorted(row for _, some in lengths[first:last] for row in some)
            taken: list[int] = []
            longest = held = 0
            for row in rows:
                length, many = max(longest, self._lengths[row]), held + int(wanted[row])
                if taken and (length * (len(taken) + 1) > tokens or many > places):
                    yield self._pass(taken, longest)
                    taken, length, many = [], self._lengths[row], int(wanted[row])
                taken.append(row)
                longest, held = length, many
            yield self._pass(taken, longest)

    def _read_lengths(self) -> list[int]:
        columns = torch.arange(1, self.at.shape[1] + 1)
        last = (self.at * columns).amax(1)
        mask = self.fields.get("attention_mask")
        if (
            "input_ids" not in self.fields
            or mask is None
            or mask.dim() != 2
            or "attention_mask" not in self._sequences
        ):
            width = self.fields["input_ids"].shape[1] if "input_ids" in self.fields else self.at.shape[1]
            return [width] * len(last)
        read = ((mask != 0) * torch.arange(1, mask.shape[1] + 1)).amax(1)
        return torch.maximum(read, last).tolist()

    def _pass(self, rows: list[int], longest: int) -> Pass:
        index = torch.tensor(rows)
        batch = {
            name: (field[:, :longest] if name in self._sequences else field)[index]
            for name, field in self.fields.items()
        }
        aligned = self.fields.get("input_ids", self.at).shape[1] == self.at.shape[1]
        at = self.at[index][:, :longest] if aligned else self.at[index]
        row, column = at.nonzero(as_tuple=True)
        places = Places(self.item[index][row], self.row[index][row], column)
        return Pass(batch, self.item[index], row, places, (len(rows), at.shape[1]))


def stack(values: Sequence[torch.Tensor], filling: float) -> torch.Tensor:
    """One (rows, columns) for each item, filled up to one tensor (B, most rows, most columns)."""
    rows, columns = (max(value.shape[axis] for value in values) for axis in (0, 1))
    return torch.stack(
        [pad(value, (0, columns - value.shape[1], 0, rows - value.shape[0]), value=filling) for value in values]
    )


def smallest(batch: Mapping[str, Any], wanted: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """The two shortest of the rows that something is wanted of; whatever is no tensor with rows stays as it is."""
    rows = wanted.any(1).nonzero()[:, 0].to(wanted.device)
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and len(mask) == len(wanted):
        rows = rows[mask.to(wanted.device)[rows].sum(1).argsort(stable=True)]
    rows = rows[:2].sort().values
    few = {
        name: value[rows.to(value.device)]
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == len(wanted)
        else value
        for name, value in batch.items()
    }
    return few, wanted[rows]


def _with_masks(
    batches: Sequence[Mapping[str, Any]], counts: Sequence[int], masks: bool
) -> Sequence[Mapping[str, Any]]:
    """Give each batch an attention mask, where they have different lengths or one has a mask."""
    lengths = {batch["input_ids"].shape[1] for batch in batches if "input_ids" in batch}
    has = ["attention_mask" in batch for batch in batches]
    if all(has) or not (any(has) or len(lengths) > 1):
        return batches
    if not masks:
        raise UngroupableError("rows have different lengths and the base takes no attention_mask")
    return [
        {**batch, "attention_mask": batch.get("attention_mask", torch.ones_like(batch["input_ids"]))}
        for batch in batches
    ]


def _check_rows(name: str, values: Sequence[Any], counts: Sequence[int]) -> None:
    for value, count in zip(values, counts, strict=True):
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != count:
            raise UngroupableError(f"{name!r} has no entry for each row of its batch")


def _is_sequence(batch: Mapping[str, Any], name: str) -> bool:
    length = batch["input_ids"].shape[1] if "input_ids" in batch else None
    return batch[name].dim() > 1 and batch[name].shape[1] == length


def _joined(name: str, values: Sequence[torch.Tensor], filling: float) -> torch.Tensor:
    """Rows after rows, filled up on the right of the first axis after the rows."""
    if values[0].dim() == 1:
        return torch.cat(list(values))
    if len({value.shape[2:] for value in values}) > 1:
        raise UngroupableError(f"the items' {name!r} have different sizes")
    longest = max(value.shape[1] for value in values)
    room = [0, 0] * (values[0].dim() - 2)
    return torch.cat([pad(value, (*room, 0, longest - value.shape[1]), value=filling) for value in values])


def _segments(lengths: Sequence[tuple[int, int]], cost: int) -> list[tuple[int, int]]:
    """Where to divide rows of falling lengths, so that tokens, padding included, and passes cost least.

    Args:
        lengths: (length, how many rows have it), longest first.
        cost: What a pass costs beside its tokens, in tokens.

    Returns:
        First and past the last of the lengths of each segment.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for last in range(1, len(lengths) + 1):
        choices, rows = [], 0
        for first in range(last - 1, -1, -1):
            rows += lengths[first][1]
            choices.append((best[first][0] + rows * lengths[first][0] + cost, first))
        best.append(min(choices))
    segments = []
    last = len(lengths)
    while last:
        first = best[last][1]
        segments.append((first, last))
        last = first
    return segments
