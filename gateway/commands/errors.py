"""Errors that end a command in one clear line. Anything else is our bug and shows its traceback."""

from audit.transparency.keyring import KeyringError
from audit.transparency.publish import LogForkError
from gateway.commands.session import CommandError
from gateway.database import DatabaseUnavailableError
from gateway.host.demo_model import ModelError
from gateway.host.folders import FolderError
from gateway.host.migrate import MigrationError
from gateway.host.port import PortError
from gateway.host.same_keys import ForeignKeysError
from gateway.host.supervisor import ChildFailedError
from gateway.host.tls import TlsError
from gateway.rights.standing import NoTablesError
from gateway.settings import SettingsError
from tenancy.access.directory import DuplicateNameError, TenantStatusError, UnknownIdError
from tenancy.access.key_rules import KeyRuleError
from tenancy.access.keys import KeyScopeError
from tenancy.access.operator_tokens import OperatorTokenError
from tenancy.access.operators import DuplicateOperatorError, UnknownOperatorError
from tenancy.access.rotation import RotationError
from tenancy.accounts.budgets import BudgetError
from tenancy.accounts.corrections import CorrectionError
from tenancy.accounts.credit_line import CreditLineError
from tenancy.accounts.credits import TooManyCreditsError
from tenancy.accounts.ledger import LedgerConflictError
from tenancy.accounts.posting import CurrencyError
from tenancy.closing import MoneyHeldError
from tenancy.ids import InvalidNameError
from tenancy.invoicing.invoice_document import TooManyLinesError
from tenancy.invoicing.invoices import InvoiceError
from tenancy.invoicing.parties import PartyError
from tenancy.money import MoneyRangeError
from tenancy.pricing.prices import PriceConflictError, PriceError, PriceMissingError
from tenancy.quotas.limits import LimitError
from tenancy.usage.attribution import TooManyRequestsError
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
    NoTablesError,
    OperatorTokenError,
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
    UnknownOperatorError,
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
