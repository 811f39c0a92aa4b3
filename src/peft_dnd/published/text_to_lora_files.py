# SPDX-License-Identifier: Apache-2.0
"""The three files of a checkpoint of Text-to-LoRA (arXiv 2506.06105), read and looked through."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from peft import LoraConfig

from ..adapters.lora import ADAPTER_CONFIG_NAME, check_supported, read_lora_config
from ..errors import CorruptFileError, GeneratorConfigError, MissingFileError
from ..storage.files import PathLike
from .files import read_tensors


WEIGHTS_NAME = "hypermod.pt"
ARGUMENTS_NAME = "args.yaml"
_NAMED = 5


def _find(path: Path) -> tuple[Path, Path]:
    """The file of weights, and the folder with what belongs to it."""
    file = path if path.is_file() else path / WEIGHTS_NAME
    if not file.is_file():
        raise MissingFileError(
            f"There is no {WEIGHTS_NAME} in {str(path)!r}. Expected a folder of Text-to-LoRA's published checkpoints, "
            f"with {WEIGHTS_NAME}, {ARGUMENTS_NAME} and {ADAPTER_CONFIG_NAME}."
        )
    steps = [parent for parent in file.parents if parent.name == "checkpoints"]
    folder = steps[0].parent if steps else file.parent
    if not (folder / ARGUMENTS_NAME).is_file():
        raise MissingFileError(
            f"There is no {ARGUMENTS_NAME} in {str(folder)!r}, without which {WEIGHTS_NAME} cannot be read. Download "
            "the checkpoint's whole folder."
        )
    return file, folder


@dataclass(frozen=True)
class Arguments:
    """What `args.yaml` says of how a checkpoint was fitted, and with which parts.

    Attributes:
        text_encoder: The text encoder's name; `None` is the base itself.
        rebuilds: Whether it was fitted to rebuild adapters, rather than on the base's loss.
        z_scored: Whether what it writes is to be scaled back by the spread and mean of those adapters.
        factorized: Whether A and B were rebuilt each, rather than their product.
        delta_w_scaling: By what the product was scaled up.
        shared_head: Whether A and B have one head.
        rank_positions: How it tells the rows of the rank apart, if it writes them one at a time.
    """

    text_encoder: str | None
    rebuilds: bool
    z_scored: bool
    factorized: bool
    delta_w_scaling: float
    shared_head: bool
    rank_positions: str | None

    @classmethod
    def read(cls, path: Path) -> Arguments:
        """Read them.

        Raises:
            CorruptFileError: If the file cannot be read, or holds an impossible value.
            GeneratorConfigError: If the checkpoint is of a kind that is not read.
        """
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise CorruptFileError(
                f"{str(path)!r} is not readable YAML ({' '.join(str(error).split()):.200}). It was cut short or "
                "edited: download it again."
            ) from error
        if not isinstance(given, dict):
            raise CorruptFileError(
                f"{str(path)!r} must hold names and values, found {given!r:.60}. Download it again."
            )
        for name, read in (("encoder_type", "linear"), ("use_one_hot_task_emb", False)):
            if given.get(name, read) != read:
                raise GeneratorConfigError(
                    f"{str(path)!r} has {name}={given[name]!r}, and checkpoints with {name}={read!r} are read, as the "
                    "published ones are."
                )
        task = given.get("training_task", "sft")
        if task not in ("sft", "recon"):
            raise GeneratorConfigError(f"{str(path)!r} has training_task={task!r}; expected 'sft' or 'recon'.")
        scaling = given.get("delta_w_scaling", 10000)
        if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < scaling < math.inf:
            raise CorruptFileError(f"{str(path)!r} has delta_w_scaling={scaling!r}; expected a positive number.")
        positions = ("learned" if given.get("learnable_pos_emb") else "rotary") if given.get("autoreg_gen") else None
        return cls(
            text_encoder=given.get("emb_model") or None,
            rebuilds=task == "recon",
            z_scored=bool(given.get("pred_z_score")),
            factorized=bool(given.get("factorized")),
            delta_w_scaling=float(scaling),
            shared_head=bool(given.get("shared_AB_head")),
            rank_positions=positions,
        )

    @property
    def scales_each_number(self) -> bool:
        """Whether what the heads write is scaled by a spread of its own, number by number."""
        return self.rebuilds and self.factorized and self.z_scored


@dataclass(frozen=True)
class Kind:
    """A kind of module in a checkpoint.

    Attributes:
        name: The last part of the modules' names.
        layers: How many layers have it.
        rank: The rank of its matrices.
        in_size: How many features it reads.
        out_size: How many it writes.
    """

    name: str
    layers: int
    rank: int
    in_size: int
    out_size: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read.

    Attributes:
        state: Key -> tensor.
        kinds: The kinds of modules, in the order of the heads.
        arguments: How it was fitted.
        lora: The adapters' configuration.
        file: The file of weights.
        folder: The folder with the other two.
    """

    state: dict[str, torch.Tensor]
    kinds: tuple[Kind, ...]
    arguments: Arguments
    lora: LoraConfig
    file: Path
    folder: Path


