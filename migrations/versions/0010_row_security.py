"""Row-level security on PostgreSQL: in a transaction that is bound to a tenant, others' rows are not there.

Enabling it is a change of the catalogue: no row is looked at.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TENANT = "current_setting('bulkhead.tenant', true)"
BOUND = f"coalesce({TENANT}, '')"
RULES = {
    "tenant": f"id = {TENANT}",
    "project": f"tenant_id = {TENANT}",
    "account": f"tenant_id = {TENANT}",
    "budget": f"tenant_id = {TENANT}",
    "ledger_transaction": f"tenant_id = {TENANT}",
    "credit": f"tenant_id = {TENANT}",
    "hold": f"tenant_id = {TENANT}",
    "usage_record": f"tenant_id = {TENANT}",
    "idempotency_key": f"tenant_id = {TENANT}",
    "webhook_endpoint": f"tenant_id = {TENANT}",
    "api_key": "EXISTS (SELECT 1 FROM project p WHERE p.id = project_id)",
    "ledger_entry": f"starts_with(account_id, {TENANT} || ':')",
    "budget_use": "EXISTS (SELECT 1 FROM budget b WHERE b.id = budget_id)",
    "credit_use": "EXISTS (SELECT 1 FROM credit c WHERE c.id = credit_id)",
    "webhook_delivery": "EXISTS (SELECT 1 FROM webhook_endpoint e WHERE e.id = endpoint_id)",
    "outbox": f"tenant_id IN ('', {BOUND})",
    "log_opening": f"tenant_id IN ('', {BOUND})",
}


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, rule in RULES.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY {table}_of_tenant ON {table} USING ({BOUND} = '' OR {rule})")


def downgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for table in RULES:
        op.execute(f"DROP POLICY {table}_of_tenant ON {table}")
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
