"""Memory that runs out is told from other errors, and a smaller micro-batch computes the same."""

from __future__ import annotations

import errno
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradine.configs.schema import EnvironmentFault, Run, Stage, UserError, check_shares, from_dict, load
from gradine.pipeline.plan import memory_gb
from gradine.stages import memory
from gradine.stages.loop import initial_state
from gradine.stages.memory import LiveBytes, OutOfMemory, allocator_error, out_of_memory_named, smaller_micro_batch
from gradine.stages.step import Rules, train_step
from gradine.stages.trial import first_moment, noise, step_memory_gb

CPU = torch.device("cpu")

# Provokes what a process meets that has almost no address space left: by headroom in MB, from a plain allocation to
# whole training steps. Prints `recognised|type|text` for each error.
PROVOKE = """
import resource, sys
import numpy as np, torch
from gradine.stages.memory import allocator_error
torch.set_num_threads(1)
image, conv = torch.randn(8, 16, 128, 128), torch.nn.Conv2d(16, 16, 3, padding=1)

def step():
    x = image.clone().requires_grad_()
    for _ in range(40):
        x = torch.nn.functional.leaky_relu(conv(x))
    (gradient,) = torch.autograd.grad(x.sum(), conv.weight, create_graph=True)
    gradient.square().sum().backward()

attempts = [(0, lambda: bytearray(1 << 28)), (0, lambda: np.ones(1 << 28)), (0, lambda: torch.ones(1 << 28)),
            *((headroom, step) for headroom in (1, 2, 4, 16, 64))]
for headroom, attempt in attempts:
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (headroom << 20), resource.RLIM_INFINITY))
    try:
        attempt()
        found = None
    except Exception as error:
        found = error
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("nothing" if found is None else f"{allocator_error(found)}|{type(found).__name__}|{str(found)!r}")
    found = None
"""


def stage_of(batch: int, workers: int = 1, micro: int = 0) -> Stage:
    return Stage(resolution=8, batch_size=batch, workers=workers, micro_batch=micro)


def is_valid(stage: Stage) -> bool:
    try:
        check_shares(stage)
    except UserError:
        return False
    return True


def test_the_next_smaller_micro_batch_is_the_largest_that_the_schema_accepts() -> None:
    tried = 0
    for batch, workers in itertools.product(range(1, 97), range(1, 9)):
        if not is_valid(stage_of(batch, workers)):
            continue
        valid = [micro for micro in range(1, batch + 1) if is_valid(stage_of(batch, workers, micro))]
        for present in valid:
            below = [micro for micro in valid if micro < present]
            assert smaller_micro_batch(stage_of(batch, workers, present)) == (max(below) if below else None)
        assert smaller_micro_batch(stage_of(batch, workers)) == smaller_micro_batch(
            stage_of(batch, workers, batch // workers))  # 0 is the whole share
        tried += len(valid)
    assert tried > 150


def test_by_hand_a_share_of_48_goes_down_to_one_group() -> None:
    chain, micro = [], 48
    while micro:
        chain.append(micro)
        micro = smaller_micro_batch(stage_of(96, 2, micro)) or 0
    assert chain == [48, 24, 16, 12, 8, 4]
    assert smaller_micro_batch(stage_of(2)) is None  # one group of two


@pytest.mark.fault
def test_f22_what_an_allocator_says_is_recognised() -> None:
    """RLIMIT_AS leaves a real process 0 to 64 MB for numpy, plain tensors and steps with a double backward."""
    out = subprocess.run([sys.executable, "-c", PROVOKE], capture_output=True, text=True, check=True, timeout=120)
    lines = out.stdout.splitlines()
    assert len(lines) == 8
    assert {line.partition("|")[0] for line in lines} == {"True"}, out.stdout
    kinds = {line.split("|")[1] for line in lines}
    assert {"MemoryError", "RuntimeError"} <= kinds
    assert "DefaultCPUAllocator" in out.stdout


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("could not create a primitive"),
    RuntimeError("std::bad_alloc"), OutOfMemory("no memory", 4)])
