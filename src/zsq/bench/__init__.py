# SPDX-License-Identifier: Apache-2.0
"""How fast the loops are, beside the bare passes of their networks and this machine's peak.

>>> from zsq.bench import LOOPS
>>> sorted(LOOPS)
['finetuning', 'genie', 'pixels', 'reconstruction']
"""

from zsq.bench.measure import LOOPS, Request
from zsq.bench.run import bench

__all__ = ["LOOPS", "Request", "bench"]
