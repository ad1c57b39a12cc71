"""The command line. Each command opens what it needs, does one thing in one transaction, and says what it did.

Errors that a person can act on end in one line on standard error and exit code 1 (2 for a wrong command line).
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gateway import __version__
from gateway.commands import audit as audit_commands
from gateway.commands import bench as bench_commands
from gateway.commands import bench_kernels as bench_kernels_commands
from gateway.commands import books as books_commands
from gateway.commands import budgets as budgets_commands
from gateway.commands import credits as credits_commands
from gateway.commands import directory as directory_commands
from gateway.commands import explain as explain_commands
from gateway.commands import keys as keys_commands
from gateway.commands import limits as limits_commands
from gateway.commands import policies as policies_commands
from gateway.commands import prices as prices_commands
from gateway.commands import tokens as tokens_commands
from gateway.commands import webhooks as webhooks_commands
from gateway.commands.errors import KNOWN_ERRORS
from gateway.logs import configure_logs
from gateway.settings import load_settings
from gateway.world import real_world

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
directory_commands.tenant_app.command("policy")(policies_commands.tenant_policy)
app.add_typer(directory_commands.tenant_app, name="tenant")
app.add_typer(keys_commands.key_app, name="key")
app.add_typer(limits_commands.limits_app, name="limits")
app.add_typer(budgets_commands.budget_app, name="budget")
app.add_typer(prices_commands.price_app, name="price")
app.add_typer(credits_commands.credit_app, name="credit")
app.add_typer(books_commands.invoice_app, name="invoice")
app.add_typer(webhooks_commands.webhook_app, name="webhook")
directory_commands.admin_app.add_typer(tokens_commands.token_app, name="token")
app.add_typer(directory_commands.admin_app, name="admin")
app.add_typer(audit_commands.app, name="audit")
bench_commands.app.command("kernels")(bench_kernels_commands.bench_kernels)
app.add_typer(bench_commands.app, name="bench")
model_app = typer.Typer(no_args_is_help=True, help="Models in the data folder.")
app.add_typer(model_app, name="model")


@app.command()
def serve() -> None:
    """Set up what is missing and serve HTTPS until Ctrl-C or SIGTERM."""
    from gateway.host.serve import run_serve  # the server's imports cost half a second that other commands do not need

    world = real_world()
    settings = load_settings(world.environ)
    configure_logs(settings.log_level)
    raise typer.Exit(run_serve(settings, world, Console()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def worker(
    context: typer.Context,
    explain: Annotated[bool, typer.Option("--explain", help="say who would compute what, and start nothing")] = False,
    config: Annotated[str | None, typer.Option(help="WorkerConfig as a JSON object")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="with --explain: write it here")] = None,
) -> None:
    """Run one engine worker on a unix socket (serve starts its own), or explain what it would run on."""
    if explain:
        explain_commands.explain(config, json_file)
        return
    # Replaced, not imported: this process must stay free of torch until it is the worker.
    given = [] if config is None else ["--config", config]
    os.execv(sys.executable, [sys.executable, "-m", "gateway.worker", *given, *context.args])  # noqa: S606


@app.command()
def migrate(
    serving_role: Annotated[str, typer.Option(help="PostgreSQL: the role that servers connect as, and not more")] = "",
    check: Annotated[bool, typer.Option("--check", help="change nothing; say by what append-only is held")] = False,
) -> None:
    """Bring the database to this version's schema, and the roles that serve to their rights."""
    from gateway.commands import migration

    settings = load_settings(real_world().environ)
    if check:
        raise typer.Exit(migration.check(settings))
    migration.migrate(settings, serving_role)


@model_app.command("fetch")
def model_fetch() -> None:
    """Download, check and convert the demo model (SmolLM2-135M-Instruct)."""
    from gateway.host.demo_model import ensure_demo_model
    from gateway.host.folders import open_folders

    settings = load_settings(real_world().environ)
    open_folders(settings.data_dir, settings.secrets_dir)
    folder = ensure_demo_model(settings.effective_model_dir, typer.echo)
    typer.echo(f"the model is in {folder}")


@model_app.command("convert")
def model_convert(
    gguf: Annotated[Path, typer.Argument(help="A GGUF file of the Llama family: llama, mistral, qwen2 or qwen3.")],
    folder: Annotated[Path, typer.Argument(help="The model folder to write; it must not exist.")],
    tokenizer: Annotated[Path | None, typer.Option(help="A folder with the model's own tokenizer.json.")] = None,
) -> None:
    """Convert a GGUF file to a model folder."""
    from gateway.host.demo_model import convert_gguf

    convert_gguf(gguf, folder, tokenizer)
    typer.echo(f"the model is in {folder}: serve it with BULKHEAD_MODEL_DIR={folder}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    try:
        app()
    except KNOWN_ERRORS as error:
        typer.echo(f"bulkhead: {error}", err=True)
        sys.exit(1)
