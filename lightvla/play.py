"""Play with a policy in the real simulator, in a browser.

    lightvla play                                     # the demo's policy, behind `make demo`
    lightvla play --pretrained_checkpoint FOLDER --task_suite_name libero_spatial --trained_tasks '' --env_img_res 256

The policy is served in this process as `lightvla serve` does it, with the same page; the simulator is its robot, in a
process of its own. Ends with 0 behind SIGTERM and 130 behind Ctrl+C; with 2 where flags, address or checkpoint cannot
be used.
"""

import logging
import signal
import time
import webbrowser
from contextlib import closing
from pathlib import Path

from rich.console import Console

from experiments.robot.libero.play.desk import Desk
from experiments.robot.libero.play.messages import PlaySettings
from experiments.robot.libero.play.routes import PANEL, play_router
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.settings.suite_names import STEP_CAPS, find_suite
from experiments.robot.libero.simulator.renderer import MIN_RESOLUTION, RENDERERS
from experiments.robot.libero.simulator.tasks import load_task
from lightvla.flags import PlayConfig
from prismatic.command_status import STOPPED, UNUSABLE, print_error
from prismatic.policy import Policy
from prismatic.recordings.served import facts_of, one_moment
from prismatic.serving.page.live import LiveFeed
from prismatic.serving.page.routes import page_router
from prismatic.serving.server.application import build_application
from prismatic.serving.server.events import Answered
from prismatic.serving.server.run import PolicyServer, take_address
from prismatic.serving.server.served import ServedPolicy
from prismatic.serving.settings import ServerConfig, check, read_secrets

logger = logging.getLogger(__name__)


def command(config: PlayConfig) -> int:
    """What the command line runs; returns the exit status."""
    console = Console()
    try:
        suite = find_suite(config.task_suite_name)
        tasks = _numbers(config.trained_tasks)
        _check_checkpoint(config.pretrained_checkpoint)
        _check_scene(config)
        server_config = ServerConfig(
            pretrained_checkpoint=config.pretrained_checkpoint,
            host=config.host,
            port=config.port,
            api_key_file=config.api_key_file,
        )
        check(server_config)
        secrets = read_secrets(server_config)
        with take_address(server_config) as bound, closing(Desk()) as desk:
            with console.status("loading the policy"):
                policy = _load(config)
                _check_open_loop(config, policy)
                served = ServedPolicy(policy, server_config)
                served.policy.warm_up()
            feed, records = LiveFeed(), Records(served)
            page = page_router(feed, records.make, [PANEL])
            controls = play_router(desk, pruners(policy), records.set_pruner)
            application = build_application(served, server_config, [feed], [page, controls], secrets)
            server = PolicyServer(application, server_config, bound)
            desk.start(
                PlaySettings(
                    url=server.url,
                    api_key=secrets.api_key,
                    suite=config.task_suite_name,
                    task_index=config.task_id,
                    trained=tasks,
                    initial_state=config.initial_state,
                    resolution=config.env_img_res,
                    renderer=config.renderer,
                    seed=config.seed,
                    canonical_quaternion=policy.robot.canonical_quaternion,
                    open_loop_steps=config.num_open_loop_steps or policy.robot.open_loop_steps,
                    max_steps=config.max_steps or STEP_CAPS[suite.base],
                )
            )
            console.print(f"open [bold]{server.http_url}[/] in a browser; Ctrl+C ends it", highlight=False)
            if config.open_browser:
                webbrowser.open(server.http_url)
            ended_by = server.serve_forever()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print_error(error)
        return UNUSABLE
    except KeyboardInterrupt:
        print_error("stopped before it served")
        return STOPPED
    return STOPPED if ended_by == signal.SIGINT else 0


class Records:
    """Makes records of single moments, each with the pruner that its policy ran with."""

    def __init__(self, served: ServedPolicy) -> None:
        self._served, self._versions = served, collect_versions()
        self._since = [(0.0, served.info())]

    def set_pruner(self, spec: str) -> None:
        """Switch between two batches. Raises ValueError as `Policy.set_pruner`."""
        self._served.exclusively(lambda: self._served.policy.set_pruner(spec))
        self._since.append((time.time(), self._served.info()))

    def make(self, event: Answered) -> bytes:
        """The file."""
        info = next(info for since, info in reversed(self._since) if since <= event.time)
        return one_moment(event, facts_of(info, self._versions))


def pruners(policy: Policy) -> dict[str, str]:
    """What a person may choose -> its specification: as loaded, then LightVLA's, none, as many random tokens."""
    own = str(policy.model.config.pruner_spec)
    name = own.partition(":")[0]
    chosen = {name: own}
    for other in ("lightvla", "none", "random"):
        chosen.setdefault(other, other)
    if policy.model.config.pruner_spec.has_parameters:
        del chosen["random"]  # keeps as many tokens as LightVLA would, which is no control for another pruner
    return chosen


def _numbers(text: str) -> tuple[int, ...]:
    """`1,4,8` -> numbers of tasks. Raises ValueError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--trained_tasks {text}: expected numbers of tasks with commas, as 1,4,8, or nothing")
    return tuple(map(int, words))


def _load(config: PlayConfig) -> Policy:
    return Policy.from_pretrained(
        config.pretrained_checkpoint,
        device=config.device,
        dtype=config.dtype,
        unnorm_key=config.unnorm_key,
        pruner=config.pruner,
    )


def _check_scene(config: PlayConfig) -> None:
    """Raises ValueError for what the simulator, in its own process, would refuse when the page is there already."""
    if config.renderer not in RENDERERS:
        raise ValueError(f"unknown --renderer {config.renderer!r}; known: {', '.join(RENDERERS)}")
    for flag, least in (("env_img_res", MIN_RESOLUTION), ("num_open_loop_steps", 1), ("max_steps", 1)):
        if (given := getattr(config, flag)) is not None and given < least:
            raise ValueError(f"--{flag} {given}: expected at least {least}")
    states = len(load_task(config.task_suite_name, config.task_id).init_states)
    if not 0 <= config.initial_state < states:
        raise ValueError(f"--initial_state {config.initial_state}: expected 0 to {states - 1}")


def _check_open_loop(config: PlayConfig, policy: Policy) -> None:
    chunk = policy.robot.chunk_length
    if (config.num_open_loop_steps or 1) > chunk:
        raise ValueError(f"--num_open_loop_steps {config.num_open_loop_steps}: expected at most {chunk}, a whole chunk")


def _check_checkpoint(name: str) -> None:
    """Raises FileNotFoundError where the demo's policy is meant and was never made."""
    if name == PlayConfig().pretrained_checkpoint and not Path(name).is_dir():
        raise FileNotFoundError(
            f"there is no {name}: `make demo` makes the demo's policy (about an hour), or give another one by "
            "--pretrained_checkpoint"
        )
