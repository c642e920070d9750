# SPDX-License-Identifier: Apache-2.0
"""Are these images fit to quantize with? Statistics, classes, confidence and diversity of a set."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zsq.analysis.diversity import nearest_distances, pixel_spread, within_class_distance
from zsq.analysis.imagegrid import image_grid, save_grid
from zsq.analysis.imagewarnings import find_warnings
from zsq.analysis.observation import observe
from zsq.errors import UsageError
from zsq.runtime.ambient import own_modes
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import Teacher

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImageFacts", "ImageReport", "examine_images", "image_grid", "save_grid"]

#: Quantiles of the confidence that are reported.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: Equal bins of the confidence's histogram, from 0 to 1.
BINS = 20


@dataclass(frozen=True)
class ImageFacts:
    """What was measured on one set of images; NaN where a thing cannot be measured.

    Attributes:
        images: in the set.
        broken: images with NaN or Inf among their pixels or in what the teacher makes of them.
            The rest is measured; batch norms also see those that only the teacher breaks.
        distances: per batch norm, in execution order, the squared differences of the set's mean
            and biased variance from the stored ones, averaged over channels.
        class_counts: images of each of the teacher's classes, by their labels.
        missing: classes without an image.
        balance: entropy of the labels over that of a uniform distribution: 0 one class, 1 all alike.
        confidence: the teacher's largest probability, averaged over images.
        confidence_quantiles: of the largest probability, by the share of images below.
        confidence_histogram: images per bin of the largest probability, equal bins from 0 to 1.
        confirmed: share of images whose label is the teacher's prediction.
        nearest_distance: cosine distance, in what the classifier reads, to the most similar other
            image; median over images. It shrinks as a set grows.
        within_class_distance: cosine distance of two images of one class, averaged over pairs.
        pixel_spread: share of the pixels' variance that is between images: 0 for copies.
    """

    images: int
    broken: int
    distances: dict[str, float]
    class_counts: tuple[int, ...]
    missing: int
    balance: float
    confidence: float
    confidence_quantiles: dict[str, float]
    confidence_histogram: tuple[int, ...]
    confirmed: float
    nearest_distance: float
    within_class_distance: float
    pixel_spread: float


@dataclass(frozen=True)
class ImageReport:
    """What `examine_images` found.

    Attributes:
        model: what the teacher was loaded from.
        images: of the set.
        real: of the real images, where there were any.
        warnings: sentences that say what is wrong, the value, what it means and what to do next.
    """

    model: str
    images: ImageFacts
    real: ImageFacts | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values; None stands for what could not be measured."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def plot(self) -> Figure:
        """Draw distance per layer, images per class and the histogram of confidence."""
        from zsq.analysis.imageplots import plot_images

        return plot_images(self)


@own_modes()
def examine_images(teacher: Teacher, images: ImageSet, real: ImageSet | None = None) -> ImageReport:
    """Examine a set of images with the teacher that it was made for.

    Args:
        teacher: is not changed; it computes where its parameters are.
        images: to examine. Images with NaN or Inf are counted, warned of and left out.
        real: to compare with, in the same normalised input space.

    Raises:
        UsageError: no finite image, another shape than the network's input, or labels that are not
            classes of the network.
    """
    found = _measure(teacher, images, "images")
    compared = None if real is None else _measure(teacher, real, "real images")
    return ImageReport(teacher.info.reference, found, compared, find_warnings(found, compared))


def _measure(teacher: Teacher, images: ImageSet, name: str) -> ImageFacts:
    kept = _finite(images, name).check(teacher.info.input_shape)
    seen = observe(teacher, kept.images)
    _check_labels(kept.labels, seen.classes, name)
    valid = torch.isfinite(seen.top) & torch.isfinite(seen.features).all(1)
    top, labels, features = seen.top[valid], kept.labels[valid], seen.features[valid]
    counts = torch.bincount(labels, minlength=seen.classes)
    nearest = nearest_distances(features)
    return ImageFacts(
        images=len(images),
        broken=len(images) - int(valid.sum()),
        distances=seen.distances,
        class_counts=tuple(counts.tolist()),
        missing=int((counts == 0).sum()),
        balance=_balance(counts),
        confidence=_mean(top),
        confidence_quantiles={str(q): _quantile(top, q) for q in QUANTILES},
        confidence_histogram=_histogram(top),
        confirmed=_mean((seen.predictions[valid] == labels).float()),
        nearest_distance=_quantile(nearest, 0.5),
        within_class_distance=within_class_distance(features, labels),
        pixel_spread=pixel_spread(kept.images[valid]),
    )


def _finite(images: ImageSet, name: str) -> ImageSet:
    """Return the images without NaN and Inf."""
    if images.labels.shape != (len(images),):
        raise UsageError(
            f"the {name} have labels of shape {tuple(images.labels.shape)}; give one integer for "
            f"each of the {len(images)} images."
        )
    finite = torch.isfinite(images.images.flatten(1)).all(1)
    if len(images) and not bool(finite.any()):
        raise UsageError(
            f"all {len(images)} {name} hold NaN or Inf, so there is nothing to examine; make them "
            "again with a lower learning rate."
        )
    return images if bool(finite.all()) else ImageSet(images.images[finite], images.labels[finite])


def _check_labels(labels: Tensor, classes: int, name: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"the {name} have labels from {low} to {high} but the network has {classes} classes, 0 "
            f"to {classes - 1}; use images labelled for this network."
        )


def _balance(counts: Tensor) -> float:
    """Return the entropy of a distribution over that of the uniform one."""
    if len(counts) < 2 or not bool(counts.any()):
        return math.nan
    share = counts.double() / counts.sum()
    return abs(float(torch.special.entr(share).sum()) / math.log(len(counts)))


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def _quantile(values: Tensor, share: float) -> float:
    """Return a quantile, interpolated; unlike torch's, of any number of values."""
    if not len(values):
        return math.nan
    ordered = values.double().sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _histogram(values: Tensor) -> tuple[int, ...]:
    bins = (values.double() * BINS).long().clamp(0, BINS - 1)
    return tuple(torch.bincount(bins, minlength=BINS).tolist())


def _plain(value: object) -> object:
    """Turn tuples into lists and what is not finite into None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
