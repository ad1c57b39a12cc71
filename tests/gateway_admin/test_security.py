import pytest
from starlette.datastructures import Headers

from gateway.admin.attempts import network_of
from gateway.admin.security import is_loopback_host, is_same_origin

OWN = "https://127.0.0.1:8443"


@pytest.mark.parametrize(
    ("origin", "site", "is_ours"),
    [
        (OWN, "same-origin", True),
        ("null", "same-origin", True),  # what browsers send under Referrer-Policy: no-referrer
        (None, "same-origin", True),
        (OWN, None, True),  # a browser without Fetch Metadata
        ("null", None, False),
        (None, None, False),
        ("null", "cross-site", False),
        (OWN, "cross-site", False),
        (OWN, "same-site", False),
        (OWN, "none", False),
        ("https://evil.example", "same-origin", False),
        ("https://evil.example", None, False),
        ("https://127.0.0.1:8444", None, False),
        ("http://127.0.0.1:8443", None, False),
        ("", None, False),
        (OWN, "", False),
    ],
)
def test_a_post_is_ours_only_when_the_browser_says_so(origin: str | None, site: str | None, is_ours: bool) -> None:
    headers = {"host": "127.0.0.1:8443"}
    if origin is not None:
        headers["origin"] = origin
    if site is not None:
        headers["sec-fetch-site"] = site
    assert is_same_origin(Headers(headers), scheme="https") is is_ours


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:8443", True),
        ("127.8.9.1", True),
        ("localhost:1", True),
        ("a.localhost", True),
        ("[::1]:8443", True),
        ("bulkhead.example", False),
        ("127.0.0.1.example:8443", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("", False),
        ("[::1", False),
    ],
)
def test_loopback_hosts(host: str, expected: bool) -> None:
    assert is_loopback_host(host) is expected


def test_attempts_are_counted_for_a_whole_ipv6_network() -> None:
    assert network_of("2001:db8:1:2::1") == network_of("2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    assert network_of("2001:db8:1:3::1") != network_of("2001:db8:1:2::1")
    assert network_of("192.0.2.7") == network_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert network_of("") == ""
