# SPDX-License-Identifier: Apache-2.0
"""`GeneratorPolicy`: the bounds that a generator carries, how they travel, and what a card says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.layout import AdapterLayout
from ..errors import CorruptFileError, PeftDndError, PolicyError, did_you_mean
from ..storage.files import read_safetensors, write_safetensors
from .behaviour import BehaviourGate
from .norms import NormBounds
from .refused_prompts import RefusedPrompts


POLICY_NAME = "policy.safetensors"
_DIGEST = "policy_sha256"
PARTS = ("norms", "never_written", "refused", "classifier", "gate")


@dataclass(frozen=True, eq=False)
class GeneratorPolicy:
    """What a generator does not do, whoever asks.

    Attributes:
        norms: The largest norms of its adapters' updates.
        never_written: Modules whose update is always zero: patterns, as in a shell, of their full names.
        refused: Classes of prompts that it refuses.
        classifier: The name of a classifier of prompts without which it writes nothing; see
            `set_prompt_classifier` of [`PromptConditionedLoraGenerator`][peft_dnd.PromptConditionedLoraGenerator].
        gate: Prompts on which an adapted base must answer nearly as the untouched one.

    Raises:
        PolicyError: If a value is impossible, or the gate has no bound.
    """

    norms: NormBounds | None = None
    never_written: tuple[str, ...] = ()
    refused: RefusedPrompts | None = None
    classifier: str | None = None
    gate: BehaviourGate | None = None

    def __post_init__(self) -> None:
        if isinstance(self.never_written, str) or not all(isinstance(one, str) and one for one in self.never_written):
            raise PolicyError(
                f"never_written must be a list of patterns of modules' names, got {self.never_written!r:.80}."
            )
        object.__setattr__(self, "never_written", tuple(self.never_written))
        if not isinstance(self.classifier, str | None) or self.classifier == "":
            raise PolicyError(f"classifier must be the name of one, or None, got {self.classifier!r:.80}.")
        for name, kind in (("norms", NormBounds), ("refused", RefusedPrompts), ("gate", BehaviourGate)):
            if not isinstance(getattr(self, name), kind | None):
                raise PolicyError(f"{name} must be a {kind.__name__} or None, got {getattr(self, name)!r:.80}.")
        if self.gate is not None:
            _ = self.gate.checked_bound

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of its parts there are."""
        return tuple(name for name in PARTS if getattr(self, name))

    def check_layout(self, layout: AdapterLayout) -> None:
        """Make sure that the policy can be held by adapters of a layout.

        Raises:
            PolicyError: If it bounds modules that the layout does not have, or leaves some without a bound, or no
                module would be written.
        """
        if (self.norms is not None or self.never_written) and not layout.modules:
            raise PolicyError(
                f"Norms and never_written are for plain LoRA; this generator writes {layout.method} adapters. Leave "
                "them out; refused prompts, a classifier and a gate go with any method."
            )
        names = [module.name for module in layout.modules]
        for pattern in self.never_written:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PolicyError(
                    f"never_written has {pattern!r:.80}, which is no module of the generator's."
                    f"{did_you_mean(pattern, names, cutoff=0.4)} They are like {names[0]!r}; '*' is any part."
                )
        if names and len(self.unwritten(layout)) == len(names):
            raise PolicyError("never_written leaves no module to write to. Leave one out.")
        if self.norms is not None and (unlike := set(names) ^ set(self.norms.modules)):
            raise PolicyError(
                f"The norm's bounds are of other modules than the generator's, {min(unlike)!r} for one. Calibrate "
                "them on its own training pairs."
            )

    def unwritten(self, layout: AdapterLayout) -> tuple[str, ...]:
        """The modules of a layout that are never written."""
        return tuple(
            module.name
            for module in layout.modules
            if any(fnmatchcase(module.name, pattern) for pattern in self.never_written)
        )

    def hold(
        self, layout: AdapterLayout, matrices: Mapping[str, Tensor], *, scale: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Keep an adapter's matrices within the policy.

        Args:
            layout: The adapter's layout.
            matrices: Its matrices.
            scale: A factor by which its updates are to be multiplied besides.

        Returns:
            The matrices, and what was done to them, for the provenance.

        Raises:
            PolicyError: If an update is above its bound and that is to be refused.
        """
        held: dict[str, Tensor] = dict(matrices)
        done: dict[str, Any] = {}
        unwritten = self.unwritten(layout)
        for module in layout.modules:
            if module.name in unwritten:
                key = module.tensors[1].key
                held[key] = held[key] * 0  # A stays, so that who trains the adapter on can move it
        if unwritten:
            done["never_written"] = len(unwritten)
        if self.norms is not None:
            held, factors = self.norms.hold(layout, held, scale=scale)
            if factors:
                done["shrunk_to_bound"] = factors
        return held, done

    @property
    def sha256(self) -> str:
        """A hash of all of it: two policies have the same if they are the same."""
        found = sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What a configuration keeps of it: all but the tensors, whose hash is among it."""
        return {**self._facts(), _DIGEST: self.sha256}

    def tensors(self) -> dict[str, Tensor]:
        """What is kept in a file of its own: where examples lie, and the gate's tokens."""
        return {
            **({} if self.refused is None else self.refused.tensors()),
            **({} if self.gate is None else self.gate.tensors()),
        }

    def save(self, path: Path) -> None:
        """Write the tensors to a file, if there are any."""
        tensors = self.tensors()
        if tensors:
            write_safetensors(path, tensors)

    @classmethod
    def load(cls, data: Mapping[str, Any], path: Path) -> GeneratorPolicy:
        """Rebuild a policy from what a configuration keeps of it, and the file beside.

        Raises:
            CorruptFileError: If a part is missing or not as it was saved.
        """
        try:
            tensors = read_safetensors(path) if data.get("refused") or data.get("gate") else {}
            unknown = set(data) - {*PARTS, _DIGEST}
            if unknown:
                raise ValueError(f"there is {min(unknown)!r:.80}, which this version does not know")
            found = cls(
                norms=NormBounds(**data["norms"]) if data.get("norms") else None,
                never_written=tuple(data.get("never_written") or ()),
                refused=RefusedPrompts.from_parts(data["refused"], tensors) if data.get("refused") else None,
                classifier=data.get("classifier"),
                gate=BehaviourGate.from_parts(data["gate"], tensors) if data.get("gate") else None,
            )
            if found.sha256 != data.get(_DIGEST):
                raise ValueError(f"its {_DIGEST} is another")
        except (KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError) as error:
            reason = str(error) if isinstance(error, PeftDndError) else f"{type(error).__name__}: {error}"
            raise CorruptFileError(
                f"The generator's policy, in config.json and {path.name}, is not as it was saved ({reason:.200}). It "
                "was edited or damaged: fetch the generator again with force_download=True, or have its publisher set "
                "the policy again with generator.set_policy(policy)."
            ) from error
        return found

    def _facts(self) -> dict[str, Any]:
        return {
            "norms": None if self.norms is None else self.norms.to_dict(),
            "never_written": list(self.never_written),
            "refused": None if self.refused is None else self.refused.to_dict(),
            "classifier": self.classifier,
            "gate": None if self.gate is None else self.gate.to_dict(),
        }


def policy_in_words(data: Mapping[str, Any]) -> list[str]:
    """What a policy says, a sentence for each bound, from what a configuration keeps of it."""
    lines = []
    if norms := data.get("norms"):
        relative = "relative to the base's weights" if norms["base"] else "in absolute terms"
        largest = max(norms["modules"].values())
        lines.append(
            f"The norm of each module's update is bounded, {relative}: by {largest:.3g} at the most, and that of all "
            f"together by {norms['total']:.3g}{_calibrated(norms)}. What is above is "
            f"{'shrunk to the bound' if norms['above'] == 'shrink' else 'refused'}."
        )
    if patterns := data.get("never_written"):
        lines.append("Never written: " + ", ".join(f"`{pattern}`" for pattern in patterns) + ".")
    if refused := data.get("refused"):
        classes = ", ".join(
            f"{name} (from {facts['examples']} examples, {facts['caught']:.0%} of which would be refused if new)"
            for name, facts in refused["classes"].items()
        )
        lines.append(f"Refused classes of prompts: {classes}{_calibrated(refused)}.")
    if classifier := data.get("classifier"):
        lines.append(f"Writes nothing without the classifier of prompts {classifier!r}.")
    if gate := data.get("gate"):
        lines.append(
            f"On {gate['prompts']} held-out prompts an adapted base may diverge from the untouched one by "
            f"{gate['bound']:.3g} nats a token at the most{_calibrated(gate)}; checked where the base is at hand."
        )
    return lines


def _calibrated(facts: Mapping[str, Any]) -> str:
    if not facts["tasks"]:
        return ""
    return f", calibrated on {facts['tasks']} training tasks at a share of {facts['false_alarms']:g} of false alarms"
