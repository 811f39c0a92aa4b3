# SPDX-License-Identifier: Apache-2.0
"""A pool gives each task its own adapter, whoever else uses the model, and a compiled model stays compiled."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from support.constants import TASK_PROMPTS
from support.live_models import TOKENS, assert_untouched, logits, snapshot
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedTokenizerFast

from peft_dnd.adapters.generated_adapter import GeneratedAdapter
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.loading import MatrixSlot
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.errors import AdapterPoolError, BaseModelMismatchError, LayoutError, OutOfDistributionError, PromptError
from peft_dnd.generator.modeling import PromptConditionedLoraGenerator
from peft_dnd.peft_integration.pool import AdapterPool
from peft_dnd.text.hidden_states_encoder import HiddenStatesTextEncoder


FreshBase = Callable[[], nn.Module]
MakePool = Callable[..., AdapterPool]
NAMES = tuple(TASK_PROMPTS)


@pytest.fixture(scope="module")
def right(generator: PromptConditionedLoraGenerator, base_model: nn.Module) -> dict[str | None, torch.Tensor]:
    """The logits of each task's adapter as it is put into a model of its own; and of the base, under `None`."""

    adapters = generator.generate_adapters(TASK_PROMPTS)
    alone = {task: adapter.load_into(copy.deepcopy(base_model)) for task, adapter in adapters.items()}
    return {**{task: logits(model) for task, model in alone.items()}, None: logits(base_model)}


@pytest.fixture
def make_pool(generator: PromptConditionedLoraGenerator, fresh_base: FreshBase) -> MakePool:
    """Makes pools of all four tasks, with two of them in the model unless told otherwise."""

    def make(size: int = 2, **options: Any) -> AdapterPool:
        pool = AdapterPool(fresh_base(), generator, size=size, **options)
        for task, prompts in TASK_PROMPTS.items():
            pool.add(task, prompts)
        return pool

    return make


def given(pool: AdapterPool, task: str | None) -> torch.Tensor:
    with pool.use(task) as model:
        return logits(model)


def row_by_row(pool: AdapterPool, tasks: list[str | None]) -> torch.Tensor:
    """The logits of the first of the fixed rows of tokens, once with each task's adapter."""
    with pool.for_rows(tasks) as names, torch.no_grad():
        return pool.model(input_ids=TOKENS[:1].repeat(len(tasks), 1), adapter_names=names).logits


def test_the_one_used_longest_ago_makes_room(make_pool: MakePool, right: dict[str | None, torch.Tensor]) -> None:
    pool = make_pool()
    for task in ("law", "med", "law", "geo", "law", "med", "art"):
        assert torch.equal(given(pool, task), right[task]), task
    assert pool.resident == ("med", "art")
    assert pool.counts == {"hits": 2, "swaps": 5, "generated": 5}
    assert pool.size == 2 and pool.tasks == NAMES and "geo" in pool and "history" not in pool
    assert not any(parameter.requires_grad for parameter in pool.model.parameters())


def test_rows_of_one_batch_have_their_own_adapters(make_pool: MakePool, right: dict[str | None, torch.Tensor]) -> None:
    pool = make_pool(3)
    tasks: list[str | None] = ["law", "geo", None, "law", "med"]
    found = row_by_row(pool, tasks)
    for row, task in zip(found, tasks, strict=True):
        assert torch.allclose(row, right[task][0], atol=1e-6), task
    assert len({tuple(row.flatten().tolist()) for row in found}) == 4, "the adapters differ"


def test_generating_text_row_by_row_gives_what_each_adapter_gives_alone(make_pool: MakePool) -> None:
    pool = make_pool(3)
    tasks: list[str | None] = ["law", "geo", None, "med"]
    prompt = TOKENS[:1]
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        kept = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **options}
        alone = []
        for task in tasks:
            with pool.use(task) as model:
                alone.append(model.generate(input_ids=prompt, **kept)[0])
        with pool.for_rows(tasks) as names:
            together = pool.model.generate(input_ids=prompt.repeat(4, 1), adapter_names=names, **kept)
        assert torch.equal(together, torch.stack(alone))


def test_blocks_within_blocks_leave_the_outer_ones_as_they_were(
    make_pool: MakePool, right: dict[str | None, torch.Tensor]
) -> None:
    pool = make_pool()
    with pool.use("law") as model:
        assert torch.equal(given(pool, "med"), right["med"])
        assert torch.equal(logits(model), right["law"])
        assert torch.equal(given(pool, None), right[None])
        assert torch.equal(logits(model), right["law"])
        assert torch.allclose(row_by_row(pool, ["law", None])[1], right[None][0], atol=1e-6)
    with pool.use(None) as model:
        assert torch.equal(given(pool, "geo"), right["geo"])
        assert torch.allclose(row_by_row(pool, ["geo"])[0], right["geo"][0], atol=1e-6)
        assert torch.equal(logits(model), right[None])
    assert torch.equal(given(pool, "geo"), right["geo"])
    assert not any(parameter.requires_grad for parameter in pool.model.parameters())


