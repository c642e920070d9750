# SPDX-License-Identifier: Apache-2.0
"""Accuracy on labelled images: reading folders of them, scores, comparisons."""
