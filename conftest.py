"""How the suite runs notebooks: one thread each, a limit on their time, and a closing table."""

import os
import time
from collections import defaultdict
from pathlib import Path
from queue import Empty

import nb
import pytest
from nbval.kernel import RunningKernel

os.environ.update(nb.KERNEL_ENV)
_await_reply = RunningKernel.await_reply


def _await_reply_while_alive(self, msg_id, timeout=None):
    """nbval waits out the whole cell timeout for a kernel that has died; this looks every second and says so."""
    end = time.monotonic() + (float(timeout) if timeout else float("inf"))
    while True:
        try:
            return _await_reply(self, msg_id, timeout=1)
        except Empty:
            if not self.is_alive():
                raise RuntimeError("the kernel died (out of memory?)") from None
            if time.monotonic() > end:
                raise


RunningKernel.await_reply = _await_reply_while_alive
_spent = defaultdict(float)
_started = time.monotonic()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if item.path.suffix != ".ipynb":
        return
    limit = nb.seconds_allowed(item.path)
    before = _spent[item.path]
    _spent[item.path] += call.duration
    if before <= limit < _spent[item.path] and report.passed:
        report.outcome = "failed"
        report.longrepr = f"{item.path.name} has run for {_spent[item.path]:.0f} s; {limit} s are allowed"


def pytest_terminal_summary(terminalreporter):
    reports = [report for some in terminalreporter.stats.values() for report in some if hasattr(report, "nodeid")]
    _faults_line(terminalreporter, reports)
    seconds = defaultdict(float)
    for report in reports:
        path = report.nodeid.split("::")[0]
        if path.endswith(".ipynb"):
            seconds[path] += getattr(report, "duration", 0.0)
    if not seconds:
        return
    terminalreporter.section("notebooks, slowest first")
    for path, spent in sorted(seconds.items(), key=lambda item: -item[1])[:10]:
        terminalreporter.write_line(f"{spent:7.1f} s  {Path(path)}")
    wall, total = time.monotonic() - _started, sum(seconds.values())
    terminalreporter.write_line(
        f"wall time {wall:.0f} s; all {len(seconds)} notebooks by themselves {total:.0f} s; ratio {wall / total:.2f}"
    )


def _faults_line(terminalreporter, reports):
    called = [report for report in reports if getattr(report, "when", "") == "call"]  # the teardown repeats it
    found = [value for report in called for key, value in report.user_properties if key == "faults"]
    if found:
        planted, caught = (sum(column) for column in zip(*found, strict=True))
        terminalreporter.section("planted faults")
        terminalreporter.write_line(f"{planted} planted in copies of real notebooks, {caught} caught")
