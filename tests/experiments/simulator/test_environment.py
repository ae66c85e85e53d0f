"""The environment against LIBERO's own, against a fresh process, and against SciPy."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from experiments.robot.libero.settings.suite_names import SUITES, task_count
from experiments.robot.libero.simulator import backend as simulator
from experiments.robot.libero.simulator.backend import (
    RenderingUnavailable,
    check_rendering,
    choose_backend,
    draw_on_own_gpu,
    egl_device,
    nvidia_gpus,
    render_on_gpu,
)
from experiments.robot.libero.simulator.environment import LiberoEnvironment, quaternion_to_axis_angle
from experiments.robot.libero.simulator.renderer import renderer_class
from experiments.robot.libero.simulator.tasks import get_suite, load_task
from experiments.robot.libero.simulator.wide_starts import Displacement

SIZE = 64
ROOT = Path(__file__).parents[3]

# LIBERO's and robosuite's own cameras and state, prepared as published evaluations do.
_LIBERO_ITSELF = """
import os, sys
import numpy as np
from libero.libero import benchmark
from libero.libero.envs import OffScreenRenderEnv
suite = benchmark.get_benchmark_dict()["libero_goal"]()
size = int(sys.argv[2])
env = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(8), camera_heights=size, camera_widths=size)
env.seed(5)
env.reset()
env.set_init_state(suite.get_task_init_states(8)[3])
for number, action in enumerate([[0, 0, 0, 0, 0, 0, -1]] * 10 + [[0.3, -0.2, 0.1, 0, 0, 0.2, 1]] * 5):
    observation, *_ = env.step(action)
    if number == 9:
        # Its observation is drawn 2 ms before the end of a step; this is the same picture at the end.
        images = {
            key: env.sim.render(camera_name=key, width=size, height=size)[::-1, ::-1]
            for key in ("agentview", "robot0_eye_in_hand")
        }
        for key, image in images.items():
            assert np.abs(image.astype(int) - observation[f"{key}_image"][::-1, ::-1]).mean() < 0.5
np.savez(
    sys.argv[1],
    full_image=images["agentview"],
    wrist_image=images["robot0_eye_in_hand"],
    position=observation["robot0_eef_pos"],
    quaternion=observation["robot0_eef_quat"],
    fingers=observation["robot0_gripper_qpos"],
)
os._exit(0)
"""

_FRESH_PROCESS = """
import sys
import numpy as np
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from experiments.robot.libero.simulator.wide_starts import Displacement
from experiments.robot.libero.simulator.tasks import SUITES
with LiberoEnvironment(load_task("libero_goal", 8), int(sys.argv[2])) as environment:
    environment.reset(3, seed=5, displacement=Displacement(0.06, seed=1, trial=2))
    np.savez(sys.argv[1], **environment.observe())
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(load_task("libero_goal", 8), SIZE) as environment:
        yield environment


def run_alone(code: str, file: Path) -> dict[str, np.ndarray]:
    variables = {**os.environ, "MUJOCO_GL": choose_backend(), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(file), str(SIZE)], check=True, capture_output=True, env=variables)
    with np.load(file) as arrays:
        return dict(arrays)


def test_pixels_and_state_are_those_of_libero_itself(environment: LiberoEnvironment, tmp_path: Path) -> None:
    expected = run_alone(_LIBERO_ITSELF, tmp_path / "libero.npz")
    environment.reset(3, seed=5)
    for key in ("full_image", "wrist_image"):
        # Positions agree to 1e-9 m, which may tip a pixel on an edge.
        assert np.mean(environment.frame(key) != expected[key]) < 1e-3
    for _ in range(5):
        environment.step([0.3, -0.2, 0.1, 0, 0, 0.2, 1])
    turn = quaternion_to_axis_angle(expected["quaternion"])
    state = np.concatenate([expected["position"], turn, expected["fingers"]])
    np.testing.assert_allclose(environment.state(), state, atol=1e-6)


def test_a_reset_depends_on_its_arguments_only(environment: LiberoEnvironment, tmp_path: Path) -> None:
    expected = run_alone(_FRESH_PROCESS, tmp_path / "fresh.npz")
    global_state = np.random.get_state()[1].copy()
    environment.reset(1, seed=2)
    environment.step(np.ones(7))
    state = environment.task.init_states[3]
    for initial_state in (3, state):
        environment.reset(initial_state, seed=5, displacement=Displacement(0.06, seed=1, trial=2))
        found = environment.observe()
        assert set(found) == set(expected)
        for key, value in found.items():
            np.testing.assert_array_equal(value, expected[key])
    np.testing.assert_array_equal(np.random.get_state()[1], global_state)


def test_the_seed_places_the_fixtures(environment: LiberoEnvironment) -> None:
    places = []
    for seed in (0, 1, 0):
        environment.reset(0, seed=seed)
        places.append(environment.model.body_pos.copy())
    assert np.array_equal(places[0], places[2])
    assert not np.array_equal(places[0], places[1])


