"""Whether stored weights are those of a model, said before any is read."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.weight_files import StoredTensor, stored_tensors
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.filling import build_on_meta
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.pruners.registry import PrunerSpec

logger = logging.getLogger(__name__)

UNNEEDED = re.compile(r"^pruner\.|\.rotary_emb\.inv_freq$")
"""Tensors that are not loaded: of a pruner that does not run, and what older versions of transformers stored."""


def without_new_pruner(
    files: list[Path], config: OpenVLAConfig, options: LoadOptions, recorded: Mapping[str, Any] | None
) -> PrunerSpec | None:
    """The pruner whose parameters are not among the weights, taken out of `config`; None where nothing is missing.

    Args:
        files: the weights.
        config: with the pruner that is to run.
        options: say whether new parameters are wanted.
        recorded: the pruner that the checkpoint was trained with, as in `config.json`.

    Raises ValueError where new parameters are not wanted.
    """
    spec, folder = config.pruner_spec, files[0].parent
    trained = PrunerSpec.from_json(recorded) if recorded is not None else spec
    stored = any(name.startswith("pruner.") for name in stored_tensors(files))
    if not spec.has_parameters or (stored and spec.shares_parameters(trained)):
        return None
    if not options.new_pruner:
        remedy = f"fine-tune with --pruner {spec}, or run the checkpoint with another pruner (lightvla, none)"
        if stored:
            raise ValueError(
                f"{folder} was trained with pruner {trained} ({trained.parameters_text}), and {spec} "
                f"({spec.parameters_text}) is asked for, whose parameters it does not hold; leave the pruner out, or "
                f"{remedy}"
            )
        raise ValueError(f"{folder} holds no trained parameters (tensors 'pruner.*') for pruner {spec}; {remedy}")
    logger.info("pruner %s: %s are new, with random weights", spec, spec.parameters_text)
    if stored:
        logger.warning("the parameters of pruner %s, which %s was trained with, are left out", trained, folder)
    config.pruner = {"name": "none"}
    return spec


def check_weights(files: list[Path], config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    """Returns the model that the configuration describes, on the meta device; ValueError where weights do not fit."""
    model = described_model(config)
    if problems := [model] if isinstance(model, str) else misfits(stored_tensors(files), shapes(model)):
        raise ValueError(f"{files[0].parent}: {problems[0]}")
    assert not isinstance(model, str)
    return model


def expected_tensors(config: OpenVLAConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the model of a configuration has."""
    return shapes(build_on_meta(config))


def shapes(model: OpenVLAForActionPrediction) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def described_model(config: OpenVLAConfig) -> OpenVLAForActionPrediction | str:
    """The model on the meta device, or a sentence that says why there is none."""
    try:
        return build_on_meta(config)
    except Exception as error:  # timm and transformers raise many kinds for sizes that do not go together
        return f"config.json describes no model that can be built: {' '.join(str(error).split())}"


def weight_problems(stored: Mapping[str, StoredTensor], config: OpenVLAConfig) -> list[str]:
    """In what stored weights do not fit the configuration, a sentence each; empty where they fit."""
    model = described_model(config)
    return [model] if isinstance(model, str) else misfits(stored, shapes(model))


def misfits(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """In what stored tensors differ from the expected ones, a sentence each."""
    problems = []
    if missing := sorted(set(expected) - set(stored)):
        problems.append(f"weights lack {len(missing)} tensors that config.json implies, first {missing[0]!r}")
    wrong = [name for name in expected if name in stored and stored[name].shape != expected[name]]
    if wrong:
        name, others = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        problems.append(f"tensor {name!r} has shape {stored[name].shape}, config.json implies {expected[name]}{others}")
    if unknown := sorted(name for name in set(stored) - set(expected) if not UNNEEDED.search(name)):
        problems.append(
            f"weights hold {len(unknown)} tensors that config.json does not imply, first {unknown[0]!r}; they are of "
            "another architecture"
        )
    return problems
