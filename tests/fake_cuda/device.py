"""A pretended GPU: tensors of a CUDA device with a shape and no values, and what it would see.

torch's FakeTensorMode runs the real code on such tensors. ``DeviceLog`` notes each operator that a
GPU would get, each copy from the host, and each place where the host would wait. What it cannot
see: values; which attention kernel runs (attention comes in parts here); what DDP's reducer and
nccl do; data workers; torch.compile.

Only for a process of its own: ``pretend`` changes torch for good.
"""

import contextlib
import ctypes
import importlib
import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TESTED = ("2.14",)  # versions of torch whose insides this was written for
CUDA = torch.device("cuda", 0)
ROOT = str(Path(__file__).resolve().parents[2])


def reason_not_to_run() -> str:
    """Why there can be no pretended GPU here, empty if there can."""
    version = torch.__version__
    if not torch.backends.cuda.is_built():
        return f"torch {version} is built without CUDA"
    if ".".join(version.split(".")[:2]) not in TESTED:
        return f"the pretended GPU knows torch {' and '.join(TESTED)}, not {version}"
    if not compiler():
        return "no C++ compiler (c++, g++ or clang++)"
    return ""


def compiler() -> str | None:
    """The C++ compiler of this machine, if it has one."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build_guard(folder: Path) -> Path:
    """Compile guard.cpp into ``folder``; returns the library."""
    library, home = folder / "guard.so", Path(torch.__file__).parent
    command = [compiler(), "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{home}/include"]
    command += [Path(__file__).with_name("guard.cpp"), "-o", library]
    subprocess.run([*command, f"-L{home}/lib", "-ltorch_cpu", "-lc10"], check=True)
    return library


class Stream:
    """A stream that runs nothing; notes what is asked of it."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def record_event(self) -> "Stream":
        return self

    def wait_event(self, event: Any) -> None:
        """Order two streams, without the host."""


def pretend(guard: Path) -> None:
    """Let torch believe in one CUDA device, and let modules move to it."""
    current = Stream(CUDA)
    changes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: False,
        "_lazy_init": lambda: None,
        "set_device": lambda device: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "max_memory_allocated": lambda device=None: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            major=9, minor=0, multi_processor_count=132
        ),
        "Stream": Stream,
        "current_stream": lambda device=None: current,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, value in changes.items():
        setattr(torch.cuda, name, value)
    for name in ("torch.cuda.amp.common", "torch.amp.grad_scaler"):
        module = importlib.import_module(name)
        if hasattr(module, "amp_definitely_not_available"):
            module.amp_definitely_not_available = lambda: False
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, name, lambda self: None)
    # the state of the device's generator lies on the host: reading it does not wait
    checkpoint = importlib.import_module("torch.utils.checkpoint")
    checkpoint.get_device_states = lambda *arguments: ([], [])
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.tolist = FakeTensor.tolist = _tolist
    foreach = importlib.import_module("torch.utils._foreach_utils")
    foreach._foreach_supported_types.append(FakeTensor)

    fake_tensor.init_gpu_context = lambda device: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    nn.Module._apply = _apply
    torch.autograd.set_multithreading_enabled(False)  # no threads of a device

    library, construct = ctypes.CDLL(str(guard)), FakeTensorMode.__init__

    def init(self, *arguments, **options) -> None:
        construct(self, *arguments, **options)  # which sets torch's own guard
        if library.install_guard():
            raise RuntimeError("the table of virtual functions is not as expected")

    FakeTensorMode.__init__ = init