def test_policy_actions_have_their_gripper_mapped(environment: LiberoEnvironment) -> None:
    widths = {}
    for gripper in (0.0, 1.0):
        environment.reset(0)
        for _ in range(15):
            environment.step_policy([0, 0, 0, 0, 0, 0, gripper])
        fingers = environment.state()[6:]
        widths[gripper] = fingers[0] - fingers[1]
    assert widths[1.0] > 0.07 > 0.03 > widths[0.0]


def test_a_restored_pose_looks_as_it_did(environment: LiberoEnvironment) -> None:
    environment.reset(0)
    for _ in range(8):
        environment.step([0.5, 0.2, -0.3, 0, 0, 0, 1])
    seen, qpos = environment.observe(), environment.data.qpos.copy()
    for _ in range(8):
        environment.step([-0.5, -0.2, 0.3, 0, 0, 0, -1])
    later = environment.frame("full_image")
    environment.restore(qpos)
    difference = np.abs(environment.frame("full_image").astype(int) - seen["full_image"])
    assert difference.mean() < 0.1 * np.abs(later.astype(int) - seen["full_image"]).mean()


def test_another_tasks_goal_is_judged_in_the_same_scene(environment: LiberoEnvironment) -> None:
    environment.reset(0)
    assert not environment.succeeded()
    assert not environment.succeeded(load_task("libero_goal", 1).goal)
    assert environment.succeeded([("on", "akita_black_bowl_1", "main_table_akita_black_bowl_region")])
    with pytest.raises(ValueError, match="basket_1_contain_region not in the scene"):
        environment.succeeded(load_task("libero_object", 0).goal)


@pytest.mark.parametrize("quaternion", np.random.default_rng(0).normal(size=(8, 4)))
def test_axis_angle_equals_scipy(quaternion: np.ndarray) -> None:
    quaternion = quaternion / np.linalg.norm(quaternion)
    rotation = Rotation.from_quat(quaternion)
    if quaternion[3] >= 0:
        np.testing.assert_allclose(quaternion_to_axis_angle(quaternion), rotation.as_rotvec(), atol=1e-9)
    for canonical in (False, True):
        vector = quaternion_to_axis_angle(quaternion, canonical)
        np.testing.assert_allclose(Rotation.from_rotvec(vector).as_matrix(), rotation.as_matrix(), atol=1e-9)
    opposite = quaternion_to_axis_angle(-quaternion, canonical=True)
    np.testing.assert_allclose(opposite, quaternion_to_axis_angle(quaternion, canonical=True))


def test_no_turn_is_zero() -> None:
    np.testing.assert_array_equal(quaternion_to_axis_angle([0, 0, 0, 1]), np.zeros(3))


def test_tasks_are_read() -> None:
    task = load_task("libero_goal", 8)
    assert (task.language, task.goal) == ("put the bowl on the plate", (("on", "akita_black_bowl_1", "plate_1"),))
    assert task.init_states.shape == (50, 79)
    counts = {name: get_suite(name).get_num_tasks() for name in SUITES}
    assert counts == {name: task_count(name) for name in SUITES} and set(counts.values()) == {10, 90}


def test_bad_input_is_refused(environment: LiberoEnvironment) -> None:
    with pytest.raises(ValueError, match=r"unknown LIBERO suite 'libero_gaol'; known: standard: libero_spatial"):
        get_suite("libero_gaol")
    with pytest.raises(ValueError, match="has no task 10; expected 0 to 9"):
        load_task("libero_goal", 10)
    with pytest.raises(ValueError, match="unknown renderer 'vulkan'"):
        LiberoEnvironment(environment.task, renderer="vulkan")
    with pytest.raises(ValueError, match="no initial state 50"):
        environment.reset(50)
    with pytest.raises(ValueError, match=r"79 finite numbers .*got shape \(78,\)"):
        environment.reset(environment.task.init_states[0][1:])
    with pytest.raises(ValueError, match="7 finite numbers"):
        environment.step([0, 0, 0, 0, 0, np.nan, 0])
    with pytest.raises(ValueError, match="7 finite numbers"):
        environment.step_policy(np.zeros(6))


def test_without_rendering() -> None:
    with LiberoEnvironment(load_task("libero_goal", 8), render=False) as environment:
        with pytest.raises(RuntimeError, match="call reset"):
            environment.state()
        environment.reset(0)
        assert environment.state().shape == (8,)
        with pytest.raises(ValueError, match="render=False"):
            environment.frame()


@pytest.mark.parametrize(
    ("visible", "index", "device"),
    [(None, 0, "0"), ("0,7", 0, "0"), ("7, 0", 1, "0"), ("GPU-a", 0, "0"), ("7", 0, None), ("GPU-b", 0, None)],
)
def test_a_process_draws_on_its_own_gpu_where_egl_has_it(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, device: str | None
) -> None:
    """Mesa's software device is EGL's number 0 here; there is no number 7."""
    if choose_backend() != "egl":
        pytest.skip("another backend has no devices")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "unset at the end of the test")
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
    gpus = ["GPU-a", *(f"GPU-{number}" for number in range(1, 7)), "GPU-b"]
    assert render_on_gpu(index, visible, gpus) is (device is not None)
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == device
    if device is not None:
        assert not render_on_gpu(0, None, gpus), "what is set already stays"


