"""A stage's workers on Ray: placed, joined, asked to train, watched, ended.

A group is a placement group of actors that set torchrun's environment variables and call `stages.run_stage`;
Accelerate takes it from there. It starts in about 4 s and is reused by consecutive stages with equal resources.
"""

from __future__ import annotations

import fcntl
import functools
import ipaddress
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gradine.configs.schema import EnvironmentFault, Run, Stage, UserError, redacted
from gradine.pipeline import plan as planning
from gradine.pipeline.cluster import worker_environment
from gradine.pipeline.places import most_placeable, place, placed
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.watchdog import Hang, Lost, Stragglers, Watchdog, Witness, verdict
from gradine.stages.pulse import first_pulse, keep_record, last_stacks, look_at, look_back, memory_kills

T = TypeVar("T")
# What a scheduler or launcher around Ray leaves in the environment, and Accelerate would believe.
FOREIGN_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "PMI_RANK",
                 "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK")
RAYS_NAMES = re.compile(r"\s*(class_name|actor_id|pid|name|namespace|ip):")  # lines of its errors that help nobody
SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address
PROBE_S = 1.0  # to place those that a group could grow by: training goes on meanwhile
SECONDS_TO_ANSWER = 15.0  # for a worker's node that is asked what it sees of it: a process starts there
SECONDS_TO_LOOK_BACK = 6.0  # the same once a worker has died: its group waits to be started again
STOP_TO_GROW = signal.SIGUSR2  # unlike SIGTERM it ends no worker that is just between two stages
SECONDS_TO_END = 10.0  # for the other workers, once one has failed; one that hangs is ended by force


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
        import ray

        from gradine.stages.stopping import ignore_repeats, listen_to

        ignore_repeats()  # a node's SIGTERM and the driver's: whoever wants a quick end has ray.kill
        listen_to(STOP_TO_GROW)
        if interface := interface_of(ray.util.get_node_ip_address()):
            # else gloo takes the address that this host's name stands for: often loopback, of no use to other nodes
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without the = also eth01 for eth0
        for name in FOREIGN_RANKS:
            os.environ.pop(name, None)
        if workers > 1:  # LOCAL_RANK picks the GPU, and Ray shows each actor its own one alone
            os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(workers),
                              MASTER_ADDR=master[0], MASTER_PORT=str(master[1]))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def run_stage(self, *arguments: Any) -> Iterator[dict[str, Any]]:
        record = keep_record()
        yield first_pulse(record)  # before the imports, which take seconds the first time

        from gradine.stages.loop import run_stage

        yield from functools.partial(run_stage, pulses=True)(*arguments)

    def measure_formats(self, run: Run, stage: int) -> Iterator[dict[str, Any]]:
        record = keep_record()
        yield first_pulse(record)

        from gradine.stages.formats import measure

        yield from measure(run, stage, pulses=True)


def says_why(error: Exception) -> bool:
    """Whether a worker's error is more than the end of a connection to another one."""
    from gradine.stages.memory import OutOfMemory
    from gradine.stages.watch import NonFinite

    cause = getattr(error, "cause", None) or error
    return isinstance(cause, UserError | EnvironmentFault | NonFinite | OutOfMemory | Lost)


class HostMemory(Lost):
    """A worker was ended because its host ran out of memory."""


def send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended: whoever watches it tells why
        os.kill(pid, number)


