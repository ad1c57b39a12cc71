"""An operator's program in front of the hall: a token, its calls, and one of each thing to call about."""

from dataclasses import dataclass
from typing import Any

from gateway.billing.bookkeeper import Bookkeeper
from gateway.clerk import Clerk
from gateway.price_clerk import PriceClerk
from gateway.token_clerk import TokenClerk
from tenancy.access.operator_tokens import MintedToken
from tenancy.accounts.corrections import refund
from tenancy.accounts.ledger import capture, place_hold
from tenancy.invoicing.parties import Buyer
from tenancy.pricing.price_book import PriceTerms, price_at
from tenancy.usage.meter import Usage, UsageRecord, record_usage
from tenancy.webhooks import deliveries, enqueue, get_endpoint
from tests.fakes.asgi import Answer
from tests.fakes.hall import Hall

ROOT = "/operator/v1"
DAY_NS = 86_400 * 10**9
PRICES: dict[str, Any] = {"input_pico_usd": 10, "cached_input_pico_usd": 10, "output_pico_usd": 20}


@dataclass(frozen=True)
class Program:
    hall: Hall
    token: MintedToken

    async def call(self, method: str, path: str, body: Any = None) -> Answer:
        headers = {"authorization": f"Bearer {self.token.secret_text}"}
        return await self.hall.call(method, ROOT + path, body, tenant=None, headers=headers)

    async def get(self, path: str) -> Any:
        return self._read(await self.call("GET", path), path)

    async def post(self, path: str, **body: Any) -> Any:
        return self._read(await self.call("POST", path, body), path)

    async def put(self, path: str, **body: Any) -> Any:
        return self._read(await self.call("PUT", path, body), path)

    async def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Status and code."""
        answer = await self.call(method, path, body)
        assert 400 <= answer.status < 500, (path, answer.status, answer.body)
        return answer.status, answer.json()["error"]["code"]

    def _read(self, answer: Answer, path: str) -> Any:
        assert answer.status == 200, (path, answer.status, answer.body)
        return answer.json()


async def hire(hall: Hall, name: str = "olga") -> None:
    """An operator with a password that nobody knows."""
    async with hall.database.transaction() as conn:
        await Clerk(conn, hall.services.world.entropy, hall.services.world.now_ns()).create_operator(name)


async def program_of(hall: Hall, name: str = "olga", *, now_ns: int | None = None, **how: Any) -> Program:
    """A program with a new token of an operator's."""
    services = hall.services
    async with hall.database.transaction() as conn:
        clerk = TokenClerk(conn, services.world.entropy, services.world.now_ns() if now_ns is None else now_ns)
        return Program(hall, await clerk.create(name, "test", services.secrets.key_pepper, **how))


async def forget_tries(hall: Hall) -> None:
    async for key in hall.services.redis.scan_iter("bulkhead:{operator-tries}*"):
        await hall.services.redis.delete(key)


async def charged(conn: Any, hall: Hall, tenant: str, request_id: str, at_ns: int, amount_nano_usd: int) -> None:
    """A request of the past, as admission and settlement write it."""
    account, model = hall.accounts[tenant], hall.services.tokenizer.model_id
    price = await price_at(conn, model, at_ns, tenant_id=account.tenant_id)
    await place_hold(
        conn,
        hold_id=f"hold_{request_id}",
        tenant_id=account.tenant_id,
        request_id=request_id,
        price_id=price.price_id,
        amount_nano_usd=amount_nano_usd,
        expires_ns=at_ns + DAY_NS,
        now_ns=at_ns,
    )
    await capture(conn, f"hold_{request_id}", amount_nano_usd, at_ns)
    ids = (request_id, account.tenant_id, account.project_id, account.key_id)
    usage = Usage(1, 0, 1)
    await record_usage(
        conn, UsageRecord(*ids, model, usage, price.price_id, amount_nano_usd, at_ns, at_ns, "stop", False)
    )


async def furnish(hall: Hall, tenant: str = "acme") -> dict[str, str]:
    """One of each thing of a tenant's, made without HTTP: path parameter -> id; of invoices one in each state."""
    services, account = hall.services, hall.accounts[tenant]
    now_ns, entropy = services.world.now_ns(), services.world.entropy
    async with hall.database.transaction() as conn:
        clerk, book = Clerk(conn, entropy, now_ns), Bookkeeper(conn, entropy, now_ns)
        price_clerk = PriceClerk(conn, entropy, now_ns)
        prefix = tenant.upper()
        issuer = await book.set_issuer(
            prefix, name="Seller", address="", tax_id="", payment_details="", payment_days=30
        )
        await book.set_buyer(Buyer(account.tenant_id, issuer.issuer_id, tenant, "", "", 0, "on_account"))
        found = {}
        for number, name in enumerate(("issued", "draft", "other_draft")):
            since_ns = now_ns - (11 - number) * DAY_NS
            await charged(conn, hall, tenant, f"req_{tenant}_{name}", since_ns + 1, 5 * 10**9)
            made = await book.draft(account.tenant_id, since_ns, since_ns + DAY_NS)
            found[f"{name}_invoice"] = made.invoice_id
        await book.issue(found["issued_invoice"])
        request_id = f"req_{tenant}_issued"
        await refund(conn, request_id, 10**9, transfer_id=f"back {tenant}", reason="t", now_ns=now_ns - DAY_NS)
        draft = await price_clerk.draft(PriceTerms("drafted", **PRICES))
        second = await price_clerk.draft(PriceTerms("drafted too", **PRICES))
        price = await price_clerk.schedule(PriceTerms("priced", **PRICES), now_ns + DAY_NS)
        await clerk.set_budget("tenant", account.tenant_id, "day", hard=True, limit_nano_usd=10**12)
        endpoint_id = await clerk.add_webhook(
            "https://hooks.example.com/a", frozenset({"key.revoked"}), tenant_id=account.tenant_id, next_leaf_index=0
        )
        endpoint = await get_endpoint(conn, endpoint_id)
        await enqueue(conn, endpoint, [(0, "key.revoked")], next_leaf_index=1, entropy=entropy, now_ns=now_ns)
        (delivery,) = await deliveries(conn, endpoint_id=endpoint_id)
        spare, _ = await clerk.create_tenant(f"{tenant} spare", organisation=tenant)
    return found | {
        "tenant_id": account.tenant_id,
        "spare_tenant": spare,
        "key_id": account.key_id,
        "scope_kind": "project",
        "scope_id": account.project_id,
        "request_id": request_id,
        "number_prefix": prefix,
        "draft_id": draft.draft_id,
        "second_draft": second.draft_id,
        "price_id": price.price_id,
        "endpoint_id": endpoint_id,
        "delivery_id": delivery.delivery_id,
    }
