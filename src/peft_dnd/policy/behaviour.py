# SPDX-License-Identifier: Apache-2.0
"""The behaviour gate: prompts on which an adapted base must answer nearly as the untouched one does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.lora import sharing_copy
from ..adapters.matching import base_model_of, uncompiled
from ..errors import PolicyError
from ..pairs.dataset import PromptCheckpointDataset
from ..storage.progress import with_progress
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import prompt_texts, uses_chat_template
from .bounds import FALSE_ALARMS, FEWEST_TASKS, check_false_alarms, tasks_drawn, upper_bound


_AT_ONCE = 8
_NAME = "gate"


@dataclass(frozen=True, eq=False)
class BehaviourGate:
    """Held-out prompts with the untouched base's own answers, and how far an adapted base may be from giving them.

    The divergence on a prompt is the Kullback-Leibler divergence KL(base || adapted) of the next token's distribution,
    the mean over the tokens of the base's answer, in nats. What counts is the prompt on which it is largest.

    Prompts and answers are kept as the numbers of their tokens, so that no tokenizer is needed to check an adapter;
    whoever has the base's tokenizer can read them.

    Attributes:
        tokens: Each prompt and its answer, int64 (n, L), filled up with zeros.
        starts: Where each answer begins, int64 (n,).
        stops: Where it ends, int64 (n,).
        bound: The largest divergence that any prompt may have; `None` until it is stated or calibrated.
        tasks: On how many training tasks it was calibrated; 0 if it was stated.
        false_alarms: The probability with which a new task's trained adapter, of their kind, is above it.
    """

    tokens: Tensor
    starts: Tensor
    stops: Tensor
    bound: float | None = None
    tasks: int = 0
    false_alarms: float | None = None

    @classmethod
    @torch.no_grad()
    def from_prompts(
        cls,
        prompts: PromptsLike,
        base_model: nn.Module,
        tokenizer: Any,
        *,
        bound: float | None = None,
        answer_tokens: int = 16,
    ) -> BehaviourGate:
        """Have the untouched base answer prompts, greedily.

        Args:
            prompts: The prompts: texts or conversations, which go into the tokenizer's chat template if it has one.
            base_model: The base, a causal language model without adapters.
            tokenizer: Its tokenizer.
            bound: The largest divergence, in nats a token; `None` leaves it to [`calibrate`].
            answer_tokens: How many tokens of an answer count at most.

        Raises:
            PromptError: If there are no prompts, or empty ones.
            PolicyError: If the base writes no text, or a value is impossible.
        """
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0):
            raise PolicyError(f"The bound of a behaviour gate must be a number of nats, 0 or more, got {bound!r:.80}.")
        if not isinstance(answer_tokens, int) or answer_tokens < 1:
            raise PolicyError(f"answer_tokens must be a positive integer, got {answer_tokens!r:.80}.")
        model: Any = base_model
        if not hasattr(model, "generate"):
            raise PolicyError(
                f"A behaviour gate needs a base that writes text, got a {type(base_model).__name__}. Load it with "
                "AutoModelForCausalLM."
            )
        templated = uses_chat_template(tokenizer)
        texts = prompt_texts(prompts, tokenizer=tokenizer if templated else None)
        rows, starts, was_training = [], [], model.training
        model.eval()
        try:
            for text in with_progress(texts, "Asking the base"):
                read = tokenizer(text, add_special_tokens=not templated)["input_ids"]
                if len(read) > 1 and read[-1] == tokenizer.eos_token_id and not templated:
                    read = read[:-1]  # it would say that there is no answer
                ids = torch.tensor([read], device=model.device)
                told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": answer_tokens, "do_sample": False}
                rows.append(model.generate(ids, pad_token_id=_padding(tokenizer), **told)[0].cpu())
                starts.append(ids.shape[1])
        finally:
            model.train(was_training)
        stops = torch.tensor([len(row) for row in rows])
        return cls(nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(starts), stops, bound)

    def calibrate(
        self,
        adapters: PromptCheckpointDataset | Mapping[str, GeneratedAdapter],
        base_model: nn.Module,
        *,
        false_alarms: float = FALSE_ALARMS,
    ) -> BehaviourGate:
        """The same gate with its bound derived from adapters that are to pass.

        Logarithms of the largest divergence of each are taken for normally distributed between tasks, and the bound is
        their [`upper_bound`][peft_dnd.policy.bounds.upper_bound]. Of many tasks 128 are drawn by their names.

        Args:
            adapters: Task -> its adapter, as `generator.fitted_adapters(pairs)` gives them; or pairs, of which the
                last checkpoint of each task counts. What a generator writes may be far tamer than what it was fitted
                to, and then gives the tighter bound.
            base_model: The base.
            false_alarms: See the class.

        Raises:
            PolicyError: If there are adapters of fewer than three tasks.
        """
        check_false_alarms(false_alarms)
        if isinstance(adapters, PromptCheckpointDataset):
            found: Mapping[str, GeneratedAdapter] = _LastCheckpoints(adapters)
        else:
            found = adapters
        if len(found) < FEWEST_TASKS:
            raise PolicyError(
                f"A behaviour gate is calibrated on the adapters of {FEWEST_TASKS} tasks or more, got {len(found)}. "
                "State the bound: BehaviourGate.from_prompts(..., bound=...)."
            )
        tasks = tasks_drawn(found)
        worst = torch.stack(
            [
                self.divergences(found[task], base_model).amax()
                for task in with_progress(tasks, "Measuring divergences")
            ]
        )
        bound = float(upper_bound(worst.clamp(min=1e-9).log(), false_alarms).exp())
        return replace(self, bound=bound, tasks=len(tasks), false_alarms=false_alarms)

    @torch.no_grad()
    def divergences(self, adapter: GeneratedAdapter, base_model: nn.Module, *, scale: float = 1.0) -> Tensor:
        """How far the adapted base is from the untouched one on each prompt, in nats a token.

        Args:
            adapter: The adapter.
            base_model: The base, with or without other adapters, which are left out. It is not touched.
            scale: A factor by which the adapter's update is multiplied besides.

        Returns:
            (n,), float32; infinite where it is no number.

        Raises:
            BaseModelMismatchError: If the adapter does not fit the base.
            PolicyError: If the base does not know the gate's tokens.
        """
        base: Any = _untouched(base_model).eval()
        adapted: Any = _scaled(adapter, scale).load_into(_untouched(base_model), _NAME).eval()
        known = base.get_input_embeddings().weight.shape[0]
        if int(self.tokens.max()) >= known:
            raise PolicyError(
                f"The behaviour gate has the token {int(self.tokens.max())}, and this base knows {known}. It was made "
                "for another base."
            )
        found = []
        for rows in torch.arange(len(self.tokens)).split(_AT_ONCE):
            tokens = self.tokens[rows, : int(self.stops[rows].max())].to(base.device)
            places = torch.arange(tokens.shape[1], device=tokens.device)
            stops, starts = self.stops[rows, None].to(tokens.device), self.starts[rows, None].to(tokens.device)
            # The token at a place is foretold one place before it.
            counted = (places >= starts - 1) & (places < stops - 1)
            given = {"input_ids": tokens, "attention_mask": (places < stops).long()}
            # A soft prompt's own places come first.
            plain, moved = (
                model(**given).logits[:, -tokens.shape[1] :][counted].float().log_softmax(-1).cpu()
                for model in (base, adapted)
            )
            divergence = counted.cpu().float()
            divergence[counted.cpu()] = (plain.exp() * (plain - moved)).sum(-1)
            found.append(divergence.sum(1) / counted.cpu().sum(1))
        return torch.cat(found).nan_to_num(nan=float("inf"), posinf=float("inf")).clamp(min=0)

    def check(self, adapter: GeneratedAdapter, base_model: nn.Module, *, scale: float = 1.0) -> float:
        """Make sure that an adapter is within the bound.

        Returns:
            Its largest divergence, in nats a token.

        Raises:
            PolicyError: If it is not.
        """
        worst = float(self.divergences(adapter, base_model, scale=scale).amax())
        if worst > self.checked_bound:
            raise PolicyError(
                f"With the adapter the base answers a prompt of the generator's behaviour gate in another way: it "
                f"diverges by {worst:.3g} nats a token from the untouched base, and the policy allows "
                f"{self.checked_bound:.3g}. The adapter must not be used.",
                "behaviour",
            )
        return worst

    @property
    def checked_bound(self) -> float:
        """The bound.

        Raises:
            PolicyError: If there is none yet.
        """
        if self.bound is None:
            raise PolicyError(
                "The behaviour gate has no bound yet: BehaviourGate.from_prompts(..., bound=...), or "
                "gate.calibrate(pairs, base_model)."
            )
        return self.bound

    def to_dict(self) -> dict[str, Any]:
        """What JSON knows of it."""
        return {
            "prompts": len(self.tokens),
            "bound": self.checked_bound,
            "tasks": self.tasks,
            "false_alarms": self.false_alarms,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The rest, under the names of the policy's file."""
        return {"gate.tokens": self.tokens, "gate.starts": self.starts, "gate.stops": self.stops}

    @classmethod
    def from_parts(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BehaviourGate:
        """Rebuild it from what `to_dict` and `tensors` gave.

        Raises:
            KeyError: Or `TypeError` or `ValueError`, if a part is missing or of another form.
        """
        tokens, starts, stops = (tensors[f"gate.{name}"] for name in ("tokens", "starts", "stops"))
        if (
            any(found.dtype != torch.int64 for found in (tokens, starts, stops))
            or tokens.dim() != 2
            or not len(tokens)
        ):
            raise ValueError("a gate's tokens are whole numbers, a row for each prompt")
        in_order = (starts >= 1) & (starts < stops) & (stops <= tokens.shape[1])
        if starts.shape != stops.shape or starts.shape != tokens.shape[:1] or not in_order.all() or (tokens < 0).any():
            raise ValueError("a gate's answers do not lie behind their prompts")
        bound = float(data["bound"])
        if not bound >= 0:
            raise ValueError("a gate's bound is no number")
        alarms = data["false_alarms"]
        return cls(tokens, starts, stops, bound, int(data["tasks"]), None if alarms is None else float(alarms))


class _LastCheckpoints(Mapping[str, GeneratedAdapter]):
    """The last checkpoint of each task that has some, read when it is asked for."""

    def __init__(self, pairs: PromptCheckpointDataset) -> None:
        self._pairs = pairs
        self._tasks = [task for task in pairs.tasks if pairs.checkpoints(task)]

    def __getitem__(self, task: str) -> GeneratedAdapter:
        return GeneratedAdapter(self._pairs.layout, self._pairs.state_dict(task))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def at_hand(base_model: nn.Module) -> bool:
    """Whether a base's weights are there, so that it can be asked something."""
    return not any(parameter.is_meta for parameter in base_model.parameters())


def _scaled(adapter: GeneratedAdapter, scale: float) -> GeneratedAdapter:
    if scale == 1:
        return adapter
    adapter.layout.check_plain_lora("Another alpha")
    matrices = adapter.state_dict()
    for module in adapter.layout.modules:
        key = module.tensors[1].key
        matrices[key] = matrices[key] * scale
    return GeneratedAdapter(adapter.layout, matrices, adapter.provenance)


def _untouched(base_model: nn.Module) -> nn.Module:
    """A copy of the base that shares its weights, without the adapters that are in it."""
    copied = sharing_copy(base_model_of(uncompiled(base_model)))
    adapted = [(name, module) for name, module in copied.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        owner, _, own = name.rpartition(".")
        setattr(copied.get_submodule(owner), own, cast(Any, module).get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        copied.__dict__.pop(attribute, None)
    return copied


def _padding(tokenizer: Any) -> int | None:
    padding: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return padding
