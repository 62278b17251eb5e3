"""Make Megatron-Core run on CPUs with gloo. `TABLE` lists what is replaced, why, and when the replacement can be deleted.

    cpu_support.apply()               # `mone_model.megatron.prepare` does, where CUDA is not available
    cpu_support.current_device()      # the device on which the model is built, with and without CUDA

A target under `torch` is replaced for Megatron-Core only: its modules get objects of their own instead of the modules torch,
torch.cuda and torch.distributed. This module does not change torch for other code in the process.
"""

import contextlib
import functools
import importlib
import inspect
import logging
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mone_common.megatron_jit import jit_without_compiler
from mone_model.megatron import cpu_overrides

_CPU = torch.device("cpu")


class Replacement(NamedTuple):
    """One row of the table."""

    target: str
    """Dotted name of what is replaced."""
    by: Callable[[Any], Any]
    """Makes the replacement from the original."""
    reason: str
    until: str
    """When this row can be deleted."""
    upstream: str = ""
    """Number of the issue, where there is one."""
    before_import: bool = False
    """Whether the target is a module, to be replaced before Megatron-Core is imported."""


class _Stream:
    """A stream or an event, where everything is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def query(self) -> bool:
        return True


def _value(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _around(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Wrap `function`, which gets the original as its first argument."""

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return call

    return replace


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _with_cpu_types(function: Any) -> Any:
    """Change "torch.cuda.FloatTensor", with which this function compares `Tensor.type()`, to "torch.FloatTensor"."""

    def rename(constant: Any) -> Any:
        if isinstance(constant, tuple):
            return tuple(map(rename, constant))
        return constant.replace("torch.cuda.", "torch.") if isinstance(constant, str) else constant

    plain = getattr(function, "__func__", function)  # of a class method
    plain.__code__ = plain.__code__.replace(co_consts=rename(plain.__code__.co_consts))
    return function


def _with_cpu_methods(function: Any) -> Any:
    """Let this function call `Tensor.cpu` where it calls `Tensor.cuda`, and `torch.cpu` where it calls `torch.cuda`."""
    code = function.__code__
    function.__code__ = code.replace(co_names=tuple("cpu" if name == "cuda" else name for name in code.co_names))
    return function


