"""The two moments of a hold, each in one statement on PostgreSQL: for the common case, which is nearly every request.

    place_hold     the price is the one in force and has no steps, credit and budgets cover the amount, no credit is due
                   to expire, tenant, key and epoch are as they were when the lease was granted
    settle_hold    the hold is pending, one credit covers the charge, no budget reaches a threshold
    both           the tenant is pre-paid, its accounts are in USD: four of them

Each looks, under the same locks in the same order as ledger.py, whether its case is the common one. Where it is not it
says so and has changed nothing: the general way then decides, with its errors. So nothing is decided here that is not
decided there; tests do the same to two databases, with and without, and compare every row.

The functions bind their transaction to the tenant (row_security.py) and run with the caller's rights. Their files are
never changed, only followed by others: a gateway of the version before may still call them.
"""

from dataclasses import astuple, dataclass
from importlib.resources import files
from typing import Final

from sqlalchemy import DDL, event

from tenancy.invoicing.periods import period_start_ns
from tenancy.tables import EFFORT, metadata
from tenancy.usage.meter import UsageRecord

FUNCTIONS: Final = ("place_hold_v1", "settle_hold_v1", "settle_hold_v2")


@dataclass(frozen=True, slots=True)
class Statement:
    """An expression that is true where it was done, and its arguments for $1, $2, ..."""

    text: str
    arguments: tuple[object, ...]


def place_hold(
    *,
    hold_id: str,
    tenant_id: str,
    project_id: str,
    key_id: str,
    request_id: str,
    gateway_id: str,
    epoch: str,
    price_id: str,
    model: str,
    tier: str,
    amount_nano_usd: int,
    num_tokens: int,
    now_ns: int,
    expires_ns: int,
) -> Statement:
    """`epoch`: of the lease; `model`, `tier`: as asked for; `price_id`: what is thought to be in force for them."""
    scopes = (tenant_id, project_id, key_id, request_id, hold_id, gateway_id, epoch)
    terms = (price_id, model, tier, amount_nano_usd, num_tokens, now_ns, expires_ns)
    return Statement(_PLACE, (*scopes, *terms, *_periods(now_ns)))


def settle_hold(hold_id: str, record: UsageRecord, *, num_tokens: int) -> Statement:
    """Capture what the record's request was charged, or void where it used nothing. `num_tokens` count against limits.

    Only for a record at a price without steps.
    """
    usage = record.usage
    counts = (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_completion_tokens)
    state = "captured" if any(counts) else "voided"
    scopes = (record.tenant_id, record.project_id, record.key_id, record.request_id, hold_id)
    ending = (state, record.amount_nano_usd, num_tokens, record.finished_ns, *_periods(record.started_ns))
    row = (record.model, record.price_id, record.tier, *counts, record.started_ns, record.finish_reason, record.stream)
    effort = astuple(record.effort) if record.effort is not None else (None,) * len(EFFORT)
    return Statement(_SETTLE, (*scopes, *ending, *row, *effort))


def function_ddl(name: str) -> str:
    return (files("tenancy.accounts") / "sql" / f"{name}.sql").read_text("utf-8")


def _periods(at_ns: int) -> tuple[int, int]:
    return period_start_ns("day", at_ns), period_start_ns("month", at_ns)


def _call(name: str, num_arguments: int) -> str:
    return f"{name}({', '.join(f'${number}' for number in range(1, num_arguments + 1))})"


_PLACE: Final = _call("place_hold_v1", 16)
_SETTLE: Final = _call("settle_hold_v2", 25)

for _name in FUNCTIONS:
    _ddl = DDL(function_ddl(_name).replace("%", "%%"))  # type: ignore[no-untyped-call]  # it formats with %
    event.listen(metadata, "after_create", _ddl.execute_if(dialect="postgresql"))