def task_on(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a task on a node, however busy that is. -> its ref"""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    placed_there = On(node, soft=False)
    return task.options(scheduling_strategy=placed_there, runtime_env=worker_environment(1)).remote(*arguments)


def living_nodes() -> frozenset[str]:
    import ray

    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def whereabouts() -> tuple[str, int]:
    """(node, pid) of the Ray process that is asked."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def interface_of(address: str) -> str:
    """The network interface that has an address; "" if none, or if only Linux could tell."""
    if ":" in address:
        with suppress(OSError, ValueError):
            wanted = ipaddress.ip_address(address).exploded.replace(":", "")
            rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
            return next((row[-1] for row in rows if row[0] == wanted), "")
        return ""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, suppress(OSError):  # it may have no address
            answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


class Group:
    """A stage's workers: placed, joined, asked to train, ended. `run` is the run as this many workers train it."""

    def __init__(self, run: Run, stage: int, crowded: Callable[[str], None] = lambda _: None) -> None:
        self.placement, self.count = place(run.stages[stage], run.ray.group_timeout_s, crowded)
        self.run = planning.with_workers(run, stage, self.count)
        self.workers: list[Any] = []
        try:
            self.join_workers(self.run.stages[stage])
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
        limit_s = self.run.ray.group_timeout_s
        try:
            master = ray.get(self.workers[0].address.remote(), timeout=limit_s)
            ray.get([worker.join.remote(rank, setting.workers, master) for rank, worker in enumerate(self.workers)],
                    timeout=limit_s)
            self.places = self.call(whereabouts, timeout=limit_s)
            self.kills = dict(enumerate(self.call(memory_kills, timeout=limit_s)))
        except ray.exceptions.GetTimeoutError as error:
            raise Lost(f"a worker of {setting.resolution}px gave no answer while its group started, within "
                       f"ray.group_timeout_s={limit_s:g}: its node died, or it is frozen") from error

    def nodes(self) -> list[str]:
        """The address of each worker's node, by rank."""
        import ray

        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return [addresses.get(place[0], "gone") for place in self.places]

    def could_grow(self, stage: Stage) -> bool:
        """Whether there is room by now for more workers of `stage`, which is this group's as configured."""
        import ray

        nodes = ray.nodes()
        room = most_placeable(stage, nodes)
        if stage.placement == "STRICT_SPREAD":  # the probe is a group of its own, which may share a node with this one
            ours = {place[0] for place in self.places}
            room = self.count + most_placeable(stage, [node for node in nodes if node["NodeID"] not in ours])
        more = [count for count in planning.worker_counts(stage) if self.count < count <= room]
        if not more or not (probe := placed(stage, more[-1] - self.count, PROBE_S)):
            return False
        ray.util.remove_placement_group(probe)
        return True

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> list[Any]:
        """function(*arguments) in every worker; the answers by rank."""
        import ray

        return ray.get([worker.call.remote(function, *arguments) for worker in self.workers], timeout=timeout)

    def events(self, run: Run, stage: int, start: str | None, out: str, *more: Any,
               idle: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Rank 0's events of one stage, and alarms for ranks that lag; raises what any worker raised, or Hang.

        `idle` is called about once a second.
        """
        calls = [worker.run_stage.options(num_returns="streaming") for worker in self.workers]
        yield from self.heard([call.remote(run, stage, start, out, *more) for call in calls], run, stage, out, idle)

    def formats(self, run: Run, stage: int, out: str, idle: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """What stages/formats.py measures; watched, and raising, like the stage's own steps."""
        calls = [worker.measure_formats.options(num_returns="streaming") for worker in self.workers]
        yield from self.heard([call.remote(run, stage) for call in calls], run, stage, out, idle)

    def heard(self, calls: list[Any], run: Run, stage: int, out: str, idle: Callable[[], None]
              ) -> Iterator[dict[str, Any]]:
        """The events of one streaming call per rank."""
        import ray

        streams = {call: rank for rank, call in enumerate(calls)}
        self.watchdog = Watchdog(run.ray, len(streams), time.monotonic())
        stragglers = Stragglers(len(streams), run.stages[stage].resolution, self.nodes)
        while streams:
            if ray.wait([*streams], num_returns=1, timeout=1.0)[0]:
                # Of each rank one: the pulses of the others do not wait behind the many events of rank 0.
                for stream in ray.wait([*streams], num_returns=len(streams), timeout=0)[0]:
                    try:
                        event = ray.get(next(stream))
                    except StopIteration:
                        self.watchdog.ended(streams.pop(stream))
                    except Exception as error:
                        reason = self.named(error, streams.pop(stream))
                        raise (yield from self.last_words(reason, streams)) from error
                    else:
                        self.watchdog.heard(streams[stream], event)
                        of_us = event["event"] == "pulse"
                        yield from stragglers.heard(streams[stream], event["windows"]) if of_us else [event]
            idle()
            if doubt := self.watchdog.doubt(time.monotonic()):
                self.refuse_hang(doubt, out)

    def refuse_hang(self, doubt: str, out: str) -> None:
        """Ends the workers and raises Hang; what is known of each rank is then in crashes/hang/<n> of folder `out`.

        Where there is no more than a doubt, only if a worker's process is found stopped.
        """
        waited_s = self.watchdog.still
        witnesses = self.witnesses()
        if doubt == "look" and not any(one.stopped for one in witnesses):
            return
        stacks: dict[int, str] = {}
        for stopped in (False, True):  # these last: they must run on to write theirs, and then so would the others
            stacks |= self.beside(last_stacks, {one.rank: (one.pid, self.watchdog.records[one.rank])
                                                for one in witnesses if one.sight and one.stopped == stopped
                                                and self.watchdog.records[one.rank]})
        folder = RunDir(out).numbered("crashes/hang")
        with suppress(OSError):  # a disk that is full is no reason to let them hang
            folder.mkdir(parents=True)
            for one in witnesses:
                told = replace(one, stacks=stacks.get(one.rank, "")).testimony(waited_s)
                (folder / f"rank-{one.rank}.txt").write_text(redacted(told))
        raise Hang(f"no step for {waited_s:.0f} s: {verdict(waited_s, witnesses)}; stacks in "
                   f"{folder.relative_to(RunDir(out).path)}")

    def witnesses(self) -> list[Witness]:
        """What is seen of each worker from outside, on its node."""
        sights = self.beside(look_at, {rank: (pid, self.watchdog.records[rank])
                                       for rank, (_, pid) in enumerate(self.places)})
        nodes = self.nodes()
        return [Witness(rank, nodes[rank], pid, sights.get(rank)) for rank, (_, pid) in enumerate(self.places)]

    def beside(self, function: Callable[..., T], arguments: dict[int, tuple[Any, ...]],
               patience_s: float = SECONDS_TO_ANSWER) -> dict[int, T]:
        """function(*arguments[rank]) on each rank's node, but not in its worker; the answers that came in time."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        local = [rank for rank in arguments if self.places[rank][0] == here]
        asked = {task_on(self.places[rank][0], function, *arguments[rank]): rank for rank in arguments.keys() - local}
        answers = {rank: function(*arguments[rank]) for rank in local}
        if asked:
            ready, silent = ray.wait([*asked], num_returns=len(asked), timeout=patience_s)
            for ref in ready:
                with suppress(Exception):  # its node is gone
                    answers[asked[ref]] = ray.get(ref)
            for ref in silent:
                ray.cancel(ref, force=True)
        return answers

    def named(self, error: Exception, rank: int) -> Exception:
        """A worker's error; where its process ended, one that says which, and what it was at."""
        from ray.exceptions import RayActorError

        if not isinstance(error, RayActorError):
            return error
        node, pid = self.places[rank]
        of_rank = {rank: (pid, self.watchdog.records[rank])}
        told = self.beside(look_back, of_rank, SECONDS_TO_LOOK_BACK) if node in living_nodes() else {}
        sight, kills = told.get(rank, (None, None))
        at = f", at {'; '.join(map(str, sight.lines))}" if sight and sight.lines else ""
        who = f"rank {rank} (node {self.nodes()[rank]}, pid {pid})"
        text = " ".join(line.strip() for line in str(error).splitlines() if not RAYS_NAMES.match(line))
        by_the_kernel = kills is not None and kills > (self.kills[rank] or 0)
        if by_the_kernel or "low on memory" in text:  # so Ray says when it ends one itself
            return HostMemory(f"{who} was ended because its host ran out of memory{at}: {text}")
        return Lost(f"{who} died{at}: {text}")

    def last_words(self, error: Exception, others: dict[Any, int]) -> Generator[dict[str, Any], None, Exception]:
        """The events until the other workers have ended too, a save under way with them; then what ended the stage.

        A worker may only have met the broken connection of the one that it happened to.
        """
        import ray

        until = time.monotonic() + SECONDS_TO_END
        while others and (left := until - time.monotonic()) > 0:
            ready, _ = ray.wait([*others], num_returns=1, timeout=left)
            for stream in ready:
                try:
                    event = ray.get(next(stream))
                except StopIteration:
                    del others[stream]
                except Exception as another:
                    another = self.named(another, others.pop(stream))
                    error = another if says_why(another) and not says_why(error) else error
                else:
                    yield from [event] if event["event"] != "pulse" else []
        return error

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        """A signal to one worker, on this node if there is one; it tells the others: all end after the same step."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        node, pid = next((place for place in self.places if place[0] == here), self.places[0])
        if node == here:
            send_signal(pid, number)
        else:
            task_on(node, send_signal, pid, number)

    def end(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        ray.util.remove_placement_group(self.placement)
