"""Make Megatron-Core run on CPU and gloo. Does nothing where CUDA exists.

Megatron-Core assumes CUDA in places: device strings, streams, the CUDA random generator, collectives that only
NCCL has. This module redirects them, once, before anything of Megatron-Core runs:

    install()                          # mone_model.megatron.prepare() does
    from megatron.core import ...      # works on CPU; an earlier import does no harm

It is the only file that knows. Processes started by `spawn` install it when they import `mone_model`.
"""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils._device

_CPU = torch.device("cpu")


def install() -> None:
    """Redirect what Megatron-Core takes from CUDA to the CPU; idempotent, and nothing where CUDA is available."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_mone_on_cpu", False):
        return
    torch.cuda._mone_on_cpu = True  # type: ignore[attr-defined]
    _redirect_devices()
    _replace_streams()
    _redirect_random_state()
    _complete_gloo()
    with warnings.catch_warnings(), _leaner_imports():
        # That Transformer Engine and Apex are missing is no news on a machine without CUDA.
        warnings.simplefilter("ignore", UserWarning)
        _patch_megatron()
        from mone_model.megatron import cpu_overrides

        cpu_overrides.install()


@contextlib.contextmanager
def _leaner_imports() -> Iterator[None]:
    """Import Megatron-Core without what takes a quarter of its time and serves nothing here.

    torch.compile, by which it would fuse dozens of tiny functions on first use, and W&B, for its timers and inference.
    """
    if "megatron.core" in sys.modules:
        torch._dynamo.config.disable = True  # too late: they are wrapped, and wait for their first use
        yield
        return

    def leave(function: Any = None, **options: Any) -> Any:
        return leave if function is None else function

    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        with mock.patch.object(torch, "compile", leave):
            yield
    finally:
        if hidden:
            del sys.modules["wandb"]


class _Stream:
    """A stream or event on a device where everything is already synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def query(self) -> bool:
        return True


class _Event(_Stream):
    """Apart from _Stream for torch._dynamo alone, which refuses two names for one object."""


def _replace_streams() -> None:
    stream = _Stream()
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.current_device = lambda: _CPU
    # One function each: torch._dynamo refuses two names for one object.
    for owner, names in (
        (cuda, ("synchronize", "empty_cache", "set_device")),
        (cuda.nvtx, ("range_push", "range_pop")),
    ):
        for name in names:
            setattr(owner, name, lambda *args, **kwargs: None)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_devices() -> None:
    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return create

    # `with torch.device(...)` knows the factories by identity and looks them up once: before they are replaced.
    torch.utils._device._device_constructors()
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "zeros_like", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))

    tensor_to, module_to, tensor_type = torch.Tensor.to, torch.nn.Module.to, torch.Tensor.type

    def to(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def move(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            return original(self, *args, **kwargs)

        return move

    def type_(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, **kwargs)
        name = tensor_type(self)
        # The optimizers compare with "torch.cuda.FloatTensor"; everybody else shall see the truth.
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    tensor: Any = torch.Tensor
    tensor.to, tensor.type = to(tensor_to), type_
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.to = to(module_to)
    module.cuda = lambda self, device=None: self


def _redirect_random_state() -> None:
    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.random.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _complete_gloo() -> None:
    """Give gloo the average of a reduction, uneven gathers and scatters, and barriers without devices."""
    all_reduce, barrier = dist.all_reduce, dist.barrier
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(all_reduce)
    def all_reduce_(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if dist.get_world_size(group) == 1:
            return _Stream() if async_op else None
        if op == dist.ReduceOp.AVG:
            tensor.div_(dist.get_world_size(group))
            op = dist.ReduceOp.SUM
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    @functools.wraps(barrier)
    def barrier_(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group=group, async_op=async_op)

    @functools.wraps(all_gather)
    def all_gather_(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        rows = max(output.size(0) for output in outputs) if tensor.dim() else 0
        if all(output.shape == tensor.shape for output in outputs):
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(rows, *tensor.shape[1:])
        padded[: tensor.size(0)] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        all_gather(gathered, padded, group=group)
        for output, full in zip(outputs, gathered, strict=True):
            output.copy_(full[: output.size(0)])
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_(
        output: torch.Tensor,
        inputs: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if all(tensor.shape == inputs[0].shape for tensor in inputs):
            return reduce_scatter(output, inputs, op=op, group=group, async_op=async_op)
        total = torch.cat(inputs)
        all_reduce_(total, op=op, group=group)
        output.copy_(total.split([tensor.size(0) for tensor in inputs])[dist.get_rank(group)])
        return None

    for name, function in {
        "all_reduce": all_reduce_,
        "barrier": barrier_,
        "all_gather": all_gather_,
        "reduce_scatter": reduce_scatter_,
    }.items():
        setattr(dist, name, function)
        setattr(dist.distributed_c10d, name, function)


def _patch_megatron() -> None:
    """Replace the functions of Megatron-Core whose CUDA assumption no redirection above can reach."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  warns of Apex at import
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    # It warns whenever a fork of the "CUDA" generator changes the CPU's: here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host

    # Gloo copies all gradients and all weights there and back even where a rank is alone with them.
    coalescing = buffers._coalescing_manager

    @contextlib.contextmanager
    def coalescing_of_several(group: Any = None, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if dist.get_world_size(group) > 1:
            with coalescing(group, *args, **kwargs) as work:
                yield work
        else:
            yield _Stream()

    def of_several(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            return collective(*args, group=group, **kwargs) if dist.get_world_size(group) > 1 else None

        return run

    buffers._coalescing_manager = coalescing_of_several
    buffers.dist_all_gather_func = of_several(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = of_several(buffers.dist_reduce_scatter_func)
