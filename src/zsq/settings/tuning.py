# SPDX-License-Identifier: Apache-2.0
"""Settings of how a student learns from images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from zsq.settings.base import Crop, Part


class Calibration(Part):
    """How first activation steps are chosen; whatever tunes, edges that export adds need it too."""

    power: float = Field(default=2.4, gt=0)
    """Exponent of the error that chooses initial steps."""
    asymmetric: bool = True
    """Let two-sided activations have an off-centre zero point."""
    calibration_images: int = Field(default=256, ge=1)
    """Images that choose the first activation steps."""
    edge_margin: float = Field(default=1.3, gt=0)
    """How much wider than on the run's images the 8-bit ranges of the edges that export adds are: real
    images reach further than synthetic ones, and at 8 bits width is cheap."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Per cent of the values that a range of kind ``percentile`` keeps at either end."""


class RangeCalibration(Calibration):
    """Ranges from images and nothing else: no training (ZeroQ, arXiv 2001.00281)."""

    method: Literal["calibrate"] = "calibrate"
    weights: Literal["minmax", "error"] = "minmax"
    """Each output channel's range: its minimum and maximum, or that of the least rounding error."""
    ranges: Literal["minmax", "percentile", "error"] = "minmax"
    """Each activation's range, likewise, or without the outermost values."""
    margin: float = Field(default=1.0, gt=0)
    """How much wider than on the run's images the ranges of 8-bit activations are: real images reach
    further. At fewer bits every level counts, and ranges stay as they were found."""


class Reconstruction(Calibration):
    """GENIE-M (arXiv 2212.04780, section 4.2) and, as settings, AdaRound, BRECQ and QDrop."""

    method: Literal["reconstruct"] = "reconstruct"
    steps: int = Field(default=20000, ge=0)
    """Steps per reconstruction unit; 0 rounds to nearest."""
    batch: int = Field(default=32, ge=1)
    """Images per step."""
    equalize_steps: int = Field(default=0, ge=0)
    """Steps before, at most as many as a unit's, that learn end to end what each channel of the quantized
    activations is to be multiplied by, and their first steps; 0: what `equalize` computes, and a search."""
    unit: Literal["block", "layer"] = "block"
    """What is reconstructed at a time: blocks found on the graph, or single layers."""
    drop: float = Field(default=0.5, ge=0, le=1)
    """Probability that an activation passes through unquantized (QDrop)."""
    mix: float = Field(default=0.5, ge=0, le=1)
    """Share of a unit's input elements that come from the quantized network, not the teacher."""
    quantize_activations: Literal["together", "after"] = "together"
    """Quantize activations while weights are tuned, or in a pass of its own after it (BRECQ)."""
    activation_steps: int = Field(default=0, ge=0)
    """Steps per unit of that pass; 0 calibrates the activation steps and leaves them."""
    loss_power: float = Field(default=2.0, gt=0)
    """Exponent of the reconstruction error."""
    importance: Literal["uniform", "fisher"] = "uniform"
    """What an error counts in each output channel of a unit: the same everywhere, as public code runs it,
    or the Fisher information of the teacher's predictions there (BRECQ, arXiv 2102.05426, section 3.2)."""
    learn_weight_scale: bool = True
    """Learn the steps of weights together with their rounding."""
    learn_activation_scale: bool = True
    """Learn the steps of activations (LSQ)."""
    scale_lr: float = Field(default=5e-3, gt=0)
    """Rate of the weight steps; relative to the step where ``log_scale``."""
    activation_lr: float = Field(default=1e-3, gt=0)
    """Rate of the activation steps; relative to the step where ``log_scale``."""
    bias_lr: float = Field(default=0.0, ge=0)
    """Rate of the biases; 0 keeps the teacher's."""
    log_scale: bool = True
    """Learn steps by their logarithm: the same relative speed in every layer."""
    rounding_lr: float | None = Field(default=None, gt=0)
    """Rate of the soft bits; None: 20 / steps, at most 0.1, so that short runs can decide them too (the
    published 1e-3 at 20,000 steps)."""
    rounding_weight: float = Field(default=1.0, ge=0)
    """Lambda: weight of the regulariser that decides the soft bits."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps before the regulariser starts."""
    beta_start: float = 20.0
    """Exponent of the regulariser at its start: how flat it is away from 0 and 1."""
    beta_end: float = 2.0
    """Exponent at the end."""


class Losses(Part):
    """Weights of the terms that the student learns from; 0 leaves a term out."""

    kl: float = Field(default=1.0, ge=0)
    """Kullback-Leibler divergence from teacher to student at `Finetuning.temperature`."""
    ce: float = Field(default=1.0, ge=0)
    """Cross-entropy with the labels that the images were made for."""
    alignment: float = Field(default=0.0, ge=0)
    """Distance of the blocks' channel attention from the teacher's (HAST)."""


