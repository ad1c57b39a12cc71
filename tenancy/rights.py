"""What a server may do with rows that are there, on PostgreSQL: what it does, and nothing else.

Every table is read and added to. Beyond that an append-only one (tables.make_append_only) allows nothing, and of any
other, rows may be changed: all columns where CHANGED does not name some. Rows may be deleted where DELETED says so.

These are facts in `Table.info`; the hall makes grants of them (gateway/rights/grants.py). A table that is added later
is covered by what it is: append-only, or its rows change and stay.
"""

from typing import Final

from sqlalchemy import Table

from tenancy import tables, webhook_tables
from tenancy.access import token_tables
from tenancy.invoicing import invoice_tables
from tenancy.pricing import price_tables
from tenancy.quotas import quota_tables

# What is not named here is settled when the row is written: whose it is, in which currency, how much was held.
CHANGED: Final[dict[Table, tuple[str, ...]]] = {
    tables.tenant: ("status",),
    tables.api_key: ("expires_ns", "revoked_ns", "last_used_ns"),
    tables.operator: ("disabled_ns",),
    token_tables.operator_token: ("revoked_ns", "last_used_ns"),
    tables.account: ("balance_nano_usd",),
    tables.budget_use: ("used_nano_usd", "held_nano_usd", "alerted_percent"),
    tables.credit: ("amount_nano_usd", "left_nano_usd"),  # the amount of a credit line, which is its limit
    tables.hold: ("state", "captured_nano_usd", "settled_ns", "num_tokens"),
    invoice_tables.invoice: ("state", "issued_ns", "due_ns", "ended_ns", "end_note"),
    price_tables.price_draft: ("price_id", "ended_ns"),
    price_tables.volume: ("num_tokens",),
}

# Limits and budgets that no longer apply, answers and deliveries that nobody will ask for any more.
DELETED: Final = (
    tables.scope_limit,
    tables.budget,
    tables.budget_use,
    tables.idempotency_key,
    quota_tables.failure_policy,
    webhook_tables.webhook_delivery,
)

for _table, _columns in CHANGED.items():
    _table.info["changed"] = _columns
for _table in DELETED:
    _table.info["deleted"] = True
