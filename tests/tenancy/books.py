"""A tenant's books for tests: requests at stated times and prices, refunds, adjustments, an issuer and a buyer."""

from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.accounts import corrections
from tenancy.accounts.ledger import Hold, capture, grant_credit, place_hold
from tenancy.ids import Entropy
from tenancy.invoicing.invoices import Document, Invoice, draft_invoice, issue
from tenancy.invoicing.parties import Buyer, Issuer, Terms, set_buyer, set_issuer
from tenancy.invoicing.periods import DAY_NS
from tenancy.pricing.price_book import price_at
from tenancy.pricing.prices import charge_nano_usd, worst_case_nano_usd
from tenancy.pricing.volume import lock_hold, take_volume, volume_of
from tenancy.usage.meter import Usage, UsageRecord, record_usage
from tests.tenancy.world import SECOND, Populated, populate

MONTH_NS = 1_801_440_000 * SECOND  # 2027-02-01, where these books begin
CREDIT = 10**15


@dataclass
class Books:
    conn: AsyncConnection
    entropy: Entropy
    who: Populated
    issuer: Issuer
    num_requests: int = 0
    num_transfers: int = 0
    charged: dict[str, int] = field(default_factory=dict)  # request -> nano-USD
    name: str = "acme"

    async def serve(self, usage: Usage, at_ns: int, *, tier: str = "default", model: str = "m") -> str:
        """One request as admission and settlement do it, all at `at_ns`; its id."""
        self.num_requests += 1
        request_id, conn, who = f"req_{self.name}_{self.num_requests}", self.conn, self.who
        price = await price_at(conn, model, at_ns, tier, tenant_id=who.tenant_id)
        before = await volume_of(conn, who.tenant_id, price, at_ns)
        worst = worst_case_nano_usd(price, usage.num_prompt_tokens, usage.num_completion_tokens + 3, tier, before)
        hold = await place_hold(
            conn,
            hold_id=f"hold_{self.name}_{self.num_requests}",
            tenant_id=who.tenant_id,
            request_id=request_id,
            price_id=price.price_id,
            amount_nano_usd=worst,
            expires_ns=at_ns + 600 * SECOND,
            now_ns=at_ns,
            project_id=who.project_id,
            key_id=who.key_id,
            tier=tier,
        )
        assert isinstance(hold, Hold)
        await lock_hold(conn, hold.hold_id)
        num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
        before = await take_volume(conn, who.tenant_id, price, at_ns, num_tokens)
        amount = charge_nano_usd(price, usage, tier, before)
        await record_usage(
            conn,
            UsageRecord(
                request_id,
                who.tenant_id,
                who.project_id,
                who.key_id,
                model,
                usage,
                price.price_id,
                amount,
                at_ns,
                at_ns,
                "stop",
                False,
                tier,
                before,
            ),
        )
        await capture(conn, hold.hold_id, amount, at_ns)
        self.charged[request_id] = amount
        return request_id

    async def refund(self, request_id: str, amount: int, at_ns: int, reason: str = "sorry") -> None:
        self.num_transfers += 1
        await corrections.refund(
            self.conn,
            request_id,
            amount,
            transfer_id=f"trf_{self.name}_{self.num_transfers}",
            reason=reason,
            now_ns=at_ns,
        )

    async def adjust(self, amount: int, at_ns: int, *, corrects_id: str = "") -> None:
        self.num_transfers += 1
        await corrections.adjust(
            self.conn,
            self.who.tenant_id,
            amount,
            transfer_id=f"trf_{self.name}_{self.num_transfers}",
            reason="by hand",
            corrects_id=corrects_id,
            now_ns=at_ns,
        )

    async def bill(self, since_ns: int | None, until_ns: int) -> tuple[Invoice, Document]:
        """Draft and issue, a day after the period."""
        drafted = await draft_invoice(
            self.conn, self.who.tenant_id, since_ns=since_ns, until_ns=until_ns, entropy=self.entropy, now_ns=until_ns
        )
        return drafted, await issue(self.conn, drafted.invoice_id, now_ns=until_ns + DAY_NS)


async def open_books(
    conn: AsyncConnection,
    entropy: Entropy,
    *,
    name: str = "acme",
    terms: Terms = "on_account",
    tax_rate_bp: int = 1_900,
    promotional: int = 0,
    organisation_id: str | None = None,
) -> Books:
    who = await populate(conn, name, organisation_id=organisation_id, entropy=entropy)
    issuer = await set_issuer(
        conn,
        name="Bulkhead Ltd",
        address="1 Long Lane\nLondon",
        tax_id="GB 1",
        payment_details="Account 42",
        number_prefix="BH",
        payment_days=14,
        entropy=entropy,
        now_ns=MONTH_NS,
    )
    await set_buyer(
        conn,
        Buyer(who.tenant_id, issuer.issuer_id, f"{name} GmbH", "Street 1", "DE 1", tax_rate_bp, terms),
        now_ns=MONTH_NS,
    )
    await grant_credit(conn, who.tenant_id, CREDIT, transfer_id=f"grant_{name}", now_ns=MONTH_NS)
    if promotional:
        gift = f"gift_{name}"
        await grant_credit(conn, who.tenant_id, promotional, transfer_id=gift, now_ns=MONTH_NS, kind="promotional")
    return Books(conn, entropy, who, issuer, name=name)
