"""The kinds of log entries about prices, invoices and the books. They are part of the registry in entry.py."""

from audit.transparency.entry_kind import SAFE_INT_MAX, Field, Kind, counts, texts

_INVOICE_KIND = Field("invoice_kind", "str", choices=("invoice", "credit_note"))

BILLING_KINDS = (
    Kind(
        "price.added",
        2,
        "A price version was scheduled; prices are never changed. The percents are what other tiers cost of it; a step "
        "reads from_tokens:input:cached_input:output, in pico-USD a token.",
        (
            *texts("price_id", "model"),
            *counts("input_pico_usd", "cached_input_pico_usd", "output_pico_usd", "request_nano_usd"),
            *counts("effective_from_ns"),
            *texts("tier", "currency"),
            *counts("flex_percent", "batch_percent", "priority_percent"),
            Field("steps", "list[str]"),
        ),
    ),
    Kind("price.drafted", 1, "A price was drafted; it charges nobody.", texts("draft_id", "model", "tier")),
    Kind("price.discarded", 1, "A draft of a price was thrown away.", texts("draft_id", "model", "tier")),
    Kind(
        "price.withdrawn",
        1,
        "A scheduled price was taken back before it was in force: it never charged anybody.",
        (*texts("price_id", "model", "tier", "currency", "reason"), *counts("effective_from_ns")),
    ),
    Kind(
        "credit.limit_set",
        1,
        "A tenant became post-paid up to this limit, or pre-paid again where it is 0.",
        (*texts("transfer_id", "reason"), *counts("limit_nano_usd")),
    ),
    Kind(
        "invoice.issuer_set",
        1,
        "Who sells was written down, or changed for documents to come.",
        (*texts("issuer_id", "number_prefix", "name", "tax_id"), *counts("payment_days")),
    ),
    Kind(
        "invoice.buyer_set",
        1,
        "How a tenant is billed was set, or changed for documents to come.",
        (
            *texts("issuer_id", "name", "tax_id"),
            *counts("tax_rate_bp"),
            Field("terms", "str", choices=("prepaid", "on_account")),
        ),
    ),
    Kind(
        "invoice.drafted",
        1,
        "A period was set down for an invoice, or for a credit note to the invoice corrects_id.",
        (*texts("invoice_id", "corrects_id"), _INVOICE_KIND, *counts("since_ns", "until_ns")),
    ),
    Kind(
        "invoice.issued",
        1,
        "An invoice or credit note got its number; its document is stored and never changes. Amounts are minor units.",
        (
            *texts("invoice_id", "number", "document_sha256", "currency"),
            _INVOICE_KIND,
            *counts("net_minor", "tax_minor", "due_minor", minimum=-SAFE_INT_MAX),
            *counts("due_ns"),
        ),
    ),
    Kind(
        "invoice.payment",
        1,
        "A payment of an invoice was noted, and what is open now. Amounts are minor units; of a credit note, which is "
        "paid out, below zero.",
        (
            *texts("invoice_id", "payment_id", "reference"),
            *counts("amount_minor", "open_minor", minimum=-SAFE_INT_MAX),
        ),
    ),
    Kind(
        "invoice.paid",
        1,
        "An invoice was paid, as the operator says: nothing of it is open.",
        texts("invoice_id", "reference"),
    ),
    Kind(
        "invoice.voided",
        1,
        "An invoice or draft counts no more; its number, if it had one, stays used.",
        texts("invoice_id", "reason"),
    ),
    Kind(
        "books.reconciled",
        1,
        "Engine, usage, ledger, invoices and export of a day were compared. Requests that no journal remembers are "
        "not compared with the engine.",
        (
            *counts("since_ns", "until_ns", "num_requests", "num_unwitnessed", "num_differences"),
            Field("differences", "list[str]"),
        ),
    ),
)
