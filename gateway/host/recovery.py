"""After a crash: settle what an earlier process left open, before anything new is served.

How each ends is overdue.py's rule. Only this gateway's holds, which name it: it is the only one on its data folder
(folders.only_server), so nobody is still working on them, and its journal is the one that counts them. What another
gateway left open is settled by that one when it is back, or by anybody once it is overdue (housekeeping.py).
"""

from dataclasses import dataclass

import structlog

from engine.journal import prune, read_journals
from gateway.host.folders import Folders
from gateway.host.overdue import settle_abandoned
from gateway.sequences import effort_by_request, usage_by_request
from gateway.services import Services
from tenancy.accounts.ledger import pending_holds

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    num_captured: int
    num_voided: int
    amount_nano_usd: int


async def recover(services: Services, folders: Folders, epoch: str) -> Recovered:
    """Settle this gateway's pending holds from the journals, then delete the journals of workers before `epoch`.

    One transaction per hold, so that a crash in here only leaves work for the next start. PostgreSQL may still be at
    what the earlier process asked for last, with a lock on the hold, long after that process has been killed: each
    hold's end is awaited, because the journals that count it are deleted after this. A hold that it had asked for and
    that is placed only after this was never asked of an engine: it expires.
    """
    records = read_journals(folders.journal)
    journals, efforts = usage_by_request(records), effort_by_request(records)
    async with services.database.read() as conn:
        pending = await pending_holds(conn)
    # Without a name: from before gateways had one, when there was only one.
    holds = [hold for hold in pending if hold.gateway_id in (None, services.gateway_id)]
    num_captured = num_voided = amount = 0
    for hold in holds:
        counted, effort = journals.get(hold.request_id), efforts.get(hold.request_id)
        async with services.database.transaction() as conn:
            charged = await settle_abandoned(conn, services, hold, counted, effort=effort, wait=True)
        amount += charged
        num_captured += charged > 0
        num_voided += charged == 0
    if holds:
        log.warning("recovered", num_captured=num_captured, num_voided=num_voided, amount_nano_usd=amount)
    prune(folders.journal, keep={epoch})
    return Recovered(num_captured, num_voided, amount)
