"""Runs with lerobot's interpreter: writes the episodes of a NumPy file as a LeRobot dataset, by lerobot's own code.

python lerobot_peer.py EPISODES.npz FOLDER image|video CODEC
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

CAMERAS = ("observation.images.image", "observation.images.wrist_image")


def main(source: str, folder: str, kind: str, codec: str) -> None:
    stored = np.load(source)
    picture = {
        "dtype": kind,
        "shape": stored["observation.images.image_0"].shape[1:],
        "names": ["height", "width", "channel"],
    }
    features = {
        **dict.fromkeys(CAMERAS, picture),
        "observation.state": {"dtype": "float32", "shape": (8,), "names": [f"s{number}" for number in range(8)]},
        "action": {"dtype": "float32", "shape": (7,), "names": [f"a{number}" for number in range(7)]},
    }
    options = {"vcodec": codec} if kind == "video" else {}
    dataset = LeRobotDataset.create(
        "tests/tiny", fps=20, features=features, root=folder, robot_type="panda", use_videos=kind == "video", **options
    )
    number = 0
    while f"action_{number}" in stored:
        for step in range(len(stored[f"action_{number}"])):
            frame = {name: stored[f"{name}_{number}"][step] for name in features}
            dataset.add_frame({**frame, "task": str(stored[f"task_{number}"])})
        dataset.save_episode(parallel_encoding=False)
        number += 1
    dataset.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
