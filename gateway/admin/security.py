"""What the browser may do with our pages, and which requests it may send to them.

Rules:
1. Every answer carries the headers below, whatever went wrong while it was made.
2. Nothing is loaded from anywhere but this origin, and nothing inline: a tenant name can never become script.
3. A POST is served only when the browser itself says that it comes from this origin (SPECS: Fetch Metadata, RFC 6454).
   Our own ``Referrer-Policy: no-referrer`` makes browsers send ``Origin: null`` with form posts, so ``null`` is
   accepted, but only beside ``Sec-Fetch-Site: same-origin``, which a page cannot forge.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
HSTS = "max-age=63072000"  # two years; not sent on loopback, where it would bind every other local server


class SecurityHeaders:
    """Pure ASGI: sets HEADERS, no-store (static files: revalidate) and, off loopback, HSTS on every answer."""

    def __init__(self, app: ASGIApp, *, static_prefix: str) -> None:
        self.app = app
        self.static_prefix = static_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_static = scope["path"].startswith(self.static_prefix)
        is_loopback = is_loopback_host(Headers(scope=scope).get("host", ""))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["Cache-Control"] = "no-cache" if is_static else "no-store"
                if not is_loopback:
                    headers["Strict-Transport-Security"] = HSTS
            await send(message)

        await self.app(scope, receive, send_with_headers)


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names this machine itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_same_origin(headers: Headers, *, scheme: str) -> bool:
    """Whether a state-changing request was made by one of our own pages (rule 3)."""
    origin = headers.get("origin")
    own_origin = f"{scheme}://{headers.get('host', '')}"
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin" and origin in (None, "null", own_origin)
    return origin == own_origin
