"""Logging in: bounded guesses, a bounded number of hashes at a time, and nothing unlogged.

The order matters:
1. count the attempt                     (Valkey; refused here costs no memory)
2. wait for one of HASHES_MAX places     (argon2 takes tens of MiB each: memory is what an attacker would spend)
3. check the password in a thread
4. write the audit entry and commit      (fails: the log-in is refused. Unlogged means unserved)
5. start the session, forgive the count
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from audit.entry import Entry
from audit.outbox import append
from gateway.admin.attempts import Attempts
from gateway.admin.sessions import SessionStore
from gateway.services import Services

HASHES_MAX = 2  # argon2 computations at a time
WAITERS_MAX = 16  # log-ins waiting for a place; more are told to come back
BUSY_RETRY_AFTER_S = 5
NAME_CHARS_MAX = 128
PASSWORD_CHARS_MAX = 1024


class WrongPasswordError(Exception):
    """Name and password do not belong together; which of them is wrong is not said."""


class LoginBusyError(Exception):
    """Too many log-ins are being checked at this moment."""
