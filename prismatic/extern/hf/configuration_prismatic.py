"""Configuration of Prismatic vision-language-action models, under the published names."""

import os
from pathlib import Path
from typing import Any, cast

import numpy as np

from prismatic.libraries import LlamaConfig, PreTrainedConfig
from prismatic.models.autoregressive import WITHOUT_FILES
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.stored_files import foreign_code_only, read_json
from prismatic.vla.prompt import TokenIds
from prismatic.vla.robots import LIBERO, RobotSpec, get_robot

READOUTS = ("aligned", "tail")
HEAD_KINDS = ("l1", "diffusion", *WITHOUT_FILES)
_LISTS = (("timm_model_ids", str, "names"), ("image_sizes", int, "numbers of pixels"))
LLAMA2_7B = {
    "pad_token_id": 32000,
    "vocab_size": 32064,
    "rms_norm_eps": 1e-6,
}  # what published text configs leave unsaid


def check_action_readout(value: str) -> None:
    """Raises ValueError that lists the choices."""
    if value not in READOUTS:
        raise ValueError(f"action_readout {value!r} is unknown; known: {', '.join(READOUTS)}")


def check_switch(name: str, value: bool | None) -> None:
    """Raises ValueError for what is neither True, False nor None."""
    if not isinstance(value, bool | np.bool_ | None):
        raise ValueError(f"{name} {value!r} should be True or False, or None to follow the checkpoint")


class OpenVLAConfig(PreTrainedConfig):
    """`config.json` of an OpenVLA / OpenVLA-OFT / LightVLA checkpoint.

    Published keys keep their names. Ours, with defaults that keep published checkpoints valid: `timm_model_kwargs`
    (small backbones), `pruner` (a `PrunerSpec`: {name, site, ...}; None: not recorded), `action_readout` ("aligned" or
    "tail"), `robot` (a `RobotSpec`), `token_ids`, `center_crop`, `num_images_in_input`, `use_proprio`,
    `action_head` ("l1", "diffusion", "discrete" or "autoregressive"), `num_diffusion_steps_train`, `use_film`,
    `base_fingerprint`.
    """

    model_type = "openvla"
    sub_configs = {"text_config": LlamaConfig}

    vision_backbone_id: str = "dinosiglip-vit-so-224px"
    timm_model_ids: list[str] | None = None
    timm_override_act_layers: list[str | None] | None = None
    timm_model_kwargs: list[dict[str, Any]] | None = None
    image_sizes: list[int] | None = None
    use_fused_vision_backbone: bool | None = None
    llm_backbone_id: str = "llama2-7b-pure"
    llm_max_length: int = 2048
    arch_specifier: str = "no-align+fused-gelu-mlp"
    image_resize_strategy: str = "resize-naive"
    n_action_bins: int = 256
    norm_stats: dict[str, Any] | None = None
    pad_to_multiple_of: int = 64
    pad_token_id: int | None = 32000
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    pruner: dict[str, Any] | None = None
    action_readout: str = "aligned"
    robot: dict[str, Any] | None = None
    token_ids: dict[str, int] | None = None
    center_crop: bool | None = None
    num_images_in_input: int | None = None
    use_proprio: bool | None = None
    action_head: str | None = None
    num_diffusion_steps_train: int = 50
    use_film: bool = False
    base_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.timm_model_ids is None:
            self.timm_model_ids = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = len(self.timm_model_ids) > 1
        self.image_sizes = self.image_sizes or [224] * len(self.timm_model_ids)
        _check_language_model(self.text_config)
        if not isinstance(self.text_config, PreTrainedConfig):
            given = {key: value for key, value in (self.text_config or {}).items() if key != "model_type"}
            self.text_config = LlamaConfig(**{**LLAMA2_7B, **given})
        super().__post_init__(**kwargs)
        if any(layer is not None for layer in self.timm_override_act_layers or ()):
            raise ValueError(
                f"config.json: timm_override_act_layers {self.timm_override_act_layers} is not supported; only null is"
            )
        self.settle()

    def settle(self) -> None:
        """Settings in the form that `config.json` holds; `pruner` and `robot` may be names, or what they describe.

        For every model once more, because transformers sets options of `from_pretrained` behind construction. Raises
        ValueError for a setting that is none of its choices.
        """
        pruner: Any = PrunerSpec.parse(self.pruner) if isinstance(self.pruner, str) else self.pruner
        robot: Any = get_robot(self.robot) if isinstance(self.robot, str) else self.robot
        self.pruner = pruner.to_json() if isinstance(pruner, PrunerSpec) else pruner
        self.robot = robot.to_json() if isinstance(robot, RobotSpec) else robot
        for name, kind, words in _LISTS:
            if not isinstance(values := getattr(self, name), list) or not all(isinstance(v, kind) for v in values):
                raise ValueError(f"{name} {values!r} should be a list of {words}, one for each ViT")
        if len(self.image_sizes or ()) != len(self.timm_model_ids or ()):
            raise ValueError(
                f"image_sizes {self.image_sizes} and timm_model_ids {self.timm_model_ids} differ in length"
            )
        check_action_readout(self.action_readout)
        for name in ("center_crop", "use_proprio", "use_film"):
            check_switch(name, getattr(self, name))
        images = self.num_images_in_input
        if not isinstance(images, int | None) or isinstance(images, bool) or (images is not None and images < 1):
            raise ValueError(f"num_images_in_input {images!r} should be a number of images, at least 1")
        if self.action_head not in (None, *HEAD_KINDS):
            raise ValueError(f"action_head {self.action_head!r} is unknown; known: {', '.join(HEAD_KINDS)}")

    def to_dict(self) -> dict[str, Any]:
        """All settings, without references to code that is not saved beside them."""
        return foreign_code_only(super().to_dict())

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return cls._decode_special_floats(read_json(Path(json_file)))

    @property
    def llama(self) -> LlamaConfig:
        """Of the language model."""
        return cast(LlamaConfig, self.text_config)

    @property
    def robot_spec(self) -> RobotSpec:
        """The robot this checkpoint was trained for; LIBERO where none is recorded."""
        return LIBERO if self.robot is None else RobotSpec.from_json(self.robot)

    @property
    def special_tokens(self) -> TokenIds:
        """The token ids that the action sequence needs."""
        return TokenIds.from_json(self.token_ids)

    @property
    def pruner_spec(self) -> PrunerSpec:
        """The recorded pruner, or what published checkpoints mean, where none is recorded."""
        return resolve_pruner(None, self.pruner, "inference")


def _check_language_model(text_config: dict[str, Any] | PreTrainedConfig | None) -> None:
    """Raises ValueError for another language model than Llama, which would be built without what only it has."""
    kind = (
        text_config.model_type if isinstance(text_config, PreTrainedConfig) else (text_config or {}).get("model_type")
    )
    if kind not in (None, "llama"):
        raise ValueError(
            f"text_config.model_type {kind!r} is not supported: only Llama is (model_type 'llama'), so MiniVLA's and "
            "VLA-Adapter's checkpoints cannot be used"
        )
