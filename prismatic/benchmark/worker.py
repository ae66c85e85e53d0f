"""A process of a benchmark: holds a policy and answers on its standard output, a line of JSON per line that it is sent.

Imports only what a policy needs before the first action, so that its own start is what a user's program would see.
"""

import json
import os
import sys
import time
from typing import IO, Any


def main() -> None:
    """Told on the command line: the job as JSON, when it was started (seconds since the epoch), whether that is all."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not stand between the answers
    job, started, only_cold = json.loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "cold"
    try:
        _serve(job, started, only_cold, answers)
    except (ValueError, OSError) as error:
        _answer(answers, {"error": str(error)})


def _answer(answers: IO[str], what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def _serve(job_json: dict[str, Any], started: float, only_cold: bool, answers: IO[str]) -> None:
    from prismatic.benchmark.subject import Job, Subject
    from prismatic.machine import resident_bytes

    job = Job.from_json(job_json)
    imported, before = time.time(), resident_bytes()
    subject = Subject(job)
    subject.acting(0)
    loaded = time.time()
    _ = subject.observations, subject.instruction  # made up here, taken by a camera elsewhere: not part of the start
    begun = time.time()
    subject.prepare(0)
    prepared = time.time()
    subject.act(0, 0)
    acted = time.time()
    cold: dict[str, Any] = {
        "imports": imported - started, "weights": loaded - imported, "warm_up": prepared - begun,
        "first_call": acted - prepared, "total": loaded - started + acted - begun,
    }  # fmt: skip
    if only_cold:
        from prismatic.benchmark.figures import memory

        on_gpu = subject.device.type == "cuda"
        _answer(answers, {"cold": cold, "memory": memory(subject, 0, 0 if on_gpu else before)})
        return
    _answer(answers, {"dtype": str(subject.dtype).removeprefix("torch.")})
    for line in sys.stdin:
        _answer(answers, _done(subject, json.loads(line)))


def _done(subject: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request `{"do": "call" | "account" | "ceilings", "place": ..., "number": ...}`."""
    if request["do"] == "call":
        return subject.call(request["place"], request["number"])
    from prismatic.benchmark import figures

    if request["do"] == "account":
        return figures.account(subject, request["place"])
    return figures.ceilings(subject)


if __name__ == "__main__":
    main()
