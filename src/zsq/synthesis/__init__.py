# SPDX-License-Identifier: Apache-2.0
"""Images from a network: one file per paper."""
