# SPDX-License-Identifier: Apache-2.0
"""Making a student agree with its teacher."""
