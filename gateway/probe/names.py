"""Do two tenants meet who choose the same names? Both send the same Idempotency-Key; the prefix arms are run once more
with every name equal that a client can give (cache_salt, user, prompt_cache_key; as many as the server takes).
"""

from typing import Any

from audit.probes.probe_verdict import Seen
from gateway.probe.client import Client
from gateway.probe.words import Entropy, fresh_text

NAMES: dict[str, Any] = {"cache_salt": "shared-by-chance", "user": "user-1", "prompt_cache_key": "shared-by-chance"}


def names_taken(client: Client) -> dict[str, Any]:
    """Those of NAMES that the server accepts."""
    return {
        name: value for name, value in NAMES.items() if client.chat("Hi", max_tokens=1, **{name: value}).status == 200
    }


def same_idempotency_key(a: Client, b: Client, entropy: Entropy) -> Seen:
    """A key for the same question of both, and one for two questions. Raises what the clients raise."""
    text = f"Write a sentence about {fresh_text(3, entropy)}."
    how: dict[str, Any] = {"max_tokens": 8, "temperature": 1}
    leaks = []
    num_honoured = 0
    for theirs in (text, f"{text} Make it short."):
        headers = {"Idempotency-Key": f"probe-{entropy(8).hex()}"}
        first = a.said(text, headers=headers, **how)
        again = a.said(text, headers=headers, **how)
        other = b.chat(theirs, headers=headers, **how)
        num_honoured += bool(first.id) and again.id == first.id
        if first.id and other.id == first.id:
            leaks.append("an Idempotency-Key of tenant A gave tenant B the answer of tenant A")
        elif other.status != 200:
            leaks.append(f"tenant A's Idempotency-Key shows to tenant B, who is answered {other.status}")
    return Seen(
        "idempotency key",
        tuple(leaks),
        {},
        "",
        "two tenants may use the same Idempotency-Key"
        if num_honoured
        else "two tenants may send the same Idempotency-Key, which this server does not use",
        {"num_honoured": num_honoured},
    )
