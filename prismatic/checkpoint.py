"""Everything that is read from or written to a checkpoint directory.

The layout is the published one (see README): weights, tokenizer and processor files as Hugging Face lays them out,
`dataset_statistics.json`, and one `.pt` file per further component, `{component}--{step}_checkpoint.pt`. Nothing here
runs code from a checkpoint: weights come from safetensors or through `weights_only=True`.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from prismatic.atomic_folder import commit, finish_pending, new_staging
from prismatic.checkpoint_files import (
    PROCESSOR_FILES,
    STATISTICS_FILE,
    check_complete,
    copy_small_files,
    read_config,
    read_statistics,
    resolve,
    stored_dtype,
)
from prismatic.components import ActionHead, component_states, diffusion_steps, head_kind, load_head, load_proprio
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, check_action_readout, check_switch
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction, check_pruner
from prismatic.extern.hf.original import as_original
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models import film
from prismatic.models.autoregressive import AUTOREGRESSIVE, check_decodable
from prismatic.models.diffusion import NUM_TRAIN_STEPS, DiffusionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.quantization import check_quantization, quantization_config
from prismatic.stored_files import component_file, foreign_code_only, load_plain
from prismatic.vla.robots import RobotSpec
from prismatic.vla.transform import PolicyTransform
from prismatic.weight_files import StoredTensor, stored_tensors

logger = logging.getLogger(__name__)

_UNNEEDED = re.compile(r"^pruner\.|\.rotary_emb\.inv_freq$")
"""Tensors that are not loaded: of a pruner that does not run, and what older versions of transformers stored."""


@dataclass
class Checkpoint:
    """The parts of a policy as a checkpoint directory holds them.

    Attributes:
        path: the directory.
        config_json: `config.json` as it stands on disk.
        model: vision backbone, projector, LLM and pruner.
        action_head: None where the checkpoint has none.
        proprio_projector: None where the checkpoint has none or the state is not to be read.
        processor: tokenizer and image processor.
        dataset_statistics: by dataset; from `dataset_statistics.json`, else the config's.
        assumptions: what had to be assumed because the checkpoint does not say.
    """

    path: Path
    config_json: dict[str, Any]
    model: OpenVLAForActionPrediction
    action_head: ActionHead | None
    proprio_projector: ProprioProjector | None
    processor: PrismaticProcessor
    dataset_statistics: dict[str, Any]
    assumptions: list[str] = field(default_factory=list)

    def transform(
        self,
        unnorm_key: str,
        center_crop: bool,
        statistics: dict[str, Any] | None = None,
        use_proprio: bool | None = None,
    ) -> PolicyTransform:
        """The one path to model inputs, with the statistics of one dataset (`statistics` overrides the stored ones)."""
        return PolicyTransform(
            robot=self.model.robot,
            pixels=self.processor.image_processor.pixels,
            tokenize=_Tokenize(self.processor.tokenizer),
            token_ids=self.model.config.special_tokens,
            statistics=statistics or self.dataset_statistics[unnorm_key],
            num_images=self.model.num_images_in_input,
            use_proprio=self.proprio_projector is not None if use_proprio is None else use_proprio,
            center_crop=center_crop,
            max_prompt_tokens=self.model.max_prompt_tokens,
        )


@dataclass(frozen=True)
class _Tokenize:
    """Text -> ids, as a picklable callable for data-loading workers."""

    tokenizer: Any

    def __call__(self, text: str) -> list[int]:
        # What somebody writes is text: `</s>` in it ends nothing.
        return self.tokenizer(text, add_special_tokens=True, split_special_tokens=True)["input_ids"]


@dataclass(frozen=True)
class LoadOptions:
    """What to decide about a checkpoint while loading it; None follows what the checkpoint records.

    Attributes:
        device: where the parts go.
        dtype: of all parameters; None keeps the stored one.
        pruner: overrides the recorded pruner.
        action_readout: "aligned" or "tail".
        num_images_in_input: images per sample.
        use_proprio: whether the state is read; None: when the checkpoint has a proprio projector.
        robot: overrides the recorded robot.
        new_pruner: whether a pruner with parameters may begin with new ones where the checkpoint has none; else that is
            an error.
        attention: of the LLM, "sdpa" or "eager"; None: eager on a CPU, where it is the faster one, else sdpa.
        head: "l1", "diffusion", "discrete" or "autoregressive", which the checkpoint must then hold or leave open;
            None: whichever it holds or records.
        use_film: whether it must have FiLM (True) or must not (False); None: as it is.
        quantization: "8bit" or "4bit" weights of the LLM, for inference on a GPU; None: as stored.
        num_diffusion_steps_train: of a diffusion head, where `config.json` does not record it; None: 50 then.
    """

    device: str | torch.device = "cpu"
    dtype: torch.dtype | None = None
    pruner: PrunerSpec | None = None
    action_readout: str | None = None
    num_images_in_input: int | None = None
    use_proprio: bool | None = None
    robot: RobotSpec | None = None
    new_pruner: bool = False
    attention: str | None = None
    head: str | None = None
    use_film: bool | None = None
    quantization: str | None = None
    num_diffusion_steps_train: int | None = None


def load_checkpoint(path_or_hub_id: str | Path, options: LoadOptions | None = None) -> Checkpoint:
    """Load a published or own checkpoint. The directory is only read.

    Raises FileNotFoundError for a missing file and ValueError for weights that do not fit the configuration.
    """
    options = _checked(options or LoadOptions())
    directory = resolve(path_or_hub_id)
    weight_files = check_complete(directory)
    config_json, config = read_config(directory)
    kind = config.action_head = _check_components(directory, options, config_json)
    assumptions = _apply(options, config, config_json)
    if kind == AUTOREGRESSIVE:
        check_decodable(config.pruner_spec.name, bool(options.use_proprio), config.action_readout)
    check_pruner(config)
    new_pruner = _without_new_pruner(weight_files, config, options)
    _check_weights(weight_files, config)
    statistics = read_statistics(directory, config_json)
    processor = load_processor(directory, config)
    arguments: dict[str, Any] = {"config": config, "dtype": options.dtype or stored_dtype(config_json)}
    if options.quantization is not None:
        check_quantization(options.quantization)
        arguments |= {"quantization_config": quantization_config(options.quantization), "device_map": options.device}
    model = OpenVLAForActionPrediction.from_pretrained(directory, **arguments)
    if new_pruner is not None:
        model.set_pruner(new_pruner)
    if options.quantization is None:
        model.to(options.device)  # type: ignore[arg-type]
    on_cpu = torch.device(options.device).type == "cpu"
    model.language_model.set_attn_implementation(options.attention or ("eager" if on_cpu else "sdpa"))
    head = load_head(directory, model, kind, options.dtype)
    reads_state = options.use_proprio is not False and kind != AUTOREGRESSIVE
    projector = load_proprio(directory, model, options.dtype) if reads_state else None
    return Checkpoint(directory, config_json, model, head, projector, processor, statistics, assumptions)


def _check_components(directory: Path, options: LoadOptions, config_json: dict[str, Any]) -> str | None:
    """What can be said about component files before the weights are read; returns the kind of head, if any."""
    use_proprio = config_json.get("use_proprio") if options.use_proprio is None else options.use_proprio
    if use_proprio and component_file(directory, "proprio_projector") is None:
        needs = "use_proprio=True" if options.use_proprio else "config.json (use_proprio)"
        raise FileNotFoundError(f"{directory} has no proprio_projector--*_checkpoint.pt, which {needs} needs")
    film_file = component_file(directory, "vision_backbone")
    if config_json.get("use_film") and film_file is None:
        raise FileNotFoundError(
            f"{directory} records FiLM, but has no vision_backbone--*_checkpoint.pt; copy it from where the others are"
        )
    if options.use_film is not None and options.use_film != (film_file is not None):
        found = f"has FiLM ({film_file.name})" if film_file else "has no vision_backbone--*_checkpoint.pt"
        raise ValueError(f"{directory} {found}; set use_film to {film_file is not None}")
    return head_kind(directory, config_json, options.head)


def _apply(options: LoadOptions, config: OpenVLAConfig, config_json: dict[str, Any]) -> list[str]:
    """Write the options into the configuration; returns what had to be assumed."""
    assumptions = []
    recorded = config_json.get("pruner")
    if options.pruner is not None:
        given = options.pruner.following(recorded)
        trained = PrunerSpec(given.name).following(recorded)
        if recorded and recorded["name"] != "none" and {**given.options, **trained.options} != given.options:
            logger.warning(
                "trained with pruner %s, run with %s: other tokens, or other weights of them", recorded, given
            )
        config.pruner = given.to_json()
    elif recorded is None and config.action_head != AUTOREGRESSIVE:
        assumptions.append(
            "config.json records no pruner: assumed lightvla:multiplicity=set (choose OpenVLA-OFT by pruner=none)"
        )
        logger.warning(assumptions[-1])
        config.pruner = config.pruner_spec.to_json()
    if options.action_readout is not None:
        config.action_readout = options.action_readout
    if options.robot is not None:
        config.robot = options.robot.to_json()
    if options.num_images_in_input is not None:
        config.num_images_in_input = options.num_images_in_input
    if config.action_head == AUTOREGRESSIVE:
        as_original(config)
    if config.num_images_in_input is None:
        config.num_images_in_input = 2
        assumptions.append("config.json records no number of images: assumed 2")
    if config.action_head == "diffusion":
        if (steps := diffusion_steps(config_json, options.num_diffusion_steps_train)) is None:
            steps = NUM_TRAIN_STEPS
            assumptions.append(f"config.json records no number of diffusion steps: assumed {steps}")
        config.num_diffusion_steps_train = steps
    cameras = len(config.robot_spec.cameras)
    if not 1 <= config.num_images_in_input <= cameras:
        raise ValueError(
            f"num_images_in_input={config.num_images_in_input}: robot {config.robot_spec.name!r} has {cameras} cameras"
        )
    return assumptions


def _without_new_pruner(files: list[Path], config: OpenVLAConfig, options: LoadOptions) -> PrunerSpec | None:
    """The pruner whose parameters are not among the weights, taken out of `config`; None where nothing is missing.

    Raises ValueError where new parameters are not wanted.
    """
    spec = config.pruner_spec
    if not spec.has_parameters or any(name.startswith("pruner.") for name in stored_tensors(files)):
        return None
    if not options.new_pruner:
        raise ValueError(
            f"{files[0].parent} holds no trained queries (tensor 'pruner.queries') for pruner {spec}; fine-tune with "
            f"--pruner {spec}, or run the checkpoint with another pruner (lightvla, none)"
        )
    logger.info("pruner %s: %d queries are new, with random weights", spec, spec.num_queries)
    config.pruner = {"name": "none"}
    return spec


def check_loadable(directory: Path) -> None:
    """All that can be said without reading weights: files are whole, and fit together. Pruner and heads may be new.

    Raises FileNotFoundError and ValueError as `load_checkpoint` does.
    """
    files = check_complete(directory)
    config_json, config = read_config(directory)
    _check_components(directory, LoadOptions(), config_json)
    config.pruner = {"name": "none"}
    _check_weights(files, config)
    read_statistics(directory, config_json)
    load_processor(directory, config)


def _checked(options: LoadOptions) -> LoadOptions:
    """The options. Raises ValueError for a value that is none of its choices."""
    if options.action_readout is not None:
        check_action_readout(options.action_readout)
    for name in ("use_proprio", "use_film"):
        check_switch(name, getattr(options, name))
    if options.attention not in (None, "sdpa", "eager"):
        raise ValueError(f"attention {options.attention!r} is unknown; known: sdpa, eager")
    images = options.num_images_in_input
    if isinstance(images, bool) or not isinstance(images, int | None):
        raise ValueError(f"num_images_in_input {images!r} should be a number of images")
    diffusion_steps({}, options.num_diffusion_steps_train)
    return options


def load_processor(directory: Path, config: OpenVLAConfig) -> PrismaticProcessor:
    """Raises ValueError where the image processor makes other pixels than the vision backbone takes."""
    try:
        processor = PrismaticProcessor.from_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # the tokenizer's library raises bare exceptions
        raise ValueError(f"{directory}: the processor cannot be read: {' '.join(str(error).split())}") from error
    pixels, sizes = processor.image_processor.pixels, list(config.image_sizes or ())
    if [pixels.size] * len(pixels.means) != sizes:
        raise ValueError(
            f"{directory}: the image processor makes {pixels.size} pixels for each of {len(pixels.means)} ViTs, "
            f"config.json has image_sizes {sizes}; copy both files from the same checkpoint"
        )
    return processor


def _check_weights(files: list[Path], config: OpenVLAConfig) -> None:
    if problems := weight_problems(stored_tensors(files), config):
        raise ValueError(f"{files[0].parent}: {problems[0]}")


def expected_tensors(config: OpenVLAConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the model of a configuration has."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in OpenVLAForActionPrediction(config).state_dict().items()}


def weight_problems(stored: Mapping[str, StoredTensor], config: OpenVLAConfig) -> list[str]:
    """In what stored weights do not fit the configuration, a sentence each; empty where they fit."""
    try:
        expected = expected_tensors(config)
    except Exception as error:  # timm and transformers raise many kinds for sizes that do not go together
        return [f"config.json describes no model that can be built: {' '.join(str(error).split())}"]
    problems = []
    if missing := sorted(set(expected) - set(stored)):
        problems.append(f"weights lack {len(missing)} tensors that config.json implies, first {missing[0]!r}")
    wrong = [name for name in expected if name in stored and stored[name].shape != expected[name]]
    if wrong:
        name, others = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        problems.append(f"tensor {name!r} has shape {stored[name].shape}, config.json implies {expected[name]}{others}")
    if unknown := sorted(name for name in set(stored) - set(expected) if not _UNNEEDED.search(name)):
        problems.append(
            f"weights hold {len(unknown)} tensors that config.json does not imply, first {unknown[0]!r}; they are of "
            "another architecture"
        )
    return problems


def save_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    step: int | str,
    model_state: dict[str, torch.Tensor] | None = None,
    training_state: dict[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint in the published layout, atomically: a killed process leaves the old one or the new one.

    Args:
        directory: where to; may hold an older checkpoint and other files, which stay.
        checkpoint: the parts to write; processor files are copied byte for byte from `checkpoint.path`.
        step: in the names of component files, or "latest".
        model_state: weights to write instead of the model's own (merged or averaged ones); {} writes none.
        training_state: tensors and plain data for resuming, written to `training_state/`.
        extra: writes further files into the folder it is given, which become part of the same atomic write.
    """
    staging = new_staging(directory)
    state = checkpoint.model.state_dict() if model_state is None else model_state
    tensors = {k: v.detach().cpu() for k, v in state.items()}
    film_state: dict[str, torch.Tensor] = {}
    if film.has_film(checkpoint.model.vision_backbone):
        tensors, film_state = film.split_state(tensors)
    if tensors:
        save_torch_state_dict(tensors, staging, max_shard_size="5GB", metadata={"format": "pt"})
    dtype = next((value.dtype for value in state.values()), None)
    (staging / "config.json").write_text(json.dumps(config_to_write(checkpoint, dtype), indent=2))
    (staging / STATISTICS_FILE).write_text(json.dumps(checkpoint.dataset_statistics, indent=2))
    copy_small_files(checkpoint.path, staging, PROCESSOR_FILES)
    for component, part in {
        **component_states(checkpoint.action_head, checkpoint.proprio_projector),
        "vision_backbone": film_state,
    }.items():
        if part:
            torch.save(part, staging / f"{component}--{step}_checkpoint.pt")
    if training_state is not None:
        (staging / "training_state").mkdir()
        torch.save(training_state, staging / "training_state" / "state.pt")
    if extra is not None:
        extra(staging)
    commit(staging, directory)
    return directory


