"""Does B's answer depend on what A says at the same time? The same question alone, beside the one load, beside the
other; both loads have the same number of words and arrive in the same way. Greedy, with log probabilities where the
server tells them, compared to the last digit.
"""

import threading
from collections.abc import Callable
from typing import Any

from audit.probes.probe_verdict import Company, Seen, seen_in_company
from gateway.probe.client import Client, OutOfTimeError, ProbeError
from gateway.probe.words import Entropy, fresh_text

TOKENS = 24
NUM_ALONE = 2
LOAD_WORDS = 60
TOP_LOGPROBS = 3


def questions_in_company(
    a: Client,
    b: Client,
    entropy: Entropy,
    *,
    num_questions: int,
    num_each: int,
    step: Callable[[], None] = lambda: None,
) -> Seen:
    """Each question ``num_each`` times under each load. Raises what the clients raise."""
    told: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    if b.chat("Hi", max_tokens=1, **told).status != 200:
        told = {}
    questions = []
    for _ in range(num_questions):
        text = f"Write a sentence about {fresh_text(3, entropy)}."

        def answer(text: str = text) -> str:
            reply = b.said(text, max_tokens=TOKENS, seed=7, **told)
            step()
            return reply.text + "\0" + reply.numbers

        alone = tuple(answer() for _ in range(NUM_ALONE))
        beside = []
        for load in (fresh_text(LOAD_WORDS, entropy), fresh_text(LOAD_WORDS, entropy)):
            with Load(a, load):
                beside.append(tuple(answer() for _ in range(num_each)))
        questions.append(Company(alone, beside[0], beside[1]))
    return seen_in_company(questions)


class Load:
    """A asks the same thing again and again, in a thread of its own, until the end of the block."""

    def __init__(self, a: Client, text: str) -> None:
        self._a, self._text = a, text
        self._over = threading.Event()
        self._failure: ProbeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        number = 0
        try:
            while not self._over.is_set():
                self._a.said(f"{number:06} {self._text}", max_tokens=TOKENS)
                number += 1
        except OutOfTimeError:
            return  # the asker notices by itself
        except ProbeError as error:
            self._failure = error
