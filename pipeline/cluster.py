"""Ray: one of our own or the cluster's, and the worker groups on it.

A worker group is a placement group of actors that set torchrun's environment variables and call `stages.run_stage`;
Accelerate takes it from there. A group starts in about 4 s and is reused by consecutive stages with equal resources.
"""

from __future__ import annotations

import fcntl
import functools
import ipaddress
import math
import os
import re
import secrets
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gradine
from gradine.configs.schema import EnvironmentFault, Run, Stage, UserError, redacted, require
from gradine.pipeline import plan as planning
from gradine.pipeline.plan import Plan
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.watchdog import Hang, Lost, Stragglers, Watchdog, Witness, verdict
from gradine.stages.pulse import first_pulse, keep_record, last_stacks, look_at

T = TypeVar("T")
# What a scheduler or launcher around Ray leaves in the environment, and Accelerate would believe.
FOREIGN_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "PMI_RANK",
                 "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK")
RAYS_NAMES = re.compile(r"\s*(class_name|actor_id|pid|name|namespace|ip):")  # lines of its errors that help nobody
SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address
PLACING_S = 5.0  # to place so many workers before fewer are tried
PROBE_S = 1.0  # to place those that a group could grow by: training goes on meanwhile
SECONDS_TO_ANSWER = 15.0  # for a worker's node that is asked what it sees of it: a process starts there
STOP_TO_GROW = signal.SIGUSR2  # unlike SIGTERM it ends no worker that is just between two stages
SECONDS_TO_END = 10.0  # for the other workers, once one has failed; one that hangs is ended by force


@contextmanager
def connected(run: Run) -> Iterator[dict[str, float]]:
    """A Ray to work on: the cluster at ray.address or RAY_ADDRESS, else one of our own, ended at exit. -> resources."""
    address = run.ray.address or os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # by a test, or a notebook
        yield sys.modules["ray"].cluster_resources()
        return
    refuse_open(address, run.ray.trust_network)
    if not address and "ray" not in sys.modules:  # Ray reads these when it is imported
        # A token that never touches the disk: Ray's control service listens on all interfaces.
        if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    if address:
        try:
            refuse_silence(address)
        except OSError as error:
            raise EnvironmentFault(f"no Ray cluster at ray.address={address!r}: {error}. "
                                   "Start one, or leave ray.address empty for a Ray of our own.") from error
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise EnvironmentFault(f"the Ray cluster at ray.address={address!r} does not let us join: "
                                   f"{' '.join(str(error).split())[:200]}. Is that the port of its control service, "
                                   "and its token the one in RAY_AUTH_TOKEN or the file of RAY_AUTH_TOKEN_PATH?"
                                   ) from error
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
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def refuse_open(address: str, trusted: bool) -> None:
    """UserError for a Ray without a token that others may reach: whoever does can run anything on its nodes."""
    if address:
        host = address.removeprefix("ray://").rpartition(":")[0].strip("[]")
        require(take_token() or trusted or host == "localhost" or is_loopback(host),
                f"the Ray cluster at {address} is joined without a token, and reaches beyond this machine. Set "
                "RAY_AUTH_MODE=token and its token on all nodes and here, or ray.trust_network=true if nobody else "
                "reaches that network.")
    elif os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        require(trusted, "RAY_AUTH_MODE=disabled: the control service of a Ray started here listens on all interfaces, "
                         "for anyone. Leave RAY_AUTH_MODE unset (a token is made for this run), or set "
                         "ray.trust_network=true if nobody else reaches this network.")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


def take_token() -> bool:
    """Turns Ray's token mode on where nothing is said about it and a token is there. -> whether it is on

    UserError for a token that is wanted and not there, and for a file of it that others can read.
    """
    mode, named = os.environ.get("RAY_AUTH_MODE", "").lower(), os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if mode not in ("", "token"):
        return False
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        there = True
    elif there := file.is_file():
        rights = file.stat().st_mode & 0o777
        require(not rights & 0o077, f"{file} holds the cluster's token and has mode {rights:o}: others of this machine "
                                    f"can read it. Run: chmod 600 {file}")
    else:
        require(not mode and not named, f"token mode is on, and there is no token: RAY_AUTH_TOKEN is empty, {file} is "
                                        "no file. Put the cluster's token into one of them (a file with mode 600).")
    if there and "ray" not in sys.modules:  # Ray reads it when it is imported
        os.environ["RAY_AUTH_MODE"] = "token"
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


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


