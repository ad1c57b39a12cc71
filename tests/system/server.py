"""A whole Bulkhead for tests: `bulkhead serve` as a user starts it, on a free loopback port, in a folder of its own."""

import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import httpx
import openai
import psutil

ROOT = Path(__file__).parent.parent.parent
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Use as a context manager. `keys` maps tenant names to API keys (first start only; they survive `restart`)."""

    module = "gateway"  # what is started: a test may plant a fault in a module of its own

    def __init__(self, data_dir: Path, model_dir: Path | None, **settings: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.output = ""
        self.keys: dict[str, str] = {}
        self.password = ""
        self.ready_s = 0.0
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("BULKHEAD_")}
        self.env |= {"BULKHEAD_DATA_DIR": str(data_dir), "BULKHEAD_PORT": str(self.port)}
        self.env |= {"BULKHEAD_" + name.upper(): value for name, value in settings.items()}
        if model_dir is not None:
            self.env["BULKHEAD_MODEL_DIR"] = str(model_dir)
        self.process: subprocess.Popen[str] | None = None
        self._clients: dict[str, openai.OpenAI] = {}

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            client.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def start(self) -> Self:
        started = time.monotonic()
        with (self.data_dir.parent / f"{self.data_dir.name}.stderr").open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, "serve"],
                cwd=ROOT,
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        self.output = ""
        for line in self.process.stdout:
            self.output += line
            if "print(" in line and "chunk" in line:  # the last line of the banner
                break
            assert time.monotonic() - started < START_TIMEOUT_S, self.output
        else:
            raise AssertionError(f"the server ended: {self.output}{self.errors()}")
        self.ready_s = time.monotonic() - started
        self.keys |= dict(re.findall(r"^  (\w+) +(bk-\S+)$", self.output, re.MULTILINE))
        self.password = next(iter(re.findall(r"^  admin +admin / (\S+)$", self.output, re.MULTILINE)), self.password)
        return self

    def errors(self) -> str:
        return (self.data_dir.parent / f"{self.data_dir.name}.stderr").read_text()

    def stop(self) -> int:
        """SIGTERM and wait; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(STOP_TIMEOUT_S)
        self._close()
        return code

    def kill(self) -> None:
        """kill -9, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)
        self._close()

    def _close(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        return self.data_dir / "tls" / "ca.pem"

    def http(self, **more: object) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.ca))
        return httpx.Client(base_url=self.url, verify=context, timeout=60, **more)  # type: ignore[arg-type]

    def openai(self, tenant: str) -> openai.OpenAI:
        """The official client with this tenant's key; without retries, so that a test sees each answer."""
        if tenant in self._clients:
            return self._clients[tenant]
        context = ssl.create_default_context(cafile=str(self.ca))
        http = httpx.Client(verify=context, timeout=120)
        self._clients[tenant] = openai.OpenAI(
            base_url=self.url + "/v1", api_key=self.keys[tenant], http_client=http, max_retries=0
        )
        return self._clients[tenant]

    def children(self) -> dict[str, psutil.Process]:
        """The server's children by what they are: "worker" and "valkey"."""
        assert self.process is not None
        found = {}
        for child in psutil.Process(self.process.pid).children():
            command = " ".join(child.cmdline())
            found["worker" if "gateway.worker" in command else "valkey"] = child
        return found

    def run(self, *command: str, expect: int = 0, timeout_s: float = 120) -> str:
        """A bulkhead command beside the running server; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "gateway", *command],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr


def open_database(server: Server) -> sqlite3.Connection:
    """The server's database, read-only."""
    return sqlite3.connect(f"file:{server.data_dir / 'bulkhead.db'}?mode=ro", uri=True)


def wait_until(condition: object, timeout_s: float = 30.0, what: str = "it") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.1)
