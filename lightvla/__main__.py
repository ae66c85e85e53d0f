"""One command for all that this project does: `lightvla finetune`, `lightvla eval` and so on.

    lightvla                                             # lists the commands
    lightvla eval --help                                 # the flags of one
    torchrun --nproc-per-node 8 -m lightvla finetune ... # with several processes

Each command is the same function as its file in `scripts/`, `vla-scripts/` or `experiments/robot/libero/`. Flags are
read before the command's module is imported, so that `--help` and what is mistyped are answered without torch.
"""

import dataclasses
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

from prismatic import __version__
from prismatic.command_status import STOPPED, UNUSABLE, noticing_ctrl_c, print_error, raise_swallowed_ctrl_c


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        what: it does, in a line.
        flags: `module:name` of a configuration's dataclass, or of a function that makes an argparse parser. The module
            imports nothing heavy.
        module: whose `command(flags)` runs it and returns the exit status.
    """

    what: str
    flags: str
    module: str


COMMANDS = {
    "finetune": Command(
        "fine-tune a policy, with its token pruner, on an RLDS or LeRobot dataset",
        "lightvla.flags:FinetuneFlags",
        "lightvla.commands.finetune",
    ),
    "eval": Command(
        "evaluate a policy in the LIBERO simulator",
        "experiments.robot.libero.settings.flags:EvaluationConfig",
        "experiments.robot.libero.evaluation.command",
    ),
    "serve": Command(
        "serve a policy to robots: WebSocket, HTTP, metrics, a page to watch",
        "prismatic.serving.settings:ServerConfig",
        "lightvla.commands.deploy",
    ),
    "collect": Command(
        "collect demonstrations of LIBERO tasks as an RLDS dataset",
        "experiments.robot.libero.demonstrations.config:CollectionConfig",
        "lightvla.commands.collect",
    ),
    "regenerate": Command(
        "turn LIBERO's HDF5 demonstrations into an RLDS dataset, replayed",
        "experiments.robot.libero.demonstrations.config:RegenerationConfig",
        "experiments.robot.libero.demonstrations.regenerate_command",
    ),
    "compare": Command(
        "compare evaluations: tables with intervals, paired tests",
        "lightvla.flags:compare_parser",
        "lightvla.commands.compare",
    ),
    "merge-results": Command(
        "put the shards of one evaluation together",
        "lightvla.flags:merge_results_parser",
        "lightvla.commands.merge_results",
    ),
    "report": Command(
        "make the report of evaluations or training runs: HTML, of evaluations Markdown, too",
        "lightvla.flags:report_parser",
        "lightvla.commands.report",
    ),
    "benchmark": Command(
        "measure what an action costs: engines, pruners and dtypes side by side",
        "prismatic.benchmark.config:BenchmarkConfig",
        "lightvla.commands.benchmark",
    ),
    "inspect": Command(
        "say what a checkpoint holds and what is wrong with it",
        "lightvla.flags:inspect_parser",
        "lightvla.commands.inspect_checkpoint",
    ),
    "inspect-dataset": Command(
        "look at an RLDS or LeRobot dataset: what it holds and what is wrong with it, as a report",
        "lightvla.flags:inspect_dataset_parser",
        "lightvla.datasets.inspect_dataset",
    ),
    "merge": Command(
        "merge a LoRA adapter into its base model", "lightvla.flags:MergeConfig", "lightvla.commands.merge"
    ),
    "push": Command(
        "upload a checkpoint to the Hugging Face hub, with a model card",
        "lightvla.flags:push_parser",
        "lightvla.commands.push",
    ),
    "visualize": Command(
        "draw which image patches a policy kept", "lightvla.flags:visualize_parser", "lightvla.commands.visualize"
    ),
    "looks": Command(
        "say on which objects a policy's kept tokens lie, phase by phase, and whether it needs them there",
        "experiments.robot.libero.looks.config:LooksConfig",
        "experiments.robot.libero.looks.command",
    ),
    "replay": Command(
        "repeat a recorded episode in the simulator, without the model",
        "lightvla.flags:replay_parser",
        "lightvla.commands.replay",
    ),
    "records-to-rlds": Command(
        "turn recorded episodes or folders of frames into an RLDS dataset",
        "lightvla.flags:records_to_rlds_parser",
        "lightvla.recordings.records_to_rlds",
    ),
    "replay-plot": Command(
        "plot a policy's actions against recorded ones, without a robot",
        "lightvla.flags:replay_plot_parser",
        "lightvla.recordings.replay_plot",
    ),
    "play": Command(
        "play with a policy in the simulator, in a browser: instructions, objects, pruners",
        "lightvla.flags:PlayConfig",
        "lightvla.play",
    ),
    "demo": Command(
        "collect, build, fine-tune, evaluate, report: a small policy from nothing",
        "lightvla.demo.settings:DemoConfig",
        "lightvla.demo.run",
    ),
    "study": Command(
        "train and measure arms alike from one definition, with paired verdicts",
        "lightvla.study.flags:study_parser",
        "lightvla.study.run",
    ),
    "build-small-model": Command(
        "make a small untrained policy", "lightvla.demo.settings:SmallModelConfig", "lightvla.demo.small_model"
    ),
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.what}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: lightvla COMMAND [FLAGS]", "", *lines, "", "lightvla COMMAND --help lists the flags."])


def read_flags(name: str) -> Any:
    """The flags of this process, as the command takes them; ends it for `--help` and what cannot be read."""
    module, _, attribute = COMMANDS[name].flags.partition(":")
    flags = getattr(importlib.import_module(module), attribute)
    if isinstance(flags, type) and dataclasses.is_dataclass(flags):
        from prismatic.command_line import parse_or_exit

        return parse_or_exit(flags)
    return flags().parse_args()


def run(name: str) -> int:
    """Run a command with the flags of this process; returns the exit status, 130 where it is stopped while it loads."""
    # Before torch is imported: its idle threads must not take the cores from simulators and data loaders.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with noticing_ctrl_c():
            flags = read_flags(name)
            module = importlib.import_module(COMMANDS[name].module)
            raise_swallowed_ctrl_c()
    except KeyboardInterrupt:
        print("stopped before it began", file=sys.stderr)
        return STOPPED
    return module.command(flags)


def _say(text: str) -> int:
    """Prints; that nobody reads it (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python would write at its end
    return 0


def main() -> int:
    """Returns the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        return _say(usage())
    if name in ("--version", "-V"):
        return _say(__version__)
    if name not in COMMANDS:
        print_error(f"unknown command {name!r}\n\n{usage()}")
        return UNUSABLE
    sys.argv[:2] = [f"lightvla {name}"]
    return run(name)


if __name__ == "__main__":
    sys.exit(main())
