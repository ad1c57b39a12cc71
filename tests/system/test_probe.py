"""The black-box probes against whole servers: ours passes, ours with sharing between tenants planted is caught."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.server import Server

pytestmark = pytest.mark.system
QUICK = ("--rounds", "4", "--words", "60", "--answers", "8", "--questions", "1")


class SharingServer(Server):
    module = "tests.faults.sharing_server"


@pytest.fixture(scope="module")
def sharing_server(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Server]:
    with SharingServer(tmp_path_factory.mktemp("sharing") / "data", model_dir) as running:
        yield running
        assert running.stop() == 0


def probed(server: Server, folder: Path, *options: str, expect: int) -> dict[str, Any]:
    keys = ("--key-a", server.keys["acme"], "--key-b", server.keys["globex"])
    target = (server.url, "--ca", str(server.ca), "--json", str(folder / "probe.json"))
    said = server.run("audit", "probe", *target, *keys, *options, expect=expect, timeout_s=800)
    assert not any(key in said for key in server.keys.values())
    found: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    assert not any(key in json.dumps(found) for key in server.keys.values())
    return found | {finding["probe"]: finding for finding in found["findings"]}


def test_our_own_server_passes_what_needs_no_clock(server: Server, tmp_path: Path) -> None:
    probes = ("canary", "invariance", "id scope", "idempotency key")
    found = probed(server, tmp_path, *QUICK, *(x for name in probes for x in ("--probe", name)), expect=0)
    assert [found[name]["verdict"] for name in probes] == ["pass"] * 4
    assert found["canary"]["figures"]["num_own_seen"] > 0
    assert found["idempotency key"]["figures"]["num_honoured"] == 2
    assert found["invariance"]["figures"]["num_other"] == 0


def test_sharing_between_tenants_is_caught(sharing_server: Server, tmp_path: Path) -> None:
    found = probed(sharing_server, tmp_path, *QUICK, "--probe", "prefix", "--probe", "names", expect=4)
    assert found["verdict"] == "leak"
    assert found["prefix"]["verdict"] == found["names"]["verdict"] == "leak"
    assert "cached tokens" in found["prefix"]["why"]


def test_separate_prefixes_are_not_called_a_leak(server: Server, tmp_path: Path) -> None:
    """Four rounds cannot show absence (that is for the long run below); they must not show a leak either."""
    found = probed(server, tmp_path, *QUICK, "--probe", "prefix", expect=3)
    assert found["prefix"]["verdict"] == "inconclusive"


def test_what_cannot_be_probed_says_so(server: Server, tmp_path: Path) -> None:
    keys = ("--key-a", "bk-wrong", "--key-b", server.keys["globex"])
    assert "401" in server.run("audit", "probe", server.url, "--ca", str(server.ca), *keys, expect=1)
    same = ("--key-a", server.keys["acme"], "--key-b", server.keys["acme"])
    assert "two tenants" in server.run("audit", "probe", server.url, *same, expect=1)
    keys = ("--key-a", server.keys["acme"], "--key-b", server.keys["globex"])
    assert "does not answer" in server.run("audit", "probe", "http://127.0.0.1:9", *keys, expect=1)
    assert "no probe" in server.run("audit", "probe", server.url, *keys, "--probe", "all", expect=1)


@pytest.mark.deep
@pytest.mark.timeout(900)
def test_the_whole_probe_passes(server: Server, tmp_path: Path) -> None:
    found = probed(server, tmp_path, expect=0)
    assert found["verdict"] == "pass"


@pytest.mark.deep
@pytest.mark.timeout(900)
def test_time_alone_catches_sharing(sharing_server: Server, tmp_path: Path) -> None:
    """A server that tells no cached tokens is caught by its clock."""
    found = probed(sharing_server, tmp_path, "--probe", "prefix", expect=4)
    assert max(found["prefix"]["p_values"].values()) < 0.01
