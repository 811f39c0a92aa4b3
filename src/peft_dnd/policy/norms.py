# SPDX-License-Identifier: Apache-2.0
"""Bounds on how far an adapter may move the base: the norm of each module's update, and of all together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.factors import delta_weight_distances
from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..adapters.matching import adaptable_modules, check_fits, match_modules
from ..errors import PolicyError, WeightValueError, did_you_mean
from ..pairs.dataset import PromptCheckpointDataset
from ..storage.progress import with_progress
from .bounds import FALSE_ALARMS, FEWEST_TASKS, check_false_alarms, tasks_drawn, upper_bound


ABOVE = ("shrink", "refuse")
# What all modules together are called where they are above their bound.
TOGETHER = "all modules together"
# Shrunk updates end up just below their bound, so that rounding leaves them there.
_JUST_BELOW = 1 - 1e-5


@dataclass(frozen=True)
class NormBounds:
    """The largest norms that updates may have.

    The norm of a module's update is the Frobenius norm of ΔW = s B A, divided by that of the base's weight W where the
    base was at hand. That of all together is the root of the sum of their squares: it holds an update down that is
    split over many modules, each of which is within its own bound.

    Attributes:
        modules: Module -> the largest norm of its update.
        total: The largest norm of all updates together.
        base: Module -> the norm of the base's weight; empty if bounds are not relative to it.
        above: What becomes of an adapter above a bound: `"shrink"` its updates to it, or `"refuse"` it.
        tasks: On how many training tasks the bounds were calibrated; 0 if they were stated.
        false_alarms: The probability with which a new task's trained adapter, of the training tasks' kind, is above
            one of the modules' bounds; and the same once more for the bound of all together.
    """

    modules: Mapping[str, float]
    total: float
    base: Mapping[str, float] = field(default_factory=dict)
    above: str = "shrink"
    tasks: int = 0
    false_alarms: float | None = None

    def __post_init__(self) -> None:
        if self.above not in ABOVE:
            raise PolicyError(
                f"above must be one of {ABOVE}, got {self.above!r:.80}.{did_you_mean(self.above, ABOVE)}"
            )
        _check_numbers("a bound", {**self.modules, TOGETHER: self.total}, least=0)
        _check_numbers("the norm of a base's weight", self.base, least=1e-30)
        if not self.modules or (self.base and set(self.base) != set(self.modules)):
            raise PolicyError("Bounds on norms need a bound for each module, and the base's norms for all or none.")

    @classmethod
    def calibrate(
        cls,
        adapters: PromptCheckpointDataset | Mapping[str, GeneratedAdapter],
        base_model: nn.Module | None = None,
        *,
        above: str = "shrink",
        false_alarms: float = FALSE_ALARMS,
    ) -> NormBounds:
        """Derive bounds from the training adapters, or others that are to be within them.

        Of each task the largest norm of its checkpoints counts. Logarithms of norms are taken for normally distributed
        between tasks; a module's bound is their [`upper_bound`][peft_dnd.policy.bounds.upper_bound] at
        `false_alarms` / M, for M modules, so that all of them together cry wolf as rarely as is said.

        Args:
            adapters: The training pairs; or task -> its adapter, as `generator.fitted_adapters(pairs)` gives them,
                where a generator was fitted without checkpoints. Of many of these 128 are drawn by their names.
            base_model: The base, to which norms are then relative; weights of 8 bits and fewer are not read.
            above: See the class.
            false_alarms: See the class.

        Raises:
            LayoutError: If the adapters are no plain LoRA.
            PolicyError: If fewer than three tasks have checkpoints.
            BaseModelMismatchError: If the adapters do not fit the base.
            WeightValueError: If the base's weights are not at hand, or not floating point.
        """
        check_false_alarms(false_alarms)
        if isinstance(adapters, PromptCheckpointDataset):
            tasks = [task for task in adapters.tasks if adapters.checkpoints(task)]
        else:
            tasks = tasks_drawn(adapters)
        if len(tasks) < FEWEST_TASKS:
            raise PolicyError(
                f"Norms are calibrated on {FEWEST_TASKS} tasks with checkpoints or more, got {len(tasks)}. Give more "
                "tasks, or state the bounds: NormBounds(modules={...}, total=...)."
            )
        layout = adapters.layout if isinstance(adapters, PromptCheckpointDataset) else adapters[tasks[0]].layout
        base = {} if base_model is None else weight_norms(base_model, layout)
        rows = []
        for task in with_progress(tasks, "Measuring updates"):
            found = [update_norms(layout, matrices, base) for matrices in _matrices(adapters, task)]
            together = torch.stack([_together(norms) for norms in found]).amax()
            rows.append(torch.cat([torch.stack(found).amax(0), together[None]]))
        seen = torch.stack(rows)
        bounds = [_bound(norms, false_alarms / len(layout.modules)) for norms in seen[:, :-1].T]
        names = [module.name for module in layout.modules]
        return cls(
            dict(zip(names, bounds, strict=True)),
            _bound(seen[:, -1], false_alarms),
            base,
            above,
            len(rows),
            false_alarms,
        )

    def excess(
        self, layout: AdapterLayout, matrices: Mapping[str, Tensor], *, scale: float = 1.0, slack: float = 0.0
    ) -> dict[str, float]:
        """Which updates are above their bounds, and by which factor.

        Args:
            layout: The adapter's layout. Modules without a bound are above theirs, unless their update is zero.
            matrices: Its matrices.
            scale: A factor by which the updates are to be multiplied besides.
            slack: The part of a bound by which it may be exceeded.

        Returns:
            Module -> norm / bound; `"all modules together"` among them. Infinite where there is no bound, or 0.
        """
        known = [module.name for module in layout.modules if module.name in self.modules]
        base = {name: norm for name, norm in self.base.items() if name in known}
        norms = update_norms(layout, matrices, base, others=1.0) * abs(scale)
        named = {
            **{module.name: norm for module, norm in zip(layout.modules, norms.tolist(), strict=True)},
            TOGETHER: float(_together(norms)),
        }
        bounds = {**self.modules, TOGETHER: self.total}
        found = {}
        for name, norm in named.items():
            bound = bounds.get(name, 0.0)
            if norm > bound * (1 + slack):
                found[name] = norm / bound if bound else float("inf")
        return found

    def hold(
        self, layout: AdapterLayout, matrices: Mapping[str, Tensor], *, scale: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Keep an adapter within the bounds.

        Args:
            layout: Its layout.
            matrices: Its matrices.
            scale: A factor by which its updates are to be multiplied besides.

        Returns:
            The matrices, those called B made smaller where the update was above its bound; and module -> by which
            factor, `"all modules together"` among them.

        Raises:
            PolicyError: If an update is above its bound and that is to be refused.
        """
        held, factors = dict(matrices), {}
        above = self.excess(layout, held, scale=scale)
        if above and self.above == "refuse":
            worst = max(above, key=lambda name: above[name])
            raise PolicyError(
                f"The adapter moves the base further than the generator's policy allows: the update of {worst!r} is "
                f"{above[worst]:.3g} times as large as it may be ({len(above)} such bound(s)). These prompts ask for "
                "an adapter unlike those of the training tasks: check them.",
                "norm",
            )
        for module in layout.modules:
            if module.name in above:
                factors[module.name] = _shrink(held, [module.tensors[1].key], above[module.name])
        together = self.excess(layout, held, scale=scale).get(TOGETHER)
        if together is not None:
            factors[TOGETHER] = _shrink(held, [module.tensors[1].key for module in layout.modules], together)
        return held, factors

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "modules": dict(self.modules),
            "total": self.total,
            "base": dict(self.base),
            "above": self.above,
            "tasks": self.tasks,
            "false_alarms": self.false_alarms,
        }


