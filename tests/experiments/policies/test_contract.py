"""Whom a rollout queries."""

from experiments.robot.libero.policies.local import PolicyAgent
from prismatic.policy import Policy


def test_warming_up_leaves_the_policys_doubts_to_the_rollouts(small_policy_directory, caplog):
    policy = Policy.from_pretrained(small_policy_directory)
    policy.transform.statistics["proprio"].update(min=[5.0] * 8, max=[6.0] * 8, mean=[5.5] * 8)
    caplog.clear()
    PolicyAgent(policy).warm_up()
    assert not caplog.records
