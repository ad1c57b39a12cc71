"""Changes to the price book, each with its log entry in the same transaction."""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry, Value
from audit.transparency.outbox import append
from tenancy.pricing import price_book
from tenancy.pricing.price_book import Draft, PriceTerms
from tenancy.pricing.prices import Price


@dataclass(frozen=True, slots=True)
class PriceClerk:
    """Works in the caller's transaction `conn`, at `now_ns`."""

    conn: AsyncConnection
    entropy: Callable[[int], bytes]
    now_ns: int

    async def schedule(self, terms: PriceTerms, effective_from_ns: int) -> Price:
        """A price in force from then on. A repeat changes and logs nothing. Raises PriceConflictError."""
        known = {price.price_id for price in await price_book.list_prices(self.conn, terms.model)}
        price = await price_book.schedule(
            self.conn, terms, effective_from_ns=effective_from_ns, entropy=self.entropy, now_ns=self.now_ns
        )
        if price.price_id not in known:
            await self._log_added(price)
        return price

    async def draft(self, terms: PriceTerms) -> Draft:
        """Raises PriceError."""
        draft = await price_book.add_draft(self.conn, terms, entropy=self.entropy, now_ns=self.now_ns)
        await self._log("price.drafted", {"draft_id": draft.draft_id, "model": terms.model, "tier": terms.tier})
        return draft

    async def schedule_draft(self, draft_id: str, effective_from_ns: int) -> Price:
        """Raises PriceError or PriceConflictError."""
        price = await price_book.schedule_draft(
            self.conn, draft_id, effective_from_ns=effective_from_ns, entropy=self.entropy, now_ns=self.now_ns
        )
        await self._log_added(price)
        return price

    async def discard_draft(self, draft_id: str) -> None:
        """Raises PriceError."""
        terms = await price_book.discard_draft(self.conn, draft_id, now_ns=self.now_ns)
        await self._log("price.discarded", {"draft_id": draft_id, "model": terms.model, "tier": terms.tier})

    async def withdraw(self, price_id: str, reason: str) -> Price:
        """A repeat changes and logs nothing. Raises PriceMissingError or PriceConflictError."""
        price, is_new = await price_book.withdraw(self.conn, price_id, now_ns=self.now_ns)
        if is_new:
            body: dict[str, Value] = {
                "price_id": price_id,
                "model": price.model,
                "tier": price.tier,
                "currency": price.currency,
                "reason": reason,
                "effective_from_ns": price.effective_from_ns,
            }
            await self._log("price.withdrawn", body)
        return price

    async def _log_added(self, price: Price) -> None:
        body: dict[str, Value] = {
            "price_id": price.price_id,
            "model": price.model,
            "input_pico_usd": price.input_pico_usd,
            "cached_input_pico_usd": price.cached_input_pico_usd,
            "output_pico_usd": price.output_pico_usd,
            "request_nano_usd": price.request_nano_usd,
            "effective_from_ns": price.effective_from_ns,
            "tier": price.tier,
            "currency": price.currency,
            "flex_percent": price.flex_percent,
            "batch_percent": price.batch_percent,
            "priority_percent": price.priority_percent,
            "steps": [
                f"{one.from_tokens}:{one.input_pico_usd}:{one.cached_input_pico_usd}:{one.output_pico_usd}"
                for one in price.steps
            ],
        }
        await self._log("price.added", body)

    async def _log(self, kind: str, body: dict[str, Value]) -> None:
        await append(self.conn, Entry(kind, "", self.now_ns, body), entropy=self.entropy)
