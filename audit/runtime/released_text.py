"""Whether text that leaves is what its own sequence's tokens spell.

The auditor knows what bytes each token of the vocabulary stands for, and it knows the tokens that a sequence's own rows
sampled. Text may come later than its token (half a character waits for its rest, and what may become a stop text does)
but never earlier, never in another order, and never from another's tokens.
"""

REPLACEMENT = "\ufffd"  # stands for bytes that are no character
CHARACTER_BYTES_MAX = 4


def say(unsaid: bytearray, text: str, *, first: bool = False) -> bool:
    """Whether ``text`` is the beginning of what ``unsaid`` spells; takes it away from there.

    ``first``: it is the beginning of the answer, where some vocabularies leave out a space.
    """
    num_bytes = _num_said(unsaid, text)
    if num_bytes < 0 and first and unsaid[:1] == b" ":
        num_bytes = 1 + _num_said(unsaid[1:], text)
    del unsaid[: max(0, num_bytes)]
    return num_bytes > 0 or not text


def _num_said(unsaid: bytearray, text: str) -> int:
    """How many bytes at the beginning are this text; -1 where they are another."""
    data = text.encode(errors="replace")
    if unsaid.startswith(data):
        return len(data)
    if REPLACEMENT not in text:
        return -1
    at = 0
    for character in text:
        spelled = character.encode(errors="replace")
        if unsaid.startswith(spelled, at):
            at += len(spelled)
            continue
        num_broken = _num_broken(unsaid[at : at + CHARACTER_BYTES_MAX]) if character == REPLACEMENT else 0
        if not num_broken:
            return -1
        at += num_broken
    return at


def _num_broken(data: bytearray) -> int:
    """How many bytes at the beginning are one broken character (Unicode 16, 3.9: maximal subpart), 0 if it is whole."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.end if error.start == 0 else 0
    return 0
