# SPDX-License-Identifier: Apache-2.0
"""The library's exceptions.

Each is also the builtin kind that Python users already catch (`ValueError`, `OSError`, ...), so that existing
`except` clauses keep working, and each message names what is wrong, what was expected, what was found and the mend.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


# Of what a file holds an error may quote anything, but nobody reads more of it.
_LONGEST = 4000


class PeftDndError(Exception):
    """Base of every error that the library raises on purpose."""

    def __str__(self) -> str:
        text = super().__str__()
        half = _LONGEST // 2
        return text if len(text) <= _LONGEST else f"{text[:half]} [...] {text[-half:]}"


class LayoutError(PeftDndError, ValueError):
    """An adapter cannot be described by a layout, or does not have the layout that it should have."""


class BaseModelMismatchError(LayoutError):
    """A generated adapter does not fit the base model that it was to be put on. The model is left untouched."""


class WeightValueError(PeftDndError, ValueError):
    """Weights hold something that is no usable number: NaN, infinity, or tensors on the meta device."""


class CorruptFileError(PeftDndError, ValueError):
    """A file is there but cannot be read as what it should be."""


class MissingFileError(PeftDndError, FileNotFoundError):
    """A file that must be there is not."""


class DestinationError(PeftDndError, NotADirectoryError):
    """Nothing can be saved where it was to be saved: no place is named, or a file is in the way of the folder."""


class SavingError(PeftDndError, OSError):
    """Writing failed where something was to be saved: a full disk, a place that may not be written to.

    `errno` says why, and `filename` is what was to be written.
    """

    def __str__(self) -> str:
        # With errno and filename set, OSError would show those two in place of the message.
        return str(self.args[0]) if self.args else ""


class FormatVersionError(PeftDndError, ValueError):
    """A folder was written in a newer format than this version of the library reads."""


class PromptError(PeftDndError, ValueError):
    """The prompts are unusable: none given, or empty ones among them."""


class PromptTypeError(PeftDndError, TypeError):
    """The prompts are not a sequence of strings."""


class TextEncoderError(PeftDndError, OSError):
    """The text encoder cannot be loaded, or cannot give what the decoder reads."""


class GeneratorNotFoundError(PeftDndError, OSError):
    """There is no generator at the given folder or Hub id."""


class GeneratorConfigError(PeftDndError, ValueError):
    """A configuration value is impossible, or two of them contradict each other."""


class PairsFolderError(PeftDndError, ValueError):
    """A folder of prompt-checkpoint pairs is incomplete or inconsistent."""


class NotFittedError(PeftDndError, RuntimeError):
    """The generator has never been fitted, so what it would write means nothing."""


class RegressionError(PeftDndError, ValueError):
    """An update of a generator lost more on the tasks that it was fitted to before than may be published."""


class EvaluationError(PeftDndError, ValueError):
    """An evaluation cannot be run as asked for: tasks, scores or reports do not belong together."""


class AdapterPoolError(PeftDndError, ValueError):
    """A pool of adapters cannot be made as asked for, or has no such task, or fewer places than are needed at once."""


class OutOfDistributionError(PeftDndError, ValueError):
    """The prompts do not belong with those of the fitted tasks, and no adapter was to be written for such."""


class PolicyError(PeftDndError, ValueError):
    """A generator's policy does not allow what was asked for.

    Args:
        message: What is refused, and why; never a prompt.
        reason: In one word, for programs: `"refused_prompts"`, `"norm"`, `"behaviour"`, `"classifier"` (the policy
            wants one that was not given) or `"policy"` (it cannot be applied).
    """

    def __init__(self, message: str, reason: str = "policy") -> None:
        super().__init__(message)
        self.reason = reason


class EngineError(PeftDndError, RuntimeError):
    """A serving engine, or the service that it gets adapters from, is set up wrongly, out of reach, or refuses."""


class SynthesisError(PeftDndError, RuntimeError):
    """A writer of synthetic prompts gives too little that can be used, or something else than was asked for."""


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A sentence for an error's end that names what was probably meant, with a blank before it; empty if unknown.

    Args:
        name: What was given.
        known: What could have been.
        cutoff: How like it must be, from 0 to 1.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
