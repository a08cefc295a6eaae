"""A judge on the loopback interface that misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Judge:
    """`misdeeds` are done one per request, in order; then `answer` replies to the prompt."""

    answer: Callable[[str], Any] = lambda prompt: "8 6"
    misdeeds: list[Any] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)


def completion(content: Any) -> dict[str, Any]:
    choice = content if isinstance(content, dict) else {"message": {"content": content}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 3}}


@contextmanager
def misbehaving_judge(judge: Judge) -> Iterator[Judge]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                judge.requests.append(request)
                judge.keys.append(self.headers.get("Authorization"))
                misdeed = judge.misdeeds.pop(0) if judge.misdeeds else None
            if isinstance(misdeed, tuple):
                status, headers = misdeed
                self.reply(status, {"error": "busy"}, headers)
            elif misdeed == "drop":
                self.connection.close()
            elif misdeed == "slow":
                time.sleep(0.5)
            elif misdeed == "hang":
                judge.released.wait(60)
            elif misdeed == "truncated":
                body = json.dumps(completion("8 6")).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif misdeed == "not json":
                self.reply(200, "<html>", {})
            elif misdeed == "no choices":
                self.reply(200, {"choices": []}, {})
            else:
                self.reply(200, completion(judge.answer(request["messages"][0]["content"])), {})

        def reply(self, status: int, body: Any, headers: dict[str, str]) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
