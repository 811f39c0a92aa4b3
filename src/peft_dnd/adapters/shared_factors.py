# SPDX-License-Identifier: Apache-2.0
"""One A for many adapters: the inputs that their updates have in common, so that their Bs can be compared.

Updates of adapters that were trained by themselves agree in what their tasks need and differ in where each happened to
start. The stacked updates' largest right singular vectors keep the first and lose most of the second.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .layout import AdapterLayout
from .lora import matrix_keys


_ROWS_KEPT = 4  # times the rank, when there are more
_ROWS_HELD = 8  # times the rank, before they are compressed


class SharedInputs:
    """Gathers the updates of adapters one by one, and says which inputs they share most of.

    Each adapter weighs the same in each module. Up to 8 times the rank of rows are held for a module; what is
    more is compressed to the largest singular vectors, four times the rank of them.

    Args:
        rank: How many inputs are wanted of each module.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._rows: dict[str, torch.Tensor] = {}

    def add(self, layout: AdapterLayout, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take in an adapter of some layout."""
        for module in layout.modules:
            a, b = (tensor.find_in(state_dict).double() for tensor in module.tensors)
            a, b = a.reshape(module.rank, -1), b.reshape(-1, module.rank)
            # With B = Q R the rows of R A have the same inner products as those of B A, and are few.
            rows = torch.linalg.qr(b).R @ a
            size = rows.norm()
            if size > 0:
                held = self._rows.get(module.name)
                rows = rows / size if held is None else torch.cat([held.double(), rows / size])
                self._rows[module.name] = self._compressed(rows).float()

    def matrices(self, target: AdapterLayout) -> dict[str, torch.Tensor]:
        """The shared A of each module of a layout of the rank, float32: orthonormal rows, and zeros where too few.

        Args:
            target: The layout that all adapters are brought to.

        Returns:
            A's on-disk key -> A.
        """
        found: dict[str, torch.Tensor] = {}
        for module in target.modules:
            shared = torch.zeros(module.rank, module.tensors[0].long_size, dtype=torch.float64)
            rows = self._rows.get(module.name)
            if rows is not None:
                _, s, vt = torch.linalg.svd(rows.double(), full_matrices=False)
                vt = vt[s > s[0] * max(rows.shape) * torch.finfo(rows.dtype).eps][: module.rank]
                largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))
                shared[: len(vt)] = vt * largest.sign()
            found[matrix_keys(module.name, module.kind)[0]] = shared.float().reshape(module.shape_a)
        return found

    def _compressed(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) <= _ROWS_HELD * self.rank:
            return rows
        # The left singular vectors are the eigenvectors of the rows' inner products, in rising order.
        _, u = torch.linalg.eigh(rows @ rows.mT)
        return u[:, -_ROWS_KEPT * self.rank :].mT @ rows