def _tolist(self: torch.Tensor, real: Any = torch.Tensor.tolist) -> Any:
    """``Tensor.tolist``, which copies a whole tensor of the device at once."""
    if not on_device(self):
        return real(self)
    self.cpu()
    with torch.utils._python_dispatch._disable_current_modes():
        return real(torch.ones(self.shape, dtype=self.dtype))


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` for fake tensors, which are replaced, not changed in place."""
    changed: dict[int, torch.Tensor] = {}
    for module in self.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in changed:
                    new = function(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    changed[id(tensor)] = new
                tensors[name] = changed[id(tensor)]
    return self


def made_fake(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """``module`` with fake parameters and buffers on the CPU."""
    return _apply(module, lambda tensor: mode.from_tensor(tensor, static_shapes=True))


class Parallel(nn.Module):
    """Stands for DistributedDataParallel, whose reducer needs real memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)

    def no_sync(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


# what reads values that decide about shapes, or compares them, and so waits
READS = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
# what the driver never hears of, besides views
NO_LAUNCH = (
    *("detach", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided", "record_stream", "set_", "resize_", "as_strided"),
)
COPIES = ("_to_copy", "copy_")
IN_PLACE = ("_fused_adamw_", "_fused_sgd_", "_amp_foreach_non_finite_check_and_unscale_")


class DeviceLog(TorchDispatchMode):
    """Notes what a GPU would see of the operators within it.

    Attributes:
        waits: places where the host would wait for the device.
        copies: copies from pinned memory, which nothing waits for.
        launches: operators by phase; one may start several kernels.
        crooked: places of convolutions whose input is not channels last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.crooked: Counter[str] = Counter()
        self.copies = 0
        self.phase = ""

    def clear(self) -> None:
        """Forget what was noted."""
        for counter in (self.waits, self.launches, self.crooked):
            counter.clear()
        self.copies = 0

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count the launches within it for ``phase``."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = function._schema.name.removeprefix("aten::")
        if name.startswith("prim::"):  # asks for a property
            return function(*arguments, **options)
        if not any(map(on_device, tree_leaves((arguments, options)))):
            result = function(*arguments, **options)
            if not any(map(on_device, tree_leaves(result))):
                return result
        elif name == "_local_scalar_dense":
            self._wait("a value is read")
            return {torch.bool: True}.get(arguments[0].dtype, 1)
        elif name in READS:
            self._wait(name)
            result = True if name == "equal" else function(*arguments, **options)
        elif name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1]):
            self._wait("a mask picks")
            result = arguments[0].clone()
        elif name in STAND_INS or name in IN_PLACE:
            _same_device(name, arguments, options)
            result = STAND_INS[name](*arguments, **options) if name in STAND_INS else None
        else:
            result = function(*arguments, **options)
        if name in COPIES:
            self._copy(name, arguments, options, result)
        if name == "convolution" and not _channels_last(arguments[0]):
            self.crooked[place()] += 1
        if not (function.is_view or name in NO_LAUNCH):
            self.launches[self.phase] += _kernels(name, arguments)
        return result

    def _copy(self, name: str, arguments: tuple, options: dict, result: Any) -> None:
        target, source = arguments[:2] if name == "copy_" else (result, arguments[0])
        unasked = arguments[2] if name == "copy_" and len(arguments) > 2 else False
        free = options.get("non_blocking", unasked)
        if on_device(source) and not on_device(target):
            self._wait("copy to the host")
        elif on_device(target) and not on_device(source):
            if free and getattr(source, "pinned", False):
                self.copies += 1
            else:
                self._wait("copy from memory that is not pinned" if free else "blocking copy")

    def _wait(self, kind: str) -> None:
        self.waits[f"{kind}: {place()}"] += 1


def on_device(value: Any) -> bool:
    """Whether it is a tensor of the pretended GPU."""
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def place() -> str:
    """The innermost line of the project that runs, and of torch or timm if these are within it."""
    library = ""
    for frame in reversed(traceback.extract_stack()[:-2]):
        file = frame.filename
        if file.startswith(ROOT) and ".venv" not in file and not file.endswith("device.py"):
            return f"{file.removeprefix(ROOT + '/')}:{frame.lineno}{library}"
        inside = file.partition("site-packages/")[2]
        hidden = ("_dispatch", "fake_tensor", "_ops.py", "_dynamo", "_compile", "_stats")
        if inside and not library and not any(part in inside for part in hidden):
            library = f" in {inside}:{frame.lineno}"
    return f"autograd{library}"


def _channels_last(images: torch.Tensor) -> bool:
    return images.ndim != 4 or images.is_contiguous(memory_format=torch.channels_last)


def _kernels(name: str, arguments: tuple) -> int:
    """One, but one a tensor where the lists of ``_foreach`` differ in shape."""
    lists = [x for x in arguments if isinstance(x, (list, tuple)) and x and torch.is_tensor(x[0])]
    if not name.startswith("_foreach") or len(lists) < 2:
        return 1
    alike = all(len({(t.shape, t.stride()) for t in row}) == 1 for row in zip(*lists, strict=True))
    return 1 if alike else len(lists[0])


def _same_device(name: str, arguments: tuple, options: dict) -> None:
    tensors = [t for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)]
    apart = [t.device for t in tensors if not on_device(t)]
    if apart:
        raise RuntimeError(f"{name}: {len(apart)} of {len(tensors)} tensors on {apart[0]}")


def _channels(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(count))


# operators of CUDA that have no fake form: the shapes of their results
STAND_INS = {
    "batch_norm_stats": lambda x, eps: _channels(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *rest: _channels(x, 2),
    "batch_norm_elemt": lambda x, *rest: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda g, x, mean, invstd, weight, *wanted: _channels(x, 4),
    "batch_norm_backward_elemt": lambda g, x, *rest: torch.empty_like(x),
    "_amp_update_scale_": lambda scale, *rest: scale,
}