class Promotion(Part):
    """Sample difficulty promotion (HAST, arXiv 2303.13826): learn also from images made harder."""

    epsilon: float = Field(default=0.01, gt=0)
    """Step of every pixel along the sign of the loss's gradient; in normalised units, 0.01 is about
    0.6 of 255 grey levels."""
    weight: float = Field(default=1.0, gt=0)
    """Of the loss on the harder images beside that on the clean ones."""
    through_teacher: bool = False
    """Let the gradient that makes images harder flow through the teacher too, as in the public code."""


class Inundation(Part):
    """Gradient inundation (AIT, arXiv 2203.17008): scale steps until enough integers change."""

    target: float = Field(default=1e-3, ge=0, le=1)
    """Share of a layer's integer weights that each step must change."""
    grid: Literal["frozen", "moving"] = "frozen"
    """Count changes on the grid before the step (closed form), or on the moved one (published search)."""
    guarantee: bool = True
    """With a moving grid: end the search on the side that reaches the target."""
    first_steps: int = Field(default=200, ge=0)
    """Steps at the start in which multipliers are at most `first_cap`."""
    first_cap: float = Field(default=128.0, ge=1)
    """Largest multiplier in those steps."""
    cap: float = Field(default=65536.0, ge=1)
    """Largest multiplier."""


class Finetuning(Calibration):
    """A student that learns end to end from images and the teacher's logits.

    Batch norm statistics stay the teacher's; weights, biases, gamma and beta learn.
    """

    method: Literal["finetune"] = "finetune"
    steps: int = Field(default=79200, ge=0)
    """Steps of the student."""
    batch: int = Field(default=200, ge=1)
    """Images per step where they are given; a generator has a batch of its own."""
    start: Reconstruction | None = None
    """Begin with weights and ranges reconstructed on the images, or on those that a generator makes after
    its warm-up, instead of the teacher's weights rounded to nearest and tracked ranges (this package's
    own). The grids of weights then stand still, and milestones are shares of the student's steps.
    Its settings are those of `zsq recipes genie`."""
    range_steps: int = Field(default=100, ge=1)
    """Steps of the warm-up whose images set the ranges of activations, which are frozen after them."""
    range_start: int | None = Field(default=None, ge=0)
    """Step of the warm-up at which tracking starts; null for the latest, so that it ends with the warm-up."""
    range_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running ranges."""
    ranges: Literal["minmax", "percentile", "error"] = "minmax"
    """What is frozen: the tracked minimum and maximum, as published; or, of the last ``calibration_images``
    of the warm-up, the range without its outermost values, or that of the least rounding error (exponent
    ``power``)."""
    clamped_gradient: Literal["pass", "stop"] = "pass"
    """What gradients do where an activation lay outside its range: pass, as published for ranges of
    minimum and maximum, or stop. Ranges of least error clamp much at 3 bits, and there a gradient that
    passes is wrong."""
    crop: Crop | None = None
    """Augmentation of given images."""
    lr: float = Field(default=1e-4, gt=0)
    """Rate of SGD."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov momentum of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """L2 penalty on everything that is learned."""
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of all steps, warm-up included, after which rates and targets fall."""
    decay: float = Field(default=0.1, gt=0, le=1)
    """Factor on rates and on the inundation target at each milestone."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the running average of everything learned that becomes the student; shorter at
    the start, so that early steps do not weigh on it. 0: the student is the last step's, as published."""
    losses: Losses = Losses()
    """Weights of the loss's terms."""
    temperature: float = Field(default=20.0, gt=0)
    """Both networks' logits are divided by it before the divergence."""
    kl_mean: Literal["element", "sample"] = "element"
    """Average the divergence over images and classes, as published, or over images only."""
    agreement_every: int = Field(default=100, ge=0)
    """Steps between two records of the cosines between the gradients of loss terms; 0 records none. One
    costs about two steps' worth of passes."""
    agreement_terms: tuple[Literal["kl", "ce", "alignment"], ...] = ("kl", "ce")
    """The terms whose gradients are compared, two by two, whether the student learns from them or not."""
    snapshots: int = Field(default=0, ge=0)
    """Snapshots of the weights, evenly spaced over training and kept with the run, for `zsq analyse`."""
    promotion: Promotion | None = None
    """Learn from images made harder, too (HAST); null: from the images alone."""
    inundation: Inundation | None = None
    """Scale gradients until enough integers change (AIT); null: as they are."""
