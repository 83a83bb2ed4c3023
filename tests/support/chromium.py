"""Drive a headless Chromium through its DevTools pipe: open a page, inspect it, and collect its console messages.

https://chromedevtools.github.io/devtools-protocol/ with --remote-debugging-pipe. Messages are JSON with a null byte at
the end. Chromium reads them from file descriptor 3 and writes them to 4.
"""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

EXECUTABLE = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(EXECUTABLE is None, reason="chromium is not installed (apt-get install chromium)")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Chromium:
    """One browser with one tab; a context manager."""

    def __init__(self) -> None:
        assert EXECUTABLE is not None
        self.folder = tempfile.TemporaryDirectory(prefix="flapp-chromium-", ignore_cleanup_errors=True)
        theirs_in, self.writer = _pipe()
        self.reader, theirs_out = _pipe()
        command = [EXECUTABLE, *FLAGS, "--hide-scrollbars", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self.folder.name}", "about:blank"]
        script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        words = ["bash", "-c", script, "chromium", *command]
        self.process = subprocess.Popen(words, pass_fds=(theirs_in, theirs_out), **silent)
        os.close(theirs_in)
        os.close(theirs_out)
        self.unread = bytearray()
        self.number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.writer)
        os.close(self.reader)
        self.folder.cleanup()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]  # type: ignore[no-any-return]

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file on a screen of this size."""
        self.events.clear()
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Return console messages, exceptions and log entries since the page was opened."""
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in said]

    def requests(self) -> list[str]:
        """Return the URLs requested since the page was opened, except data: URLs."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent if not each["request"]["url"].startswith("data:")]

    def _read(self) -> dict[str, Any]:
        while (end := self.unread.find(b"\0")) < 0:
            if not (more := os.read(self.reader, 1 << 20)):
                raise RuntimeError("chromium has ended")
            self.unread += more
        found = json.loads(self.unread[:end])
        del self.unread[: end + 1]
        return found


def _pipe() -> tuple[int, int]:
    """Return the two ends of a pipe; neither is 3 or 4, because the browser's ends get these numbers."""
    ends = os.pipe()
    above = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return above[0], above[1]
