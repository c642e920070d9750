# SPDX-License-Identifier: Apache-2.0
"""The state of torch optimisers as plain named tensors, for checkpoints that run no code."""

from __future__ import annotations

import torch
from torch import Tensor


def optimizer_state(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Return an optimiser's buffers as ``prefix.INDEX.NAME``; scalars become tensors."""
    entries = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, buffers in entries.items()
        for name, value in buffers.items()
        if value is not None
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str, state: dict[str, Tensor]
) -> None:
    """Take over what `optimizer_state` returned; learning rates stay as they are."""
    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for key, value in state.items():
        if not key.startswith(f"{prefix}."):
            continue
        index, name = key.removeprefix(f"{prefix}.").split(".", 1)
        parameter, group = owners[int(index)]
        if name == "step":  # where kernels that never ask the host count their steps
            counted_there = group.get("fused") or group.get("capturable")
            value = value.to(parameter.device if counted_there else "cpu")
        elif value.shape == parameter.shape:  # fused kernels walk both in the same memory order
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][name] = value


def generator_states() -> dict[str, Tensor]:
    """Return the states of torch's random generators, CPU first."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """Take over what `generator_states` returned."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda0" in states:
        count = min(len(states) - 1, torch.cuda.device_count())  # perhaps another machine's
        torch.cuda.set_rng_state_all([states[f"cuda{i}"] for i in range(count)])
