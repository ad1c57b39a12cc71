"""bulkhead audit: log, report, verify."""

import typer

app = typer.Typer(no_args_is_help=True, help="The transparency log, reports and their verification.")
