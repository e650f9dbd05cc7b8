"""A headless Chromium, spoken to over a pipe in its DevTools protocol: no driver, no port."""

import base64
import fcntl
import itertools
import json
import os
import select
import signal
import time
from pathlib import Path

_PLACES = map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser"))
CHROMIUM = next((path for path in _PLACES if path.exists()), None)
_FLAGS = (
    "--headless=new --no-sandbox --no-first-run --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe "
    "--disable-background-networking --disable-component-update --disable-extensions --hide-scrollbars "
    "--no-proxy-server"
)
PATIENCE = 60.0


class Browser:
    """One browser in a process of its own; each page is a fresh profile."""

    def __init__(self, home):
        read, self._out = _pipe()
        self._in, write = _pipe()
        log = os.open(f"{home}/chromium.log", os.O_WRONLY | os.O_CREAT, 0o600)
        ends = ((log, 1), (log, 2), (read, 3), (write, 4))  # the log first: it may be 3 or 4 itself
        actions = [(os.POSIX_SPAWN_DUP2, *end) for end in ends]
        command = [str(CHROMIUM), *_FLAGS.split(), f"--user-data-dir={home}/profile"]
        environment = {**os.environ, "HOME": str(home), "TZ": "UTC"}
        self._pid = os.posix_spawn(CHROMIUM, command, environment, file_actions=actions, setpgroup=0)
        for fd in (read, write, log):
            os.close(fd)
        self._numbers, self._unread, self.events = itertools.count(1), b"", []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)

    def page(self, *, script=True, token=None):
        return Page(self, script=script, token=token)

    def ask(self, method, session=None, **parameters):
        """Send a command and return its result; what happens meanwhile is in ``events``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            said = self.hear()
            if said.get("id") == number:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return said["result"]
            self.events.append(said)

    def hear(self):
        """Wait for one message."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._unread:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium has said nothing for {PATIENCE:.0f} s")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


class Page:
    """One tab of its own profile. ``requests`` and ``complaints`` are of the page that was opened last."""

    def __init__(self, browser, *, script, token):
        self.browser = browser
        self.profile = browser.ask("Target.createBrowserContext")["browserContextId"]
        target = browser.ask("Target.createTarget", url="about:blank", browserContextId=self.profile)["targetId"]
        self._session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setFocusEmulationEnabled", enabled=True)  # who has no focus may not copy
        self.look(width=1280)
        self.ask("Emulation.setScriptExecutionDisabled", value=not script)
        if token is not None:
            basic = base64.b64encode(f"me:{token}".encode()).decode()
            self.ask("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {basic}"})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.browser.ask("Target.disposeBrowserContext", browserContextId=self.profile)

    def ask(self, method, **parameters):
        return self.browser.ask(method, self._session, **parameters)

    def open(self, url):
        """Go to a page, and wait until it has loaded; returns its status."""
        self.browser.events.clear()
        failed = self.ask("Page.navigate", url=url).get("errorText")
        while not failed and not self._events("Page.loadEventFired"):
            self.browser.events.append(self.browser.hear())
        self.run("document.fonts.ready.then(() => 1)")
        answers = [e["response"] for e in self._events("Network.responseReceived") if e["type"] == "Document"]
        return answers[-1]["status"] if answers else failed

    def look(self, *, width, dark=False):
        """Be a window of some width, on a machine with light or dark windows."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[theme])

    @property
    def requests(self):
        """The addresses that the page has asked for."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    @property
    def complaints(self):
        """What the browser's console says."""
        logged = [event["entry"]["text"] for event in self._events("Log.entryAdded")]
        logged += [str(event["args"]) for event in self._events("Runtime.consoleAPICalled")]
        return logged + [event["exceptionDetails"]["text"] for event in self._events("Runtime.exceptionThrown")]

    def run(self, expression):
        """Evaluate JavaScript in the page, which works where the page's own is off."""
        said = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in said:
            raise RuntimeError(said["exceptionDetails"])
        return said["result"].get("value")

    def picture(self):
        """The whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def _events(self, method):
        mine = (event for event in self.browser.events if event.get("sessionId") == self._session)
        return [event["params"] for event in mine if event["method"] == method]


def _pipe():
    """A pipe whose ends are above those that the browser is given."""
    ends = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in ends]
    for fd in ends:
        os.close(fd)
    return high
