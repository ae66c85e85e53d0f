"""Writes checkpoints behind the training: one at a time, in a thread."""

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs one job at a time in a thread. What a job raises is raised by the next call here."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last job ended by an error that nobody has been told of."""
        return self._error is not None

    def start(self, job: Callable[[], object]) -> None:
        """Begin a job, behind the one that is running."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer")
        self._thread.start()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the running job."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what the last job raised, if it has ended."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
