"""Admin sessions: an opaque random id in the cookie, the session itself in Valkey.

Rules:
1. Valkey knows only HMAC(session_key, id): whoever reads Valkey cannot log in with what is there.
2. A session ends after IDLE_NS without a page view, after ABSOLUTE_NS whatever happens, and at log-out.
   Background polls of an open page are not page views: a screen left alone does log itself out.
3. An id is only ever minted here, at log-in; an id that a browser brings along is never adopted (no fixation).
4. Touching writes with XX: a session destroyed at the same moment stays destroyed.
"""

import base64
import hashlib
import hmac
from collections.abc import Callable

import msgspec
from redis.asyncio import Redis

COOKIE = "__Host-bulkhead"  # the prefix makes browsers insist on Secure, Path=/ and no Domain
SESSION_ID_BYTES = 32
IDLE_NS = 30 * 60 * 10**9
ABSOLUTE_NS = 12 * 3600 * 10**9
TOUCH_NS = 15 * 10**9  # page views closer together than this do not write again
ID_CHARS_MAX = 64  # a longer cookie is not one of ours: not worth a hash


class Session(msgspec.Struct, frozen=True, kw_only=True):
    operator_id: str
    operator_name: str
    csrf_token: str  # carried by every form of this session
    created_ns: int
    seen_ns: int

    def ends_ns(self) -> int:
        return min(self.seen_ns + IDLE_NS, self.created_ns + ABSOLUTE_NS)

    def accepts(self, csrf_token: str) -> bool:
        """Whether a form's token is this session's, compared in constant time."""
        return hmac.compare_digest(csrf_token.encode(), self.csrf_token.encode())


class SessionStore:
    def __init__(
        self,
        redis: Redis,
        session_key: bytes,
        *,
        now_ns: Callable[[], int],
        entropy: Callable[[int], bytes],
    ) -> None:
        self._redis = redis
        self._session_key = session_key
        self._now_ns = now_ns
        self._entropy = entropy

    async def create(self, operator_id: str, operator_name: str) -> str:
        """Start a session; returns the id for the cookie, which is stored nowhere."""
        now_ns = self._now_ns()
        session = Session(
            operator_id=operator_id,
            operator_name=operator_name,
            csrf_token=self._token(),
            created_ns=now_ns,
            seen_ns=now_ns,
        )
        session_id = self._token()
        await self._write(session_id, session, only_existing=False)
        return session_id

    async def find(self, session_id: str, *, touch: bool) -> Session | None:
        """The live session of that id, or None. `touch` counts this as a page view (rule 2)."""
        if not 0 < len(session_id) <= ID_CHARS_MAX:
            return None
        stored = await self._redis.get(self._name(session_id))
        if stored is None:
            return None
        session = msgspec.json.decode(stored, type=Session)
        now_ns = self._now_ns()
        if now_ns >= session.ends_ns():
            await self.destroy(session_id)
            return None
        if touch and now_ns - session.seen_ns >= TOUCH_NS:
            session = msgspec.structs.replace(session, seen_ns=now_ns)
            await self._write(session_id, session, only_existing=True)
        return session

    async def destroy(self, session_id: str) -> None:
        if 0 < len(session_id) <= ID_CHARS_MAX:
            await self._redis.delete(self._name(session_id))

    async def _write(self, session_id: str, session: Session, *, only_existing: bool) -> None:
        ttl_ms = max(1, (session.ends_ns() - self._now_ns()) // 10**6)
        await self._redis.set(self._name(session_id), msgspec.json.encode(session), px=ttl_ms, xx=only_existing)

    def _name(self, session_id: str) -> str:
        digest = hmac.new(self._session_key, b"bulkhead/admin-session/v1\0" + session_id.encode(), hashlib.sha256)
        return f"bulkhead:admin:session:v1:{digest.hexdigest()}"

    def _token(self) -> str:
        return base64.urlsafe_b64encode(self._entropy(SESSION_ID_BYTES)).rstrip(b"=").decode()
