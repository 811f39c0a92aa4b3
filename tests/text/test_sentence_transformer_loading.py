# SPDX-License-Identifier: Apache-2.0
"""Text encoders saved, loaded, damaged, missing, without token states; and prompts that they cannot take."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.encoding import PROMPTS, bytes_of
from tokenizers import Tokenizer

from peft_dnd.errors import GeneratorConfigError, PromptError, PromptTypeError, TextEncoderError
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


class TestSavingAndLoading:
    def test_saved_and_loaded_is_equal(self, encoder, tmp_path):
        encoder.module.max_seq_length = 9
        encoder.save_pretrained(tmp_path / "saved")
        loaded = SentenceTransformerTextEncoder.from_pretrained(tmp_path / "saved")
        assert loaded.max_length == 9
        assert loaded.name_or_path == str(tmp_path / "saved")
        assert bytes_of(loaded.encode_tokens(PROMPTS)) == bytes_of(encoder.encode_tokens(PROMPTS))
        assert torch.equal(loaded.encode_sentences(PROMPTS), encoder.encode_sentences(PROMPTS))
        assert not [*(tmp_path / "saved").rglob("*.bin"), *(tmp_path / "saved").rglob("*.pt")]
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]

    def test_plain_transformers_folder_is_pooled_by_the_mean(self, encoder, tmp_path):
        encoder.module.transformers_model.save_pretrained(tmp_path)
        encoder.module.tokenizer.save_pretrained(tmp_path)
        plain = SentenceTransformerTextEncoder.from_pretrained(tmp_path)
        torch.testing.assert_close(
            plain.encode_sentences(PROMPTS), encoder.encode_sentences(PROMPTS), rtol=0, atol=1e-5
        )

    def test_a_module_can_be_passed(self, encoder_folder, encoder):
        own = SentenceTransformerTextEncoder(SentenceTransformer(str(encoder_folder), device="cpu"))
        assert own.name_or_path == str(encoder_folder)
        assert own.commit_hash is None
        assert bytes_of(own.encode_tokens(PROMPTS)) == bytes_of(encoder.encode_tokens(PROMPTS))
        assert own.to("cpu").device == torch.device("cpu")

    @pytest.mark.parametrize("name", ["/no/such/folder", "./no_such", "~/no/such", "a/b/c"])
    def test_missing_folder(self, name):
        with pytest.raises(TextEncoderError, match=r"no such folder.*Pass the folder that") as caught:
            SentenceTransformerTextEncoder.from_pretrained(name)
        assert isinstance(caught.value, OSError)
        assert Path(name).name in str(caught.value)

    def test_path_object_is_never_a_hub_id(self):
        with pytest.raises(TextEncoderError, match="no such folder"):
            SentenceTransformerTextEncoder.from_pretrained(Path("org/name"))

    def test_empty_folder_and_file(self, tmp_path):
        with pytest.raises(TextEncoderError, match=r"neither modules\.json nor config\.json"):
            SentenceTransformerTextEncoder.from_pretrained(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(TextEncoderError, match="is a file, not a folder"):
            SentenceTransformerTextEncoder.from_pretrained(tmp_path / "file")

    @pytest.mark.parametrize("damage", ["cut weights", "no weights", "pickled weights", "cut config"])
    def test_damaged_folder(self, encoder_folder, tmp_path, damage):
        folder = Path(shutil.copytree(encoder_folder, tmp_path / "damaged"))
        weights = folder / "model.safetensors"
        if damage == "cut weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif damage == "no weights":
            weights.unlink()
        elif damage == "pickled weights":
            weights.rename(folder / "pytorch_model.bin")
        else:
            (folder / "config.json").write_text('{"model_type": "bert", ')
        with pytest.raises(TextEncoderError, match=r"incomplete or cut short.*The cause: ") as caught:
            SentenceTransformerTextEncoder.from_pretrained(folder)
        assert str(folder) in str(caught.value)
        assert caught.value.__cause__ is not None

    def test_hub_id_while_offline(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(TextEncoderError, match=r"'no-such-org/encoder' \(revision 'v1'\).*HF_HUB_OFFLINE is set"):
            SentenceTransformerTextEncoder.from_pretrained("no-such-org/encoder", revision="v1")

    def test_hub_id_with_local_files_only(self):
        with pytest.raises(
            TextEncoderError, match=r"local_files_only=True was given.*hf download no-such-org/encoder"
        ):
            SentenceTransformerTextEncoder.from_pretrained("no-such-org/encoder", local_files_only=True)

    def test_hub_id_that_does_not_exist(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise OSError("404 Client Error")

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("sentence_transformers.SentenceTransformer.__init__", refuse)
        with pytest.raises(TextEncoderError, match=r"Check the id, the revision .*token=.*The cause: OSError: 404"):
            SentenceTransformerTextEncoder.from_pretrained("no-such-org/encoder")


class TestLongPrompts:
    LONG = "law " * 50  # the model reads 32 tokens, of which 2 are special

    def test_are_cut_at_the_limit_with_one_warning(self, encoder, caplog):
        exactly_full = "law " * 30
        with caplog.at_level(logging.INFO, logger="peft_dnd"):
            states = encoder.encode_tokens(["law", self.LONG, exactly_full, self.LONG])
            encoder.encode_tokens([self.LONG])
            encoder.encode_tokens(["law", exactly_full])
        assert states.lengths.tolist() == [3, 32, 32, 32]
        assert [(record.levelname, record.getMessage()[:14]) for record in caplog.records] == [
            ("WARNING", "2 of 4 prompts"),
            ("INFO", "1 of 1 prompts"),
        ]
        assert "limit of 32 tokens" in caplog.text

    def test_limit_can_be_set(self, encoder_folder):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, max_length=5)
        assert encoder.max_length == 5
        assert encoder.encode_tokens([self.LONG]).lengths.tolist() == [5]
        beyond_its_usual = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, max_length=40)
        assert beyond_its_usual.encode_tokens([self.LONG]).lengths.tolist() == [40]

    @pytest.mark.parametrize("max_length", [0, 2, 41])
    def test_impossible_limit(self, encoder_folder, max_length):
        with pytest.raises(GeneratorConfigError, match=r"from 3 .* to 40 \(its position embeddings\), not"):
            SentenceTransformerTextEncoder.from_pretrained(encoder_folder, max_length=max_length)


class TestUnusableInput:
    @pytest.mark.parametrize("method", ["encode_tokens", "encode_sentences", "count_tokens"])
    @pytest.mark.parametrize(
        ("prompts", "error"),
        [("text", PromptTypeError), ([], PromptError), (["a", " "], PromptError), (["\ud800"], PromptError)],
    )
    def test_bad_prompts(self, encoder, method, prompts, error):
        with pytest.raises(error):
            getattr(encoder, method)(prompts)

    def test_prompt_without_a_token(self, encoder):
        encoder.module.tokenizer.backend_tokenizer.post_processor = None  # no [CLS] and [SEP] any more
        with pytest.raises(PromptError, match=r"prompts\[1\] \('\\u200b'\) has no token"):
            encoder.encode_tokens(["law", "\u200b"])

    def test_block_of_no_tokens(self, encoder_folder):
        with pytest.raises(GeneratorConfigError, match="block_tokens"):
            SentenceTransformerTextEncoder.from_pretrained(encoder_folder, block_tokens=0)

    def test_weights_that_are_no_numbers(self, encoder):
        module = copy.deepcopy(encoder.module)
        module.transformers_model.embeddings.word_embeddings.weight.data[
            module.tokenizer.convert_tokens_to_ids("tax")
        ] = torch.nan
        broken = SentenceTransformerTextEncoder(module)
        with pytest.raises(TextEncoderError, match=r"prompts\[1\] \('tax law'\) is not finite"):
            broken.encode_tokens(["law", "tax law"])

    def test_ten_thousand_prompts(self, encoder):
        prompts = [f"law {'river ' * (i % 6)}{'tax' if i % 7 else 'a'}" for i in range(10_000)]
        encoder.block_tokens = 4096
        states = encoder.encode_tokens(prompts)
        assert len(states) == 10_000
        assert torch.equal(states[9_999], encoder.encode_tokens(prompts[-1:])[0])


class TestWithoutTokenStates:
    @pytest.fixture
    def bag(self) -> SentenceTransformerTextEncoder:
        from sentence_transformers.sentence_transformer.modules import BoW

        return SentenceTransformerTextEncoder(SentenceTransformer(modules=[BoW(["law", "tax"])], device="cpu"))

    @pytest.fixture
    def static(self, encoder_folder: Path) -> SentenceTransformerTextEncoder:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        tokenizer = Tokenizer.from_file(str(encoder_folder / "tokenizer.json"))
        module = StaticEmbedding(tokenizer, embedding_dim=8)
        return SentenceTransformerTextEncoder(SentenceTransformer(modules=[module], device="cpu"))

    def test_bag_of_words_says_what_to_use(self, bag):
        assert bag.encode_sentences(["law tax law"]).tolist() == [[2.0, 1.0]]
        for attempt in (
            lambda: bag.encode_tokens(["law"]),
            lambda: bag.embedding_size,
            lambda: bag.count_tokens(["law"]),
        ):
            with pytest.raises(TextEncoderError, match=r"\(BoW\) gives one embedding a prompt and no token"):
                attempt()

    def test_static_embedding_gives_sentences(self, static):
        assert static.sentence_embedding_size == 8
        assert static.max_length is None
        assert static.name_or_path is None
        expected = static.module.encode(PROMPTS, convert_to_tensor=True)
        torch.testing.assert_close(static.encode_sentences(PROMPTS), expected)

    def test_static_embedding_has_no_limit_to_set(self, static):
        with pytest.raises(GeneratorConfigError, match="StaticEmbedding"):
            SentenceTransformerTextEncoder(static.module, max_length=8)

    def test_model_without_pooling(self, encoder_folder):
        module = SentenceTransformer(modules=[SentenceTransformer(str(encoder_folder), device="cpu")[0]], device="cpu")
        with pytest.raises(TextEncoderError, match=r"no sentence embedding.*ends in a pooling module"):
            SentenceTransformerTextEncoder(module)
