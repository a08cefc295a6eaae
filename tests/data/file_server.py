"""An HTTP server on this machine that fails, stalls and breaks off as it is told."""

from __future__ import annotations

import hashlib
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults[path]` is what the next answers do.

    A status, "stall", "break" after half of it, or "break and change".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        data = self.server.files.get(self.path)
        self.send_response(404 if data is None else 200)
        if data is not None:
            self.send_header("ETag", hashlib.blake2b(data).hexdigest())
        self.end_headers()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        fault = self.server.faults.get(self.path, [])
        what = fault.pop(0) if fault else None
        data = self.server.files.get(self.path)
        if isinstance(what, int) or data is None:
            self.send_error(what if isinstance(what, int) else 404)
            return
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", hashlib.blake2b(data).hexdigest())
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if what == "stall":
            time.sleep(1.5)
        if what == "break and change":
            self.server.files[self.path] = bytes(reversed(data))
            what = "break"
        self.wfile.write(data[start : start + (len(data) - start) // 2] if what == "break" else data[start:])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""
