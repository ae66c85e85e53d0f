"""Everything that is read from or written to a checkpoint directory.

The layout is the published one (see README): weights, tokenizer and processor files as Hugging Face lays them out,
`dataset_statistics.json`, and one `.pt` file per further component, `{component}--{step}_checkpoint.pt`. Nothing here
runs code from a checkpoint: weights come from safetensors or through `weights_only=True`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prismatic.checkpoints.atomic_folder import reading
from prismatic.checkpoints.components import diffusion_steps, head_kind, load_head, load_proprio
from prismatic.checkpoints.files import (
    PROCESSOR_FILES,
    check_complete,
    read_config,
    read_small_files,
    read_statistics,
    resolve,
)
from prismatic.checkpoints.options import LoadOptions, checked_options
from prismatic.checkpoints.weight_checks import check_weights, without_new_pruner
from prismatic.checkpoints.weight_files import read_ahead, tensor_reader
from prismatic.extern.hf.building import check_pruner
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.filling import fill, outline
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.original import as_original
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.libraries import PreTrainedTokenizerFast
from prismatic.models.autoregressive import AUTOREGRESSIVE, check_decodable
from prismatic.models.contract import ActionHead
from prismatic.models.diffusion import NUM_TRAIN_STEPS
from prismatic.models.precision import stored_dtype
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.models.quantization import check_quantization, convert_to_fp8, quantization_config
from prismatic.stored_files import component_file
from prismatic.vla.transform import PolicyTransform

logger = logging.getLogger(__name__)


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
        processor_files: by name, as they stood when it was loaded. A run removes old checkpoints, the one among them
            that it went on from, and what it saves later needs them still.
    """

    path: Path
    config_json: dict[str, Any]
    model: OpenVLAForActionPrediction
    action_head: ActionHead | None
    proprio_projector: ProprioProjector | None
    processor: PrismaticProcessor
    dataset_statistics: dict[str, Any]
    assumptions: list[str] = field(default_factory=list)
    processor_files: dict[str, bytes] = field(default_factory=dict)

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

    tokenizer: PreTrainedTokenizerFast

    def __call__(self, text: str) -> list[int]:
        # What somebody writes is text: `</s>` in it ends nothing.
        return self.tokenizer(text, add_special_tokens=True, split_special_tokens=True)["input_ids"]


def load_checkpoint(path_or_hub_id: str | Path, options: LoadOptions | None = None) -> Checkpoint:
    """Load a published or own checkpoint. The directory is only read; for the device "meta", all but the weights.

    Raises FileNotFoundError for a missing file and ValueError for weights that do not fit the configuration.
    """
    options = checked_options(options or LoadOptions())
    while True:
        directory = resolve(path_or_hub_id)
        with reading(directory) as is_there:
            # A run may have removed it since its pointer was followed, and points to a newer one by now.
            if is_there or resolve(path_or_hub_id) == directory:
                return _load(directory, options)


def _load(directory: Path, options: LoadOptions) -> Checkpoint:
    weight_files = check_complete(directory)
    if torch.device(options.device).type != "meta":
        read_ahead(weight_files)
    config_json, config = read_config(directory)
    kind = config.action_head = _check_components(directory, options, config_json)
    assumptions = _apply(options, config, config_json)
    if kind == AUTOREGRESSIVE:
        check_decodable(config.pruner_spec.name, bool(options.use_proprio), config.action_readout)
    check_pruner(config)
    new_pruner = without_new_pruner(weight_files, config, options, config_json.get("pruner"))
    outlined = check_weights(weight_files, config)
    statistics = read_statistics(directory, config_json)
    processor = load_processor(directory, config)
    model = _load_model(directory, weight_files, outlined, options.dtype or stored_dtype(config_json), options)
    if new_pruner is not None:
        model.set_pruner(new_pruner)
    if options.quantization == "fp8":
        convert_to_fp8(model.language_model.model.layers)
    on_cpu = torch.device(options.device).type == "cpu"
    model.language_model.set_attn_implementation(options.attention or ("eager" if on_cpu else "sdpa"))
    head = load_head(directory, model, kind, options.dtype)
    reads_state = options.use_proprio is not False and kind != AUTOREGRESSIVE
    projector = load_proprio(directory, model, options.dtype) if reads_state else None
    beside = read_small_files(directory, PROCESSOR_FILES)
    return Checkpoint(directory, config_json, model, head, projector, processor, statistics, assumptions, beside)


def _load_model(
    directory: Path,
    weight_files: list[Path],
    model: OpenVLAForActionPrediction,
    dtype: torch.dtype,
    options: LoadOptions,
) -> OpenVLAForActionPrediction:
    """The model with its weights; for the device "meta" all but the weights. `model` is on the meta device."""
    device = torch.device(options.device)
    if options.quantization is not None:
        check_quantization(options.quantization)
    if options.quantization not in (None, "fp8"):
        quantized: Any = OpenVLAForActionPrediction.from_pretrained(
            directory,
            config=model.config,
            dtype=dtype,
            quantization_config=quantization_config(options.quantization),
            device_map=options.device,
        )
        return quantized
    film = component_file(directory, "vision_backbone")
    if device.type == "meta":
        outline(model, dtype, film)
        return model
    with tensor_reader(weight_files) as read:
        fill(model, read, dtype, device, film)
    return model


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
        given = resolve_pruner(options.pruner, recorded, "inference")
        trained = resolve_pruner(PrunerSpec(given.name), recorded, "inference")
        if recorded and recorded["name"] != "none" and {**given.options, **trained.options} != given.options:
            logger.warning(
                "trained with pruner %s, run with %s: other tokens, or other weights of them",
                PrunerSpec.from_json(recorded),
                given,
            )
        config.pruner = given.to_json()
    elif recorded is None and config.action_head != AUTOREGRESSIVE:
        assumptions.append(
            f"config.json records no pruner: assumed {config.pruner_spec} (choose OpenVLA-OFT by pruner=none)"
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


def check_loadable(directory: Path) -> None:
    """All that can be said without reading weights: files are whole, and fit together. Pruner and heads may be new.

    Raises FileNotFoundError and ValueError as `load_checkpoint` does.
    """
    files = check_complete(directory)
    config_json, config = read_config(directory)
    _check_components(directory, LoadOptions(), config_json)
    config.pruner = {"name": "none"}
    check_weights(files, config)
    read_statistics(directory, config_json)
    load_processor(directory, config)


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
