# SPDX-License-Identifier: Apache-2.0
"""Loss terms and weights that lie on a device: recorded and checked with one read of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from zsq.errors import RunError
from zsq.runtime.context import Context

#: What to do about a term that is no number, where the stage has no better advice.
LOWER_THE_RATE = "Lower synthesis.lr or tuning.lr with --set, or try --precision fp32."


def record_terms(
    context: Context, stage: str, step: int, terms: dict[str, Tensor], *,
    advice: str = LOWER_THE_RATE, **values: object,
) -> None:  # fmt: skip
    """Record loss terms with one read of the device; stop at NaN.

    Args:
        context: of the stage.
        stage: its name in the records.
        step: of the stage.
        terms: scalars by name.
        advice: what to do about a term that is no number.
        values: recorded beside them.

    Raises:
        RunError: a term is not finite.
    """
    names = list(terms)
    read = torch.stack([terms[name].float() for name in names]).tolist() if names else []
    for name, value in zip(names, read, strict=True):
        if not math.isfinite(value):
            raise RunError(
                f"the loss term {name!r} became {value} at or before step {step} of {stage}. {advice}"
            )
    context.record(stage, step, **dict(zip(names, read, strict=True)), **values)  # type: ignore[arg-type]


def check_weights(weights: Iterable[Tensor], step: int) -> None:
    """Refuse weights that are damaged, before a checkpoint of them replaces the last good one.

    Args:
        weights: what learns.
        step: the last one made.

    Raises:
        RunError: a weight is NaN or infinite.
    """
    if not bool(torch.stack([w.detach().isfinite().all() for w in weights]).all()):
        raise RunError(
            f"a weight became NaN or infinite at or before step {step}. {LOWER_THE_RATE} The checkpoint "
            "before it is kept."
        )
