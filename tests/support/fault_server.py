"""An HTTP server on loopback that serves files and misbehaves as planned."""

import re
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.loopback import serving

STALL_S = 1.0
"""Longer than the clients of these tests wait."""


class FaultServer:
    """Files by name, what happens to the next requests for each, and the requests so far.

    A fault takes (handler, body from the requested offset, send): `send(body, length)` answers as usual,
    announcing `length` bytes.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {}
        self.plan: dict[str, list[Callable[..., None] | None]] = defaultdict(list)
        """Faults of the next requests for a file, in order; None is a request without fault."""
        self.requests: list[tuple[str, str | None]] = []
        """Name and Range header."""
        self.ranges = True

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"


def status(code: int, **headers: str) -> Callable[..., None]:
    def fault(handler, body, send):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def stall(share: float) -> Callable[..., None]:
    """Some of the body, then silence."""

    def fault(handler, body, send):
        send(body[: int(len(body) * share)], len(body))
        time.sleep(STALL_S)
        handler.close_connection = True

    return fault


def cut(share: float, *, reset: bool = False) -> Callable[..., None]:
    """Some of the body, then the end of the connection."""

    def fault(handler, body, send):
        send(body[: int(len(body) * share)], len(body))
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.shutdown(socket.SHUT_RDWR) if not reset else handler.connection.close()
        handler.close_connection = True

    return fault


def flip(share: float) -> Callable[..., None]:
    """The whole body, with another byte somewhere."""

    def fault(handler, body, send):
        where = int(len(body) * share)
        send(body[:where] + bytes([body[where] ^ 0x10]) + body[where + 1 :], len(body))

    return fault


@contextmanager
def serve() -> Iterator[FaultServer]:
    """Runs a server until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.strip("/")
            wanted = self.headers.get("Range")
            state.requests.append((name, wanted))
            plan = state.plan[name]
            fault = plan.pop(0) if plan else None
            content = state.files.get(name)
            if content is None:
                fault = fault or status(404)
                content = b""
            offset = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and state.ranges else 0

            def send(body: bytes, length: int) -> None:
                self.send_response(206 if offset else 200)
                if offset:
                    self.send_header("Content-Range", f"bytes {offset}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            body = content[offset:]
            try:
                fault(self, body, send) if fault else send(body, len(body))
            except (BrokenPipeError, ConnectionResetError):  # the client has gone on
                self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    with serving(Handler) as url:
        state = FaultServer(url)
        yield state
