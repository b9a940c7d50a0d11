"""A headless Chromium that is spoken to over a pipe: the DevTools protocol without a package for it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page.

    Attributes:
        events: What the page has reported since it was opened: ``(method, parameters)``.
    """

    def __init__(self, profile: Path):
        commands, self.write_to = os.pipe()
        self.read_from, answers = os.pipe()

        def as_3_and_4() -> None:  # where --remote-debugging-pipe reads and writes
            high = [os.dup2(commands, 13), os.dup2(answers, 14)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe".split()
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={profile}"],
            preexec_fn=as_3_and_4,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.number, self.buffer, self.events, self.session = 0, b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self) -> dict:
        while b"\0" not in self.buffer:
            received = os.read(self.read_from, 1 << 20)
            assert received, "the browser has ended"
            self.buffer += received
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address: str) -> None:
        """Load a page and wait until it is complete."""
        for url in ("about:blank", address):  # a page that differs in its fragment alone would not be loaded again
            self.events.clear()
            self.call("Page.navigate", url=url)
            while not any(method == "Page.loadEventFired" for method, _ in self.events):
                self._next()

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)
