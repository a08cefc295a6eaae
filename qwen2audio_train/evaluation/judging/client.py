"""A client for endpoints of OpenAI's chat completions or Gemini's form: cached, rate-limited, with a bound on cost.

Nothing is paid for twice: every reply is written to disk under the hash of its request before it is used, so a run
that was cut off goes on where it stopped. What was spent stands in the same folder, in `spent.jsonl`: the most that a
request can cost before it is sent, and a correction afterwards. So the bound on cost is one over all runs, and it holds
when a run is killed with requests under way.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import json
import os
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qwen2audio_train.config.bounds import nearest
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.judging import forms

LEDGER = "spent.jsonl"
RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
Messages = Sequence[Mapping[str, Any]]


class JudgeError(UserError):
    """The endpoint gave no usable reply; the message says what it gave instead."""


class CostCapError(JudgeError):
    """The next request could cost more than is left."""


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is, what it costs and how patiently it is asked.

    Attributes:
        base_url: up to and including the version, such as `https://api.example.com/v1`.
        api_key_variable: environment variable that holds the key; unset, no key is sent.
        cache_dir: folder of the replies.
        requests_per_minute: bound over all threads; None is none.
        form: `openai` (chat completions) or `gemini` (generateContent).
        price_per_million: of prompt and of completion tokens, in any currency.
        max_cost: bound, in the same currency, on all that was ever spent with this `cache_dir`.
        max_wait_s: longest pause between two tries.
    """

    base_url: str
    model: str
    cache_dir: str | Path
    api_key_variable: str = "OPENAI_API_KEY"
    form: str = "openai"
    max_tokens: int = 16
    timeout_s: float = 60.0
    max_tries: int = 8
    max_wait_s: float = 60.0
    requests_per_minute: float | None = None
    price_per_million: tuple[float, float] = (0.0, 0.0)
    max_cost: float | None = None


@dataclass(frozen=True)
class Reply:
    """What the judge said. `refusal` is set where the endpoint itself marks the reply as refused or filtered."""

    text: str
    refusal: bool
    prompt_tokens: int
    completion_tokens: int
    from_cache: bool = False


@dataclass
class Client:
    """Asks the endpoint; safe to share between threads, not between processes. `sleep` is there for tests.

    Attributes:
        spent: with this `cache_dir`, in all runs; requests under way count as the most that they can cost.
    """

    endpoint: Endpoint
    sleep: Callable[[float], None] = time.sleep
    spent: float = 0.0
    _next_start: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.spent = _read_ledger(Path(self.endpoint.cache_dir) / LEDGER)

    def complete(self, messages: Messages) -> Reply:
        """The reply to a conversation at temperature 0, from the cache if it was asked before.

        Raises:
            CostCapError: nothing was sent, because it might cost more than is left.
            JudgeError: refused for good (a wrong key, say), or still failing after `max_tries`.
        """
        request = self._request(messages)
        path = self._cache_path(request)
        known = _read_json(path)
        if known is not None:
            return Reply(**known["reply"], from_cache=True)
        most = self._price(forms.most_tokens(messages), self.endpoint.max_tokens)
        reply = self._try(request, most)
        fields = {name: value for name, value in vars(reply).items() if name != "from_cache"}
        _write_json(path, {"request": forms.without_audio(request), "reply": fields})
        if reply.prompt_tokens:
            self._book(self._price(reply.prompt_tokens, reply.completion_tokens) - most)
        return reply

    def _request(self, messages: Messages) -> dict[str, Any]:
        return self._form.request(self.endpoint.model, messages, self.endpoint.max_tokens)

    @property
    def _form(self) -> forms.Form:
        return forms.FORMS[self.endpoint.form]

    def _cache_path(self, request: dict[str, Any]) -> Path:
        text = json.dumps([self.endpoint.base_url, request], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Path(self.endpoint.cache_dir) / digest[:2] / f"{digest}.json"

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt, completion = self.endpoint.price_per_million
        return (prompt * prompt_tokens + completion * completion_tokens) / 1e6

    def _book(self, amount: float, cap: float | None = None) -> None:
        """Add to what is spent, on disk first. Raises CostCapError if that would pass `cap`."""
        folder = Path(self.endpoint.cache_dir)
        with self._lock:
            if cap is not None and self.spent + amount > cap:
                raise CostCapError(
                    f"{self.spent:.4f} spent or under way: up to {amount:.4f} more would pass max_cost {cap:g}; raise "
                    f"it and run again, what is paid for stays in {folder}"
                )
            if amount == 0:
                return
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LEDGER).open("a", encoding="utf-8") as ledger:
                ledger.write(json.dumps({"cost": amount}) + "\n")
            self.spent += amount

    def _try(self, request: dict[str, Any], most: float) -> Reply:
        """Ask until there is a reply; it is booked at `most`, as is a try whose reply came in pieces or too late."""
        problem = ""
        for attempt in range(self.endpoint.max_tries):
            self._book(most, self.endpoint.max_cost)
            self._wait_for_turn()
            try:
                return self._send(request)
            except urllib.error.URLError as error:
                self._book(-most)
                problem, least = str(error), 0.0
                if isinstance(error, urllib.error.HTTPError):
                    problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                    if error.code not in RETRIED_STATUS:
                        raise JudgeError(f"{self.endpoint.base_url}: {problem}") from error
                    least = _retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                # Time-outs, dropped connections, truncated or foreign JSON.
                problem, least = f"{type(error).__name__}: {error}", 0.0
            if attempt + 1 < self.endpoint.max_tries:
                backoff = min(self.endpoint.max_wait_s, 2.0**attempt) * random.uniform(0.5, 1.0)
                self.sleep(max(least, backoff))
        raise JudgeError(f"{self.endpoint.base_url}: no reply in {self.endpoint.max_tries} tries, the last: {problem}")

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            rate = self.endpoint.requests_per_minute
            self._next_start = start + (60.0 / rate if rate else 0.0)
        if start > now:
            self.sleep(start - now)

    def _send(self, request: dict[str, Any]) -> Reply:
        key = os.environ.get(self.endpoint.api_key_variable)
        headers = {"Content-Type": "application/json", **(self._form.headers(key) if key else {})}
        url = self.endpoint.base_url.rstrip("/") + self._form.path(self.endpoint.model)
        post = urllib.request.Request(url, json.dumps(request).encode(), headers, method="POST")
        with urllib.request.urlopen(post, timeout=self.endpoint.timeout_s) as response:
            return Reply(*self._form.reply(json.load(response)))


def client_of(given: Mapping[str, Any], cache_dir: str, name: str = "judge") -> Client:
    """The client of the options below `name`, which are the fields of `Endpoint`.

    Raises:
        ConfigError: an unknown key, or no base_url or model.
    """
    settings = {"cache_dir": cache_dir, **given}
    known = [item.name for item in fields(Endpoint)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{name}.{key}: unknown key; {nearest(key, known, f'{name}.')}")
    for key in ("base_url", "model"):
        if key not in settings:
            raise ConfigError(f"{name}.{key}: no value was given, and it is needed; set {name}.{key}=...")
    if (form := settings.get("form", "openai")) not in forms.FORMS:
        raise ConfigError(f"{name}.form={form}: expected one of {', '.join(forms.FORMS)}")
    return Client(Endpoint(**settings))


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header (a number or a date) asks for."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def _read_ledger(path: Path) -> float:
    """Sum of a ledger; a last line that was cut off goes, since its request was not sent."""
    if not path.is_file():
        return 0.0
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return float(sum(json.loads(line)["cost"] for line in whole.splitlines()))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """All of it or nothing, also when two threads write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)
    os.replace(file.name, path)
