# SPDX-License-Identifier: Apache-2.0
"""Whether a generator's folder is as it was saved, and how its checksums are renewed after an edit on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..errors import CorruptFileError, GeneratorNotFoundError
from ..pairs.replay_store import STORE_NAME
from ..policy.policy import POLICY_NAME
from ..storage.checksums import CHECKSUMS_NAME, Checksums
from ..storage.files import PathLike, read_json
from ..storage.hub import folder_meant, generator_name
from ..text.out_of_distribution import REFERENCE_NAME
from .configuration import TEXT_ENCODER_FOLDER, PromptConditionedLoraGeneratorConfig
from .summary import renew_sizes


# What of the configuration the weights were fitted for. Not names: those of the base and the text encoder differ from
# machine to machine.
_FITTED_SETTINGS = (
    "layout",
    "text_encoder_layer",
    "text_encoder_layers",
    "condition",
    "num_prompts",
    "max_prompt_length",
    "window_tokens",
    "condition_text",
    "answer_ratio",
    "condition_size",
    "chunk_width",
    "token_format",
    "normalization",
    "decoder_type",
    "decoder_config",
    "policy",
    "bases",
)
# Beside the model's own files, these hold weights.
_OTHER_FILES = (REFERENCE_NAME, POLICY_NAME, STORE_NAME, f"{TEXT_ENCODER_FOLDER}/**/*.safetensors")
_NAMES_IN_LAYOUT = ("base_model_name_or_path", "task_type")


def renew_checksums(folder: PathLike) -> Path:
    """Take the checksums of a generator's folder anew, after its weights or settings were edited on purpose.

    The sizes of its files are listed anew as well, in its summary.

    Args:
        folder: The folder. What is in it now counts as right from then on.

    Returns:
        The file of checksums.

    Raises:
        GeneratorNotFoundError: If it is no folder, or holds no generator.
        MissingFileError: If it has no weights in safetensors format.
        CorruptFileError: If a file cannot be read.
    """
    name = generator_name(folder)
    if not Path(name).is_dir():
        raise GeneratorNotFoundError(
            f"{name!r} is no folder here, and checksums are renewed in one.{folder_meant(name)} Check the spelling; "
            f"of a generator on the Hub take a copy first: hf download {name} --local-dir FOLDER"
        )
    PromptConditionedLoraGeneratorConfig.get_config_dict(name)  # refuses what is no generator
    path = write_checksums(Path(folder))
    renew_sizes(Path(folder))
    return path


def write_checksums(folder: Path) -> Path:
    """Write the checksums of a folder into which a generator was just saved."""
    files = [path for pattern in _OTHER_FILES for path in folder.glob(pattern)]
    names = [path.relative_to(folder).as_posix() for path in files]
    return Checksums.of(folder, names, _fitted_settings(folder)).write(folder)


@contextmanager
def checked_meanwhile(name: str, folder: Path) -> Iterator[None]:
    """While the block loads a generator, make sure that its folder is as it was saved. One without checksums may be.

    Args:
        name: What the caller calls the generator.
        folder: Its folder.

    Raises:
        CorruptFileError: If it is not; the first difference is named. An error of the block's own comes first.
    """
    checksums = Checksums.read(folder)
    if checksums is None:
        yield
        return
    with checksums.tensors_compared(folder) as differing:
        yield
    refuse(name, folder, differing + _small_differences(checksums, folder))


def check_all_but_tensors(name: str, folder: Path) -> Checksums | None:
    """Check what [`checked_meanwhile`] does but for the tensors, and give the checksums back, if there are any.

    Raises:
        CorruptFileError: As there.
    """
    checksums = Checksums.read(folder)
    if checksums is not None:
        refuse(name, folder, _small_differences(checksums, folder))
    return checksums


def check_text_encoder_files(folder: Path) -> None:
    """Check the weights of the text encoder that lies in a generator's folder.

    Args:
        folder: The generator's folder.

    Raises:
        CorruptFileError: If they are not as they were saved.
    """
    checksums = Checksums.read(folder)
    if checksums is not None:
        refuse(str(folder), folder, checksums.file_differences(folder, f"{TEXT_ENCODER_FOLDER}/"))


def checksum_differences(folder: Path) -> list[str] | None:
    """What in a generator's folder is not as it was saved, in words; `None` if it has no checksums."""
    checksums = Checksums.read(folder)
    if checksums is None:
        return None
    with checksums.tensors_compared(folder) as differing:
        pass
    return differing + checksums.file_differences(folder) + checksums.setting_differences(_fitted_settings(folder))


def _small_differences(checksums: Checksums, folder: Path) -> list[str]:
    names = (REFERENCE_NAME, POLICY_NAME)
    files = [difference for name in names for difference in checksums.file_differences(folder, name)]
    return files + checksums.setting_differences(_fitted_settings(folder))


def refuse(name: str, folder: Path, problems: list[str]) -> None:
    """Refuse a generator with problems, the first of which is named.

    Raises:
        CorruptFileError: If there are any.
    """
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CorruptFileError(
            f"The generator {name!r} is not as it was saved: {problems[0]}{more} differs from its checksum in "
            f"{CHECKSUMS_NAME}. It was damaged or edited: save the generator again, or fetch it again with "
            "force_download=True. If it was edited on purpose, renew its checksums: "
            f"peft_dnd.generator.renew_checksums({str(folder)!r}), or peft-dnd renew-checksums {str(folder)!r}"
        )


def fitted_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a generator's configuration, as a dictionary, its weights were fitted for."""
    settings = {name: content[name] for name in _FITTED_SETTINGS if name in content}
    if "layout" in settings:
        settings["layout"] = _without_names(settings["layout"])
    if isinstance(settings.get("bases"), dict):
        settings["bases"] = {
            name: {**base, "layout": _without_names(base.get("layout"))} if isinstance(base, dict) else base
            for name, base in settings["bases"].items()
        }
    return settings


def _fitted_settings(folder: Path) -> dict[str, Any]:
    return fitted_settings(read_json(folder / CONFIG_NAME))


def _without_names(layout: Any) -> Any:
    if not isinstance(layout, dict):
        return layout
    return {key: value for key, value in layout.items() if key not in _NAMES_IN_LAYOUT}