def read_checkpoint(path: PathLike) -> Checkpoint:
    """Read a checkpoint's files.

    Args:
        path: As for [`load_text_to_lora`][peft_dnd.published.text_to_lora.load_text_to_lora].

    Raises:
        FileNotFoundError: As there.
        CorruptFileError: As there.
        GeneratorConfigError: As there.
        LayoutError: If `adapter_config.json` describes more than A and B.
    """
    file, folder = _find(Path(path))
    arguments = Arguments.read(folder / ARGUMENTS_NAME)
    lora = read_lora_config(folder / ADAPTER_CONFIG_NAME)
    check_supported(lora, repr(str(folder / ADAPTER_CONFIG_NAME)))
    state = read_tensors(file)
    kinds = _kinds(state, file)
    if lora.r != kinds[0].rank:
        raise CorruptFileError(
            f"{str(folder / ADAPTER_CONFIG_NAME)!r} has r={lora.r}, and {str(file)!r} writes adapters of rank "
            f"{kinds[0].rank}. The two are not of one checkpoint: download both again."
        )
    wrong = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise CorruptFileError(f"{str(file)!r} holds NaN or infinity in {wrong[0]!r}. Download it again.")
    return Checkpoint(state, kinds, arguments, lora, file, folder)


def _kinds(state: dict[str, torch.Tensor], file: Path) -> tuple[Kind, ...]:
    """The kinds in the order of the heads, which is that of the kinds' embedding and stands nowhere else."""
    names = list(dict.fromkeys(key.split(".")[1] for key in state if key.startswith("heads.")))
    offsets = {key.split(".")[2] for key in state if key.startswith("AB_offset.A.")}
    if headless := sorted(offsets - set(names)):
        raise CorruptFileError(
            f"{str(file)!r} has sizes for {headless[0]!r}, but no 'heads.{headless[0]}.weight'. Download it again."
        )
    kinds = []
    for name in names:
        a, b = (state.get(f"AB_offset.{side}.{name}") for side in "AB")
        if a is None or b is None or a.ndim != 3 or b.ndim != 3 or a.shape[:2] != (b.shape[0], b.shape[2]):
            raise CorruptFileError(
                f"{str(file)!r} has a head for {name!r}, but no 'AB_offset.A.{name}' (layers, r, in) and "
                f"'AB_offset.B.{name}' (layers, out, r) that go together, by which its sizes are known. It is another "
                "kind of file, or of another version of Text-to-LoRA."
            )
        kinds.append(Kind(name, a.shape[0], a.shape[1], a.shape[2], b.shape[1]))
    if not kinds or len({(kind.layers, kind.rank) for kind in kinds}) > 1:
        raise CorruptFileError(
            f"{str(file)!r} is no checkpoint of Text-to-LoRA: expected 'heads.q_proj.weight' and the like, all of one "
            f"rank and number of layers; found {', '.join(sorted(state)[:_NAMED]) or 'nothing'}."
        )
    return tuple(kinds)
