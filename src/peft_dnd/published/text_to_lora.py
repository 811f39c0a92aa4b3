# SPDX-License-Identifier: Apache-2.0
"""Bringing over the checkpoints that Text-to-LoRA (arXiv 2506.06105) published: a folder's three files become ours."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..adapters.layout import AdapterLayout, LoraModule
from ..adapters.lora import alpha_of
from ..decoders import TextToLoraDecoder
from ..errors import CorruptFileError, LayoutError
from ..generator.configuration import PromptConditionedLoraGeneratorConfig
from ..generator.modeling import PromptConditionedLoraGenerator
from ..storage.files import PathLike
from ..text.encoder import TextEncoder, check_text_encoder
from .text_to_lora_files import ARGUMENTS_NAME, Checkpoint, Kind, read_checkpoint


# Where transformers' decoder-only models have the projections that these checkpoints adapt.
_PARENTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# Their name -> ours, of all that is the same in both.
_TRUNK = {
    "task_encoder.mlp.": "task_encoder.",
    "layer_depth_encoder.": "layer_encoder.",
    "mixer.": "mixer.",
    "mlp1.mlp.": "mlp1.",
    "mlp2.mlp.": "mlp2.",
    "mlp3.": "mlp3.",
    "pos_emb.": "rank_encoder.",
    "out_emb_norm.": "side_encoder.1.",
    "layer_type_encoder.1.": "kind_encoder.1.",
}
# Zero where the way in which the checkpoint was fitted has no use for them.
_TARGETS = ("AB_offset", "mean_recon_target", "std_recon_target")
_LEAST_SPREAD = 1e-10  # added to the spread in the published code
_NAMED = 5


def load_text_to_lora(
    path: PathLike,
    *,
    text_encoder: str | TextEncoder | None = None,
    base_model: str | None = None,
    layout: AdapterLayout | None = None,
) -> PromptConditionedLoraGenerator:
    """Load a published checkpoint of Text-to-LoRA, which then generates and is saved like any other generator.

    Its prompts are descriptions of the task. Of one description it writes what the published code writes, in float32;
    of several, the adapter of the mean of what the text encoder makes of them. That code puts a full stop at the end
    of a description that ends in a letter; write it so. Nothing is asked of the Hub: sizes are the checkpoint's own.

    Args:
        path: The folder with `hypermod.pt`, `args.yaml` and `adapter_config.json`; or the first of these in it, also
            one of another step, in `checkpoints/it_.../`.
        text_encoder: Hub id or folder of the text encoder, or a loaded one; by default the one that `args.yaml` names.
            It has to give the same vectors: the state of the first token for gte, not normalised.
        base_model: Hub id or folder of the base model, where it is not the one that `adapter_config.json` names.
        layout: The adapters' layout, where modules are called otherwise than `model.layers.0.self_attn.q_proj`, ...,
            `model.layers.0.mlp.down_proj`.

    Returns:
        The generator, in evaluation mode, in float32.

    Raises:
        FileNotFoundError: If one of the three files is missing.
        CorruptFileError: If one cannot be read, or keys are missing, unexpected or misshapen; they are named.
        GeneratorConfigError: If the checkpoint is of a kind that is not read: with a text encoder's codes
            (`encoder_type` other than `linear`), task numbers for descriptions, or adapters other than LoRA.
        LayoutError: If its modules' names are not known, or `layout` is of other sizes.
        TextEncoderError: If `text_encoder` is neither a name nor a text encoder.
    """
    checkpoint = read_checkpoint(path)
    layout = _layout(checkpoint, base_model) if layout is None else layout
    encoder = None
    if text_encoder is None or isinstance(text_encoder, str):
        name = text_encoder or checkpoint.arguments.text_encoder
    else:
        check_text_encoder(text_encoder)
        encoder, name = text_encoder, text_encoder.name_or_path
    config = _config(checkpoint, layout, name)
    if base_model is not None:
        config.base_model_name_or_path = base_model
    generator = PromptConditionedLoraGenerator(config, text_encoder=encoder)
    _fill(generator, checkpoint)
    generator.name_or_path = generator.config.name_or_path = str(checkpoint.folder)
    return generator.eval()


def _layout(checkpoint: Checkpoint, base_model: str | None) -> AdapterLayout:
    kinds, lora = checkpoint.kinds, checkpoint.lora
    unknown = [kind.name for kind in kinds if kind.name not in _PARENTS]
    if unknown:
        raise LayoutError(
            f"Where the base has its module {unknown[0]!r} is not known here; known are {', '.join(_PARENTS)}. Pass "
            "layout=AdapterLayout.from_lora_config(lora_config, base_model)."
        )
    modules = []
    for kind in kinds:
        for layer in range(kind.layers):
            name = f"model.layers.{layer}.{_PARENTS[kind.name]}.{kind.name}"
            shapes = (kind.rank, kind.in_size), (kind.out_size, kind.rank)
            modules.append(LoraModule(name, "linear", *shapes, alpha_of(lora, name)))
    return AdapterLayout(
        tuple(modules),
        target_modules=tuple(sorted(kind.name for kind in kinds)),
        use_rslora=bool(lora.use_rslora),
        task_type=getattr(lora.task_type, "value", lora.task_type),
        base_model_name_or_path=base_model or lora.base_model_name_or_path,
    )


def _config(
    checkpoint: Checkpoint, layout: AdapterLayout, text_encoder: str | None
) -> PromptConditionedLoraGeneratorConfig:
    state, arguments = checkpoint.state, checkpoint.arguments
    try:
        half, condition_size = state["task_encoder.mlp.0.weight"].shape
        head_in_size = state["mlp3.4.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CorruptFileError(
            f"{str(checkpoint.file)!r} lacks a matrix that the sizes are read from ({error}). It is another kind of "
            "file, or was cut short: download it again."
        ) from error
    return PromptConditionedLoraGeneratorConfig(
        layout=layout,
        text_encoder=text_encoder,
        condition="sentence_embeddings",
        max_prompt_length=1,
        condition_size=condition_size,
        decoder_type="text_to_lora",
        decoder_config={
            "latent_size": 2 * half,
            "head_in_size": head_in_size,
            "shared_head": arguments.shared_head,
            "rank_positions": arguments.rank_positions,
            "head_bias": any(key.startswith("heads.") and key.endswith(".bias") for key in state),
            "elementwise_scale": arguments.scales_each_number,
            "zero_init_output": False,
        },
    )


def _fill(generator: PromptConditionedLoraGenerator, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's numbers in their places, in decoder and normalisation."""
    decoder = generator.decoder
    assert isinstance(decoder, TextToLoraDecoder)
    layout = generator.config.adapter_layout
    order = _order_of_kinds(decoder, layout, checkpoint)
    theirs = dict(checkpoint.state)
    arguments = checkpoint.arguments
    targets = {name: _adapter(theirs, name, checkpoint, layout) for name in _TARGETS}
    ours = {name: tensor.float() for key, tensor in theirs.items() if (name := _our_name(key)) is not None}
    embedding = theirs.get("layer_type_encoder.0.weight")
    if embedding is not None and len(embedding) == len(order):
        ours["kind_encoder.0.weight"] = torch.stack([embedding[place].float() for place in order])
    sides = [theirs.get(f"out_emb.{checkpoint.kinds[place].name}.{side}") for place in order for side in "AB"]
    if arguments.shared_head and all(side is not None for side in sides):
        ours["side_encoder.0.weight"] = torch.stack([side.float() for side in sides if side is not None])
    for number, place in enumerate(order):
        kind = checkpoint.kinds[place]
        for part in ("weight", "bias"):
            if (head := theirs.get(f"heads.{kind.name}.{part}")) is not None:
                ours[f"heads.{number}.{part}"] = _head(head.float(), kind, decoder, number, checkpoint)
    tokenizer = generator.weight_tokenizer
    offset = tokenizer.encode(targets["AB_offset"])
    scale = 1.0
    if arguments.rebuilds and not arguments.factorized:
        scale = 1 / math.sqrt(arguments.delta_w_scaling)
        offset = torch.zeros_like(offset)
    if arguments.scales_each_number:
        offset = offset + tokenizer.encode(targets["mean_recon_target"])
        ours["scale"] = tokenizer.encode(targets["std_recon_target"]) + _LEAST_SPREAD
    _check_keys(ours, decoder, checkpoint)
    decoder.load_state_dict(ours)
    generator.normalization.set_statistics(offset, torch.full((tokenizer.num_tokens,), scale))


