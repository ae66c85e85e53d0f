"""Which frames a run is watched on: few, always the same, of many tasks and of all parts of an episode."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from prismatic.pictures.learning import FixedFrame
from prismatic.training.data import Frames
from prismatic.vla.datasets.dataset import FrameDataset, FramePlace
from prismatic.vla.datasets.mixture import FrameMixture
from prismatic.vla.datasets.stored.episode import UnreadableImage
from prismatic.vla.preparation import Preparation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchedFrame:
    """A frame, to look at and as the model takes it at inference.

    Attributes:
        place: where it is.
        shown: to draw.
        sample: as `Policy.model_inputs`.
    """

    place: FramePlace
    shown: FixedFrame
    sample: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """What tells it from other frames, as JSON holds it."""
        return {**vars(self.place), "instruction": self.shown.instruction}


def choose_frames(frames: Frames, number: int) -> list[tuple[FrameDataset, int]]:
    """At most so many frames, with the dataset each is of: tasks in turn, of each episodes in turn.

    The k-th of n is at (k + 1/2) / n of its episode, so that they show it from beginning to end. A task is what has one
    dataset and sentence. Depends on the data alone.
    """
    by_task: dict[tuple[str, str], list[tuple[FrameDataset, range]]] = {}
    for dataset in frames.parts if isinstance(frames, FrameMixture) else [frames]:
        for numbers in dataset.by_episode():
            place = dataset.place(numbers[0])
            instruction = dataset.index.episodes[place.episode].instructions[place.step]
            by_task.setdefault((place.dataset, instruction), []).append((dataset, numbers))
    tasks = [by_task[key] for key in sorted(by_task)]
    most = min(len(tasks), number)
    chosen: dict[tuple[int, int], tuple[FrameDataset, int]] = {}
    for k in range(number):
        episodes = tasks[round((k % most) * (len(tasks) - 1) / max(1, most - 1))]
        turns = -(-number // most)
        dataset, numbers = episodes[(k // most) * len(episodes) // turns]
        index = numbers[int((k + 0.5) / number * len(numbers))]
        chosen.setdefault((id(dataset), index), (dataset, index))
    return list(chosen.values())


def read_frames(frames: Frames, number: int) -> list[WatchedFrame]:
    """The chosen frames; one whose picture cannot be decoded is named in the log and left out."""
    found = []
    for dataset, index in choose_frames(frames, number):
        try:
            frame = dataset.frame(index)
        except UnreadableImage as error:
            log.warning("no pictures are drawn of %s", error)
            continue
        transform = dataset.transform
        observation: dict[str, Any] = dict(frame.images)
        if transform.use_proprio and frame.state is not None:
            observation[transform.robot.state_key] = frame.state.astype(np.float64)
        (sample,) = Preparation(transform).samples(transform, [observation], [frame.instruction])
        place = dataset.place(index)
        words = f"episode {place.episode}, step {place.step}"
        if isinstance(frames, FrameMixture):
            words += f" of {place.dataset}"
        found.append(WatchedFrame(place, FixedFrame(frame.instruction, words, tuple(frame.images.values())), sample))
    return found