def config_to_write(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    """`config.json` of a checkpoint: the one it came from, plus what we record; `dtype` of the weights beside it."""
    config = checkpoint.model.config
    # `dtype` is the newer name of `torch_dtype`; a fingerprint belongs to the base of these adapters alone.
    kept = {
        key: value
        for key, value in foreign_code_only(checkpoint.config_json).items()
        if key not in ("dtype", "base_fingerprint")
    }
    own: dict[str, Any] = {"base_fingerprint": config.base_fingerprint} if config.base_fingerprint else {}
    if (head := checkpoint.action_head) is not None:
        own["action_head"] = head.kind
    if isinstance(head, DiffusionActionHead):
        own["num_diffusion_steps_train"] = head.num_train_steps
    return {
        **kept,
        "norm_stats": checkpoint.dataset_statistics,
        "torch_dtype": str(dtype or stored_dtype(checkpoint.config_json)).removeprefix("torch."),
        "pruner": config.pruner_spec.to_json(),
        "action_readout": config.action_readout,
        "robot": checkpoint.model.robot.to_json(),
        "token_ids": config.special_tokens.to_json(),
        "center_crop": config.center_crop,
        "num_images_in_input": checkpoint.model.num_images_in_input,
        "use_proprio": checkpoint.proprio_projector is not None,
        "use_film": film.has_film(checkpoint.model.vision_backbone),
        **own,
    }


def load_training_state(directory: Path, finish: bool = True) -> dict[str, Any]:
    """What `save_checkpoint` stored for resuming; `finish` ends an interrupted save first, which changes the folder.

    Raises FileNotFoundError where the checkpoint has none, and ValueError for a file that is cut off or no such state.
    """
    if finish:
        finish_pending(directory)
    file = directory / "training_state" / "state.pt"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no training_state/state.pt, so training cannot resume from it; start anew by vla_path"
        )
    state = load_plain(file)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{file} is no training state; start anew by vla_path")
    return state
