# SPDX-License-Identifier: Apache-2.0
"""Text-to-LoRA's decoder: a task vector, a layer and a kind of module in, that module's A and B out.

From arXiv 2506.06105. One network of a few layers is asked once for every module of the adapter, told which by two
embeddings; a linear head for each kind of module (`q_proj`, say) writes its matrices. Size does not grow with depth,
and the published checkpoints of that project fit into it number by number
([`load_text_to_lora`][peft_dnd.published.text_to_lora.load_text_to_lora]).

B is the batch of tasks, N prompts, L positions in a prompt, C the text encoder's width, s the latent size, P the
number of adapted modules, r the rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.positions import TokenPositions
from ..errors import GeneratorConfigError
from .checks import check_positions, check_set, check_settings, check_shape


RANK_POSITIONS = (None, "learned", "rotary")
_ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class ModuleKind:
    """The modules of one kind, of which a layer has one: all `q_proj`, say.

    Attributes:
        modules: Which of the adapter's modules they are.
        num_a: How many tokens an A of theirs has, at most.
        num_b: How many a B has.
        picks: Which of `len(modules) * (num_a + num_b)` tokens there are indeed; modules of one kind may differ in
            size.
        tokens: The places of those in the grid.
    """

    modules: tuple[int, ...]
    num_a: int
    num_b: int
    picks: tuple[int, ...]
    tokens: tuple[int, ...]


def module_kinds(positions: TokenPositions) -> tuple[tuple[int, ...], tuple[ModuleKind, ...]]:
    """Reads the modules and their kinds off the places of the tokens.

    Returns:
        The layer of each module; and the kinds in the order in which they first appear.
    """
    layers: dict[int, int] = {}
    tokens: dict[int, dict[str, list[int]]] = {}
    kinds: dict[int, list[int]] = {}
    for token, (matrix, side) in enumerate(zip(positions.matrices, positions.sides, strict=True)):
        module = matrix // 2  # A, then B, of each
        if module not in layers:
            layers[module] = positions.layers[token]
            kinds.setdefault(positions.slots[token], []).append(module)
        tokens.setdefault(module, {"A": [], "B": []})[side].append(token)
    return tuple(layers.values()), tuple(_kind(modules, tokens) for modules in kinds.values())


def _kind(modules: list[int], tokens: dict[int, dict[str, list[int]]]) -> ModuleKind:
    num_a, num_b = (max(len(tokens[module][side]) for module in modules) for side in "AB")
    picks, places = [], []
    for number, module in enumerate(modules):
        start = number * (num_a + num_b)
        a, b = tokens[module]["A"], tokens[module]["B"]
        picks += [*range(start, start + len(a)), *range(start + num_a, start + num_a + len(b))]
        places += [*a, *b]
    return ModuleKind(tuple(modules), num_a, num_b, tuple(picks), tuple(places))


class ZeroHead(nn.Linear):
    """A linear map that starts at zero, with a bias or without."""

    def reset_parameters(self) -> None:
        """Sets all to zero, by `torch.nn.init` alone so that transformers can guard what it has loaded."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TextToLoraDecoder(nn.Module):
    """From the mean of the prompts' states to a grid of weight tokens, module by module.

        t = LayerNorm(Linear(mean over all tokens of all prompts))      s / 2 numbers
        x = t, LayerNorm(layer embedding), LayerNorm(kind embedding)    2s / 2 numbers, side by side; for each module
        x = ff(x);  x = x + ff(LayerNorm x)                             ff: Linear to four times the width, SiLU,
        x = x + ff(LayerNorm x);  h = ff(LayerNorm x)                   Linear, SiLU
        tokens of A, tokens of B = head_kind(h)

    With `shared_head` the same head writes A and B, each from `x + LayerNorm(side embedding)` before the third line's
    first half. With `rank_positions` a head writes one row of the rank at a time, from x at that row: `"learned"` adds
    an embedding of the row, `"rotary"` turns x by it.

    Args:
        condition_shape: (N, L, C). Only C matters; of several prompts, or states of several tokens, it reads the mean.
        token_shape: (N_w, L_w, C_w): weight tokens, rows, columns.
        positions: where each token belongs.
        latent_size: s, a multiple of 4.
        head_in_size: width of h.
        shared_head: whether A and B have one head.
        rank_positions: `None`, `"learned"` or `"rotary"`.
        head_bias: whether heads have a bias.
        elementwise_scale: whether each number of the grid has a scale of its own, which checkpoints of that project
            bring along that were fitted to rebuild adapters.
        dropout: share of features dropped in training.
        zero_init_output: start with heads of zero, which write the mean adapter.

    Raises:
        GeneratorConfigError: an impossible shape or setting.
    """

    reads_sets = True
    head_modules = ("layer_encoder", "kind_encoder", "side_encoder", "heads")
    head_settings = ("head_bias", "zero_init_output")
    _no_split_modules = ("ZeroHead",)  # what FSDP shards and gathers one by one, and no device map splits

    def __init__(
        self,
        condition_shape: Iterable[int],
        token_shape: Iterable[int],
        positions: TokenPositions,
        *,
        latent_size: int = 128,
        head_in_size: int = 512,
        shared_head: bool = False,
        rank_positions: str | None = None,
        head_bias: bool = False,
        elementwise_scale: bool = False,
        dropout: float = 0.05,
        zero_init_output: bool = True,
    ) -> None:
        super().__init__()
        self.condition_size = check_shape("condition_shape", condition_shape)[2]
        num_tokens, self.rows, self.columns = check_shape("token_shape", token_shape)
        check_settings({"latent_size": latent_size, "head_in_size": head_in_size}, dropout, 0.0)
        if latent_size % 4:
            raise GeneratorConfigError(f"latent_size must be a multiple of 4, but is {latent_size}.")
        if rank_positions not in RANK_POSITIONS:
            raise GeneratorConfigError(f"rank_positions must be one of {RANK_POSITIONS}, but is {rank_positions!r}.")
        check_positions(positions, num_tokens)
        self._settings = {
            "latent_size": latent_size,
            "head_in_size": head_in_size,
            "shared_head": shared_head,
            "rank_positions": rank_positions,
            "head_bias": head_bias,
            "elementwise_scale": elementwise_scale,
            "dropout": dropout,
            "zero_init_output": zero_init_output,
        }
        self.shared_head, self.rank_positions = shared_head, rank_positions
        self._layers, self.kinds = module_kinds(positions)
        half, quarter, size = latent_size // 2, latent_size // 4, latent_size // 2 + 2 * (latent_size // 4)
        self.task_encoder = nn.Sequential(nn.Linear(self.condition_size, half), nn.LayerNorm(half))
        self.layer_encoder = nn.Sequential(nn.Embedding(positions.num_layers, quarter), nn.LayerNorm(quarter))
        self.kind_encoder = nn.Sequential(nn.Embedding(len(self.kinds), quarter), nn.LayerNorm(quarter))
        self.mixer = nn.Sequential(nn.Dropout(dropout), *_feed_forward(size, size, dropout), nn.Dropout(dropout))
        self.mlp1, self.mlp2 = (
            nn.Sequential(nn.LayerNorm(size), *_feed_forward(size, size, dropout), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.mlp3 = nn.Sequential(nn.LayerNorm(size), *_feed_forward(size, head_in_size, dropout))
        if shared_head:
            self.side_encoder = nn.Sequential(nn.Embedding(2 * len(self.kinds), size), nn.LayerNorm(size))
        if rank_positions == "learned":
            self.rank_encoder = nn.Sequential(nn.Embedding(self.rows, size), nn.LayerNorm(size))
        head = ZeroHead if zero_init_output else nn.Linear
        self.heads = nn.ModuleList(head(head_in_size, self.head_size(kind), bias=head_bias) for kind in self.kinds)
        if elementwise_scale:
            self.register_buffer("scale", torch.ones(num_tokens, self.rows, self.columns))

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """The settings that build this very decoder."""
        return dict(self._settings)

    def reset_parameters(self) -> None:
        """Sets the scale, if there is one, to changing nothing."""
        if self._settings["elementwise_scale"]:
            nn.init.ones_(self.get_buffer("scale"))

    def head_size(self, kind: ModuleKind) -> int:
        """How many numbers a kind's head writes at once: (chunks, rows, columns), or (chunks, columns) of one row."""
        chunks = max(kind.num_a, kind.num_b) if self.shared_head else kind.num_a + kind.num_b
        return chunks * self.columns * (1 if self.rank_positions else self.rows)

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
        x = states.to(next(self.parameters()).dtype).flatten(1, 2).masked_fill(~seen.unsqueeze(-1), 0)
        task = self.task_encoder(x.sum(1) / seen.sum(1, keepdim=True))
        found = self._modules_of(task)
        parts: list[torch.Tensor] = []
        order: list[int] = []
        for number, kind in enumerate(self.kinds):
            written = self._write(found[:, torch.tensor(kind.modules, device=task.device)], number).flatten(1, 2)
            if len(kind.picks) < written.shape[1]:
                written = written[:, torch.tensor(kind.picks, device=task.device)]
            parts.append(written)
            order += kind.tokens
        grid = torch.cat(parts, dim=1)[:, torch.tensor(order, device=task.device).argsort()]
        return grid * self.get_buffer("scale") if self._settings["elementwise_scale"] else grid

    def _modules_of(self, task: torch.Tensor) -> torch.Tensor:
        """Maps (B, s / 2) to what the trunk makes of each module, (B, P, size)."""
        kinds = [0] * len(self._layers)
        for number, kind in enumerate(self.kinds):
            for module in kind.modules:
                kinds[module] = number
        layers, numbers = (torch.tensor(of, device=task.device) for of in (self._layers, kinds))
        places = torch.cat([self.layer_encoder(layers), self.kind_encoder(numbers)], dim=-1)
        batch, count = len(task), len(places)
        x = torch.cat([task[:, None].expand(-1, count, -1), places.expand(batch, -1, -1)], dim=-1)
        x = self.mixer(x)
        mixed: torch.Tensor = x + self.mlp1(x)
        return mixed

    def _write(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Maps (B, P_kind, size) to the tokens of each module, (B, P_kind, num_a + num_b, L_w, C_w)."""
        kind = self.kinds[number]
        if not self.shared_head:
            return self._tokens(x if self.rank_positions else x + self.mlp2(x), number)
        sides = self.side_encoder(torch.tensor([2 * number, 2 * number + 1], device=x.device))
        x = x.unsqueeze(-2) + sides
        both = self._tokens(x + self.mlp2(x), number)
        return torch.cat([both[:, :, 0, : kind.num_a], both[:, :, 1, : kind.num_b]], dim=2)

    def _tokens(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Maps (..., size) to (..., chunks, L_w, C_w)."""
        head = self.heads[number]
        if self.rank_positions is None:
            tokens: torch.Tensor = head(self.mlp3(x))
            return tokens.unflatten(-1, (-1, self.rows, self.columns))
        rows = head(self.mlp3(self._at_ranks(x))).unflatten(-1, (-1, self.columns))
        return rows.transpose(-3, -2)

    def _at_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., size) to the same at each row of the rank, (..., L_w, size)."""
        ranks = torch.arange(self.rows, device=x.device)
        x = x.unsqueeze(-2)
        if self.rank_positions == "rotary":
            turned = _turned(x, ranks)
            return turned + self.mlp2(turned)
        places = self.rank_encoder(ranks)
        if self.shared_head:  # whose x has been through that layer
            return x + places + self.mlp2(places)
        x = x + places
        return x + self.mlp2(x)


def _feed_forward(size: int, output_size: int, dropout: float) -> list[nn.Module]:
    return [nn.Linear(size, 4 * size), nn.SiLU(), nn.Dropout(dropout), nn.Linear(4 * size, output_size), nn.SiLU()]


def _turned(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864): (..., 1, size) turned by each of (n,) places, (..., n, size)."""
    size = x.shape[-1]
    speeds = _ROTARY_BASE ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    angles = (places[:, None] * speeds).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    crossed = torch.cat([-second, first], dim=-1)
    return x * angles.cos().to(x.dtype) + crossed * angles.sin().to(x.dtype)
