"""The page in a real browser: headless Chromium, with a WAV for a microphone."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from qwen2audio_train.export import export
from tests.evaluation.tiny import SAMPLES, noise, tiny_model, tiny_tokenizer
from tests.launch.scripts import LAUNCH, ROOT

pytest.importorskip("gradio", reason="the extra `chat`")
sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE_MS = 60_000

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    soundfile.write(path, noise(np.random.default_rng(0), 2.0), 16_000)
    return path


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """launch/chat.py with two small random models."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "mine")):
        export(tiny_model(seed), tiny_tokenizer(), SAMPLES, folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = [f"checkpoints.{name}={folder / name}" for name in ("base", "mine")]
    command = [sys.executable, str(LAUNCH / "chat.py"), *keys, f"port={port}", "max_new_tokens=8", "num_threads=1"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    try:
        yield waited_for(f"http://127.0.0.1:{port}/", process)
    finally:
        process.terminate()
        process.wait()


def waited_for(address: str, process: subprocess.Popen[bytes]) -> str:
    while True:
        assert process.poll() is None, "the page ended"
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return address


@pytest.fixture
def page(address: str, speech: Path) -> Iterator[Any]:
    """The page in a browser that is allowed the microphone; no request may leave the machine."""
    fake = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *fake, f"--use-file-for-fake-audio-capture={speech}"]
        )
        page = browser.new_context(permissions=["microphone"], viewport={"width": 1280, "height": 1000}).new_page()
        page.set_default_timeout(PATIENCE_MS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        browser.close()
    own = re.compile(rf"^(?:{re.escape(address)}|blob:|data:)")
    assert [url for url in asked if not own.match(url)] == []


def answered(page: Any, turns: int) -> list[str]:
    """The last answer of both talkers when each has given so many, and the boxes are still."""
    found = []
    for number in (0, 1):
        bubbles = page.locator(f"#talker-{number} .bot.message")
        sync_api.expect(bubbles).to_have_count(turns, timeout=PATIENCE_MS)
        found.append(bubbles.last.inner_text())
    return found


def test_a_recording_and_a_file_are_answered_by_both(page: Any, speech: Path, tmp_path: Path) -> None:
    def press(name: str) -> None:
        page.get_by_role("button", name=name, exact=True).click()

    press("Record")
    page.wait_for_timeout(1500)
    press("Stop")
    page.locator("#spectrogram img").wait_for()
    press("Send")
    assert all(answered(page, 1))
    assert page.locator("#talker-0 .user.message").count() == 1
    page.get_by_role("radio", name="audio analysis").check()
    page.get_by_role("button", name="Upload file").click()
    page.locator("#recording input[type=file]").set_input_files(speech)
    page.locator("#spectrogram img").wait_for()
    press("Add another clip")
    sync_api.expect(page.locator("#held")).to_contain_text("1 clip(s) held")
    page.locator("#question textarea").fill("What is heard?")
    press("Send")
    assert all(answered(page, 2))
    sync_api.expect(page.locator("#talker-1 .user.message").last).to_contain_text("What is heard?")
    page.screenshot(path=str(tmp_path / "page.png"))
    press("Send")
    page.get_by_text("write a question").wait_for()
    press("New conversation")
    sync_api.expect(page.locator("#talker-0 .bot.message")).to_have_count(0, timeout=PATIENCE_MS)