def _order_of_kinds(decoder: TextToLoraDecoder, layout: AdapterLayout, checkpoint: Checkpoint) -> list[int]:
    """Of each of the decoder's kinds, its place among the checkpoint's; sizes are compared."""
    places = {kind.name: place for place, kind in enumerate(checkpoint.kinds)}
    order = []
    for kind in decoder.kinds:
        modules = [layout.modules[module] for module in kind.modules]
        name = modules[0].name.rpartition(".")[2]
        theirs = checkpoint.kinds[places[name]] if name in places else None
        for module in modules:
            found = None if theirs is None else ((theirs.rank, theirs.in_size), (theirs.out_size, theirs.rank))
            if found != (module.shape_a, module.shape_b) or theirs is None or len(modules) != theirs.layers:
                raise LayoutError(
                    f"The layout has {len(modules)} modules of the kind {name!r}, A {module.shape_a} and B "
                    f"{module.shape_b}; {str(checkpoint.file)!r} has "
                    + ("none." if theirs is None else f"{theirs.layers}, {found}.")
                    + " Pass the layout of the base that it was fitted for."
                )
        order.append(places[name])
    if len(order) != len(places):
        raise LayoutError(
            f"{str(checkpoint.file)!r} adapts {', '.join(places)}, and the layout {len(order)} kinds of modules."
        )
    return order


