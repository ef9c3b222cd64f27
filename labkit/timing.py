"""The book's one way to time things."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timings:
    """Seconds of every run, by candidate; run i of each candidate was made in round i, one after the other."""

    runs: Mapping[str, list[float]]
    threads: int

    def seconds(self, name: str) -> float:
        """Median time of one call, in seconds."""
        return statistics.median(self.runs[name])

    def spread(self, name: str) -> float:
        """Distance between the quartiles over the median: dimensionless, 0 for a perfectly quiet machine."""
        if len(self.runs[name]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.runs[name], n=4, method="inclusive")
        return (high - low) / self.seconds(name)

    def ratio(self, slow: str, fast: str) -> float:
        """How many times longer ``slow`` takes than ``fast``: the median over rounds of the ratio within a round.

        Both runs of a round see the same state of the machine, so a slow drift (clock, other load) cancels.
        """
        return statistics.median(a / b for a, b in zip(self.runs[slow], self.runs[fast], strict=True))

    def __str__(self) -> str:
        width = max(map(len, self.runs))
        return "\n".join(
            f"{name:<{width}}  {1e3 * self.seconds(name):9.3g} ms  ± {100 * self.spread(name):.0f} %"
            for name in self.runs
        )


def compare(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int = 5, warmup: int = 1, threads: int = 1
) -> Timings:
    """Time the candidates against each other.

    Each is called ``warmup`` times unmeasured, then ``repeats`` rounds are made in which every candidate runs once. PyTorch
    uses ``threads`` CPU threads throughout and gets its former number back; on a CUDA machine each run ends when the device
    has finished.

    Raises ``ValueError`` without candidates or with ``repeats`` below 1; what a candidate raises passes through.
    """
    if not candidates or repeats < 1:
        raise ValueError("compare needs at least one candidate and one repeat")
    runs: dict[str, list[float]] = {name: [] for name in candidates}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in candidates.values():
            for _ in range(warmup):
                call()
        for _ in range(repeats):
            for name, call in candidates.items():
                runs[name].append(_one_run(call))
    finally:
        torch.set_num_threads(before)
    return Timings(runs, threads)


def _one_run(call: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    call()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
