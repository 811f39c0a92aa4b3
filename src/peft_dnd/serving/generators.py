# SPDX-License-Identifier: Apache-2.0
"""Generators as they are served: by a name, with all that decides about the bytes of an adapter in one hash."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..adapters.generated_adapter import GeneratedAdapter
from ..errors import GeneratorConfigError, NotFittedError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..storage.hub import GENERATOR_FILES, commit_in_cache, find_generator, hub_id
from ..text.prompts import prompts_digest
from .problems import Problem
from .tasks import TaskPrompts


GENERATOR_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
# Part of every id: to be raised if the same generator and prompts ever give other bytes.
_FORMAT = 2


@dataclass(frozen=True, eq=False)
class ServedGenerator:
    """A loaded generator under the name that clients call it by.

    Attributes:
        name: The name.
        generator: The generator.
        revision: Its commit on the Hub; of a folder `sha256:` and the hash of its files.
        text_encoder: The same of a text encoder that lies elsewhere; `None` if it does not.
    """

    name: str
    generator: PromptConditionedLoraGenerator
    revision: str
    text_encoder: str | None = None

    def base(self, source: TaskPrompts) -> str | None:
        """Which of the generator's bases is asked for, as it calls it; `None` if it has one alone.

        Raises:
            Problem: If it does not know the base, or has several and none is named.
        """
        config = self.generator.config
        if source.base is None and not config.bases:
            return None
        try:
            name = config.find_base(source.base)
        except GeneratorConfigError as error:
            asked = "it is not named" if source.base is None else f"{source.base!r} is none of them"
            known = ", ".join(map(repr, config.base_names))
            raise Problem(
                422, f"The generator {self.name!r} writes adapters for the bases {known}. Name one as base: {asked}."
            ) from error
        return name if config.bases else None

    def adapter_id(self, source: TaskPrompts) -> str:
        """The id of the adapter that would be made: a hash of all that its bytes depend on, 64 hexadecimal digits.

        That is the generator's revision and its text encoder's, the texts that it reads, in their order, the seed, the
        threshold of its score with what is to become of the adapter above it, and which of several bases it is for.

        Raises:
            Problem: If it is not clear for which base.
            PromptError: If the prompts cannot be used.
            NotFittedError: If the generator cannot tell which prompts do not belong, and is to do so.
        """
        texts = self.generator.condition_texts(source.prompts, source.answers, seed=source.seed)
        if source.out_of_distribution != "ignore" and self.generator.prompt_reference is None:
            raise NotFittedError(
                f"The generator {self.name!r} cannot tell which prompts do not belong: out_of_distribution must be "
                "'ignore'."
            )
        fallback = source.out_of_distribution if source.out_of_distribution in ("shrink", "mean") else None
        asked = self.generator.prompt_classifier is not None
        base = self.base(source)
        extra = [*(["gated"] if self.is_gated else []), *(["classified"] if asked else [])]
        extra += [] if base is None else ["base", base]
        made_of = [self.revision, self.text_encoder, prompts_digest(texts), source.seed, fallback, source.threshold]
        parts = [*extra, _FORMAT, *made_of]
        return sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def is_gated(self) -> bool:
        """Whether each adapter passes a behaviour gate."""
        policy = self.generator.policy
        return policy is not None and policy.gate is not None and self.generator.gate_base is not None

    def generate(self, source: TaskPrompts) -> GeneratedAdapter:
        """Make the adapter.

        Raises:
            OutOfDistributionError: If the prompts do not belong, and that is to be refused.
            PolicyError: If the generator's policy refuses the prompts, or the adapter.
        """
        return self.generator.generate_adapter(
            source.prompts,
            base=self.base(source),
            seed=source.seed,
            answers=source.answers,
            out_of_distribution=source.out_of_distribution,
            threshold=source.threshold,
        )

    def facts(self, source: TaskPrompts, adapter: GeneratedAdapter) -> dict[str, Any]:
        """What clients are told of an adapter beside its size."""
        return {
            "generator": self.name,
            "revision": self.revision,
            "base_model": adapter.layout.base_model_name_or_path,
            "base": self.base(source),
            "parameters": adapter.num_parameters,
            "rank": adapter.layout.max_rank,
            "prompts": len(source.prompts),
            "prompts_sha256": adapter.provenance["prompts_sha256"],
            "seed": source.seed,
            "out_of_distribution": adapter.out_of_distribution,
            "out_of_distribution_threshold": adapter.provenance.get("out_of_distribution_threshold"),
            "shrunk_by": adapter.provenance.get("shrunk_by"),
        }


def load_served_generator(
    name: str, place: str, *, revision: str | None = None, device: str | None = None
) -> ServedGenerator:
    """Load a generator and its text encoder.

    Args:
        name: What clients call it.
        place: Its folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        device: Where it runs; `None` is the CPU.

    Raises:
        GeneratorConfigError: If no generator can have such a name, or there is no such device.
        GeneratorNotFoundError: If there is no generator there.
        NotFittedError: If it has never been fitted.
        TextEncoderError: If its text encoder cannot be loaded.
    """
    if not re.fullmatch(GENERATOR_NAME, name):
        raise GeneratorConfigError(
            f"A generator cannot be called {name!r}: expected letters, digits and ._- alone, and a letter or "
            "digit first."
        )
    folder, commit = find_generator(place, revision=revision)
    generator = PromptConditionedLoraGenerator.from_pretrained(place, revision=commit or revision)
    if not all(generator.for_base(base).normalization.fitted for base in generator.config.base_names):
        raise NotFittedError(
            f"The generator {place!r} has never been fitted, or not for all of its bases, so its adapters would mean "
            "nothing."
        )
    try:
        generator.to(device or "cpu")  # type: ignore[arg-type]  # transformers' decorator hides that it takes a name
    except (RuntimeError, AssertionError) as error:
        raise GeneratorConfigError(f"The generator cannot be put on the device {device!r}: {error}") from error
    generator.load_text_encoder()
    # Where it lies on this machine is nobody's business: it would stand in every adapter's provenance.
    generator.name_or_path = hub_id(place) or ""
    return ServedGenerator(name, generator, commit or folder_hash(folder), _encoder_revision(generator))


def folder_hash(folder: Path, patterns: tuple[str, ...] = GENERATOR_FILES) -> str:
    """`sha256:` and the hash of a folder's files: of their names, sizes and bytes.

    Args:
        folder: The folder.
        patterns: Which files count, as the Hub reads such patterns: `*` is any part of a path.
    """
    digest = sha256()
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)):
        digest.update(f"{name}\0{found[name].stat().st_size}\0".encode())
        with found[name].open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _encoder_revision(generator: PromptConditionedLoraGenerator) -> str | None:
    config = generator.config
    if config.text_encoder_in_folder or config.text_encoder is None:
        return None  # it is among the files of the generator
    if Path(config.text_encoder).is_dir():
        return folder_hash(Path(config.text_encoder), ("*",))
    files = ("modules.json", "config.json")
    commit = commit_in_cache(config.text_encoder, files, revision=config.text_encoder_revision)
    return f"{config.text_encoder}@{commit or config.text_encoder_revision}"
