"""The pictures of `visualize_pruning.py`, from records and from a policy, against the masks themselves."""

import functools
import io
import operator
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from fixtures_rlds import write_tiny_rlds
from PIL import Image
from rich.console import Console

from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.record import EpisodeRecording, actions_sha256
from experiments.robot.libero.rollouts.rollout import RolloutSettings
from lightvla.commands.visualize import UNUSABLE, main, parse, policy_traces, record_traces
from prismatic.policy import Policy
from prismatic.report.pruning import PatchSums, figure_png, keep_map
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.images import decode_jpeg

ROOT = Path(__file__).resolve().parents[3]


def write_record(path: Path, queries: int = 3, tokens: int = 2 * 16, seed: int = 0, **more: object) -> EpisodeRecording:
    """A made-up episode with two actions per policy query."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (2 * queries, 7))
    episode = EpisodeRecord("libero_goal", 1, "a_task", "lift it", seed, 0, 7, success=True, steps=2 * queries)
    episode = replace(episode, actions_sha256=actions_sha256(actions), **more)  # type: ignore[arg-type]
    recording = EpisodeRecording(
        episode, RolloutSettings(max_steps=2 * queries, open_loop_steps=2), {}, False, 20.0,
        {"checkpoint": "runs/small", "pruner": "lightvla"}, {},
        start_state=np.zeros(3), query_steps=2 * np.arange(queries),
        images={c: rng.integers(80, 256, (queries, 64, 64, 3), dtype=np.uint8) for c in ("full_image", "wrist_image")},
        states=np.zeros((queries, 8)), qpos=np.zeros((queries, 9)), chunks=actions.reshape(-1, 2, 7), actions=actions,
        kept=rng.uniform(size=(queries, tokens)) < 0.4, scores=rng.normal(size=(queries, tokens)).astype(np.float32),
    )  # fmt: skip
    recording.save(path)
    return recording


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two made-up episodes in LIBERO's layout, of 18 and 19 steps."""
    return write_tiny_rlds(tmp_path_factory.mktemp("data"), "libero_tiny_no_noops", episodes=2, steps=18).parent


