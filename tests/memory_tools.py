"""Memory as it is taken, to compare plans with."""

from __future__ import annotations

from collections.abc import Callable

import torch


def measured_peak(work: Callable[[], object]) -> int:
    """Bytes that the CPU's allocator gave at most, as the profiler saw it: kernels' own memory included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak
