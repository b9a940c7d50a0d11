"""A GPU that is none: tensors that say they are on ``cuda:0``, and compute on the CPU.

    with pretended_gpu() as watch:
        total = torch.ones(3, device="cuda").sum()
        total + torch.ones(3)  # RuntimeError: two devices
    watch.waits                # what a host waited for within the steps of a `Run`

A program runs on it as it does on a GPU, gets the numbers of a CPU, and fails where tensors of two devices meet. It
does not pretend kernels and their rounding, streams (a copy that has not arrived yet), pinned memory, a second GPU,
NCCL and whatever wraps a network for several processes, torch.compile, memory, time, and random numbers of its own.
Autocast follows the operations that networks here call, by name; inference mode is ``torch.no_grad``.
"""

import contextlib
import functools
import importlib.util
import json
import linecache
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from shared import distributed
from shared.run.run import Run

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
CASTS, COPIES = {aten._to_copy.default}, {aten.copy_.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEX_PUT = {aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default}
JOINS = {aten.stack.default, aten.cat.default}  # take no number of the CPU either
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}  # oneDNN's in bfloat16 read strange memory
NO_INTEGERS = {  # a GPU has no kernels of integers for products and smooth resizing
    getattr(aten, name).default
    for name in """mm addmm bmm baddbmm mv addmv dot upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa""".split()
}
READ = {  # a host that calls these needs a number or a shape of the device
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.multinomial.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten._linalg_check_errors.default,
}


class OnGPU(Tensor):
    """A tensor whose numbers, ``held``, are on the CPU and that says otherwise.

    To C++ it is on ``meta``, the one device without memory that every torch knows.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    from_host = False  # whether it is a Python number: a kernel gets it as an argument

    @staticmethod
    def __new__(cls, held: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )

    def __init__(self, held: Tensor):
        assert type(held) is not OnGPU and held.device.type == "cpu", held.device
        self.held = held

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, OnGPU) or (other.shape, other.dtype) != (self.shape, self.dtype):
            raise NotImplementedError("data of another device, shape or type")
        self.held = other.held

    def get_device(self) -> int:
        return DEVICE.index

    def to(self, *args, **kwargs) -> Tensor:
        args = (_to_cpp(value) for value in args)
        return Tensor.to(self, *args, **{name: _to_cpp(value) for name, value in kwargs.items()})

    def __getitem__(self, index) -> Tensor:
        return Tensor.__getitem__(self, _in_tensors(index))

    def __setitem__(self, index, value) -> None:
        Tensor.__setitem__(self, _in_tensors(index), torch.tensor(value) if isinstance(value, list) else value)

    def new_tensor(self, data, dtype=None, **options) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=DEVICE, **options)

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def pin_memory(self, *device):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, **options) -> str:
        return f"OnGPU({self.held})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol):
        """Files hold the numbers, and say that they come from a GPU."""
        rebuild, (storage, *others) = self.held.detach().__reduce_ex__(protocol)
        storage._untyped_storage.pretended = True
        return rebuild, (storage, *others)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def _to_cpp(value):
    """An argument that may name the device, as C++ knows it."""
    names = isinstance(value, str | torch.device) and torch.device(value).type == "cuda"
    return torch.device("meta") if names or type(value) is int else value


def _in_tensors(index):
    """An index without lists, whose numbers C++ would not read for ``meta``."""
    if isinstance(index, list | np.ndarray):
        return torch.as_tensor(index) if len(index) else torch.empty(0, dtype=torch.long)
    return tuple(map(_in_tensors, index)) if isinstance(index, tuple) else index


# --- One operation ----------------------------------------------------------------------------------------------------


def compute(function, args: tuple, kwargs: dict):
    """What a GPU would give, or the error where tensors of two devices meet."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    here = any(isinstance(tensor, OnGPU) for tensor in tensors)
    asked = kwargs.get("device")
    there = here if asked is None else asked.type == "cuda" or (asked.type == "meta" and not Casting.wants_meta)
    if not (here or there):
        return function(*args, **kwargs)
    written, returns_written = _written(function)
    given = [args[i] if i < len(args) else kwargs[name] for i, name in written if i < len(args) or name in kwargs]
    if here:
        _check_devices(function, args, tensors, given)
    if there and (generator := kwargs.get("generator")) is not None and generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if here and function in NO_INTEGERS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        raise NotImplementedError(f"{function} is not implemented for {tensors[0].dtype} on cuda")
    if os.getpid() != Watch.current.process:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    if _waits(function, args, kwargs, here, there):
        Watch.current.note(function)

    kwargs = {name: _held(value) for name, value in kwargs.items() if name != "pin_memory"}
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    held = _held(args)
    if function in CONVOLUTIONS and held[0].dtype in (torch.bfloat16, torch.float16):
        result = _cast(function(*_cast(held, torch.float32, Tensor), **kwargs), held[0].dtype, Tensor)
    else:
        result = function(*held, **kwargs)
    if torch.Tag.inplace_view in function.tags and here:
        with no_dispatch():
            function(*args, **kwargs)  # gives the tensor its new shape
    if returns_written:
        returns = len(function._schema.returns)
        return given[0] if returns == 1 else tuple(given[:returns])
    if not there:
        return result
    result = _wrapped(result)
    if function is aten.scalar_tensor.default:
        result.from_host = True
    if function.overloadpacket in EMPTY and result.dtype != torch.bool:
        is_integer = not (result.is_floating_point() or result.is_complex())
        result.held.fill_(torch.iinfo(result.dtype).max if is_integer else torch.nan)  # nobody has written it
    return result


