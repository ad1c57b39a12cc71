import socket
import ssl
import threading
from pathlib import Path

import pytest

from gateway.host.tls import LEAF_DAYS, RENEW_DAYS, TlsFiles, ensure_certificates, server_context

NOW_NS = 1_790_000_000 * 10**9
DAY_NS = 86_400 * 10**9


def shake_hands(files: TlsFiles, name: str) -> str | None:
    """The negotiated TLS version between the server's context and a client that trusts only our CA."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with server_context(files).wrap_socket(theirs, server_side=True) as connection:
            connection.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cafile=str(files.ca))
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            version = connection.version()
            connection.send(b"x")
            return version
    finally:
        thread.join()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
def test_a_strict_client_trusts_the_certificate(tmp_path: Path, name: str) -> None:
    import time

    assert shake_hands(ensure_certificates(tmp_path, "127.0.0.1", time.time_ns()), name) == "TLSv1.3"


def test_private_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    ensure_certificates(tmp_path, "127.0.0.1", NOW_NS)
    assert {path.name: path.stat().st_mode & 0o077 for path in tmp_path.glob("*key.pem")} == {
        "key.pem": 0,
        "ca-key.pem": 0,
    }


def test_a_second_start_keeps_everything(tmp_path: Path) -> None:
    ensure_certificates(tmp_path, "127.0.0.1", NOW_NS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ensure_certificates(tmp_path, "127.0.0.1", NOW_NS + DAY_NS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("host", "days"), [("127.0.0.1", LEAF_DAYS - RENEW_DAYS + 1), ("gateway.example", 0)])
def test_the_leaf_is_renewed_and_the_ca_stays(tmp_path: Path, host: str, days: int) -> None:
    files = ensure_certificates(tmp_path, "127.0.0.1", NOW_NS)
    ca, leaf = files.ca.read_bytes(), files.certificate.read_bytes()
    ensure_certificates(tmp_path, host, NOW_NS + days * DAY_NS)
    assert files.ca.read_bytes() == ca
    assert files.certificate.read_bytes() != leaf
