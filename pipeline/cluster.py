"""Ray: one of our own or the cluster's, and the worker groups on it.

A worker group is a placement group of actors that set torchrun's environment variables and call `stages.run_stage`;
Accelerate takes it from there. A group starts in about 4 s and is reused by consecutive stages with equal resources.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradine
from gradine.configs.schema import EnvironmentFault, Run, Stage, UserError
from gradine.pipeline.plan import Plan

SECONDS_TO_END = 10.0  # for the other workers, once one has failed; one that hangs is ended by force


@contextmanager
def connected(run: Run) -> Iterator[dict[str, float]]:
    """A Ray to work on: the cluster at ray.address or RAY_ADDRESS, else one of our own, ended at exit. -> resources."""
    address = run.ray.address or os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address and "ray" not in sys.modules:  # Ray reads these when it is imported
        # A token that never touches the disk: Ray's control service listens on all interfaces.
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    if ray.is_initialized():  # by a test, or a notebook
        yield ray.cluster_resources()
        return
    if address:
        try:
            refuse_silence(address)
            ray.init(address=address, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(f"no Ray cluster at ray.address={address!r}: {' '.join(str(error).split())[:200]}. "
                                   "Start one, or leave ray.address empty for a Ray of our own.") from error
    else:
        cpus = max(stage.workers * stage.cpus for stage in run.stages) + run.evaluation.cpus
        try:
            ray.init(address="local", num_cpus=max(math.ceil(cpus), os.cpu_count() or 1), include_dashboard=False,
                     log_to_driver=False, configure_logging=False, object_store_memory=200 << 20)
        except (OSError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(f"no Ray could be started here: {' '.join(str(error).split())[:200]}") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def refuse_silence(address: str) -> None:
    """OSError if nothing answers at host:port; Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def worker_environment(threads: int) -> dict[str, Any]:
    """What a Ray process needs to import this very gradine and keep to its threads."""
    root = str(Path(gradine.__file__).absolute().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path,
                   "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what training.deterministic needs on a GPU
    # A cluster job brings its own working directory; only a Ray on this machine can use this machine's path.
    import ray

    if ray.is_initialized() and ray.get_runtime_context().runtime_env.get("working_dir"):
        del environment["PYTHONPATH"]
    return {"env_vars": environment}


def refuse_unplaceable(run: Run, plan: Plan, resources: dict[str, float]) -> None:
    """UserError now for a stage or an evaluation that this cluster can never place, not in the night."""
    for stage in (run.stages[i] for i in plan.stages):
        for kind, each in (("CPU", stage.cpus), ("GPU", stage.gpus)):
            wanted, there = stage.workers * each, resources.get(kind, 0)
            if wanted > there:
                raise UserError(f"stage {stage.resolution}px asks for {wanted:g} {kind}s ({stage.workers} workers of "
                                f"{each:g}), Ray has {there:g}. Lower stages.<n>.workers or .{kind.lower()}s.")
    beside = max((stage.workers * stage.gpus for stage in run.stages), default=0) if run.evaluation.when != "end" else 0
    for kind, wanted, taken in (("CPU", run.evaluation.cpus, 0), ("GPU", run.evaluation.gpus, beside)):
        if wanted and wanted + taken > resources.get(kind, 0):
            raise UserError(f"evaluation.{kind.lower()}s={wanted:g} does not fit beside the training's {taken:g}: "
                            f"Ray has {resources.get(kind, 0):g}. Lower it, or set evaluation.when=end.")


class Worker:
    """A Ray actor: one Accelerate process of a stage's group."""

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it, for the group's rendezvous."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, rank: int, workers: int, master: tuple[str, int]) -> None:
        """What torchrun would set; a group of one needs none of it."""
        from gradine.stages.stopping import ignore_repeats

        ignore_repeats()  # a node's SIGTERM and the driver's: whoever wants a quick end has ray.kill
        if workers > 1:  # LOCAL_RANK picks the GPU, and Ray shows each actor its own one alone
            os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(workers),
                              MASTER_ADDR=master[0], MASTER_PORT=str(master[1]))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def run_stage(self, *arguments: Any) -> Iterator[dict[str, Any]]:
        from gradine.stages.loop import run_stage

        yield from run_stage(*arguments)


