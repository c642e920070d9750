# SPDX-License-Identifier: Apache-2.0
"""`zsq bench` on the networks that are compared; one JSON line a network, appended to a file.

Nothing else should run meanwhile. What is not an option of this script is handed to `zsq bench`.

    python benchmarks/bench.py [NETWORK ...] --device=cuda --plain
    python benchmarks/bench.py resnet50 --loop=pixels --batch=32 --steps=10
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("ZSQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
RANDOM = ["--weights", "random"]
#: What `zsq bench` is told to find each network.
NETWORKS = {
    "resnet20_cifar10": ["zsq:resnet20_cifar10"],
    "resnet18_tiny": [f"{SHARED / 'teachers' / 'models.py'}:resnet18_tiny", "--input-shape=3,64,64"],
    "resnet18": ["pytorchcv:resnet18", *RANDOM],
    "resnet50": ["pytorchcv:resnet50", *RANDOM],
    "mobilenetv2_w1": ["pytorchcv:mobilenetv2_w1", *RANDOM],
}  # fmt: skip


def main() -> None:
    """Run the measurements that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench.jsonl"))
    known, handed_on = parser.parse_known_args()
    names = [name for name in known.networks if name in NETWORKS]
    values = [name for name in known.networks if name not in NETWORKS]
    if values:
        parser.error(
            f"{values} are no networks ({', '.join(NETWORKS)}); write options of zsq bench with an "
            "equals sign, as in --device=cuda"
        )
    known.out.parent.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names or NETWORKS if not run(name, handed_on, known.out)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str, options: list[str], out: Path) -> bool:
    """Measure one network; append its line. Return whether that worked."""
    command = [sys.executable, "-m", "zsq", "bench", *NETWORKS[name], *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return False
    line = {"network": name, "options": options, **without_folders(json.loads(done.stdout), name)}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    for row in line["loops"]:
        print(f"{name} {row['loop']}: {1000 * row['seconds']:.2f} ms a step, "
              f"{row['ratio_to_bare']:.2f}x bare, "
              f"{100 * row['share_of_peak']:.1f} % of the peak", flush=True)  # fmt: skip
    return True


def without_folders(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Name the network instead of the file that it came from."""
    rows = [found, *found["loops"], *found.get("growth", ())]
    for row in rows:
        if row.get("model", "").endswith(f":{name}"):
            row["model"] = name
    return found


if __name__ == "__main__":
    main()