@pytest.mark.parametrize(
    ("index", "visible", "device"),
    [
        (0, None, 0),
        (2, None, 2),
        (3, None, None),
        (0, "2,0", 2),
        (1, "2, 0", 0),
        (0, "7", None),
        (0, "", None),
        (0, "GPU-bb22", 1),
        (1, "0,GPU-aa11-5555", 0),
        (0, "GPU-bb2", None),  # the beginning of two
        (0, "MIG-aa11", None),
        (0, "-1", None),
        (2, "0,1", None),
    ],
)
def test_gpus_of_cuda_are_found_among_those_of_egl(index: int, visible: str | None, device: int | None) -> None:
    assert egl_device(index, visible, ["GPU-aa11-5555", "GPU-bb22-6666", "GPU-bb23-7777"]) == device


def test_a_machine_without_nvidias_gpus_maps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert nvidia_gpus(tmp_path) == ()
    for bus, uuid in (("0000:8a:00.0", "GPU-bb"), ("0000:19:00.0", "GPU-aa")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t NVIDIA H100\nGPU UUID: \t {uuid}\nBus Type: PCIe\n")
    assert nvidia_gpus(tmp_path) == ("GPU-aa", "GPU-bb")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "unset at the end of the test")
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    if not nvidia_gpus():
        assert not draw_on_own_gpu() and "MUJOCO_EGL_DEVICE_ID" not in os.environ
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert not draw_on_own_gpu(), "EGL takes its first one"


def test_a_missing_renderer_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    assert check_rendering() in ("egl", "osmesa")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(RenderingUnavailable, match="apt-get install -y libegl1"):
        choose_backend()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("PYOPENGL_PLATFORM", "osmesa", "PYOPENGL_PLATFORM='osmesa'"),
        ("MUJOCO_EGL_DEVICE_ID", "99", "got 99"),
        ("MUJOCO_EGL_DEVICE_ID", "first", "invalid literal"),
        ("MUJOCO_GL", "glx", "MUJOCO_GL='glx'"),
        ("MUJOCO_GL", "glfw", "MUJOCO_GL='glfw'"),
        ("MUJOCO_GL", "vulkan", "MUJOCO_GL='vulkan'"),
        ("MUJOCO_GL", "off", "MUJOCO_GL='off'"),
        ("__EGL_VENDOR_LIBRARY_FILENAMES", "/nowhere", "Cannot initialize a EGL device display"),
    ],
)
def test_a_variable_that_forbids_drawing_is_named(variable: str, value: str, words: str) -> None:
    if choose_backend() != "egl":
        pytest.skip("EGL does not draw here")
    code = (
        "from experiments.robot.libero.simulator.backend import check_rendering\n"
        "from experiments.robot.libero.simulator.tasks import get_suite\n"
        "get_suite('libero_goal'), check_rendering()"
    )
    left = {
        name: text for name, text in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")
    }
    left |= {"PYTHONPATH": str(ROOT), variable: value}
    done = subprocess.run([sys.executable, "-c", code], env=left, capture_output=True, text=True, timeout=120)
    (said,) = [line for line in done.stderr.splitlines() if "RenderingUnavailable: " in line]
    assert f"{variable}='{value}'" in said and words in said
    assert said.endswith(f"; unset {variable}: without, this machine draws with egl")


def test_osmesa_is_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    said = simulator._why_not("no library", {"MUJOCO_GL": "osmesa", "PATH": os.environ["PATH"]})
    assert said.startswith("MuJoCo cannot draw with MUJOCO_GL='osmesa' (no library); on Debian or Ubuntu run: ")
    assert "libosmesa6" in said and "libegl1" not in said


def test_the_number_of_a_cuda_device_is_not_asked_of_egl() -> None:
    """robosuite refuses an EGL device that is not named among CUDA's."""
    if choose_backend() != "egl":
        pytest.skip("EGL does not draw here")
    code = "from experiments.robot.libero.simulator.backend import check_rendering\n"
    code += "from experiments.robot.libero.simulator.tasks import get_suite\n"
    code += "import os; get_suite('libero_goal'); print(check_rendering(), os.environ['MUJOCO_EGL_DEVICE_ID'])"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "GPU-7", "MUJOCO_EGL_DEVICE_ID": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["egl", "0"], done.stderr


def test_a_renderer_whose_making_was_stopped_goes_without_a_word() -> None:
    """Ctrl+C in there: what Python says of an error in `__del__` would be a warning here, and so an error."""
    kind = renderer_class()
    half_made = kind.__new__(kind)
    del half_made
