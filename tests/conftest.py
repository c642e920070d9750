# SPDX-License-Identifier: Apache-2.0
"""One thread for everything: networks are tiny here, and results do not depend on the machine."""

import os

# before torch is imported, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
