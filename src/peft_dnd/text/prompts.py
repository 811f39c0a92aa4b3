# SPDX-License-Identifier: Apache-2.0
"""Prompts: bringing them to strings, checking and hashing them, and choosing the N that a decoder reads.

How a pool of prompts becomes a condition:

    check_prompts -> text encoder -> TokenStates (once a pool, see `embedding_cache.PromptEmbeddingCache`)
                  -> select_prompts + TokenStates.select (anew at every step) -> states (N, L, C) and mask (N, L)
"""

from __future__ import annotations

import numbers
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import GeneratorConfigError, PromptError, PromptTypeError
from ..storage.digests import texts_digest
from .drawing import draw
from .prompt_shapes import PromptsLike, column_of, text_of


class ConditionText(str):
    """A text as a generator reads it: a prompt that holds its answer already, say.

    It is a plain string but for its type, by which a generator that reads answers tells it from a bare prompt; see
    [`condition_texts`][peft_dnd.text.prompts_and_answers.condition_texts].
    """

    __slots__ = ()


def check_prompts(prompts: PromptsLike, what: str = "prompts", *, are_answers: bool = False) -> tuple[str, ...]:
    """Bring prompts to strings and check them, as [`prompt_texts`] does without its options.

    Args:
        prompts: As there.
        what: What the error messages call them.
        are_answers: Whether they are answers rather than prompts: conversations may end with the assistant then.

    Returns:
        As there.

    Raises:
        PromptTypeError: As there.
        PromptError: As there.

    Example:
        >>> check_prompts(["which metal is liquid ?", "what floats ?"])
        ('which metal is liquid ?', 'what floats ?')
    """
    return _texts(column_of(prompts, None, what), what, partial(text_of, are_answers=are_answers))


def prompt_texts(
    prompts: PromptsLike, *, column: str | None = None, tokenizer: Any = None, what: str = "prompts"
) -> tuple[str, ...]:
    """Bring prompts in any of the shapes in which people have them to strings.

    Everything that takes prompts takes these shapes, by way of this function; call it yourself for a column of another
    name or for a chat template. A prompt may be

    - a string;
    - a conversation: a list of messages `{"role": ..., "content": ...}` that ends before the answer. Its text is that
      of its messages, joined by line breaks;
    - a row that has one of both under `column`, as those of TRL's prompt-only data sets have.

    Prompts are neither stripped, deduplicated, normalised nor limited in number or length.

    Args:
        prompts: A list or tuple of prompts; another one-dimensional ordered collection of them (a column of a data
            set, an array, a pandas Series); or a `datasets.Dataset` or pandas DataFrame with a column of them.
        column: The column's name; `None` is `"prompt"`.
        tokenizer: The base's tokenizer, to have each prompt in its chat template, up to where the answer begins; a
            string becomes the user's message. `None` takes the text alone. A generator should be given what it was
            fitted with.
        what: What the error messages call them.

    Returns:
        The prompts, in order, each a plain `str`, or a [`ConditionText`] if it was one.

    Raises:
        PromptTypeError: If `prompts` is no sequence (a bare string, a mapping, a set, a generator, `None`, ...), holds
            something that is no prompt, or lacks the column.
        PromptError: If there are none; one is empty, all white space, or cannot be encoded in UTF-8; or a conversation
            holds images, ends with an answer, or does not suit the chat template.

    Example:
        >>> prompt_texts([[{"role": "user", "content": "what floats ?"}]])
        ('what floats ?',)
        >>> prompt_texts([{"question": "which metal is liquid ?"}], column="question")
        ('which metal is liquid ?',)
    """
    render = None if tokenizer is None else partial(_in_chat_template, tokenizer, what)
    return _texts(column_of(prompts, column, what), what, partial(text_of, column=column, render=render))


