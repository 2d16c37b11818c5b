"""Ranks of a run without Ray, with faults injected, each forked from a parent that has imported everything once.

    python faulty_stage.py        a line of JSON in, a line out: {"start": job} -> pids, {"wait": pids} -> exit codes

A job names its config, folder, number of workers, port, attempt and faults. Each rank goes on from the newest
checkpoint in the folder, as `stage_process.py` does. It leaves behind, one line after another, torn by no signal:
  steps-<attempt>-<rank>.jsonl   after each step its images seen, what its networks were shown and digests of its state
  events-<attempt>-<rank>.jsonl  what `run_stage` yielded
A rank ends with code 0 at the run's end and after a stop alike, 1 with an error, whose class and text are in error-*.

A fault is a dict: `do` (kill, term, oom, poison, limit), `at` (images seen when the step began, or of the save),
`place` (begin, before, middle, average, after, tick, save, setup, between), `rank` (which does it), and what the kind
wants. In the setup of stage n `at` is -1 - n.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import unpickling  # beside this script
from accelerate import PartialState
from torch import Tensor

from gradine.configs.schema import Run, load
from gradine.pipeline.plan import make_plan
from gradine.stages import checkpoint, commits, growth, loop, step, stopping
from gradine.stages.commits import Term

Job = dict[str, Any]


class Faults:
    """Wraps what a stage calls, in this process, so that each fault of the job happens at its place."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank, self.folder = job, rank, Path(job["folder"])
        self.own = [fault for fault in job["faults"] if fault.get("rank", 0) == rank]
        self.at = -1  # images seen when the step under way began
        self.saving, self.syncs = -1, 0
        self.fired = threading.Event()  # a SIGTERM inside a save
        self.timer: threading.Thread | None = None
        self.steps = os.open(self.folder / f"steps-{job['attempt']}-{rank}.jsonl",
                             os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self.advance = job.get("advance", [])  # ranges

    def install(self) -> None:
        self.wrap_begin()
        self.wrap(loop, "initial_state", before=lambda *_: self.reach("setup"))
        self.wrap(loop, "non_finite_count", before=lambda *_: self.reach("tick"))
        self.wrap(step, "update_average", before=lambda *_: self.reach("average"))
        self.wrap_update()
        self.wrap_step()
        self.wrap_saves()

    @staticmethod
    def wrap(module: Any, name: str, before: Callable[..., Any]) -> None:
        real = getattr(module, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            before(*arguments)
            return real(*arguments, **named)

        setattr(module, name, wrapped)

    def wrap_begin(self) -> None:
        def begin(_: Any, images_seen: int) -> None:
            if self.timer:  # no later than in the step it was started in
                self.timer.join()
            self.at, self.updates = images_seen, 0
            self.reach("begin")

        self.wrap(growth, "at", begin)

    def wrap_update(self) -> None:
        def middle(*_: Any) -> None:
            self.updates += 1
            if self.updates == 2:
                self.reach("middle")

        self.wrap(step, "masked_update", middle)

    def wrap_step(self) -> None:
        real = loop.train_step

        def train_step(state: Any, shares: Any, moment: Any, *rest: Any) -> Any:
            self.reach("before")
            if any(first <= self.at < last for first, last in self.advance):  # the slow model of skipped ranges
                state.images_seen += moment.phase.batch_size
                return {}
            shown = [share.reals for share in shares]
            shares, clean_up = self.poisoned(state, shares)
            seen = real(state, shares, moment, *rest)
            clean_up()
            line = {"at": moment.images_seen, "shown": [[digest([image]) for image in reals] for reals in shown],
                    "state": digests(state)}
            os.write(self.steps, json.dumps(line).encode() + b"\n")
            if self.job.get("gradients_at") == moment.images_seen:
                gradients = {name: p.grad.contiguous() for name, p in state.discriminator.named_parameters()}
                safetensors.torch.save_file(gradients, self.folder / f"gradients-{self.job['attempt']}.safetensors")
            self.reach("after")
            return seen

        loop.train_step = train_step

    def wrap_saves(self) -> None:
        """Faults at `sync` 1, 2, ... of a save; and none is ever left out: which are there depends on no clock."""
        commit, sync, save = checkpoint.commit, os.fsync, checkpoint.Saver.save

        def counted_commit(location: Any, name: str, *rest: Any) -> str:
            self.saving, self.syncs = int(name.split("-")[-1]), 0
            try:
                return commit(location, name, *rest)
            finally:
                self.saving = -1

        def fsync(descriptor: int) -> None:
            if self.saving >= 0:
                self.syncs += 1
                for fault in self.own:
                    if (fault.get("place"), fault["at"], fault.get("sync", 1)) == ("save", self.saving, self.syncs):
                        self.act(fault)
            sync(descriptor)

        def patient_save(saver: Any, *arguments: Any) -> None:
            while len(saver.waiting) > 1 and not saver.fault:
                time.sleep(0.001)
            save(saver, *arguments)
            if any(fault["do"] == "term" and fault.get("place") == "save" and fault["at"] == arguments[0].images_seen
                   for fault in self.own):  # training meets it there, however slow the disk is
                self.fired.wait(60)

        checkpoint.commit, os.fsync = counted_commit, fsync  # type: ignore[assignment]
        checkpoint.Saver.save = patient_save  # type: ignore[method-assign]

    def reach(self, place: str) -> None:
        for fault in self.own:
            if fault.get("place") == place and fault["at"] == self.at:
                self.act(fault)

    def act(self, fault: Job) -> None:
        if fault["do"] == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
        if fault["do"] == "limit":
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + (fault["room_mb"] << 20), resource.RLIM_INFINITY))
        if fault["do"] not in ("kill", "term"):
            return
        number = signal.SIGKILL if fault["do"] == "kill" else signal.SIGTERM
        target = int((self.folder / f"pid-{fault['target']}").read_text()) if "target" in fault else os.getpid()
        if delay := fault.get("delay_s"):  # from there on, anywhere
            self.timer = threading.Timer(delay, os.kill, (target, number))
            self.timer.daemon = True
            self.timer.start()
        else:
            os.kill(target, number)
            self.fired.set()
            time.sleep(fault.get("stay_s", 0))

    # Poison ----------------------------------------------------------------------------------------------------------

    def poisoned(self, state: Any, shares: list[Any]) -> tuple[list[Any], Callable[[], None]]:
        """The shares of this step and what takes the poison out again, after it was put into state or shares."""
        clean_ups: list[Callable[[], None]] = []
        for fault in self.own:
            if fault["do"] == "poison" and fault["at"] <= self.at < fault.get("until", fault["at"] + 1):
                shares = self.poison(fault, state, shares, clean_ups)
        return shares, lambda: [clean_up() for clean_up in clean_ups] and None

    def poison(self, fault: Job, state: Any, shares: list[Any], clean_ups: list[Callable[[], None]]) -> list[Any]:
        where, value = fault["where"], float(fault.get("value", "nan"))
        net, adam = (getattr(state, fault.get("net", "discriminator") + part) for part in ("", "_optimizer"))
        parameter = next(iter(net.parameters()))
        if where == "gradient":
            clean_ups.append(parameter.register_hook(lambda gradient: torch.full_like(gradient, value)).remove)
        elif where == "loss":
            name = "critic_loss" if fault.get("net", "discriminator") == "discriminator" else "generator_loss"
            real = getattr(step, name)
            setattr(step, name, lambda *scores: real(*scores) * value)
            clean_ups.append(lambda: setattr(step, name, real))
        elif where in ("weight", "average"):
            with torch.no_grad():
                next(iter((net if where == "weight" else state.average).parameters())).view(-1)[0] = value
        elif where == "moment":
            adam.state[parameter]["exp_avg_sq"].view(-1)[0] = value
        elif where == "reals":
            reals = shares[0].reals.float()
            reals[0, 0, 0, 0] = value
            return [type(shares[0])(**{**vars(shares[0]), "reals": reals}), *shares[1:]]
        else:
            latents = getattr(shares[0], where).clone()
            latents[0, 0] = value
            return [type(shares[0])(**{**vars(shares[0]), where: latents}), *shares[1:]]
        return shares


