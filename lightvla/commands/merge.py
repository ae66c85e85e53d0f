"""Merge the adapter of a checkpoint into its base model, so that the checkpoint can be evaluated.

    lightvla merge --base_checkpoint openvla/openvla-7b \
        --lora_finetuned_checkpoint_dir runs/my-run--10000_chkpt

For checkpoints of `lightvla finetune --merge_lora_during_training False`, and for those of OpenVLA-OFT and LightVLA.
Needs no GPU, and little memory: tensors are merged one after the other. Ends with 0 when the weights are
written, 2 when they cannot be.
"""

import logging

from lightvla.flags import MergeConfig
from prismatic.checkpoints.adapters import merge_adapter
from prismatic.checkpoints.places import stands_for
from prismatic.command_status import UNUSABLE, print_error


def main(config: MergeConfig) -> int:
    """Returns the exit status."""
    log = logging.getLogger("merge")
    try:
        folder = merge_adapter(
            stands_for(config.lora_finetuned_checkpoint_dir), config.base_checkpoint, config.output_dir
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print_error(error)
        return UNUSABLE
    log.info("merged: %s", folder)
    return 0


def command(config: MergeConfig) -> int:
    """What the command line runs; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    return main(config)
