"""A log probability leaves with the text of its token: not before, and not at all where a stop text cut it away."""

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import SamplingParams, TokenLogprob
from engine.text.answer import Answer
from tests.engine.test_detokenizer import TEXTS, TOKEN_IDS, TOKENIZER, decode


@given(
    TOKEN_IDS | TEXTS.map(lambda text: TOKENIZER.encode(text).ids),
    st.lists(st.text(alphabet="ab é🌲", min_size=1, max_size=4), max_size=3),
    st.integers(0, 4),
)
def test_log_probabilities_leave_with_their_text(token_ids: list[int], stop: list[str], min_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=1, stop=tuple(stop), min_tokens=min_tokens, logprobs=0)
    answer, text, told = Answer(decode, sampling), "", list[TokenLogprob]()
    for place, token_id in enumerate(token_ids):
        piece = answer.push(token_id, TokenLogprob(token_id, -float(place)))
        text, before = text + piece.text, len(text)
        told += piece.logprobs
        for logprob in piece.logprobs:
            own = decode([logprob.token_id])
            if own and "\ufffd" not in own and not answer.stopped:
                assert text[logprob.offset :].startswith(own), "all of its text is out"
                assert logprob.offset + len(own) > before, "and the end of it only now"
        if answer.stopped:
            break
    piece = answer.finish()
    text, told = text + piece.text, told + list(piece.logprobs)
    assert [logprob.logprob for logprob in told] == [-float(place) for place in range(len(told))]
    if answer.stopped:
        assert all(logprob.offset < len(text) for logprob in told)
    else:
        assert len(told) == len(token_ids)


def test_a_possible_stop_text_holds_both_back() -> None:
    sampling = SamplingParams(max_tokens=9, stop=("ba!",), logprobs=0)
    a, b = TOKENIZER.encode("a").ids[0], TOKENIZER.encode("b").ids[0]
    answer = Answer(decode, sampling)
    held = answer.push(b, TokenLogprob(b, -1.0))
    assert (held.text, held.logprobs) == ("", ())
    assert answer.push(a, TokenLogprob(a, -2.0)).logprobs == ()
    out = answer.push(a, TokenLogprob(a, -3.0))
    assert (out.text, [logprob.offset for logprob in out.logprobs]) == ("baa", [0, 1, 2])
