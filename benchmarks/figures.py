# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of docs/analysis.md from runs, and print the numbers beside them.

python benchmarks/figures.py runs/gdfq runs/gdfq-kl runs/gdfq+ait docs/figures
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import fmean, median

from zsq.analysis.history import agreement, crossings
from zsq.runtime.metrics import read_metrics


def main(runs: list[Path], out: Path) -> None:
    """Draw every run's gradients and crossings; copy its curvature and surfaces."""
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        records = read_metrics(run / "metrics.jsonl")
        agreed, crossed = agreement(records), crossings(records)
        if agreed is None or crossed is None:
            raise SystemExit(f"{run} was not fine-tuned, or recorded nothing")
        agreed.plot().savefig(out / f"{run.name}.agreement.png", dpi=90)
        crossed.plot().savefig(out / f"{run.name}.crossings.png", dpi=90)
        for name in ("surface_line", "surface_plane", "surface_path"):
            if (run / "analysis" / f"{name}.png").exists():
                shutil.copy(run / "analysis" / f"{name}.png", out / f"{run.name}.{name}.png")
        print(f"{run.name}: cosine {agreed.mean:.3f}, below zero at {100 * agreed.opposed:.0f} % of "
              f"{len(agreed.overall.steps)} records")  # fmt: skip
        half = len(agreed.overall.values) // 2
        print(f"  first half {fmean(agreed.overall.values[:half]):.2f}, second half "
              f"{fmean(agreed.overall.values[half:]):.2f}")  # fmt: skip
        for place in (1, -1):
            changed = [series.values[place] for series in crossed.changed.values()]
            factors = [series.values[place] for series in crossed.multiplier.values()]
            step = next(iter(crossed.changed.values())).steps[place]
            print(f"  step {step}: {100 * fmean(changed):.4f} % changed, {sum(v == 0 for v in changed)} of "
                  f"{len(changed)} layers not at all, median multiplier {median(factors):.1f}")  # fmt: skip
        print(f"  never moved: {100 * fmean(crossed.never_moved.values()):.1f} %")
        curves = json.loads((run / "analysis" / "curvature.json").read_text())
        for name, found in curves["terms"].items():
            trace = found["trace"]
            print(f"  {name}: trace {trace['value']:.0f} +- {trace['stderr']:.0f}, largest eigenvalues "
                  f"{', '.join(f'{v:.0f}' for v in found['spectrum']['values'])}")  # fmt: skip


if __name__ == "__main__":
    *given, target = map(Path, sys.argv[1:])
    main(given, target)
