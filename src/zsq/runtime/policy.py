# SPDX-License-Identifier: Apache-2.0
"""Where and how the loops compute: device, precision, memory format, compilation."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zsq.errors import UsageError

_Module = TypeVar("_Module", bound=nn.Module)
Precision = Literal["auto", "fp32", "bf16"]
#: Compiling takes tens of seconds; shorter runs go without.
MIN_STEPS_TO_COMPILE = 250


@dataclass(frozen=True)
class Policy:
    """How to compute.

    Attributes:
        device: where.
        dtype: of convolutions and their inputs while images are synthesised and students tuned; statistics,
            losses, latents, quantizers, steps and optimiser state are float32 always.
        compile: whether `torch.compile` may be used for loops long enough to repay it.
        memory: bytes that caches over all images may take on the host; None: half of what there is.
            Beyond it they lie in files. Results depend on it by rounding alone, where a batch of GENIE's
            synthesis passes in slices.
        cuda_graphs: replay what was compiled as CUDA graphs, where it can be captured.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    compile: bool = False
    memory: int | None = None
    cuda_graphs: bool = False

    def worth_compiling(self, steps: int) -> bool:
        """Return whether a loop of so many steps may be, and repays being, compiled."""
        return self.compile and steps >= MIN_STEPS_TO_COMPILE

    def compiled(
        self, function: Callable[..., Any], *, enabled: bool, note: Callable[[str], None],
        dynamic: bool = False, graphs: bool = True,
    ) -> Compiled:  # fmt: skip
        """Return a function compiled as this policy says, ``graphs`` permitting; arguments are those of `Compiled`."""
        graphs = graphs and self.cuda_graphs and not dynamic  # a graph is of one size
        return Compiled(function, enabled=enabled, note=note, dynamic=dynamic, graphs=graphs)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which convolutions and products run in `dtype`.

        It keeps no copies of weights: PyTorch would until the outermost such context ends, which may be the
        caller's, and weights move meanwhile.
        """
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)

    def place(self, module: _Module) -> _Module:
        """Move a module to the device, channels last."""
        return channels_last(module.to(self.device))

    def placed_copy(self, module: _Module) -> _Module:
        """Return a copy of a module on the device, channels last; the module stays where it is."""
        return self.place(copy.deepcopy(module))


def make_policy(
    device: str = "cpu", precision: Precision = "auto", compile: bool = True,
    memory: int | None = None, cuda_graphs: bool = False,
) -> Policy:  # fmt: skip
    """Choose a policy for a device.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` is bf16 where the hardware has it.
        compile: allow `torch.compile`.
        memory: bytes that caches over all images may take on the host; None: half of what there is.
        cuda_graphs: replay compiled loops as CUDA graphs.

    Raises:
        UsageError: the device does not exist here, or cannot do what is asked for.
    """
    if precision not in get_args(Precision):
        raise UsageError(f"precision {precision!r} is none of {', '.join(get_args(Precision))}.")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is unknown; use cpu, cuda or cuda:N.") from error
    if place.type not in {"cpu", "cuda"}:
        raise UsageError(f"device {device!r} is not supported; use cpu, cuda or cuda:N.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device!r} does not exist: this PyTorch sees {torch.cuda.device_count()} "
            "GPU(s). Use --device cpu."
        )
    if cuda_graphs and not (place.type == "cuda" and compile):
        raise UsageError(
            "--cuda-graphs replays what torch.compile made for a GPU; it needs --device cuda and no "
            "--no-compile."
        )
    fast = _has_fast_bf16(place)
    dtype = (
        torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast) else torch.float32
    )
    return Policy(place, dtype, compile, memory, cuda_graphs)


def channels_last(module: _Module) -> _Module:
    """Put a module's tensors of four axes into that order, in place; the module is returned.

    PyTorch's own ``module.to(memory_format=...)`` does so, and refuses modules that hold one of five axes.
    """
    return module._apply(lambda t: _last(t) if t.ndim == 4 else t)  # type: ignore[no-any-return,no-untyped-call]


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a GPU is the current one, so that nothing is allocated on another."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities()
    return any(
        bool(value) for name, value in capabilities.items() if name in {"amx_bf16", "avx512_bf16"}
    )


class Compiled:
    """A function compiled on its first call, or run as it is when compilation fails.

    Args:
        function: pure tensor code.
        enabled: compile at all.
        note: told, in one sentence, when compilation failed.
        dynamic: compile once for tensors of any size, for functions of many sizes.
        graphs: replay as a CUDA graph. Results are copies: a graph writes its own into the same memory
            each time, and a loss may be looked at later.
    """

    def __init__(
        self, function: Callable[..., Any], *, enabled: bool, note: Callable[[str], None],
        dynamic: bool = False, graphs: bool = False,
    ) -> None:  # fmt: skip
        self.function, self.graphs = function, graphs
        mode = "reduce-overhead" if graphs else None
        self.compiled: Callable[..., Any] | None = (
            torch.compile(function, dynamic=dynamic, mode=mode) if enabled else None
        )
        self.proved: set[bool] = set()
        self.note = note

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        if self.compiled is None:
            return self.function(*arguments)
        gradients = torch.is_grad_enabled()  # with them it is compiled once more
        try:
            with contextlib.nullcontext() if gradients in self.proved else _proving():
                result = self.compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if gradients in self.proved:
                raise
            lines = str(error).strip().splitlines()
            self.note(
                f"torch.compile failed ({type(error).__name__}: {''.join(lines[:1])[:120]}); going "
                "on without it, slower. A C++ compiler is needed on CPUs; --no-compile silences "
                "this."
            )
            self.compiled = None
            return self.function(*arguments)
        self.proved.add(gradients)
        return tree_map_only(Tensor, torch.clone, result) if self.graphs else result


@contextlib.contextmanager
def _proving() -> Iterator[None]:
    """Let a first call compile all there is, quietly.

    One method may be compiled for many objects; the default gives up, silently, after eight. The
    backward pass is compiled with the forward pass, so that its failure is one of this call too.
    """
    eager = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with warnings.catch_warnings(), eager, torch._dynamo.config.patch(recompile_limit=256):
        warnings.simplefilter("ignore")
        yield
