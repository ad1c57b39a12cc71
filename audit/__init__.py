"""The audit room: isolation auditor, transparency log, proofs, reports and the offline verifier."""
