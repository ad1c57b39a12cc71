"""What an empty database gets at first start: a price, two demo tenants with a key each, and an admin operator.

Secrets are returned once, to be shown once; only their hashes are stored. Everything is one transaction, so that a
first start that is interrupted is a first start again.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.entry import Entry
from audit.outbox import append
from tenancy.directory import create_organisation, create_project, create_tenant, list_tenants, set_limits
from tenancy.keys import mint_key
from tenancy.ledger import grant_credit, open_accounts
from tenancy.operators import create_operator
from tenancy.prices import add_price

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