def digest(tensors: list[Tensor]) -> str:
    joined = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        joined.update(tensor.detach().contiguous().numpy().tobytes())
    return joined.hexdigest()


def digests(state: Any) -> dict[str, str]:
    """Of all that an update may change, per network, listed here by hand."""
    found = {role: digest(list(getattr(state, role).parameters()))
             for role in ("generator", "discriminator", "average")}
    for role in ("generator", "discriminator"):
        of_adam = getattr(state, f"{role}_optimizer").state
        found[f"{role}_optimizer"] = digest([of_adam[p][key] for p in getattr(state, role).parameters() if p in of_adam
                                        for key in ("step", "exp_avg", "exp_avg_sq")])
    return found


def train(job: Job, rank: int) -> None:
    run = load(job["config"])
    faults = Faults(job, rank)
    faults.install()
    with stopping.listening() if job.get("listening") else nullcontext():
        PartialState(cpu=True)
        with (Path(job["folder"]) / f"events-{job['attempt']}-{rank}.jsonl").open("a") as events:
            for stage in plan(run, job).stages:
                PartialState().wait_for_everyone()  # rank 0 has written the last stage's end: all start from it
                start = plan(run, job).start
                if start and start.images_seen < growth.schedule(run).stage_span(stage)[0]:
                    break  # the stage before was stopped
                faults.at = -1 - stage
                term = Term(skipped=tuple(map(tuple, job["skipped"]))) if "skipped" in job else None
                for event in loop.run_stage(run, stage, start.path if start else None, job["folder"], term=term):
                    events.write(json.dumps(event) + "\n")
                    events.flush()
                faults.reach("between")
    loop.leave_group()
    assert not unpickling.offences, unpickling.offences


def plan(run: Run, job: Job) -> Any:
    return make_plan(run, commits.find(Path(job["folder"]) / "checkpoints")[0])


# The server ----------------------------------------------------------------------------------------------------------


def become_rank(job: Job, rank: int) -> None:
    """In the forked child, which never returns."""
    folder, code = Path(job["folder"]), 1
    try:
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        if job["workers"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["workers"]),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
        with (folder / f"error-{job['attempt']}-{rank}").open("w") as errors:
            for own in (1, 2):
                os.dup2(errors.fileno(), own)
            try:
                train(job, rank)
                code = 0
            except BaseException as error:
                traceback.print_exc()
                print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def start(job: Job) -> list[int]:
    pids = []
    for rank in range(job["workers"]):
        pid = os.fork()
        if pid == 0:
            become_rank(job, rank)
        pids.append(pid)
    return pids


def wait(pids: list[int], timeout_s: float) -> list[int | None]:
    """Exit codes, negative for a signal; None for one that had to be killed because it did not end in time."""
    deadline, codes = time.monotonic() + timeout_s, dict[int, int | None]()
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def serve() -> None:
    unpickling.watch()
    torch.use_deterministic_algorithms(False)  # imports another second's worth of torch, which forks then share
    assert threading.active_count() == 1, "a thread would be missing in the forks"
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: list[Any] = start(request["start"])
            running |= set(answer)
        else:
            answer = wait(request["wait"], request["timeout_s"])
            running -= set(request["wait"])
        print(json.dumps(answer), flush=True)
    for pid in running:  # the tests ended early
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
