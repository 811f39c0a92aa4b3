# SPDX-License-Identifier: Apache-2.0
"""A generator whose decoder stays on disk: adapters from decoders that are larger than the memory at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging
from typing_extensions import Unpack

from ..errors import GeneratorConfigError, WeightValueError
from ..storage.checksums import RunningChecksum
from ..storage.files import PathLike
from ..storage.hub import (
    HubOptions,
    find_folder,
    find_generator,
    generator_name,
    takes_keywords_of,
)
from ..storage.stored_weights import StoredTensor, floating_dtype
from ..text.encoder import TextEncoder, check_text_encoder
from .checksums import check_all_but_tensors, refuse
from .configuration import PromptConditionedLoraGeneratorConfig
from .heads import head_parts
from .modeling import PromptConditionedLoraGenerator
from .stored import check_stored


# Parameters up to this size are held all the time: reading each of them anew would take longer than it is worth.
_HELD_BYTES = 2**20
_WORTH_A_BAR = 2**28


class StreamedWeight:
    """A parameter that stays in its file, and stands in for the tensor where a module reads it by slices.

    Args:
        stored: Where it lies.
        dtype: The type that slices are given in.
        device: Where slices are put.
        on_read: Called with the number of bytes of each slice that has not been read since `restart`.
        checksum: What its checksum must be, if that is known; checked when it has been read once from its first row to
            its last.

    Raises:
        CorruptFileError: By the slice that ends it, if the checksum is another.
    """

    requires_grad = False

    def __init__(
        self,
        stored: StoredTensor,
        dtype: torch.dtype,
        device: torch.device,
        on_read: Callable[[int], Any],
        checksum: RunningChecksum | None = None,
    ) -> None:
        self.shape = stored.shape
        self.dtype = dtype
        self.device = device
        self.num_bytes = stored.num_bytes
        self._stored, self._on_read, self._rows_read = stored, on_read, 0
        self._checksum = checksum

    def restart(self) -> None:
        """Count what is read from the beginning again."""
        self._rows_read = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | int) -> torch.Tensor:
        if isinstance(rows, int):
            return self[rows : rows + 1][0]
        start, stop, _ = rows.indices(len(self))
        read = self._stored.read((start, stop))
        if self._checksum is not None:
            self._checksum.take(start, read)
        found = read.to(self.device, self.dtype)
        if stop > self._rows_read:
            self._on_read((stop - max(start, self._rows_read)) * self._stored.row_bytes)
            self._rows_read = stop
        return found

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[row] for row in range(len(self)))


class StreamedLoraGenerator(PromptConditionedLoraGenerator):
    """A fitted generator that reads its decoder's weights from disk while it decodes, and never holds them.

    Where most parameters are, only a slice of one is held at a time: 64 output channels of a convolution, one head of
    a set transformer; a module of your own names such parameters in `reads_in_slices`. Any other is read just before
    the module that holds it runs, and dropped after it. Large parameters must therefore not be used by another module
    than their own. All are read anew for every adapter, so with memory enough the other class is faster.

    The result is that of [`PromptConditionedLoraGenerator`]: on a CPU to the byte for a cascade of hyper-convolutions
    in float32 or bfloat16, whose kernels compute 64 output channels in the same way alone and among others. Where
    there are matrix products, in a length projection or a set transformer, it is to their rounding (1e-5), as these
    may add up in another order where a weight begins at another address.

    It generates, alone or inside a [`DnDConfig`], and nothing else: it is neither fitted nor saved.

        StreamedLoraGenerator.from_pretrained("org/generator").generate_adapter(prompts)
    """

    _execution_device: torch.device

    @classmethod
    @takes_keywords_of(find_folder)
    def from_pretrained(  # type: ignore[override]  # nothing is passed on to transformers here
        cls,
        pretrained_model_name_or_path: PathLike,
        *,
        text_encoder: TextEncoder | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        **hub: Unpack[HubOptions],
    ) -> StreamedLoraGenerator:
        """Find a generator in a folder or on the Hub. Of its decoder only the files' headers and small parts are read.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            text_encoder: A loaded text encoder to use in place of the one that the configuration names.
            dtype: Type to decode in; `None` takes the one that it was saved in.
            device: Where to decode.
            hub: See [`HubOptions`][peft_dnd.storage.hub.HubOptions].

        Raises:
            GeneratorNotFoundError: If there is no generator there.
            FormatVersionError: If it was saved by a newer version of the library.
            CorruptFileError: If a file is cut short, weights are missing, or those that are read now are not what was
                saved; of the others that is seen when they are first read.
            WeightValueError: If a scale of the normalisation is not positive.
            GeneratorConfigError: If there is no such floating-point type, or no such device.
            TextEncoderError: If `text_encoder` is none.
        """
        name = generator_name(pretrained_model_name_or_path)
        check_text_encoder(text_encoder, or_none=True)
        dtype = None if dtype is None else floating_dtype(dtype)
        _check_device(device)
        folder, commit = find_generator(name, **hub)
        config = PromptConditionedLoraGeneratorConfig.from_pretrained(folder)
        model, stored = check_stored(name, cls, config, folder)
        assert isinstance(model, cls)
        checksums = check_all_but_tensors(name, folder)
        model._execution_device = torch.device(device)

        def differs(what: str) -> None:
            refuse(name, folder, [what])

        def checksum_of(key: str) -> RunningChecksum | None:
            return None if checksums is None else checksums.running(key, stored[key], differs)

        model._stream_from(stored, dtype or _saved_dtype(config, stored), checksum_of)
        model._loaded_from(name, folder, commit, hub.get("token"), text_encoder)
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Where it decodes."""
        return self._execution_device

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Decode condition states; see [`PromptConditionedLoraGenerator.forward`]. No gradient flows through it."""
        with self._progress():
            return super().forward(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not for a streamed generator.

        Raises:
            WeightValueError: Always.
        """
        raise WeightValueError(
            "A streamed generator does not hold its weights, so it cannot save them. Copy its folder "
            f"{str(self._folder)!r}, or load it with PromptConditionedLoraGenerator.from_pretrained."
        )

    def _stream_from(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        checksum_of: Callable[[str], RunningChecksum | None],
    ) -> None:
        """Set up every module: small parameters and buffers are read now, the rest is left to be read."""
        self._streamed: list[StreamedWeight] = []
        self._bar: Any = None
        written = [self.decoder, *(part for head in self.heads.values() for part in head_parts(head).values())]
        for part in written:
            part.to(dtype)
        for module in (module for part in written for module in part.modules()):
            lost = module._non_persistent_buffers_set
            for name in lost:
                module._buffers[name] = torch.empty_like(module.get_buffer(name), device=self._execution_device)
            if lost:
                self._init_weights(module)
        for prefix, module in self.named_modules():
            names = [*module._parameters, *(set(module._buffers) - module._non_persistent_buffers_set)]
            for name in names:
                key = f"{prefix}.{name}"
                if key in stored:
                    self._place(module, name, stored[key], checksum_of(key))

    def _place(self, module: nn.Module, name: str, stored: StoredTensor, checksum: RunningChecksum | None) -> None:
        dtype, device = getattr(module, name).dtype, self._execution_device
        if name in module._buffers:
            module._buffers[name] = _read(stored, checksum).to(device, dtype)
        elif stored.num_bytes <= _HELD_BYTES or isinstance(module, nn.Embedding):  # others may look into a table
            module._parameters[name] = nn.Parameter(_read(stored, checksum).to(device, dtype), requires_grad=False)
        else:
            weight = StreamedWeight(stored, dtype, device, self._count, checksum)
            self._streamed.append(weight)
            if name in getattr(module, "reads_in_slices", ()):
                module.__dict__[name] = weight
            else:
                _read_around_forward(module, name, weight)

    def _count(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(num_bytes)

    @contextmanager
    def _progress(self) -> Iterator[None]:
        total = 0
        for weight in self._streamed:
            weight.restart()
            total += weight.num_bytes
        settings = {"desc": "decoding", "unit": "B", "unit_scale": True, "disable": total < _WORTH_A_BAR}
        counting = self.whole or self  # the one whose weights they are
        with transformers_logging.tqdm(total=total, **settings) as counting._bar:
            try:
                yield
            finally:
                counting._bar = None


def _read(stored: StoredTensor, checksum: RunningChecksum | None) -> torch.Tensor:
    found = stored.read()
    if checksum is not None:
        checksum.take(0, found if stored.shape else found[None])
    return found


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch has all three for a device that is not there
        reason = str(error).partition("\n")[0]
        raise GeneratorConfigError(
            f"The device {device!r} cannot be used ({reason}). Pass one that torch has here, 'cpu' for one."
        ) from error


class _Elsewhere(torch.Tensor):
    """A streamed parameter while its module does not run: a shape and a type, but no numbers.

    Of some products with a tensor on the meta device torch makes numbers out of nothing; this refuses them.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "__get__":  # of an attribute
            return super().__torch_function__(func, types, args, kwargs or {})
        raise GeneratorConfigError(
            f"The decoder uses a streamed parameter of another module than the one that runs ({func.__name__}), which "
            "is read only while its own does. Have the decoder call that module instead, or load the generator with "
            "PromptConditionedLoraGenerator.from_pretrained, which holds all parameters."
        )


def _read_around_forward(module: nn.Module, name: str, weight: StreamedWeight) -> None:
    # An attribute of the instance hides the parameter of that name, which stays on the meta device.
    elsewhere = module._parameters[name].detach().as_subclass(_Elsewhere)  # type: ignore[union-attr]

    def read(module: nn.Module, _: Any) -> None:
        module.__dict__[name] = weight[:]

    def drop(module: nn.Module, *_: Any) -> None:
        module.__dict__[name] = elsewhere

    drop(module)
    module.register_forward_pre_hook(read)
    module.register_forward_hook(drop, always_call=True)


def _saved_dtype(config: PromptConditionedLoraGeneratorConfig, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next(tensor.dtype for name, tensor in stored.items() if name.startswith("decoder."))
