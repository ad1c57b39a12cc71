"""Logging in: bounded guesses, a bounded number of hashes at a time, and nothing unlogged.

The order matters:
1. count the attempt                     (Valkey; refused here costs no memory)
2. wait for one of HASHES_MAX places     (argon2 takes tens of MiB each: memory is what an attacker would spend)
3. check the password                   (tenancy/access/operators.py does it in a thread, as slowly for unknown names)
4. write the audit entry and commit      (fails: the log-in is refused. Unlogged means unserved)
5. start the session, forgive the count
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway.admin.attempts import Attempts
from gateway.admin.queries import operator_exists
from gateway.admin.sessions import SessionStore
from gateway.services import Services
from tenancy.access.operators import PASSWORD_LENGTH_MAX, Operator, verify_operator
from tenancy.ids import NAME_LENGTH_MAX

HASHES_MAX = 2  # argon2 computations at a time
WAITERS_MAX = 16  # log-ins waiting for a place; more are told to come back
BUSY_RETRY_AFTER_S = 5


class WrongPasswordError(Exception):
    """Name and password do not belong together; which of them is wrong is not said."""


class LoginBusyError(Exception):
    """Too many log-ins are being checked at this moment."""


class LoginDesk:
    def __init__(self, services: Services, sessions: SessionStore) -> None:
        self._services = services
        self._sessions = sessions
        self._attempts = Attempts(services.redis, services.secrets.session_key)
        self._places = asyncio.Semaphore(HASHES_MAX)
        self._num_waiting = 0

    async def log_in(self, *, name: str, password: str, address: str, old_session_id: str) -> str:
        """Returns a new session's id; `old_session_id`, the browser's until now, is destroyed.

        Raises WrongPasswordError, TooManyAttemptsError, LoginBusyError, DatabaseUnavailableError or a Redis error.
        """
        if len(name) > NAME_LENGTH_MAX or len(password) > PASSWORD_LENGTH_MAX:
            raise WrongPasswordError  # nobody is called that; not worth a hash
        await self._attempts.count(name, address)
        async with self._place(), self._services.database.read() as conn:
            operator = await verify_operator(conn, name, password)
        await self._record(operator, name)
        if operator is None:
            raise WrongPasswordError
        await self._sessions.destroy(old_session_id)
        session_id = await self._sessions.create(operator.operator_id, operator.name)
        await self._attempts.forgive(name, address)
        return session_id

    async def log_out(self, session_id: str, operator_name: str) -> None:
        """The session ends first: a log that cannot be written must not keep it alive. Raises as `log_in` does."""
        await self._sessions.destroy(session_id)
        world = self._services.world
        async with self._services.database.transaction() as conn:
            entry = Entry("operator.logged_out", "", world.now_ns(), {"name": operator_name})
            await append(conn, entry, entropy=world.entropy)

    async def _record(self, operator: Operator | None, name: str) -> None:
        world = self._services.world
        async with self._services.database.transaction() as conn:
            if operator is not None:
                entry = Entry("operator.logged_in", "", world.now_ns(), {"name": operator.name})
            else:
                # A name is logged only if it is one: people type passwords into the wrong field.
                known = name if await operator_exists(conn, name) else ""
                entry = Entry("operator.login_failed", "", world.now_ns(), {"name": known})
            await append(conn, entry, entropy=world.entropy)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._num_waiting >= WAITERS_MAX:
            raise LoginBusyError
        self._num_waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            self._places.release()
