"""What one picture at random costs, RLDS or LeRobot: processor time of reading and decoding it.

python scripts/dev/loading/measure_reading.py datasets/NAME [--robot libero --gripper libero]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[3])

from prismatic.vla.datasets.entries.opening import open_dataset
from prismatic.vla.datasets.entries.spec_file import find_dataset_spec, read_spec_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_dir", type=Path)
    parser.add_argument("--robot")
    parser.add_argument("--gripper")
    parser.add_argument("--dataset_spec", type=Path)
    parser.add_argument("--pictures", type=int, default=300, help="of each camera")
    given = parser.parse_args()
    folder = given.dataset_dir.resolve()
    spec = find_dataset_spec(folder.name, given.robot, given.gripper, read_spec_file(given.dataset_spec))
    begun = time.process_time()
    index = open_dataset(folder.parent, folder.name, spec)
    print(f"opened in {time.process_time() - begun:.2f} s of processor time: {len(index.episodes)} episodes")
    rng = np.random.default_rng(0)
    for camera in sorted(index.episodes[0].cameras):
        episodes = [index.episodes[number] for number in rng.integers(len(index.episodes), size=given.pictures)]
        places = [(episode, int(rng.integers(episode.num_frames))) for episode in episodes]
        places[0][0].image(camera, places[0][1])
        begun = time.process_time()
        for episode, step in places:
            shape = episode.image(camera, step).shape
        print(f"{camera} {shape}: {(time.process_time() - begun) / given.pictures * 1e3:.2f} ms a picture")


if __name__ == "__main__":
    main()