def _matrices(
    adapters: PromptCheckpointDataset | Mapping[str, GeneratedAdapter], task: str
) -> Iterator[Mapping[str, Tensor]]:
    if isinstance(adapters, PromptCheckpointDataset):
        for number in range(len(adapters.checkpoints(task))):
            yield adapters.state_dict(task, number)
    else:
        yield adapters[task].state_dict()


def update_norms(
    layout: AdapterLayout, matrices: Mapping[str, Tensor], base: Mapping[str, float], *, others: float | None = None
) -> Tensor:
    """The Frobenius norm of each module's update, (M,), float64, relative to the base's weight where that is known.

    Args:
        layout: The layout, of plain LoRA.
        matrices: Its matrices.
        base: Module -> norm of the base's weight; empty for absolute norms.
        others: What counts as the norm of a weight that is not known.

    Raises:
        LayoutError: If it is no plain LoRA.
    """
    named = {tensor.key: matrices[tensor.key].detach().cpu().double() for tensor in layout.tensors}
    nothing = {key: torch.zeros_like(matrix) for key, matrix in named.items()}
    norms = delta_weight_distances(named, nothing, layout).clamp(min=0).sqrt()
    if not base:
        return norms
    divisors = [base[module.name] if others is None else base.get(module.name, others) for module in layout.modules]
    return norms / torch.tensor(divisors, dtype=norms.dtype)


def weight_norms(base_model: nn.Module, layout: AdapterLayout) -> dict[str, float]:
    """The Frobenius norm of each weight that adapters of a layout change: module of the layout -> norm.

    Raises:
        BaseModelMismatchError: If the layout does not fit the base.
        WeightValueError: If weights are not at hand, or not floating point.
    """
    names = match_modules(base_model, layout)
    check_fits(base_model, layout, names)
    modules = dict(adaptable_modules(base_model))
    found = {}
    for name, there in names.items():
        layer: Any = modules[there]
        weight = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight
        if weight.is_meta or not weight.is_floating_point():
            raise WeightValueError(
                f"The norm of the base's weight {there!r} cannot be taken: it is "
                f"{'on the meta device' if weight.is_meta else weight.dtype}. Load the base with its weights, not "
                "quantised; they are needed for calibrating alone."
            )
        found[name] = float(
            torch.linalg.vector_norm(
                weight.detach(), dtype=torch.float64 if weight.device.type == "cpu" else torch.float32
            )
        )
    return found


def _together(norms: Tensor) -> Tensor:
    return norms.square().sum().sqrt()


def _bound(norms: Tensor, false_alarms: float) -> float:
    """The bound for one more norm of the kind; where too many are zero, the largest."""
    moved = norms[norms > 0]
    if len(moved) < FEWEST_TASKS:
        return float(norms.amax())
    return float(upper_bound(moved.log(), false_alarms).exp())


def _shrink(matrices: dict[str, Tensor], keys: Iterable[str], excess: float) -> float:
    factor = _JUST_BELOW / excess
    for key in keys:
        matrices[key] = matrices[key] * factor
    return factor


def _check_numbers(what: str, values: Mapping[str, float], least: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
            raise PolicyError(
                f"Of {name!r:.80}, {what} is {value!r:.80}; expected a finite number, not below {least}."
            )
