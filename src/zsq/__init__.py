# SPDX-License-Identifier: Apache-2.0
"""zsq: quantize a trained neural network without its data.

>>> import zsq
>>> teacher = zsq.load_teacher("zsq:resnet20_cifar10")
>>> teacher.info.input_shape
(3, 32, 32)
"""

from importlib.metadata import version

from zsq.analysis.images import examine_images
from zsq.analysis.landscape import analyse
from zsq.analysis.runs import diagnose
from zsq.artifact.report import write_report
from zsq.bits.choose import choose_bits
from zsq.config import Recipe, load_recipe
from zsq.judge import evaluate
from zsq.pipeline import export, load, quantize, save
from zsq.preparation import prepare
from zsq.runtime.context import Context
from zsq.stages import synthesize, tune
from zsq.student import Student, attach
from zsq.synthesis.images import ImageSet
from zsq.teacher.inspect import inspect_teacher as inspect
from zsq.teacher.teacher import Teacher, load_teacher
from zsq.together import first_images, tune_with_generator

__version__ = version("zsq")
__all__ = [
    "Context",
    "ImageSet",
    "Recipe",
    "Student",
    "Teacher",
    "analyse",
    "attach",
    "choose_bits",
    "diagnose",
    "evaluate",
    "examine_images",
    "export",
    "first_images",
    "inspect",
    "load",
    "load_recipe",
    "load_teacher",
    "prepare",
    "quantize",
    "save",
    "synthesize",
    "tune",
    "tune_with_generator",
    "write_report",
]
