"""Everything that is read from or written to a checkpoint directory.

The layout is the published one (see README): weights, tokenizer and processor files as Hugging Face lays them out,
`dataset_statistics.json`, and one `.pt` file per further component, `{component}--{step}_checkpoint.pt`. Nothing here
runs code from a checkpoint: weights come from safetensors or through `weights_only=True`.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch import nn

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction, check_pruner
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.vla.robots import RobotSpec
from prismatic.vla.transform import PolicyTransform

logger = logging.getLogger(__name__)

PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json",
)  # fmt: skip
REQUIRED_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json")
HUB_FILES = ("*.json", "*.safetensors", "*.pt", "*.model")
NOT_FROM_HUB = ("training_state/*", "lora_adapter/*")
STATISTICS_FILE = "dataset_statistics.json"
PENDING = ".pending"
MANIFEST = "manifest.json"
REPLACED = ("*--*_checkpoint.pt", "model*.safetensors*", "lora_adapter")
"""What a new checkpoint replaces altogether; other files of the folder stay."""


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
    action_head: L1RegressionActionHead | None
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
        )


@dataclass(frozen=True)
class _Tokenize:
    """Text -> ids, as a picklable callable for data-loading workers."""

    tokenizer: Any

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=True)["input_ids"]


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


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint; downloads a hub id. Raises FileNotFoundError naming what is missing."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        finish_pending(path)
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) or path.parent.is_dir() and path.parent != Path("."):
        raise FileNotFoundError(
            f"checkpoint directory {path} does not exist; give a directory or a hub id such as user/name"
        )
    try:
        return Path(
            snapshot_download(str(path_or_hub_id), allow_patterns=list(HUB_FILES), ignore_patterns=list(NOT_FROM_HUB))
        )
    except Exception as error:
        raise FileNotFoundError(
            f"checkpoint {path_or_hub_id!r} is no directory and could not be fetched: {error}"
        ) from error


def check_complete(directory: Path) -> list[Path]:
    """The weight files. Raises FileNotFoundError naming the first needed file that is not there."""
    for name in REQUIRED_FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"checkpoint {directory} lacks {name}; is it a half-copied download? Fetch it again"
            )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if (directory / "lora_adapter").is_dir() and not (directory / names[0]).is_file():
        raise FileNotFoundError(
            f"checkpoint {directory} holds an adapter without weights (merge_lora_during_training False)"
        )
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"checkpoint {directory} lacks the weight file {name}; fetch it again")
    return [directory / name for name in names]


def component_file(directory: Path, component: str) -> Path | None:
    """The one `{component}--*_checkpoint.pt` of a checkpoint, None where there is none.

    Raises ValueError where there are several, since nothing says which belongs to the weights.
    """
    found = sorted(directory.glob(f"{component}--*_checkpoint.pt"))
    if len(found) > 1:
        raise ValueError(
            f"{directory} holds {len(found)} {component} files ({', '.join(f.name for f in found)}); keep one"
        )
    return found[0] if found else None


def load_checkpoint(path_or_hub_id: str | Path, options: LoadOptions | None = None) -> Checkpoint:
    """Load a published or own checkpoint. The directory is only read.

    Raises FileNotFoundError for a missing file and ValueError for weights that do not fit the configuration.
    """
    options = options or LoadOptions()
    directory = resolve(path_or_hub_id)
    weight_files = check_complete(directory)
    _check_components(directory, options)
    config_json = json.loads((directory / "config.json").read_text())
    config = OpenVLAConfig.from_pretrained(directory)
    assumptions = _apply(options, config, config_json)
    check_pruner(config)
    new_pruner = _without_new_pruner(weight_files, config, options)
    _check_weights(weight_files, config)
    statistics = read_statistics(directory, config_json)
    processor = PrismaticProcessor.from_pretrained(directory)
    dtype = options.dtype or getattr(
        torch, str(config_json.get("torch_dtype") or config_json.get("dtype") or "bfloat16")
    )
    model = OpenVLAForActionPrediction.from_pretrained(directory, config=config, dtype=dtype)
    if new_pruner is not None:
        model.set_pruner(new_pruner)
    model.to(options.device)  # type: ignore[arg-type]
    on_cpu = torch.device(options.device).type == "cpu"
    model.language_model.set_attn_implementation(options.attention or ("eager" if on_cpu else "sdpa"))
    head = _load_head(directory, model, options)
    projector = _load_proprio(directory, model, options) if options.use_proprio is not False else None
    return Checkpoint(directory, config_json, model, head, projector, processor, statistics, assumptions)


def read_statistics(directory: Path, config_json: dict[str, Any] | None = None) -> dict[str, Any]:
    """Dataset statistics by dataset: `dataset_statistics.json`, else what `config.json` holds."""
    file = directory / STATISTICS_FILE
    if file.is_file():
        return json.loads(file.read_text())
    config_json = config_json or json.loads((directory / "config.json").read_text())
    return dict(config_json.get("norm_stats") or {})


def _check_components(directory: Path, options: LoadOptions) -> None:
    """What can be said about component files before the weights are read."""
    component_file(directory, "action_head")
    if component_file(directory, "proprio_projector") is None and options.use_proprio:
        raise FileNotFoundError(f"{directory} has no proprio_projector--*_checkpoint.pt, which use_proprio=True needs")
    for component, kind in (("vision_backbone", "FiLM"), ("noisy_action_projector", "diffusion")):
        if file := component_file(directory, component):
            raise ValueError(
                f"{file} belongs to a {kind} checkpoint, which is not supported yet; use an L1 one without"
            )


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
    elif recorded is None:
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
    elif config.num_images_in_input is None:
        config.num_images_in_input = 2
        assumptions.append("config.json records no number of images: assumed 2")
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
    if not spec.has_parameters or any(name.startswith("pruner.") for name in _stored_shapes(files)):
        return None
    if not options.new_pruner:
        raise ValueError(
            f"{files[0].parent} holds no trained queries (tensor 'pruner.queries') for pruner {spec}; fine-tune with "
            f"--pruner {spec}, or run the checkpoint with another pruner (lightvla, none)"
        )
    logger.info("pruner %s: %d queries are new, with random weights", spec, spec.num_queries)
    config.pruner = {"name": "none"}
    return spec


def _stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return found


def _check_weights(files: list[Path], config: OpenVLAConfig) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in OpenVLAForActionPrediction(config).state_dict().items()}
    found = _stored_shapes(files)
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(
            f"{files[0].parent}: weights lack {len(missing)} tensors that config.json implies, first {missing[0]!r}"
        )
    if wrong := [name for name in expected if found[name] != expected[name]]:
        name = wrong[0]
        raise ValueError(
            f"{files[0].parent}: tensor {name!r} has shape {found[name]}, config.json implies {expected[name]}"
        )


def load_component(file: Path) -> dict[str, torch.Tensor]:
    """State dict of a `.pt` component, without the `module.` prefix that distributed training leaves."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): value for name, value in state.items()}


