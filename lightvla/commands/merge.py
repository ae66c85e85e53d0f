"""Merge the adapter of a checkpoint into its base model, so that the checkpoint can be evaluated.

    lightvla merge --base_checkpoint openvla/openvla-7b \
        --lora_finetuned_checkpoint_dir runs/my-run--10000_chkpt

For checkpoints of `finetune.py --merge_lora_during_training False`, and for those of OpenVLA-OFT and LightVLA. Needs no
GPU, and memory for one weight file. Ends with 0 when the weights are written, 2 when they cannot be.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from prismatic.checkpoints.adapters import merge_adapter
from prismatic.command_line import parse_or_exit
from prismatic.command_status import UNUSABLE, print_error


@dataclass
class MergeConfig:
    """What to merge."""

    lora_finetuned_checkpoint_dir: Path  # what fine-tuning wrote; holds lora_adapter/
    base_checkpoint: str | None = None  # folder or hub id of the model it was trained on; None: what the adapter says
    output_dir: Path | None = None  # a new folder; None: the weights go into the checkpoint's own, atomically


def main(config: MergeConfig) -> int:
    """Returns the exit status."""
    log = logging.getLogger("merge")
    try:
        folder = merge_adapter(config.lora_finetuned_checkpoint_dir, config.base_checkpoint, config.output_dir)
    except (ValueError, OSError) as error:
        print_error(error)
        return UNUSABLE
    log.info("merged: %s", folder)
    return 0


def command() -> int:
    """What the command line runs; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    return main(parse_or_exit(MergeConfig))
