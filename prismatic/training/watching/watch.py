"""What happens between steps for whoever watches a run: pictures of what is kept, and callbacks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from prismatic.policy import Policy
from prismatic.training.preemption import StopRequest
from prismatic.training.watching.current_policy import current_policy
from prismatic.training.watching.kept_tokens import KeptTokens

if TYPE_CHECKING:
    from prismatic.training.build import Run
    from prismatic.training.logging import RunLog


class Callback(Protocol):
    """Called now and then with the policy as it is, such as to roll it out.

    Every process of a run has one, and those must agree on `is_due`. The other two are called in the main process.
    """

    def is_due(self, step: int) -> bool:
        """Whether to be called behind finished step `step`; in all processes alike."""
        ...

    def rewind(self, step: int) -> None:
        """The run goes on behind finished step `step`: what was written of later ones is to be dropped."""
        ...

    def __call__(self, step: int, policy: Policy, stop: StopRequest) -> Mapping[str, float]:
        """Returns what the run's log is to hold of this step, by name.

        The policy is that of the run, with its present (averaged) weights, and of use during this call only. The other
        processes compute along with it, and wait for a query as long as for a checkpoint. An error ends the run. It
        should return soon once `stop.signal` is set: the run has been asked to end, and saves behind it.
        """
        ...


class Watch:
    """Looks at a run between its steps; every process makes one."""

    def __init__(self, run: "Run", run_log: "RunLog", callbacks: Sequence[Callback] = ()) -> None:
        self._run = run
        self._log = run_log
        self._callbacks = callbacks
        self._kept = KeptTokens(run, run_log)
        self._seen = run.training.step
        self._rewind(self._seen)
        if self._seen == 0 and self._kept.is_due(0):
            self._kept.draw(0)

    def look(self) -> None:
        """Whatever is due behind the step that has just been finished; every process must call it."""
        step = self._run.training.step
        if step <= self._seen:  # steps have been undone
            self._rewind(step - 1)
        self._seen = step
        if self._kept.is_due(step):
            self._kept.draw(step)
        for callback in self._callbacks:
            if callback.is_due(step):
                self._call(callback, step)

    def _call(self, callback: Callback, step: int) -> None:
        with self._run.ranks.together(Exception), current_policy(self._run) as policy:
            if policy is not None:
                values = callback(step, policy, self._run.stop)
                if values:
                    self._log.values(step, values)

    def _rewind(self, step: int) -> None:
        self._kept.rewind(step)
        if self._run.ranks.is_main:
            for callback in self._callbacks:
                callback.rewind(step)
