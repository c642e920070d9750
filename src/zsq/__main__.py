# SPDX-License-Identifier: Apache-2.0
"""``python -m zsq``."""

from zsq.cli import main

if __name__ == "__main__":
    main()
