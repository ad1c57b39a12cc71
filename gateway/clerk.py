"""Changes to tenants, keys, prices, credit, budgets and operators, each with its log entry in the same transaction.

The first run and the command line both go through here, so nothing of this kind can happen unlogged.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway.budget_alerts import append_alerts, budget_fields
from gateway.price_clerk import PriceClerk
from gateway.world import new_id
from tenancy import closing, webhooks
from tenancy.access import directory, keys, operators, rotation
from tenancy.access.key_rules import UNRESTRICTED, KeyRules
from tenancy.accounts import budgets, corrections, credit_line, ledger
from tenancy.accounts.budget_use import BudgetScope
from tenancy.accounts.credits import CreditKind
from tenancy.accounts.posting import CURRENCY
from tenancy.invoicing.periods import Period
from tenancy.pricing.price_book import PriceTerms
from tenancy.quotas import failure_policy, limits
from tenancy.quotas.failure_policy import FailurePolicy

Body = dict[str, str | int | bool | list[str]]
KEY_SCOPES = frozenset({"inference"})
PASSWORD_BYTES = 15  # 24 characters of base64: 120 bits


@dataclass(frozen=True, slots=True)
class Clerk:
    """Works in the caller's transaction `conn`, at `now_ns`."""

    conn: AsyncConnection
    entropy: Callable[[int], bytes]
    now_ns: int

    async def create_tenant(self, name: str, *, organisation: str, currency: str = CURRENCY) -> tuple[str, str]:
        """A new organisation of that name (or the one that exists), a tenant, and its project `default`: their ids."""
        owner = await directory.get_organisation_by_name(self.conn, organisation)
        if owner is None:
            owner = await directory.create_organisation(
                self.conn, organisation, entropy=self.entropy, now_ns=self.now_ns
            )
        tenant = await directory.create_tenant(
            self.conn, owner.organisation_id, name, entropy=self.entropy, now_ns=self.now_ns, currency=currency
        )
        project = await directory.create_project(
            self.conn, tenant.tenant_id, "default", entropy=self.entropy, now_ns=self.now_ns
        )
        created: Body = {"organisation_id": owner.organisation_id, "name": name, "currency": currency}
        await self._log("tenant.created", tenant.tenant_id, created)
        return tenant.tenant_id, project.project_id

    async def create_project(self, tenant_id: str, name: str) -> directory.Project:
        """Raises UnknownIdError or a name error."""
        project = await directory.create_project(self.conn, tenant_id, name, entropy=self.entropy, now_ns=self.now_ns)
        await self._log("project.created", tenant_id, {"project_id": project.project_id, "name": name})
        return project

    async def set_tenant_status(self, tenant_id: str, status: Literal["active", "suspended"], reason: str) -> None:
        """Suspend or resume; its keys answer, or not, from the next request on."""
        await directory.set_tenant_status(self.conn, tenant_id, status)
        await self._log("tenant.status_changed", tenant_id, {"status": status, "reason": reason})

    async def delete_tenant(self, tenant_id: str, reason: str) -> closing.Closed:
        """Raises MoneyHeldError while requests of the tenant are open."""
        closed = await closing.delete_tenant(self.conn, tenant_id, now_ns=self.now_ns)
        body: Body = {
            "name": closed.tenant.name,
            "reason": reason,
            "num_keys_revoked": closed.num_keys_revoked,
            "credit_nano_usd": closed.credit_nano_usd,
        }
        await self._log("tenant.deleted", tenant_id, body)
        return closed

    async def set_limits(
        self,
        kind: directory.ScopeKind,
        scope_id: str,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        concurrency_max: int | None,
        weight: int = 1,
        *,
        tokens_per_day: int | None = None,
        shadow: frozenset[limits.LimitName] = frozenset(),
    ) -> None:
        """Replace limits of a scope, and a tenant's weight; None is no limit. Raises UnknownIdError or LimitError."""
        owner = await directory.owner_of(self.conn, kind, scope_id)
        await limits.set_limits(
            self.conn,
            kind,
            scope_id,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency_max=concurrency_max,
            weight=weight,
            tokens_per_day=tokens_per_day,
            shadow=shadow,
            now_ns=self.now_ns,
        )
        body: Body = {
            "scope_kind": kind,
            "scope_id": scope_id,
            "requests_per_minute": -1 if requests_per_minute is None else requests_per_minute,
            "tokens_per_minute": -1 if tokens_per_minute is None else tokens_per_minute,
            "concurrency_max": -1 if concurrency_max is None else concurrency_max,
            "weight": weight,
            "tokens_per_day": -1 if tokens_per_day is None else tokens_per_day,
            "shadow": sorted(shadow),
        }
        await self._log("limits.changed", owner, body)

    async def set_policy(self, tenant_id: str, policy: FailurePolicy) -> None:
        """What happens to the tenant's requests while the store of quotas is gone. Raises UnknownIdError."""
        await directory.owner_of(self.conn, "tenant", tenant_id)
        await failure_policy.set_policy(self.conn, tenant_id, policy, now_ns=self.now_ns)
        body: Body = {
            "mode": policy.mode,
            "slice_percent": policy.slice_percent,
            "requests_per_minute": policy.requests_per_minute,
            "tokens_per_minute": policy.tokens_per_minute,
            "concurrency_max": policy.concurrency_max,
        }
        await self._log("policy.changed", tenant_id, body)

    async def create_key(
        self,
        tenant_id: str,
        project_id: str,
        name: str,
        pepper: bytes,
        *,
        scopes: frozenset[str] = KEY_SCOPES,
        expires_ns: int | None = None,
        rules: KeyRules = UNRESTRICTED,
    ) -> keys.MintedKey:
        """The new key; its secret is in the return value and nowhere else."""
        minted = await keys.mint_key(
            self.conn,
            project_id,
            name,
            scopes,
            pepper=pepper,
            entropy=self.entropy,
            now_ns=self.now_ns,
            expires_ns=expires_ns,
            rules=rules,
        )
        body: Body = {
            "key_id": minted.key_id,
            "project_id": project_id,
            "name": name,
            "scopes": sorted(scopes),
            "expires_ns": expires_ns or 0,
            "models": sorted(rules.models),
            "networks": list(rules.networks),
            "tiers": sorted(rules.tiers),
        }
        await self._log("key.created", tenant_id, body)
        return minted

    async def rotate_key(
        self, key_id: str, pepper: bytes, *, overlap_ns: int, expires_ns: int | None = None
    ) -> keys.MintedKey:
        """A successor with the same rules; the old key lives on for `overlap_ns`."""
        owner = await directory.owner_of(self.conn, "key", key_id)
        rotated = await rotation.rotate_key(
            self.conn,
            key_id,
            overlap_ns=overlap_ns,
            pepper=pepper,
            entropy=self.entropy,
            now_ns=self.now_ns,
            expires_ns=expires_ns,
        )
        body: Body = {
            "key_id": rotated.minted.key_id,
            "old_key_id": key_id,
            "project_id": rotated.project_id,
            "old_expires_ns": rotated.old_expires_ns,
            "expires_ns": rotated.expires_ns or 0,
        }
        await self._log("key.rotated", owner, body)
        return rotated.minted

    async def revoke_key(self, tenant_id: str, key_id: str, reason: str) -> bool:
        """False when it was revoked already."""
        if not await keys.revoke_key(self.conn, key_id, now_ns=self.now_ns):
            return False
        await self._log("key.revoked", tenant_id, {"key_id": key_id, "reason": reason})
        return True

    async def add_price(
        self,
        model: str,
        *,
        input_pico_usd: int,
        cached_input_pico_usd: int,
        output_pico_usd: int,
        request_nano_usd: int,
        **more: Any,
    ) -> str:
        """A price in force from now on; its id. `more`: other fields of PriceTerms."""
        terms = PriceTerms(model, input_pico_usd, cached_input_pico_usd, output_pico_usd, request_nano_usd, **more)
        price_clerk = PriceClerk(self.conn, self.entropy, self.now_ns)
        return (await price_clerk.schedule(terms, self.now_ns)).price_id

    async def grant_credit(
        self,
        tenant_id: str,
        amount_nano_usd: int,
        *,
        transfer_id: str = "",
        memo: str,
        kind: CreditKind = "paid",
        expires_ns: int | None = None,
    ) -> None:
        """Prepaid credit; a repeat with the same transfer id changes and logs nothing."""
        transfer_id = transfer_id or new_id("trf", self.entropy)
        await ledger.lock_balance(self.conn, tenant_id)  # a repeat at the same moment waits here
        is_new = not await ledger.has_transaction(self.conn, transfer_id)
        await ledger.grant_credit(
            self.conn,
            tenant_id,
            amount_nano_usd,
            transfer_id=transfer_id,
            now_ns=self.now_ns,
            memo=memo,
            kind=kind,
            expires_ns=expires_ns,
        )
        if not is_new:
            return
        body: Body = {
            "transfer_id": transfer_id,
            "memo": memo,
            "amount_nano_usd": amount_nano_usd,
            "credit_kind": kind,
            "expires_ns": expires_ns or 0,
        }
        await self._log("credit.granted", tenant_id, body)

    async def refund(self, request_id: str, amount_nano_usd: int, *, transfer_id: str = "", reason: str) -> str:
        """Give back part of what a request cost; its tenant's id. A repeat changes and logs nothing."""
        transfer_id = transfer_id or new_id("trf", self.entropy)
        tenant_id, is_new = await corrections.refund(
            self.conn, request_id, amount_nano_usd, transfer_id=transfer_id, reason=reason, now_ns=self.now_ns
        )
        if not is_new:
            return tenant_id
        body: Body = {
            "transfer_id": transfer_id,
            "request_id": request_id,
            "reason": reason,
            "amount_nano_usd": amount_nano_usd,
        }
        await self._log("credit.refunded", tenant_id, body)
        return tenant_id

    async def adjust_credit(
        self, tenant_id: str, amount_nano_usd: int, *, transfer_id: str = "", corrects_id: str = "", reason: str
    ) -> None:
        """Add credit, or take it where the amount is below zero. A repeat changes and logs nothing."""
        transfer_id = transfer_id or new_id("trf", self.entropy)
        is_new = await corrections.adjust(
            self.conn,
            tenant_id,
            amount_nano_usd,
            transfer_id=transfer_id,
            reason=reason,
            corrects_id=corrects_id,
            now_ns=self.now_ns,
        )
        if not is_new:
            return
        body: Body = {
            "transfer_id": transfer_id,
            "corrects_id": corrects_id,
            "reason": reason,
            "direction": "give" if amount_nano_usd > 0 else "take",
            "amount_nano_usd": abs(amount_nano_usd),
        }
        await self._log("credit.adjusted", tenant_id, body)

    async def set_credit_limit(self, tenant_id: str, limit_nano_usd: int, reason: str) -> bool:
        """Make a tenant post-paid up to a limit, or with 0 pre-paid again. False: the limit was that already.

        Raises CreditLineError.
        """
        transfer_id = new_id("trf", self.entropy)
        line = await credit_line.set_limit(
            self.conn, tenant_id, limit_nano_usd, transfer_id=transfer_id, now_ns=self.now_ns, memo=reason
        )
        if line is None:
            return False
        body: Body = {"transfer_id": transfer_id, "limit_nano_usd": limit_nano_usd, "reason": reason}
        await self._log("credit.limit_set", tenant_id, body)
        return True

    async def set_budget(
        self, kind: BudgetScope, scope_id: str, period: Period, *, hard: bool, limit_nano_usd: int
    ) -> str:
        """Set or replace one budget; its tenant's id. Alerts that its use calls for at once are logged too."""
        budget, alerts = await budgets.set_budget(
            self.conn, kind, scope_id, period, hard=hard, limit_nano_usd=limit_nano_usd, now_ns=self.now_ns
        )
        body = {**budget_fields(budget), "limit_nano_usd": limit_nano_usd}
        await self._log("budget.set", budget.tenant_id, body)
        await append_alerts(self.conn, alerts, self.now_ns, entropy=self.entropy)
        return budget.tenant_id

    async def remove_budget(self, scope_id: str, period: Period, *, hard: bool) -> None:
        """Raises BudgetError where there is none."""
        budget = await budgets.remove_budget(self.conn, scope_id, period, hard=hard)
        await self._log("budget.removed", budget.tenant_id, budget_fields(budget))

    async def add_webhook(self, url: str, kinds: frozenset[str], *, tenant_id: str, next_leaf_index: int) -> str:
        """An endpoint that hears of what comes from now on; its id. The log has its host only: paths hold secrets."""
        endpoint = await webhooks.add_endpoint(
            self.conn,
            url,
            kinds,
            tenant_id=tenant_id,
            next_leaf_index=next_leaf_index,
            entropy=self.entropy,
            now_ns=self.now_ns,
        )
        body: Body = {
            "endpoint_id": endpoint.endpoint_id,
            "host": urlsplit(url).hostname or "",
            "kinds": sorted(kinds),
        }
        await self._log("webhook.added", tenant_id, body)
        return endpoint.endpoint_id

    async def remove_webhook(self, endpoint_id: str, reason: str) -> None:
        """Raises WebhookError."""
        endpoint = await webhooks.end_endpoint(self.conn, endpoint_id, reason, now_ns=self.now_ns)
        await self._log("webhook.removed", endpoint.tenant_id, {"endpoint_id": endpoint_id, "reason": reason})

    async def resend_webhook(self, delivery_id: str) -> None:
        """Raises WebhookError."""
        delivery = await webhooks.resend(self.conn, delivery_id, now_ns=self.now_ns)
        endpoint = await webhooks.get_endpoint(self.conn, delivery.endpoint_id)
        body: Body = {"endpoint_id": delivery.endpoint_id, "delivery_id": delivery_id}
        await self._log("webhook.resent", endpoint.tenant_id, body)

    async def create_operator(self, name: str) -> str:
        """An operator for the admin page; the generated password, which is stored only as a hash."""
        password = base64.urlsafe_b64encode(self.entropy(PASSWORD_BYTES)).decode()
        await operators.create_operator(self.conn, name, password, entropy=self.entropy, now_ns=self.now_ns)
        await self._log("operator.created", "", {"name": name})
        return password

    async def disable_operator(self, name: str, reason: str) -> bool:
        """False: it was disabled before. Raises UnknownOperatorError."""
        if not await operators.disable_operator(self.conn, name, now_ns=self.now_ns):
            return False
        await self._log("operator.disabled", "", {"name": name, "reason": reason})
        return True

    async def _log(self, kind: str, tenant_id: str, body: Body) -> None:
        await append(self.conn, Entry(kind, tenant_id, self.now_ns, body), entropy=self.entropy)
