"""Fine-tune a policy, with its token pruner, on an RLDS dataset.

    torchrun --standalone --nproc-per-node 8 -m lightvla finetune --vla_path openvla/openvla-7b \
        --data_root_dir datasets/rlds --dataset_name libero_spatial_no_noops --run_root_dir runs

One process needs no torchrun. `--help` lists the flags; `prismatic/training/config.py` says what they mean.
"""

import logging
import os

import huggingface_hub.utils.logging
import transformers
from rich import get_console
from rich.logging import RichHandler

from prismatic.command_line import speaks_for_node
from prismatic.command_status import PREEMPTED, STOPPED, UNUSABLE, UNWANTED, print_error
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import withdraw
from prismatic.training.loop import BadInput, finetune
from prismatic.training.preemption import Preempted


def command(config: FinetuneConfig) -> int:
    """Returns the exit status: 2 for bad input, which is told in one message; 75 where a signal asked it to end."""
    is_main = os.environ.get("RANK", "0") == "0"
    if get_console().is_terminal:
        logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_path=False)])
    else:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger().setLevel(logging.INFO if is_main else logging.ERROR)
    huggingface_hub.utils.logging.set_verbosity_warning()
    if not (is_main and get_console().is_terminal):
        transformers.utils.logging.disable_progress_bar()  # into a file its two lines run together
    log = logging.getLogger("finetune")
    try:
        folder = finetune(config)
    except BadInput as error:
        if speaks_for_node():
            print_error(error)
        if error.others_wait:
            withdraw(config.device, str(error))
        return UNUSABLE
    except FloatingPointError as error:
        if is_main:  # the loss is that of all
            print_error(error)
        return UNWANTED
    except Preempted as error:
        if is_main:
            log.warning("%s: step %d is saved; the same command goes on", error.signal, error.step)
        return STOPPED if error.signal == "SIGINT" else PREEMPTED
    except KeyboardInterrupt:
        log.error("stopped; the same command goes on from the last checkpoint")
        return STOPPED
    log.info("done: %s", folder or "this was a dry run, nothing is trained")
    return 0
