"""Credit lines of post-paid tenants; one account of a kind for a tenant, so that its currency is one.

SQLite cannot change a constraint, so the credit table is copied there, with its index. Nobody has two accounts of a
kind: there was no way to open them.
"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _kinds("'promotional', 'paid', 'line'")
    op.create_index("ux_account_one_of_a_kind", "account", ["tenant_id", "kind"], unique=True)


def downgrade() -> None:
    """Fails where there are credit lines: what was drawn of them cannot be told any more."""
    op.drop_index("ux_account_one_of_a_kind", table_name="account")
    _kinds("'promotional', 'paid'")


def _kinds(kinds: str) -> None:
    with op.batch_alter_table("credit") as batch:
        batch.drop_constraint("ck_credit_kind", type_="check")
        batch.create_check_constraint("ck_credit_kind", f"kind IN ({kinds})")
