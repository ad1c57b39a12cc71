"""Text against tokens: whatever the real detokenizer says passes, and what others' tokens spell does not."""

from hypothesis import example, given
from hypothesis import strategies as st

from audit.runtime.released_text import say
from engine.text.detokenizer import IncrementalDetokenizer

TOKENS = st.lists(st.binary(min_size=0, max_size=4) | st.text(max_size=2).map(str.encode), max_size=12)


@given(TOKENS)
@example([b"\xe2\x82", b"\xac"])
@example([b"\xe2\x82", b"a"])
@example([b"\xf0\x9f", b"\xf0\x9f\x8c\xb2"])
@example([b"\xed\xa0\x80", b"\xff"])
@example(["\ufffd".encode(), b"\xff"])
def test_what_the_detokenizer_says_is_what_the_tokens_spell(spelled: list[bytes]) -> None:
    detokenizer = IncrementalDetokenizer(lambda ids: b"".join(spelled[i] for i in ids).decode(errors="replace"))
    unsaid = bytearray()
    for index, data in enumerate(spelled):
        unsaid += data
        assert say(unsaid, detokenizer.push(index))
    assert say(unsaid, detokenizer.finish())
    assert not unsaid


@given(TOKENS, st.text(min_size=1, max_size=3))
def test_other_text_is_noticed(spelled: list[bytes], text: str) -> None:
    unsaid = bytearray(b"".join(spelled))
    truth = bytes(unsaid).decode(errors="replace")
    data = text.encode(errors="replace")
    assert say(unsaid, text) == (truth.startswith(text) or b"".join(spelled).startswith(data))


def test_text_is_said_once_and_in_order() -> None:
    unsaid = bytearray(b"one two")
    assert say(unsaid, "one ")
    assert not say(bytearray(unsaid), "one ")
    assert say(unsaid, "two")
    assert not say(unsaid, "t")


def test_only_the_first_text_may_leave_out_its_space() -> None:
    assert say(bytearray(b" a"), "a", first=True)
    assert not say(bytearray(b" a"), "a")
    assert not say(bytearray(b"  a"), "a", first=True)
    assert not say(bytearray(b" a"), "b", first=True)
    assert say(bytearray(b" \xff"), " \ufffd", first=True), "nothing is left out where all of it is said"
