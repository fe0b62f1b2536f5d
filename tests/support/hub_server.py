"""A stand-in on loopback for the Hugging Face Hub: one dataset, and connections that are dropped as planned."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.loopback import serving

COMMIT = "a" * 40


class Hub:
    """The files of the dataset `allenai/c4` by path, and which requests are not answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {}
        self.drop: list[str] = []
        """Parts of a request's line: the next request that one is in is dropped, and the entry with it."""
        self.drop_all = False
        self.requests: list[str] = []

    def drops(self, line: str) -> bool:
        """Whether a request is to be dropped."""
        planned = next((part for part in self.drop if part in line), None)
        if planned is not None:
            self.drop.remove(planned)
        return self.drop_all or planned is not None

    def entries(self, directory: str) -> list[dict[str, Any]]:
        """The tree API's answer."""
        below = {path: path.removeprefix(directory).strip("/") for path in self.files if path.startswith(directory)}
        files = [
            {"type": "file", "path": path, "size": len(self.files[path]), "oid": "0" * 40}
            for path, rest in below.items()
            if "/" not in rest
        ]
        folders = {f"{directory}/{rest.split('/')[0]}".strip("/") for rest in below.values() if "/" in rest}
        return [*files, *({"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders))]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs a stand-in until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {self.path}")
            if hub.drops(hub.requests[-1]):
                self.close_connection = True
                return
            path = self.path.partition("?")[0]
            dataset = "datasets/allenai/c4"
            if path.startswith(f"/{dataset}/resolve/"):
                self._file(path.split("/", 6)[6])
            elif path.startswith(f"/api/{dataset}/tree/"):
                self._json(hub.entries(path.partition(COMMIT)[2].strip("/")))
            elif path.startswith(f"/api/{dataset}"):
                self._json({"id": "allenai/c4", "sha": COMMIT, "siblings": []})
            else:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_POST = do_GET  # noqa: N815 (http.server's names)

        def _file(self, path: str) -> None:
            if path not in hub.files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            content, headers = hub.files[path], {"X-Repo-Commit": COMMIT, "ETag": f'"{len(path)}"'}
            wanted = self.headers.get("Range")
            if wanted is None:
                self._send(200, content, headers)
                return
            first, last = wanted.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1 if last else None]
            end = int(first) + len(part) - 1
            self._send(206, part, {**headers, "Content-Range": f"bytes {first}-{end}/{len(content)}"})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with serving(Handler) as url:
        hub = Hub(url)
        yield hub
