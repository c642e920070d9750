# SPDX-License-Identifier: Apache-2.0
"""From a student to an integer ONNX file that reproduces the simulation."""

from zsq.export.deploy import to_integer
from zsq.export.export import TARGETS, export_student
from zsq.export.onnx import export_float, write_integer
from zsq.export.parity import ExportReport
from zsq.export.simulate import IntegerSimulation

__all__ = [
    "TARGETS",
    "ExportReport",
    "IntegerSimulation",
    "export_float",
    "export_student",
    "to_integer",
    "write_integer",
]
