# SPDX-License-Identifier: Apache-2.0
"""Whether many adapters in one pass give what one after another gives, where the base rounds much."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.fitting.adapted_base import AdaptedBase
from peft_dnd.fitting.agreement import disagreement


class Rough(nn.Module):
    """A base that magnifies how it rounds, which depends on how many rows come at once, as with real kernels.

    Args:
        shuffled: Whether it meets the rows in another order on the way, so that they cannot be told.
    """

    def __init__(self, shuffled: bool) -> None:
        super().__init__()
        self.shuffled = shuffled
        self.embed, self.layer, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50)
        nn.init.zeros_(self.layer.weight)  # so that what it says is the adapter's

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, Any]:
        states = self.embed(input_ids)
        states = self.layer(states.flip(0)).flip(0) if self.shuffled else self.layer(states)
        if len(input_ids) > 1:
            up = torch.arange(states.shape[-1]) % 2 == 0
            states = torch.where(up, states * (1 + 2**-7), states)
        return {"logits": self.head(torch.sin(40 * states))}


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_half_precision_rounds_is_no_difference(shuffled: bool, caplog: Any) -> None:
    torch.manual_seed(0)
    base = Rough(shuffled).to(torch.bfloat16)
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["layer"]), base)
    adapted = AdaptedBase(base, layout)
    matrices = {tensor.key: torch.zeros(2, *tensor.shape) for tensor in layout.tensors}
    rows = [{"input_ids": torch.tensor([[5, 9, 2, 41]])}, {"input_ids": torch.tensor([[7, 1, 30, 12]])}]
    with caplog.at_level(logging.WARNING, logger="peft_dnd"):
        list(adapted.logits_at(matrices, rows, [torch.ones(1, 4, dtype=torch.bool)] * 2))
    assert adapted.shares_passes is not shuffled
    assert ("logits differ" in caplog.text) is shuffled


def test_what_is_no_number_is_a_difference() -> None:
    logits, wrong = torch.randn(3, 5), torch.full((3, 5), torch.nan)
    for dtype in (torch.float32, torch.bfloat16):
        assert disagreement(logits, logits, [dtype], lambda _: logits) is None
        assert disagreement(wrong, logits, [torch.int8, dtype], lambda _: logits) is not None
