# SPDX-License-Identifier: Apache-2.0
"""From a teacher and a budget to a bits file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch.fx import GraphModule

from zsq.bits.costs import Budget
from zsq.bits.edges import count_values, measure_edges
from zsq.bits.fitting import check_budget, fit_edges, make_plan
from zsq.bits.latency import measure_latency
from zsq.bits.layers import fixed_bits, free_edges, layer_facts
from zsq.bits.plan import BitsPlan, EdgePlan
from zsq.bits.sensitivity import measure_sensitivity
from zsq.config import Recipe, is_large, load_recipe
from zsq.errors import UsageError
from zsq.preparation import prepared_teacher, reconstruction_of
from zsq.runtime.ambient import own_modes
from zsq.runtime.context import Context
from zsq.runtime.policy import on_device
from zsq.runtime.seeds import seeded
from zsq.settings import Bits, Tuning
from zsq.stages import choose_images
from zsq.student import prepared_network
from zsq.synthesis.images import Images, ImageSet
from zsq.teacher.teacher import Teacher

#: Bit-widths that are compared where nothing else is asked for.
CANDIDATES = (2, 3, 4, 5, 6, 8)
#: Images that sensitivities are measured on.
IMAGES = 64


@own_modes()
def choose_bits(
    teacher: Teacher,
    budget: str | float | Budget | None = None,
    recipe: str | Path | Recipe = "genie",
    *,
    bits: str | None = None,
    activations: float | None = None,
    protocol: str | None = None,
    schedule: Literal["quick", "full"] = "full",
    settings: Sequence[str] = (),
    candidates: Sequence[int] = CANDIDATES,
    images: Images = None,
    context: Context | None = None,
) -> BitsPlan:
    """Choose bit-widths within a budget, layer by layer, without data (ZeroQ, arXiv 2001.00281).

    Args:
        teacher: from `load_teacher`.
        budget: average bits per weight of the layers that the protocol leaves free (``4.0``), a size
            of all weights in the ONNX file (``1.7MB``; half a byte each up to 4 bits, a byte above
            and in depthwise layers; scales, biases and the graph come on top), bit operations of one
            image (``2.5GBOP``), or its time in ONNX Runtime on one thread (``1.3ms``, measured here
            and now: added up from the layers' shares of a run, see `zsq.bits.latency`); None leaves
            all weights at the bits of the recipe.
        recipe: whose protocol, overrides, preparation and rounding are used; layers that its
            overrides give weight bits are not free.
        bits: of what is not chosen, as in ``w4a4``; None keeps the recipe's.
        activations: a budget for them: average bits per value of the tensors that the protocol leaves
            free, each of which gets bits of its own; None gives all of them the same.
        protocol: None keeps the recipe's.
        schedule: as the run that the bits are for; quick schedules may prepare a network otherwise.
        settings: ``KEY=VALUE`` texts, likewise.
        candidates: bit-widths to choose from.
        images: to measure with; 64 of ZeroQ's are made where there are none.
        context: seed, device, progress.

    Returns:
        The plan; `BitsPlan.save` writes it, `quantize(bits=...)` takes it.

    Raises:
        UsageError: no budget, one that is unreadable or that nothing meets, a bad candidate, or bits
            where there is a budget for both.
    """
    context = context or Context()
    resolved = load_recipe(
        recipe, schedule=schedule, large=is_large(teacher.info.input_shape),
        settings=settings, bits=bits, protocol=protocol,
    )  # fmt: skip
    _check_budgets(budget, activations, bits)
    wanted = Budget.parse(str(budget)) if isinstance(budget, str | int | float) else budget
    widths = chosen = _checked(candidates)
    if activations is not None:
        _check_activations(activations, chosen)
    if wanted is None:
        wanted, widths = Budget("average", resolved.bits.weights), [resolved.bits.weights]
    facts, free = layer_facts(teacher, resolved)
    if not free:
        raise UsageError(
            f"protocol {resolved.protocol!r} and the recipe's {len(resolved.overrides)} overrides fix the bits "
            f"of all {len(facts)} layers of this network; there is nothing to choose. Use --protocol "
            "all-low-bit or drop overrides."
        )
    network = prepared_network(teacher, resolved)
    fixed = fixed_bits(network, resolved.protocol, resolved.overrides)
    if activations is None or wanted.kind != "bops":  # which need the bits of activations
        check_budget(wanted, facts, fixed, widths)
    pictures = _pictures(teacher, images, context)
    edges = None
    with seeded(context.seed, "bits"), on_device(context.policy.device):
        prepared = prepared_teacher(teacher, resolved, pictures)
        network = prepared_network(prepared, resolved)
        if activations is not None:
            edges = _choose_edges(
                network, teacher.info.input_shape, resolved, activations, chosen, pictures, context
            )
            resolved = _with_edges(resolved, edges)
            facts, _ = layer_facts(teacher, resolved)
        measured = measure_sensitivity(
            network, pictures.images, free, widths, _first_tuning(resolved), context
        )
        if wanted.kind == "latency":
            timed = sorted({*widths, *fixed.values(), 8})
            times = measure_latency(prepared, resolved, pictures, timed, context)
            facts = {path: replace(fact, milliseconds=times[path]) for path, fact in facts.items()}
    return make_plan(teacher, resolved, wanted, measured, facts, edges)


def _choose_edges(
    network: GraphModule, shape: tuple[int, ...], recipe: Recipe, budget: float, candidates: Sequence[int],
    pictures: ImageSet, context: Context,
) -> EdgePlan:  # fmt: skip
    """Measure the tensors between layers and choose their bits."""
    free = free_edges(network, recipe.protocol, recipe.overrides)
    if not free:
        raise UsageError(
            f"protocol {recipe.protocol!r} and the recipe's {len(recipe.overrides)} overrides fix the bits of all "
            "activations of this network; leave --activations out."
        )
    measured = measure_edges(
        network, pictures.images, free, candidates, _first_tuning(recipe), context
    )
    return fit_edges(budget, measured, count_values(network, free, shape))


def _first_tuning(recipe: Recipe) -> Tuning:
    """Return what a student's first grids come from: a reconstruction, where its tuning begins with one."""
    return reconstruction_of(recipe) or recipe.tuning


def _with_edges(recipe: Recipe, edges: EdgePlan) -> Recipe:
    """Return a recipe whose activations have the bits chosen for them."""
    bits = Bits(weights=recipe.bits.weights, activations=round(edges.cost))
    return load_recipe(recipe, bits=bits, overrides=(*edges.overrides(), *recipe.overrides))


def _check_budgets(budget: object, activations: float | None, bits: str | None) -> None:
    if budget is None and activations is None:
        raise UsageError(
            "nothing bounds the bits: give a budget for weights (--budget 4.0), for activations (--activations "
            "4.0), or for both."
        )
    if None not in (budget, activations, bits):
        raise UsageError(
            f"--bits {bits} says what is not chosen, and --budget and --activations choose everything; leave one "
            "of the three out."
        )


def _check_activations(budget: float, candidates: Sequence[int]) -> None:
    if not min(candidates) <= budget <= max(candidates):
        raise UsageError(
            f"activations of {budget:g} bits on average cannot be made of the candidates "
            f"{', '.join(map(str, candidates))}; choose a number from {min(candidates)} to {max(candidates)}, or "
            "other --candidates."
        )


def _checked(candidates: Sequence[int]) -> list[int]:
    chosen = sorted(set(candidates))
    if not chosen or min(chosen) < 2 or max(chosen) > 8:
        raise UsageError(f"candidates {list(candidates)} must be bit-widths from 2 to 8.")
    return chosen


def _pictures(teacher: Teacher, images: Images, context: Context) -> ImageSet:
    """Return the images to measure with: given ones, or ZeroQ's."""
    found = choose_images(teacher, load_recipe("zeroq"), images, context)
    return ImageSet(found.images[:IMAGES], found.labels[:IMAGES], found.provenance)
