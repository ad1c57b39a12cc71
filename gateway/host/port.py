"""The listening socket, bound before anything slow happens: a taken port is the first thing that a user hears of."""

import socket


class PortError(Exception):
    """The address cannot be bound; the message says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A bound, not yet listening TCP socket. Raises PortError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what uses it, or choose another BULKHEAD_PORT"
        ) from error
    return listener
