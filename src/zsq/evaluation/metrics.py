# SPDX-License-Identifier: Apache-2.0
"""Accuracy with its uncertainty, and comparisons of networks on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from zsq.errors import RunError, UsageError


@dataclass(frozen=True)
class Score:
    """Accuracy of one network, in per cent.

    Attributes:
        top1: share of images whose largest logit is the label's.
        top5: share of images whose label is among the five largest logits.
        stderr: standard error of ``top1``, in points.
        top5_stderr: standard error of ``top5``, in points.
        images: how many images were looked at.
    """

    top1: float
    top5: float
    stderr: float
    top5_stderr: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Top-1 of one network minus another's on the same images, in points.

    Attributes:
        points: the difference.
        stderr: its standard error. Only images on which one is right and the other wrong count,
            so it is much smaller than that of either accuracy when the networks are close.
        images: how many images were looked at.
    """

    points: float
    stderr: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """How far one network's predictions are from another's: a finer measure than answers that change.

    Attributes:
        nats: mean of ``KL(softmax(reference) || softmax(network))`` over images.
        stderr: standard error of that mean.
        images: how many images were looked at.
    """

    nats: float
    stderr: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """What several networks said about the same images.

    Attributes:
        scores: by name of the network.
        predictions: the class that each network named, int64 ``[images]``, by name; fewer where a
            network looked at the first images only.
        labels: the true classes, int64 ``[images]``.
        divergences: of each network from the first one, float64 ``[images]``, by name; nats.
    """

    scores: dict[str, Score]
    predictions: dict[str, Tensor]
    labels: Tensor
    divergences: dict[str, Tensor]

    def agreement(self, first: str, second: str) -> float:
        """Return the per cent of images, of those both saw, on which two networks agree."""
        a, b = self._both(first, second)
        return _percent(a == b)

    def agreement_stderr(self, first: str, second: str) -> float:
        """Return the standard error of `agreement`, in points."""
        return standard_error(self.agreement(first, second), len(self._both(first, second)[0]))

    def difference(self, first: str, second: str) -> Difference:
        """Return top-1 of ``first`` minus that of ``second``, paired by image, of those both saw.

        With ``b`` images that only ``first`` gets right and ``c`` that only ``second`` does, of
        ``n``: the difference is (b - c) / n with variance (b + c - (b - c)^2 / n) / n^2
        (McNemar 1947).
        """
        pair = self._both(first, second)
        images = len(pair[0])
        right, other = (named == self.labels[:images] for named in pair)
        only_first, only_second = int((right & ~other).sum()), int((other & ~right).sum())
        gap = only_first - only_second
        variance = (only_first + only_second - gap**2 / images) / images**2
        return Difference(100 * gap / images, 100 * math.sqrt(max(variance, 0.0)), images)

    def divergence(self, name: str) -> Divergence:
        """Return how far a network is from the first one on the images that it saw."""
        self._of(name)
        each = self.divergences[name]
        spread = float(each.std()) if len(each) > 1 else 0.0
        return Divergence(float(each.mean()), spread / math.sqrt(len(each)), len(each))

    def _both(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        a, b = self._of(first), self._of(second)
        seen = min(len(a), len(b))
        return a[:seen], b[:seen]

    def _of(self, name: str) -> Tensor:
        if name not in self.predictions:
            raise UsageError(f"no network {name!r} here: there are {', '.join(self.predictions)}.")
        return self.predictions[name]


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return for each image whether its label is among the ``k`` largest logits.

    Of equal logits, which integer networks often have, the lower class comes first, as in argmax.

    Args:
        logits: ``[N, classes]``.
        labels: int64 ``[N]``, 0 to classes - 1.
        k: at least 1; above the number of classes every image counts.

    Returns:
        bool ``[N]``.

    Example:
        >>> topk_correct(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]), k=1)
        tensor([False])
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    # Nothing is larger than NaN, so it would count as right.
    return (ahead.sum(1) < k) & ~own[:, 0].isnan()


def standard_error(percent: float, n: int) -> float:
    """Return the binomial standard error, in points, of a share of ``n`` images.

    Args:
        percent: 0 to 100.
        n: at least 1.

    Example:
        >>> round(standard_error(89.1, 5000), 2)
        0.44
    """
    share = percent / 100
    return 100 * math.sqrt(max(share * (1 - share), 0.0) / n)


def agreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """Return the per cent of rows of two ``[N, classes]`` in which the same class is largest.

    Example:
        >>> agreement(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        50.0
    """
    return _percent(logits_a.argmax(1) == logits_b.argmax(1))


def evaluate_networks(
    networks: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int | None = None,
    first: Mapping[str, int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run all networks once over the same images.

    Args:
        networks: by name; each maps float32 images ``[n, C, H, W]`` on the CPU to logits
            ``[n, classes]`` on any device. Put modules into eval mode before. Divergences are from the
            first.
        batches: images and int64 labels, as `ImageFolder.batches` yields them.
        classes: how many classes the labels are positions among; every network must have as many.
        first: networks that look at about so many images only, whole batches, at least one.
        progress: called after each batch with the number of images done.

    Returns:
        Scores, and what every network said about every image.

    Raises:
        UsageError: the networks have another number of classes, a label is not one of them, a
            network returns something other than logits, or there are no images.
        RunError: a network returns NaN or infinite logits.
    """
    within_top5: dict[str, int] = dict.fromkeys(networks, 0)
    predictions: dict[str, list[Tensor]] = {name: [] for name in networks}
    divergences: dict[str, list[Tensor]] = {name: [] for name in networks}
    seen: list[Tensor] = []
    limits, done = first or {}, 0
    with torch.no_grad():
        for images, labels in batches:
            reference: Tensor | None = None
            for name, network in networks.items():
                if done and done >= limits.get(name, done + 1):
                    continue
                logits = _checked(name, network(images), labels, classes)
                within_top5[name] += int(topk_correct(logits, labels, 5).sum())
                predictions[name].append(logits.argmax(1))
                reference = logits if reference is None else reference
                divergences[name].append(_divergence(reference, logits))
            seen.append(labels)
            done += len(labels)
            if progress is not None:
                progress(done)
    if done == 0:
        raise UsageError("there are no images to evaluate on.")
    labels = torch.cat(seen)
    joined = {name: torch.cat(parts) for name, parts in predictions.items()}
    scores = {name: _score(joined[name], labels, within_top5[name]) for name in networks}
    apart = {name: torch.cat(parts) for name, parts in divergences.items()}
    return Evaluation(scores, joined, labels, apart)


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return ``KL(softmax(reference) || softmax(logits))`` of each image; NaN for other classes."""
    if reference.shape != logits.shape:
        return torch.full((len(logits),), torch.nan, dtype=torch.float64)
    wanted, given = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return (wanted.exp() * (wanted - given)).sum(1)


def _score(predictions: Tensor, labels: Tensor, within_top5: int) -> Score:
    images = len(predictions)
    top1 = _percent(predictions == labels[:images])
    top5 = 100 * within_top5 / images
    return Score(
        top1, top5, standard_error(top1, images), standard_error(top5, images), images
    )  # fmt: skip


def _checked(name: str, logits: object, labels: Tensor, classes: int | None) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"network {name!r} returned {what} for {len(labels)} images, not logits of the shape "
            "[images, classes]: only classifiers can be evaluated."
        )
    if classes not in {None, logits.shape[1]}:
        raise UsageError(
            f"the data has {classes} class folders and network {name!r} has {logits.shape[1]} classes: "
            "give one folder for each of the network's classes, in its order when sorted by name; "
            "folders of classes without images may be empty."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise UsageError(
            f"label {low if low < 0 else high} is not one of the {logits.shape[1]} classes of "
            f"network {name!r}: the data must have the network's classes, in its order."
        )
    logits = logits.detach().float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise RunError(f"network {name!r} returned NaN or infinite logits: it is damaged.")
    return logits


def _percent(hits: Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)
