"""What is told of an arm beside its times: work, launches, memory, and what its device can do at best."""

from typing import Any

import torch

from prismatic.benchmark import accounting, device
from prismatic.benchmark.config import REFERENCE
from prismatic.benchmark.subject import Subject
from prismatic.policy import PolicyOutput

_FORMULAS = {REFERENCE: accounting.reference_flops, "eager": accounting.eager_flops}
"""By what ran; others compute what the action needs."""


def asked_of(subject: Subject, place: int) -> accounting.Prompted:
    """The eager parts of an arm, and what an observation asks of them: the second of a session, where there are any."""
    policy, output = subject.eager(place), _second_call(subject, place)
    model = policy.model
    kept: list[int] | None = None
    if model.config.pruner_spec.name != "none":
        kept = output.selection.kept()[0].unflatten(0, (model.num_images_in_input, -1)).sum(1).tolist()
    prompt = len(policy.transform.input_ids(subject.instruction))
    return accounting.Prompted(model, policy.action_head, policy.proprio_projector, kept, prompt)


def _second_call(subject: Subject, place: int) -> PolicyOutput:
    subject.begin(place)
    return subject.act(place, 1)


def account(subject: Subject, place: int) -> dict[str, Any]:
    """Operations by the formula, by component and by torch's counter; the least there are; bytes; launches."""
    engine, asked = subject.job.setting.engine, asked_of(subject, place)
    ran = subject.ran(place)  # known once it has acted
    flops = _FORMULAS.get(ran["name"], accounting.needed_flops)(asked)
    subject.begin(place)
    launched = accounting.count_launches(lambda: subject.act(place, 1), subject.device)
    subject.begin(place)
    read = accounting.weight_bytes(asked, engine == REFERENCE)
    return {
        "engine": ran,
        "prompt_tokens": asked.prompt_tokens,
        "flops": flops,
        # Replaying a graph calls no operator that the counter could see.
        "flops_counted": None if "cuda_graphs" in ran else accounting.counted_flops(lambda: subject.act(place, 1)),
        "flops_needed": accounting.needed_flops(asked),
        "weight_bytes": read,
        "weight_bytes_needed": accounting.weight_bytes(asked),
        "launched": launched.number,
        "launches": launched.launches,
    }


def memory(subject: Subject, place: int, before: int) -> dict[str, int]:
    """Bytes of an arm that has been warmed up: at the peak of a call, and held between calls.

    Args:
        subject: holds it.
        place: which.
        before: what the process held before there was a policy.
    """
    device.release_memory(subject.device)
    held = device.held_memory(subject.device)
    subject.act(place, 0)
    return {"peak": device.peak_memory(subject.device) - before, "held": held - before}


def ceilings(subject: Subject) -> dict[str, Any]:
    """Operations and bytes per second that the device reaches in the subject's dtype, with its threads."""
    dtype: torch.dtype = subject.dtype
    peak, ways = device.peak_flops(subject.device, dtype)
    return {"flops": peak, "flops_by_way": ways, "bytes": device.copy_bandwidth(subject.device)}
