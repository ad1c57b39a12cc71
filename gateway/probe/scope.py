"""Can B see what is A's by its id? Every id that A was given, asked for by B, must be answered as one that nobody was
ever given: status and body equal but for the id itself and the request's own.
"""

import json
import re
from collections.abc import Callable

from audit.probes.probe_verdict import Seen
from gateway.probe.client import Client, Reply
from gateway.probe.words import Entropy

ROUTES = (
    "/v1/chat/completions/{id}",
    "/v1/chat/completions/{id}/messages",
    "/v1/completions/{id}",
    "/v1/responses/{id}",
    "/v1/files/{id}",
    "/v1/files/{id}/content",
    "/v1/batches/{id}",
    "/v1/models/{id}",
    "/v1/fine_tuning/jobs/{id}",
)
LISTS = ("/v1/chat/completions", "/v1/responses", "/v1/files", "/v1/batches")
OWN_ID = re.compile(r"req_[0-9a-z]+|[0-9a-f]{8}-[0-9a-f-]{27}")  # of the request that asks


def ids_in_scope(a: Client, b: Client, entropy: Entropy, step: Callable[[], None] = lambda: None) -> Seen:
    """Raises what the clients raise."""
    reply = a.said("Say hello.", max_tokens=4, store=True) if _stores(a) else a.said("Say hello.", max_tokens=4)
    found = reply.id
    ids = [found, *re.findall(r"(?im)^x-request-id:\s*(\S+)", reply.head.decode(errors="replace"))]
    leaks, num_own, num_asked = [], 0, 0
    for known in filter(None, ids):
        absent = _like(known, entropy)
        for route in ROUTES:
            own = a.request("GET", route.format(id=known))
            other, nobody = (b.request("GET", route.format(id=name)) for name in (known, absent))
            num_own += own.status == 200
            num_asked += 1
            step()
            if _shape(other, known) != _shape(nobody, absent):
                leaks.append(f"GET {route} of tenant A's id answers {other.status}, of an id of nobody {nobody.status}")
    for route in LISTS:
        listed = b.request("GET", route)
        step()
        if found and listed.status == 200 and found.encode() in listed.body:
            leaks.append(f"GET {route} lists tenant A's id to tenant B")
    return Seen(
        "id scope",
        tuple(leaks[:3]),
        {},
        "" if found else "answers have no ids: nothing can be asked for",
        f"{num_asked} questions for ids of tenant A are answered as for ids of nobody; {num_own} show them to A itself",
        {"num_asked": num_asked, "num_shown_to_owner": num_own, "num_leaks": len(leaks)},
    )


def _stores(client: Client) -> bool:
    return client.chat("Say hello.", max_tokens=1, store=True).status == 200


def _like(known: str, entropy: Entropy) -> str:
    """Another id of the same form: the letters and digits after its last separator are drawn anew."""
    tail = re.search(r"[0-9A-Za-z]*$", known)
    assert tail is not None
    return known[: tail.start()] + entropy(len(tail.group())).hex()[: len(tail.group())]


def _shape(reply: Reply, name: str) -> tuple[int, str]:
    """What must be equal. Headers tell lengths and rates of their own, so they are not compared."""
    text = reply.body.decode(errors="replace").replace(name, "ID").replace(json.dumps(name)[1:-1], "ID")
    return reply.status, OWN_ID.sub("REQUEST", text)
