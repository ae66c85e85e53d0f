"""The one owner of `results.json`: its schema, its summary, and how it reaches the disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.results.fields import check_types
from experiments.robot.libero.settings.flags import EvaluationConfig
from prismatic.atomic_files import write_atomically
from prismatic.significance import wilson_interval
from prismatic.vla.robots import LIBERO

SCHEMA_VERSION = 3
_READ = (2, SCHEMA_VERSION)
"""Version 2 differs in names within the summary only, which is made anew from the episodes."""
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
FILE_NAME = "results.json"

CIRCUMSTANCES = frozenset({"wall_seconds", "latency_ms", "policy_ms", "call_queries", "stage_ms", "attempts"})
"""Fields of an episode that say how the run went, not what the policy did: two runs with one seed differ in these."""
MEASURED = frozenset({"dtype_reason", "engine"})
"""Parts of a policy's description that tell what was measured as it was loaded: they differ from load to load."""


@dataclass
class EpisodeRecord:
    """What happened in one rollout.

    Args:
        instruction: What the policy was given (under the control `swapped_instruction` not the task's own).
        trial: Counts the rollouts of one task from 0.
        seed: Of the simulator's reset.
        displacement: The draw that moved objects away from their standard places (`wide_starts.py` repeats it);
            None for a standard start.
        success: Whether the task's own goal was reached; None when the rollout is invalid.
        other_task: Index of the task whose instruction was given, under `swapped_instruction`.
        other_success: Whether that task's goal was reached.
        steps: Control steps taken after settling.
        tokens_kept: Visual tokens kept per policy query; of the last pass where a diffusion head makes several.
        num_visual_tokens: Tokens there were to choose from.
        actions_sha256: Of all executed actions, float64 and in order: equal rollouts have equal ones.
        latency_ms: Time from each policy query to its action chunk, waiting for other workers' queries included.
        policy_ms: Of that, the time inside the policy: of the whole call that answered the query. A server's by its
            own clock where it says so, else by this side's. Empty in results of before it was recorded.
        call_queries: How many policy queries that call had; each of them has the whole call's time.
        stage_ms: Time inside the policy per stage (preprocessing, vision, pruner, llm, total), one number per query;
            queries of one batch have the whole call's each.
        jerk: RMS of the end effector's jerk in m/s^3 (`rollouts/motion.py`); None where it was not recorded.
        progress: The highest share of the own goal's predicates that held after any one step, where there are several.
        attempts: How often this run began the rollout; more than once after a crash, a hang or an error.
        invalid: Why the rollout says nothing about the policy (a traceback), or None. Never counted as a failure.
        video: File name of the video, relative to the results file; the picture beside it (`.png`) shows what was kept.
        record: File name of the stored observations and actions, likewise.
        bddl_sha256, init_states_sha256: Of the task's description and of its own initial states, as in `LiberoTask`;
            None in results of before these were recorded.
    """

    suite: str
    task_index: int
    task_name: str
    instruction: str
    initial_state: int
    trial: int
    seed: int
    control: str = "none"
    displacement: dict[str, Any] | None = None
    success: bool | None = None
    other_task: int | None = None
    other_success: bool | None = None
    steps: int = 0
    wall_seconds: float = 0.0
    tokens_kept: list[int] = field(default_factory=list)
    num_visual_tokens: int = 0
    actions_sha256: str | None = None
    latency_ms: list[float] = field(default_factory=list)
    policy_ms: list[float] = field(default_factory=list)
    call_queries: list[int] = field(default_factory=list)
    stage_ms: dict[str, list[float]] = field(default_factory=dict)
    jerk: float | None = None
    progress: float | None = None
    attempts: int = 1
    invalid: str | None = None
    video: str | None = None
    record: str | None = None
    bddl_sha256: str | None = None
    init_states_sha256: str | None = None

    @property
    def key(self) -> tuple[str, int, int, int]:
        """What tells an evaluation's rollouts apart, whatever their order: (suite, task, initial state, repetition).

        An initial state is repeated with other displacements only.
        """
        repetition = int((self.displacement or {}).get("trial", 0))
        return self.suite, self.task_index, self.initial_state, repetition

    @property
    def is_timed(self) -> bool:
        """Whether the policy's own time is known of every query."""
        return 0 < len(self.latency_ms) == len(self.policy_ms)

    @property
    def waiting_ms(self) -> list[float]:
        """Per policy query, the time from query to action chunk that is not the policy's own: waiting for others'
        queries, and the way through pipes or the network. Empty where the policy's own time is not known."""
        pairs = zip(self.latency_ms, self.policy_ms, strict=True) if self.is_timed else ()
        return [max(0.0, whole - own) for whole, own in pairs]

    @classmethod
    def from_json(cls, content: dict[str, Any], where: str) -> EpisodeRecord:
        """Raises ValueError for unknown and missing keys and values of other types, naming `where` they were found."""
        if not isinstance(content, dict):
            raise ValueError(f"{where}: an episode is a {type(content).__name__}; expected its fields by name")
        if unknown := set(content) - {f.name for f in fields(cls)}:
            raise ValueError(f"{where}: episode {content.get('trial')} has unknown keys {sorted(unknown)}")
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if missing := needed - set(content):
            raise ValueError(f"{where}: episode {content.get('trial')} lacks {sorted(missing)}")
        task = f"{content['suite']} task {content['task_index']}, initial state {content['initial_state']}"
        check_types(cls, content, f"{where}: the rollout of {task}")
        found = cls(**content)
        if found.invalid is not None and found.success is not None:
            raise ValueError(
                f"{where}: the rollout of {task} has success {found.success} and invalid {found.invalid!r}; an invalid "
                "rollout is neither success nor failure"
            )
        counts = {"task_index": found.task_index, "initial_state": found.initial_state, "steps": found.steps}
        if negative := {name: count for name, count in counts.items() if count < 0}:
            raise ValueError(f"{where}: the rollout of {task} has {negative}; expected 0 or more")
        return found

    @property
    def file_stem(self) -> str:
        """`task1_state30_trial0_success`: how files of this rollout are named, without suffix."""
        outcome = {True: "success", False: "failure", None: "invalid"}[self.success]
        return f"task{self.task_index}_state{self.initial_state}_trial{self.trial}_{outcome}"


