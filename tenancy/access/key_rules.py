"""What narrows a key: the models it may ask for, the networks it may come from, the service tiers it may name. No rule
is no restriction.

A network is checked against the address of the connection itself, never against a header that a client can write.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

RULE_ITEMS_MAX: Final = 64
TIERS: Final = ("priority", "default", "flex", "batch")  # the best first
UNNAMED_TIERS: Final = TIERS[1:]  # what a request may get that names none
MODEL_PATTERN: Final = re.compile(r"[!-~]{1,200}")  # printable ASCII without spaces: they separate the stored list


class KeyRuleError(ValueError):
    """A rule cannot be read, or there are too many; the message shows it."""


@dataclass(frozen=True, slots=True)
class KeyRules:
    """Empty means any. Networks are kept in canonical text, such as 10.0.0.0/8; a bare address is a network of one."""

    models: frozenset[str] = frozenset()
    networks: tuple[str, ...] = ()
    tiers: frozenset[str] = frozenset()

    def allows_tier(self, tier: str) -> bool:
        return not self.tiers or tier in self.tiers

    def tier_for(self, asked: str | None) -> str | None:
        """The tier of a request; for none, or `auto`, the best that the key allows at `default` or below it. None
        where there is no such tier."""
        wanted = UNNAMED_TIERS if asked in (None, "auto") else (asked,)
        return next((tier for tier in wanted if tier is not None and self.allows_tier(tier)), None)

    def allows_model(self, model: str) -> bool:
        return not self.models or model in self.models

    def allows_peer(self, peer: str | None) -> bool:
        """`peer` is the connection's address; one that is unknown or unreadable is outside every network."""
        if not self.networks:
            return True
        try:
            address = ip_address(peer or "")
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # a dual-stack socket shows 10.0.0.1 as ::ffff:10.0.0.1
        return any(address in _network(network) for network in self.networks)


UNRESTRICTED: Final = KeyRules()


def read_rules(models: Iterable[str] = (), networks: Iterable[str] = (), tiers: Iterable[str] = ()) -> KeyRules:
    """Rules as a person writes them. Raises KeyRuleError."""
    ranks = frozenset(tiers)
    if not ranks <= set(TIERS):
        raise KeyRuleError(f"a service tier is one of {', '.join(TIERS)}: {sorted(ranks - set(TIERS))[0][:200]!r}")
    wanted, places = frozenset(models), tuple(sorted({str(_network(text)) for text in networks}))
    for model in wanted:
        if not MODEL_PATTERN.fullmatch(model):
            raise KeyRuleError(f"not a model id: {model[:200]!r}")
    if max(len(wanted), len(places)) > RULE_ITEMS_MAX:
        raise KeyRuleError(f"a key has at most {RULE_ITEMS_MAX} models and {RULE_ITEMS_MAX} networks")
    return KeyRules(wanted, places, ranks)


def stored(items: Iterable[str]) -> str | None:
    """A column's text: sorted, separated by one space; None where there is no rule."""
    return " ".join(sorted(items)) or None


def loaded(models: str | None, networks: str | None, tiers: str | None = None) -> KeyRules:
    """The rules of a row. A column that is not None always restricts: an empty text would allow nothing."""
    return KeyRules(
        frozenset() if models is None else frozenset(models.split(" ")),
        () if networks is None else tuple(networks.split(" ")),
        frozenset() if tiers is None else frozenset(tiers.split(" ")),
    )


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text, strict=True)
    except ValueError as error:
        raise KeyRuleError(f"not a network in CIDR form, such as 10.0.0.0/8: {text[:200]!r}") from error
