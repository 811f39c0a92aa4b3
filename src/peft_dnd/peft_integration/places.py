# SPDX-License-Identifier: Apache-2.0
"""The places of a pool: adapters in a model whose matrices are overwritten by those of one task after another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraModel
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..adapters.loading import MatrixSlot, attach_adapter, matrix_slots
from ..adapters.matching import base_model_of, match_modules, uncompiled
from ..errors import AdapterPoolError, BaseModelMismatchError, LayoutError


_PREFIX = "dnd_pool_"


class Places:
    """Adapters of one layout in a model, which stay where they are: only their numbers, and which is in use, change.

    Args:
        model: The base model, or a `PeftModel`.
        layout: The adapters' layout.
        size: How many.
        max_rank: Up to which rank other adapters are to fit in as well; `None`: just the layout's.

    Attributes:
        model: The `PeftModel`.
        layout: The layout.
        max_rank: As given.
        names: The adapters' names in the model.

    Raises:
        AdapterPoolError: If the layout has modules that cannot be made ready for other ranks.
        BaseModelMismatchError: If the layout does not fit, or the model is none in which PEFT switches row by row.
        LayoutError: If the model has places already.
    """

    def __init__(self, model: nn.Module, layout: AdapterLayout, size: int, max_rank: int | None) -> None:
        _check_model(model, layout, max_rank)
        # None is part of another: PEFT's hot-swap takes an adapter whose name contains the swapped one's for the same.
        self.names = tuple(f"{_PREFIX}{number:0{len(str(size))}}" for number in range(size))
        self.layout = layout
        self.max_rank = max_rank
        was_training = base_model_of(model).training
        wrapped, _ = attach_adapter(model, self.names[0], layout)
        self.model = cast(PeftModel, wrapped)
        for name in self.names[1:]:
            self.model.add_adapter(name, copy.deepcopy(self.model.peft_config[self.names[0]]))
        if max_rank is not None:
            prepare_model_for_compiled_hotswap(self.model, target_rank=max_rank)
        self.model.set_adapter(self.names[0], inference_mode=True)
        self.model.train(was_training)  # PEFT's wrapper begins in training mode, where it refuses names for each row
        self._slots = {name: self._find_slots(name) for name in self.names}
        self._plain = False
        self._depth = 0

    @property
    def _tuner(self) -> LoraModel:
        return cast(LoraModel, self.model.base_model)

    @property
    def active(self) -> str | None:
        """The adapter in use; `None` within a context that has disabled all."""
        return None if self._plain else self.model.active_adapter

    def difference(self, layout: AdapterLayout) -> str | None:
        """In what the places' layout and another differ so that no adapter of the other goes into them, in words."""
        if self.max_rank is None:
            return self.layout.difference(layout)
        if layout.max_rank > self.max_rank:
            return f"max_rank is {self.max_rank} in the first, and a rank is {layout.max_rank} in the second"
        return _at_rank_one(self.layout).difference(_at_rank_one(layout))

    def write(self, name: str, adapter: GeneratedAdapter) -> None:
        """Copy an adapter's matrices into a place.

        Args:
            name: The place.
            adapter: The adapter, of a layout from which `difference` is `None`.

        Raises:
            LayoutError: If someone has merged the place's adapter, or taken it out of the model.
        """
        slots = self._slots[name]
        if not all(slot.is_current for slot in slots):  # PEFT has put other parameters there
            slots = self._slots[name] = self._find_slots(name)
        if any(name in slot.layer.merged_adapters for slot in slots):
            raise LayoutError(
                "An adapter of the pool is merged into the base weights, so that no other can take its place. Call "
                "pool.model.unmerge_adapter() first."
            )
        adapter.write_into(slots)

    @contextmanager
    def switched(self, name: str | None) -> Iterator[None]:
        """Within this context the model uses an adapter; with `None`, none."""
        before, outermost = self.active, not self._depth
        self._depth += 1
        try:
            self._switch(name)
            yield
        finally:
            self._depth -= 1
            # Switching goes through the whole model: after the last context it is left as it is, unless disabled.
            if not outermost or name is None:
                self._switch(before)

    def _switch(self, name: str | None) -> None:
        if name is None:
            self._tuner.disable_adapter_layers()
        elif self._plain:
            self._tuner.enable_adapter_layers()
        if name is not None and (self._plain or self.model.active_adapter != name):
            self.model.set_adapter(name, inference_mode=True)
        self._plain = name is None

    def _find_slots(self, name: str) -> list[MatrixSlot]:
        return matrix_slots(self.model, name, self.layout, match_modules(self.model, self.layout))


def _check_model(model: nn.Module, layout: AdapterLayout, max_rank: int | None) -> None:
    found = None
    if not isinstance(model, nn.Module):
        found = f"got {model!r}"
    elif uncompiled(model) is not model:
        found = "this one is compiled already. Make the pool first, and compile pool.model"
    elif isinstance(model, PeftMixedModel) or (
        getattr(model, "peft_config", None) and not isinstance(model, PeftModel)
    ):
        found = f"this {type(model).__name__} has adapters of its own. Load the base model anew"
    elif max_rank is not None and isinstance(model, PeftModel):
        found = "with max_rank it must have no adapters yet, for theirs would be padded too. Give it the base model"
    if found is not None:
        raise BaseModelMismatchError(f"A pool needs a base model, or a PeftModel: {found}.")
    for name in getattr(model, "peft_config", None) or {}:
        if name.startswith(_PREFIX):
            raise LayoutError(
                f"The model has the places of another pool ({name!r} and others). Use that pool, or free them with "
                "model.delete_adapter first."
            )
    for module in layout.modules:
        if max_rank is not None and (module.kind != "linear" or len(module.shape_a) != 2):
            raise AdapterPoolError(
                f"An AdapterPool with max_rank={max_rank} is for linear layers alone, which PEFT can make ready for "
                f"other ranks; {module.name!r} is none. Leave max_rank out."
            )


def _at_rank_one(layout: AdapterLayout) -> AdapterLayout:
    modules = (
        replace(module, shape_a=(1, *module.shape_a[1:]), shape_b=(module.shape_b[0], 1, *module.shape_b[2:]), alpha=1)
        for module in layout.modules
    )
    return replace(layout, modules=tuple(modules), use_rslora=False)
