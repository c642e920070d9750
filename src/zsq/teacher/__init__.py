# SPDX-License-Identifier: Apache-2.0
"""Where a network comes from, and what its graph says."""