def test_what_an_outer_block_uses_is_not_put_out(make_pool: MakePool, right: dict[str | None, torch.Tensor]) -> None:
    pool = make_pool()
    with pool.use("law") as model:
        for task in ("med", "geo", "art"):
            assert torch.equal(given(pool, task), right[task])
        pool.remove("law")
        assert torch.equal(given(pool, "med"), right["med"])
        assert torch.equal(logits(model), right["law"])
        with (
            pytest.raises(AdapterPoolError, match=r"holds 2 adapters at once, and blocks .* use 3"),
            pool.for_rows(["med", "geo"]),
        ):
            pass
        assert torch.equal(logits(model), right["law"])
    assert torch.equal(given(pool, "med"), right["med"])


def test_a_task_added_anew_or_removed_is_not_served_from_before(
    make_pool: MakePool, right: dict[str | None, torch.Tensor]
) -> None:
    pool = make_pool(kept=4)
    given(pool, "law")
    pool.add("law", TASK_PROMPTS["geo"])
    assert torch.equal(given(pool, "law"), right["geo"])
    pool.remove("law")
    assert "law" not in pool.tasks and pool.resident == ()
    with pytest.raises(AdapterPoolError, match="no task 'law'; it has 3"):
        given(pool, "law")


def test_what_is_kept_in_memory_comes_back_without_generating(
    make_pool: MakePool, right: dict[str | None, torch.Tensor]
) -> None:
    pool = make_pool(1, kept=3)
    for task in ("law", "med", "geo", "law", "med", "geo"):
        assert torch.equal(given(pool, task), right[task])
    assert pool.counts == {"hits": 0, "swaps": 6, "generated": 3}
    given(pool, "art")  # law's turn to go
    given(pool, "med")
    assert pool.counts["generated"] == 4
    given(pool, "law")
    assert pool.counts["generated"] == 5


