"""The controls of `lightvla play` in headless Chromium, without a simulator behind them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from browser import Visit, chromium

from experiments.robot.libero.play import routes
from experiments.robot.libero.play.moves import FARTHEST_M

FOLDER = Path(routes.__file__).parent
PAGE = """<!doctype html><title>play</title><link rel="icon" href="data:,"><div id="panel" hidden></div>
<p id="watches"></p><script type="module" src="/play/panel.js"></script>"""
STATE: dict[str, Any] = {
    "phase": "paused", "said": "", "instruction": "lift it", "initial_state": 30, "offsets": {}, "steps": 0,
    "max_steps": 300, "success": False, "goals": [], "num_initial_states": 50, "fixtures": {}, "hand": None,
    "tasks": [{"index": 0, "instruction": "lift it", "is_trained": True}], "speed": None,
    "starts": {"plate_1": [0.0, 0.0]}, "places": {"plate_1": [0.0, 0.0]}, "pruners": ["none"], "pruner": "none",
}  # fmt: skip


@contextmanager
def refusing(asked: list[dict[str, Any]]) -> Iterator[str]:
    """The address of a server that shows one state and refuses whatever is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files = {"/play/panel.js": "text/javascript", "/play/panel.css": "text/css"}
            if self.path in files:
                self._answer(200, (FOLDER / Path(self.path).name).read_text(), files[self.path])
            elif self.path == "/play/state":
                self._answer(200, json.dumps(STATE), "application/json")
            else:
                self._answer(200, PAGE, "text/html")

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(422, json.dumps({"error": "there is no such place"}), "application/json")

        def _answer(self, status: int, text: str, kind: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_refusal_stays_and_the_fields_say_what_holds() -> None:
    asked: list[dict[str, Any]] = []
    with refusing(asked) as address, chromium() as browser:
        panel = Visit(browser, address).page.locator("#panel")
        panel.get_by_text("Ready.").wait_for()
        assert panel.get_by_role("button", name="Pause").is_disabled()
        left, state = panel.get_by_label("to the left, cm"), panel.get_by_label("Initial state")
        left.fill("60")
        left.press("Enter")
        panel.get_by_text("there is no such place").wait_for()
        panel.page.wait_for_timeout(800)  # the state was asked for again
        assert panel.get_by_text("there is no such place").is_visible() and left.input_value() == "0"
        assert asked[0]["offsets"] == {"plate_1": [0, FARTHEST_M]}
        state.fill("7")
        state.press("Enter")
        panel.page.wait_for_function("document.querySelector('#panel [type=number]').value === '30'")
        assert asked[1]["initial_state"] == 7