def _all_gather_of_uneven(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(all_gather)
    def gather(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if all(output.shape == tensor.shape for output in outputs):
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(map(len, outputs)), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        all_gather(gathered, padded, group=group)
        for output, full in zip(outputs, gathered, strict=True):
            output.copy_(full[: len(output)])
        return None

    return gather


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_NO_CUDA = "Megatron-Core calls it on every device; without CUDA it fails"
_CPU_DEVICE = "Megatron-Core has a device for the CPU"
_GROUP_OF_ONE = "gloo copies the tensors there and back, also in a group of one rank"
_GLOO = "gloo returns at once in a group of one rank"
_STREAM = _Stream()

TABLE = (
    Replacement(
        "megatron.core.jit",
        lambda _: jit_without_compiler(),
        "its decorator jit_fuser is torch.compile, which takes seconds to import and to compile dozens of small functions",
        "disable_jit_fuser has an effect after Megatron-Core is imported",
        "flagos-ai/Megatron-LM-FL#121",
        before_import=True,
    ),
    *(
        Replacement(f"torch.{name}", _factory_on_cpu, "called with device='cuda'", _CPU_DEVICE)
        for name in ("empty", "empty_like", "ones", "tensor", "zeros")
    ),
    *(
        Replacement(f"torch.cuda.{name}", _value(value), _NO_CUDA, _CPU_DEVICE)
        for name, value in {
            "current_device": lambda: _CPU,
            "Stream": _Stream,
            "Event": _Stream,
            "current_stream": lambda device=None: _STREAM,
            "default_stream": lambda device=None: _STREAM,
            "stream": lambda stream=None: contextlib.nullcontext(),
            "synchronize": lambda device=None: None,
            "manual_seed": lambda seed: torch.random.default_generator.manual_seed(int(seed)),
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        }.items()
    ),
    Replacement(
        "torch.distributed.all_gather",
        _all_gather_of_uneven,
        "gloo refuses tensors of different lengths, which the token dispatcher gathers at expert-tensor-parallel size > 1",
        "gloo gathers them",
        "pytorch/pytorch#156627",
    ),
    Replacement(
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        _value(lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()),
        "reads the generator of a CUDA device",
        _CPU_DEVICE,
    ),
    Replacement(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        _value(lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)),
        "sets the generator of a CUDA device",
        _CPU_DEVICE,
    ),
    Replacement(
        "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
        _value(_to_host),
        "gives numbers of tokens as numpy arrays only if they were on a GPU; all_to_all_single then fails with a TypeError",
        "it converts CPU tensors too",
    ),
    *(
        Replacement(
            f"megatron.core.optimizer.{name}",
            _with_cpu_types,
            "compares Tensor.type() with 'torch.cuda.FloatTensor'",
            "it compares Tensor.dtype",
        )
        for name in (
            "clip_grads.clip_grad_by_total_norm_fp32",
            "distrib_optimizer.DistributedOptimizer.__init__",
            "distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups",
            "optimizer.Float16OptimizerWithFloat16Params.__init__",
        )
    ),
    *(
        Replacement(f"megatron.core.{name}", _with_cpu_methods, "calls Tensor.cuda", _CPU_DEVICE)
        for name in (
            "models.common.language_module.language_module.LanguageModule.setup_embeddings_and_output_layer",
            "optimizer.distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_zero",
        )
    ),
    Replacement("torch.distributed.all_reduce", _around(cpu_overrides.all_reduce_several), _GROUP_OF_ONE, _GLOO),
    Replacement(
        "megatron.core.distributed.param_and_grad_buffer._coalescing_manager",
        _around(cpu_overrides.coalesce_several),
        _GROUP_OF_ONE,
        _GLOO,
    ),
    *(
        Replacement(
            f"megatron.core.distributed.param_and_grad_buffer.{name}",
            _around(cpu_overrides.communicate_several),
            _GROUP_OF_ONE,
            _GLOO,
        )
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func")
    ),
    Replacement(
        "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer.reset",
        _around(cpu_overrides.zero_gradients),
        "zeroes gradients to which the experts would then add: two passes over the largest part of all memory",
        "Megatron-Core lets the first backward pass of a step write over a gradient",
    ),
    Replacement(
        "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_grad_sync",
        _around(cpu_overrides.reduce_gradients),
        "a gradient that was not zeroed, and that no backward pass wrote, is the last step's",
        "the row above is deleted",
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params",
        _around(cpu_overrides.copy_unless_same),
        "copies fp32 weights onto themselves",
        "Megatron-Core skips weights that share memory",
    ),
    Replacement(
        "megatron.core.utils.local_multi_tensor_l2_norm",
        _value(cpu_overrides.norm),
        "torch.norm of millions of numbers is wrong by about 1e-4 in fp32, and uses one thread",
        "torch adds in blocks, with all threads",
    ),
    Replacement(
        "megatron.core.tensor_parallel.cross_entropy.VocabParallelCrossEntropy.calculate_logits_max",
        _value(staticmethod(cpu_overrides.largest)),
        "torch.max also finds the indices, which takes eight times as long as torch.amax",
        "Megatron-Core calls torch.amax",
    ),
)

_MODULES = (
    "megatron.core.datasets.indexed_dataset",
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.moe_layer",
)
"""These modules and their imports are the part of Megatron-Core that a run uses. Later modules would use torch itself."""


def apply() -> None:
    """Make the replacements of the table; RuntimeError if Megatron-Core has been imported already."""
    if "megatron.core" in sys.modules:
        raise RuntimeError("call mone_model.megatron.prepare() before you import megatron.core")
    for row in TABLE:
        if row.before_import:
            sys.modules[row.target] = row.by(None)
    with warnings.catch_warnings():
        # Without CUDA, Transformer Engine and Apex are expected to be missing.
        warnings.simplefilter("ignore", UserWarning)
        for name in _MODULES:
            importlib.import_module(name)
    # It warns whenever a fork of the "CUDA" generator changes the CPU's: here they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)

    substitutes: dict[int, Any] = {}
    originals = []
    for row in (row for row in TABLE if not row.before_import):
        path, _, name = row.target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        original = inspect.getattr_static(owner, name)
        replacement = row.by(original)
        if row.target.startswith("torch."):
            setattr(_view(path), name, replacement)
        else:
            setattr(owner, name, replacement)
            if getattr(original, "__module__", None) == path:  # else its other users need the original
                substitutes[id(original)] = replacement
                originals.append(original)  # which keeps its id from being used again
    substitutes |= {id(pkgutil.resolve_name(name)): view for name, view in _views.items()}
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            for attribute, value in list(vars(module).items()):
                if id(value) in substitutes:
                    setattr(module, attribute, substitutes[id(value)])


class _View(types.ModuleType):
    """A module with some attributes replaced; the others are looked up in the module itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[self.__name__], name)


_views: dict[str, _View] = {}


def _view(name: str) -> _View:
    if name not in _views:
        _views[name] = _View(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(_view(parent), child, _views[name])
    return _views[name]


def cuda() -> Any:
    """The module torch.cuda, as Megatron-Core sees it."""
    return _views.get("torch.cuda", torch.cuda)


def current_device() -> Any:
    """The device on which the layers of the model are built."""
    return cuda().current_device()