def test_threads_get_their_own_task_each_time(make_pool: MakePool, right: dict[str | None, torch.Tensor]) -> None:
    pool = make_pool(2, kept=1)

    def ask(number: int) -> bool:
        tasks: list[str | None] = [NAMES[number % 4], NAMES[(number // 2 + 1) % 4]]
        if number % 3:
            return torch.equal(given(pool, tasks[0]), right[tasks[0]])
        rows = row_by_row(pool, tasks)
        return all(torch.allclose(row, right[task][0], atol=1e-6) for row, task in zip(rows, tasks, strict=True))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(80)))


def test_a_task_that_several_threads_miss_at_once_is_generated_once(
    make_pool: MakePool, generator: PromptConditionedLoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(1)
    begun, go_on = threading.Event(), threading.Event()
    plain = type(generator).generate_adapter

    def slowly(self: Any, *args: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return plain(self, *args, **options)

    given(pool, "med")
    with monkeypatch.context() as patched, ThreadPoolExecutor(3) as threads:
        patched.setattr(type(generator), "generate_adapter", slowly)
        waiting = [threads.submit(given, pool, "law") for _ in range(3)]
        assert begun.wait(10)
        assert pool.resident == ("med",)
        given(pool, "med")  # the model is free for others while an adapter is made
        go_on.set()
        assert all(torch.equal(future.result(10), waiting[0].result(10)) for future in waiting)
    gc.collect()  # in the model by now, and nobody holds the adapter: who waited until then need not make it again
    assert pool._adapter_of(pool._tasks["law"]) is None
    assert pool.counts["generated"] == 2


def test_blocks_of_asyncio_tasks_do_not_mix(make_pool: MakePool, right: dict[str | None, torch.Tensor]) -> None:
    pool = make_pool()

    async def wait_within(task: str) -> torch.Tensor:
        with pool.use(task) as model:
            await asyncio.sleep(0.01)
            return logits(model)

    async def both(ways: Any) -> list[Any]:
        return await asyncio.gather(*ways, return_exceptions=True)

    first, second = asyncio.run(both(map(wait_within, ("law", "med"))))
    assert torch.equal(first, right["law"])
    assert isinstance(second, AdapterPoolError) and "asyncio.to_thread" in str(second)
    found = asyncio.run(both(asyncio.to_thread(given, pool, task) for task in NAMES))
    assert all(torch.equal(each, right[task]) for each, task in zip(found, NAMES, strict=True))


def test_an_interrupted_swap_leaves_nobody_with_half_an_adapter(
    make_pool: MakePool, right: dict[str | None, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(1)
    given(pool, "law")
    plain, written = MatrixSlot.write, []

    def stop(self: MatrixSlot, value: torch.Tensor) -> None:
        plain(self, value)
        written.append(self.key)
        if len(written) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MatrixSlot, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            given(pool, "med")
    assert pool.resident == ()
    assert torch.equal(given(pool, "law"), right["law"])
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(given, pool, "med").result(10), right["med"])


def test_a_generator_that_reads_with_the_very_base_is_not_mistaken(
    layout: AdapterLayout, fresh_base: FreshBase, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    from peft_dnd.generator.configuration import PromptConditionedLoraGeneratorConfig

    base: Any = fresh_base()
    encoder = HiddenStatesTextEncoder(base, word_tokenizer, layer=1, name_or_path="base")
    settings = {"decoder_type": "hyper_convolution", "decoder_config": {"kernel_size": 3, "zero_init_output": False}}
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout, encoder, num_prompts=4, max_prompt_length=16, **settings
    )
    torch.manual_seed(0)
    generator = PromptConditionedLoraGenerator(config, encoder).eval()
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.zeros(shape), torch.full((shape[0],), 0.1))
    adapters = generator.generate_adapters(TASK_PROMPTS)
    alone = {task: logits(adapter.load_into(fresh_base())) for task, adapter in adapters.items()}
    pool = AdapterPool(base, generator, size=1)
    for task, prompts in TASK_PROMPTS.items():
        pool.add(task, prompts)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: given(pool, NAMES[number % 4]), range(40)))
    assert all(torch.equal(logits, alone[NAMES[number % 4]]) for number, logits in enumerate(found))


def lora_of(base: nn.Module, rank: int, alpha: int, seed: int) -> tuple[GeneratedAdapter, torch.Tensor]:
    """A random LoRA of another rank on the same modules, and what the base gives with it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config)
    return GeneratedAdapter(AdapterLayout.from_model(model), live_state_dict(model, "default")), logits(model)


def test_adapters_of_other_ranks_fit_where_there_is_room(
    make_pool: MakePool, fresh_base: FreshBase, right: dict[str | None, torch.Tensor]
) -> None:
    pool = make_pool(2, max_rank=5)
    for name, rank, alpha in (("small", 1, 3), ("large", 5, 1)):
        adapter, expected = lora_of(fresh_base(), rank, alpha, seed=rank)
        pool.add_adapter(name, adapter)
        right = {**right, name: expected}
    for task in ("large", "law", "small", "large", "small", "med"):
        assert torch.allclose(given(pool, task), right[task], atol=1e-6), task
    rows = row_by_row(pool, ["small", "med"])
    assert torch.allclose(rows[0], right["small"][0], atol=1e-6)
    with pytest.raises(LayoutError, match="max_rank is 5 in the first, and a rank is 6 in the second"):
        pool.add_adapter("larger", lora_of(fresh_base(), 6, 6, seed=0)[0])
    with pytest.raises(LayoutError, match="or with max_rank if only ranks and alphas differ"):
        make_pool().add_adapter("small", adapter)


@pytest.fixture
def compiling() -> Iterator[CompileCounter]:
    """Counts what is compiled, with dynamo's own counter; code runs as PyTorch's Python would run it."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def test_swapping_into_a_compiled_model_compiles_nothing_anew(
    make_pool: MakePool, right: dict[str | None, torch.Tensor], compiling: CompileCounter
) -> None:
    pool = make_pool(1, kept=4)
    pool.model.compile(backend=compiling)
    for task in NAMES * 3:
        assert torch.allclose(given(pool, task), right[task], atol=1e-6), task
    assert compiling.frame_count == 1
    assert pool.counts["swaps"] == 12


def compile_a_layer(pool: AdapterPool, backend: CompileCounter) -> None:
    """Enough to see what makes code stale, in a fourth of the time that the whole model takes."""
    pool.model.get_base_model().model.layers[0].compile(backend=backend)


def test_other_ranks_and_scalings_compile_nothing_anew(
    make_pool: MakePool, fresh_base: FreshBase, right: dict[str | None, torch.Tensor], compiling: CompileCounter
) -> None:
    pool = make_pool(1, max_rank=5, kept=4)
    adapter, expected = lora_of(fresh_base(), 2, 3, seed=1)
    pool.add_adapter("other", adapter)
    compile_a_layer(pool, compiling)
    for task in ("law", "other", "med", "other"):
        assert torch.allclose(given(pool, task), {**right, "other": expected}[task], atol=1e-6), task
    assert compiling.frame_count == 1


def test_in_a_compiled_model_each_place_is_compiled_once(
    make_pool: MakePool, right: dict[str | None, torch.Tensor], compiling: CompileCounter
) -> None:
    pool = make_pool(2)
    compile_a_layer(pool, compiling)
    for task in NAMES * 3:
        assert torch.allclose(given(pool, task), right[task], atol=1e-6), task
    assert compiling.frame_count == 2
    assert torch.equal(given(pool, None), right[None])
    assert compiling.frame_count == 3, "the base alone is other code"


