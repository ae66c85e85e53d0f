"""How many simulator processes a machine has cores and memory for."""

from prismatic.machine import Machine

WORKER_BYTES = int(2.6 * 2**30)
"""What one simulator process takes at most, drawing libero_10's scenes: `measure_simulator_memory.py`, SETUP.md."""
RESERVE_BYTES = 2**30
"""Left to the process of the policy, which has loaded it by then."""


def default_workers(machine: Machine, neighbours: int = 1) -> int:
    """Simulator processes for each of `neighbours` like this one; a core and `WORKER_BYTES` each, at least one."""
    cores = machine.cores if machine.cpu_quota is None else min(machine.cores, int(machine.cpu_quota))
    wanted = cores // neighbours
    if machine.memory_bytes is not None:
        wanted = min(wanted, (machine.memory_bytes // neighbours - RESERVE_BYTES) // WORKER_BYTES)
    return max(1, wanted)
