"""A headless Chromium for tests of pages, controlled by the DevTools protocol over two pipes, without a driver."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from support.launching import clean_environment

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
HOW_TO_INSTALL = "no Chromium on this machine: apt-get update && apt-get install -y --no-install-recommends chromium"


def find_chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page of one browser; close it, or use it in a `with` statement.

    complaints: warnings and errors that the page or the browser wrote to the console since the last `show`.
    requests: the addresses that were requested since then.
    """

    def __init__(self, chromium: str, profile: Path) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._messages = 0
        self._buffer = b""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium uses descriptors 3 and 4: a shell moves the pipes there, from numbers that are neither
        to_browser, from_browser = _moved_up(to_browser), _moved_up(from_browser)
        command = [
            "bash",
            "-c",
            f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}',
            chromium,
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command,
            env=clean_environment(),
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._session = None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, **params: object) -> dict:
        """Sends a command and returns its result; AssertionError with the browser's message when it fails."""
        self._messages += 1
        message = {"id": self._messages, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._messages:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def show(self, path: Path, *, width: int, height: int = 900, scheme: Literal["light", "dark"] = "light") -> None:
        """Loads a file in a window of that size, and clears complaints and requests."""
        self.complaints.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 30
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            assert time.monotonic() < deadline, f"{path} does not finish loading"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> object:
        """The JSON value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page from top to bottom, or of the window only."""
        shot = self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=whole,
            **(
                {
                    "clip": {
                        "x": 0,
                        "y": 0,
                        "scale": 1,
                        **self.evaluate(
                            "({width: document.documentElement.clientWidth, height: document.documentElement.scrollHeight})"
                        ),
                    }
                }
                if whole
                else {}
            ),
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(20)

    def _receive(self, timeout_s: float = 60) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], timeout_s)
            assert ready, f"no message from Chromium for {timeout_s:.0f} s"
            read = os.read(self._read, 1 << 20)
            assert read, f"Chromium ended with {self._process.wait(20)}"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(message)
        self._notice(answer.get("method"), answer.get("params", {}))
        return answer

    def _notice(self, method: str | None, params: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            self.complaints.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


def _moved_up(descriptor: int) -> int:
    """A descriptor of the same file with a number of at least 10; the old one is closed."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


def too_wide(page: Page, width: int) -> Sequence[str]:
    """The elements that reach beyond `width` and are not inside a box that scrolls by itself."""
    return page.evaluate(f"""[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") &&
        e.getBoundingClientRect().right > {width} + 0.5).map(
        e => e.tagName + "." + e.getAttribute("class") + " " + e.textContent.slice(0, 40))""")
