"""`python -m tests.faults.sharing_server serve`: the whole server with one planted fault. All tenants get one domain
and one salt in the engine, so they share each other's cached prefixes. The auditor, which knows domains only, cannot
see it: this is what the probes from outside are for.
"""

from typing import Any

from msgspec.structs import replace

import gateway.api.exchange
from engine.protocol import Submit
from gateway.cli import main

_submits_of = gateway.api.exchange.submits_of


def _submits_of_one_tenant(*args: Any, **kwargs: Any) -> list[Submit | None]:
    submits = _submits_of(*args, **kwargs)
    return [None if one is None else replace(one, domain="everybody", cache_salt=b"0" * 32) for one in submits]


if __name__ == "__main__":
    gateway.api.exchange.submits_of = _submits_of_one_tenant
    main()
