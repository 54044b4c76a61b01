"""A headless Chromium and what a page does in it, over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-sync", "--disable-background-networking"),
    *("--disable-component-update", "--remote-debugging-pipe"),
)


class Page:
    """An open page.

    Attributes:
        requests: What it asked for, without itself and data in it.
        complaints: What the console and the log have of it.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._buffer, self._count = read, write, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[Any] = []

    def open(self, file: Path) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self._address = file.as_uri()
        self.call("Page.navigate", url=self._address)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def width_in(self, width: int) -> int:
        """How wide the document is in a window of this width, as on a telephone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True},
        )
        return self.evaluate("document.documentElement.scrollWidth")

    def background(self, scheme: str) -> str:
        """The colour of the page for those who prefer this colour scheme."""
        preferred = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[preferred])
        return self.evaluate("getComputedStyle(document.body).backgroundColor")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"]["value"]

    def screenshot(self, file: Path) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser went away"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(message)
        self._note(event.get("method"), event.get("params"))
        return event

    def _note(self, method: str | None, params: Any) -> None:
        if method == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if address != self._address and not address.startswith("data:"):
                self.requests.append(address)
        elif method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(params)


@contextmanager
def opened(file: Path, profile: Path) -> Iterator[Page]:
    """A page in a browser with a new profile; skips the test where there is no browser."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(_NAMES)}")
    commands, answers = os.pipe(), os.pipe()
    # The protocol is on file descriptors 3 and 4, whatever the pipes are here.
    shell = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", shell, "-", program, *_FLAGS, f"--user-data-dir={profile}"],
        stderr=subprocess.DEVNULL,
        pass_fds=(commands[0], answers[1]),
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        page = Page(answers[0], commands[1])
        page.open(file)
        yield page
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(answers[0])
        os.close(commands[1])
