# SPDX-License-Identifier: Apache-2.0
"""A decoder that reads the prompts as a set and knows where in the adapter each weight token belongs.

The prompts are read as in Set Transformer (arXiv 1810.00825): a few latent vectors gather by attention what they say.
What was read becomes one vector, and that is written to every place of the adapter by a map that is linear in it. So
what tasks have in common adds up in the adapters as it does in the vector, which is what lets a generator fitted on a
few dozen tasks give a new combination of what it has seen; all that does not add up has to be settled in reading. That
a hypernetwork shares its maps between all places and starts from the mean adapter is Text-to-LoRA's (arXiv
2506.06105).

B is the batch of tasks, N prompts, L positions in a prompt, C the text encoder's width, d the decoder's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..adapters.positions import TokenPositions
from ..errors import GeneratorConfigError
from .checks import check_positions, check_set, check_settings, check_shape


class Attention(nn.Module):
    """Multi-head attention of queries to another sequence.

    Args:
        size: d, of queries and of what they attend to.
        num_heads: a divisor of `size`.
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps (B, n, d) and a source (B, m, d), masked by bool (B, m), to (B, n, d)."""
        query, key, value = (
            part(of).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, of in ((self.query, x), (self.key, source), (self.value, source))
        )
        seen = None if mask is None else mask[:, None, None, :]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.output(found.transpose(1, 2).flatten(2))


class GatedLinearUnit(nn.Module):
    """A feed-forward layer whose two halves are multiplied (SwiGLU, arXiv 2002.05202).

    Args:
        size: d.
        hidden_size: width in between.
    """

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, hidden_size, bias=False)
        self.up = nn.Linear(size, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., d) to (..., d)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SetTransformerBlock(nn.Module):
    """Attention to a source, then a feed-forward layer, both with a residual and their norm before them.

    Args:
        size: d.
        num_heads: heads of the attention.
        dropout: share of each branch's features that are dropped in training.
    """

    def __init__(self, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size)
        self.attention = Attention(size, num_heads)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.feed_forward = GatedLinearUnit(size, 2 * size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps (B, n, d) and a source (B, m, d) to (B, n, d)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), source, mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class TokenWriter(nn.Module):
    """Writes one vector to every place of the adapter: token_i = sum over m of mix_im template_m(c).

    Each of `num_templates` linear maps makes of c a template, a token in size, and each weight token is a mixture of
    these templates. `mix_i` is (slot_i) (1 + layer_i), entry by entry, the same for all tasks. Matrices that read or
    write the same hidden states have directions in common, and few templates leave a generator fitted on few tasks no
    room to learn each of their adapters by heart. Parameters hardly grow with the depth of the base or the width of
    its layers.

    Args:
        size: d, of c.
        positions: where each token belongs.
        token_size: (L_w, C_w).
        num_templates: M.
        zero_init: start with templates of zero, which is the mean adapter in normalised token space.
    """

    def __init__(
        self, size: int, positions: TokenPositions, token_size: tuple[int, int], num_templates: int, *, zero_init: bool
    ) -> None:
        super().__init__()
        self.positions = positions
        self.token_size = token_size
        self.zero_init = zero_init
        self.templates = nn.Parameter(torch.empty(num_templates, token_size[0] * token_size[1], size))
        self.slots = nn.Parameter(torch.empty(positions.num_slots, num_templates))
        self.layers = nn.Parameter(torch.empty(positions.num_layers, num_templates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts anew, by `torch.nn.init` alone so that transformers can guard what it has loaded."""
        nn.init.normal_(self.slots, std=len(self.templates) ** -0.5)
        nn.init.normal_(self.layers, std=0.1)
        if self.zero_init:
            nn.init.zeros_(self.templates)
        else:
            nn.init.normal_(self.templates, std=self.templates.shape[-1] ** -0.5)

    def forward(self, summary: torch.Tensor) -> torch.Tensor:
        """Maps (B, d) to (B, N_w, L_w, C_w)."""
        templates = F.linear(summary, self.templates.flatten(0, 1)).unflatten(-1, self.templates.shape[:2])
        slots = torch.tensor(self.positions.slots, device=summary.device)
        layers = torch.tensor(self.positions.layers, device=summary.device)
        mix = self.slots[slots] * (1 + self.layers[layers])
        return (mix @ templates).unflatten(-1, self.token_size)


