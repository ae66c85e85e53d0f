"""The loop that `docs/guides/driving-a-robot.md` shows, as it stands there."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from policy_server import serving

from prismatic.vla.robots import LIBERO

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guides" / "driving-a-robot.md"


class Robot:
    """Is shown to do what it is sent; looks once for longer than a control step; the server dies after 8 actions and is
    back when the operator says go."""

    def __init__(self) -> None:
        self.sent: list[np.ndarray] = []
        self.reasons: list[str] = []
        self.server_lives = True

    def observe(self) -> dict[str, Any]:
        if len(self.sent) == 1:
            time.sleep(1.5 / LIBERO.control_rate_hz)
        return {"full_image": np.zeros((4, 4, 3), np.uint8), "state": np.full(8, float(len(self.sent)))}

    def send(self, values: np.ndarray) -> None:
        self.sent.append(values)
        self.server_lives = self.server_lives and len(self.sent) < 8

    def operator_says_go(self, reason: str) -> bool:
        self.reasons.append(reason)
        self.server_lives = True
        self.send = self.sent.append  # type: ignore[method-assign]
        return True

    def is_done(self) -> bool:
        return len(self.reasons) > 0 and bool(self.sent[-1][:6].any())


def test_the_loop_of_the_guide_drives_holds_and_goes_on() -> None:
    (code,) = re.findall(r"```python\n(import time.*?)```", GUIDE.read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), namespace)
    robot = Robot()

    def infer(message: dict[str, Any]) -> dict[str, Any] | None:
        if not robot.server_lives:
            return None
        return {"actions": np.tile([0.1] * 6 + [1.0], (8, 1)), "id": message["id"]}

    with serving(infer, {"convention": "lightvla", "robot": LIBERO.to_json(), "echoes_id": True}) as url:
        namespace["drive"](robot, url, "put the bowl on the plate")
    moved = ["A" if values[:6].any() else "." for values in robot.sent]
    assert re.fullmatch(r"\.*A[A.]*\.\.\.+A", "".join(moved)), moved
    assert "no action for" in robot.reasons[0] and "closed the connection" in robot.reasons[0]


def test_the_robots_side_takes_the_packages_that_the_guide_installs() -> None:
    (packages,) = re.findall(r"pip install (.*) && pip install --no-deps -e \.\n", GUIDE.read_text())
    allowed = set(re.findall(r"(?:^|\s)'?(\w+)", packages)) | {"prismatic"}
    code = (
        "import sys; before = set(sys.modules)\n"
        "import prismatic.serving.client, prismatic.serving.runner, prismatic.recordings.steps, prismatic.vla.robots\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    names = {name for name in loaded.split() if "cython" not in name}  # compiled modules share those
    assert names == allowed
