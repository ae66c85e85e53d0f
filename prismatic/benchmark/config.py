"""The flags of `lightvla benchmark`, and what they compare. Imports nothing heavy, so that `--help` is quick."""

import re
from dataclasses import dataclass
from pathlib import Path

PRESETS = ("tiny", "small", "7b")
DTYPES = ("float32", "bfloat16", "float16")
REFERENCE = "reference"
LEAST_REPEATS = 5
"""Fewer calls of an arm say nothing about its 95 % quantile, and hardly anything about its median."""


@dataclass
class BenchmarkConfig:
    """What an action costs: work, latency, memory, launches, cold start; engines and pruners side by side."""

    checkpoint: str = ""  # folder or hub id of a policy
    preset: str = ""  # instead: sizes of a policy with random weights: tiny, small or 7b
    random_weights: bool = False  # True with --preset: weights are made on the device, in the dtype that is measured
    engines: str = "reference,eager,compiled"  # with commas; reference does all work that the research code does
    pruners: str = "none,lightvla"  # with commas, such as none,lightvla:multiplicity=set
    tokens: int = 0  # make lightvla keep exactly so many visual tokens; 0: as many as it picks
    dtypes: str = ""  # with commas: float32, bfloat16, float16; empty: what a policy chooses on the device
    threads: str = ""  # of torch on a CPU, with commas, such as 1,2; empty: as many as torch takes
    device: str = ""  # empty: the GPU, where there is one, else the CPU
    repeats: int = 20  # measured calls of each arm, in turn with all others
    warm_up: int = 3  # calls of each arm before that do not count
    cold_starts: int = 1  # fresh processes per arm from start to first action; 0: neither cold start nor memory
    instruction: str = ""  # empty: one of 35 tokens for a preset, a short sentence for a checkpoint
    camera_size: int = 256  # side of the made-up pictures in pixels
    output_dir: Path = Path("benchmark")  # gets benchmark.json, benchmark.md and benchmark.png


@dataclass(frozen=True)
class Setting:
    """What one process of a benchmark holds: a policy whose weights all pruners share.

    Attributes:
        engine: how the model is run.
        dtype: "float32" and so on; empty: the policy's own choice.
        threads: of torch on a CPU; 0: as many as it takes.
    """

    engine: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Arm:
    """A row of the table: a setting with one pruner.

    Attributes:
        setting: engine, dtype, threads.
        pruner: in the flag grammar.
        place: of the pruner among those of the command.
    """

    setting: Setting
    pruner: str
    place: int


def names(words: str) -> list[str]:
    """The words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))


def pruner_names(words: str) -> list[str]:
    """Pruners between commas; `a:x=1,y=2,b` is `a:x=1,y=2` and `b`, since `y=2` is an option and no pruner's name."""
    found: list[str] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        if found and re.fullmatch(r"\w+=[^:]*", word):
            found[-1] += f",{word}"
        else:
            found.append(word)
    return list(dict.fromkeys(found))


def settings_of(config: BenchmarkConfig) -> list[Setting]:
    """Every engine in every dtype on every number of threads; the engines of a dtype and number beside each other."""
    threads = [int(word) for word in names(config.threads)] or [0]
    return [
        Setting(engine, dtype, number)
        for number in threads
        for dtype in names(config.dtypes) or [""]
        for engine in names(config.engines)
    ]


def arms_of(config: BenchmarkConfig) -> list[Arm]:
    """All arms, in the order of the table."""
    pruners = pruner_names(config.pruners)
    groups = dict.fromkeys((setting.threads, setting.dtype) for setting in settings_of(config))
    return [
        Arm(setting, pruner, place)
        for group in groups
        for place, pruner in enumerate(pruners)
        for setting in settings_of(config)
        if (setting.threads, setting.dtype) == group
    ]


def check_words(config: BenchmarkConfig, engines: tuple[str, ...]) -> None:
    """What can be said against the flags without a model.

    Args:
        config: the flags.
        engines: those that there are, the reference among them.

    Raises ValueError naming the value, what was expected and the choices.
    """
    if bool(config.checkpoint) == bool(config.preset):
        both = "both are given" if config.preset else "neither is given"
        raise ValueError(f"a benchmark needs --checkpoint, or --preset with --random_weights True; {both}")
    if config.preset and config.preset not in PRESETS:
        raise ValueError(f"--preset {config.preset!r} is unknown; known: {', '.join(PRESETS)}")
    if bool(config.preset) != config.random_weights:
        raise ValueError(
            f"--preset {config.preset!r} with --random_weights {config.random_weights}: a preset has sizes and no "
            "weights, a checkpoint has its own; give --preset with --random_weights True, or --checkpoint alone"
        )
    for flag, found, known in (
        ("engines", names(config.engines), engines),
        ("dtypes", names(config.dtypes), DTYPES),
    ):
        if unknown := [word for word in found if word not in known]:
            raise ValueError(f"--{flag} {', '.join(unknown)}: unknown; known: {', '.join(known)}")
    for flag, found in (("engines", names(config.engines)), ("pruners", pruner_names(config.pruners))):
        if not found:
            raise ValueError(f"--{flag} names none; give at least one")
    if config.tokens and not any(word.partition(":")[0] == "lightvla" for word in pruner_names(config.pruners)):
        raise ValueError(
            f"--tokens {config.tokens} is how many lightvla keeps, but --pruners names {config.pruners}: add lightvla, "
            "or leave --tokens out"
        )
    if odd := [word for word in names(config.threads) if not word.isdecimal() or int(word) == 0]:
        raise ValueError(f"--threads {', '.join(odd)}: expected whole numbers from 1, such as 1,2")
    least = {"repeats": LEAST_REPEATS, "warm_up": 1, "cold_starts": 0, "tokens": 0, "camera_size": 8}
    for flag, number in least.items():
        if (given := getattr(config, flag)) < number:
            raise ValueError(f"--{flag} {given}: expected at least {number}")
