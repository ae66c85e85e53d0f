"""The files of a checkpoint directory: which there are, whether they are whole, and what the JSON ones say.

The layout is the published one (see README). Nothing here loads weights.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from prismatic.checkpoints.places import stands_for
from prismatic.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.processing_prismatic import IMAGE_FILES, image_settings
from prismatic.models.precision import stored_dtype
from prismatic.stored_files import (
    BYTE_ORDER_MARK,
    component_files,
    foreign_code_only,
    load_component,
    read_json,
    refuse_placeholder,
)
from prismatic.vla.normalization import statistics_problems
from prismatic.vla.robots import RobotSpec

PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json",
)  # fmt: skip
REQUIRED_FILES = ("config.json", "tokenizer.json")
HUB_FILES = ("*.json", "*.safetensors", "*.pt", "*.model")
NOT_FROM_HUB = ("training_state/*", "lora_adapter/*")
STATISTICS_FILE = "dataset_statistics.json"


def resolve(path_or_hub_id: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local directory of a checkpoint; downloads a hub id, of `revision` and with the login `token` where given.

    Raises FileNotFoundError naming what is missing, and ValueError for a revision of a directory.
    """
    if not str(path_or_hub_id).strip():
        raise ValueError("the checkpoint's name is empty; give a directory or a hub id such as user/name")
    path = stands_for(Path(path_or_hub_id).expanduser())
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {path} is a directory, which has none; leave it out")
        return path
    if path.is_file():
        raise FileNotFoundError(f"the checkpoint {path} is a file; give the directory that holds it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) or path.parent.is_dir() and path.parent != Path("."):
        raise FileNotFoundError(
            f"checkpoint directory {path} does not exist; give a directory or a hub id such as user/name"
        )
    kinds: dict[str, Any] = {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(NOT_FROM_HUB)}
    try:
        return Path(snapshot_download(str(path_or_hub_id), revision=revision, token=token, **kinds))
    except Exception as error:
        raise FileNotFoundError(
            f"checkpoint {path_or_hub_id!r} is no directory and could not be fetched: {error}"
        ) from error


def check_complete(directory: Path) -> list[Path]:
    """The weight files of a checkpoint all of whose files are there. The small ones are whole; weights are not opened.

    Raises:
        FileNotFoundError: naming the first needed file that is not there.
        ValueError: naming a file that is cut off, a placeholder of git-lfs, or of another kind than its name says.
    """
    if missing := missing_files(directory):
        raise FileNotFoundError(
            f"checkpoint {directory} lacks {missing[0]}; is it a half-copied download? Fetch it again"
        )
    index = directory / INDEX_FILE
    names = sorted(set(read_weight_map(index).values())) if index.is_file() else [SINGLE_FILE]
    if (directory / "lora_adapter").is_dir() and not (directory / names[0]).is_file():
        raise FileNotFoundError(
            f"checkpoint {directory} holds an adapter without weights (merge_lora_during_training False); merge it by "
            f"lightvla merge --lora_finetuned_checkpoint_dir {directory}"
        )
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"checkpoint {directory} lacks the weight file {name}{weights_remedy(directory)}")
    if problems := small_file_problems(directory):
        raise ValueError(problems[0])
    return [directory / name for name in names]


def weights_remedy(directory: Path) -> str:
    """What to do where a weight file is missing, as the end of a sentence."""
    if found := sorted(file.name for file in directory.glob("pytorch_model*.bin")):
        return f": {found[0]} is there, which is not read; convert it to safetensors (save_pretrained writes it)"
    return "; fetch it again"


def missing_files(directory: Path) -> list[str]:
    """The needed files, beside the weights, that are not there."""
    missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
    stored = {name: directory / name for name in IMAGE_FILES if (directory / name).is_file()}
    try:
        has_settings = image_settings(stored) is not None
    except ValueError:  # said where files are read
        has_settings = True
    return missing if has_settings else [*missing, IMAGE_FILES[0]]