def _load_head(
    directory: Path, model: OpenVLAForActionPrediction, options: LoadOptions
) -> L1RegressionActionHead | None:
    if (file := component_file(directory, "action_head")) is None:
        return None
    robot, llm_dim = model.robot, model.config.text_config.hidden_size  # type: ignore[union-attr]
    head = L1RegressionActionHead(llm_dim, robot.action_dim, robot.chunk_length)
    return _fill(head, file, options, options.dtype)


def _load_proprio(directory: Path, model: OpenVLAForActionPrediction, options: LoadOptions) -> ProprioProjector | None:
    if (file := component_file(directory, "proprio_projector")) is None:
        return None
    projector = ProprioProjector(model.config.text_config.hidden_size, model.robot.proprio_dim)  # type: ignore[union-attr]
    return _fill(projector, file, options, options.dtype)


def _fill(module: Any, file: Path, options: LoadOptions, dtype: torch.dtype | None) -> Any:
    state = load_component(file)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        name = next(name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name))
        raise ValueError(
            f"{file}: {name!r} has shape {found.get(name)}, a {type(module).__name__} of this checkpoint needs "
            f"{expected.get(name)}; the head was made for another robot or kind of head"
        )
    module.load_state_dict(state)
    stored = next(iter(state.values())).dtype
    return module.to(device=options.device, dtype=dtype or stored).eval()


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
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.parent / f".{directory.name}.saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    state = checkpoint.model.state_dict() if model_state is None else model_state
    if state:
        tensors = {k: v.detach().cpu() for k, v in state.items()}
        save_torch_state_dict(tensors, staging, max_shard_size="5GB", metadata={"format": "pt"})
    dtype = next((value.dtype for value in state.values()), None)
    (staging / "config.json").write_text(json.dumps(config_to_write(checkpoint, dtype), indent=2))
    (staging / STATISTICS_FILE).write_text(json.dumps(checkpoint.dataset_statistics, indent=2))
    for name in PROCESSOR_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, staging / name)
    parts: dict[str, nn.Module | None] = {
        "action_head": checkpoint.action_head, "proprio_projector": checkpoint.proprio_projector
    }  # fmt: skip
    suffix = f"{step}_checkpoint.pt"
    for component, module in parts.items():
        if module is not None:
            torch.save(
                {k: v.detach().cpu() for k, v in module.state_dict().items()}, staging / f"{component}--{suffix}"
            )
    if training_state is not None:
        (staging / "training_state").mkdir()
        torch.save(training_state, staging / "training_state" / "state.pt")
    if extra is not None:
        extra(staging)
    _commit(staging, directory)
    return directory


