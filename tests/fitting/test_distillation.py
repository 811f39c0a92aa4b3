# SPDX-License-Identifier: Apache-2.0
"""The divergence from a teacher's top tokens against the divergence over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peft_dnd.errors import LayoutError
from peft_dnd.fitting.distillation import top_token_divergence


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 40, generator=generator), 2 * torch.randn(5, 40, generator=generator)


def top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, tokens = logits.log_softmax(-1).topk(k)
    return tokens, values


def whole(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def test_all_tokens_give_the_whole_divergence():
    student, teacher = distributions()
    torch.testing.assert_close(top_token_divergence(student, *top(teacher, 40)), whole(student, teacher))


def test_fewer_tokens_never_give_more_and_more_tokens_come_nearer():
    student, teacher = distributions()
    found = torch.stack([top_token_divergence(student, *top(teacher, k)) for k in (1, 4, 16, 39)])
    assert (found.diff(dim=0) >= -1e-6).all()
    assert (found <= whole(student, teacher) + 1e-6).all()
    assert (found > 0).all()


def test_it_is_zero_where_the_student_agrees_and_has_the_gradient_of_agreement():
    _, teacher = distributions()
    student = teacher.clone().requires_grad_()
    divergence = top_token_divergence(student, *top(teacher, 8))
    assert divergence.abs().max() < 1e-6
    divergence.sum().backward()
    assert student.grad.abs().max() < 1e-6


def test_a_certain_teacher_gives_the_cross_entropy_and_a_finite_gradient():
    student, _ = distributions()
    student.requires_grad_()
    tokens = torch.arange(5)[:, None]
    divergence = top_token_divergence(student, tokens, torch.zeros(5, 1))
    torch.testing.assert_close(divergence, F.cross_entropy(student, tokens[:, 0], reduction="none"), atol=1e-4, rtol=0)
    divergence.sum().backward()
    assert student.grad.isfinite().all()


def test_what_does_not_belong_together_is_refused():
    student, teacher = distributions()
    tokens, log_probs = top(teacher, 4)
    with pytest.raises(LayoutError, match=r"\(5, 40\), \(4, 4\)"):
        top_token_divergence(student, tokens[:4], log_probs[:4])
    with pytest.raises(LayoutError, match="token 39, but the student's vocabulary has 39"):
        top_token_divergence(student[:, :39], tokens.clamp(max=38).index_fill(1, torch.tensor(0), 39), log_probs)
