# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a set of images, in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zsq.analysis.images import ImageFacts

#: Median cosine distance to the nearest neighbour below which a set counts as collapsed. On the
#: network of `zsq demo` real images have 0.009 (540 of them), copies with noise of 0.1 have 0.0006.
COLLAPSED_DISTANCE = 0.002
#: The same as a share of the distance among at least as many real images.
COLLAPSED_SHARE = 0.25
#: Share of the pixels' variance between images below which they look like one image. Handwritten
#: digits, more alike than most images, have 0.43.
COLLAPSED_SPREAD = 0.05
#: Normalised entropy of the labels below which classes are out of balance.
LOW_BALANCE = 0.8
#: Mean confidence that counts as low: this part of the way from chance to certainty.
LOW_CONFIDENCE = 0.3
#: Share of confirmed labels below which they count as wrong.
LOW_CONFIRMED = 0.5


def find_warnings(images: ImageFacts, real: ImageFacts | None) -> tuple[str, ...]:
    """Return a sentence or two for everything that is wrong; none where all is well."""
    found = [check(images) for check in CHECKS]
    found.append(_collapsed(images, real))
    if real is not None:
        found.append(_broken_real(real))
        found.append(_unconfirmed_real(real))
    return tuple(text for text in found if text)


def _broken(facts: ImageFacts) -> str:
    if not facts.broken:
        return ""
    return (
        f"{facts.broken} of {facts.images} images hold NaN or Inf, or the teacher returns them: "
        "their synthesis diverged and a student cannot learn from them. They are left out here; "
        "make them again with a lower learning rate."
    )


def _bad_statistics(facts: ImageFacts) -> str:
    bad = [path for path, value in facts.distances.items() if not math.isfinite(value)]
    if not bad:
        return ""
    return (
        f"the statistics of {len(bad)} of {len(facts.distances)} batch norms are NaN or Inf, first "
        f"at {bad[0]!r}: the images drive the teacher out of the range of float32. Make them again "
        "with a lower learning rate."
    )


def _missing(facts: ImageFacts) -> str:
    if not facts.missing:
        return ""
    classes = len(facts.class_counts)
    absent = [str(label) for label, count in enumerate(facts.class_counts) if not count]
    listed = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
    few = facts.images < classes
    advice = (
        f"Make at least {classes} images, better several times as many." if few
        else "Make more images, or use a recipe that asks for classes."
    )  # fmt: skip
    return (
        f"{facts.missing} of {classes} classes are never shown ({listed}): nothing tells the "
        f"student how the teacher sees them. {advice}"
    )


def _unbalanced(facts: ImageFacts) -> str:
    if facts.missing or not facts.balance < LOW_BALANCE:
        return ""
    most = max(facts.class_counts)
    return (
        f"the classes are out of balance: class {facts.class_counts.index(most)} has {most} of "
        f"{sum(facts.class_counts)} images (normalised entropy {facts.balance:.2f}, and below "
        f"{LOW_BALANCE} is low), so the student hardly learns the rare ones. Make more images, or "
        "use a recipe that asks for classes."
    )


def _uncertain(facts: ImageFacts) -> str:
    chance = 1 / len(facts.class_counts)
    limit = chance + LOW_CONFIDENCE * (1 - chance)
    if not facts.confidence < limit:
        return ""
    return (
        f"the teacher is unsure of the images: its largest probability is {facts.confidence:.2f} on "
        f"average (chance is {chance:.2g}, and below {limit:.2f} is low), so they do not look like "
        "its classes. Synthesise for more steps, or give the terms that ask for a class more weight."
    )


def _unconfirmed(facts: ImageFacts) -> str:
    if not facts.confirmed < LOW_CONFIRMED:
        return ""
    return (
        f"the teacher confirms the labels of only {facts.confirmed:.0%} of the images: a loss on "
        "labels teaches what the teacher does not say. Synthesise for more steps, give the terms "
        "that ask for a class more weight, or learn from the teacher's outputs only."
    )


def _collapsed(facts: ImageFacts, real: ImageFacts | None) -> str:
    limit = COLLAPSED_DISTANCE
    if real is not None and real.images >= facts.images and real.nearest_distance > 0:
        limit = max(limit, COLLAPSED_SHARE * real.nearest_distance)
    near = facts.nearest_distance < limit
    if not near and not facts.pixel_spread < COLLAPSED_SPREAD:
        return ""
    seen = (
        f"the median cosine distance of their features to the nearest neighbour is "
        f"{facts.nearest_distance:.2g} (below {limit:.2g} is low)" if near
        else f"only {facts.pixel_spread:.1%} of their pixels' variance is between images (below "
        f"{COLLAPSED_SPREAD:.0%} is low)"
    )  # fmt: skip
    return (
        f"the images have collapsed: {seen}. They are nearly copies of one another and show the "
        "student far less than their number says. Synthesise with another seed or smaller "
        "learning rate, or in more and smaller batches."
    )


def _broken_real(real: ImageFacts) -> str:
    if not real.broken:
        return ""
    return (
        f"{real.broken} of {real.images} real images hold NaN or Inf, or the teacher returns them; "
        "they are left out of the comparison. Look at how they are read and normalised."
    )


def _unconfirmed_real(real: ImageFacts) -> str:
    if not real.confirmed < LOW_CONFIRMED:
        return ""
    return (
        f"the teacher confirms the labels of only {real.confirmed:.0%} of the real images: their "
        "normalisation, their size or the order of their classes is not what it was trained with, "
        "so the comparison means little. Check --mean, --std and the names of the class folders."
    )


#: Checks of the set itself; each returns an empty text where all is well.
CHECKS: tuple[Callable[[ImageFacts], str], ...] = (
    _broken, _bad_statistics, _missing, _unbalanced, _uncertain, _unconfirmed,
)  # fmt: skip
