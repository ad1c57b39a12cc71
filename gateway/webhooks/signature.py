"""Signatures as Standard Webhooks has them (standardwebhooks.com, version 1.0.0), so that its libraries verify ours:

    webhook-id         the event's, the same in every attempt
    webhook-timestamp  seconds since the epoch of this attempt; a receiver refuses what is old
    webhook-signature  "v1," and base64 of HMAC-SHA256 over "id.timestamp.body"

An endpoint's secret is derived from a server secret and the endpoint's id: it is stored nowhere.
"""

import base64
import hashlib
import hmac

from gateway.secrets import Secrets

SECRET_PREFIX = "whsec_"  # noqa: S105 (a prefix, not a secret)


def endpoint_secret(secrets: Secrets, endpoint_id: str) -> str:
    """What the receiver verifies with: ``whsec_`` and base64 of 32 bytes. Shown once, when the endpoint is made."""
    key = hmac.new(secrets.session_key, b"bulkhead/webhook/v1\0" + endpoint_id.encode(), hashlib.sha256).digest()
    return SECRET_PREFIX + base64.b64encode(key).decode()


def signature(secret: str, event_id: str, timestamp_s: int, body: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = f"{event_id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