def _texts(prompts: Any, what: str, read: Callable[[Any, str], Any]) -> tuple[str, ...]:
    _check_container(prompts, what)
    names = (f"{what}[{index}]" for index in range(len(prompts)))
    checked = tuple(_check_prompt(read(prompt, name), name) for prompt, name in zip(prompts, names, strict=True))
    if not checked:
        raise PromptError(
            f"{what} is empty: expected at least one string. Pass some prompts of the task, without answers; "
            'for instance ["What is the boiling point of water?", ...].'
        )
    return checked


def uses_chat_template(tokenizer: Any, asked: bool | None = None) -> bool:
    """Whether texts go into a tokenizer's chat template: as asked, or by default if it has one.

    Raises:
        GeneratorConfigError: If that is asked for, and it has none.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if asked and not has_template:
        raise GeneratorConfigError(
            f"apply_chat_template=True is asked for, and the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has "
            "no chat template. Leave it out, take the tokenizer of a chat model, or set tokenizer.chat_template."
        )
    return has_template if asked is None else asked


def _in_chat_template(tokenizer: Any, what: str, messages: list[dict[str, Any]]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes: for roles that it does not know, for one
        raise PromptError(
            f"{what} cannot be brought into the tokenizer's chat template ({error}). Use the tokenizer of a chat "
            "model and roles that it knows, or leave the tokenizer out: the texts are then read as they are."
        ) from error
    return text


def _check_container(prompts: Any, what: str) -> None:
    expected = f"{what} must be a list of strings"
    if isinstance(prompts, str):
        raise PromptTypeError(f"{expected}, not one string. Wrap it in a list: [{_shortened(prompts)}].")
    if isinstance(prompts, Mapping):
        raise PromptTypeError(
            f"{expected}, not a {type(prompts).__name__} of {len(prompts)} entries. Pass the prompts of one task at a "
            "time, for instance list(tasks['my_task'])."
        )
    # Order is part of what is encoded and of the provenance hash, so what has none (a set) or only one pass (a
    # generator) is refused. Arrays, Series and data set columns are no `Sequence`, but have what is needed.
    if isinstance(prompts, bytes | bytearray) or not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
        raise PromptTypeError(f"{expected}, not {type(prompts).__name__}. Make a list of it, in a fixed order.")
    if getattr(prompts, "ndim", 1) != 1:
        raise PromptTypeError(
            f"{expected}, not a {type(prompts).__name__} of {prompts.ndim} dimensions. Pass one column of it."
        )


def _check_prompt(prompt: Any, name: str) -> str:
    if not isinstance(prompt, str):
        mend = "Pass the text of each prompt, or for a chat a list of its messages."
        if isinstance(prompt, Mapping) and "role" in prompt:
            mend = "A chat message alone is no prompt: a list of messages is, [{'role': 'user', 'content': '...'}]."
        elif isinstance(prompt, Mapping):
            mend = (
                "Of rows, name the field that holds the prompts: peft_dnd.text.prompt_texts(rows, column='question')."
            )
        raise PromptTypeError(f"{name} must be a string, not {type(prompt).__name__} ({_shortened(prompt)}). {mend}")
    if not prompt.strip():
        raise PromptError(
            f"{name} is {'empty' if not prompt else 'only white space'} ({_shortened(prompt)}): it says nothing about "
            "the task. Leave it out: [prompt for prompt in prompts if prompt.strip()]."
        )
    text = str.__str__(prompt)  # subclasses of str (NumPy's, enumerations) may override their own __str__
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} holds a lone surrogate, {text[error.start]!a} at position {error.start}, which is no character "
            "and cannot be encoded in UTF-8. Read the file that it came from in its right encoding, or mend it with "
            "prompt.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error
    return prompt if isinstance(prompt, ConditionText) else text


def _shortened(value: Any, limit: int = 60) -> str:
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def prompts_digest(prompts: PromptsLike) -> str:
    """Hash prompts, for provenance and caching.

    The hash is SHA-256 over each prompt's length in bytes (8 bytes, little-endian) followed by its UTF-8. The lengths
    make it depend on where one prompt ends and the next begins; it depends on their order as well.

    Args:
        prompts: The prompts.

    Returns:
        64 hexadecimal digits.

    Raises:
        PromptTypeError: As in [`check_prompts`].
        PromptError: As in [`check_prompts`].

    Example:
        >>> prompts_digest(["a", "b"])[:16]
        'cf6ab613e3942391'
    """
    return texts_digest(check_prompts(prompts))


def select_prompts(pool_size: int, num_prompts: int, generator: torch.Generator | int) -> Tensor:
    """Choose which prompts of a pool fill the N places of a decoder that reads exactly N.

    - The pool holds more than N: a seeded draw without replacement, in the order drawn.
    - Exactly N: all of them in their own order, whatever the seed.
    - Fewer, n: each is used floor(N / n) times, and N mod n of them, a seeded draw without replacement, once more;
      then all N are shuffled.

    A seed gives the same choice on every platform and device and in every version of torch and Python.

    Args:
        pool_size: How many prompts there are, at least 1.
        num_prompts: N, how many are wanted, at least 1.
        generator: A seed, at least 0; or a `torch.Generator`, of which one number is drawn to be the seed.

    Returns:
        Indices into the pool, `int64` of shape `(num_prompts,)`, on the CPU.

    Raises:
        GeneratorConfigError: If a number is out of range.

    Example:
        >>> select_prompts(pool_size=100, num_prompts=4, generator=0).tolist()
        [84, 76, 43, 28]
        >>> select_prompts(pool_size=3, num_prompts=3, generator=0).tolist()
        [0, 1, 2]
        >>> sorted(select_prompts(pool_size=2, num_prompts=5, generator=0).tolist())
        [0, 0, 1, 1, 1]
    """
    for name, number in (("pool_size", pool_size), ("num_prompts", num_prompts)):
        if number < 1:
            raise GeneratorConfigError(f"{name} must be at least 1, not {number}.")
    chance = random.Random(_seed_of(generator))
    if pool_size == num_prompts:
        return torch.arange(num_prompts)
    if pool_size > num_prompts:
        return torch.tensor(draw(pool_size, num_prompts, chance))
    repeats, remainder = divmod(num_prompts, pool_size)
    chosen = list(range(pool_size)) * repeats + draw(pool_size, remainder, chance)
    return torch.tensor([chosen[place] for place in draw(num_prompts, num_prompts, chance)])


def draw_prompt_set(pool_size: int, num_prompts: int, generator: torch.Generator | int, smallest: int = 0) -> Tensor:
    """Choose which prompts of a pool a decoder that reads sets gets to read: at most N, and none twice.

    Args:
        pool_size: How many prompts there are, at least 1.
        num_prompts: N, the most that are wanted, at least 1.
        generator: As for [`select_prompts`].
        smallest: If at least 1, how many are drawn is a matter of chance too: any number from this one to N, or to
            the size of the pool, is as likely.

    Returns:
        Indices into the pool, `int64` of shape `(n,)`, on the CPU.

    Raises:
        GeneratorConfigError: If a number is out of range.

    Example:
        >>> draw_prompt_set(pool_size=3, num_prompts=8, generator=0).tolist()
        [0, 1, 2]
        >>> [len(draw_prompt_set(pool_size=100, num_prompts=8, generator=seed, smallest=1)) for seed in range(4)]
        [1, 3, 7, 8]
    """
    seed = _seed_of(generator)
    most = min(pool_size, num_prompts)
    if smallest >= 1:
        lowest = min(smallest, most)
        # Of another stream than the draw of the prompts themselves, which begins with the same seed.
        most = lowest + int(random.Random(f"number of prompts {seed}").random() * (most - lowest + 1))
    return select_prompts(pool_size, most, seed)


def _seed_of(generator: torch.Generator | int) -> int:
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if not isinstance(generator, numbers.Integral):
        raise GeneratorConfigError(f"A seed must be an integer, got {generator!r}.")
    if generator < 0:
        # Python's generator drops the sign, so that -1 would silently be 1.
        raise GeneratorConfigError(f"A seed must be at least 0, not {generator}.")
    return int(generator)
