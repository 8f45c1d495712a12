"""Chromium without a window, driven as a person would: a small client of its DevTools protocol.

Messages are JSON ended by a zero byte on the browser's descriptors 3 and 4, so no port and no
package is needed. Source: chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 120.0
"""Seconds that a browser on a busy machine may take for anything."""

_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-default-apps --disable-extensions --remote-debugging-pipe"
)
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """Speaks to a running Chromium; what it tells unasked is kept in `events`."""

    def __init__(self, reads: int, writes: int):
        self._reads, self._writes = reads, writes
        self._ids, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """One command and its result.

        Raises:
            RuntimeError: the browser refuses it.
        """
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reads], [], [], deadline - time.monotonic())
            content = os.read(self._reads, 2**20) if ready else b""
            if not content:
                raise RuntimeError("chromium says nothing any more")
            self._rest += content
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self) -> Page:
        """A new empty page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        return Page(self, attached["sessionId"], target)


class Page:
    """One page: what it shows, what it said, what it asked for."""

    def __init__(self, browser: Browser, session: str, target: str):
        self._browser, self._session, self._target = browser, session, target
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        told = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true, as the page's language has it."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"never: {script}\n{self.text()}"
            time.sleep(0.02)

    def text(self) -> str:
        """What a reader sees."""
        return self.run("document.body.innerText")

    def click(self, selector: str) -> None:
        """Move there, press the mouse's button and let it go."""
        at = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = node.getBoundingClientRect();"
            "return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at, button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """Type in place of what a field holds."""
        self.click(selector)
        self.call("Input.dispatchKeyEvent", type="keyDown", commands=["selectAll"])
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Another window size and colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, path: Path, *, whole: bool = True) -> Path:
        """The page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def problems(self, *, answers: bool = True) -> list[str]:
        """Exceptions, errors and warnings of the console since the page was opened.

        Args:
            answers: with what the browser says of requests that failed or were refused.
        """
        self.run("0")  # what was told until now has come
        found = []
        for event in self._own():
            what, kind = event["params"], event["method"]
            if kind == "Runtime.exceptionThrown":
                found.append(str(what["exceptionDetails"]))
            elif kind == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning"):
                found.append(str(what["args"]))
            elif kind == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
                if what["entry"]["source"] == "network" and not answers:
                    continue
                found.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        return found

    def requests(self) -> list[str]:
        """The URL of everything that was asked for."""
        self.run("0")
        return [event["params"]["request"]["url"] for event in self._own()
                if event["method"] == "Network.requestWillBeSent"]  # fmt: skip

    def _own(self) -> list[dict[str, Any]]:
        return [e for e in self._browser.events if e.get("sessionId") == self._session]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; it ends with the block."""
    assert CHROMIUM is not None
    # The child's ends lie above 4, so that putting them at 3 and 4 overwrites neither.
    inward, outward = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (inward[0], outward[1])]
    os.close(inward[0])
    os.close(outward[1])
    command = [sys.executable, "-c", _LAUNCH, *map(str, theirs)]
    command += [CHROMIUM, *_OPTIONS.split(), f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for fd in theirs:
        os.close(fd)
    try:
        browser = Browser(outward[0], inward[1])
        yield browser
        browser.call("Browser.close")
    finally:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(inward[1])
        os.close(outward[0])
