"""A real Chromium, spoken to over the DevTools protocol."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--remote-debugging-port=0",
)
# The page changes by itself; a MutationObserver tells when the element is there.
WHEN_THERE = """new Promise((there) => {
  const look = () => document.querySelector(%s) && (watcher.disconnect(), there(true));
  const watcher = new MutationObserver(look);
  watcher.observe(document, {childList: true, subtree: true, attributes: true});
  look();
})"""


def find_chromium() -> str | None:
    """The command of an installed Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page."""

    def __init__(self, command: str, profile: Path) -> None:
        self._process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        self._connection = connect(self._page_address(), max_size=None, legacy=True)
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    def _page_address(self) -> str:
        assert self._process.stderr is not None
        port = next(
            filter(None, (re.search(r"listening on ws://.*:(\d+)/", line) for line in self._process.stderr))
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/json") as reply:
            pages = json.load(reply)
        return next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol; events that come meanwhile are kept."""
        self._calls += 1
        self._connection.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, url: str) -> None:
        """Go to a page and wait for its document."""
        self.call("Page.navigate", url=url)

    def script(self, expression: str) -> Any:
        """The value of an expression in the page."""
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait_for(self, selector: str) -> None:
        """Until an element is there."""
        assert self.script(WHEN_THERE % json.dumps(selector))

    def click(self, selector: str) -> None:
        """Click an element once it is there."""
        self.wait_for(selector)
        self.script(f"document.querySelector({json.dumps(selector)}).click()")

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        self.wait_for(selector)
        return str(self.script(f"document.querySelector({json.dumps(selector)}).innerText"))

    def choose_file(self, selector: str, file: Path) -> None:
        """Put a file into a file field."""
        self.wait_for(selector)
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def requested(self) -> list[str]:
        """The addresses that the page asked for."""
        sent = [
            event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"
        ]
        return [params["request"]["url"] for params in sent]

    def complaints(self) -> list[str]:
        """Exceptions and errors of the page's console."""
        thrown = [event for event in self.events if event.get("method") == "Runtime.exceptionThrown"]
        logged = [event for event in self.events if event.get("method") == "Log.entryAdded"]
        errors = [event for event in logged if event["params"]["entry"]["level"] == "error"]
        return [json.dumps(event["params"]) for event in (*thrown, *errors)]
