# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: several GPUs or machines under ``torchrun``, on `torch.distributed`.

A `Group` says who one is among them and holds the few operations that the loops need; alone, each of
them is the identity. What process 0 says counts: it alone writes, and where numbers could differ
between machines its own are taken over (`Group.align`). `joined` enters the group and leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zsq.errors import RunError, UsageError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Group:
    """One process among those of a run; by default the only one.

    Attributes:
        rank: 0 to ``size - 1``; process 0 writes.
        size: processes in all.
        device: what this one computes on.
        local_rank: its number on its machine.

    Example:
        >>> alone = Group()
        >>> alone.part(torch.arange(3)), alone.share({"x": torch.ones(1)})
        (tensor([0, 1, 2]), {'x': tensor([1.])})
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    local_rank: int = 0

    @property
    def stream(self) -> tuple[int, ...]:
        """What to append to the name of a stream of chance that must differ between processes."""
        return (self.rank,) if self.rank else ()

    def part(self, total: Tensor) -> Tensor:
        """Return this process's slice of a total batch, (N, ...); slices differ by one at most."""
        return total if self.size == 1 else torch.tensor_split(total, self.size)[self.rank]

    def part_of(self, count: int) -> int:
        """Return how many of ``count`` images are this process's.

        Example:
            >>> [Group(rank, 3).part_of(8) for rank in range(3)]
            [3, 3, 2]
        """
        return count // self.size + (self.rank < count % self.size)

    def check_batch(self, batch: int, setting: str) -> None:
        """Make sure that every process gets at least one image of a batch.

        Raises:
            UsageError: there are more processes than images.
        """
        if batch < self.size:
            raise UsageError(
                f"{setting} gives {batch} image(s) a step to {self.size} processes, which share them; start "
                f"at most {batch} processes, or raise {setting} with --set (and give that many images)."
            )

    def barrier(self) -> None:
        """Wait for all. On the CPU: others may be busy for long, and a GPU would spin."""
        if self.size > 1:
            self._reduce(torch.zeros(1), dist.ReduceOp.SUM)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Run the block on one process of each machine, then on the others: for downloads."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    # --- what process 0 says ---------------------------------------------------------------------

    def from_first(self, make: Callable[[], _T]) -> _T:
        """Return what ``make`` returns on process 0, where alone it is called; plain data only."""
        return self.send(make() if self.rank == 0 else None, 0)  # type: ignore[return-value]

    def send(self, value: _T, source: int) -> _T:
        """Return what process ``source`` gives, plain data; what the others give is ignored."""
        if self.size == 1:
            return value
        box = [value]
        with _reaching_others():
            dist.broadcast_object_list(box, source, device=torch.device("cpu"))
        return box[0]

    def share(self, tensors: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
        """Return the named tensors of one process, on the CPU; what the others give is ignored."""
        if self.size == 1:
            assert tensors is not None
            return dict(tensors)
        mine = {k: t.detach().cpu().contiguous() for k, t in (tensors or {}).items()}
        header = [(name, t.shape, t.dtype) for name, t in mine.items()]
        shared = {}
        for name, shape, dtype in self.send(header, source):
            tensor = mine[name] if self.rank == source else torch.empty(shape, dtype=dtype)
            if tensor.numel():
                with _reaching_others():
                    dist.broadcast(tensor.reshape(-1).view(torch.uint8), source)
            shared[name] = tensor
        return shared

    def first_says(self, tensor: Tensor) -> Tensor:
        """Return process 0's tensor; shapes are equal on all."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with _reaching_others():
            dist.broadcast(tensor, 0)
        return tensor

    @torch.no_grad()
    def align(self, module: nn.Module) -> None:
        """Overwrite a module's parameters and buffers by those of process 0."""
        if self.size == 1:
            return
        state = module.state_dict()
        theirs = self.share(state)
        if self.rank:
            for name, tensor in state.items():
                tensor.copy_(theirs[name])

    # --- what all say together -------------------------------------------------------------------

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor], share: float = 1.0) -> None:
        """Replace gradients by the sum over processes of ``share`` times theirs, in one exchange.

        Args:
            parameters: the same on all, in the same order; those without a gradient stay without.
            share: of this process in the total batch, if the loss is a mean over its own images.
        """
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients]).mul_(share)
        self._reduce(flat, dist.ReduceOp.SUM)
        parts = torch.split(flat, [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def mean(self, terms: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Return scalar loss terms of the total batch, from those of this process's share."""
        if self.size == 1 or not terms:
            return dict(terms)
        values = torch.stack([term.detach().float() for term in terms.values()]).mul_(share)
        self._reduce(values, dist.ReduceOp.SUM)
        return dict(zip(terms, values.unbind(), strict=True))

    def extremes(self, ends: Tensor) -> Tensor:
        """Return the smallest and largest of everybody's ``(smallest, largest)``, (2,)."""
        if self.size == 1:
            return ends
        flipped = ends * ends.new_tensor([-1.0, 1.0])
        self._reduce(flipped, dist.ReduceOp.MAX)
        return flipped * ends.new_tensor([-1.0, 1.0])

    def gather(self, part: Tensor) -> Tensor:
        """Return everybody's parts of a total batch one after another, on this one's device."""
        if self.size == 1:
            return part
        parts = [self.share({"part": part}, source)["part"] for source in range(self.size)]
        return torch.cat(parts).to(part.device)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of everybody's ``x``, differentiable.

        The backward pass sums likewise: gradients are those of the sum of everybody's losses.
        """
        return x if self.size == 1 else _Total.apply(x, self)  # type: ignore[no-untyped-call]

    def pool(self, mean: Tensor, variance: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return the moments of the total batch from those of this process's share, differentiable.

        Args:
            mean: any shape.
            variance: biased, of the same shape.
            share: of this process in the total batch; shares sum to 1.
        """
        if self.size == 1:
            return mean, variance
        first, second = self.total(torch.stack([mean, variance + mean * mean]) * share)
        return first, second - first * first

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        with _reaching_others():
            dist.all_reduce(tensor, operation)


class _Total(torch.autograd.Function):
    """Sum over processes, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        summed = x.detach().clone(memory_format=torch.contiguous_format)
        group._reduce(summed, dist.ReduceOp.SUM)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Turn the many ways in which a connection breaks into one error."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"the other processes of the run are out of reach ({lines[0][:120]}): one of them ended, was "
            "killed, or did not answer for hours. Repeat the command with --resume; the number of "
            "processes may change."
        ) from error