class SetTransformerDecoder(nn.Module):
    """From a set of prompts, any number of any length in any order, to a grid of weight tokens.

        x_j = standardise(state_j) - center                       every token of every prompt that is not masked
        z   = latents;  z <- block(z, Linear(x)), block(z, z)     `num_layers` times
        c   = LayerNorm(Linear(mean of x_j) + Linear(z))          d numbers that tell the tasks apart
        c   = MLP(c + noise)                                      the noise while fitting only
        out_i = sum over m of mix_im template_m(c)                every weight token i, see `TokenWriter`

    where `block(x, source)` is attention of x to the source and a gated feed-forward layer, with residuals. Means and
    attention have no order, and masked states are left out of both, so neither the order of the prompts nor padding
    can matter. `standardise` brings a state to mean 0 and variance 1, and `center` is what the prompts of all training
    tasks have in common (see `center_on`), beside which their differences are small. The map of z to c starts at zero:
    what the mean tells is learned first. With `zero_init_output` the
    templates start at zero, so that an unfitted decoder writes the mean training adapter.

    The number of parameters depends on the size of a token, hardly on the base's depth and width.

    Args:
        condition_shape: (N, L, C). Only C matters.
        token_shape: (N_w, L_w, C_w): weight tokens, rows, columns.
        positions: where each token belongs.
        hidden_size: d.
        num_layers: how many times the latents read the prompts.
        num_latents: how many vectors they are.
        num_heads: heads of every attention.
        num_templates: M of the `TokenWriter`: how much the places of an adapter may differ in what they make of c.
            Fewer compose better when training tasks are few, more can write finer differences.
        dropout: share of features dropped in training, within every block and before the templates.
        summary_noise: standard deviation of the noise on c, whose entries have a size of about 1, in training. With
            few training tasks it keeps the maps smooth between them.
        zero_init_output: start from the mean adapter.

    Attributes:
        gradient_checkpointing: whether blocks are recomputed in the backward pass of training.

    Raises:
        GeneratorConfigError: an impossible shape or setting.
    """

    reads_sets = True
    head_modules = ("writer",)
    head_settings = ("num_templates", "zero_init_output")
    _no_split_modules = ("SetTransformerBlock",)  # what FSDP shards and gathers one by one, and no device map splits
    center: torch.Tensor
    centered: torch.Tensor

    def __init__(
        self,
        condition_shape: Iterable[int],
        token_shape: Iterable[int],
        positions: TokenPositions,
        *,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_latents: int = 8,
        num_heads: int = 4,
        num_templates: int = 16,
        dropout: float = 0.0,
        summary_noise: float = 0.3,
        zero_init_output: bool = True,
    ) -> None:
        super().__init__()
        self.condition_size = check_shape("condition_shape", condition_shape)[2]
        num_tokens, rows, columns = check_shape("token_shape", token_shape)
        settings = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_latents": num_latents,
            "num_heads": num_heads,
            "num_templates": num_templates,
        }
        check_settings(settings, dropout, summary_noise)
        if hidden_size % num_heads:
            raise GeneratorConfigError(
                f"num_heads must divide hidden_size, but {num_heads} does not divide {hidden_size}."
            )
        check_positions(positions, num_tokens)
        self._settings = {
            **settings,
            "dropout": dropout,
            "summary_noise": summary_noise,
            "zero_init_output": zero_init_output,
        }
        self.summary_noise = summary_noise
        self.gradient_checkpointing = False
        self.register_buffer("center", torch.zeros(self.condition_size))
        self.register_buffer("centered", torch.zeros((), dtype=torch.bool))
        self.condition_projection = nn.Linear(self.condition_size, hidden_size)
        self.latents = nn.Embedding(num_latents, hidden_size)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(SetTransformerBlock(hidden_size, num_heads, dropout) for _ in range(num_layers))

        self.reading, self.mixing = blocks(), blocks()
        self.mean_to_summary = nn.Linear(self.condition_size, hidden_size, bias=False)
        self.latents_to_summary = ZeroLinear(num_latents * hidden_size, hidden_size)
        self.summary_norm = nn.LayerNorm(hidden_size)
        self.summary_mixing = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden_size, hidden_size, bias=False),
        )
        self.writer = TokenWriter(hidden_size, positions, (rows, columns), num_templates, zero_init=zero_init_output)

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """The settings that build this very decoder."""
        return dict(self._settings)

    def reset_parameters(self) -> None:
        """Forgets the center."""
        nn.init.zeros_(self.center)
        self.centered.zero_()

    @torch.no_grad()
    def center_on(self, states_of_tasks: Iterable[torch.Tensor]) -> None:
        """Takes the center from the training tasks, each of which weighs the same.

        Args:
            states_of_tasks: for each task the states of all tokens of its prompts, (any number, C).
        """
        means = [_standardise(states.float()).mean(0) for states in states_of_tasks]
        self.center.copy_(torch.stack(means).mean(0))
        self.centered.fill_(True)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Writes one grid of weight tokens for each task of a batch.

        Args:
            states: (B, N, L, C) floating point, with any N and L; cast to the decoder's dtype. What stands at masked
                positions, NaN included, has no effect.
            mask: (B, N, L), bool or a number, zero at padding. A prompt may be masked wholly, but not all of a task.

        Returns:
            (B, N_w, L_w, C_w) tokens in normalised space.

        Raises:
            GeneratorConfigError: states or mask do not have the shapes that this decoder was built for.
        """
        check_set(states, mask, self.condition_size)
        seen = mask.bool().flatten(1)
        unseen = ~seen.unsqueeze(-1)
        x = states.to(self.condition_projection.weight.dtype).flatten(1, 2).masked_fill(unseen, 0)
        x = (_standardise(x) - self.center).masked_fill(unseen, 0)
        return self.writer(self.summary_mixing(self._summarise(x, seen)))

    def _summarise(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Reads (B, N L, C), zero where it is not seen, to (B, d)."""
        source = self.condition_projection(x)
        latents = self.latents.weight.expand(len(x), -1, -1)
        for read, mix in zip(self.reading, self.mixing, strict=True):
            latents = self._run(read, latents, source, seen)
            latents = self._run(mix, latents, latents)
        mean = x.sum(1) / seen.sum(1, keepdim=True)
        summary = self.summary_norm(self.mean_to_summary(mean) + self.latents_to_summary(latents.flatten(1)))
        return summary + self.summary_noise * torch.randn_like(summary) if self.training else summary

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            found: torch.Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return found
        result: torch.Tensor = block(*inputs)
        return result


def _standardise(states: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(states, states.shape[-1:])


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    def reset_parameters(self) -> None:
        """Sets all to zero, by `torch.nn.init` alone so that transformers can guard what it has loaded."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
