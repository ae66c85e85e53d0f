"""What a training step needs: its real forward and backward pass, run over tensors that have shapes and no values.

Every operation tells which tensors it makes and when they go, so the most that exists at once is known exactly before
any weights are read, temporary tensors and recomputed activations included. What kernels take inside, and what an
allocator rounds up or leaves unused, is not counted.
"""

import gc
import sys
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from prismatic.models.diffusion import DiffusionActionHead
from prismatic.training.step import TrainableVLA


@dataclass(frozen=True)
class StepShape:
    """What a micro-step computes.

    Attributes:
        batch_size: samples.
        prompt_tokens: BOS, prompt and empty piece of the longest.
        kept: distinct visual tokens that the pruner keeps, of the sample that keeps the most.
        noisy: whether the pruner's scores get noise.
        gradients_stay: whether they exist before the backward pass: of an earlier micro-step, or in the buckets that
            processes exchange.
    """

    batch_size: int
    prompt_tokens: int
    kept: int
    noisy: bool
    gradients_stay: bool = False


@dataclass
class StepCost:
    """What a micro-step needs beside the weights, and gradients that stay.

    Attributes:
        peak: most bytes at once: the batch, activations, new gradients, temporary tensors.
        new_gradients: bytes of gradients among them at that moment.
        vision: bytes that the backward pass needs of the vision backbone.
        activations: bytes that exist between forward and backward pass, the vision backbone's and the batch included.
        flops: floating-point operations of matrix products, convolutions and attention; a multiply-add counts two.
    """

    peak: int = 0
    new_gradients: int = 0
    vision: int = 0
    activations: int = 0
    flops: int = 0


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.nbytes for tensor in tensors)


class Ledger(TorchDispatchMode):
    """Within it, the bytes of the tensors that operations make are counted, for as long as they exist.

    Works over real tensors; `ValuelessLedger` over others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cost = StepCost()
        self._live = 0
        self._gradients = 0
        self._known: set[int] = set()

    def step(self, module: TrainableVLA, batch: Mapping[str, Any], noise: torch.Tensor | None) -> StepCost:
        """Run and count forward and backward pass of one batch. Gradients are left in the parameters."""
        self._cost = StepCost()
        given = [value for value in (*batch.values(), noise) if isinstance(value, torch.Tensor)]
        parameters = list(module.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._ignore([*parameters, *module.buffers(), *gradients, *given])
        self._live, self._gradients = nbytes(given), 0
        with ExitStack() as stack:
            # Python frees what refers to itself whenever it comes to look for such, so two counts would differ.
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)

            def behind_vision(*_: Any) -> None:
                self._cost.vision = self._live - nbytes(given)

            stack.callback(module.model.vision_backbone.register_forward_hook(behind_vision).remove)
            for parameter in parameters:
                if parameter.requires_grad and parameter.grad is None:
                    stack.callback(parameter.register_post_accumulate_grad_hook(self._took_gradient).remove)
            stack.enter_context(self)
            loss, _ = module(batch, noise)
            self._cost.activations = self._live
            loss.backward()
        return self._cost

    def _ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these, nor views of them."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _took_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, flops = self._run(func, args, kwargs or {})
        self._cost.flops += flops
        for tensor in [made] if isinstance(made, torch.Tensor) else tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return made

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """The operation's outcome and its floating-point operations."""
        made = func(*args, **kwargs)
        return made, _flops(func, args, kwargs, made)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        weakref.finalize(storage, self._gone, key, size).atexit = False
        self._live += size
        if self._live > self._cost.peak:
            self._cost.peak, self._cost.new_gradients = self._live, self._gradients

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _flops(func: Any, args: Any, kwargs: Any, made: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=made))


