# SPDX-License-Identifier: Apache-2.0
"""Reading an adapter that somebody else trained and saved, with every check that its files allow."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ..adapters.foreign_keys import peft_keys
from ..adapters.layout import AdapterLayout
from ..adapters.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_lora_config
from ..errors import CorruptFileError, LayoutError, MissingFileError, PeftDndError, WeightValueError, did_you_mean
from ..storage.cards import CARD_NAME
from ..storage.files import PathLike, read_json, read_safetensors_shapes
from ..storage.hub import find_adapter_and_commit
from .files import find_checkpoints, read_tensors


PICKLE_NAME = "adapter_model.bin"

# No trained LoRA matrix comes near it; a flipped bit of an exponent goes far beyond.
_LARGEST_PLAUSIBLE = 1e4
_LARGEST_ALPHA = 1e6
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class ExistingAdapter:
    """An adapter that exists already, and where.

    Attributes:
        name_or_path: Its folder, or its Hub id.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder inside the repository, or inside the folder.
        sha256: What its weights' file must have as SHA-256, in hexadecimal, if that is known: no other check finds
            two matrices of one shape that were exchanged, or a small number that was changed.
        config_sha256: The same of its `adapter_config.json`, where alpha stands.
    """

    name_or_path: PathLike
    revision: str | None = None
    subfolder: str = ""
    sha256: str | None = None
    config_sha256: str | None = None


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter's files, of which the configuration and the weights' header were read and checked.

    Attributes:
        name: What to call it in errors.
        folder: Where it is on this machine.
        weights: Its weights' file.
        config: Its configuration.
        keys: The weights' keys -> PEFT's.
        layout: Its layout.
        source: What is kept of where it came from: name, commit, SHA-256 of its files, what its configuration says.
        step: The training step, where the name of its folder says it.
    """

    name: str
    folder: Path
    weights: Path
    config: LoraConfig
    keys: Mapping[str, str]
    layout: AdapterLayout
    source: Mapping[str, Any]
    step: int | None = None

    @property
    def card(self) -> Path:
        """Its model card, which may not be there."""
        return self.folder / CARD_NAME

    def targets(self, module: str) -> bool:
        """Whether its configuration asks for a module to be adapted, as far as that can be told without the base."""
        if self.config.target_modules == _ALL_LINEAR:
            return True
        return bool(check_target_module_exists(self.config, module))

    def read(self) -> dict[str, torch.Tensor]:
        """Read its matrices, under PEFT's keys and in the dtype of the file.

        Raises:
            CorruptFileError: If the file cannot be read.
            WeightValueError: If it holds NaN, infinity, numbers that no training gives or no floating-point numbers at
                all, or if its update is zero altogether.
        """
        found = read_tensors(self.weights)
        state_dict = {ours: found[key] for key, ours in self.keys.items()}
        for key, matrix in state_dict.items():
            if not matrix.is_floating_point():
                raise WeightValueError(
                    f"{self.name} holds {key!r} as {matrix.dtype}; expected floating-point numbers. Save the adapter "
                    "unquantised."
                )
        self.layout.check_state_dict(state_dict, source=self.name)
        for key, matrix in state_dict.items():
            if matrix.abs().max() > _LARGEST_PLAUSIBLE:
                raise WeightValueError(
                    f"{self.name} holds {matrix.abs().max().item():.3g} in {key!r}, which no training gives "
                    f"(expected below {_LARGEST_PLAUSIBLE:g}). The file is damaged: fetch it again."
                )
        tensors = [module.tensors for module in self.layout.modules]
        if not any(state_dict[a.key].any() and state_dict[b.key].any() for a, b in tensors):
            raise WeightValueError(
                f"{self.name} changes nothing: A or B is zero in each of its modules, as before any training. Leave "
                "it out, or save it after training."
            )
        return state_dict


def find_adapters(adapter: ExistingAdapter, *, pickles: bool = False) -> list[FoundAdapter]:
    """Find an adapter, and read and check all but its weights.

    A folder that is no adapter itself but holds a Trainer's `checkpoint-10`, `checkpoint-20`, ... is all of these.

    Args:
        adapter: Where it is.
        pickles: Whether to read an `adapter_model.bin` where there is no safetensors file, tensors alone.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or a file of it is missing.
        CorruptFileError: If a file cannot be read, or is not the one of the given SHA-256.
        LayoutError: If it is no plain LoRA adapter, or its configuration and its matrices contradict each other.
    """
    files = [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CARD_NAME, *([PICKLE_NAME] if pickles else [])]
    folder, commit = find_adapter_and_commit(
        adapter.name_or_path, files, revision=adapter.revision, subfolder=adapter.subfolder
    )
    name = "/".join(filter(None, (str(adapter.name_or_path).rstrip("/"), adapter.subfolder.strip("/"))))
    if commit is None and not (folder / ADAPTER_CONFIG_NAME).is_file() and folder.is_dir():
        steps = {step: file.parent for step, file in find_checkpoints(folder).items() if file.parent != folder}
        if steps and (adapter.sha256 or adapter.config_sha256):
            raise LayoutError(f"{name!r} holds {len(steps)} checkpoints, so one SHA-256 cannot be that of all.")
        if steps:
            return [
                _found(path, f"{name}/{path.name}", adapter, commit, pickles, step) for step, path in steps.items()
            ]
    return [_found(folder, name, adapter, commit, pickles)]


