"""Changes to operators' tokens, each with its log entry in the same transaction."""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry, Value
from audit.transparency.outbox import append
from tenancy.access import operator_tokens
from tenancy.access.operator_tokens import MintedToken


@dataclass(frozen=True, slots=True)
class TokenClerk:
    """Works in the caller's transaction `conn`, at `now_ns`."""

    conn: AsyncConnection
    entropy: Callable[[int], bytes]
    now_ns: int

    async def create(
        self, operator: str, name: str, pepper: bytes, *, read_only: bool = False, expires_ns: int | None = None
    ) -> MintedToken:
        """The new token; its secret is in the return value and nowhere else. Raises OperatorTokenError."""
        minted = await operator_tokens.mint_token(
            self.conn,
            operator,
            name,
            read_only=read_only,
            pepper=pepper,
            entropy=self.entropy,
            now_ns=self.now_ns,
            expires_ns=expires_ns,
        )
        body: dict[str, Value] = {
            "token_id": minted.token_id,
            "operator": operator,
            "name": name,
            "read_only": read_only,
            "expires_ns": expires_ns or 0,
        }
        await self._log("operator.token_created", body)
        return minted

    async def revoke(self, token_id: str, reason: str) -> bool:
        """False when it was revoked already: that changes and logs nothing. Raises OperatorTokenError."""
        if not await operator_tokens.revoke_token(self.conn, token_id, now_ns=self.now_ns):
            return False
        owner = (await operator_tokens.get_token(self.conn, token_id)).operator
        await self._log("operator.token_revoked", {"token_id": token_id, "operator": owner, "reason": reason})
        return True

    async def _log(self, kind: str, body: dict[str, Value]) -> None:
        await append(self.conn, Entry(kind, "", self.now_ns, body), entropy=self.entropy)
