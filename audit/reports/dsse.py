"""DSSE envelopes (secure-systems-lab/dsse v1) around in-toto statements, signed by both report keys.

What is signed is the pre-authentication encoding "DSSEv1 LEN(type) type LEN(payload) payload": the payload's bytes as
they are, so that nothing depends on how JSON is written. keyid is NAME+ID, as in a verifier key.
"""

import base64
import json

from audit.transparency.keyring import HybridSigner

PAYLOAD_TYPE = "application/vnd.in-toto+json"


def pre_authentication_encoding(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def sign_envelope(payload: bytes, signer: HybridSigner) -> bytes:
    """The envelope as JSON text."""
    message = pre_authentication_encoding(payload)
    signatures = [
        {"keyid": f"{signer.name}+{key_id.hex()}", "sig": base64.b64encode(signature).decode()}
        for key_id, signature in (
            (signer.ed25519_id, signer.ed25519.sign(message)),
            (signer.mldsa_id, signer.mldsa.sign(message)),
        )
    ]
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": signatures,
    }
    return json.dumps(envelope, indent=1).encode() + b"\n"


def read_payload(envelope: bytes) -> bytes:
    """The payload, unverified: for showing what one has just signed. Verification is audit/verify.py's."""
    return base64.b64decode(json.loads(envelope)["payload"], validate=True)
