"""A listener on the wire: passes one connection on to a server, and keeps the bytes that the server sends."""

import contextlib
import socket
import threading
from typing import Self

APPLICATION_DATA = 23  # RFC 8446 section 5.1: the record's first byte; bytes 3 and 4 are its length


class Tap:
    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.heard = b""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            back = threading.Thread(target=self._pass, args=(server, client, True), daemon=True)
            back.start()
            self._pass(client, server, False)
            back.join(10)

    def _pass(self, source: socket.socket, target: socket.socket, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if keep:
                    self.heard += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def record_lengths(heard: bytes) -> list[int]:
    """Of the records of application data, in order."""
    lengths, at = [], 0
    while at + 5 <= len(heard):
        length = int.from_bytes(heard[at + 3 : at + 5], "big")
        if heard[at] == APPLICATION_DATA:
            lengths.append(length)
        at += 5 + length
    return lengths
