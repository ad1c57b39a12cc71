"""Text in pieces is the text as a whole, and a stop string never shows."""

from hypothesis import given
from hypothesis import strategies as st

from engine.text.detokenizer import IncrementalDetokenizer, held_length
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


@given(TEXTS, st.lists(st.text(alphabet="ab é🌲", min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 9))
def test_stop_strings_count_after_the_first_tokens_only(text: str, stop: list[str], min_tokens: int) -> None:
    token_ids = TOKENIZER.encode(text).ids
    for include_stop in (False, True):
        detokenizer = IncrementalDetokenizer(decode, stop, min_tokens=min_tokens, include_stop=include_stop)
        emitted = before = ""
        for index, token_id in enumerate(token_ids):
            emitted += detokenizer.push(token_id)
            assert not detokenizer.stopped or index >= min_tokens
            if index < min_tokens:
                before = emitted
            if detokenizer.stopped:
                break
        emitted += detokenizer.finish()
        after = text[len(before) :]
        found = [(after.index(string), string) for string in stop if string in after]
        assert detokenizer.stopped == bool(found)
        assert text.startswith(emitted)
        if not found:
            assert emitted == text
        elif include_stop:
            assert any(emitted.endswith(string) for _, string in found)
        else:
            assert any(text[len(emitted) :].startswith(string) for _, string in found)


@given(TOKEN_IDS, st.lists(st.text(alphabet="ab é🌲", min_size=1, max_size=4), max_size=3), st.booleans())
def test_a_token_is_out_when_its_text_is(token_ids: list[int], stop: list[str], include_stop: bool) -> None:
    detokenizer = IncrementalDetokenizer(decode, stop, include_stop=include_stop)
    emitted, begins = "", []
    for token_id in token_ids:
        emitted += detokenizer.push(token_id)
        begins.append(detokenizer.begin)
        num_out = detokenizer.num_tokens_out
        if detokenizer.stopped:
            break
        assert all(begin <= len(emitted) for begin in begins[:num_out])
        assert num_out == len(begins) or len(emitted) <= detokenizer.num_chars
        if len(emitted) == detokenizer.num_chars and "\ufffd" not in decode(token_ids[: len(begins)])[-3:]:
            assert num_out == len(begins), "nothing waits when all text is out"
    emitted += detokenizer.finish()
    num_out = detokenizer.num_tokens_out
    assert begins == sorted(begins)
    if not detokenizer.stopped:
        assert num_out == len(token_ids)
    else:
        assert all(begin < len(emitted) for begin in begins[:num_out])
        assert all(begin >= len(emitted) for begin in begins[num_out:])


@given(TOKEN_IDS)
def test_a_whole_tokens_text_is_where_it_begins(token_ids: list[int]) -> None:
    detokenizer, text = IncrementalDetokenizer(decode), decode(token_ids)
    for token_id in token_ids:
        detokenizer.push(token_id)
        own = decode([token_id])
        assert "\ufffd" in own or text[detokenizer.begin :].startswith(own)


def test_a_character_of_many_tokens_comes_with_its_last() -> None:
    token_ids = TOKENIZER.encode("🌍").ids
    assert len(token_ids) > 1
    detokenizer = IncrementalDetokenizer(decode)
    for token_id in token_ids[:-1]:
        assert (detokenizer.push(token_id), detokenizer.num_tokens_out) == ("", 0)
    assert (detokenizer.push(token_ids[-1]), detokenizer.num_tokens_out) == ("🌍", len(token_ids))
