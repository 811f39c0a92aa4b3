# SPDX-License-Identifier: Apache-2.0
"""A decoder that writes small cores between bases which all tasks share.

Each adapted module has a matrix A and a basis of directions for B, both learned and the same for all tasks; a task's
prompts say only how its B is mixed from them, by a core of a few hundred numbers. What hundreds of tasks teach the
bases every other task can use, so that they learn in far fewer examples than where whole matrices are written anew
for each task; Zhyper (arXiv 2510.19733) and LoRA-XS (arXiv 2405.17604) put a small matrix between fixed factors too.

B is the batch of tasks, N prompts, L positions in a prompt, C the text encoder's width, d the decoder's, P the number
of adapted modules, r the rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.positions import TokenPositions
from ..errors import GeneratorConfigError
from .checks import check_positions, check_set, check_settings, check_shape
from .discriminants import discriminants


# By how much a step of an optimiser that moves all parameters alike (Adam) moves the shared A and B, the bases and the
# cores, in units of normalised tokens. A shared A has to turn as fast as one that is trained by itself, at a learning
# rate of 1e-3 in its own units.
_GAIN_OF_A = 25.0
_GAIN_OF_B = 6.0
_GAIN_OF_BASES = 4.0
_GAIN_OF_CORES = 2.0

# How many of a task's states the center, the spread and the directions are taken from.
_LOOKED_AT = 8


class CoreWriter(nn.Module):
    """Writes one vector as the cores of all modules: B_p = core_p(c) bases_p, beside what all tasks share.

        grid = shared;  the first `core_rank` rows of B_p's tokens += (Linear(c))_p bases_p

    A core starts at zero, so that the shared adapter is what an unfitted decoder writes.

    Args:
        size: d, of c.
        positions: where each token belongs.
        token_shape: (N_w, L_w, C_w).
        core_rank: how many of B's ranks the prompts write; the others are the same for all tasks.
        num_bases: how many directions a module has for each of its tokens.
        zero_init: start with cores of zero.
    """

    def __init__(
        self,
        size: int,
        positions: TokenPositions,
        token_shape: tuple[int, int, int],
        core_rank: int,
        num_bases: int,
        *,
        zero_init: bool,
    ) -> None:
        super().__init__()
        self.core_rank = core_rank
        self.num_bases = num_bases
        self.zero_init = zero_init
        self._written = tuple(i for i, side in enumerate(positions.sides) if side == "B")
        places = [positions.matrices[i] for i in self._written]
        order = {matrix: number for number, matrix in enumerate(dict.fromkeys(places))}
        self._place = tuple(order[matrix] for matrix in places)
        self._gains = tuple(_GAIN_OF_A if side == "A" else _GAIN_OF_B for side in positions.sides)
        self.shared = nn.Parameter(torch.empty(token_shape))
        self.bases = nn.Parameter(torch.empty(len(places), num_bases, token_shape[2]))
        self.cores = nn.Linear(size, len(order) * core_rank * num_bases)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts anew, by `torch.nn.init` alone so that transformers can guard what it has loaded."""
        nn.init.zeros_(self.shared)
        nn.init.normal_(self.bases, std=1 / _GAIN_OF_BASES)
        nn.init.zeros_(self.cores.bias)
        if self.zero_init:
            nn.init.zeros_(self.cores.weight)
        else:
            nn.init.normal_(self.cores.weight, std=0.5)

    def forward(self, summary: torch.Tensor) -> torch.Tensor:
        """Maps (B, d) to (B, N_w, L_w, C_w)."""
        device = summary.device
        written, place = (torch.tensor(numbers, device=device) for numbers in (self._written, self._place))
        # The gain is the weight's; taken of the summary, no copy of the largest parameter is made.
        cores = self.cores(summary * (_GAIN_OF_CORES * self.cores.in_features**-0.5))
        cores = cores.unflatten(-1, (-1, self.core_rank, self.num_bases))
        # One product a token for the whole batch: (n, B r, K) (n, K, C_w).
        of_token = cores[:, place].permute(1, 0, 2, 3).flatten(1, 2)
        rows = torch.bmm(of_token, self.bases * _GAIN_OF_BASES).unflatten(1, (-1, self.core_rank)).transpose(0, 1)
        gains = torch.tensor(self._gains, device=device, dtype=self.shared.dtype)
        shared = (self.shared * gains[:, None, None]).expand(len(summary), -1, -1, -1)
        rest = self.shared.shape[1] - self.core_rank
        return shared.index_add(1, written, F.pad(rows, (0, 0, 0, rest)) if rest else rows)