def run(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(parse(command), Console(width=400))
    said = capsys.readouterr()
    return status, " ".join((said.out if status == 0 else said.err).split())


def test_pictures_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recordings = [write_record(tmp_path / "run" / "records" / f"task{n}.npz", 3 + n, seed=n) for n in range(2)]
    status, output = run(["--record", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")], capsys)
    assert status == 0
    for number, recording in enumerate(recordings):
        assert recording.kept is not None
        counts = recording.kept.sum(axis=1)
        assert f"task{number}: {3 + number} policy queries, {counts.mean():.1f} of 32 tokens kept" in output
        folder = tmp_path / "out" / f"task{number}"
        names = {"queries", "keep_map.png", "score_map.png", "tokens_kept.png", "overview.png", "overlay.mp4"}
        assert {path.name for path in folder.iterdir()} == names
        queries = sorted(path.name for path in (folder / "queries").iterdir())
        assert queries == [f"query{query:03d}_step{2 * query:03d}.png" for query in range(3 + number)]
        _, seconds = imageio_ffmpeg.count_frames_and_secs(str(folder / "overlay.mp4"))
        assert seconds == pytest.approx((3 + number) / 10 + 1, abs=0.05), "20 steps a second, a query each two steps"
    assert {"keep_map_lift_it.png", "tokens_kept.png"} < {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_episodes_are_drawn_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures are not gathered, and the map of all episodes is nevertheless that of all their queries."""
    for number in range(6):
        write_record(tmp_path / "records" / f"task{number}.npz", 8, seed=number)
    traces = record_traces([tmp_path])
    shown = [weakref.ref(next(traces)[1].images[0]) for _ in range(2)]
    assert shown[0]() is None
    _, last = list(traces)[-1]
    assert last.title == "lift it"
    sums = [PatchSums.of(trace) for _, trace in record_traces([tmp_path])]
    status, _ = run(["--record", str(tmp_path), "--no_video", "--output_dir", str(tmp_path / "out")], capsys)
    assert status == 0
    title = "lift it\nlibero_goal · small (lightvla): 6 episodes, 48 policy queries"
    expected = figure_png(keep_map(functools.reduce(operator.add, sums), title))
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out" / "keep_map_lift_it.png")), np.asarray(Image.open(io.BytesIO(expected)))
    )


@pytest.mark.slow
def test_every_task_suite_and_control_has_a_map_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [{}, {}, {"suite": "libero_goal_swap"}, {"control": "blank_images"}, {"instruction": "Push: it!"}]
    for number, change in enumerate(changes):
        write_record(tmp_path / "records" / f"a{number}.npz", 2 + number, seed=number, **change)
    status, _ = run(["--record", str(tmp_path), "--no_video", "--output_dir", str(tmp_path / "out")], capsys)
    maps = sorted(path.name for path in (tmp_path / "out").glob("keep_map*"))
    assert status == 0
    assert maps == [f"keep_map_{name}.png" for name in ("lift_it-2", "lift_it-3", "lift_it", "push_it")]
    traces = [trace for _, trace in record_traces([tmp_path])]
    sums = [PatchSums.of(trace) for trace in traces]
    for name, total, title in (
        ("lift_it", sums[0] + sums[1], "lift it\nlibero_goal · small (lightvla): 2 episodes, 5 policy queries"),
        (
            "lift_it-3",
            sums[3],
            "lift it\nlibero_goal · control: blank images · small (lightvla): 1 episode, 5 policy queries",
        ),
    ):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"keep_map_{name}.png"))
        np.testing.assert_array_equal(drawn, np.asarray(Image.open(io.BytesIO(figure_png(keep_map(total, title))))))


def test_nothing_but_results_is_printed_where_there_is_no_terminal(tmp_path: Path) -> None:
    write_record(tmp_path / "a.npz")
    command = [sys.executable, "scripts/visualize_pruning.py", "--record", str(tmp_path), "--no_video"]
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    lines = (result.stdout + result.stderr).split("\n")
    assert [line[:9] for line in lines] == ["a: 3 poli", "pictures:", ""]


def test_equal_names_are_numbered_and_brackets_are_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/x", "b/x", "c/x-1", "d/x", "e/[bold]y"):
        write_record(tmp_path / f"{name}.npz", 2)
    files = [str(tmp_path / f"{name}.npz") for name in ("a/x", "c/x-1", "b/x", "d/x", "e/[bold]y")]
    out = tmp_path / "[red]out"
    status, output = run(["--record", *files, "--no_video", "--output_dir", str(out)], capsys)
    assert status == 0 and f"pictures: {out}" in output and "[bold]y: 2 policy queries" in output
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {"x", "x-1", "x-2", "x-3", "[bold]y"}


def test_a_damaged_header_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", header=np.array("{"))
    status, output = run(["--record", str(tmp_path / "a.npz")], capsys)
    assert status == UNUSABLE and output.startswith("error:") and "a.npz" in output and "Traceback" not in output


def test_a_query_dims_exactly_the_pruned_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = write_record(tmp_path / "a.npz")
    assert recording.kept is not None
    files, out = ["--record", str(tmp_path / "a.npz"), "--no_video"], tmp_path / "out"
    assert run([*files, "--output_dir", str(out)], capsys)[0] == 0
    assert not (out / "a" / "overlay.mp4").exists()
    frame = np.asarray(Image.open(out / "a" / "queries" / "query001_step002.png")).astype(float)
    panel, gap, heading = 256, 8, 22
    seen = frame.shape[0] - gap - panel
    live = seen - heading - gap - panel
    for camera in range(2):
        left = gap + camera * (panel + gap)
        for token in range(16):
            row, column = 64 * (token // 4), left + 64 * (token % 4)
            inside = (slice(live + row + 4, live + row + 60), slice(column + 4, column + 60))
            drawn = frame[seen + row + 4 : seen + row + 60, column + 4 : column + 60]
            if recording.kept[1, 16 * camera + token]:
                assert (drawn == frame[inside]).all()
            else:
                assert drawn.mean() < 0.4 * frame[inside].mean()


def test_records_are_drawn_without_torch_or_the_simulator(tmp_path: Path) -> None:
    write_record(tmp_path / "a.npz", queries=2)
    code = (
        "import sys; from rich.console import Console; from lightvla.commands.visualize import main, parse; "
        f"status = main(parse(['--record', {str(tmp_path)!r}, '--output_dir', {str(tmp_path / 'out')!r}]), Console()); "
        "print(status, sorted({'torch', 'mujoco', 'tensorflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"


def test_an_episode_of_a_dataset_is_what_the_policy_keeps(
    small_policy_directory: Path, dataset: Path, tmp_path: Path
) -> None:
    data = ["--dataset_dir", str(dataset), "--episode", "1"]
    command = ["--checkpoint", str(small_policy_directory), *data, "--device", "cpu", "--output_dir", str(tmp_path)]
    arguments = parse([*command, "--every", "4"])
    ((name, trace),) = policy_traces(arguments, Console())
    assert name == "libero_tiny_no_noops_episode1" and trace.steps.tolist() == [0, 4, 8, 12, 16]
    episode = RldsIndex.open(dataset.parent, dataset.name).episodes[1]
    assert trace.title == episode.instruction and trace.center_crop
    policy = Policy.from_pretrained(small_policy_directory)
    assert trace.scores is not None and episode.state is not None
    for query, step in enumerate(trace.steps):
        observation = {camera: decode_jpeg(episode.image_bytes(camera, step)) for camera in policy.robot.cameras}
        selection = policy.act_batch([{**observation, "state": episode.state[step]}], [trace.title]).selection
        np.testing.assert_array_equal(trace.kept[query], selection.kept()[0].numpy())
        assert selection.scores is not None
        np.testing.assert_allclose(trace.scores[query], selection.scores[0].numpy(), rtol=1e-5)
        np.testing.assert_array_equal(trace.images[1][query], observation["wrist_image"])
    assert main(arguments, Console()) == 0 and (tmp_path / name / "overlay.mp4").stat().st_size > 1000
    arguments = parse(command)
    assert policy_traces(arguments, Console())[0][1].steps.tolist() == [0, 8, 16]


def test_single_pictures(small_policy_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    files = [tmp_path / "full.png", tmp_path / "wrist.png"]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file)
    command = ["--checkpoint", str(small_policy_directory), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    images = ["--images", *map(str, files), "--instruction", "open the drawer"]
    status, output = run([*command, *images], capsys)
    assert status == 0 and "assumed: the mean state" in output and "full: 1 policy query, " in output
    names = {path.name for path in (tmp_path / "out" / "full").iterdir()}
    assert names == {"queries", "keep_map.png", "score_map.png", "overview.png"}
    status, output = run([*command, *images, "--state", *["0.1"] * 8], capsys)
    assert status == 0 and "assumed" not in output
    status, output = run([*command, *images, "--state", "0.1"], capsys)
    assert status == UNUSABLE and "--state: 1 numbers given; robot 'libero' has 8" in output
    for name, words in (("nope.png", "there is no such file"), (__file__, "no picture that can be read, such as PNG")):
        status, output = run([*command, "--images", name, str(files[1]), "--instruction", "x"], capsys)
        assert status == UNUSABLE and f"error: --images {name}: {words}" in output
    images = ["--images", str(files[0]), "--instruction", "open the drawer"]
    status, output = run([*command, *images], capsys)
    assert status == UNUSABLE and "--images: 1 given; the policy reads 2: full_image, wrist_image" in output
    status, output = run([*command, *images, "--pruner", "none"], capsys)
    assert status == UNUSABLE
    arguments = parse([*command, "--images", *map(str, files), "--instruction", "x", "--pruner", "none"])
    ((_, trace),) = policy_traces(arguments, Console())
    assert trace.kept.all() and trace.scores is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "give either --record"),
        (["--record", "a.npz", "--checkpoint", "b"], "give either --record"),
        (["--checkpoint", "b"], "give either --dataset_dir with --episode, or --images"),
        (["--checkpoint", "b", "--images", "a.png", "--dataset_dir", "d"], "give either --dataset_dir"),
        (["--checkpoint", "b", "--images", "a.png"], "--images needs --instruction"),
        (["--checkpoint", "b", "--images", "missing.png", "--instruction", "x"], "missing.png"),
        (["--record", "missing"], "--record missing: no recorded episode there"),
        (["--record", "a", "--fps", "0"], "--fps 0.0: expected 0.1 to 240 policy queries a second"),
        (["--record", "a", "--fps", "nan"], "--fps nan: expected 0.1"),
        (["--checkpoint", "b", "--dataset_dir", "d", "--every", "0"], "--every 0: expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(command: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(command, capsys)
    assert status == UNUSABLE and output.startswith("error:") and words in output


def test_a_record_without_tokens_and_a_missing_episode(
    small_policy_directory: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = write_record(tmp_path / "a.npz")
    recording.kept = recording.scores = None
    recording.save(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="b.npz: the recorded agent did not say which tokens it kept"):
        next(record_traces([tmp_path / "b.npz"]))
    command = ["--checkpoint", str(small_policy_directory), "--device", "cpu", "--dataset_dir", str(dataset)]
    status, output = run([*command, "--episode", "2"], capsys)
    assert status == UNUSABLE and "--episode 2: libero_tiny_no_noops has 2 episodes, counted from 0" in output