@dataclass
class Results:
    """Everything `results.json` holds.

    Args:
        run: Command line, times, git commit, the policy's name (`naming.policy_name`), renderer, device, seed, and
            whether the run got to its end (`complete`).
        config: The flags, as understood.
        policy: `Policy.description()`, with what was assumed about the checkpoint.
        versions: Package -> version.
    """

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    episodes: list[EpisodeRecord] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return summarize(self.episodes)

    @property
    def open_loop_steps(self) -> int | None:
        """Actions executed of each chunk: the flag's number, else the robot's; None where neither is recorded."""
        return self.config.get("num_open_loop_steps") or (self.policy.get("robot") or {}).get("open_loop_steps")

    def outcome(self) -> dict[str, Any]:
        """What two runs with the same seeds on the same machine must agree in, to the last bit."""
        run = {key: self.run.get(key) for key in ("seed", "renderer", "rendering_backend", "protocol", "complete")}
        episodes = [
            {key: value for key, value in asdict(episode).items() if key not in CIRCUMSTANCES}
            for episode in self.episodes
        ]
        policy = {key: value for key, value in self.policy.items() if key not in MEASURED}
        return {"run": run, "policy": policy, "versions": self.versions, "episodes": episodes}

    def counts(self, other_goal: bool = False) -> dict[str, tuple[int, int]]:
        """Task as text -> (successes, trials); `other_goal` counts the goals whose instruction was given instead."""
        rows = self.summary()["tasks"]
        pairs = [(row["task_name"].replace("_", " "), row["other_goal"] if other_goal else row) for row in rows]
        return {name: (count["successes"], count["trials"]) for name, count in pairs}

    def save(self, path: str | Path) -> None:
        """Write atomically: a crash leaves the previous file, never half of one.

        Raises:
            ValueError: for NaN and infinity, which JSON does not have.
        """
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        episodes = content.pop("episodes")
        content = {**content, "summary": self.summary(), "episodes": episodes}
        try:
            text = json.dumps(content, indent=1, default=str, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{path} is not written: it would hold a NaN or an infinity ({error})") from error
        write_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a results file, or the one inside a folder.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is no results file, or has another schema version or unknown episode keys.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no results at {path}; lightvla eval writes {FILE_NAME} there")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise _not_results(path, str(error)) from error
        if not isinstance(content, dict):
            raise _not_results(path, f"it holds a {type(content).__name__}")
        found = content.get("schema_version")
        if found not in _READ:
            known = " and ".join(map(str, _READ))
            raise ValueError(f"{path} has schema version {found}, this code reads {known}; evaluate again")
        for name, kind in (*((part, dict) for part in ("run", "config", "policy", "versions")), ("episodes", list)):
            if not isinstance(content.get(name), kind):
                raise _not_results(
                    path, f"{name!r} is {json.dumps(content.get(name))[:40]}, expected a {kind.__name__}"
                )
        check_types(_Run, content["run"], f"{path}: run", optional=True)
        check_types(EvaluationConfig, content["config"], f"{path}: config", optional=True)
        check_types(Results, {"versions": content["versions"]}, str(path))
        check_types(_Policy, content["policy"], f"{path}: policy", optional=True)
        try:
            episodes = [EpisodeRecord.from_json(episode, str(path)) for episode in content["episodes"]]
        except ValueError as error:
            raise ValueError(
                f"{error}; another version of this code wrote it, or it was changed: evaluate again"
            ) from error
        written = [(record.key, record.seed, record.actions_sha256) for record in episodes]
        if len(set(written)) < len(written):
            again = next(record for place, record in enumerate(episodes) if written[place] in written[:place])
            which = f"{again.suite} task {again.task_index}, initial state {again.initial_state}"
            raise ValueError(
                f"{path} holds the rollout of {which} twice, and a copy is no trial; take one out, or evaluate again"
            )
        return cls(content["run"], content["config"], content["policy"], content["versions"], episodes)


@dataclass
class _Run:
    """What `Results.run` holds where it is there."""

    command: list[str]
    started: str
    git_commit: str
    policy: str
    device: str
    renderer: str
    rendering_backend: str
    seed: int
    protocol: dict[str, Any]
    warnings: list[str]
    num_envs: int
    processes: int
    worker_restarts: int
    seconds: float
    complete: bool


@dataclass
class _Policy:
    """What `Results.policy` holds where it is there, of what names the policy."""

    checkpoint: str | None
    policy_url: str | None
    pruner: str | None
    action_head: str | None
    dtype: str | None


def _not_results(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is no results file ({why}); name one that lightvla eval wrote, or evaluate again")


def count_successes(outcomes: Iterable[bool | None]) -> dict[str, Any]:
    """Successes, trials, rate and Wilson 95 % interval of the outcomes that are not None."""
    valid = [bool(outcome) for outcome in outcomes if outcome is not None]
    interval = wilson_interval(sum(valid), len(valid))
    return {
        "successes": sum(valid),
        "trials": len(valid),
        "rate": sum(valid) / len(valid) if valid else None,
        "interval_95": [round(interval.low, 4), round(interval.high, 4)],
    }


def summarize(episodes: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """Successes per task, suite and in all, what a success takes, tokens kept and latency per query, invalid rollouts.

    `mean_of_suites` is the mean of the suites' rates; None where one has no valid rollout. An invalid rollout is
    counted as such and has no part in any other figure.

    Under `swapped_instruction` the entries `other_goal` count how often the goal of that instruction was reached.
    """
    by_task: dict[tuple[str, int], list[EpisodeRecord]] = {}
    for episode in episodes:
        by_task.setdefault((episode.suite, episode.task_index), []).append(episode)
    names = dict.fromkeys(suite for suite, _ in sorted(by_task))
    suites = [{"suite": name, **_summarize_outcomes([e for e in episodes if e.suite == name])} for name in names]
    rates = [suite["rate"] for suite in suites]
    return {
        "all": _summarize_outcomes(episodes),
        "suites": suites,
        "mean_of_suites": float(np.mean(rates)) if rates and None not in rates else None,
        "tasks": [
            {"suite": suite, "task_index": index, "task_name": group[0].task_name, **_summarize_outcomes(group)}
            for (suite, index), group in sorted(by_task.items())
        ],
        "tokens_kept": _summarize_tokens(episodes),
        "latency_ms": _summarize_latency(episodes),
    }


def _summarize_outcomes(episodes: Sequence[EpisodeRecord]) -> dict[str, Any]:
    result = count_successes(episode.success for episode in episodes)
    result["invalid"] = sum(episode.invalid is not None for episode in episodes)
    result |= _summarize_motion(episodes)
    if any(episode.other_task is not None for episode in episodes):
        result["other_goal"] = count_successes(episode.other_success for episode in episodes)
    return result


def _summarize_motion(episodes: Sequence[EpisodeRecord]) -> dict[str, float | None]:
    """Completion time and jerk of the successful episodes, and progress of all that have one; None without any."""
    steps = [float(episode.steps) for episode in episodes if episode.success]
    jerk = [episode.jerk for episode in episodes if episode.success and episode.jerk is not None]
    progress = [episode.progress for episode in episodes if episode.invalid is None and episode.progress is not None]
    mean = _mean(steps)
    return {
        "mean_steps_to_success": mean,
        "mean_seconds_to_success": None if mean is None else mean / LIBERO.control_rate_hz,
        "mean_jerk": _mean(jerk),
        "mean_progress": _mean(progress),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _summarize_tokens(episodes: Sequence[EpisodeRecord]) -> dict[str, Any] | None:
    valid = [episode for episode in episodes if episode.invalid is None]
    kept = [count for episode in valid for count in episode.tokens_kept]
    if not kept:
        return None
    of = max(episode.num_visual_tokens for episode in valid)
    mean = float(np.mean(kept))
    return {"mean": mean, "min": min(kept), "max": max(kept), "of": of, "fraction": mean / of if of else None}


def _summarize_latency(episodes: Sequence[EpisodeRecord]) -> dict[str, Any] | None:
    """The policy's own time, and waiting apart; where no episode tells them apart, both in one."""
    valid = [episode for episode in episodes if episode.invalid is None]
    timed = [episode for episode in valid if episode.is_timed]
    times = [value for episode in timed for value in episode.policy_ms]
    waiting = [value for episode in timed for value in episode.waiting_ms]
    if not timed:
        times = [value for episode in valid for value in episode.latency_ms]
    if not times:
        return None
    sizes = [size for episode in timed for size in episode.call_queries]
    return {
        "median": float(np.median(times)),
        "p95": float(np.percentile(times, 95)),
        "queries": len(times),
        "includes_waiting": not timed,
        "waiting_median": float(np.median(waiting)) if waiting else None,
        "largest_call": max(sizes, default=None),
    }


def is_complete(folder: Path) -> bool:
    """Whether an evaluation's folder holds all its rollouts, and none that is invalid; False where nothing tells."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(content["run"]["complete"]) and not content["summary"]["all"]["invalid"]
