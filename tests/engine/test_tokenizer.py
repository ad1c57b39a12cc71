"""Chat templates, special tokens and what the HTTP process may import."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError, TokenizerError
from engine.models.convert import split_digits, undo_permutation
from engine.text.tokenizer import Tokenizer

TORCH_FREE = ["client", "config", "text.detokenizer", "errors", "events", "journal", "protocol", "text.tokenizer"]


def test_a_conversation_ends_where_the_answer_begins(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé 🌲"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé 🌲<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(messages) == text
    token_ids = tokenizer.encode_chat(messages)
    assert token_ids.count(1) == 3
    assert tokenizer.decode(token_ids) == "system\nBe brief.\nuser\nHé 🌲\nassistant\n"
    assert (tokenizer.eos_token_ids, tokenizer.context_max, tokenizer.model_id) == (frozenset({2}), 4096, "tiny")


CONTROL = {1, 2}  # <|im_start|> and <|im_end|> of the tiny model


@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "@0:", "@1:0@", "@", "system", "\n", "é "])
    )
)
def test_nobody_speaks_as_the_system_by_spelling_it(tiny_model_dir: Path, pieces: list[str]) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    content = "".join(pieces)
    messages = [{"role": "user", "content": content}]
    token_ids = tokenizer.encode_chat(messages)
    assert [t for t in token_ids if t in CONTROL] == [1, 2, 1]
    assert messages == [{"role": "user", "content": content}]
    frame = tokenizer.render_chat([{"role": "user", "content": "@"}]).split("@")
    assert tokenizer.render_chat(messages) == content.join(frame)
    assert b"".join(tokenizer.token_bytes(t) for t in token_ids).decode() == content.join(frame)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ raise_exception('no system role') }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_a_template_that_misbehaves_is_refused_and_changes_nothing(
    template: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(TokenizerError, match="the chat template refused"):
        Tokenizer.load(folder).encode_chat(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_a_model_without_a_template_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.load(tmp_path / "model").encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_and_damaged_files_are_named(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    with pytest.raises(ConfigError, match=name):
        Tokenizer.load(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(ConfigError, match=name):
        Tokenizer.load(tmp_path / "model")


def test_what_the_http_process_imports_brings_no_torch() -> None:
    imports = ", ".join(f"engine.{name}" for name in TORCH_FREE)
    code = f"import sys, {imports}; print([m for m in ('torch', 'transformers', 'kernels') if m in sys.modules])"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


def test_smollm_splits_every_digit(model_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    assert len(tokenizer.encode("2024")) == 4
    assert tokenizer.encode("a  7") == [*tokenizer.encode("a"), *tokenizer.encode("  "), *tokenizer.encode("7")]
    other = {"pre_tokenizer": {"type": "ByteLevel"}}
    split_digits(other, "default")
    assert other == {"pre_tokenizer": {"type": "ByteLevel"}}


def test_the_demo_models_template(model_dir: Path) -> None:
    tokenizer = Tokenizer.load(model_dir)
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert json.loads((model_dir / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_permuting_rows_as_llama_cpp_does_is_undone() -> None:
    import numpy as np

    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)  # two heads of eight rows
    permuted = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)  # convert_hf_to_gguf.py, LlamaModel.permute
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(undo_permutation(permuted, 2), weight)


@pytest.mark.parametrize("text", ["The cat", "naïve 🌲 café", "a\n\tb  c", "<|im_end|>"])
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(tiny_model_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_bytes_of_a_sentencepiece_tokenizer(tiny_model_dir: Path) -> None:
    vocab = {"<0xF0>": 0, "\u2581cat": 1, "s": 2}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    raw.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    tokenizer = Tokenizer(
        raw, chat_template=None, special_tokens={}, eos_token_ids=frozenset(), context_max=9, model_id="m"
    )
    assert [tokenizer.token_bytes(token_id) for token_id in range(4)] == [b"\xf0", b" cat", b"s", b""]
