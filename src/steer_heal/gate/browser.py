"""A headless Chromium for checks of a served page, driven by its DevTools protocol over two pipes."""

from __future__ import annotations

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

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--window-size=1400,1000"]

# Chromium reads from descriptor 3 and writes to 4.
START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page. `requested` has the addresses that it asked for, `complaints` the errors in its console."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back, self.unread, self.number, self.session = to, back, b"", 0, ""
        self.requested: list[str] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, wanted: Any, seconds: float = 60) -> None:
        """Wait until an expression has a value; fails after some time."""
        end = time.monotonic() + seconds
        while (value := self.run(script)) != wanted:
            assert time.monotonic() < end, f"{script} is {value}, not {wanted}"
            time.sleep(0.1)

    def _call(self, method: str, **params: Any) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            self._note(said)
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]

    def _note(self, said: dict) -> None:
        about = said.get("params", {})
        match said.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(about["request"]["url"])
            case "Log.entryAdded" if about["entry"]["level"] == "error":
                self.complaints.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(about["exceptionDetails"]))

    def _next(self, seconds: float = 60) -> dict:
        while b"\0" not in self.unread:
            assert select.select([self.back], [], [], seconds)[0], "the browser does not answer"
            more = os.read(self.back, 1 << 16)
            assert more, "the browser has ended"
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\0")
        return json.loads(line)


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in a folder, until the block ends."""
    read_there, to = os.pipe()
    back, write_there = os.pipe()
    call = [CHROMIUM, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={folder}/profile"]
    start = [sys.executable, "-c", START, str(read_there), str(write_there), *call]
    with (folder / "browser.log").open("wb") as log:
        running = subprocess.Popen(start, pass_fds=(read_there, write_there), stdout=log, stderr=log)
    os.close(read_there)
    os.close(write_there)
    try:
        yield Browser(to, back)
    finally:
        running.kill()
        running.wait()
        os.close(to)
        os.close(back)
