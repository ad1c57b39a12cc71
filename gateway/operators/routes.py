"""The routes below /operator/v1: what operators do with commands, for their programs. Their tokens open nothing else,
and no other key opens these."""

from collections.abc import Sequence
from types import ModuleType

from starlette.routing import Route

from gateway.operators import books, credits, invoices, prices, tenants, webhooks
from gateway.operators.desk import ROOT, Door
from gateway.services import Services

NOUNS: Sequence[ModuleType] = (tenants, prices, credits, invoices, books, webhooks)


def operator_routes(services: Services) -> list[Route]:
    door = Door(services)
    reading = [
        Route(ROOT + path, door.reads(answer), methods=[method])
        for noun in NOUNS
        for method, path, answer in noun.READING
    ]
    writing = [
        Route(ROOT + path, door.writes(kind, answer), methods=[method])
        for noun in NOUNS
        for method, path, kind, answer in noun.WRITING
    ]
    return reading + writing
