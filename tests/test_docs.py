"""What is not documented fails: settings, commands and their options, routes, entry kinds, files, make targets."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import click
import pytest
import typer

from audit.transparency.entry import KINDS
from gateway.cli import app
from gateway.settings import PREFIX, Settings, load_settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", [PREFIX + f.name.upper() for f in fields(Settings)])
def test_every_setting_is_documented(name: str) -> None:
    assert f"`{name}`" in (DOCS / "settings.md").read_text(), f"describe {name} in docs/settings.md"


def test_documented_defaults_are_the_real_ones() -> None:
    rows = re.findall(r"^\| `BULKHEAD_(\w+)` \| `([^`]*)` \|", (DOCS / "settings.md").read_text(), re.MULTILINE)
    defaults = load_settings({})
    documented = {name.lower(): value for name, value in rows}
    real = {f.name: getattr(defaults, f.name) for f in fields(Settings)}
    real = {name: int(value) if isinstance(value, bool) else value for name, value in real.items()}
    assert documented == {name: str(value) for name, value in real.items()}


def commands(group: click.Command, path: str) -> list[tuple[str, list[str]]]:
    if isinstance(group, click.Group):
        return [found for name, sub in sorted(group.commands.items()) for found in commands(sub, f"{path} {name}")]
    options = [option for parameter in group.params for option in parameter.opts if option.startswith("--")]
    return [(path, [option for option in options if option != "--help"])]


@pytest.mark.parametrize(("command", "options"), commands(typer.main.get_command(app), "bulkhead"))
def test_every_command_and_option_is_documented(command: str, options: list[str]) -> None:
    text = (DOCS / "commands.md").read_text()
    section = re.search(rf"^### `{re.escape(command)}[^\n]*`\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"give `{command}` a section in docs/commands.md"
    for option in options:
        assert f"`{option}" in section.group(1), f"describe {option} of `{command}` in docs/commands.md"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_entry_kind_is_documented(kind: str) -> None:
    assert f"`{kind}`" in (DOCS / "log-entries.md").read_text(), f"describe {kind} in docs/log-entries.md"


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_structure_has_one_line_a_file() -> None:
    text = (DOCS / "structure.md").read_text()
    described = re.findall(r"^- `([^`]+)`: \S", text, re.MULTILINE)
    rooms = ("gateway/", "engine/", "kernels/", "tenancy/", "audit/", "migrations/", "tests/")
    expected = {name for name in tracked_files() if name.startswith(rooms) and not name.endswith("__init__.py")}
    assert set(described) == expected
    assert len(described) == len(set(described))
    for section in text.split("\n## "):
        names = re.findall(r"^- `([^`]+)`: \S", section, re.MULTILINE)
        assert names == sorted(names)


def test_every_test_that_a_clause_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "clauses.md").read_text())
    assert len(named) > 60
    for path, name in named:
        assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {name}"
    for path in re.findall(r"`((?:gateway|tenancy|migrations)/[\w/.]*)`", (DOCS / "clauses.md").read_text()):
        assert (ROOT / path).exists(), f"docs/clauses.md names {path}: not there"


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}: not there"


def test_the_readme_names_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text()):
        assert name in targets, f"README names make {name}, the Makefile does not"
