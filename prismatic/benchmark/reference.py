"""The arm `reference`: an action computed with all the work that the public LightVLA research code does.

It computes what ours leaves out, and stays otherwise equal, so that the difference in time is that work alone:

- every block of both ViTs runs, though the second-to-last one's output is what is read (the research code asks timm's
  `get_intermediate_layers`, which runs to the end; the final norm does not run there either);
- the images of an observation pass the ViTs one after another, a batch of one each;
- the LM head makes logits over the whole vocabulary for every row of the sequence, in float32, and nobody reads them;
- the hidden states of all layers are kept, of which the last is read;
- Llama's attention is the eager one; ViTs have the attention that timm chooses;
- the pruner keeps the distinct picks, as the research code does at inference: duplicates stay in its training only.

What it is not: the research code keeps keys and values that nothing reads, scores tokens in the model's dtype and reads
rows two late. Here there is no cache, scores are float32 and the read-out is the checkpoint's, so that actions equal
those of the eager engine up to rounding; each of the first two makes this arm cheaper or dearer by less than 0.2 %.
At 7B with 35 prompt tokens this is 9.03 TFLOP unpruned (OpenVLA-OFT) and 3.12 TFLOP with 78 tokens kept.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.batch import Call
from prismatic.models.film import has_film
from prismatic.models.llama import attention_mask
from prismatic.models.sequence import Sequence as TokenSequence
from prismatic.models.sequence import build_context, lay_out, tail_ids
from prismatic.models.sites import Projector
from prismatic.models.stage_clock import StageClock
from prismatic.models.token_pruner import TokenSelection
from prismatic.policy import Policy, PolicyOutput
from prismatic.vla.datasets.collate import collate
from prismatic.vla.request import Observation


def sharing_copy(model: OpenVLAForActionPrediction) -> OpenVLAForActionPrediction:
    """The model with modules and settings of its own, and the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass
class ReferenceModel:
    """The model's parts, run as the research code runs them.

    Attributes:
        model: whose parts they are; its own copy, since the attention is set in its configuration.
    """

    model: OpenVLAForActionPrediction

    @classmethod
    def of(cls, model: OpenVLAForActionPrediction) -> "ReferenceModel":
        """Over the same weights. Raises ValueError for FiLM, and a pruner that does not lie behind the projector."""
        if has_film(model.vision_backbone) or not isinstance(model.site, Projector):
            raise ValueError(
                f"engine 'reference' computes no FiLM, and no pruner elsewhere than behind the projector "
                f"({model.config.pruner_spec}); leave it out of --engines"
            )
        copied = sharing_copy(model)
        copied.language_model.set_attn_implementation("eager")
        return cls(copied)

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, I * channels, S, S) -> projected patches (B, V, D), image after image through whole ViTs."""
        backbone = self.model.vision_backbone
        features = []
        for image in pixel_values.split(backbone.channels_per_image, dim=1):
            parts = [
                vit.get_intermediate_layers(channels, n=[len(vit.blocks) - 2])[0]
                for vit, channels in zip(backbone.vits, image.split(3, dim=1), strict=True)
            ]
            features.append(torch.cat(parts, dim=-1))
        return self.model.projector(torch.cat(features, dim=1))

    def hidden(self, sequence: TokenSequence) -> torch.Tensor:
        """Hidden rows (B, S, D) after the final norm; the other layers' and all logits are made and dropped."""
        output = self.model.language_model(
            inputs_embeds=sequence.embeddings,
            attention_mask=attention_mask(sequence.key_bias, sequence.embeddings),
            position_ids=sequence.position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        output.logits.float()
        return output.hidden_states[-1]

    def rows(
        self, batch: dict[str, torch.Tensor], proprio_projector: nn.Module | None, clock: StageClock | None = None
    ) -> tuple[torch.Tensor, TokenSelection]:
        """A collated batch -> the rows (B, A, D) that predict the actions, and the visual tokens that were kept."""
        model, call = self.model, Call(clock=clock)
        embed, ids = model.get_input_embeddings(), batch["input_ids"]
        with call.stage("vision"):
            patches = self.patches(batch["pixel_values"].to(model.dtype))
        state = proprio_projector(batch["proprio"]) if proprio_projector is not None else None
        actions = model.robot.num_action_tokens
        context = build_context(
            embed, tail_ids(ids, batch["attention_mask"], actions, model.config.special_tokens), state
        )
        known = {"prompt_mask": context.prompt_mask(), "memories": None}
        selection = model.prune(patches, context.embeddings, context.mask, call=call, known=known)
        sequence = lay_out(embed(ids[:, :1]), selection, context)
        with call.stage("llm"):
            hidden = self.hidden(sequence)
        return sequence.action_rows(hidden, actions, model.config.action_readout), selection


class ReferencePolicy:
    """Acts as a policy does, with the work of the research code.

    Attributes:
        policy: whose parts are run; what prepares the inputs and un-normalises the actions.
    """

    def __init__(self, policy: Policy) -> None:
        head: Any = policy.action_head
        if head.kind != "l1":
            raise ValueError(f"engine 'reference' computes the L1 head, not {head.kind!r}; leave it out of --engines")
        self.policy = policy
        self._head = head
        self._reference = ReferenceModel.of(policy.model)

    @torch.inference_mode()
    def act_batch(self, observations: Sequence[Observation], instructions: Sequence[str | bytes]) -> PolicyOutput:
        """As `Policy.act_batch`."""
        policy, start = self.policy, time.perf_counter()
        samples = [policy.model_inputs(o, i) for o, i in zip(observations, instructions, strict=True)]
        batch = collate(samples, policy.transform.pad_token_id)
        prepared = time.perf_counter()
        clock = StageClock(policy.model.device)
        on_device = {name: value.to(policy.model.device) for name, value in batch.items()}
        projector = policy.proprio_projector if "proprio" in batch else None
        rows, selection = self._reference.rows(on_device, projector, clock)
        predicted = self._head.predict_action(rows.to(self._head.model.fc2.weight.dtype)).float()
        actions = policy.transform.unnormalize_actions(predicted.cpu().numpy())
        timing = {"preprocessing": prepared - start, **clock.seconds(), "total": time.perf_counter() - start}
        return PolicyOutput(actions, selection, timing)
