"""Errors that end a command in one clear line. Anything else is our bug and shows its traceback."""

from audit.keyring import KeyringError
from audit.publish import LogForkError
from gateway.commands.session import CommandError
from gateway.database import DatabaseUnavailableError
from gateway.host.demo_model import ModelError
from gateway.host.folders import FolderError
from gateway.host.migrate import MigrationError
from gateway.host.port import PortError
from gateway.host.same_keys import ForeignKeysError
from gateway.host.supervisor import ChildFailedError
from gateway.host.tls import TlsError
from gateway.settings import SettingsError
from tenancy.attribution import TooManyRequestsError
from tenancy.budgets import BudgetError
from tenancy.closing import MoneyHeldError
from tenancy.corrections import CorrectionError
from tenancy.credit_line import CreditLineError
from tenancy.credits import TooManyCreditsError
from tenancy.directory import DuplicateNameError, TenantStatusError, UnknownIdError
from tenancy.ids import InvalidNameError
from tenancy.invoice_document import TooManyLinesError
from tenancy.invoices import InvoiceError
from tenancy.key_rules import KeyRuleError
from tenancy.keys import KeyScopeError
from tenancy.ledger import LedgerConflictError
from tenancy.limits import LimitError
from tenancy.money import MoneyRangeError
from tenancy.operators import DuplicateOperatorError
from tenancy.parties import PartyError
from tenancy.posting import CurrencyError
from tenancy.prices import PriceConflictError, PriceError, PriceMissingError
from tenancy.rotation import RotationError
from tenancy.webhooks import WebhookError

KNOWN_ERRORS = (
    BudgetError,
    ChildFailedError,
    CommandError,
    CorrectionError,
    CreditLineError,
    CurrencyError,
    DuplicateNameError,
    DuplicateOperatorError,
    InvalidNameError,
    InvoiceError,
    KeyRuleError,
    KeyScopeError,
    LedgerConflictError,
    LimitError,
    MoneyHeldError,
    MoneyRangeError,
    PartyError,
    PriceConflictError,
    PriceError,
    PriceMissingError,
    RotationError,
    TenantStatusError,
    TooManyCreditsError,
    TooManyLinesError,
    TooManyRequestsError,
    UnknownIdError,
    WebhookError,
    DatabaseUnavailableError,
    FolderError,
    ForeignKeysError,
    KeyringError,
    LogForkError,
    MigrationError,
    ModelError,
    PortError,
    SettingsError,
    TlsError,
)
