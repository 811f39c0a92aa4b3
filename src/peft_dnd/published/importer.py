# SPDX-License-Identifier: Apache-2.0
"""Bringing over what the authors of arXiv 2506.16406 released: generators (`.pth`) and folders of adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch

from ..adapters.layout import AdapterLayout
from ..adapters.lora import matrix_keys
from ..adapters.published_tokenizer import published_place
from ..adapters.tokenizer import WeightNormalization
from ..decoders import HyperConvolutionDecoder
from ..decoders.hyper_convolution import PUBLISHED_PARAMETER_NAMES
from ..errors import CorruptFileError, GeneratorConfigError, LayoutError, PairsFolderError, PromptError
from ..generator.configuration import PromptConditionedLoraGeneratorConfig
from ..generator.modeling import PromptConditionedLoraGenerator
from ..generator.paper_settings import PaperSettings
from ..pairs.writer import PairWriter
from ..storage.files import PathLike, staged_directory
from ..text.encoder import TextEncoder, check_text_encoder
from ..text.prompts import check_prompts
from .files import find_checkpoints, read_tensors


logger = logging.getLogger(__name__)

_TOKEN_WEIGHT = "criterion_weight"
_PROJECTION_NAMES = {"down_proj": "down", "gate_proj": "gate"}
_NAMED_PER_KIND = 5
_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def load_published_generator(
    path: PathLike,
    settings: PathLike,
    *,
    text_encoder: str | TextEncoder | None = None,
    base_model: str | None = None,
    layout: AdapterLayout | None = None,
) -> PromptConditionedLoraGenerator:
    """Load a released generator, which then generates and is saved like any other.

    What it writes is what the published code writes from the same prompts, in float32 where that takes bfloat16. It
    reads prompts as that does: padded to their full length, with the padding's states as content
    (`condition="padded_token_states"`), and where the settings have a length projection, scrambled.

    Every key of the file is accounted for. `criterion_weight`, what each token weighed in the loss of the fit, is
    checked and reported, but no part of a generator; [`published_token_weights`] reads it.

    Args:
        path: The `.pth` file: a state dict without the text encoder's weights.
        settings: Which of the paper's settings it was made with, a name of [`available_settings`], or the path of a
            settings file.
        text_encoder: Hub id or folder of the text encoder, or a loaded one; by default the settings'.
        base_model: Hub id or folder of the base model, where it is not the settings' own.
        layout: The adapters' layout; by default that of the settings' base.

    Returns:
        The generator, in evaluation mode, in the dtype of the file. Large weights stay in the file until they are
        needed, so it must not be changed meanwhile.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If it is no state dict of tensors, or keys are missing, unexpected or misshapen; they are
            named.
        GeneratorConfigError: If there are no such settings, or they describe another kind of generator.
        TextEncoderError: If `text_encoder` is neither a name nor a text encoder.
    """
    state = read_tensors(path)
    token_weight = state.pop(_TOKEN_WEIGHT, None)
    config = _published_config(settings, layout)
    if base_model is not None:
        config.base_model_name_or_path = base_model
    encoder = None
    if isinstance(text_encoder, str):
        config.text_encoder = text_encoder
    elif text_encoder is not None:
        check_text_encoder(text_encoder)
        encoder, config.text_encoder = text_encoder, text_encoder.name_or_path
    with torch.device("meta"):
        generator = PromptConditionedLoraGenerator(config, text_encoder=encoder)
    decoder = generator.decoder
    assert isinstance(decoder, HyperConvolutionDecoder)
    names = _published_names(decoder)
    expected = {names[ours]: tensor.shape for ours, tensor in decoder.state_dict().items()}
    _check_state(state, expected, Path(path), str(settings))
    if token_weight is not None:
        _report(_checked_token_weights(token_weight, generator.weight_tokenizer.num_tokens, Path(path)), Path(path))
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    decoder.load_state_dict({ours: state[theirs].to(dtype) for ours, theirs in names.items()}, assign=True)
    generator.normalization = WeightNormalization(generator.weight_tokenizer.grid_shape)
    generator.normalization.fitted.fill_(True)
    generator.name_or_path = generator.config.name_or_path = str(path)
    return generator.eval()


def published_token_weights(path: PathLike) -> torch.Tensor:
    """Read what each token weighed in the loss that a released generator was fitted with.

    Args:
        path: The generator's `.pth` file, or a `criterion_weight.pt` that was converted to a state dict.

    Returns:
        (N_w,) float32, for `DnDTrainer(..., token_weight=...)`.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptFileError: If it is no state dict, or has no such weights.
    """
    state = read_tensors(path)
    if _TOKEN_WEIGHT not in state:
        raise CorruptFileError(
            f"{str(path)!r} has no {_TOKEN_WEIGHT!r}. Its keys: {', '.join(sorted(state)[:5])}, ..."
        )
    return _checked_token_weights(state[_TOKEN_WEIGHT], state[_TOKEN_WEIGHT].numel(), Path(path))


def import_published_adapters(
    folder: PathLike,
    pairs: PathLike,
    *,
    prompts: Mapping[str, Sequence[str]],
    settings: PathLike | None = None,
    layout: AdapterLayout | None = None,
) -> tuple[str, ...]:
    """Turn a folder of released adapters into a pairs folder, which `PromptCheckpointDataset.from_folder` reads.

    Either all of it is written or nothing.

    Args:
        folder: A folder with one folder a task, each with its checkpoints: `70.safetensors`, `71.safetensors`, ..., or
            `checkpoint-70/adapter_model.safetensors`; `.bin`, `.pt` and `.pth` files are read as well. Keys may lack
            PEFT's prefix `base_model.model.`. A folder with checkpoints right in it is one task.
        pairs: The pairs folder to write to. Other tasks may be there already.
        prompts: Task -> its pool of unlabelled prompts; tasks that are not named here are left out.
        settings: Whose adapters they are: a name of [`available_settings`], or the path of a settings file.
        layout: The adapters' layout, in place of `settings`.

    Returns:
        The names of the tasks that were written.

    Raises:
        PairsFolderError: If there is no such folder, no task of a name, no checkpoint in one, or the pairs folder has
            a task of a name already.
        PromptError: If no prompts are given, or a task's are empty.
        CorruptFileError: If a file cannot be read.
        LayoutError: If an adapter does not have the layout: a matrix is missing, unknown or of another shape.
        WeightValueError: If one holds NaN or infinity.
        GeneratorConfigError: If neither settings nor a layout are given, or both.
    """
    if settings is not None and layout is None:
        layout = PaperSettings.load(settings).layout()
    elif layout is None or settings is not None:
        raise GeneratorConfigError(
            "Whose adapters are they? Give settings='common-sense-0.5b' or layout=..., not both."
        )
    checkpoints = _find_tasks(Path(folder), prompts)
    pairs = Path(pairs)
    for task in checkpoints:
        if (pairs / task).exists():
            raise PairsFolderError(
                f"{str(pairs / task)!r} is there already. Remove it, or write to another pairs folder."
            )
    with staged_directory(pairs) as staged:
        for task, files in checkpoints.items():
            writer = PairWriter(staged / task, prompts[task], layout, task=task)
            writer.begin()
            for step, file in files.items():
                writer.add(_read_adapter(file, layout), step)
            writer.close()
    return tuple(checkpoints)


def _published_config(settings: PathLike, layout: AdapterLayout | None) -> PromptConditionedLoraGeneratorConfig:
    """The settings' configuration with what the published code does and ours, by itself, does not."""
    given = PaperSettings.load(settings).generator
    if given.get("decoder_type", "hyper_convolution") != "hyper_convolution":
        raise GeneratorConfigError(
            f"The settings {str(settings)!r} have decoder_type {given['decoder_type']!r}; released generators are "
            "'hyper_convolution'."
        )
    decoder_config = {**given.get("decoder_config", {}), "zero_init_output": False}
    if decoder_config.get("length_projection") is not None:
        decoder_config["length_projection"] = {**decoder_config["length_projection"], "scrambled": True}
    return PromptConditionedLoraGeneratorConfig.from_settings(
        settings,
        layout,
        condition="padded_token_states",
        window_tokens=None,  # padded prompts are cut into windows by themselves
        token_format="published",
        normalization="none",
        decoder_config=decoder_config,
    )