def says_why(error: Exception) -> bool:
    """Whether a worker's error is more than the end of a connection to another one."""
    from ray.exceptions import RayActorError

    from gradine.stages.memory import OutOfMemory
    from gradine.stages.watch import NonFinite

    cause = getattr(error, "cause", None) or error
    return isinstance(cause, UserError | EnvironmentFault | NonFinite | OutOfMemory | RayActorError)


def terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def terminate_on(node: str, pid: int) -> Any:
    """SIGTERM to a process of another node, by a task there. -> its ref"""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    task = ray.remote(num_cpus=0)(terminate)
    return task.options(scheduling_strategy=On(node, soft=False), runtime_env=worker_environment(1)).remote(pid)


def whereabouts() -> tuple[str, int]:
    """(node, pid) of the Ray process that is asked."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


class Group:
    """A stage's workers: placed, joined, asked to train, ended."""

    def __init__(self, run: Run, stage: int) -> None:
        import ray

        setting = run.stages[stage]
        bundle = {"CPU": setting.cpus, "GPU": setting.gpus}
        self.placement = ray.util.placement_group([{k: v for k, v in bundle.items() if v} or {"CPU": 0.001}]
                                                  * setting.workers, strategy="PACK")
        if not self.placement.wait(run.ray.group_timeout_s):
            ray.util.remove_placement_group(self.placement)
            raise EnvironmentFault(f"stage {setting.resolution}px: {setting.workers} workers could not be placed "
                                   f"within ray.group_timeout_s={run.ray.group_timeout_s:g}. Is the cluster busy?")
        self.workers: list[Any] = []
        try:
            self.join_workers(setting)
        except BaseException:
            self.end()  # or its places would stay taken
            raise

    def join_workers(self, setting: Stage) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Placed

        actor = ray.remote(num_cpus=setting.cpus, num_gpus=setting.gpus, max_restarts=0)(Worker)
        environment = worker_environment(setting.threads)
        self.workers = [
            actor.options(scheduling_strategy=Placed(self.placement, index), runtime_env=environment).remote()
            for index in range(setting.workers)]
        master = ray.get(self.workers[0].address.remote())
        ray.get([worker.join.remote(rank, setting.workers, master) for rank, worker in enumerate(self.workers)])
        self.places = self.call(whereabouts)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(*arguments) in every worker; the answers by rank."""
        import ray

        return ray.get([worker.call.remote(function, *arguments) for worker in self.workers])

    def events(self, *arguments: Any, idle: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Rank 0's events of one stage; raises what any worker raised. `idle` is called about once a second."""
        import ray

        streams = [worker.run_stage.options(num_returns="streaming").remote(*arguments) for worker in self.workers]
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, timeout=1.0)
            for stream in ready:
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    streams.remove(stream)
                except Exception as error:
                    streams.remove(stream)
                    raise (yield from self.last_words(error, streams)) from error
            idle()

    def last_words(self, error: Exception, others: list[Any]) -> Generator[dict[str, Any], None, Exception]:
        """The events until the other workers have ended too, a save under way with them; then what ended the stage.

        A worker may only have met the broken connection of the one that it happened to.
        """
        import ray

        until = time.monotonic() + SECONDS_TO_END
        while others and (left := until - time.monotonic()) > 0:
            ready, _ = ray.wait(others, num_returns=1, timeout=left)
            for stream in ready:
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    others.remove(stream)
                except Exception as another:
                    others.remove(stream)
                    error = another if says_why(another) and not says_why(error) else error
        return error

    def ask_to_stop(self) -> None:
        """SIGTERM to one worker, on this node if there is one; it tells the others: all end after the same step."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        node, pid = next((place for place in self.places if place[0] == here), self.places[0])
        if node == here:
            terminate(pid)
        else:
            terminate_on(node, pid)

    def end(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        ray.util.remove_placement_group(self.placement)


def one_line(error: Exception, stop_for: tuple[type[Exception], ...] = (UserError, EnvironmentFault)) -> str:
    """What went wrong, for the ledger. What a worker raised of `stop_for` is raised here: a retry would meet it."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised, with its whole traceback as text
    if stop_for and isinstance(cause, stop_for):
        raise type(cause)(str(cause)) from error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:300]
