"""From what callers hand over to samples of model inputs: several observations at once, in threads that all share."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prismatic.machine import available_cores
from prismatic.vla.observation import Observation, ObservationDoubts, read_observation
from prismatic.vla.request import Observation as Given
from prismatic.vla.transform import PolicyTransform

Item = TypeVar("Item")
Result = TypeVar("Result")


class Preparation:
    """Reads observations, and doubts them once."""

    def __init__(self, transform: PolicyTransform) -> None:
        statistics = transform.statistics.get("proprio") if transform.use_proprio else None
        self._doubts = ObservationDoubts(transform.robot.state_key, statistics)

    def samples(
        self, transform: PolicyTransform, observations: Sequence[Given], instructions: Sequence[str | bytes]
    ) -> list[dict[str, Any]]:
        """Each observation as the model takes it; the same keys as a training sample, without actions.

        Raises ValueError for the first observation that is none, or its instruction.
        """
        found = []
        work = functools.partial(_sample, transform)
        for sample, read in in_threads(work, list(zip(observations, instructions, strict=True))):
            self._doubts.look(read)  # in order: what is said once is said of the first
            found.append(sample)
        return found


def _sample(transform: PolicyTransform, request: tuple[Given, str | bytes]) -> tuple[dict[str, Any], Observation]:
    observation, instruction = request
    read = read_observation(observation, transform.robot, transform.num_images, transform.use_proprio)
    sample: dict[str, Any] = {
        "input_ids": transform.input_ids(instruction),
        "pixel_values": transform.pixel_values(transform.prepare_images(read.images)),
    }
    if read.state is not None:
        sample["proprio"] = transform.proprio(read.state)
    return sample, read


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results of `work` for every item, in order; as many at a time as this process may use cores.

    `work` spends its time outside the interpreter's lock, as NumPy and the decoders of pictures do, and waits for no
    other work of this kind. The first item in order whose work raises is the one whose error comes out.
    """
    if len(items) == 1 or (cores := available_cores()) == 1:
        return map(work, items)
    return _pool(os.getpid(), cores).map(work, items)


@functools.lru_cache(maxsize=1)  # a forked process has none of its parent's threads
def _pool(process: int, cores: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores, thread_name_prefix="observations")
