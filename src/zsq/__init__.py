# SPDX-License-Identifier: Apache-2.0
"""zsq: quantize a trained neural network without its data."""