class ValuelessLedger(Ledger):
    """Within it, operations on CPU tensors make tensors of the right shape and dtype and compute nothing.

    All of them lie over one piece of memory that nobody writes to, so the system never provides it. Numbers that code
    asks a tensor for are answered by who asks.

    Args:
        answers: by the name of the function that asks for a number, the number.
    """

    def __init__(self, answers: Mapping[str, int]) -> None:
        super().__init__()
        self._answers = answers
        self._memory = np.empty(0, np.uint8)
        self._outcomes: dict[Any, tuple[Any, int]] = {}

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer(), 0
        if (alias := _alias(func)) == "view":
            return func(*args, **kwargs), 0
        if alias == "in place":
            return args[0], 0
        key = (func, _facts(args), _facts(tuple(kwargs.items())))
        if key not in self._outcomes:
            self._outcomes[key] = self._on_meta(func, args, kwargs)
        outline, flops = self._outcomes[key]
        return tree_map_only(_Outline, self._new, outline, is_leaf=lambda leaf: isinstance(leaf, _Outline)), flops

    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        args, kwargs = tree_map_only(torch.Tensor, _meta, (args, kwargs))
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs = {**kwargs, "device": "meta"}
        made = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, _Outline.of, made), _flops(func, args, kwargs, made)

    def _new(self, outline: "_Outline") -> torch.Tensor:
        size, stride, dtype = outline.size, outline.stride, outline.dtype
        if 0 in size:
            return torch.empty_strided(size, stride, dtype=dtype)
        count = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if (wanted := count * dtype.itemsize) > len(self._memory):
            self._memory = np.empty(2 * wanted, np.uint8)
        return torch.frombuffer(self._memory, dtype=dtype, count=count).as_strided(size, stride)

    def _answer(self) -> int:
        frame = sys._getframe(1)
        while frame.f_back is not None:
            if (name := frame.f_code.co_name) in self._answers:
                return self._answers[name]
            frame = frame.f_back
        raise RuntimeError("a step asks for a number that depends on values")


@dataclass(frozen=True)
class _Outline:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Outline":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _facts(value: Any) -> Any:
    """What an operation's outcome depends on, as a key."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_facts(item) for item in value)
    return value


def _alias(func: Any) -> str | None:
    """Whether an operation returns a view of an argument, or the argument itself, changed."""
    infos = [returned.alias_info for returned in func._schema.returns]
    if not infos or infos[0] is None:
        return None
    return "in place" if infos[0].is_write else "view"


class StepSimulator:
    """Runs micro-steps of a module on the meta device, which it turns into one of tensors without values, in place.

    Args:
        module: on the meta device; on a CPU, its attention is as it will be.
        on_gpu: whether it stands for a module on a GPU, where autocast normalises in float32.
    """

    def __init__(self, module: TrainableVLA, on_gpu: bool) -> None:
        if isinstance(head := module.action_head, DiffusionActionHead):  # its tables are no buffers
            head.restore_schedule()
        self._answers: dict[str, int] = {}
        self._ledger = ValuelessLedger(self._answers)
        with self._ledger:
            self._module = module.to_empty(device="cpu").train()
            for part in module.modules() if on_gpu else ():
                if isinstance(part, nn.LayerNorm):
                    part.float().register_forward_pre_hook(_to_float32)

    def run(self, shape: StepShape) -> StepCost:
        """What one micro-step needs. Raises whatever torch raises for an operation that needs values."""
        model = self._module.model
        self._answers.update(
            tail_ids=shape.prompt_tokens - 1,
            group_picks=shape.kept,
            pick_tokens=0,
            _duplicated=0,
            pack_by_image=-(-shape.kept // model.num_images_in_input),
        )
        with self._ledger:
            for parameter in self._module.parameters():
                stays = shape.gradients_stay and parameter.requires_grad
                parameter.grad = torch.empty_like(parameter) if stays else None
            batch, noise = _made_up_batch(self._module, shape)
        return self._ledger.step(self._module, batch, noise)


def _to_float32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.float() for value in inputs) if torch.is_autocast_enabled("cpu") else inputs


def _made_up_batch(module: TrainableVLA, shape: StepShape) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """As a batch is collated; on a CPU, whatever the device."""
    model, size = module.model, shape.batch_size
    robot, side = model.robot, model.vision_backbone.featurizer.patch_embed.img_size[0]
    channels = model.num_images_in_input * model.vision_backbone.channels_per_image
    batch = {
        "input_ids": torch.zeros(size, shape.prompt_tokens, dtype=torch.long),
        "attention_mask": torch.ones(size, shape.prompt_tokens, dtype=torch.bool),
        "pixel_values": torch.zeros(size, channels, side, side),
        "proprio": torch.zeros(size, robot.proprio_dim),
        "actions": torch.zeros(size, robot.chunk_length, robot.action_dim),
    }
    if isinstance(module.action_head, DiffusionActionHead):
        batch["diffusion_noise"] = torch.zeros_like(batch["actions"])
        batch["diffusion_timesteps"] = torch.zeros(size, dtype=torch.long)
    queries = model.config.pruner_spec.num_queries or model.num_visual_tokens
    return batch, torch.zeros(size, queries, model.num_visual_tokens) if shape.noisy else None
