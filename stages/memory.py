"""Memory that runs out: which errors say so, how much there is and is taken, and the next smaller micro-batch.

A smaller micro-batch costs time and changes nothing else: the global batch and its stddev groups stay whole (growth).
GB are 1e9 bytes.
"""

from __future__ import annotations

import gc
import os
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradine.configs.schema import EnvironmentFault, Stage
from gradine.stages import growth

# What torch and the libraries below it say in a plain RuntimeError; CUDA's own allocator has a class for it.
ALLOCATORS_SAY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
                  "CUDA out of memory", "CUDA error: out of memory", "HIP out of memory", "HIP error: out of memory",
                  "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
# Nothing but these words: oneDNN, seen where it found no memory for a kernel's code; a failed `new` inside torch.
# With more words ("... primitive descriptor for ...") oneDNN means something else.
NOTHING_BUT = ("could not create a primitive", "std::bad_alloc")


BLOCK = 512  # bytes: what CUDA's allocator rounds up to


class LiveBytes(TorchDispatchMode):
    """Inside its `with`: the bytes of all storages made there and still alive, as CUDA's allocator counts them.

    Counts tensors without data (FakeTensorMode) like others. What a kernel takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self.count(made.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        where, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if where not in self.known:
            self.known.add(where)
            weakref.finalize(storage, self.forget, where, size)
            self.held += size
            self.peak = max(self.peak, self.held)

    def forget(self, where: int, size: int) -> None:
        self.known.remove(where)
        self.held -= size


class OutOfMemory(RuntimeError):
    """A worker's allocator had no more. Picklable; `micro_batch` is the number of images it went through with."""

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message, micro_batch)
        self.micro_batch = micro_batch

    def __str__(self) -> str:
        return str(self.args[0])


def allocator_error(error: BaseException) -> bool:
    """Whether `error` says that memory ran out in this process, on the host or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, EnvironmentFault):
        return False
    text = str(error)
    return text.strip() in NOTHING_BUT or any(words in text for words in ALLOCATORS_SAY)


@contextmanager
def out_of_memory_named(stage: Stage) -> Iterator[None]:
    """Turns an allocator's error inside the `with` into OutOfMemory with the stage's micro-batch."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not allocator_error(error):
            raise
        micro = stage.micro_batch or stage.batch_size // stage.workers
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise OutOfMemory(f"stage {stage.resolution}px: no memory for a micro-batch of {micro}: {said}",
                          micro) from error


def smaller_micro_batch(stage: Stage) -> int | None:
    """The largest micro-batch below the present one: whole stddev groups that divide a worker's share; None: none."""
    share, group = stage.batch_size // stage.workers, growth.group_size(stage.batch_size)
    present = stage.micro_batch or share
    return max((micro for micro in range(group, present, group) if share % micro == 0), default=None)


def room_gb(device: torch.device) -> float:
    """What this process may still take: of the GPU, or of the host within its cgroup's and its own limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return min(_host_room(), _cgroup_room(), _address_space_room()) / 1e9


def _host_room() -> float:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_room(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The tightest limit from this process's cgroup (v2) up to the root; a container sees its own as the root."""
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return float("inf")
    here, room = root / path.strip("/"), float("inf")
    for folder in (here, *here.parents):
        try:
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if limit != "max":  # pages of files not lately used are given back on demand
                room = min(room, int(limit) - int(used) + int(counts.get("inactive_file", 0)))
        except (OSError, ValueError):
            pass
        if folder == root:
            break
    return max(0.0, room)


def _address_space_room() -> float:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        taken = 0
    return max(0.0, limit - taken)


def forget(device: torch.device) -> None:
    """Gives memory back that nothing holds, and forgets the peak: what comes next has one of its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or not allowed: the peak is then that of all the process did
            Path("/proc/self/clear_refs").write_text("5")
