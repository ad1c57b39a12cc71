"""A small deterministic world for tenancy tests: entropy that counts, one organisation with tenants and keys."""

import hashlib
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.access.directory import create_organisation, create_project, create_tenant
from tenancy.access.keys import mint_key
from tenancy.ids import Entropy
from tenancy.pricing.price_book import add_price

T0 = 1_800_000_000_000_000_000  # ns
SECOND = 1_000_000_000
PEPPER = b"pepper" * 6


def counting_entropy(seed: str = "") -> Entropy:
    """Bytes that look random, never repeat and are the same in every run."""
    calls = 0

    def entropy(num_bytes: int) -> bytes:
        nonlocal calls
        calls += 1
        return hashlib.shake_256(f"{seed}/{calls}".encode()).digest(num_bytes)

    return entropy


@dataclass(frozen=True)
class Populated:
    organisation_id: str
    tenant_id: str
    project_id: str
    key_id: str
    secret_text: str
    price_id: str


async def populate(
    conn: AsyncConnection, tenant_name: str = "acme", *, organisation_id: str | None = None, entropy: Entropy
) -> Populated:
    """A tenant with a project, a key, accounts, and a price of the model "m" from T0 on."""
    if organisation_id is None:
        made = await create_organisation(conn, f"{tenant_name} group", entropy=entropy, now_ns=T0)
        organisation_id = made.organisation_id
    tenant = await create_tenant(conn, organisation_id, tenant_name, entropy=entropy, now_ns=T0)
    project = await create_project(conn, tenant.tenant_id, "default", entropy=entropy, now_ns=T0)
    key = await mint_key(conn, project.project_id, "first", ["inference"], pepper=PEPPER, entropy=entropy, now_ns=T0)
    price = await add_price(
        conn,
        model="m",
        input_pico_usd=150_000,
        cached_input_pico_usd=15_000,
        output_pico_usd=600_000,
        effective_from_ns=T0,
        entropy=entropy,
        now_ns=T0,
    )
    return Populated(organisation_id, tenant.tenant_id, project.project_id, key.key_id, key.secret_text, price.price_id)
