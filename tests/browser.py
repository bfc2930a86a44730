"""A headless Chromium driven over its DevTools protocol, through two pipes: no port, no further package."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
SECONDS = 60.0  # for one answer, on a machine that does other things too
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)


def found() -> str | None:
    """The browser: what CHROME names, else one on the PATH."""
    return os.environ.get("CHROME") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser; a context manager.

    Args:
        program: of Chromium or Chrome. profile: an empty folder for what it keeps.

    Attributes:
        complaints: what the console has said so far: errors, warnings and exceptions.
    """

    def __init__(self, program: str, profile: Path) -> None:
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()

        def at_3_and_4() -> None:  # where the browser looks for them
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
            for end, place in zip(ends, (3, 4), strict=True):
                os.dup2(end, place)

        with open(profile / "log", "wb") as log:
            self._process = subprocess.Popen(
                [program, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
                preexec_fn=at_3_and_4, close_fds=False, stdout=log, stderr=log,
            )  # fmt: skip
        for end in (read, write):
            os.close(end)
        self._number, self._rest, self._session = 0, b"", ""
        self.complaints: list[str] = []
        self._loaded = False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._in, self._out):
            os.close(end)

    def open(self, address: str, width: int, *, dark: bool = False, media: str = "", height: int = 900) -> None:
        """Load a page at a width in CSS pixels, and wait for it."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=scheme)
        self._loaded = False
        self.ask("Page.navigate", url=address)
        until = time.monotonic() + SECONDS
        while not self._loaded and time.monotonic() < until:
            self._hear(self._message())

    def value(self, script: str) -> Any:
        """What a JavaScript expression comes to."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def ask(self, method: str, **options: Any) -> dict[str, Any]:
        """One command of the protocol and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": options}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self._hear(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _hear(self, event: dict[str, Any]) -> None:
        method, said = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], SECONDS)[0]:
                raise TimeoutError(f"the browser said nothing for {SECONDS:.0f} s")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("the browser has gone")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found
