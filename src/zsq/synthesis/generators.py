# SPDX-License-Identifier: Apache-2.0
"""Which conditional generator a recipe names, built for a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from zsq.config import GeneratorSynthesis
from zsq.runtime.context import Context
from zsq.synthesis.architecture import Architecture, default_architecture
from zsq.synthesis.autorecon import AutoReconGenerator
from zsq.synthesis.gdfq import GdfqGenerator
from zsq.synthesis.qimera import QimeraGenerator, classifier_rows
from zsq.synthesis.search import SearchSettings, search_architecture
from zsq.teacher.teacher import Teacher

_Build = Callable[[Teacher, GeneratorSynthesis, int, Context], nn.Module]


def build_generator(
    teacher: Teacher, settings: GeneratorSynthesis, classes: int, context: Context
) -> nn.Module:
    """Return an untrained generator for a teacher's images; its weights come from torch's generator.

    Args:
        teacher: names the image's shape; Qimera reads its classifier, AutoReCon may search with it.
        settings: of the recipe.
        classes: of the teacher.
        context: used only where an architecture is searched.
    """
    return _BUILDERS[settings.generator](teacher, settings, classes, context)


def reads_classifier(settings: GeneratorSynthesis) -> bool:
    """Whether a generator starts at the rows of the teacher's classifier, or is as wide as they are."""
    return settings.generator == "qimera" and (
        settings.embedding == "classifier" or settings.latent is None
    )


def _gdfq(
    teacher: Teacher, settings: GeneratorSynthesis, classes: int, context: Context
) -> nn.Module:
    return GdfqGenerator(
        classes, teacher.info.input_shape, latent=settings.latent or 100,
        conditional=settings.conditional,
    )  # fmt: skip


def _qimera(
    teacher: Teacher, settings: GeneratorSynthesis, classes: int, context: Context
) -> nn.Module:
    extracted, latent = settings.embedding == "classifier", settings.latent
    rows = classifier_rows(teacher.network) if reads_classifier(settings) else None
    if latent is None and rows is not None:
        latent = rows.shape[1]
    assert latent is not None
    return QimeraGenerator(
        classes, teacher.info.input_shape, rows if extracted else None,
        latent,
        conditional=settings.conditional, disentangle=settings.disentangle,
        per_sample_norm=not settings.norm_as_released,
        rescale_rows=not settings.norm_as_released, divide_by_mixed=settings.norm_as_released,
    )  # fmt: skip


def _autorecon(
    teacher: Teacher, settings: GeneratorSynthesis, classes: int, context: Context
) -> nn.Module:
    architecture = context.group.from_first(lambda: _architecture(teacher, settings, context))
    return AutoReconGenerator(architecture, classes, teacher.info.input_shape)


def _architecture(teacher: Teacher, settings: GeneratorSynthesis, context: Context) -> Architecture:
    """Published, searched for this teacher, or read from a file."""
    if settings.architecture == "published":
        return default_architecture(teacher.info.input_shape, teacher.info.reference)
    if settings.architecture != "search":
        return Architecture.load(Path(settings.architecture))
    folder = context.checkpoints.folder
    saved = None if folder is None else folder.parent / "architecture.yaml"
    if saved is not None and saved.exists():
        return Architecture.load(saved)
    search = SearchSettings(
        steps=settings.search_steps, batch=settings.batch, weight_lr=settings.lr,
        statistics_weight=settings.statistics_weight,
    )  # fmt: skip
    found = search_architecture(teacher, search, context)
    if saved is not None:
        found.save(saved)
        context.reporter.note(f"the generator that was found is kept in {saved.name}")
    return found


_BUILDERS: dict[str, _Build] = {"gdfq": _gdfq, "qimera": _qimera, "autorecon": _autorecon}
