"""What Weights & Biases is sent: every finished episode while the evaluation runs, and the rates at its end."""

from __future__ import annotations

import logging
from typing import Any

from experiments.robot.libero.evaluation.plan import Plan
from experiments.robot.libero.results.results import EpisodeRecord, Results, summarize

logger = logging.getLogger(__name__)


class WandbLog:
    """A run of Weights & Biases, where `--use_wandb` asks for one; begun with the first episode.

    No evaluation is lost over its log: the first error is said, and nothing more is sent.

    Args:
        active: whether this process logs.
    """

    def __init__(self, plan: Plan, active: bool = True) -> None:
        self._plan = plan
        self._active = active and plan.config.use_wandb
        self._run: Any = None
        self._episodes: list[EpisodeRecord] = []

    def episode(self, record: EpisodeRecord) -> None:
        """Success so far, and what the episode took: the policy's own time, tokens, steps, jerk."""
        self._episodes.append(record)
        so_far, own = summarize(self._episodes), summarize([record])
        latency, kept = own["latency_ms"] or {}, own["tokens_kept"] or {}
        self._send(
            {
                "episodes": len(self._episodes),
                "success_rate_so_far": so_far["all"]["rate"],
                "invalid_so_far": so_far["all"]["invalid"],
                "episode/success": None if record.success is None else int(record.success),
                "episode/steps": None if record.invalid is not None else record.steps,
                "episode/policy_ms": None if latency.get("includes_waiting", True) else latency["median"],
                "episode/waiting_ms": latency.get("waiting_median"),
                "episode/tokens_kept": kept.get("mean"),
                "episode/jerk": record.jerk,
                "episode/progress": record.progress,
            }
        )

    def finish(self, results: Results) -> None:
        """The rates of all tasks, and what a policy query and a success take."""
        summary = results.summary()
        latency, kept, numbers = summary["latency_ms"] or {}, summary["tokens_kept"] or {}, summary["all"]
        whole = "latency_ms_including_waiting" if latency.get("includes_waiting") else "policy_ms"
        rates = {f"success_rate/{row['task_name']}": row["rate"] for row in summary["tasks"]}
        motion = {key: numbers[key] for key in ("mean_steps_to_success", "mean_jerk", "mean_progress")}
        costs = {
            "tokens_kept": kept.get("mean"),
            whole: latency.get("median"),
            "waiting_ms": latency.get("waiting_median"),
        }
        self._send({**rates, "success_rate/all": numbers["rate"], **costs, **motion})
        self.close()

    def close(self) -> None:
        """End the run; may be called twice."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def _send(self, figures: dict[str, Any]) -> None:
        if not self._active:
            return
        try:
            if self._run is None:
                self._run = self._begin()
            self._run.log({name: value for name, value in figures.items() if value is not None})
        except Exception as error:
            self._active = False
            logger.warning("nothing more is sent to Weights & Biases: %s", error)

    def _begin(self) -> Any:
        import wandb

        config = self._plan.config
        return wandb.init(
            entity=config.wandb_entity,
            project=config.wandb_project,
            name=self._plan.output_dir.name,
            dir=str(self._plan.output_dir),
        )
