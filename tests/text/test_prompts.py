# SPDX-License-Identifier: Apache-2.0
"""Prompts: which are refused and how, their hash, and the choice of N of them."""

from __future__ import annotations

import enum
from collections import Counter

import numpy as np
import pytest
import torch

from peft_dnd.errors import GeneratorConfigError, PromptError, PromptTypeError
from peft_dnd.text.prompts import check_prompts, prompts_digest, select_prompts


class Word(str, enum.Enum):
    HELLO = "hello"


class TestCheckPrompts:
    @pytest.mark.parametrize(
        "prompts",
        [
            ["one"],
            ("one", "two", "one"),
            ["  kept as it is \n"],
            ["日本語のプロンプト", "Привет, как дела?", "مرحبا", "हिन्दी", "🤷🏽‍♀️ 👩‍👩‍👧", "a\u0301", "\u200b", "\x00"],
            ["long " * 100_000],
            [f"prompt {i}" for i in range(10_000)],
        ],
        ids=["one", "tuple and repeats", "white space", "scripts and emoji", "very long", "ten thousand"],
    )
    def test_what_is_usable_comes_back_unchanged(self, prompts):
        assert check_prompts(prompts) == tuple(prompts)

    def test_other_ordered_collections_of_strings(self):
        datasets = pytest.importorskip("datasets")
        column = datasets.Dataset.from_dict({"prompt": ["one", "two"]})["prompt"]
        assert check_prompts(column) == ("one", "two")
        array = check_prompts(np.array(["one", "two"]))
        assert array == ("one", "two")
        assert [type(prompt) for prompt in array] == [str, str]
        assert check_prompts([Word.HELLO]) == ("hello",)
        assert type(check_prompts([Word.HELLO])[0]) is str

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ("one string", r"not one string\. Wrap it in a list: \['one string'\]"),
            ({"law": ["a"], "med": ["b"]}, r"not a dict of 2 entries\. Pass the prompts of one task"),
            (b"bytes", "not bytes. Make a list of it"),
            ({"a", "b"}, "not set. Make a list of it, in a fixed order"),
            ((p for p in "ab"), "not generator. Make a list"),
            (None, "not NoneType"),
            (3, "not int"),
            (np.array([["a", "b"]]), "not a ndarray of 2 dimensions. Pass one column"),
            (["fine", 7], r"prompts\[1\] must be a string, not int \(7\)"),
            (["fine", None], r"prompts\[1\] must be a string, not NoneType"),
            ([{"role": "user", "content": "hi"}], r"prompts\[0\] must be a string, not dict .*'content'"),
            ([["nested"]], r"prompts\[0\] must be a string, not list"),
            ([b"bytes"], r"prompts\[0\] must be a string, not bytes"),
        ],
    )
    def test_wrong_kinds(self, prompts, message):
        with pytest.raises(PromptTypeError, match=message) as caught:
            check_prompts(prompts)
        assert isinstance(caught.value, TypeError)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([], "prompts is empty: expected at least one string"),
            ((), "prompts is empty"),
            (["fine", ""], r"prompts\[1\] is empty"),
            (["fine", "fine", " \t\n\u3000"], r"prompts\[2\] is only white space"),
            (["fine", "bad \ud83d"], r"prompts\[1\] holds a lone surrogate, '\\ud83d' at position 4"),
        ],
    )
    def test_unusable_text(self, prompts, message):
        with pytest.raises(PromptError, match=message) as caught:
            check_prompts(prompts)
        assert isinstance(caught.value, ValueError)

    def test_the_mend_for_surrogates_works(self):
        emoji_in_two_halves = "\ud83d\ude00 hi"
        with pytest.raises(PromptError, match="lone surrogate"):
            check_prompts([emoji_in_two_halves])
        mended = emoji_in_two_halves.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert check_prompts([mended]) == ("😀 hi",)

    def test_messages_are_ascii_short_and_named(self):
        with pytest.raises(PromptTypeError, match=r"the prompts of task 'law'\[0\]") as caught:
            check_prompts([["é" * 10_000]], what="the prompts of task 'law'")
        message = str(caught.value)
        assert message.isascii()
        assert len(message) < 300


