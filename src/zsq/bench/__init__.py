# SPDX-License-Identifier: Apache-2.0
"""How fast the loops are, beside the bare passes of their networks and this machine's peak.

>>> from zsq.bench import LOOPS
>>> sorted(LOOPS)
['finetuning', 'genie', 'pixels', 'reconstruction']
"""

from zsq.bench.bench import bench
from zsq.bench.measure import LOOPS, Request

__all__ = ["LOOPS", "Request", "bench"]
