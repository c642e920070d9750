# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: what each layer costs and hurts at each bit-width, and the best choice."""