class TestDigest:
    def test_is_that_of_length_prefixed_utf8(self):
        import hashlib

        data = b"\x03\0\0\0\0\0\0\0one" + b"\x02\0\0\0\0\0\0\0\xc3\xa9"
        assert prompts_digest(["one", "é"]) == hashlib.sha256(data).hexdigest()

    def test_tells_pools_apart(self):
        pools = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", "c"], ["ab", "c "], ["AB", "c"]]
        assert len({prompts_digest(pool) for pool in pools}) == len(pools)
        assert prompts_digest(("ab", "c")) == prompts_digest(["ab", "c"])

    def test_refuses_what_check_prompts_refuses(self):
        with pytest.raises(PromptError):
            prompts_digest(["\ud800"])


class TestSelectPrompts:
    def test_more_than_wanted_are_drawn_without_replacement(self):
        chosen = select_prompts(1000, 50, 3)
        assert chosen.shape == (50,)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == 50
        assert 0 <= min(chosen) <= max(chosen) < 1000

    @pytest.mark.parametrize("seed", [0, 1, 2**63])
    def test_as_many_as_wanted_keep_their_order(self, seed):
        assert select_prompts(7, 7, seed).tolist() == list(range(7))

    @pytest.mark.parametrize(("pool", "wanted"), [(1, 5), (2, 5), (3, 9), (5, 128), (127, 128)])
    def test_of_fewer_all_are_used_almost_equally_often(self, pool, wanted):
        times = Counter(select_prompts(pool, wanted, 0).tolist())
        assert sum(times.values()) == wanted
        assert set(times) == set(range(pool))
        assert sorted(set(times.values())) == sorted({wanted // pool, -(-wanted // pool)})

    def test_seed_decides(self):
        for pool in (3, 100):
            same = [select_prompts(pool, 8, 5).tolist() for _ in range(2)]
            assert same[0] == same[1]
            assert len({tuple(select_prompts(pool, 8, seed).tolist()) for seed in range(50)}) > 40

    def test_every_place_gets_every_prompt_equally_often(self):
        draws = torch.stack([select_prompts(5, 3, seed) for seed in range(4000)])
        for place in range(3):
            share = torch.bincount(draws[:, place], minlength=5) / 4000
            assert torch.allclose(share, torch.full((5,), 0.2), atol=0.03)
        fewer = torch.stack([select_prompts(2, 3, seed) for seed in range(4000)])
        assert (fewer.float().mean(dim=0) - 0.5).abs().max() < 0.03

    def test_choice_is_the_same_on_every_platform_and_version(self):
        # Written down once: a generator's adapters would change with it.
        assert select_prompts(10, 4, 0).tolist() == [8, 7, 5, 4]
        assert select_prompts(3, 8, 1).tolist() == [0, 2, 1, 2, 0, 2, 1, 0]

    def test_torch_generator_gives_one_seed(self):
        first, second = (torch.Generator().manual_seed(9) for _ in range(2))
        assert select_prompts(100, 5, first).tolist() == select_prompts(100, 5, second).tolist()
        assert select_prompts(100, 5, first).tolist() != select_prompts(100, 5, 9).tolist()
        select_prompts(4, 7, second)
        # Whatever the pool, one number was drawn each time, so that tasks do not disturb each other's chance.
        assert torch.equal(first.get_state(), second.get_state())

    @pytest.mark.parametrize(("pool", "wanted", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1), (-2, 3, 0)])
    def test_impossible_numbers(self, pool, wanted, seed):
        with pytest.raises(GeneratorConfigError, match="must be at least"):
            select_prompts(pool, wanted, seed)
