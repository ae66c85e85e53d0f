"""Fine-tune a policy, with its token pruner, on an RLDS or LeRobot dataset.

    torchrun --standalone --nproc-per-node 8 -m lightvla finetune --vla_path openvla/openvla-7b \
        --data_root_dir datasets/rlds --dataset_name libero_spatial_no_noops --run_root_dir runs

One process needs no torchrun. `--help` lists the flags. With `--rollout_freq` the policy is rolled out in LIBERO now
and then, which is this command's part: `prismatic/` knows no simulator.
"""

import logging
import os

import huggingface_hub.utils.logging
import transformers
from rich import get_console
from rich.logging import RichHandler

from lightvla.flags import FinetuneFlags
from prismatic.command_line import named_by_node, speaks_for_node
from prismatic.command_status import PREEMPTED, STOPPED, UNUSABLE, UNWANTED, print_error
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import withdraw
from prismatic.training.loop import BadInput, finetune
from prismatic.training.preemption import Preempted
from prismatic.training.watching.watch import Callback


def command(flags: FinetuneFlags) -> int:
    """Returns the exit status: 2 for bad input, which is told in one message; 75 where a signal asked it to end."""
    config = flags.config()
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
        folder = finetune(config, callbacks(flags, config))
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


def callbacks(flags: FinetuneFlags, config: FinetuneConfig) -> list[Callback]:
    """Rollouts, where the flags ask for them. Raises BadInput where they cannot be had."""
    if flags.rollout_freq == 0:
        return []
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it tells what it does without
    # Not before: it needs the simulator, which training does without.
    from experiments.robot.libero.evaluation.training_rollouts import make_rollouts

    try:
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return [*make_rollouts(flags, config, rank, processes)]
    except (ValueError, OSError) as error:
        raise BadInput(named_by_node(str(error)), others_wait=True) from error
