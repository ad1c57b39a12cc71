"""Text in pieces is the text as a whole, and a stop string never shows."""

from hypothesis import given
from hypothesis import strategies as st

from engine.detokenizer import IncrementalDetokenizer, held_length
from tests.strategies.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCAB_SIZE = TOKENIZER.get_vocab_size()
BYTE_TOKENS = [i for i in range(VOCAB_SIZE) if TOKENIZER.decode([i]) == "\ufffd"]
TEXTS = st.text(alphabet=st.sampled_from("ab é€🌲中\ufffd\n"), max_size=40)
TOKEN_IDS = st.one_of(
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=80),
    st.lists(st.sampled_from([*BYTE_TOKENS, 0]), max_size=120),  # broken bytes, special tokens among them
    TEXTS.map(lambda text: TOKENIZER.encode(text).ids),
)


def decode(token_ids: object) -> str:
    return str(TOKENIZER.decode(list(token_ids), skip_special_tokens=True))  # type: ignore[call-overload]


def test_there_are_tokens_that_are_no_characters() -> None:
    assert len(BYTE_TOKENS) > 100


@given(TOKEN_IDS)
def test_pieces_add_up_to_the_whole(token_ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(decode)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.finish() == decode(token_ids)


@given(TEXTS.filter(lambda text: "\ufffd" not in text))
def test_no_piece_holds_half_a_character(text: str) -> None:
    detokenizer = IncrementalDetokenizer(decode)
    assert all("\ufffd" not in detokenizer.push(token_id) for token_id in TOKENIZER.encode(text).ids)


@given(TEXTS, st.lists(st.text(alphabet="ab é🌲", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_is_never_emitted(text: str, stop: list[str]) -> None:
    detokenizer = IncrementalDetokenizer(decode, stop)
    emitted = ""
    for token_id in TOKENIZER.encode(text).ids:
        emitted += detokenizer.push(token_id)
        assert not any(string in emitted for string in stop)
        if detokenizer.stopped:
            break
    emitted += detokenizer.finish()
    found = [text.index(string) for string in stop if string in text]
    assert detokenizer.stopped == bool(found)
    if found:
        assert text.startswith(emitted)
        assert not any(string in emitted for string in stop)
        assert any(text[len(emitted) :].startswith(string) for string in stop), (
            "cut before a stop string, not elsewhere"
        )
    else:
        assert emitted == text


def test_text_waits_only_while_it_could_still_become_a_stop_string() -> None:
    assert held_length("abc", ["cde"]) == 1
    assert held_length("abcd", ["cde"]) == 2
    assert held_length("abcx", ["cde"]) == 0
    assert held_length("aaa", ["aaab", "ab"]) == 3


def test_broken_bytes_without_end_keep_the_window_short() -> None:
    longest = 0

    def watched(token_ids: object) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))  # type: ignore[arg-type]
        return decode(token_ids)

    detokenizer = IncrementalDetokenizer(watched)
    for index in range(500):
        detokenizer.push(BYTE_TOKENS[index % len(BYTE_TOKENS)])
    assert longest < 50