def _adapter(
    theirs: dict[str, torch.Tensor], target: str, checkpoint: Checkpoint, layout: AdapterLayout
) -> dict[str, torch.Tensor]:
    """An adapter that stands in the checkpoint layer on layer, taken out of it; zeros where it is not there."""
    found = {}
    per_kind = {
        (kind.name, side): theirs.pop(f"{target}.{side}.{kind.name}", None)
        for kind in checkpoint.kinds
        for side in "AB"
    }
    count: dict[tuple[str, str], int] = {}
    for tensor in layout.tensors:
        place = (tensor.module.rpartition(".")[2], tensor.side)
        layer = count[place] = count.get(place, -1) + 1
        stacked = per_kind[place]
        if stacked is None and target == "std_recon_target" and checkpoint.arguments.scales_each_number:
            raise CorruptFileError(f"{str(checkpoint.file)!r} lacks '{target}.{place[1]}.{place[0]}'.")
        if stacked is not None and stacked.shape[1:] != tensor.shape:
            raise CorruptFileError(
                f"{str(checkpoint.file)!r} has '{target}.{place[1]}.{place[0]}' of shape {tuple(stacked.shape)}; "
                f"expected {tensor.shape} for each layer."
            )
        found[tensor.key] = torch.zeros(tensor.shape) if stacked is None else stacked[layer].float()
    return found


def _our_name(key: str) -> str | None:
    for start, ours in _TRUNK.items():
        if key.startswith(start):
            return ours + key.removeprefix(start)
    return None


def _head(
    head: torch.Tensor, kind: Kind, decoder: TextToLoraDecoder, number: int, checkpoint: Checkpoint
) -> torch.Tensor:
    """A head's rows, in the order of tokens, with rows of zero where those are filled up."""
    ranks = 1 if decoder.rank_positions else kind.rank
    widths = [max(kind.in_size, kind.out_size)] if decoder.shared_head else [kind.in_size, kind.out_size]
    if len(head) != ranks * sum(widths):
        raise CorruptFileError(
            f"{str(checkpoint.file)!r} has 'heads.{kind.name}' with {len(head)} rows; by {ARGUMENTS_NAME} and the "
            f"sizes expected are {ranks * sum(widths)}. The two files are not of one checkpoint."
        )
    ours = decoder.kinds[number]
    chunks = [max(ours.num_a, ours.num_b)] if decoder.shared_head else [ours.num_a, ours.num_b]
    parts = []
    for rows, width, count in zip(head.split([ranks * width for width in widths]), widths, chunks, strict=True):
        filled = rows.new_zeros(ranks, count * decoder.columns, *head.shape[1:])
        filled[:, :width] = rows.unflatten(0, (ranks, width))
        parts.append(filled.unflatten(1, (count, decoder.columns)).transpose(0, 1))
    return torch.cat(parts).flatten(0, 2)


def _check_keys(ours: Mapping[str, torch.Tensor], decoder: TextToLoraDecoder, checkpoint: Checkpoint) -> None:
    """Make sure that the checkpoint has all that the decoder has, and nothing else."""
    expected = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    known = (*(f"{target}." for target in _TARGETS), "heads.", "out_emb.", "layer_type_encoder.0.", "rotary_emb.")
    unexpected = [key for key in checkpoint.state if _our_name(key) is None and not key.startswith(known)]
    unexpected += [name for name in ours if name not in expected]
    problems = {
        "missing": [name for name in expected if name not in ours],
        "unexpected": unexpected,
        "of another shape": [name for name in ours if name in expected and ours[name].shape != expected[name]],
    }
    told = [f"{what}: {', '.join(sorted(names)[:_NAMED])}" for what, names in problems.items() if names]
    if told:
        raise CorruptFileError(
            f"{str(checkpoint.file)!r} does not hold what {ARGUMENTS_NAME} beside it describes ({'; '.join(told)}, by "
            "the names of peft_dnd's decoder). The two are not of one checkpoint, or damaged: download both again."
        )
