# SPDX-License-Identifier: Apache-2.0
"""What every part of a run needs: files, metrics, progress, seeds, the environment."""
