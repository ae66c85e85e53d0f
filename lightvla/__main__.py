"""One command for all that this project does: `lightvla finetune`, `lightvla eval` and so on.

    lightvla                                             # lists the commands
    lightvla eval --help                                 # the flags of one
    torchrun --nproc-per-node 8 -m lightvla finetune ... # with several processes

Each command is the same function as its file in `scripts/`, `vla-scripts/` or `experiments/robot/libero/`.
"""

import importlib
import os
import sys

from prismatic.command_status import UNUSABLE, print_error

COMMANDS = {
    "finetune": ("lightvla.commands.finetune", "fine-tune a policy, with its token pruner, on an RLDS dataset"),
    "eval": ("experiments.robot.libero.evaluation.command", "evaluate a policy in the LIBERO simulator"),
    "collect": ("lightvla.commands.collect", "collect demonstrations of LIBERO tasks as an RLDS dataset"),
    "compare": ("lightvla.commands.compare", "compare evaluations: tables with intervals, paired tests"),
    "merge-results": ("lightvla.commands.merge_results", "put the shards of one evaluation together"),
    "report": ("lightvla.commands.report", "make the report of evaluations, HTML and Markdown"),
    "inspect": ("lightvla.commands.inspect_checkpoint", "say what a checkpoint holds and what is wrong with it"),
    "merge": ("lightvla.commands.merge", "merge a LoRA adapter into its base model"),
    "push": ("lightvla.commands.push", "upload a checkpoint to the Hugging Face hub, with a model card"),
    "visualize": ("lightvla.commands.visualize", "draw which image patches a policy kept"),
    "replay": ("lightvla.commands.replay", "repeat a recorded episode in the simulator, without the model"),
    "demo": ("lightvla.demo.run", "collect, build, fine-tune, evaluate, report: a small policy from nothing"),
    "build-small-model": ("lightvla.demo.small_model", "make a small untrained policy"),
}
"""Name -> module, whose `command` runs it, and what it does."""


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: lightvla COMMAND [FLAGS]", "", *lines, "", "lightvla COMMAND --help lists the flags."])


def run(name: str) -> int:
    """Run a command with the flags of this process; returns the exit status."""
    # Before torch is imported: its idle threads must not take the cores from simulators and data loaders.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return importlib.import_module(COMMANDS[name][0]).command()


def main() -> int:
    """Returns the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print_error(f"unknown command {name!r}\n\n{usage()}")
        return UNUSABLE
    sys.argv[:2] = [f"lightvla {name}"]
    return run(name)


if __name__ == "__main__":
    sys.exit(main())
