"""The vision-language-action model under its published names: encode, project, prune, lay out, run, read out."""

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaForCausalLM,
    PreTrainedModel,
)

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.models.llama import run_llama, run_llama_pruning
from prismatic.models.projectors import VisionProjector
from prismatic.models.pruners.learnable_queries import LearnableQueries
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.sequence import build_context, lay_out, tail_ids
from prismatic.models.sites import LlamaLayer, ModelSizes, Projector, Site, VisionBlock
from prismatic.models.token_pruner import TokenSelection, keep_all
from prismatic.models.vision_backbone import PrismaticVisionBackbone, VisionPruning
from prismatic.vla import normalization
from prismatic.vla.action_tokenizer import ActionTokenizer

logger = logging.getLogger(__name__)


@dataclass
class ActionHidden:
    """What the LLM says about the actions.

    Attributes:
        rows: (B, A, D) hidden rows that predict the A action tokens, after the final norm.
        selection: the visual tokens the LLM saw; those that its last layers saw, where they are dropped inside it.
        position_ids: (B, S) of the whole sequence, behind that place.
    """

    rows: torch.Tensor
    selection: TokenSelection
    position_ids: torch.Tensor


def model_sizes(config: OpenVLAConfig, backbone: PrismaticVisionBackbone, num_images: int) -> ModelSizes:
    """What pruners with parameters must know. The backbone may be on the meta device."""
    text: Any = config.text_config
    return ModelSizes(
        num_visual=backbone.patches_per_image * num_images,
        vision_dim=backbone.feature_dim,
        vision_blocks=min(len(vit.blocks) for vit in backbone.vits) - 1,
        llm_dim=text.hidden_size,
        llm_layers=text.num_hidden_layers,
    )


def check_pruner(config: OpenVLAConfig) -> None:
    """Raises ValueError where the recorded pruner has parameters and does not fit the model. Reads no weights."""
    if not (spec := config.pruner_spec).has_parameters:
        return
    with torch.device("meta"):
        backbone = build_backbone(config)
    spec.check_fits(model_sizes(config, backbone, config.num_images_in_input or 2))


def build_backbone(config: OpenVLAConfig) -> PrismaticVisionBackbone:
    """The vision backbone, untrained. Raises ValueError where the configuration does not say which."""
    if config.timm_model_ids is None or config.image_sizes is None:
        raise ValueError("config.json names no timm_model_ids or image_sizes")
    return PrismaticVisionBackbone(config.timm_model_ids, config.image_sizes[0], config.timm_model_kwargs or ())


