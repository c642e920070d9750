# SPDX-License-Identifier: Apache-2.0
"""The cells of a sweep as tasks of a Ray cluster. Ray is optional: the extra `zsq[ray]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from zsq.errors import RunError, UsageError

_Item = TypeVar("_Item")
Row = dict[str, Any]
#: The address that means: start a cluster on this machine, and stop it at the end.
LOCAL = "local"


def run_on_ray(
    work: Callable[[_Item, int], Row], items: Sequence[_Item], address: str, *, workers: int, gpus: int
) -> Iterator[tuple[_Item, Row]]:  # fmt: skip
    """Do work on a cluster, each item in a task of its own.

    Args:
        work: a function of an item and a number of threads; it is sent to the cluster, whose
            machines have zsq installed.
        items: what to do.
        address: of the cluster: ``local``, ``auto`` (the one this machine belongs to),
            ``host:port`` or ``ray://host:port``.
        workers: tasks at a time, over the whole cluster; its cores are shared out among them.
        gpus: that each task takes for itself.

    Yields:
        Each item with its row, in the order in which they are done. A task that is lost, with its
        machine perhaps, has a row that says so.

    Raises:
        UsageError: Ray is not installed.
        RunError: no cluster at that address, or none with that many GPUs.
    """

    def do(
        item: _Item, threads: int
    ) -> Row:  # Ray takes functions, and nothing else that is called
        return work(item, threads)

    with _cluster(address) as ray:
        threads = _threads(ray, workers)
        _check_gpus(ray, gpus)
        task = ray.remote(do).options(num_cpus=threads, num_gpus=gpus)
        waiting, running = list(items), dict[Any, _Item]()
        while waiting or running:
            while waiting and len(running) < workers:
                item = waiting.pop(0)
                running[task.remote(item, threads)] = item
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), _row(ray, done)


def _row(ray: Any, task: Any) -> Row:
    try:
        row: Row = ray.get(task)
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"status": "failed", "error": f"the task was lost: {lines[-1] if lines else error}"}
    return row


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Connect to a cluster for as long as the block runs."""
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"--ray {address} needs Ray, which is not installed here; run pip install zsq[ray], or leave "
            "--ray out to run on this machine alone."
        ) from error
    own = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address, logging_level="warning", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"no Ray cluster answers at --ray {address} ({str(error)[:150]}); start one with `ray start "
            "--head`, or use --ray local."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _threads(ray: Any, workers: int) -> int:
    """Return the cores of each task: a fair share, and no more than one machine has."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(max(cores, default=1), sum(cores) // workers))


def _check_gpus(ray: Any, gpus: int) -> None:
    """Refuse to wait for ever."""
    found = int(ray.cluster_resources().get("GPU", 0))
    if found < gpus:
        raise RunError(
            f"the sweep's options ask for a GPU and the Ray cluster has {found}; add a machine that has "
            "one, or take --device out of the sweep's options."
        )
