"""One undisturbed evaluation in one process, which others are compared with."""

import pytest
from wandering_agent import Wanders, plan_into

from experiments.robot.libero.evaluation.evaluate import evaluate
from experiments.robot.libero.results.results import Results


@pytest.fixture(scope="session")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The undisturbed evaluation, one rollout after the other in this process."""
    return evaluate(plan_into(tmp_path_factory.mktemp("serial")), Wanders(), ["eval"])
