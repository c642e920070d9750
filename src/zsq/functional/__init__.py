# SPDX-License-Identifier: Apache-2.0
"""Quantization arithmetic as pure functions: grids, rounding, shifts, statistics."""
