"""Errors that end a command in one clear line. Anything else is our bug and shows its traceback."""

from gateway.commands.session import CommandError
from gateway.database import DatabaseUnavailableError
from gateway.demo_model import ModelError
from gateway.folders import FolderError
from audit.keyring import KeyringError
from audit.publish import LogForkError
from gateway.listener import PortError
from gateway.migrate import MigrationError
from gateway.settings import SettingsError
from gateway.supervisor import ChildFailedError

KNOWN_ERRORS = (
    ChildFailedError,
    CommandError,
    DatabaseUnavailableError,
    FolderError,
    MigrationError,
    ModelError,
    PortError,
    SettingsError,
)
