# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: networks and images as files that never run code."""