def _check_devices(function, args: tuple, tensors: list[Tensor], given: list) -> None:
    if function in COPIES or function in CASTS:
        return
    if function in INDEXED or function in INDEX_PUT:  # indices may come from the CPU
        tensors = [args[0], *(args[2:3] if function in INDEX_PUT else ())]
    for tensor in tensors:
        is_number = not tensor.dim() and function not in JOINS and all(tensor is not value for value in given)
        if not isinstance(tensor, OnGPU) and not is_number:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"{tensor.device}! ({function}, shape {tuple(tensor.shape)})"
            )


def _waits(function, args: tuple, kwargs: dict, here: bool, there: bool) -> bool:
    """Whether the host goes on only when the device has done all it was given."""
    if function in CASTS or function is aten.copy_.default:
        target, source = (there, args[0]) if function in CASTS else (isinstance(args[0], OnGPU), args[1])
        later = kwargs.get("non_blocking") or (function is aten.copy_.default and len(args) > 2 and args[2])
        return target != isinstance(source, OnGPU) and not later
    if function is aten._foreach_copy_.default:
        return any(isinstance(a, OnGPU) != isinstance(b, OnGPU) for a, b in zip(*args[:2], strict=True))
    if function is aten.repeat_interleave.Tensor:
        return here and kwargs.get("output_size") is None
    if here and (function in INDEXED or function in INDEX_PUT):
        indices = [index for index in args[1] if index is not None]
        if function in INDEX_PUT and _is_number(args[2]) and all(index.dtype == torch.bool for index in indices):
            return any(not isinstance(index, OnGPU) for index in indices)  # a masked fill
        return any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, OnGPU) for index in indices)
    return here and function in READ


def _is_number(value: Tensor) -> bool:
    return not value.dim() and (not isinstance(value, OnGPU) or value.from_host)


@functools.cache
def _written(function) -> tuple[list[tuple[int, str]], bool]:
    """Places and names of the arguments that the operation writes, and whether they are what it returns."""
    arguments, returns = function._schema.arguments, function._schema.returns
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    return written, bool(written and returns) and all(r.alias_info and r.alias_info.is_write for r in returns)


def _tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _held(value):
    if isinstance(value, OnGPU):
        return value.held
    return type(value)(map(_held, value)) if type(value) in (list, tuple) else value


def _wrapped(value):
    if isinstance(value, Tensor):
        return OnGPU(value)
    return type(value)(map(_wrapped, value)) if type(value) in (list, tuple) else value


