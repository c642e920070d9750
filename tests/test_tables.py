# SPDX-License-Identifier: Apache-2.0
"""What is printed says what a reader must not miss."""

import pytest

from zsq.tables import export_table


@pytest.mark.parametrize(("latency", "warned"), [(0.5, False), (20.0, True)])
def test_a_file_that_is_slower_than_float_says_so(latency, warned):
    report = {"latency_ms": latency, "float_latency_ms": 10.0, "speedup": 10.0 / latency}
    words = [part for part in export_table(report) if isinstance(part, str)]
    assert any("slower here than the float one" in word for word in words) == warned
