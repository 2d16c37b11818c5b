"""F21: a host without memory, where the kernel ends a worker: a real memory cgroup, met by a real allocation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradine.configs.schema import Run, load
from gradine.pipeline import driver, plan
from gradine.stages.pulse import memory_kills
from tests.injected import Injected, meanwhile
from tests.test_faults_runs import bits, events, injected, unbroken, unmeasured  # noqa: F401 (fixtures)

pytestmark = pytest.mark.fault
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@pytest.fixture
def cage() -> Iterator[Callable[[int], None]]:
    """Puts a process into a cgroup where 300 MB more than nothing is too much."""
    root, limit = (V1, "memory.limit_in_bytes") if V1.is_dir() else (V2, "memory.max")
    folder = root / f"gradine-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(300 << 20))
    except OSError as error:
        why = f"no memory cgroup can be made here ({error}); it takes root and the memory controller"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    yield lambda pid: (folder / "cgroup.procs").write_text(str(pid)) and None
    folder.rmdir()


GREEDY = '''
@before_steps
def eat(state, shares, seen):
    if seen == 120 and rank() == 1 and first("eaten"):
        hold("hungry")
        bytearray(b"x") * (400 << 20)
'''


def test_f21_a_worker_ended_by_the_kernel_for_memory_is_told_and_goes_on_with_less_ahead_to_the_same_bits(
        unbroken: Any, tiny_run: Callable[..., Run], injected: Injected, unmeasured: None,  # noqa: F811
        cage: Callable[[int], None]) -> None:
    """One of two workers meets the limit of a memory cgroup in a fade, and the kernel ends it"""
    injected.add(GREEDY)
    run = tiny_run({"tick_images": 8, "stages.*.workers": 2, "stages.*.cpus": 0.5, "name": "hungry"})

    def starve() -> None:
        cage(injected.reached("hungry"))
        injected.let_go("hungry")

    kills = memory_kills()
    assert kills is not None
    with meanwhile(starve):
        folder = driver.train(run, shard_if_needed=False)
    assert memory_kills() > kills  # the oracle: it was the kernel
    (retry,), (less,) = events(folder, "retry"), events(folder, "less_ahead")
    assert "rank 1" in retry["reason"]
    assert "its host ran out of memory" in retry["reason"]
    assert "out of memory" in less["reason"]
    kept = load(folder.config)
    assert (kept.data.prefetch, kept.checkpoints.background) == (1, False)
    assert bits(folder) == bits(unbroken)
    again = plan.within_memory(run, folder.lines("ledger.jsonl"))  # the same command, given the old settings again
    assert (again.data.prefetch, again.checkpoints.background) == (1, False)
