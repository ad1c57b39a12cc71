"""bulkhead audit: log, report, verify."""

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.tables import log_leaf, log_opening
from gateway.commands.session import CommandError, in_transaction, open_session

app = typer.Typer(no_args_is_help=True, help="The transparency log, reports and their verification.")
