"""What an empty database gets at first start: a price, two demo tenants with a key each, and an admin operator.

Secrets are returned once, to be shown once; only their hashes are stored. Everything is one transaction, so that a
first start that is interrupted is a first start again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.clerk import Clerk
from tenancy.access.directory import list_tenants
from tenancy.pricing.prices import BATCH_PERCENT, FLEX_PERCENT, PRIORITY_PERCENT

NANO_USD = 10**9
DEMO_TENANTS = ("acme", "globex")
DEMO_CREDIT_NANO_USD = 5 * NANO_USD
DEMO_REQUESTS_PER_MINUTE = 600
DEMO_TOKENS_PER_MINUTE = 200_000
DEMO_CONCURRENCY_MAX = 16
# pico-USD per token is USD per million tokens times 10**6
DEMO_INPUT_PICO_USD = 150_000
DEMO_CACHED_INPUT_PICO_USD = 75_000
DEMO_OUTPUT_PICO_USD = 600_000
DEMO_REQUEST_NANO_USD = 0
OPERATOR_NAME = "admin"


@dataclass(frozen=True, slots=True)
class FirstRun:
    """Shown once, never stored."""

    tenant_keys: dict[str, str]  # tenant name -> API key
    operator_name: str
    operator_password: str


async def first_run(
    conn: AsyncConnection, entropy: Callable[[int], bytes], now_ns: int, pepper: bytes, model: str
) -> FirstRun | None:
    """Fill an empty database; None (and nothing done) when there is a tenant already."""
    if await list_tenants(conn):
        return None
    clerk = Clerk(conn, entropy, now_ns)
    await clerk.add_price(
        model,
        input_pico_usd=DEMO_INPUT_PICO_USD,
        cached_input_pico_usd=DEMO_CACHED_INPUT_PICO_USD,
        output_pico_usd=DEMO_OUTPUT_PICO_USD,
        request_nano_usd=DEMO_REQUEST_NANO_USD,
        flex_percent=FLEX_PERCENT,
        batch_percent=BATCH_PERCENT,
        priority_percent=PRIORITY_PERCENT,
    )
    keys = {}
    for name in DEMO_TENANTS:
        tenant_id, project_id = await clerk.create_tenant(name, organisation=name)
        await clerk.set_limits(
            "tenant", tenant_id, DEMO_REQUESTS_PER_MINUTE, DEMO_TOKENS_PER_MINUTE, DEMO_CONCURRENCY_MAX
        )
        await clerk.grant_credit(tenant_id, DEMO_CREDIT_NANO_USD, memo="demo credit")
        keys[name] = (await clerk.create_key(tenant_id, project_id, "first key", pepper)).secret_text
    password = await clerk.create_operator(OPERATOR_NAME)
    return FirstRun(keys, OPERATOR_NAME, password)