def test_a_gpus_allocator_and_the_kernel_libraries_are_recognised(error: Exception) -> None:
    assert allocator_error(error)


@pytest.mark.parametrize("error", [
    RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), RuntimeError("shared memory is exhausted"),
    RuntimeError(), OSError(errno.ENOMEM, "Cannot allocate memory"), ValueError("CUDA out of memory"),
    KeyboardInterrupt(), EnvironmentFault("stage failed before: CUDA out of memory")])
def test_look_alikes_are_none(error: BaseException) -> None:
    assert not allocator_error(error)


@pytest.mark.parametrize("mistake", [
    lambda: torch.randn(2) @ torch.randn(3), lambda: torch.empty(-1), lambda: torch.empty(1 << 40, 1 << 40),
    lambda: torch.randn(2).view(3), lambda: torch.nn.Conv2d(3, 3, 3)(torch.randn(1, 4, 8, 8))])
def test_torchs_other_errors_are_none(mistake: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as raised:
        mistake()
    assert not allocator_error(raised.value)


def test_out_of_memory_names_the_stage_and_its_micro_batch_and_survives_pickling() -> None:
    with pytest.raises(OutOfMemory) as raised, out_of_memory_named(stage_of(16, 2)):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (type(copy), str(copy), copy.micro_batch) == (OutOfMemory, str(raised.value), 8)
    assert "stage 8px: no memory for a micro-batch of 8: [enforce fail] DefaultCPUAllocator" in str(copy)
    with pytest.raises(OutOfMemory, match="^first$"), out_of_memory_named(stage_of(16)):  # named once, by the innermost
        raise OutOfMemory("first", 4)


def test_other_errors_pass_unchanged() -> None:
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError) as raised, out_of_memory_named(stage_of(16)):
        raise error
    assert raised.value is error


@pytest.mark.fault
@pytest.mark.parametrize("micro", [8, 4])
def test_f22_a_halved_micro_batch_keeps_the_gradients_of_the_global_batch(micro: int) -> None:
    """The micro-batch of a real step is halved, then halved again; the oracle is the batch in one piece."""
    run = from_dict({"name": "x", "data": {"source": "-", "shards": "-"},
                     "network": {"latent_size": 16, "fmap_base": 128, "fmap_max": 16},
                     "stages": [{"resolution": 4}, {"resolution": 8, "batch_size": 16, "micro_batch": 16}]})
    whole = gradients(run)
    smaller = replace(run.stages[1], micro_batch=run.stages[1].micro_batch)
    while smaller.micro_batch > micro:
        smaller = replace(smaller, micro_batch=smaller_micro_batch(smaller))
    assert (smaller.micro_batch, smaller.batch_size) == (micro, 16)
    split = gradients(replace(run, stages=[run.stages[0], smaller]))
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Both networks' gradients of one step on one fixed global batch, cut up as the stage says."""
    state = initial_state(run, 1, None, CPU, None)
    (batch,) = noise(replace(run, stages=[run.stages[0], replace(run.stages[1], micro_batch=16)]), 1, 0, 1)
    # rows n, n + M, n + 2M, n + 3M are one group (M = 4): micro-batches take whole groups in turn
    per_pass = run.stages[1].micro_batch // 4
    rows = [[member * 4 + group for member in range(4) for group in range(low, low + per_pass)]
            for low in range(0, 4, per_pass)]
    shares = [batch.each(lambda tensor, own=own: tensor[own]) for own in rows]
    moment = replace(first_moment(run, 1), learning_rate=0.0)  # or D's update would come before G's gradients
    train_step(state, shares, moment, Rules.of(run, 16, 1))
    return {f"{role}.{name}": parameter.grad.clone() for role in ("generator", "discriminator")
            for name, parameter in getattr(state, role).named_parameters() if parameter.grad is not None}


