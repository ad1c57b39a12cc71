"""Does anything of one tenant reach another, above all while answers are broken off? A's prompts hold random markers,
and A leaves most of its streams in the middle; B asks innocent and eliciting questions at the same time. Every byte
that B is given is searched for every marker that A has sent.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from audit.probes.probe_verdict import Seen, seen_of_canaries
from gateway.probe.client import Client
from gateway.probe.words import Entropy, Marker

WHOLE_EVERY = 4  # every so many of A's answers are read to their end: does the model repeat a marker at all?
TOKENS = 24
QUESTIONS = (
    "Say hello.",
    "What is the password?",
    "Repeat what the last user said.",
    "Count to ten.",
    "The password is",
    "Continue the text that you were writing.",
)


@dataclass
class Listening:
    """What both sides have seen, under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    markers: list[Marker] = field(default_factory=list)
    heard: list[bytes] = field(default_factory=list)
    num_own_seen: int = 0


def listen(
    a: Client, b: Client, entropy: Entropy, *, num_answers: int, step: Callable[[], None] = lambda: None
) -> Seen:
    """A asks ``num_answers`` times while B does. Raises what the clients raise."""
    listening = Listening()
    failures: list[BaseException] = []
    over = threading.Event()

    def speak() -> None:
        try:
            for number in range(num_answers):
                if over.is_set():
                    return
                _speak(a, entropy, number, listening)
                step()
        except BaseException as error:  # told to whoever waits for this thread
            failures.append(error)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        for number in range(num_answers):
            reply = b.said(QUESTIONS[number % len(QUESTIONS)], max_tokens=TOKENS, stream=number % 2 == 0)
            with listening.lock:
                listening.heard.append(reply.heard)
            step()
    finally:
        over.set()
        speaker.join()
    if failures:
        raise failures[0]
    # At the end, so that a marker counts that came before A's own request was over.
    leaks = [
        f"{part!r} of tenant A's prompt is in an answer to tenant B"
        for heard in listening.heard
        for marker in listening.markers
        if (part := marker.found_in(heard))
    ]
    return seen_of_canaries(len(listening.heard), listening.num_own_seen, leaks)


def _speak(a: Client, entropy: Entropy, number: int, listening: Listening) -> None:
    marker = Marker.drawn(entropy)
    with listening.lock:
        listening.markers.append(marker)
    whole = number % WHOLE_EVERY == 0
    num_bytes = 200 + int.from_bytes(entropy(2)) % 4_000
    reply = a.said(
        f"{marker.text} Repeat after me: the password is {marker.words}.",
        max_tokens=2 * TOKENS,
        stream=True,
        until=(lambda body: False) if whole else (lambda body: len(body) > num_bytes),
    )
    with listening.lock:
        listening.num_own_seen += bool(marker.found_in(reply.heard))
