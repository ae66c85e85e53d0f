"""Callbacks of a run: when they are called, with which policy, and what the run tells of their answers."""

import json
from collections.abc import Mapping

import numpy as np
import pytest

from prismatic.policy import Policy
from prismatic.training.loop import finetune
from prismatic.training.preemption import StopRequest

OBSERVATION = {
    "full_image": np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8),
    "wrist_image": np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8),
    "state": np.zeros(8),
}


class Acts:
    """Asks the policy for a chunk every two steps."""

    def __init__(self) -> None:
        self.chunks: dict[int, np.ndarray] = {}
        self.rewound: list[int] = []

    def is_due(self, step: int) -> bool:
        return step % 2 == 0

    def rewind(self, step: int) -> None:
        self.rewound.append(step)

    def __call__(self, step: int, policy: Policy, stop: StopRequest) -> Mapping[str, float]:
        assert stop.signal is None
        self.chunks[step] = policy.act(OBSERVATION, "turn on the stove")
        return {"reach": float(step)}


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_callback_gets_the_policy_that_is_saved(flags, ema_decay):
    config, acts = flags(max_steps=5, save_freq=2, ema_decay=ema_decay), Acts()
    finetune(config, [acts])
    assert list(acts.chunks) == [2, 4] and acts.rewound == [0]
    for step, chunk in acts.chunks.items():
        saved = Policy.from_pretrained(config.checkpoint_dir(step), dtype="float32", engine="eager")
        np.testing.assert_allclose(chunk, saved.act(OBSERVATION, "turn on the stove"), atol=1e-5)
    told = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reach"]) for line in told if "reach" in line] == [(2, 2.0), (4, 4.0)]
    again = Acts()
    finetune(flags(max_steps=5, save_freq=2, ema_decay=ema_decay, resume="2"), [again])
    assert again.rewound == [2] and list(again.chunks) == [4]
    np.testing.assert_array_equal(again.chunks[4], acts.chunks[4])
