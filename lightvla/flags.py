"""The flags of the commands whose configuration is no dataclass of a package below.

Nothing here imports torch, the simulator or drawing: a command reads its flags before anything heavy is imported, so
that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from experiments.robot.libero.settings.flags import MAX_EMBEDDED_MB
from experiments.robot.libero.settings.training_flags import RolloutFlags
from lightvla.demo.settings import TASKS, DemoConfig, Paths
from prismatic.training.config import FinetuneConfig

TABLE_FORMATS = ("text", "markdown", "csv", "latex")
TABLE_SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".txt": "text"}


@dataclass
class FinetuneFlags(RolloutFlags, FinetuneConfig):
    """Fine-tune a checkpoint on an RLDS or LeRobot dataset. A step is an optimiser step, also with accumulation."""

    def config(self) -> FinetuneConfig:
        """What makes the run; the rest only looks at it, and is no part of its identity."""
        return FinetuneConfig(**{field.name: getattr(self, field.name) for field in fields(FinetuneConfig)})


@dataclass
class MergeConfig:
    """Merge the adapter of a checkpoint into its base model, so that the checkpoint can be evaluated."""

    lora_finetuned_checkpoint_dir: Path  # what fine-tuning wrote; holds lora_adapter/
    base_checkpoint: str | None = None  # folder or hub id of the model it was trained on; None: what the adapter says
    output_dir: Path | None = None  # a new folder; None: the weights go into the checkpoint's own, atomically


@dataclass
class PlayConfig:
    """Play with a policy in the LIBERO simulator: watch what it sees and keeps, and tell it what to do."""

    # Policy
    pretrained_checkpoint: str = str(Paths(DemoConfig().output_dir).run)  # checkpoint folder or hub id
    unnorm_key: str | None = None  # dataset whose statistics apply; None: the only one
    device: str = "auto"  # auto, cpu or cuda
    dtype: str | None = None  # bfloat16, float16, float32; None: bfloat16 on GPUs and CPUs that are faster in it
    pruner: str | None = None  # the one to begin with; None: as trained
    trained_tasks: str = TASKS  # tasks whose instructions the policy was trained on, which are named first; empty: none

    # Simulator
    task_suite_name: str = "libero_goal"  # the suite that the scene is of
    task_id: int = 8  # the task whose scene, initial states and instruction it begins with
    initial_state: int = 30  # which of them
    env_img_res: int = DemoConfig().resolution  # side of the rendered pictures in pixels
    renderer: str = "fast"  # fast or robosuite, as the policy's data was drawn
    num_open_loop_steps: int | None = None  # actions executed of each chunk, the first ones; None: the robot's
    max_steps: int | None = None  # control steps of an episode; None: the suite's
    seed: int = 7  # of the fixtures' poses

    # Address
    host: str = "127.0.0.1"  # any other than this machine's own needs a key
    port: int = 8000  # 0: any free one, which is printed
    api_key_file: Path | None = None  # holds the key that browsers open the page with; None: LIGHTVLA_API_KEY, if set
    open_browser: bool = False  # open the page


class _WithDefaults(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands; the default of each flag that has one and does not say so itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == [] or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=_WithDefaults, allow_abbrev=False)


def compare_parser() -> argparse.ArgumentParser:
    parser = _parser("Tables of evaluations, and whether one policy is better than another.")
    add = parser.add_argument
    add("results", nargs="+", help="results.json files, or folders that hold one")
    add("--against", nargs="+", help="the other policy's, on the same episodes (default: none, a table of each)")
    add(
        "--names", nargs="+",
        help="two with --against; else one per file, a policy's files alike (default: what tells the policies apart)",
    )  # fmt: skip
    add("--format", choices=TABLE_FORMATS, help="default: by the suffix of --output, else text")
    add(
        "--output",
        help=f"file to write the table into: {', '.join(TABLE_SUFFIXES)} (default: the terminal shows it)",
    )
    add(
        "--plan", type=float, metavar="POINTS",
        help="say how many trials show a difference of so many points (default: not said)",
    )  # fmt: skip
    return parser


def report_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Make the report of one or several evaluations, or of one or several training runs, which may still go on:\n"
        "report.html, a page that opens offline, and of evaluations report.md. Nothing is evaluated or trained again."
    )
    add = parser.add_argument
    add(
        "results",
        nargs="+",
        type=Path,
        help="folders of evaluations or their results.json, or folders of training runs",
    )
    add("--output_dir", type=Path, help="default: the folder that is given, of several the one that holds them all")
    add(
        "--max_embedded_mb", type=float, default=MAX_EMBEDDED_MB,
        help="clips and pictures beyond so many megabytes are linked, not embedded",
    )  # fmt: skip
    return parser


def merge_results_parser() -> argparse.ArgumentParser:
    parser = _parser("Put the shards of one evaluation together: one results.json, as without --shard.")
    parser.add_argument("output_dir", type=Path, help="folder for the merged results; holds none yet")
    parser.add_argument("shards", nargs="+", type=Path, help="results.json files of the shards, or their folders")
    return parser


def inspect_parser() -> argparse.ArgumentParser:
    parser = _parser("Say what a checkpoint holds and what is wrong with it, without loading it.")
    parser.add_argument("checkpoint", help="folder or hub id")
    return parser


def inspect_dataset_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Look at an RLDS or LeRobot dataset before a policy is trained on it: episodes, statistics, instructions,\n"
        "pictures, action plots, and what is wrong, with its remedy. Writes report.html (opens offline) and report.md."
    )
    add = parser.add_argument
    add("dataset_dir", type=Path, help="RLDS or LeRobot dataset, DATA/NAME")
    add("--robot", help="layout of a dataset that the catalogue does not know (default: the catalogue's)")
    add("--dataset_spec", type=Path, help="YAML file that says how the dataset is read (default: none)")
    add("--gripper", help="how such a dataset stores the gripper (default: the catalogue's)")
    add("--pictures", type=int, default=500, help="pictures per camera that are looked at, and twice as many at most")
    add("--output_dir", type=Path, help="folder of the report (default: dataset_reports/NAME)")
    return parser


def push_parser() -> argparse.ArgumentParser:
    parser = _parser("Upload a checkpoint to the Hugging Face hub with a model card.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint folder")
    add("repo_id", help="user/name on the hub")
    add("--results", type=Path, nargs="*", default=[], help="results.json of evaluations (default: none)")
    add("--license", default="mit", help="licence of the weights, as the hub names it")
    add("--private", action="store_true", help="create the repository as a private one")
    add("--dry_run", type=Path, metavar="DIR", help="only write the folder to upload, here (default: upload)")
    return parser


def replay_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Repeat a recorded episode in the simulator, without the model, and say whether it comes out the same."
    )
    add = parser.add_argument
    add("record", type=Path, help=".npz file that `lightvla eval --record True` wrote")
    add("--video", type=Path, help="MP4 to draw on the way, with what the policy kept (default: none)")
    add("--every_steps", type=int, default=2, help="a frame each so many steps")
    add(
        "--record_steps", type=Path, metavar="DIR",
        help="write a record of every control step here, which records-to-rlds takes (default: none)",
    )  # fmt: skip
    return parser


def records_to_rlds_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Turn recorded episodes, or plain folders of frames, into an RLDS dataset that lightvla finetune reads.\n"
        "A folder of frames holds a folder of PNG or JPEG files per camera (full_image/000000.png, ...), states.npy,\n"
        "actions.npy, instruction.txt and, if you like, success.txt (true or false)."
    )
    add = parser.add_argument
    add(
        "sources", nargs="+", type=Path,
        help="records of every control step (.npz), folders of them, or folders of frames",
    )  # fmt: skip
    add("--dataset_name", required=True, help="lower case words joined by underscores, such as kitchen_1")
    add("--output_dir", type=Path, default=Path("datasets"), help="folder of datasets; finetune's --data_root_dir")
    add("--robot", help="whose layout the dataset gets (default: libero where the name begins with libero_)")
    add("--dataset_spec", type=Path, help="YAML file that says the robot, features and gripper instead (default: none)")
    add(
        "--gripper",
        help="how the actions.npy of folders of frames store the gripper; libero, open1, closed1, width:C,O",
    )
    add("--rotate", type=int, choices=(0, 90, 180, 270), default=0, help="degrees to turn the pictures by, to the left")
    add("--val_fraction", type=float, default=0.0, help="share of the episodes that becomes the split val")
    add("--only_success", action="store_true", help="leave out episodes that did not reach their goal")
    add("--replace", action="store_true", help="replace a dataset of that name")
    return parser


def replay_plot_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Plot what a policy predicts over a recorded episode against what was done, per action dimension.\n"
        "Nothing moves: the policy is asked about the recorded observations."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or hub id of the policy")
    add("--dataset_dir", type=Path, required=True, help="RLDS or LeRobot dataset, DATA/NAME")
    add("--episode", type=int, default=0, help="which one, counted from 0")
    add("--every", type=int, help="a policy query each so many steps of it (default: as in a rollout)")
    add("--robot", help="layout of a dataset that the catalogue does not know (default: the catalogue's)")
    add("--dataset_spec", type=Path, help="YAML file that says how the dataset is read (default: none)")
    add("--gripper", help="how such a dataset stores the gripper (default: the catalogue's)")
    add("--pruner", help="such as lightvla:multiplicity=set (default: the checkpoint's)")
    add("--unnorm_key", help="dataset whose statistics apply (default: the checkpoint's only one)")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--output", type=Path, default=Path("replay_plot.png"), help="PNG to write")
    return parser


def visualize_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Draw which image patches a policy's pruner kept: of recorded episodes (--record), or of a checkpoint over an\n"
        "episode of a dataset (--checkpoint, --dataset_dir) or over pictures (--checkpoint, --images)."
    )
    add = parser.add_argument
    none = "(default: none)"
    add(
        "--record", type=Path, nargs="+", help=f"recorded episodes: files, their folders, an evaluation's folder {none}"
    )
    add("--checkpoint", help=f"folder or hub id of a policy to run {none}")
    add("--dataset_dir", type=Path, help=f"RLDS or LeRobot dataset to take an episode from, DATA/NAME {none}")
    add("--episode", type=int, default=0, help="which one, counted from 0")
    add("--every", type=int, help="a policy query each so many steps of it (default: as in a rollout)")
    add("--robot", help="layout of a dataset that the catalogue does not know (default: the catalogue's)")
    add("--dataset_spec", type=Path, help="YAML file that says how the dataset is read (default: none)")
    add("--images", type=Path, nargs="+", help=f"one picture per camera, in the robot's order {none}")
    add("--instruction", help=f"sentence that goes with --images {none}")
    add("--state", type=float, nargs="+", help="state that goes with --images (default: the training data's mean)")
    add("--pruner", help="such as lightvla:multiplicity=set (default: the checkpoint's)")
    add("--unnorm_key", help="dataset whose statistics apply (default: the checkpoint's only one)")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--fps", type=float, help="policy queries a second in videos (default: real time)")
    add("--no_video", action="store_true", help="pictures only")
    add("--output_dir", type=Path, default=Path("pruning_pictures"), help="folder of the pictures")
    return parser
