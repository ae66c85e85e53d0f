"""The vision-language-action model under its published names: encode, project, prune, lay out, run, read out."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from prismatic.extern.hf.building import build_backbone, model_sizes
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.predict_arguments import check_both, checked_proprio, chosen_statistics, head_for
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.extern.hf.stored_model import StoredModel
from prismatic.libraries import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaForCausalLM,
)
from prismatic.models.action_heads import DiscreteActionHead
from prismatic.models.autoregressive import AutoregressiveActionHead, check_decodable
from prismatic.models.batch import ActionHidden, Call, EncodedBatch
from prismatic.models.contract import ActionHead
from prismatic.models.film import apply_film, has_film
from prismatic.models.llama import (
    decode_greedily,
    run_llama,
    run_llama_pruning,
    run_llama_reading,
    run_llama_reusing,
)
from prismatic.models.projectors import VisionProjector
from prismatic.models.pruners.blanking import blank_tokens
from prismatic.models.pruners.kind import TrainedPruner
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.sequence import Context, build_context, complete_prompt, lay_out, tail_ids
from prismatic.models.sites import LlamaKeys, LlamaLayer, ModelSizes, Projector, Site, VisionBlock
from prismatic.models.token_pruner import TokenSelection, keep_all
from prismatic.models.vision_backbone import VisionPruning
from prismatic.vla import normalization
from prismatic.vla.action_tokenizer import ActionTokenizer

logger = logging.getLogger(__name__)


class OpenVLAForActionPrediction(StoredModel):
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

    def __init__(self, config: OpenVLAConfig, **unknown: Any) -> None:
        super().__init__(config)
        if unknown:
            known = sorted(set(OpenVLAConfig.__annotations__))
            raise TypeError(
                f"unknown options {sorted(unknown)}; known are those of transformers' from_pretrained and the "
                f"settings of config.json: {', '.join(known)}"
            )
        config.settle()
        if config.pruner is None:
            logger.warning(
                "config.json records no pruner: assuming %s; set config.pruner to say otherwise", config.pruner_spec
            )
        self.vision_backbone = build_backbone(config)
        fused = bool(config.use_fused_vision_backbone)
        self.projector = VisionProjector(self.vision_backbone.feature_dim, config.llama.hidden_size, fused)
        self.language_model = LlamaForCausalLM(config.llama)
        self.num_images_in_input = config.num_images_in_input or 2
        self.pruner: nn.Module = config.pruner_spec.build(self.sizes)
        self.robot = config.robot_spec
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # timm, Llama and the projector initialise themselves when built; only buffers that no file holds are left.
        if "RotaryEmbedding" in type(module).__name__:
            super()._init_weights(module)
        elif isinstance(module, TrainedPruner):
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

    @property
    def max_prompt_tokens(self) -> int:
        """Room for BOS, prompt and empty piece: the LLM's positions less those of visual tokens, actions and stop, and
        of the state and diffusion's time step, read or not."""
        positions = min(self.config.llm_max_length, self.config.llama.max_position_embeddings)
        return positions - self.num_visual_tokens - self.robot.num_action_tokens - 3

    def set_num_images_in_input(self, num_images: int) -> None:
        """How many images each sample brings. Raises ValueError where the robot has fewer cameras."""
        if not 1 <= num_images <= len(self.robot.cameras):
            raise ValueError(
                f"num_images_in_input={num_images}: robot {self.robot.name!r} has {len(self.robot.cameras)} cameras"
            )
        self.num_images_in_input = self.config.num_images_in_input = num_images

    def get_input_embeddings(self) -> nn.Embedding:
        """The LLM's token embeddings."""
        return self.language_model.model.embed_tokens

    def enable_film(self) -> None:
        """Let the instruction modulate the vision backbone; new maps change nothing until they are trained."""
        if not has_film(self.vision_backbone):
            apply_film(self.vision_backbone, self.config.llama.hidden_size)
        self.config.use_film = True

    def enable_gradient_checkpointing(self, vits: bool = True, llm: bool = True) -> None:
        """Compute the activations of every LLM layer and ViT block anew in the backward pass: less memory, slower."""
        llama: Any = self.language_model.model  # the method's name changed during transformers 5
        if llm:
            enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        for vit in self.vision_backbone.vits:
            vit.set_grad_checkpointing(vits)

    def discrete_head(self) -> DiscreteActionHead:
        """The head that reads actions off this model's own LM head, all at once."""
        ids, robot = self.config.special_tokens, self.robot
        return DiscreteActionHead(self._action_tokenizer(), robot.action_dim, robot.chunk_length, ids.stop)

    def autoregressive_head(self) -> AutoregressiveActionHead:
        """The head that decodes one action by this model's own LM head, token by token."""
        return AutoregressiveActionHead(self._action_tokenizer(), self.robot.action_dim)

    def _action_tokenizer(self) -> ActionTokenizer:
        return ActionTokenizer(self.config.special_tokens.action_end, self.config.n_action_bins)

    def encode_images(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """(B, I * channels, S, S) -> (B, V, D) projected patches; `language` (B, D) where there is FiLM."""
        return self.projector(self.vision_backbone(self._checked_pixels(pixel_values), language))

    def encode_visual(
        self, pixel_values: torch.Tensor, language: torch.Tensor | None = None, call: Call | None = None
    ) -> TokenSelection:
        """The projected patches: all of them, or those that a pruner inside the vision backbone keeps."""
        if not isinstance(site := self.site, VisionBlock):
            return keep_all(self.encode_images(pixel_values, language))
        pruning = VisionPruning(site.block, partial(self.prune, call=call or Call()))
        kept: TokenSelection = self.vision_backbone(self._checked_pixels(pixel_values), language, pruning)
        return dataclasses.replace(kept, tokens=self.projector(kept.tokens) * kept.valid[..., None])

    def prune(
        self,
        tokens: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        *,
        call: Call,
        known: Mapping[str, Any] | None = None,
        **there: Any,
    ) -> TokenSelection:
        """What the pruner keeps of (B, V, D) tokens, at its site; counted as the stage `pruner`.

        Of what is `known` beside tokens and context, or `there` at the site alone, it is given what it `needs`. Where
        the call says so, kept tokens are then blanked.
        """
        noise = (call.score_noise,) if getattr(self.pruner, "needs_noise", False) else ()
        offered = {"seeds": call.pruner_seeds, **(known or {}), **there}
        with call.stage("pruner"):
            needed = {name: offered[name] for name in getattr(self.pruner, "needs", ())}
            kept: TokenSelection = self.pruner(tokens, context, context_mask, *noise, **needed)
        if call.blankings is None:
            return kept
        return blank_tokens(kept, tokens, call.blankings, self.num_images_in_input)

    def _checked_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        expected = self.num_images_in_input * self.vision_backbone.channels_per_image
        if pixel_values.ndim != 4 or pixel_values.shape[1] != expected:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (B, {expected}, S, S): "
                f"{self.num_images_in_input} images of {self.vision_backbone.channels_per_image} channels. "
                "Pass all images, or call set_num_images_in_input"
            )
        return pixel_values.to(self.projector.fc1.weight.dtype)

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        call: Call | None = None,
    ) -> EncodedBatch:
        """Everything before the LLM.

        Args:
            input_ids: (B, T) BOS, prompt, empty piece; right-padded.
            attention_mask: (B, T), false for padding.
            pixel_values: (B, I * channels, S, S).
            proprio: (B, P) normalised state, with `proprio_projector`.
            proprio_projector: maps the state to one token.
            call: noise, seeds and clock of this call.
        """
        call = call or Call()
        language = self._language(input_ids, attention_mask) if has_film(self.vision_backbone) else None
        with call.stage("vision"):
            visual = self.encode_visual(pixel_values, language, call)
        state_token = None
        if proprio is not None and proprio_projector is not None:
            state_token = proprio_projector(proprio)
        return EncodedBatch(input_ids, attention_mask, visual, state_token, call)

    def run(
        self,
        encoded: EncodedBatch,
        mask_padding: bool = True,
        action_tokens: torch.Tensor | None = None,
        timestep_token: torch.Tensor | None = None,
        further_rows: int = 0,
    ) -> ActionHidden:
        """Prune, lay out, run the LLM; samples of a batch do not see each other.

        Args:
            encoded: from `encode`.
            mask_padding: false lets padding take part in the scores, as the reference does (a bug; for comparisons).
            action_tokens: (B, A, D) noisy actions of diffusion in place of the zero placeholders.
            timestep_token: (B, 1, D) of diffusion.
            further_rows: rows to read behind the A that predict actions (1: the stop token's).
        """
        ids, num_actions = self.config.special_tokens, self.robot.num_action_tokens
        embed = self.get_input_embeddings()
        tail = tail_ids(encoded.input_ids, encoded.attention_mask, num_actions, ids)
        context = build_context(embed, tail, encoded.state_token, timestep_token, action_tokens)
        context_mask = context.mask if mask_padding else None
        memories = encoded.call.memories
        known = {"prompt_mask": context.prompt_mask(), "memories": memories}
        prune = partial(self.prune, context_mask=context_mask, call=encoded.call, known=known)
        site, llama, selection = self.site, self.language_model.model, encoded.visual
        if isinstance(site, Projector):
            selection = prune(selection.tokens, context.embeddings)
        sequence = lay_out(embed(encoded.input_ids[:, :1]), selection, context)
        read = (num_actions + further_rows, self.config.action_readout)
        places = (lambda of: of.action_places(*read)) if self.training else None
        with encoded.call.stage("llm"):
            if isinstance(site, LlamaLayer):
                rows, sequence, selection = run_llama_pruning(llama, sequence, site.layer, prune, places)
            elif isinstance(site, LlamaKeys) and memories is not None:  # of sessions, which training has none of
                selection = prune(selection.tokens, context.embeddings)
                rows, sequence, memories = run_llama_reusing(llama, sequence, selection, memories, site.layer)
                encoded.call.remember(memories)
            elif places is not None:
                rows = run_llama_reading(llama, sequence, places(sequence))
            else:
                rows = run_llama(llama, sequence.embeddings, sequence.position_ids, sequence.key_bias)
        if places is None:
            rows = sequence.action_rows(rows, *read)
        return ActionHidden(rows, selection, sequence.position_ids)

    def decode(self, encoded: EncodedBatch, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, ActionHidden]:
        """The most likely tokens behind the prompt, one after another under causal attention, over all visual tokens.

        Returns ids (B, num_tokens), their logits (B, num_tokens), and the rows they were read from. Raises ValueError
        where there is a pruner or a state token.
        """
        check_decodable(self.config.pruner_spec.name, encoded.state_token is not None)
        embed, mask = self.get_input_embeddings(), encoded.attention_mask.bool()
        prompt = Context(embed(encoded.input_ids[:, 1:]), mask[:, 1:], 0, mask.sum(1) - 1)
        sequence = lay_out(embed(encoded.input_ids[:, :1]), encoded.visual, prompt)
        with encoded.call.stage("llm"):
            ids, logits, rows = decode_greedily(self.language_model, sequence, num_tokens)
        return ids, logits, ActionHidden(rows, encoded.visual, sequence.position_ids)

    def _language(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What FiLM modulates by: the mean embedding (B, D) of BOS, prompt, empty piece and stop."""
        embed = self.get_input_embeddings()
        words = (embed(input_ids) * attention_mask[..., None]).sum(1)
        stop = embed(input_ids.new_tensor(self.config.special_tokens.stop))
        return (words + stop) / (attention_mask.sum(1, keepdim=True) + 1).to(words.dtype)

    def action_hidden(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        score_noise: torch.Tensor | None = None,
        **options: Any,
    ) -> ActionHidden:
        """`encode`, then one `run` with `options`: hidden rows that predict the actions."""
        call = Call(score_noise)
        encoded = self.encode(input_ids, attention_mask, pixel_values, proprio, proprio_projector, call)
        return self.run(encoded, **options)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ActionHidden:
        """The hidden rows that `predict_action` reads, for what the processor returns.

        Prompts may lack the empty piece at their end, and every token is attended to where no mask is given.
        """
        input_ids, mask = complete_prompt(input_ids, attention_mask, self.config.special_tokens)
        return self.action_hidden(input_ids, mask, pixel_values, **kwargs)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        proprio: np.ndarray | torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        action_head: ActionHead | None = None,
        noisy_action_projector: nn.Module | None = None,
        unnorm_key: str | None = None,
        use_film: bool = False,
        do_sample: bool = False,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Un-normalised actions and their hidden rows. Nothing of what is passed is changed.

        Args:
            input_ids: (B, T) prompt ids, with or without the empty piece at the end.
            attention_mask: (B, T); None attends to all.
            pixel_values: (B, I * channels, S, S).
            proprio: (P,) or (B, P) normalised state; ValueError for another shape, NaN or infinity.
            proprio_projector: needed for the state to be read.
            action_head: L1 or diffusion head; None decodes action tokens by the LM head, where the checkpoint records
                no other head: one after another where `config.action_head` is "autoregressive", else all at once.
            noisy_action_projector: of a diffusion head; None: the one that the head already has.
            unnorm_key: dataset whose statistics apply; may be None where there is only one.
            use_film: accepted for compatibility; it is known from the checkpoint whether there is FiLM.
            do_sample: accepted for compatibility, with a warning: actions are always the most likely ones.

        Returns:
            actions, (chunk, action_dim) for one sample and (B, chunk, action_dim) for more, where chunk is 1 if tokens
            are decoded one after another; hidden rows (B, A, D).
        """
        if use_film and not has_film(self.vision_backbone):
            raise ValueError("use_film=True, but this model has no FiLM: load its vision_backbone--*_checkpoint.pt")
        if do_sample:
            logger.warning("do_sample=True: nothing is sampled here, actions are always the most likely ones")
        if pixel_values is None:
            raise ValueError("predict_action needs pixel_values; make them with the processor")
        check_both(proprio, proprio_projector)
        head = head_for(self, action_head, noisy_action_projector)
        statistics = chosen_statistics(self.norm_stats, unnorm_key, self.robot)
        input_ids, mask = complete_prompt(input_ids, attention_mask, self.config.special_tokens)
        state = None
        if proprio is not None:
            state = checked_proprio(proprio, self.robot, len(input_ids)).to(self.device)
        normalized, hidden = head.predict(self, self.encode(input_ids, mask, pixel_values, state, proprio_projector))
        actions = normalization.unnormalize(normalized.cpu().numpy(), statistics, self.robot.normalization)
        return (actions[0] if len(actions) == 1 else actions), hidden.rows


AutoConfig.register("openvla", OpenVLAConfig)
AutoImageProcessor.register(OpenVLAConfig, slow_image_processor_class=PrismaticImageProcessor)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor)
AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction)
