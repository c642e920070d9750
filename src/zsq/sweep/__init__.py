# SPDX-License-Identifier: Apache-2.0
"""Many runs from one file: models x recipes x bits x seeds, resumed where they are, one table.

>>> from zsq.sweep import Sweep
>>> [cell.seed for cell in Sweep(models=("a",), recipes=("b",), seeds=(0, 1)).cells()]
[0, 1]
"""

from zsq.sweep.run import run_sweep
from zsq.sweep.sweepfile import Cell, Sweep

__all__ = ["Cell", "Sweep", "run_sweep"]