class CoreDecoder(nn.Module):
    """From a set of prompts, any number in any order, to a grid of weight tokens.

        x = mean over all tokens of all prompts of  directions (state - center) / spread
        c = normalise(Linear(x)) + noise;  c = normalise(c + MLP(c))      the noise while fitting only
        grid = shared + core(c) bases                                     see `CoreWriter`

    `normalise` brings a vector to mean 0 and variance 1; `center` and `spread` are each feature's mean and standard
    deviation over the training tasks' prompts, and `directions` those in which the tasks lie apart beside how their
    prompts scatter (see `center_on` and [`discriminants`]): what a wording adds to a prompt is taken off before
    anything is learned. Made for conditions of one vector a prompt, such as a base's own states where the answer would
    begin; of many it reads the mean.

    Args:
        condition_shape: (N, L, C). Only C matters.
        token_shape: (N_w, L_w, C_w): weight tokens, rows, columns.
        positions: where each token belongs.
        hidden_size: d.
        num_directions: how many directions are read. `None`: `hidden_size`.
        mixing_size: the width of the MLP's hidden layer.
        core_rank: how many of the adapter's ranks the prompts write; the others, if it has more, are the same for all
            tasks: a multi-task adapter beside. `None`: half of them, at least one.
        num_bases: how many directions the rows of a module's B are mixed from. `None`: `core_rank`.
        dropout: share of features dropped in training, of the states and in the MLP.
        summary_noise: standard deviation of the noise on c, whose entries have a size of about 1, in training.
        zero_init_output: start from the shared adapter, which starts as the mean adapter.

    Raises:
        GeneratorConfigError: an impossible shape or setting.
    """

    reads_sets = True
    head_modules = ("writer",)
    head_settings = ("core_rank", "num_bases", "zero_init_output")
    written_sides = ("B",)  # each A is the same whatever the prompts
    _no_split_modules = ("CoreWriter",)  # what FSDP shards and gathers one by one, and no device map splits
    center: torch.Tensor
    spread: torch.Tensor
    directions: torch.Tensor
    centered: torch.Tensor

    def __init__(
        self,
        condition_shape: Iterable[int],
        token_shape: Iterable[int],
        positions: TokenPositions,
        *,
        hidden_size: int = 256,
        num_directions: int | None = None,
        mixing_size: int = 512,
        core_rank: int | None = None,
        num_bases: int | None = None,
        dropout: float = 0.1,
        summary_noise: float = 0.3,
        zero_init_output: bool = True,
    ) -> None:
        super().__init__()
        self.condition_size = check_shape("condition_shape", condition_shape)[2]
        shape = check_shape("token_shape", token_shape)
        core_rank = max(1, shape[1] // 2) if core_rank is None else core_rank
        num_bases = core_rank if num_bases is None else num_bases
        num_directions = hidden_size if num_directions is None else num_directions
        sizes = {
            "hidden_size": hidden_size,
            "num_directions": num_directions,
            "mixing_size": mixing_size,
            "core_rank": core_rank,
            "num_bases": num_bases,
        }
        check_settings(sizes, dropout, summary_noise)
        if core_rank > shape[1]:
            raise GeneratorConfigError(
                f"core_rank must not be above the adapter's rank {shape[1]}, but is {core_rank}."
            )
        check_positions(positions, shape[0])
        self._settings = {
            **sizes,
            "dropout": dropout,
            "summary_noise": summary_noise,
            "zero_init_output": zero_init_output,
        }
        self.summary_noise = summary_noise
        self.register_buffer("center", torch.zeros(self.condition_size))
        self.register_buffer("spread", torch.ones(self.condition_size))
        self.register_buffer("directions", torch.empty(num_directions, self.condition_size))
        self.register_buffer("centered", torch.zeros((), dtype=torch.bool))
        self.reading = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_directions, hidden_size))
        self.mixing = nn.Sequential(
            nn.Linear(hidden_size, mixing_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mixing_size, hidden_size),
        )
        self.writer = CoreWriter(hidden_size, positions, shape, core_rank, num_bases, zero_init=zero_init_output)
        self.reset_parameters()

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """The settings that build this very decoder."""
        return dict(self._settings)

    def reset_parameters(self) -> None:
        """Forgets center, spread and directions, in place of which random ones are read."""
        nn.init.zeros_(self.center)
        nn.init.ones_(self.spread)
        nn.init.normal_(self.directions, std=self.condition_size**-0.5)
        self.centered.zero_()

    @torch.no_grad()
    def center_on(self, states_of_tasks: Iterable[torch.Tensor]) -> None:
        """Takes center, spread and directions from the training tasks, each of which weighs the same.

        Args:
            states_of_tasks: for each task the states of all tokens of its prompts, (any number, C).
        """
        # A few prompts of each tell how they scatter, and all of many tasks would be more than memory holds.
        few = [states[:: max(1, len(states) // _LOOKED_AT)][:_LOOKED_AT] for states in states_of_tasks]
        moments = [torch.stack([s.mean(0), s.square().mean(0)]) for s in map(torch.Tensor.double, few)]
        mean, square = torch.stack(moments).mean(0)
        self.center.copy_(mean)
        # A feature that never varies says nothing; it must not be blown up where it does.
        self.spread.copy_((square - mean.square()).clamp_min(0).sqrt() + 1e-3)
        standardised = [(states.float().cpu() - self.center.cpu()) / self.spread.cpu() for states in few]
        self.directions.copy_(discriminants(standardised, len(self.directions)))
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
        unseen = ~mask.bool().flatten(1).unsqueeze(-1)
        x = states.to(self.center.dtype).flatten(1, 2).masked_fill(unseen, 0)
        read = F.linear((x - self.center) / self.spread, self.directions).masked_fill(unseen, 0)
        summary = _normalise(self.reading(read.sum(1) / (~unseen).sum(1)))
        if self.training:
            summary = summary + self.summary_noise * torch.randn_like(summary)
        return self.writer(_normalise(summary + self.mixing(summary)))


def _normalise(vectors: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(vectors, vectors.shape[-1:])
