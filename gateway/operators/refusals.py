"""The table from what the rooms refuse to what an operator's program is told. Their messages are for operators, so
they are told as they are: ids, figures, never a secret. What is not here is our bug (problems.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import IntegrityError

from audit.transparency.entry import EntryError
from gateway.api.problems import InvalidRequestError, RefusedError
from tenancy.access.directory import DuplicateNameError, TenantStatusError, UnknownIdError
from tenancy.access.key_rules import KeyRuleError
from tenancy.access.keys import KeyScopeError, UnknownKeyIdError
from tenancy.access.rotation import RotationError
from tenancy.accounts.budgets import BudgetError
from tenancy.accounts.corrections import CorrectionError
from tenancy.accounts.credit_line import CreditLineError
from tenancy.accounts.credits import TooManyCreditsError
from tenancy.accounts.ledger import LedgerConflictError
from tenancy.accounts.posting import CurrencyError, UnknownAccountError
from tenancy.closing import MoneyHeldError, TenantInactiveError
from tenancy.ids import InvalidNameError
from tenancy.invoicing.invoice_document import TooManyLinesError
from tenancy.invoicing.invoices import InvoiceError
from tenancy.invoicing.parties import PartyError
from tenancy.money import MoneyRangeError
from tenancy.pricing.prices import PriceConflictError, PriceError, PriceMissingError
from tenancy.quotas.failure_policy import FailurePolicyError
from tenancy.quotas.limits import LimitError
from tenancy.usage.attribution import TooManyRequestsError
from tenancy.webhooks import WebhookError

NOT_THERE: Final = (UnknownIdError, UnknownKeyIdError, UnknownAccountError, PriceMissingError)
AS_THINGS_ARE: Final = (
    BudgetError,
    CorrectionError,
    CreditLineError,
    DuplicateNameError,
    InvoiceError,
    LedgerConflictError,
    MoneyHeldError,
    PartyError,
    PriceConflictError,
    RotationError,
    TenantInactiveError,
    TenantStatusError,
    TooManyCreditsError,
    TooManyLinesError,
    TooManyRequestsError,
    WebhookError,
)
AS_WRITTEN: Final = (
    CurrencyError,
    EntryError,
    FailurePolicyError,
    InvalidNameError,
    KeyRuleError,
    KeyScopeError,
    LimitError,
    MoneyRangeError,
    PriceError,
)


@contextmanager
def told() -> Iterator[None]:
    """Raises RefusedError or InvalidRequestError instead of what is in the table."""
    try:
        yield
    except NOT_THERE as error:
        raise RefusedError(404, str(error)) from error
    except AS_THINGS_ARE as error:
        raise RefusedError(409, str(error)) from error
    except AS_WRITTEN as error:
        raise InvalidRequestError(str(error)) from error
    except IntegrityError as error:  # what was looked for and not there was made by another before we were done
        raise RefusedError(409, "The same was made or changed at the same moment: look, then ask again.") from error


@contextmanager
def written() -> Iterator[None]:
    """Around what only checks texts, with an error that elsewhere is about the state of things."""
    try:
        yield
    except PartyError as error:
        raise InvalidRequestError(str(error)) from error


@contextmanager
def there() -> Iterator[None]:
    """Around a look-up that raises what other refusals raise, too: nothing has this id. Raises RefusedError."""
    try:
        yield
    except (BudgetError, CorrectionError, InvoiceError, PartyError, PriceError, WebhookError) as error:
        raise RefusedError(404, str(error)) from error
