"""A policy in this process, as an agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from prismatic.models.batch import Session
from prismatic.policy import Policy


class PolicyAgent:
    """A `prismatic.policy.Policy` of this process.

    Args:
        policy: acts in every suite that is not named otherwise.
        by_suite: the same model with the statistics of a suite (`checkpoint.policies_of_suites`).
        fingerprint: which weights it has (`checkpoint_fingerprint`), for its description; None: nobody asked.
    """

    def __init__(
        self, policy: Policy, by_suite: Mapping[str, Policy] | None = None, fingerprint: str | None = None
    ) -> None:
        self.policy = policy
        self._by_suite = dict(by_suite or {})
        self._fingerprint = fingerprint
        self._sessions: dict[str, Session] = {}
        self.robot = policy.robot
        self.cameras = policy.robot.cameras[: policy.transform.num_images]
        self.center_crop = policy.transform.center_crop

    def description(self) -> dict[str, Any]:
        keys = {suite: policy.unnorm_key for suite, policy in self._by_suite.items()}
        of_suites = {"unnorm_keys": keys} if len(set(keys.values())) > 1 else {}
        known = {} if self._fingerprint is None else {"weights_fingerprint": self._fingerprint}
        return {**self.policy.description(), **of_suites, **known}

    def warm_up(self) -> None:
        """Query once for nothing: what the first query of a process takes longer is no rollout's latency."""
        self.policy.warm_up()

    def close(self) -> None:
        """Nothing to give back: the policy belongs to whoever made it."""

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        """One action chunk per policy query, in order; those of one set of statistics are computed together."""
        places: dict[int, list[int]] = {}
        policies = [self._by_suite.get(query.suite, self.policy) for query in queries]
        for place, policy in enumerate(policies):
            places.setdefault(id(policy), []).append(place)
        found: dict[int, ActionChunk] = {}
        for together in places.values():
            chunks = self._act(policies[together[0]], [queries[place] for place in together])
            found.update(zip(together, chunks, strict=True))
        return [found[place] for place in range(len(queries))]

    def _session(self, query: PolicyQuery) -> Session | None:
        """The memory of the episode that is asked about, where the policy keeps any; of each asker the last one's."""
        if not query.session or not self.policy.uses_sessions:
            return None
        if query.number == 0 or query.session not in self._sessions:
            self._sessions[query.session] = self.policy.new_session()
        return self._sessions[query.session]

    def _act(self, policy: Policy, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        output = policy.act_batch(
            [query.observation for query in queries],
            [query.instruction for query in queries],
            [self._session(query) for query in queries],
            seeds=[query.seed for query in queries],
            blankings=[query.blanking for query in queries],
        )
        selection, stage_ms = output.selection, {k: round(1000 * v, 3) for k, v in output.timing.items()}
        kept = selection.kept().cpu().numpy()
        picks = np.zeros(kept.shape, np.float32)
        rows = np.arange(len(kept))[:, None]
        np.add.at(picks, (rows, selection.index.cpu().numpy()), selection.count.float().cpu().numpy())
        scores = [None] * len(kept) if selection.scores is None else list(selection.scores.cpu().numpy())
        without = selection.without_content()
        blanked = [None] * len(kept) if without is None else list(without.cpu().numpy())
        return [
            ActionChunk(output.actions[row], kept[row], picks[row], stage_ms, scores[row], blanked=blanked[row])
            for row in range(len(kept))
        ]