def small_file_problems(directory: Path) -> list[str]:
    """What cannot be read of a checkpoint's files beside weights and adapter, a sentence each that names the file."""
    readers: dict[Path, Callable[[Path], Any]] = {
        directory / name: refuse_placeholder if name.endswith(".model") else read_json
        for name in ("config.json", STATISTICS_FILE, *PROCESSOR_FILES)
    }
    problems = []
    for file, read in (readers | dict.fromkeys(component_files(directory), load_component)).items():
        try:
            if file.is_file():
                read(file)
        except ValueError as error:
            problems.append(str(error))
    return problems


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> weight file by an index. Raises ValueError for a file that transformers does not take for one."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map (tensor -> file); copy or download it again")
    if not weight_map:
        raise ValueError(f"{index} has an empty weight_map; copy it again, or remove it beside {SINGLE_FILE}")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f'{index} has no metadata, without which it is not loaded; add "metadata": {{}} to it')
    if index.read_bytes().startswith(BYTE_ORDER_MARK):
        raise ValueError(f"{index} starts with a byte order mark, which is not read; save it as UTF-8 without one")
    return weight_map


def read_config(directory: Path) -> tuple[dict[str, Any], OpenVLAConfig]:
    """`config.json` as it stands, and as the model takes it. Raises ValueError naming the file and what is wrong."""
    file = directory / "config.json"
    config_json = read_json(file)
    if config_json.get("model_type") != "openvla":
        raise ValueError(f"{file} is of a model of type {config_json.get('model_type')!r}; expected 'openvla'")
    try:
        config = OpenVLAConfig.from_dict(config_json)
        # These raise where they are malformed.
        _ = config.robot_spec, config.pruner_spec, stored_dtype(config_json)
        _check_token_ids(config)
    except Exception as error:  # transformers' checks raise kinds of their own
        raise ValueError(f"{file}: {' '.join(str(error).split()) or type(error).__name__}") from error
    config.name_or_path = str(directory)
    return config_json, config


def _check_token_ids(config: OpenVLAConfig) -> None:
    size = config.llama.vocab_size
    for name, value in config.special_tokens.to_json().items():
        most = size if name == "action_end" else size - 1  # it is one past the last action token
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"token_ids.{name} {value!r} is no token of text_config.vocab_size {size}: 0 to {most}")


def read_statistics(directory: Path, config_json: dict[str, Any] | None = None) -> dict[str, Any]:
    """Dataset statistics by dataset: `dataset_statistics.json`, else what `config.json` holds.

    Raises ValueError naming the file for what is no JSON, and for statistics that do not stand below a dataset's name.
    """
    file = directory / STATISTICS_FILE
    if file.is_file():
        found = read_json(file)
    else:
        file = directory / "config.json"
        config_json = read_json(file) if config_json is None else config_json
        found = config_json.get("norm_stats") or {}
    if not isinstance(found, dict) or "q01" in found.get("action", ()) or "num_transitions" in found:
        raise ValueError(
            f"{file}: the statistics do not stand below their dataset's name; put them there, as in "
            '{"my_dataset": {"action": {...}, "proprio": {...}}}'
        )
    return found


def check_statistics(directory: Path, key: str, robot: RobotSpec, use_proprio: bool) -> None:
    """Raises ValueError naming the file where the statistics of dataset `key` are no numbers or of another robot."""
    if problems := statistics_problems(key, read_statistics(directory)[key], robot, use_proprio):
        file = directory / STATISTICS_FILE
        raise ValueError(f"{file if file.is_file() else directory / 'config.json'}: {problems[0]}")


def read_small_files(source: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The content of those files that there are, without references to code that is not copied (`auto_map`)."""
    found = {}
    for name in names:
        if not (file := source / name).is_file():
            continue
        content = read_json(file) if name.endswith("_config.json") or name == "config.json" else {}
        if "auto_map" in content and (kept := foreign_code_only(content)) != content:
            found[name] = json.dumps(kept, indent=2, ensure_ascii=False).encode()
        else:
            found[name] = file.read_bytes()
    return found


def copy_small_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those files that there are, byte for byte but for references to code that is not copied (`auto_map`)."""
    for name, content in read_small_files(source, names).items():
        (target / name).write_bytes(content)