@pytest.mark.slow
def test_swapping_into_code_that_inductor_made(make_pool: MakePool, right: dict[str | None, torch.Tensor]) -> None:
    torch._dynamo.reset()
    pool = make_pool(1)
    pool.model.compile()
    assert torch.allclose(given(pool, "law"), right["law"], atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for task in NAMES:
            assert torch.allclose(given(pool, task), right[task], atol=1e-5)


def test_parameters_that_peft_has_exchanged_are_found_again(
    make_pool: MakePool, right: dict[str | None, torch.Tensor]
) -> None:
    pool = make_pool(1)
    given(pool, "law")
    prepare_model_for_compiled_hotswap(pool.model, target_rank=7)
    assert torch.allclose(given(pool, "med"), right["med"], atol=1e-6)
    pool.model.merge_adapter()
    with pytest.raises(LayoutError, match="unmerge_adapter"):
        given(pool, "law")
    pool.model.unmerge_adapter()
    assert torch.allclose(given(pool, "law"), right["law"], atol=1e-5)


def test_a_model_with_an_adapter_of_its_own_keeps_it(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, right: dict[str | None, torch.Tensor]
) -> None:
    model = get_peft_model(fresh_base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    own = logits(model)
    pool = AdapterPool(model, generator, size=1)
    pool.add("law", TASK_PROMPTS["law"])
    assert pool.model is model
    assert torch.equal(given(pool, "law"), right["law"])
    model.set_adapter("default")
    assert torch.equal(logits(model), own)
    assert torch.equal(given(pool, "law"), right["law"])
    with pytest.raises(LayoutError, match="places of another pool"):
        AdapterPool(model, generator)


def test_mistakes_are_named(
    make_pool: MakePool, generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, layout: AdapterLayout
) -> None:
    pool = make_pool()
    with pytest.raises(AdapterPoolError, match=r"no task 'lav'; it has 4\. Did you mean 'law'"):
        given(pool, "lav")
    with pytest.raises(AdapterPoolError, match="holds 2 adapters at once, and 3 are asked for: law, med, geo"):
        row_by_row(pool, ["law", "med", "law", "geo"])
    with pytest.raises(PromptError):
        pool.add("history", [])
    with pytest.raises(AdapterPoolError, match="a string that is not empty"):
        pool.add("", ["what ?"])
    with pytest.raises(AdapterPoolError, match="no generator"):
        AdapterPool(fresh_base(), layout=layout).add("law", ["what ?"])
    with pytest.raises(AdapterPoolError, match="needs a generator, or the layout"):
        AdapterPool(fresh_base())
    for wrong in ({"size": 0}, {"size": 1.5}, {"kept": -1}, {"max_rank": 2}):
        (name,) = wrong
        with pytest.raises(AdapterPoolError, match=f"'?s? {name} must be a whole number, at least"):
            AdapterPool(fresh_base(), generator, **wrong)  # type: ignore[arg-type]
    assert pool.counts["generated"] == 0 and len(pool.tasks) == 4


def test_prompts_that_do_not_belong_are_refused_where_that_is_asked(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase
) -> None:

    generator = copy.copy(generator)
    generator.fit_out_of_distribution(TASK_PROMPTS)
    pool = AdapterPool(fresh_base(), generator, out_of_distribution="refuse", threshold=0.0)
    pool.add("law", ["river river river"])
    with pytest.raises(OutOfDistributionError):
        given(pool, "law")


@pytest.mark.parametrize("way", ["compiled", "mixed", "native", "other", "nothing", "max_rank"])
def test_a_model_that_will_not_do_is_refused_untouched(
    way: str, generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, base_model: nn.Module
) -> None:
    model: Any = fresh_base()
    options: dict[str, Any] = {}
    plain = LoraConfig(target_modules=["q_proj"])
    if way == "compiled":
        model, message = torch.compile(model, backend="eager"), "compiled already. Make the pool first"
    elif way == "mixed":
        model, message = get_peft_model(model, plain, mixed=True), "has adapters of its own"
    elif way == "native":
        model.add_adapter(plain)
        message = "has adapters of its own"
    elif way == "nothing":
        model, message = "org/base", "got 'org/base'"
    elif way == "max_rank":
        model, message, options = get_peft_model(model, plain), "no adapters yet", {"max_rank": 8}
    else:
        config = copy.deepcopy(base_model.config)
        config.intermediate_size = 41
        model, message = type(base_model)(config), "a Linear from 41 to 24"
    before = None if way == "nothing" else snapshot(model)
    with pytest.raises(BaseModelMismatchError, match=message):
        AdapterPool(model, generator, **options)
    if before is not None:
        assert_untouched(model, before)