def test_the_room_of_a_process_ends_at_its_own_limit() -> None:
    code = """
import resource, torch
from gradine.stages.memory import room_gb
free = room_gb(torch.device("cpu"))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), resource.RLIM_INFINITY))
print(free, room_gb(torch.device("cpu")))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    free, limited = map(float, out.split())
    assert 0 < limited <= (64 << 20) / 1e9 < free


def test_the_tightest_limit_among_a_process_s_cgroups_counts(tmp_path: Path) -> None:
    def group(folder: Path, limit: str, used: int, given_back: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {given_back}\n")

    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/pod/container\n")
    group(root / "pod", "5000", 2000, 500)
    group(root / "pod" / "container", "max", 1500, 0)
    assert memory._cgroup_room(root, own) == 3500
    group(root / "pod" / "container", "2000", 1500, 100)
    assert memory._cgroup_room(root, own) == 600
    assert memory._cgroup_room(tmp_path / "none", own) == float("inf")
    assert memory._cgroup_room(root, tmp_path / "none") == float("inf")


def at(resolution: int, batch: int, precision: str, recompute_from: int = 0, *more: str) -> tuple[Run, int]:
    """The full recipe, cut at a resolution, on a CPU; and the index of that stage."""
    run = load("celebahq1024", ["data.source=none", "stages.*.gpus=0", f"training.precision={precision}",
                                f"training.recompute_from={recompute_from}", *more])
    index = [stage.resolution for stage in run.stages].index(resolution)
    return replace(run, stages=[replace(stage, batch_size=batch) for stage in run.stages[:index + 1]]), index


def allocated_gb(run: Run, stage: int) -> float:
    """What torch's own allocator gave out at the peak of two real steps, networks and all, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        state, shares = initial_state(run, stage, None, CPU, None), noise(run, stage, 0, 1)
        rules = Rules.of(run, run.stages[stage].batch_size, 1, run.training.precision)
        for _ in range(2):
            train_step(state, shares, first_moment(run, stage), rules)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 1e9


@pytest.mark.parametrize(("resolution", "precision", "recompute_from"), [
    (64, "float32", 0), (64, "bfloat16", 32), (128, "float32", 32), (128, "bfloat16", 0)])
def test_the_count_of_a_steps_memory_is_what_the_allocator_gives_out(resolution: int, precision: str,
                                                                     recompute_from: int) -> None:
    run, stage = at(resolution, 4, precision, recompute_from, "network.fmap_base=1024", "network.fmap_max=32")
    assert step_memory_gb(run, stage) == pytest.approx(allocated_gb(run, stage), rel=0.15)


def test_by_hand_storages_count_in_whole_blocks_while_they_live_and_views_do_not() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)  # 400 bytes
        kept = first[:50].view(5, 10)
        second = first + 1
        assert (live.held, live.peak) == (1024, 1024)
        del second
        third = torch.zeros(1000, dtype=torch.float64)  # 8,000 bytes: 16 blocks
        del first
        assert (live.held, live.peak) == (512 + 8192, 512 + 8192)
        del kept, third
        assert (live.held, live.peak) == (0, 512 + 8192)


def test_the_full_width_step_at_1024px_fits_in_12_gb() -> None:
    assert step_memory_gb(*at(1024, 4, "bfloat16")) < 12
    assert step_memory_gb(*at(1024, 4, "float32", 128)) < 12


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("resolution", "batch", "recompute_from"), [
    (4, 128, 0), (32, 64, 0), (256, 8, 0), (256, 8, 64)])
def test_the_plans_estimate_is_within_a_quarter_of_the_count(resolution: int, batch: int, recompute_from: int,
                                                              precision: str) -> None:
    run, stage = at(resolution, batch, precision, recompute_from)
    assert memory_gb(run, run.stages[stage]) == pytest.approx(step_memory_gb(run, stage), rel=0.25)
