"""Does the ledger add up? Recomputes everything from the entries, which nobody can change, and trusts no balance.

Checked: every transaction has at least two entries and sums to zero; every account's balance is the sum of its
entries; every tenant's held balance is the sum of its pending holds; every settled hold has one settling transaction
and every pending one has none; every credit has left its amount less its uses, and a tenant's credits have left what
its accounts `credit` and `held` have; every entry of a transaction is on its tenant's accounts, which have one
currency, and every hold's price is in it. Not checked: that the amounts are the right ones (that is usage against
prices).
"""

from dataclasses import dataclass

from sqlalchemy import Select, and_, case, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy import tables

FINDINGS_MAX = 1_000  # of each kind: enough to see a pattern, bounded in memory


@dataclass(frozen=True, slots=True)
class LedgerCheck:
    num_transactions: int
    num_entries: int
    unbalanced: list[str]  # transaction ids
    total_nano_usd: int  # sum of all entries: 0
    wrong_balances: list[str]  # account ids whose balance is not the sum of their entries
    wrong_held: list[str]  # tenant ids whose held balance is not the sum of their pending holds
    wrong_holds: list[str]  # hold ids whose state and settling transaction disagree
    wrong_credits: list[str]  # credit ids whose rest is not their amount less their uses
    wrong_money: list[str]  # tenant ids whose credits are not what the accounts have
    wrong_currency: list[str]  # ids of transactions with entries, and of holds with a price, in another currency

    @property
    def ok(self) -> bool:
        found = (self.unbalanced, self.wrong_balances, self.wrong_held, self.wrong_holds)
        more = (self.wrong_credits, self.wrong_money, self.wrong_currency)
        return not (self.total_nano_usd or any(found) or any(more))


async def check_ledger(conn: AsyncConnection) -> LedgerCheck:
    """Read-only; reads the whole ledger."""
    account, hold, entry, transaction = tables.account, tables.hold, tables.ledger_entry, tables.ledger_transaction
    amount = entry.c.amount_nano_usd

    unbalanced = (
        select(transaction.c.id)
        .outerjoin(entry, entry.c.transaction_id == transaction.c.id)
        .group_by(transaction.c.id)
        .having(or_(func.count(amount) < 2, func.sum(amount) != 0))
        .order_by(transaction.c.id)
    )
    wrong_balances = (
        select(account.c.id)
        .outerjoin(entry, entry.c.account_id == account.c.id)
        .group_by(account.c.id, account.c.balance_nano_usd)
        .having(func.coalesce(func.sum(amount), 0) != account.c.balance_nano_usd)
        .order_by(account.c.id)
    )
    wrong_held = (
        select(account.c.tenant_id)
        .outerjoin(hold, and_(hold.c.tenant_id == account.c.tenant_id, hold.c.state == "pending"))
        .where(account.c.kind == "held")
        .group_by(account.c.tenant_id, account.c.balance_nano_usd)
        .having(func.coalesce(func.sum(hold.c.amount_nano_usd), 0) != account.c.balance_nano_usd)
        .order_by(account.c.tenant_id)
    )
    num_settling = func.sum(case((transaction.c.kind != "hold", 1), else_=0))
    num_same_state = func.sum(case((transaction.c.kind == hold.c.state, 1), else_=0))
    num_due = case((hold.c.state == "pending", 0), else_=1)
    wrong_holds = (
        select(hold.c.id)
        .outerjoin(transaction, transaction.c.hold_id == hold.c.id)
        .group_by(hold.c.id, hold.c.state)
        .having(
            or_(
                func.count(transaction.c.id) != num_due + 1,
                func.coalesce(num_settling, 0) != num_due,
                func.coalesce(num_same_state, 0) != num_due,
            )
        )
        .order_by(hold.c.id)
    )

    credit, use = tables.credit, tables.credit_use
    wrong_credits = (
        select(credit.c.id)
        .outerjoin(use, use.c.credit_id == credit.c.id)
        .group_by(credit.c.id, credit.c.amount_nano_usd, credit.c.left_nano_usd)
        .having(credit.c.amount_nano_usd - func.coalesce(func.sum(use.c.amount_nano_usd), 0) != credit.c.left_nano_usd)
        .order_by(credit.c.id)
    )
    left = (
        select(credit.c.tenant_id, func.sum(credit.c.left_nano_usd).label("left_nano_usd"))
        .group_by(credit.c.tenant_id)
        .subquery()
    )
    wrong_money = (
        select(account.c.tenant_id)
        .outerjoin(left, left.c.tenant_id == account.c.tenant_id)
        .where(account.c.kind.in_(("credit", "held")))
        .group_by(account.c.tenant_id, left.c.left_nano_usd)
        .having(func.sum(account.c.balance_nano_usd) != func.coalesce(left.c.left_nano_usd, 0))
        .order_by(account.c.tenant_id)
    )

    first = account.alias("first")  # a tenant's account `credit`
    mixed = (
        select(transaction.c.id)
        .join(entry, entry.c.transaction_id == transaction.c.id)
        .join(account, account.c.id == entry.c.account_id)
        .join(first, first.c.tenant_id == transaction.c.tenant_id)
        .where(
            first.c.kind == "credit",
            or_(account.c.currency != first.c.currency, account.c.tenant_id != transaction.c.tenant_id),
        )
        .group_by(transaction.c.id)
        .order_by(transaction.c.id)
    )
    priced = (
        select(hold.c.id)
        .join(tables.price, tables.price.c.id == hold.c.price_id)
        .join(first, (first.c.tenant_id == hold.c.tenant_id) & (first.c.kind == "credit"))
        .where(tables.price.c.currency != first.c.currency)
        .order_by(hold.c.id)
    )

    async def ids(query: Select[tuple[str]]) -> list[str]:
        return list(await conn.scalars(query.limit(FINDINGS_MAX)))

    return LedgerCheck(
        num_transactions=await conn.scalar(select(func.count()).select_from(transaction)) or 0,
        num_entries=await conn.scalar(select(func.count()).select_from(entry)) or 0,
        unbalanced=await ids(unbalanced),
        total_nano_usd=int(await conn.scalar(select(func.coalesce(func.sum(amount), 0))) or 0),
        wrong_balances=await ids(wrong_balances),
        wrong_held=await ids(wrong_held),
        wrong_holds=await ids(wrong_holds),
        wrong_credits=await ids(wrong_credits),
        wrong_money=await ids(wrong_money),
        wrong_currency=[*await ids(mixed), *await ids(priced)],
    )