class Computing(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the compiler, which would take seconds to import, is not there

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


# --- Mixed precision --------------------------------------------------------------------------------------------------

LOWER = set(
    """linear matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv addbmm baddbmm einsum multi_dot conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention prelu""".split()
)
FLOAT32 = set(
    """softmax log_softmax cross_entropy nll_loss binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss
    kl_div layer_norm group_norm rms_norm norm normalize cosine_similarity cdist dist renorm exp expm1 log log10 log1p
    log2 logsumexp pow __pow__ __rpow__ reciprocal rsqrt cosh sinh tan acos asin sum cumsum cumprod prod
    softplus""".split()
)


class Casting(TorchFunctionMode):
    """Casts arguments under ``torch.autocast("cuda")`` as a GPU does, and gives ``cuda`` its number."""

    wants_meta = False  # whether ``meta`` is what the program asks for

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if "device" in kwargs:
            kwargs = kwargs | {"device": _with_index(kwargs["device"])}
        if name == "cuda" and isinstance(args[0], Tensor):
            function, args = args[0].to, (DEVICE, *args[1:])
        elif name == "to" and isinstance(args[0], Tensor):
            args = (args[0], *map(_with_index, args[1:]))
        if (name in LOWER or name in FLOAT32) and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32
            args, kwargs = _cast(args, dtype), {key: _cast(value, dtype) for key, value in kwargs.items()}
        if name != "to" and kwargs.get("device") in ("meta", torch.device("meta")):
            with mock.patch.object(Casting, "wants_meta", True):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def _with_index(value):
    if isinstance(value, str | torch.device) and torch.device(value) == torch.device("cuda"):
        return DEVICE
    return value


def _cast(value, dtype: torch.dtype, kind: type = OnGPU):
    if isinstance(value, kind) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return type(value)(_cast(part, dtype, kind) for part in value) if type(value) in (list, tuple) else value


# --- Who waits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    """A host that waited within a step.

    Attributes:
        calls: ``file:function`` of this repository, the innermost first.
        line: That waited.
        operation: Of torch.
        logs: Whether the step ended with a line of the log.
    """

    calls: tuple[str, ...]
    line: str
    operation: str
    logs: bool


class Watch:
    """Collects waits within the steps of a run: between the arrival of a batch and the end of the loop's body.

    Args:
        file: Gets a line for each, for the process that started this one.
    """

    current: "Watch"

    def __init__(self, file: Path | None = None):
        self.file, self.waits, self.run, self.process = file, [], None, os.getpid()

    def note(self, operation) -> None:
        if self.run is None:
            return
        frame, calls, line = sys._getframe(1), [], ""
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
                line = line or f"{frame.f_lineno}: {linecache.getline(str(path), frame.f_lineno).strip()}"
                calls.append(f"{path.relative_to(ROOT)}:{frame.f_code.co_name}")
            frame = frame.f_back
        self.waits.append(Wait(tuple(calls), line, str(operation), self.run.logs_this_step))
        if self.file is not None:
            with open(self.file, "a") as file:
                file.write(json.dumps(asdict(self.waits[-1])) + "\n")

    def steps(self, steps, run: Run, loader) -> Iterator:
        for item in steps(run, loader):
            self.run = run
            try:
                yield item
            finally:
                self.run = None


def read_waits(file: Path) -> list[Wait]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [Wait(**line | {"calls": tuple(line["calls"])}) for line in lines]


# --- The process ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pretended_gpu(file: Path | None = None) -> Iterator[Watch]:
    """In here this process has a GPU."""
    watch, steps, swap = Watch(file), Run.steps, torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:

        def replace(owner, name: str, value) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, value in ANSWERS.items():
            replace(torch.cuda, name, lambda *args, value=value, **options: value)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(torch.optim.Optimizer, name):  # depends on the version of torch
                replace(torch.optim.Optimizer, name, lambda self: None)
        for name, value in (("_accelerator_getDeviceIndex", DEVICE.index), ("_accelerator_setDeviceIndex", None)):
            if hasattr(torch._C, name):  # what pins batches of loader processes asks; depends on the version of torch
                replace(torch._C, name, lambda *args, value=value: value)
        replace(torch.cuda, "synchronize", lambda *args: watch.note("torch.cuda.synchronize"))
        for name in ("__enter__", "__exit__"):  # inference mode hides from modes what operations are made of
            replace(torch.inference_mode, name, getattr(torch.no_grad, name))
        replace(torch, "load", _load)
        # tracers, which work on the CPU, see nothing of what modes handle
        replace(torch.onnx, "export", _disable_current_modes()(torch.onnx.export))
        spec = importlib.util.find_spec("torch.nn.attention.varlen")
        if spec is not None:  # depends on the version of torch
            known = sys.modules.get(spec.name)  # seldom: its import takes seconds
            sys.modules[spec.name] = SimpleNamespace(__spec__=spec, varlen_attn=_attend)
            put_back = sys.modules.__setitem__ if known else sys.modules.pop
            stack.callback(put_back, spec.name, known)
        replace(Tensor, "pin_memory", lambda tensor, *args: tensor)
        replace(Run, "steps", lambda run, loader: watch.steps(steps, run, loader))
        stack.enter_context(mock.patch.object(Watch, "current", watch, create=True))
        torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` cannot change tensors of the CPU
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` is a copy then, as others are
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(Computing())
        casting = stack.enter_context(Casting())

        def backward(*args, run_backward=torch.autograd._engine_run_backward, **options):
            with casting:  # it may repeat forward passes; a mode is away while it handles `loss.backward()`
                return run_backward(*args, **options)

        replace(torch.autograd, "_engine_run_backward", backward)
        yield watch


ANSWERS = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": DEVICE.index,
    "get_device_name": "no GPU",
    "get_device_properties": SimpleNamespace(total_memory=80 * 2**30),
    "is_bf16_supported": True,
    "get_device_capability": (9, 0),
    **dict.fromkeys(("_lazy_init", "_lazy_call", "set_device", "empty_cache", "reset_peak_memory_stats")),
    **dict.fromkeys(("max_memory_allocated", "memory_allocated"), 0),
}
_FOR_GOOD = contextlib.ExitStack()
chosen = 0  # times that a script was given this GPU instead of what it asked for


def pretend(file: Path | None = None) -> None:
    """From here on this process has a GPU."""
    _FOR_GOOD.enter_context(pretended_gpu(file))


@contextlib.contextmanager
def scripts_on_pretended_gpu() -> Iterator[None]:
    """In here scripts compute on it, whatever their ``--device``."""
    choose = distributed._choose_device

    def choose_it(*asked) -> torch.device:
        choose(*asked)  # or its error
        global chosen
        chosen += 1
        return DEVICE

    with pretended_gpu(), mock.patch.object(distributed, "_choose_device", choose_it):
        yield


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, longest: int, longest_k: int) -> Tensor:
    """Attention of packed sequences, one after the other; the kernel of a GPU takes half precision alone."""
    assert q.dtype in (torch.float16, torch.bfloat16) and ends.held.equal(ends_k.held)
    cuts = ends.held[1:-1].tolist()  # the kernel knows them without a wait
    parts = zip(*(tensor.tensor_split(cuts) for tensor in (q, k, v)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part)).transpose(0, 1) for part in parts]
    )


def _load(file, map_location=None, *, weights_only: bool, **options):
    """``torch.load``, onto the GPU too: where ``map_location`` names it, or else what comes from there."""
    assert weights_only
    if map_location is not None and torch.device(map_location).type == "cpu":
        return torch.serialization.load(file, map_location, weights_only=True, **options)

    def locate(storage, location: str):
        storage.pretended = map_location is not None or location.startswith("cuda")
        return storage

    state = torch.serialization.load(file, locate, weights_only=True, **options)
    return tree_map_only(Tensor, lambda t: t.to(DEVICE) if t.untyped_storage().pretended else t, state)


def _location(storage) -> str | None:
    return "cuda:0" if getattr(storage, "pretended", False) else None


torch.serialization.register_package(1, _location, lambda storage, location: None)  # asked before torch's own