def refuse_unplaceable(run: Run, plan: Plan, say: Callable[[str], object]) -> None:
    """UserError for a stage or an evaluation that this cluster can never place: now, not in the night.

    Nodes of a cluster that was just started may still come: they are waited for.
    """
    import ray

    joined, said = bool(run.ray.address or os.environ.get("RAY_ADDRESS")), False
    until = time.monotonic() + run.ray.group_timeout_s * joined
    while lacking := unplaceable(run, plan.stages, ray.nodes()):
        if time.monotonic() >= until:
            raise UserError(lacking)
        if not said:
            say(f"waiting up to ray.group_timeout_s={run.ray.group_timeout_s:g} for more nodes: {lacking}")
        said = True
        time.sleep(1.0)


def unplaceable(run: Run, stages: Iterable[int], nodes: list[dict[str, Any]]) -> str:
    """Why these nodes, as ray.nodes() describes them, can not hold a run even when nothing else is there; or ""."""
    there = {kind: sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"]) for kind in ("CPU", "GPU")}
    have = f"Ray has {len([node for node in nodes if node['Alive']])} nodes with {there['CPU']:g} CPUs and " \
           f"{there['GPU']:g} GPUs"
    if not evaluation_fits(run, nodes):
        return (f"evaluation.cpus={run.evaluation.cpus:g} and .gpus={run.evaluation.gpus:g} fit on no single node: "
                f"{have}. Lower them.")
    taken = {"CPU": 0.0, "GPU": 0.0}
    for stage in (run.stages[index] for index in stages):
        fewest, room = planning.worker_counts(stage)[-1], most_placeable(stage, nodes)
        if fewest > room:
            return (f"stage {stage.resolution}px asks for {fewest} workers of {bundle_text(stage)} each "
                    f"({stage.placement}), {room} of them have a place: {have}. Lower stages.<n>.workers, .min_workers "
                    "or what each asks for.")
        taken = {kind: max(taken[kind], fewest * bundle_of(stage).get(kind, 0)) for kind in taken}
    for kind, wanted in (("CPU", run.evaluation.cpus), ("GPU", run.evaluation.gpus)):
        beside = 0 if run.evaluation.when == "end" else taken[kind]
        if wanted and wanted + beside > there[kind]:
            return (f"evaluation.{kind.lower()}s={wanted:g} does not fit beside the training's {beside:g}: {have}. "
                    "Lower it, or set evaluation.when=end.")
    return ""


def evaluation_fits(run: Run, nodes: Iterable[dict[str, Any]]) -> bool:
    """Whether a node could hold an evaluation, were it idle."""
    asked = {"CPU": run.evaluation.cpus, "GPU": run.evaluation.gpus}
    return any(node["Alive"] and all(node["Resources"].get(kind, 0) >= asked[kind] for kind in asked) for node in nodes)


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


def says_why(error: Exception) -> bool:
    """Whether a worker's error is more than the end of a connection to another one."""
    from ray.exceptions import RayActorError

    from gradine.stages.memory import OutOfMemory
    from gradine.stages.watch import NonFinite

    cause = getattr(error, "cause", None) or error
    return isinstance(cause, UserError | EnvironmentFault | NonFinite | OutOfMemory | RayActorError | Lost)


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


def bundle_of(stage: Stage) -> dict[str, float]:
    """What one worker asks of Ray."""
    return {kind: amount for kind, amount in (("CPU", stage.cpus), ("GPU", stage.gpus)) if amount} or {"CPU": 0.001}


def most_placeable(stage: Stage, nodes: Iterable[dict[str, Any]]) -> int:
    """How many workers of `stage` these nodes, as ray.nodes() describes them, have room for when nothing else runs."""
    wanted = bundle_of(stage)
    each = [min(int(node["Resources"].get(kind, 0) / amount + 1e-6) for kind, amount in wanted.items())
            for node in nodes if node["Alive"]]
    if stage.placement == "STRICT_SPREAD":
        return sum(room > 0 for room in each)
    return max(each, default=0) if stage.placement == "STRICT_PACK" else sum(each)


def place(stage: Stage, timeout_s: float, crowded: Callable[[str], None]) -> tuple[Any, int]:
    """A placement group for as many workers as the cluster has room for, the most that `stage` may have at best.

    Where there is none soon, `crowded` is told, and room for the fewest it may have is waited for. EnvironmentFault if
    that does not come in time.
    """
    import ray

    counts, until, told = planning.worker_counts(stage), time.monotonic() + timeout_s, False
    while (left := until - time.monotonic()) > 0:
        room = most_placeable(stage, ray.nodes())
        for count in [count for count in counts if count <= room] or counts[-1:]:
            # Fewer are tried soon: what is taken now may stay so, and a node that died is counted for a while.
            if placement := placed(stage, count, min(left if told else left / 2, PLACING_S)):
                return placement, count
            if not told:
                told = True
                crowded(f"{stage.resolution:>5}px waits for {counts[-1]} workers of {bundle_text(stage)} each "
                        f"({stage.placement}): all nodes together have room for {room}, not all of it free; up to "
                        f"ray.group_timeout_s={timeout_s:g}")
                break  # from the most again: there may be room now
    raise EnvironmentFault(f"stage {stage.resolution}px: {counts[-1]} workers of {bundle_text(stage)} each "
                           f"({stage.placement}) could not be placed within ray.group_timeout_s={timeout_s:g}. Is the "
                           "cluster busy, or a node down?")


def placed(stage: Stage, count: int, timeout_s: float) -> Any:
    """A placement group for `count` workers, or None if there was no room in time."""
    import ray

    placement = ray.util.placement_group([bundle_of(stage)] * count, strategy=stage.placement)
    try:
        if placement.wait(timeout_s):
            return placement
    except BaseException:  # a signal, or its places would stay taken
        ray.util.remove_placement_group(placement)
        raise
    ray.util.remove_placement_group(placement)
    return None


def bundle_text(stage: Stage) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in bundle_of(stage).items())


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

        from gradine.stages.memory import memory_kills

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
        import ray

        calls = [worker.run_stage.options(num_returns="streaming") for worker in self.workers]
        streams = {call.remote(run, stage, start, out, *more): rank for rank, call in enumerate(calls)}
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

    def beside(self, function: Callable[..., T], arguments: dict[int, tuple[Any, ...]]) -> dict[int, T]:
        """function(*arguments[rank]) on each rank's node, but not in its worker; the answers that came in time."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        local = [rank for rank in arguments if self.places[rank][0] == here]
        asked = {task_on(self.places[rank][0], function, *arguments[rank]): rank for rank in arguments.keys() - local}
        answers = {rank: function(*arguments[rank]) for rank in local}
        if asked:
            ready, silent = ray.wait([*asked], num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
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
        record = self.watchdog.records[rank]
        sight = self.beside(look_at, {rank: (pid, record)}).get(rank) if record and node in living_nodes() else None
        at = "; ".join(map(str, sight.lines)) if sight else ""
        who = f"rank {rank} (node {self.nodes()[rank]}, pid {pid})"
        at = f", at {at}" if at else ""
        text = " ".join(line.strip() for line in str(error).splitlines() if not RAYS_NAMES.match(line))
        if "low on memory" in text or self.memory_killed(rank):  # by Ray, by the kernel
            return HostMemory(f"{who} was ended because its host ran out of memory{at}: {text}")
        return Lost(f"{who} died{at}: {text}")

    def memory_killed(self, rank: int) -> bool:
        """Whether the kernel of a rank's host has ended processes for lack of memory since the group began."""
        from gradine.stages.memory import memory_kills

        before = self.kills.get(rank)
        now = self.beside(memory_kills, {rank: ()}).get(rank) if self.places[rank][0] in living_nodes() else None
        return before is not None and now is not None and now > before

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


def one_line(error: Exception, stop_for: tuple[type[Exception], ...] = (UserError, EnvironmentFault)) -> str:
    """What went wrong, for the ledger. What a worker raised of `stop_for` is raised here: a retry would meet it."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised, with its whole traceback as text
    if stop_for and isinstance(cause, stop_for):
        raise type(cause)(str(cause)) from error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:300]
