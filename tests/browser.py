"""A headless Chromium without network for tests of pages, driven over WebDriver (https://www.w3.org/TR/webdriver2/)."""
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1200,900")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"              # what WebDriver calls a reference to an element
START_S = 30


class Browser:
    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        self.at = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*(f"--{flag}" for flag in FLAGS), f"--user-data-dir={profile}"]}
        end = time.monotonic() + START_S
        while True:
            try:
                self.at += "/session/" + self._ask("POST", "/session", {"capabilities": {"alwaysMatch": {
                    "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})["sessionId"]
                break
            except urllib.error.URLError:
                assert time.monotonic() < end and self.process.poll() is None, "chromedriver did not start"
                time.sleep(.05)
        self.devtools("Network.enable")
        self.devtools("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
                      uploadThroughput=0)

    def close(self) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()

    def _ask(self, method: str, path: str, said: dict | None = None):
        request = urllib.request.Request(self.at + path, method=method,
                                         data=None if said is None else json.dumps(said).encode())
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def devtools(self, command: str, **parameters):
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, path) -> None:
        self._ask("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str):
        """The value of a script, which returns it, or a promise of it."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, script: str):
        """The value of a script as soon as it is true."""
        end = time.monotonic() + 10
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"waited in vain: {script}"
            time.sleep(.05)
        return found

    def click(self, selector: str) -> None:
        element = self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        self._ask("POST", f"/element/{element}/click", {})

    def keys(self, selector: str, text: str) -> None:
        element = self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        self._ask("POST", f"/element/{element}/value", {"text": text})

    def mouse(self, *moves) -> None:
        """(x, y) in the window, and "down" and "up" between them."""
        actions = [{"type": "pointerDown" if move == "down" else "pointerUp", "button": 0} if isinstance(move, str) else
                   {"type": "pointerMove", "duration": 60, "x": round(move[0]), "y": round(move[1])} for move in moves]
        self._ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions,
                                                    "parameters": {"pointerType": "mouse"}}]})

    def errors(self) -> list[str]:
        """What the console has said since the last call, as an error or a warning."""
        return [each["message"] for each in self._ask("POST", "/se/log", {"type": "browser"})
                if each["level"] in ("SEVERE", "WARNING")]
