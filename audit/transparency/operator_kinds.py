"""The kinds of log entries about operators and their tokens. They are part of the registry in entry.py."""

from audit.transparency.entry_kind import Field, Kind, counts, texts

OPERATOR_KINDS = (
    Kind("operator.created", 1, "An operator account was created.", texts("name")),
    Kind("operator.disabled", 1, "An operator account was disabled, and with it its tokens.", texts("name", "reason")),
    Kind("operator.logged_in", 1, "An operator logged in.", texts("name")),
    Kind("operator.logged_out", 1, "An operator logged out; a session that ran out has no entry.", texts("name")),
    Kind(
        "operator.login_failed",
        1,
        "A log-in was refused; the name is empty when no such operator exists, since people type secrets there.",
        texts("name"),
    ),
    Kind(
        "operator.token_created",
        1,
        "A token for an operator's programs was made; 0 as expires_ns: it has no end.",
        (*texts("token_id", "operator", "name"), Field("read_only", "bool"), *counts("expires_ns")),
    ),
    Kind("operator.token_revoked", 1, "An operator's token works no more.", texts("token_id", "operator", "reason")),
    Kind(
        "operator.request",
        1,
        "A program of an operator's made a change: what changed has entries of its own, of the same instant and in the "
        "same transaction. A repeat that changed nothing has this one alone.",
        texts("operator", "token_id", "request_id", "route", "subject"),
    ),
)
