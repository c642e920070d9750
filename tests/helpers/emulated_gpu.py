# SPDX-License-Identifier: Apache-2.0
"""A GPU made of the CPU: real values under a GPU's rules, where there is none.

Tensors on ``cuda:0`` are wrappers around CPU tensors. An operator that is given tensors of both places
fails as it would on a GPU, and what would make the host wait for the device is noted. So code that
only a GPU runs is run: what lies where, what is copied when, which branch is taken.

Not emulated: speed, `torch.compile`, autocast (run in float32), the kernels' own rounding, streams of
chance on the device (the CPU's is drawn from).
"""

import contextlib
import traceback
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
#: Operators whose result the host has to know.
READING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default,
    aten.masked_select.default, aten.nonzero.default,
}  # fmt: skip
COPYING = {aten._to_copy.default, aten.copy_.default}
#: Operators that take indices from the host (and then copy them).
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
#: Operators that do not even take numbers, (), from the host.
STRICT = {aten.cat.default, aten.stack.default, aten._fused_adam_.tensor_lr}


@dataclass(frozen=True)
class Wait:
    """Something the host waits for: why, and for which line of zsq."""

    why: str
    line: str


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; its values are in ``values``, on the CPU.

    For C++ it is on ``meta``, which, unlike CUDA, every build of PyTorch can differentiate on.
    """

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device="meta",
        )  # fmt: skip

    def __init__(self, values):
        self.values = values

    @property
    def device(self):
        return DEVICE

    @property
    def is_meta(self):
        return False

    @property
    def is_cuda(self):
        return True

    def __repr__(self):
        return f"OnGpu({self.values!r})"

    def untyped_storage(self):
        return self.values.untyped_storage()

    def tolist(self):
        _current().wait("tolist")
        return self.values.tolist()

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _current().run(function, args, kwargs or {})


class _Emulation(TorchDispatchMode):
    active = None

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def wait(self, why):
        frames = [f for f in traceback.extract_stack() if "/src/zsq/" in f.filename]
        line = f"{frames[-1].filename.split('/src/zsq/')[1]}:{frames[-1].lineno}" if frames else ""
        self.waits.append(Wait(why, line))

    def run(self, function, args, kwargs):
        flat, structure = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, OnGpu)]
        theirs = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnGpu)]
        asked = kwargs.get("device")
        to_cpu = asked is not None and asked.type == "cpu"
        to_gpu = asked is not None and not to_cpu
        if to_gpu and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        self._check(function, args, kwargs, ours, theirs, to_cpu=to_cpu, to_gpu=to_gpu)
        if function is aten._to_copy.default and ours and to_gpu and _as_it_is(args[0], kwargs):
            return args[0]
        given, named = tree_unflatten(
            [x.values if isinstance(x, OnGpu) else x for x in flat], structure
        )
        named = {name: value for name, value in named.items() if name != "pin_memory"}
        result = function(*given, **(named | ({"device": torch.device("cpu")} if asked else {})))
        if function is aten.copy_.default:
            return args[0]
        if to_cpu or not (ours or to_gpu):
            return result
        known = {id(x.values): x for x in ours}  # of operators that write in place
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnGpu(x), result)

    def _check(self, function, args, kwargs, ours, theirs, *, to_cpu, to_gpu):
        """Fail as a GPU would; note what is waited for."""
        if function in COPYING:
            between = ours and theirs if function is aten.copy_.default else (
                (ours and to_cpu) or (theirs and to_gpu)
            )  # fmt: skip
            patient = args[2:3] == (True,) or kwargs.get("non_blocking")
            if between and not patient:
                self.wait("copy")
            return
        if not ours:
            return
        if function in READING:
            self.wait("read")
        if function in INDEXING:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool for i in indices):
                self.wait("indexed by a mask")
            if any(not isinstance(i, OnGpu) for i in indices):
                self.wait("indices from the host")
            theirs = [x for x in theirs if not any(x is i for i in indices)]
        if any(x.ndim > 0 or function in STRICT for x in theirs):
            shapes = [tuple(x.shape) for x in theirs]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({function}, {shapes} on the CPU)"
            )


def _as_it_is(tensor, kwargs):
    return kwargs.get("dtype") in (None, tensor.dtype) and kwargs.get("memory_format") in (
        None, torch.preserve_format,
    )  # fmt: skip


def _current():
    assert _Emulation.active is not None, "a tensor of an emulated GPU has outlived it"
    return _Emulation.active


class _Event:
    def record(self, stream):
        """Everything is done when it is asked for; only the stream has to be the GPU's."""
        assert stream == DEVICE

    def synchronize(self):
        """Returns at once."""


@contextlib.contextmanager
def emulated_gpu(free=40 << 30):
    """Let there be one GPU with so many free bytes; yields the list of what was waited for."""
    emulation, empty = _Emulation(), torch.empty
    cuda = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_capability": lambda device=None: (7, 0),
        "mem_get_info": lambda device=None: (free, 80 << 30), "synchronize": lambda device=None: None,
        "init": lambda: None, "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0, "memory_allocated": lambda device=None: 0,
        "is_bf16_supported": lambda *_: False, "Event": _Event,
        "current_stream": lambda device=None: torch.device(device),
        "device": lambda device: contextlib.nullcontext(), "get_device_name": lambda _: "emulated",
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": lambda states: None, "get_rng_state": lambda device=None: torch.zeros(16),
        "set_rng_state": lambda state, device=None: None, "manual_seed_all": lambda seed: None,
    }  # fmt: skip
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    lifted = torch._C._only_lift_cpu_tensors()
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k)),
        mock.patch.object(_Emulation, "active", emulation),
        emulation,
    ):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield emulation.waits
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
