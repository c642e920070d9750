# SPDX-License-Identifier: Apache-2.0
"""From a student to a file that runs as integers on a stock runtime."""
