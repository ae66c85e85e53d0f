from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_rlds import write_tiny_rlds

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import Frames, TrainingData
from prismatic.training.watching.fixed_frames import choose_frames


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`libero_many_no_noops` has six episodes of two tasks, `libero_few_no_noops` one with two frames."""
    root = tmp_path_factory.mktemp("rlds")
    write_tiny_rlds(root, "libero_many_no_noops", episodes=6, steps=20)
    write_tiny_rlds(root, "libero_few_no_noops", episodes=1, steps=9, seed=1)
    return root


@pytest.fixture
def frames(flags, small_base: Path, root: Path) -> Callable[[str], Frames]:
    """Reads the frames of a dataset or mixture."""
    checkpoint = load_checkpoint(small_base)

    def read(name: str) -> Frames:
        config: FinetuneConfig = flags(data_root_dir=root, dataset_name=name)
        data = TrainingData(config)
        checkpoint.dataset_statistics = data.statistics
        return data.frames(lambda key: checkpoint.transform(key, center_crop=True, use_proprio=False))[0]

    return read


def places(frames: Frames, number: int) -> list[tuple[str, int, str, float]]:
    """Dataset, episode, sentence and how far into its frames, of each chosen frame."""
    found = []
    for dataset, index in choose_frames(frames, number):
        place = dataset.place(index)
        last = max(dataset.place(i).step for i in range(len(dataset)) if dataset.place(i).episode == place.episode)
        found.append((place.dataset, place.episode, dataset.frame(index).instruction, place.step / last))
    return found


def test_frames_are_of_tasks_in_turn_of_other_episodes_and_of_all_parts(frames):
    many = frames("libero_many_no_noops")
    chosen = places(many, 4)
    tasks = [instruction for *_, instruction, _ in chosen]
    assert tasks[:2] == tasks[2:] == ["Put the bowl on the plate", "turn on the stove"], "tasks in turn"
    assert len({episode for _, episode, *_ in chosen}) == 4
    parts = [part for *_, part in chosen]
    assert parts == sorted(parts) and parts[0] < 0.25 and parts[-1] > 0.75
    assert choose_frames(many, 4) == choose_frames(many, 4)


def test_every_dataset_of_a_mixture_has_its_turn_and_no_frame_comes_twice(frames):
    mixture = frames("libero_many_no_noops+libero_few_no_noops")
    assert {name for name, *_ in places(mixture, 3)} == {"libero_many_no_noops", "libero_few_no_noops"}
    few = frames("libero_few_no_noops")
    assert len(few) == 2 and len(choose_frames(few, 5)) == 2
