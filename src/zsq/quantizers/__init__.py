# SPDX-License-Identifier: Apache-2.0
"""Weight and activation quantizers, and the protocols that say where they go."""