def _published_names(decoder: HyperConvolutionDecoder) -> dict[str, str]:
    """Our name -> the published one, of each of a decoder's parameters."""
    names = {
        f"layers.{i}.{ours}": f"model.decoder.module_list.{i}.{theirs}"
        for i in range(len(decoder.layers))
        for theirs, ours in PUBLISHED_PARAMETER_NAMES.items()
    }
    if decoder.length_projection is not None:
        for theirs, ours in _PROJECTION_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"length_projection.{ours}.{kind}"] = f"{theirs}.{kind}"
    return names


def _check_state(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], path: Path, settings: str
) -> None:
    problems = [
        *_listed("missing", (f"{key} {tuple(shape)}" for key, shape in expected.items() if key not in state)),
        *_listed("unexpected", (f"{key} {tuple(state[key].shape)}" for key in state if key not in expected)),
        *_listed(
            "of another shape",
            (
                f"{key} {tuple(state[key].shape)}, expected {tuple(shape)}"
                for key, shape in expected.items()
                if key in state and state[key].shape != shape
            ),
        ),
        *_listed("no floating-point numbers", (key for key in state if not state[key].is_floating_point())),
    ]
    if problems:
        raise CorruptFileError(
            f"{str(path)!r} is not the state dict of a generator of the settings {settings!r}: {'; '.join(problems)}. "
            "Name the settings that it was made with, or the file of your own with its cascade."
        )


