"""PostgreSQL's second wall: in a transaction that is bound to a tenant, the rows of all others are not there.

Every query names its tenant; this is for the day when one forgets. The hall binds the transactions of a request as soon
as it knows whose it is (gateway/database.py sets `bulkhead.tenant` for the transaction); those of operators, of the
housekeeping and of authentication, which find out whose something is, are not bound and see everything.

The rules hold for the tables' owner too (FORCE), but not for superusers and roles with BYPASSRLS. SQLite has nothing of
the kind: there the first wall stands alone.
"""

from typing import Final

from sqlalchemy import DDL, Table, event

from tenancy import tables, webhook_tables
from tenancy.invoicing import invoice_tables
from tenancy.pricing import price_tables
from tenancy.quotas import quota_tables
from tenancy.usage import engine_time as engine_time  # belongs to no tenant: here so that it is known with the rest

_TENANT: Final = "current_setting('bulkhead.tenant', true)"
UNBOUND: Final = f"coalesce({_TENANT}, '') = ''"

# table -> what a row must fulfil in a bound transaction. A row that belongs through its parent asks the parent, which
# has a rule of its own.
RULES: Final[dict[Table, str]] = {
    tables.tenant: f"id = {_TENANT}",
    **dict.fromkeys(
        (
            tables.project,
            tables.account,
            tables.budget,
            tables.ledger_transaction,
            tables.credit,
            tables.hold,
            tables.usage_record,
            tables.idempotency_key,
            quota_tables.failure_policy,
            webhook_tables.webhook_endpoint,
            price_tables.volume,
            invoice_tables.buyer,
            invoice_tables.invoice,
            invoice_tables.invoice_payment,
        ),
        f"tenant_id = {_TENANT}",
    ),
    tables.api_key: "EXISTS (SELECT 1 FROM project p WHERE p.id = project_id)",
    tables.ledger_entry: f"starts_with(account_id, {_TENANT} || ':')",
    tables.budget_use: "EXISTS (SELECT 1 FROM budget b WHERE b.id = budget_id)",
    tables.credit_use: "EXISTS (SELECT 1 FROM credit c WHERE c.id = credit_id)",
    webhook_tables.webhook_delivery: "EXISTS (SELECT 1 FROM webhook_endpoint e WHERE e.id = endpoint_id)",
    invoice_tables.invoice_document: "EXISTS (SELECT 1 FROM invoice i WHERE i.id = invoice_id)",
}


def row_security_ddl(table: Table) -> list[str]:
    """The statements that put a table behind the wall, to run one by one, on PostgreSQL only."""
    name = table.name
    return [
        f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {name} FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY {name}_of_tenant ON {name} USING ({UNBOUND} OR {RULES[table]})",
    ]


for _table in RULES:
    for _statement in row_security_ddl(_table):
        _ddl = DDL(_statement.replace("%", "%%"))  # type: ignore[no-untyped-call]  # it formats with %
        event.listen(_table, "after_create", _ddl.execute_if(dialect="postgresql"))
