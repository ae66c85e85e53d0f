"""An evaluation as its report sees it: a name, its results, and how it is to be understood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.robot.libero.comparison.caveats import perturbation_of
from experiments.robot.libero.results.journal import load_results
from experiments.robot.libero.results.results import FILE_NAME, EpisodeRecord, Results
from experiments.robot.libero.settings.flags import OWN_STATES
from prismatic.vla.robots import LIBERO

CONTROL_TEXT = {
    "blank_images": "the policy saw mid-grey pictures; what it solves, it solves with its eyes shut",
    "swapped_instruction": "the policy got another task's instruction; its own goal should stay unreached",
    "random_tokens": "the policy saw as many tokens as the pruner chose, but chosen at random",
    "added_tokens": "the policy saw what the pruner chose and as many other tokens, chosen at random",
    "dropped_tokens": "the policy saw what the pruner chose but for a tenth of it, chosen at random",
}
"""What each control means, for readers who have not read the documentation."""


TaskKey = tuple[str, int]
"""Suite and index of a task."""


@dataclass(frozen=True)
class Evaluation:
    """One results file.

    Args:
        name: Short and unique in the report.
        folder: Where the results file lies; videos are relative to it.
        path: The results as they were named to the report, for commands; empty: the folder.
    """

    name: str
    results: Results
    folder: Path
    path: str = ""

    @property
    def control(self) -> str:
        """Name of the control; empty for an ordinary evaluation."""
        control = str(self.results.config.get("control", "none"))
        return "" if control == "none" else control

    @property
    def label(self) -> str:
        """The name, with the control where there is one: where evaluations are told apart for the first time."""
        return f"{self.name} (control: {self.control.replace('_', ' ')})" if self.control else self.name

    @property
    def complete(self) -> bool:
        return bool(self.results.run.get("complete"))

    @property
    def seconds_per_step(self) -> float:
        """Length of a control step of LIBERO's simulator, whatever a policy's own robot does."""
        return 1.0 / LIBERO.control_rate_hz


def load_evaluations(paths: Sequence[str | Path]) -> list[Evaluation]:
    """Read results files, or the ones inside folders, and name them by their folders, several of one folder by file.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for results of another schema, and for one file given twice.
    """
    files = [(path / FILE_NAME if path.is_dir() else path).resolve() for path in map(Path, paths)]
    results = [load_results(path) for path in paths]
    if len(set(files)) < len(files):
        raise ValueError("the same results were given twice; name each results file or folder once")
    folders = [file.parent for file in files]
    names = short_names([file if folders.count(file.parent) > 1 else file.parent for file in files])
    return [Evaluation(*parts) for parts in zip(names, results, folders, map(str, paths), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of the paths as it takes to tell them apart."""
    longest = max((len(path.parts) for path in paths), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def initial_states_text(evaluation: Evaluation) -> str:
    """Where the rollouts began: LIBERO's own initial states, a file's, a perturbed suite's, and whether widened."""
    config = evaluation.results.config
    file, wide = str(config.get("initial_states_path") or OWN_STATES), config.get("wide_starts_m")
    suites = str(config.get("task_suite_name")).split(",")
    perturbation = ", ".join(sorted({perturbation_of(suite) for suite in suites}))
    if file != OWN_STATES:
        text = f"the initial states of the file {Path(file).name}"
    elif perturbation != "none":
        text = f"LIBERO-PRO's initial states (perturbation: {perturbation})"
    else:
        text = "LIBERO's own initial states"
    return f"wide starts ({text}, goal's objects moved within {100 * wide:g} cm)" if wide else text


def state_numbers_text(evaluation: Evaluation) -> str:
    """`30-32 (3 per task)`: the initial states that were rolled out."""
    tasks: dict[TaskKey, set[int]] = {}
    for episode in evaluation.results.episodes:
        tasks.setdefault((episode.suite, episode.task_index), set()).add(episode.initial_state)
    if not tasks:
        return "none yet"
    counts = sorted({len(states) for states in tasks.values()})
    numbers = sorted(set().union(*tasks.values()))
    ends = [n for n in numbers if n - 1 not in numbers], [n for n in numbers if n + 1 not in numbers]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(*ends, strict=True)]
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"{', '.join(spans)} ({each} per task)"


def controls_note(evaluations: Sequence[Evaluation]) -> str:
    """Which of several evaluations are controls, for the head of a section that calls them by their names."""
    controls = [f"{e.name} ({e.control.replace('_', ' ')})" for e in evaluations if e.control]
    return f"Controls: {', '.join(controls)}." if controls and len(evaluations) > 1 else ""


def task_text(episode: EpisodeRecord) -> str:
    return episode.task_name.replace("_", " ")


def outcome_text(episode: EpisodeRecord) -> str:
    """`solved`, `not solved` or `invalid`; where another task's instruction was given, what became of both goals."""
    if episode.success is None:
        return "invalid"
    if episode.other_task is None:
        return "solved" if episode.success else "not solved"
    own, other = ("reached" if reached else "not reached" for reached in (episode.success, episode.other_success))
    return f"own goal {own}, instructed goal {other}"


def last_line(traceback: str) -> str:
    """The line of a traceback that names the error; errors of several lines end in more text."""
    lines = [line for line in traceback.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no traceback was recorded"
