"""A headless Chromium, spoken to through its DevTools protocol over a pipe: pages are opened as a user sees them."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
SECONDS = 60.0
# The protocol's pipe is descriptors 3 and 4.
START = (
    "import fcntl, os, sys; a, b = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]); "
    "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[3], sys.argv[3:])"
)

# What sticks out to the right of the window, unless something around it scrolls; the boxes of figures and drawings.
MEASURE = """(() => {
  const scrolls = (e) => {
    for (; e; e = e.parentElement) if (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX)) return true;
  };
  const wide = document.documentElement.clientWidth, out = [];
  for (const e of document.body.querySelectorAll("*")) {
    const b = e.getBoundingClientRect();
    const outside = b.width && b.right > wide + 1 && !e.closest("svg *");
    if (outside && !scrolls(e.parentElement)) out.push(e.tagName + ": " + Math.round(b.right));
  }
  // A drawing for screens of another width is not shown, and neither is what is folded up.
  const shown = (e) => e.getClientRects().length && !e.closest("details:not([open])");
  const box = (e) => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
  return {
    wide, scrolled: document.documentElement.scrollWidth, high: document.documentElement.scrollHeight, out,
    drawings: [...document.querySelectorAll("svg, figure, .bars b")].filter(shown).map(box),
    small: [...document.querySelectorAll("svg")].filter(shown).map((e) => e.viewBox.baseVal && e.viewBox.baseVal.width
      ? e.getBoundingClientRect().width / e.viewBox.baseVal.width : 1),
    text: document.body.innerText,
  };
})()"""


def executable() -> str | None:
    """Where a Chromium is, or None."""
    return next((found for name in EXECUTABLES if (found := shutil.which(name))), None)


@dataclass
class Look:
    """What was seen of a page at one width."""

    wide: int  # of the window
    scrolled: int  # what the page takes
    high: int
    out: list[str]  # elements that stick out of the window
    drawings: list[tuple[float, float]]
    small: list[float]  # how much each drawing is scaled
    text: str
    picture: bytes  # PNG of the whole page
    said: list[str] = field(default_factory=list)  # console, exceptions, the browser's own log
    asked: list[str] = field(default_factory=list)  # addresses beside the page itself


class Browser:
    """One process and its pipe."""

    def __init__(self, process: subprocess.Popen[bytes], send: int, receive: int) -> None:
        self.process, self.send, self.receive = process, send, receive
        self.buffer, self.events, self.number = b"", [], 0

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receive], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self.receive, 1 << 20)
            assert more, "the browser has ended"
            self.buffer += more
        raw, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(raw)

    def call(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        """Call a method of the protocol; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": values} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.send, data) :]
        deadline = time.monotonic() + SECONDS
        while (answer := self._message(deadline)).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, method: str) -> None:
        """Wait for an event."""
        deadline = time.monotonic() + SECONDS
        while all(event["method"] != method for event in self.events):
            self.events.append(self._message(deadline))

    @contextmanager
    def opened(self, page: Path, width: int, height: int = 900) -> Iterator[str]:
        """Open a file in a new tab of a width in pixels and give the tab's session."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.events.clear()
        assert "errorText" not in self.call("Page.navigate", session, url=page.as_uri()), page
        self.wait("Page.loadEventFired")
        yield session
        self.call("Target.closeTarget", targetId=target)

    def look(self, page: Path, width: int, opened: bool = False) -> Look:
        """Look at a page, with every `<details>` opened if wished."""
        with self.opened(page, width) as session:
            if opened:
                self.evaluate(session, "document.querySelectorAll('details').forEach((e) => { e.open = true; })")
            seen = self.evaluate(session, MEASURE)
            clip = {"x": 0, "y": 0, "width": width, "height": seen["high"], "scale": 1}
            shot = self.call("Page.captureScreenshot", session, format="png", captureBeyondViewport=True, clip=clip)["data"]
        said, asked = [], []
        for event in self.events:
            values = event.get("params", {})
            if event["method"] == "Runtime.consoleAPICalled":
                said.append(" ".join(str(a.get("value", a.get("description"))) for a in values["args"]))
            elif event["method"] == "Runtime.exceptionThrown":
                said.append(values["exceptionDetails"].get("exception", {}).get("description", "exception"))
            elif event["method"] == "Log.entryAdded":
                said.append(values["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent" and values["request"]["url"] != page.as_uri():
                asked.append(values["request"]["url"])
        return Look(**seen, picture=base64.b64decode(shot), said=said, asked=asked)

    def evaluate(self, session: str, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a Chromium with a profile of its own in `folder`."""
    path = executable()
    assert path is not None
    ours, to_browser = os.pipe(), os.pipe()

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-dev-shm-usage"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(to_browser[0]), str(ours[1]), path, *options, *quiet, "--hide-scrollbars"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(to_browser[0], ours[1]),
    )
    os.close(to_browser[0])
    os.close(ours[1])
    found = Browser(process, to_browser[1], ours[0])
    try:
        yield found
        found.call("Browser.close")
    finally:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_browser[1])
        os.close(ours[0])