def config_to_write(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    """`config.json` of a checkpoint: the one it came from, plus what we record; `dtype` of the weights beside it."""
    recorded = checkpoint.config_json.get("torch_dtype") or checkpoint.config_json.get("dtype") or "bfloat16"
    config = checkpoint.model.config
    return {
        **{key: value for key, value in checkpoint.config_json.items() if key != "dtype"},  # the newer torch_dtype
        "norm_stats": checkpoint.dataset_statistics,
        "torch_dtype": str(dtype or recorded).removeprefix("torch."),
        "pruner": config.pruner_spec.to_json(),
        "action_readout": config.action_readout,
        "robot": checkpoint.model.robot.to_json(),
        "token_ids": config.special_tokens.to_json(),
        "center_crop": config.center_crop,
        "num_images_in_input": checkpoint.model.num_images_in_input,
        "use_proprio": checkpoint.proprio_projector is not None,
    }


def load_training_state(directory: Path) -> dict[str, Any]:
    """What `save_checkpoint` stored for resuming. Raises FileNotFoundError where the checkpoint has none."""
    finish_pending(directory)
    file = directory / "training_state" / "state.pt"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no training_state/state.pt, so training cannot resume from it; start anew by vla_path"
        )
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _commit(staging: Path, directory: Path) -> None:
    """Put a complete staging folder in place. The one rename is the moment the new checkpoint exists."""
    if not directory.exists():
        os.replace(staging, directory)
        return
    finish_pending(directory)
    (staging / MANIFEST).write_text(json.dumps(sorted(file.name for file in staging.iterdir())))
    os.replace(staging, directory / PENDING)
    finish_pending(directory)


def finish_pending(directory: Path) -> None:
    """Move the files of an interrupted save into place: what lies in `.pending` is complete.

    Files of the older checkpoint that the new one does not have are removed. Several processes may do this at once.
    """
    pending = directory / PENDING
    try:
        new = set(json.loads((pending / MANIFEST).read_text()))
    except FileNotFoundError:
        shutil.rmtree(pending, ignore_errors=True)  # everything was moved before
        return
    for pattern in REPLACED:
        for old in directory.glob(pattern):
            if old.name not in new:
                _remove(old)
    for name in sorted(new):
        with suppress(FileNotFoundError):  # moved already
            target = directory / name
            if target.is_dir() and (pending / name).is_dir():
                _remove(target)
            os.replace(pending / name, target)
    shutil.rmtree(pending, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
