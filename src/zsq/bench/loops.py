# SPDX-License-Identifier: Apache-2.0
"""What is measured: a loop, in one or more parts, with the rivals of each part.

The *bare cost* of a step is its forward and backward passes and nothing else: the same networks,
precision and memory format as the loop, compiled where the loop is, unless that is slower, a frozen
teacher where the loop's is frozen, a square of the outputs for a loss, no statistics, no quantizers, no
optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from zsq.bench.turns import Tick
from zsq.config import Recipe, is_large, load_recipe
from zsq.runtime.policy import Policy
from zsq.teacher.teacher import Teacher

#: Passes, or a whole step of a plain loop, which returns its loss.
Step = Callable[[], object]
#: Images that operations are counted with; each operation is proportional to their number.
COUNTED_IMAGES = 2


@dataclass(frozen=True)
class Job:
    """A network and how to run a loop on it.

    Attributes:
        teacher: the network.
        policy: device, precision, compilation.
        batch: images a step; None: what the loop's recipe says.
        images: size of the set that is made or tuned on; None: the loop's smallest.
        note: told what is worth knowing, such as a compilation that failed.
    """

    teacher: Teacher
    policy: Policy
    batch: int | None = None
    images: int | None = None
    note: Callable[[str], None] = lambda message: None

    def recipe(self, name: str, settings: list[str]) -> Recipe:
        """Return a recipe as published for images of this size, with changes."""
        large = is_large(self.teacher.info.input_shape)
        return load_recipe(name, large=large, settings=settings)

    def network(self, policy: Policy) -> GraphModule:
        """Return a copy of the teacher's network, frozen, where and as the policy computes."""
        return policy.placed_copy(self.teacher.network).requires_grad_(False)


@dataclass(frozen=True)
class Part:
    """One problem of a loop.

    Attributes:
        name: of a block, or of the loop.
        batch: images a step.
        policy: how the loop computes here.
        compiled: whether the loop's passes are compiled.
        schedule: steps of the published schedule, for as many images as were asked for.
        drive: runs the loop, calling a function after each step, until that raises.
        bare: the bare passes for a policy, a number of images and whether to compile.
        plain: prepares the published loop in plain eager float32 and returns its step.
        skip: steps before the loop is what is to be measured.
    """

    name: str
    batch: int
    policy: Policy
    compiled: bool
    schedule: int
    drive: Callable[[Tick], None]
    bare: Callable[[Policy, int, bool], Step]
    plain: Callable[[], Step]
    skip: int = 0

    def bare_step(self) -> Step:
        """Return the bare passes of a step, computed as the loop computes."""
        return self.bare(self.policy, self.batch, self.compiled)

    def eager_bare_step(self) -> Step:
        """Return the same without compilation."""
        return self.bare(self.policy, self.batch, False)

    def counted_step(self) -> Step:
        """Return the bare passes on `COUNTED_IMAGES` images, eager, on the CPU, in float32."""
        return self.bare(Policy(), COUNTED_IMAGES, False)


Build = Callable[[Job], Iterator[Part]]
