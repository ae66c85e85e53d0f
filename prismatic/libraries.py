"""The door to timm and transformers: imports them without what they import at their top and no policy needs to act.

That is most of the time from a process' start to its first action: `torch._dynamo` with sympy and triton (through
torchvision, timm and transformers), wandb (timm), scipy, scikit-learn, accelerate and torch's sharded training
(transformers). Who needs one of these imports it as ever.
"""

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch  # noqa: F401 - first, and without stand-ins

with suppress(ImportError):  # torch has it on Linux alone
    # Before any simulator: Mesa brings an LLVM of its own, and triton's, loaded behind that one, ends the process.
    import triton._C.libtriton  # noqa: F401

from prismatic.deferred_imports import AfterImport, Contents, Deferred, after_import, deferred, real_module

Function = Callable[..., Any]
_COMPILER = "torch._dynamo"
_SHAPES = "torch.fx.experimental.symbolic_shapes"


def _disable(function: Function | None = None, recursive: bool = True, *, reason: str | None = None) -> Function:
    """`torch._dynamo.disable`: marks a function at its definition, and leaves the rest to its first call."""
    if function is None:
        return functools.partial(_disable, recursive=recursive, reason=reason)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return real_module(_COMPILER).disable(function, recursive, reason=reason)(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined] # what the compiler looks for
    return run


def _assume_constant_result(function: Function) -> Function:
    """`torch._dynamo.assume_constant_result`: a mark, no more."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _allow_in_graph(function: Function) -> Function:
    """`torch._dynamo.allow_in_graph`: said to the compiler when it is imported."""
    _allowed_in_graph.append(function)
    return function


_allowed_in_graph: list[Function] = []


def _tell_compiler(compiler: ModuleType) -> None:
    """Let `torch._dynamo`, whoever imports it, know what was allowed in its graphs before."""
    while _allowed_in_graph:
        compiler.allow_in_graph(_allowed_in_graph.pop())


def _scan_once(utils: ModuleType) -> None:
    """transformers reads the 1,700 files of its models for the names in them, once by the folder, once by a file."""
    name = "create_import_structure_from_path"
    found: Any = getattr(utils, name, None)
    if not hasattr(found, "__wrapped__"):
        return  # another version
    scan = functools.cache(found.__wrapped__)
    setattr(utils, name, lambda path: scan(os.path.dirname(path) if os.path.isfile(path) else path))


class _GuardOnDataDependentSymNode(RuntimeError):
    """Stands in an `except` clause, which takes no deferred class; what is raised there is the real one.

    `except` looks its class up when something is raised, so the real one takes this one's place as soon as it is there.
    """


def _give_real_class(shapes: ModuleType) -> None:
    """Put the real exception where modules hold the stand-in (torch's `DTensor`), whoever imports `shapes`."""
    name = "GuardOnDataDependentSymNode"
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is _GuardOnDataDependentSymNode:
            setattr(module, name, getattr(shapes, name))


_NOT_NEEDED_TO_ACT: dict[str, Contents] = {
    "wandb": (),
    "scipy.optimize": ("linear_sum_assignment",),
    "sklearn.metrics": ("roc_curve",),
    _COMPILER: {
        "disable": _disable,
        "assume_constant_result": _assume_constant_result,
        "allow_in_graph": _allow_in_graph,
    },
    "torch._dynamo.utils": ("is_compile_supported",),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
    _SHAPES: {
        "GuardOnDataDependentSymNode": _GuardOnDataDependentSymNode,
        "guard_or_false": Deferred(_SHAPES, "guard_or_false"),
        "has_free_unbacked_symbols": Deferred(_SHAPES, "has_free_unbacked_symbols"),
        "statically_known_true": Deferred(_SHAPES, "statically_known_true"),
    },
    "torch.distributed.checkpoint.hf_storage": ("HuggingFaceStorageReader", "HuggingFaceStorageWriter"),
    "torch.distributed._composable.fsdp": ("fully_shard",),
    "torch.distributed.fsdp": ("CPUOffloadPolicy", "FullyShardedDataParallel", "MixedPrecisionPolicy"),
    "accelerate": ("PartialState", "dispatch_model"),
    "accelerate.hooks": ("AlignDevicesHook", "add_hook_to_module"),
    "accelerate.utils": (
        "extract_model_from_parallel",
        "get_balanced_memory",
        "get_max_memory",
        "infer_auto_device_map",
        "reduce",
    ),  # fmt: skip
    "accelerate.utils.modeling": ("clean_device_map", "get_max_layer_size"),
}


@contextmanager
def _without_collections() -> Iterator[None]:
    """Imports make few cycles and very many objects, which the collector of cycles looks through again and again.

    Behind the block they count as old ones, which are looked through seldom.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if was_on:
            gc.enable()


sys.meta_path.insert(0, AfterImport(_COMPILER, _tell_compiler))
sys.meta_path.insert(0, AfterImport(_SHAPES, _give_real_class))
with _without_collections(), after_import("transformers.utils.import_utils", _scan_once), deferred(_NOT_NEEDED_TO_ACT):
    from timm import create_model as create_model
    from timm.models.vision_transformer import Block as Block
    from timm.models.vision_transformer import VisionTransformer as VisionTransformer
    from transformers import AutoConfig as AutoConfig
    from transformers import AutoImageProcessor as AutoImageProcessor
    from transformers import AutoModelForImageTextToText as AutoModelForImageTextToText
    from transformers import AutoProcessor as AutoProcessor
    from transformers import BatchFeature as BatchFeature
    from transformers import DynamicCache as DynamicCache
    from transformers import LlamaConfig as LlamaConfig
    from transformers import LlamaForCausalLM as LlamaForCausalLM
    from transformers import LlamaModel as LlamaModel
    from transformers import PreTrainedConfig as PreTrainedConfig
    from transformers import PreTrainedModel as PreTrainedModel
    from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
    from transformers import PreTrainedTokenizerFast as PreTrainedTokenizerFast
    from transformers import ProcessorMixin as ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor as BaseImageProcessor
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as LlamaRotaryEmbedding
    from transformers.models.llama.modeling_llama import eager_attention_forward as eager_attention_forward
    from transformers.models.llama.modeling_llama import repeat_kv as repeat_kv
    from transformers.models.llama.modeling_llama import rotate_half as rotate_half
    from transformers.utils.hub import cached_file as cached_file
