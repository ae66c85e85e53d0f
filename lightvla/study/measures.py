"""What an arm costs, from what its training and its evaluation left behind."""

from pathlib import Path
from typing import overload

import numpy as np

from experiments.robot.libero.results.results import Results
from prismatic.report.figures import points_of, read_metrics


@overload
def rounded(value: float) -> float: ...
@overload
def rounded(value: None) -> None: ...
def rounded(value: float | None) -> float | None:
    """To four digits: results are kept in git, and nothing is measured better."""
    return None if value is None else float(f"{value:.4g}")


def peak_memory(metrics: Path) -> dict[str, float]:
    """`host_peak_gb`, and on a GPU `device_peak_gb`, of a training: the most that any line of its metrics tells."""
    records = read_metrics(metrics)
    found = {key: points_of(records, key)[1] for key in ("host_peak_gb", "device_peak_gb")}
    return {key: rounded(float(values.max())) for key, values in found.items() if values.size}


def query_flops(results: Results) -> int | None:
    """Floating-point operations of a policy query at the mean number of kept tokens and the mean length of the prompts.

    By `prismatic.models.flops`, all rows of the last layer counted. None for a policy behind a server.
    """
    checkpoint = results.config.get("pretrained_checkpoint")
    if not checkpoint or not Path(checkpoint).is_dir():
        return None
    # torch is loaded here alone: showing a plan needs none of it.
    from prismatic.models.flops import count_flops
    from prismatic.policy import Policy

    policy = Policy.from_pretrained(checkpoint, device="cpu", dtype="float32", engine="eager")
    pruner = str(results.policy["pruner"])
    policy.set_pruner(pruner)
    tokens = [number for episode in results.episodes for number in episode.tokens_kept]
    kept = None if pruner == "none" else round(float(np.mean(tokens)))
    prompts = [len(policy.transform.input_ids(episode.instruction)) for episode in results.episodes]
    parts = (policy.model, policy.action_head, policy.proprio_projector)
    return count_flops(*parts, kept, round(float(np.mean(prompts)))).total