def _listed(what: str, items: Iterable[str]) -> list[str]:
    found = list(items)
    if not found:
        return []
    more = f" and {len(found) - _NAMED_PER_KIND} more" if len(found) > _NAMED_PER_KIND else ""
    return [f"{what}: {', '.join(found[:_NAMED_PER_KIND])}{more}"]


def _checked_token_weights(weights: torch.Tensor, num_tokens: int, path: Path) -> torch.Tensor:
    if weights.numel() != num_tokens or weights.numel() != max(weights.shape, default=0):
        raise CorruptFileError(
            f"{str(path)!r} has a {_TOKEN_WEIGHT} of shape {tuple(weights.shape)}; expected one number for each of "
            f"{num_tokens} tokens, (1, {num_tokens}, 1, 1)."
        )
    return weights.flatten().float()


def _report(token_weights: torch.Tensor, path: Path) -> None:
    logger.info(
        "%s of %r, what %d tokens weighed in the published loss, from %.3g to %.3g, is no part of the generator. "
        "To go on fitting with it: DnDTrainer(..., token_weight=published_token_weights(path)).",
        _TOKEN_WEIGHT,
        str(path),
        len(token_weights),
        float(token_weights.min()),
        float(token_weights.max()),
    )


def _find_tasks(folder: Path, prompts: Mapping[str, Sequence[str]]) -> dict[str, dict[int, Path]]:
    if not folder.is_dir():
        raise PairsFolderError(f"There is no folder {str(folder)!r}. Expected one folder a task, with its adapters.")
    if not prompts:
        raise PromptError("prompts is empty: expected a dictionary of each task's list of prompts.")
    alone = {folder.name: folder} if find_checkpoints(folder) else {}
    folders = alone or {path.name: path for path in folder.iterdir() if path.is_dir()}
    found = {}
    for task, lines in prompts.items():
        check_prompts(lines, f"the prompts of task {task!r}")
        if task not in folders:
            raise PairsFolderError(
                f"There is no task {task!r} in {str(folder)!r}. Its folders: "
                f"{', '.join(map(repr, sorted(folders))) or 'none'}."
            )
        found[task] = find_checkpoints(folders[task])
        if not found[task]:
            raise PairsFolderError(f"There is no adapter in {str(folders[task])!r}, the folder of task {task!r}.")
    return found


def _read_adapter(path: Path, layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """An adapter under the layout's keys. Modules are told by layer and projection: paths differ between versions."""
    modules = {published_place(module.name): module for module in layout.modules}
    adapter: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(path).items():
        match = _LORA_KEY.fullmatch(key)
        module = modules.get(published_place(match["module"])) if match else None
        if match is None or module is None:
            raise LayoutError(f"{str(path)!r} holds {key!r}, which is no LoRA matrix of the layout.")
        ours = matrix_keys(module.name, module.kind)["AB".index(match["side"])]
        if ours in adapter:
            raise LayoutError(f"{str(path)!r} holds {key!r}, and another matrix for the same place, {ours!r}.")
        adapter[ours] = tensor
    layout.check_state_dict(adapter, source=f"{str(path)!r}")
    return adapter