class OpenVLAForActionPrediction(PreTrainedModel):
    """Vision backbone, projector and Llama; predicts a chunk of actions in one parallel pass.

    State-dict names are the published ones: `vision_backbone.*`, `projector.*`, `language_model.*`.
    """

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False
    _no_split_modules = ["LlamaDecoderLayer", "Block"]
    _keys_to_ignore_on_load_unexpected = [r"^pruner\."]  # of a checkpoint that is run with another pruner

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        if config.pruner is None:
            logger.warning(
                "config.json records no pruner: assuming %s; set config.pruner to say otherwise", config.pruner_spec
            )
        self.vision_backbone = build_backbone(config)
        llm_dim = config.text_config.hidden_size  # type: ignore[union-attr]
        fused = bool(config.use_fused_vision_backbone)
        self.projector = VisionProjector(self.vision_backbone.feature_dim, llm_dim, fused)
        self.language_model = LlamaForCausalLM(config.text_config)  # type: ignore[arg-type]
        self.num_images_in_input = config.num_images_in_input or 2
        self.pruner: nn.Module = config.pruner_spec.build(self.sizes)
        self.robot = config.robot_spec
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # timm, Llama and the projector initialise themselves when built; only buffers that no file holds are left.
        if "RotaryEmbedding" in type(module).__name__:
            super()._init_weights(module)
        elif isinstance(module, LearnableQueries):
            module.reset_parameters()

    @property
    def norm_stats(self) -> dict[str, Any]:
        """The statistics recorded in `config.json`, by dataset."""
        return self.config.norm_stats or {}

    @norm_stats.setter
    def norm_stats(self, statistics: dict[str, Any]) -> None:
        self.config.norm_stats = statistics

    @property
    def sizes(self) -> ModelSizes:
        """Of the model, as pruners need them."""
        return model_sizes(self.config, self.vision_backbone, self.num_images_in_input)

    @property
    def site(self) -> Site:
        """Where the pruner drops tokens: its own word, and before the LLM where it says none."""
        return getattr(self.pruner, "site", Projector())

    def set_pruner(self, spec: PrunerSpec) -> None:
        """Run with another pruner from now on; its parameters, where it has any, are new.

        Raises ValueError where it does not fit the model.
        """
        self.pruner = spec.build(self.sizes).to(self.device, self.dtype).train(self.training)
        self.config.pruner = spec.to_json()

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of one sample before pruning."""
        return self.vision_backbone.patches_per_image * self.num_images_in_input

    def set_num_images_in_input(self, num_images: int) -> None:
        """How many images each sample brings. Raises ValueError where the robot has fewer cameras."""
        if not 1 <= num_images <= len(self.robot.cameras):
            raise ValueError(
                f"num_images_in_input={num_images}: robot {self.robot.name!r} has {len(self.robot.cameras)} cameras"
            )
        self.num_images_in_input = num_images

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embeddings."""
        return self.language_model.get_input_embeddings()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, I * channels, S, S) -> (B, V, D) projected patches."""
        return self.projector(self.vision_backbone(self._checked_pixels(pixel_values)))

    def encode_visual(self, pixel_values: torch.Tensor, score_noise: torch.Tensor | None = None) -> TokenSelection:
        """The projected patches: all of them, or those that a pruner inside the vision backbone keeps."""
        if not isinstance(site := self.site, VisionBlock):
            return keep_all(self.encode_images(pixel_values))
        pruning = VisionPruning(site.block, partial(self._prune, score_noise=score_noise))
        kept: TokenSelection = self.vision_backbone(self._checked_pixels(pixel_values), pruning)
        return dataclasses.replace(kept, tokens=self.projector(kept.tokens) * kept.valid[..., None])

    def _prune(
        self,
        tokens: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        score_noise: torch.Tensor | None = None,
    ) -> TokenSelection:
        noise = (score_noise,) if getattr(self.pruner, "needs_noise", False) else ()
        return self.pruner(tokens, context, context_mask, *noise)

    def _checked_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        expected = self.num_images_in_input * self.vision_backbone.channels_per_image
        if pixel_values.ndim != 4 or pixel_values.shape[1] != expected:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (B, {expected}, S, S): "
                f"{self.num_images_in_input} images of {self.vision_backbone.channels_per_image} channels. "
                "Pass all images, or call set_num_images_in_input"
            )
        return pixel_values.to(self.projector.fc1.weight.dtype)

    def action_hidden(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        score_noise: torch.Tensor | None = None,
        mask_padding: bool = True,
    ) -> ActionHidden:
        """Hidden rows that predict the actions; samples of a batch do not see each other.

        Args:
            input_ids: (B, T) BOS, prompt, empty piece; right-padded.
            attention_mask: (B, T), false for padding.
            pixel_values: (B, I * channels, S, S).
            proprio: (B, P) normalised state, with `proprio_projector`.
            proprio_projector: maps the state to one token.
            score_noise: (B, Q, V) added to the scores of the pruner's Q queries (V for LightVLA) in training.
            mask_padding: false lets padding take part in the scores, as the reference does (a bug; for comparisons).
        """
        ids = self.config.special_tokens
        embed = self.get_input_embeddings()
        visual = self.encode_visual(pixel_values, score_noise)
        state_token = None
        if proprio is not None and proprio_projector is not None:
            state_token = proprio_projector(proprio)
        tail = tail_ids(input_ids, attention_mask, self.robot.num_action_tokens, ids)
        context = build_context(embed, tail, state_token)  # type: ignore[arg-type]
        context_mask = context.mask if mask_padding else None
        prune = partial(self._prune, context_mask=context_mask, score_noise=score_noise)
        site, llama = self.site, self.language_model.model
        selection = prune(visual.tokens, context.embeddings) if isinstance(site, Projector) else visual
        sequence = lay_out(embed(input_ids[:, :1]), selection, context)
        if isinstance(site, LlamaLayer):
            hidden, sequence, selection = run_llama_pruning(llama, sequence, site.layer, prune)
        else:
            hidden = run_llama(llama, sequence.embeddings, sequence.position_ids, sequence.key_bias)
        rows = sequence.action_rows(hidden, self.robot.num_action_tokens, self.config.action_readout)
        return ActionHidden(rows, selection, sequence.position_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ActionHidden:
        """`action_hidden` with every prompt token attended to where no mask is given."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.action_hidden(input_ids, mask, pixel_values, **kwargs)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        proprio: np.ndarray | torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        action_head: nn.Module | None = None,
        noisy_action_projector: nn.Module | None = None,
        unnorm_key: str | None = None,
        use_film: bool = False,
        do_sample: bool = False,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Un-normalised actions and their hidden rows.

        Args:
            input_ids: (B, T) prompt ids, with or without the empty piece at the end.
            attention_mask: (B, T); None attends to all.
            pixel_values: (B, I * channels, S, S).
            proprio: (P,) or (B, P) normalised state.
            proprio_projector: needed for the state to be read.
            action_head: L1 head; None decodes discrete action tokens by the LM head.
            noisy_action_projector: of diffusion checkpoints; not supported here.
            unnorm_key: dataset whose statistics apply; may be None where there is only one.
            use_film: of FiLM checkpoints; not supported here.
            do_sample: accepted for compatibility; actions are always the most likely ones.

        Returns:
            actions, (chunk, action_dim) for one sample and (B, chunk, action_dim) for more; hidden rows (B, A, D).
        """
        if noisy_action_projector is not None or use_film:
            raise NotImplementedError("diffusion heads and FiLM are not supported by predict_action in this version")
        if pixel_values is None:
            raise ValueError("predict_action needs pixel_values; make them with the processor")
        statistics = self._statistics(unnorm_key)["action"]
        input_ids, mask = self._complete_prompt(input_ids, attention_mask)
        state = None
        if proprio is not None:
            state = torch.as_tensor(proprio, device=self.device).float().reshape(len(input_ids), -1)
        hidden = self.action_hidden(input_ids, mask, pixel_values, state, proprio_projector)
        if action_head is not None:
            head_dtype = next(action_head.parameters()).dtype
            normalized = action_head.predict_action(hidden.rows.to(head_dtype)).float().cpu().numpy()  # type: ignore[operator]
        else:
            normalized = self.decode_discrete(hidden.rows)
        actions = normalization.unnormalize(normalized, statistics, self.robot.normalization)
        return (actions[0] if len(actions) == 1 else actions), hidden.rows

    def discrete_token_ids(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, A, D) hidden rows -> (B, A) most likely token ids over the whole vocabulary."""
        return self.language_model.lm_head(rows).argmax(-1)

    def decode_discrete(self, rows: torch.Tensor) -> np.ndarray:
        """(B, A, D) hidden rows -> (B, chunk, action_dim) normalised actions at bin centres."""
        tokenizer = ActionTokenizer(self.config.special_tokens.action_end, self.config.n_action_bins)
        actions = tokenizer.decode(self.discrete_token_ids(rows).cpu().numpy())
        return actions.reshape(len(rows), self.robot.chunk_length, self.robot.action_dim)

    def _complete_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the empty piece to rows that do not end in it; right-pads again where rows then differ."""
        ids = self.config.special_tokens
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        rows = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
        piece = input_ids.new_tensor([ids.empty])
        rows = [row if row[-1] == ids.empty else torch.cat([row, piece]) for row in rows]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ids.pad)
        length = torch.tensor([len(row) for row in rows], device=input_ids.device)
        return padded, torch.arange(padded.shape[1], device=input_ids.device)[None] < length[:, None]

    def _statistics(self, unnorm_key: str | None) -> dict[str, Any]:
        known = sorted(self.norm_stats)
        if unnorm_key is None and len(known) == 1:
            return self.norm_stats[known[0]]
        if unnorm_key is None or unnorm_key not in self.norm_stats:
            raise ValueError(
                f"unnorm_key={unnorm_key!r} names no dataset of this checkpoint; known: {', '.join(known) or 'none'}"
            )
        return self.norm_stats[unnorm_key]


AutoConfig.register("openvla", OpenVLAConfig)
AutoImageProcessor.register(OpenVLAConfig, slow_image_processor_class=PrismaticImageProcessor)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction)
