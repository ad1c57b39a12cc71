"""Errors that end a command in one clear line. Anything else is our bug and shows its traceback."""

from audit.keyring import KeyringError
from audit.publish import LogForkError
from gateway.commands.session import CommandError
from gateway.database import DatabaseUnavailableError
from gateway.host.demo_model import ModelError
from gateway.host.folders import FolderError
from gateway.host.migrate import MigrationError
from gateway.host.port import PortError
from gateway.host.supervisor import ChildFailedError
from gateway.host.tls import TlsError
from gateway.settings import SettingsError
from tenancy.budgets import BudgetError
from tenancy.closing import MoneyHeldError
from tenancy.corrections import CorrectionError
from tenancy.credits import TooManyCreditsError
from tenancy.directory import DuplicateNameError, TenantStatusError, UnknownIdError
from tenancy.ids import InvalidNameError
from tenancy.key_rules import KeyRuleError
from tenancy.keys import KeyScopeError
from tenancy.ledger import LedgerConflictError
from tenancy.limits import LimitError
from tenancy.money import MoneyRangeError
from tenancy.operators import DuplicateOperatorError
from tenancy.prices import PriceConflictError
from tenancy.rotation import RotationError
from tenancy.webhooks import WebhookError

KNOWN_ERRORS = (
    BudgetError,
    ChildFailedError,
    CommandError,
    CorrectionError,
    DuplicateNameError,
    DuplicateOperatorError,
    InvalidNameError,
    KeyRuleError,
    KeyScopeError,
    LedgerConflictError,
    LimitError,
    MoneyHeldError,
    MoneyRangeError,
    PriceConflictError,
    RotationError,
    TenantStatusError,
    TooManyCreditsError,
    UnknownIdError,
    WebhookError,
    DatabaseUnavailableError,
    FolderError,
    KeyringError,
    LogForkError,
    MigrationError,
    ModelError,
    PortError,
    SettingsError,
    TlsError,
)
