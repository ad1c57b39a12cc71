"""Leaves, commitments and pseudonyms: what is public about an entry, and what opens it.

    leaf       canonical JSON {"at_ns", "commitment", "kind", "tenant", "v"}: public, hashed into the tree, permanent
    commitment HMAC-SHA256(nonce, "bulkhead/commitment/v1" NUL body), hex. The nonce is 32 random bytes, so the leaf
               says nothing about the body (hiding), and nobody can find another body for it (binding).
    opening    nonce and body. Stored apart. Destroying it erases the content; leaf and tree stay whole.
    tenant     pseudonym of the tenant id under a key that only the operator holds, "" where no tenant is concerned.
               It is stable, so that a tenant's entries can be counted without naming the tenant.

What a leaf does show, by design: when something happened, of which kind, and that two entries concern the same
unnamed tenant. Whoever may not see that must not be given the leaves.
"""

import hashlib
import hmac

from audit.transparency.entry import canonical

NONCE_BYTES = 32
_COMMITMENT_LABEL = b"bulkhead/commitment/v1\0"
_PSEUDONYM_LABEL = b"bulkhead/tenant-pseudonym/v1\0"


def commit(nonce: bytes, body: bytes) -> str:
    """The commitment to canonical `body` under `nonce` (32 bytes), 64 hex digits."""
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
    return hmac.new(nonce, _COMMITMENT_LABEL + body, hashlib.sha256).hexdigest()


def pseudonym(key: bytes, tenant_id: str) -> str:
    """``t_`` and 32 hex digits; "" for no tenant."""
    if not tenant_id:
        return ""
    return "t_" + hmac.new(key, _PSEUDONYM_LABEL + tenant_id.encode(), hashlib.sha256).hexdigest()[:32]


def leaf_bytes(*, kind: str, version: int, at_ns: int, tenant: str, commitment: str) -> bytes:
    """The bytes that become a leaf of the tree. `tenant` is a pseudonym or ""."""
    return canonical({"at_ns": str(at_ns), "commitment": commitment, "kind": kind, "tenant": tenant, "v": version})
