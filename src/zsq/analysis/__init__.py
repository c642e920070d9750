# SPDX-License-Identifier: Apache-2.0
"""What happened in a run, and what it means: images, layers, losses."""