def _found(
    folder: Path, name: str, adapter: ExistingAdapter, commit: str | None, pickles: bool, step: int | None = None
) -> FoundAdapter:
    config_path, weights = folder / ADAPTER_CONFIG_NAME, folder / ADAPTER_WEIGHTS_NAME
    if config_path.is_file():
        weights = _weights_in(folder, name, pickles)
    # First of all: where a digest is known, damage is called damage, whatever it makes of the file.
    digests = {
        path.name: _checked_sha256(path, expected)
        for path, expected in ((config_path, adapter.config_sha256), (weights, adapter.sha256))
        if path.is_file()
    }
    config = _read_config(config_path)
    shapes = _shapes(weights)
    keys = peft_keys(shapes, f"{str(weights)!r}")
    quoted = repr(name)
    layout = AdapterLayout.from_shapes({ours: shapes[key] for key, ours in keys.items()}, config, source=quoted)
    found = FoundAdapter(
        quoted,
        folder,
        weights,
        config,
        keys,
        layout,
        source={
            "adapter": name,
            "commit": commit,
            "sha256": digests,
            "base_model": config.base_model_name_or_path,
            "lora_alpha": config.lora_alpha,
            "use_rslora": bool(config.use_rslora),
        },
        step=step,
    )
    _check_consistent(found)
    return found


def _read_config(path: Path) -> LoraConfig:
    try:
        config = read_lora_config(path)
    except PeftDndError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # PEFT's own, of what makes no sense in it
        raise LayoutError(f"{str(path)!r} is no LoRA configuration ({error}). Restore the file.") from error
    _check_fields(path, read_json(path))
    targets = config.target_modules
    if not isinstance(targets, (str, set)) or not all(isinstance(target, str) for target in targets):
        raise LayoutError(
            f"{str(path)!r} has target_modules {targets!r}; expected names or a pattern. Which modules the adapter is "
            "for cannot be checked without: restore the file."
        )
    return config


def _weights_in(folder: Path, name: str, pickles: bool) -> Path:
    weights, pickle = folder / ADAPTER_WEIGHTS_NAME, folder / PICKLE_NAME
    if weights.is_file():
        return weights
    if pickle.is_file() and pickles:
        return pickle
    old = (
        f" There is an old {PICKLE_NAME}, which is read, tensors alone, if you ask for it: pickles=True (--pickles)."
        if pickle.is_file()
        else f" Where it has an old {PICKLE_NAME}, ask for that: pickles=True (--pickles)."
    )
    raise MissingFileError(f"There is no {ADAPTER_WEIGHTS_NAME} in {name!r}.{old}")


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    if weights.suffix == ".safetensors":
        return read_safetensors_shapes(weights)
    return {key: tuple(tensor.shape) for key, tensor in read_tensors(weights).items()}


def _checked_sha256(path: Path, expected: str | None) -> str:
    found = _sha256(path)
    # The Hub's cache calls a large file by its SHA-256, and links to it.
    stored = path.resolve()
    cached = stored.name if stored.parent.name == "blobs" and _HEX_SHA256.fullmatch(stored.name) else None
    for right in filter(None, (expected, cached)):
        if found != right.lower():
            raise CorruptFileError(
                f"{str(path)!r} has the SHA-256 {found}; expected {right}. It is damaged or another version: fetch it "
                "again, or name the version that is meant."
            )
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_fields(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse a configuration whose scaling has to be guessed: a field that is missing, or misspelt by damage."""
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if not _is_positive(data.get(name), *kinds):
            raise LayoutError(
                f"{str(path)!r} has {name} {data.get(name)!r}; expected a positive number. Without it nobody knows "
                "how strongly the adapter acts: restore the file."
            )
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key, value in (data.get(pattern) or {}).items():
            if not _is_positive(value, int, float):
                raise LayoutError(f"{str(path)!r} has {value!r} for {key!r} in {pattern}; expected a positive number.")
    if not isinstance(data.get("use_rslora", False), bool):
        raise LayoutError(f"{str(path)!r} has use_rslora {data['use_rslora']!r}; expected true or false.")
    known = {field.name for field in fields(LoraConfig)}
    for name in data.keys() - known:
        meant = did_you_mean(name, known, cutoff=0.85)
        if meant:
            raise LayoutError(
                f"{str(path)!r} has a field {name!r}, which PEFT does not know.{meant} Mend it, or take it out if it "
                "belongs to another version of PEFT."
            )


def _is_positive(value: Any, *kinds: type) -> bool:
    return type(value) in kinds and 0 < value <= _LARGEST_ALPHA


def _check_consistent(found: FoundAdapter) -> None:
    """Make sure that the matrices are those that the configuration speaks of."""
    ranks = found.config.rank_pattern or {}
    for module in found.layout.modules:
        rank = ranks.get(get_pattern_key(list(ranks), module.name), found.config.r)
        if module.rank != rank:
            raise LayoutError(
                f"{found.name} has rank {module.rank} in {module.name!r}, and its configuration says {rank}. One of "
                "the two files is another adapter's, or damaged: restore it."
            )
        if not found.targets(module.name):
            raise LayoutError(
                f"{found.name} holds matrices of {module.name!r}, which its configuration does not target. A key was "
                "renamed, or one of the two files is another adapter's: restore it."
            )
