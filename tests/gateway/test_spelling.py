"""What tokens stand for in text: exact for byte-level vocabularies, and not trusted for others."""

from pathlib import Path

import tokenizers

from engine.text.tokenizer import Tokenizer
from gateway.spelling import spelling
from tests.strategies.tiny_model import SPECIAL_TOKENS, tiny_tokenizer


def wrapped(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(
        tokenizer,
        chat_template=None,
        special_tokens={},
        eos_token_ids=frozenset(),
        context_max=64,
        model_id="test",
    )


def test_a_byte_level_vocabulary_is_spelled() -> None:
    tokenizer = wrapped(tiny_tokenizer())
    spell = spelling(tokenizer)
    assert spell is not None
    assert [spell(token_id) for token_id in range(len(SPECIAL_TOKENS))] == [b""] * len(SPECIAL_TOKENS)
    token_ids = tokenizer.encode("façades, 🌲")
    assert b"".join(map(spell, token_ids)) == "façades, 🌲".encode()


def test_the_demo_model_is_spelled(model_dir: Path) -> None:
    assert spelling(Tokenizer.load(model_dir)) is not None


def test_a_vocabulary_of_words_is_not() -> None:
    words = {"[UNK]": 0} | {word: index for index, word in enumerate(["a", "##b", "c", "##d"], 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    assert spelling(wrapped(tokenizer)) is None
