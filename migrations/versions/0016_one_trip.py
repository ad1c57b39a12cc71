"""The functions that place and settle a hold in one statement, on PostgreSQL (tenancy/accounts/one_trip.py)."""

from alembic import op

from tenancy.accounts.one_trip import function_ddl

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

FUNCTIONS = ("place_hold_v1", "settle_hold_v1")


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for name in FUNCTIONS:
            op.get_bind().exec_driver_sql(function_ddl(name))


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for name in FUNCTIONS:
            op.execute(f"DROP FUNCTION {name}")
