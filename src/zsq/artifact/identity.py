# SPDX-License-Identifier: Apache-2.0
"""What a run is: everything that decides its result, and nothing else."""

from __future__ import annotations

import json

from zsq.artifact.given import name_of
from zsq.artifact.networkfile import fingerprint
from zsq.artifact.runfolder import differences
from zsq.config import Recipe
from zsq.errors import UsageError
from zsq.runtime.group import Group
from zsq.runtime.policy import Policy
from zsq.synthesis.images import Images
from zsq.teacher.teacher import Teacher


def run_identity(
    teacher: Teacher, recipe: Recipe, seed: int, policy: Policy, images: Images
) -> dict[str, object]:
    """Return everything that decides a run's result; the number of processes does not."""
    info = teacher.info
    return {
        "model": info.reference, "network": fingerprint(teacher.network),
        "recipe": json.loads(recipe.model_dump_json()), "seed": seed,
        "device": policy.device.type, "precision": str(policy.dtype).removeprefix("torch."),
        "compile": policy.compile, "images": name_of(images),
        "resize": None if images is None else info.resize,
        "input_shape": list(info.input_shape), "mean": info.mean and list(info.mean),
        "std": info.std and list(info.std),
    }  # fmt: skip


def check_agreement(identity: dict[str, object], group: Group) -> None:
    """Make sure that all processes were asked for the same, of the same network.

    Raises:
        UsageError: this one was not asked for what process 0 was asked for.
    """
    first = group.send(identity, 0)
    different = differences(first, identity)
    if different:
        raise UsageError(
            f"process {group.rank} would not do what process 0 does: {'; '.join(different[:3])}. Give all "
            "machines the same command, model, recipe and versions."
        )
    group.barrier()  # before process 0 begins a folder for nothing
