"""The state of training as a checkpoint's files, and back: weights and moments as safetensors, the rest as JSON.

`commits.py` writes and verifies the files. `Saver` does so in a thread: training waits for one copy to the host.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gradine.configs.schema import EnvironmentFault, Run, SaveFault, UserError
from gradine.stages.commits import NETWORKS, SCHEMA, Damaged, Fenced, Term, commit, state_of
from gradine.stages.step import TrainState, non_finite_tensors
from gradine.stages.store import is_remote
from gradine.stages.watch import NonFinite

FAILED_SAVES_IN_A_ROW = 3
PLAYERS = ("generator", "discriminator")
MOMENTS = {torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}  # per parameter


def name_of(resolution: int, phase: str, images_seen: int) -> str:
    return f"r{resolution:04d}-{phase}-{images_seen:09d}"


def save(location: str | Path, state: TrainState, info: dict[str, Any], term: Term | None = None) -> str:
    """Commits `state` under its name; `info` holds resolution, phase, stage_end and what else a reader wants. -> path

    Raises NonFinite for a state that is not finite, else what `commit` raises; then nothing new counts.
    """
    return write(location, tensors_of(state), described(state, info), term)


def described(state: TrainState, info: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, **info, "images_seen": state.images_seen, "masked": [int(n) for n in state.masked]}


def write(location: str | Path, tensors: dict[str, dict[str, Tensor]], info: dict[str, Any],
          term: Term | None = None) -> str:
    name = name_of(info["resolution"], info["phase"], info["images_seen"])
    everything = ((f"{file}/{name}", tensor) for file, part in tensors.items() for name, tensor in part.items())
    if bad := non_finite_tensors(everything):
        raise NonFinite(f"{len(bad)} tensors are not finite, first {bad[0]}: checkpoint {name} was not written",
                        info["images_seen"])

    def files() -> Iterator[tuple[str, bytes]]:
        for file, part in tensors.items():
            yield f"{file}.safetensors", safetensors.torch.save(part)
        yield "state.json", json.dumps(info, indent=1).encode()

    return commit(location, name, files(), term)


class Saver:
    """Commits states in a thread of its own: training goes on once they are copied to the host.

    One is being written and at most one waits; a newer one takes the place of one that waits, unless that ends a stage.
    A failed save is tried again after `retry_s`, also one without memory for it; the third in a row ends the stage with
    SaveFault.
    """

    def __init__(self, run: Run, location: str, term: Term) -> None:
        self.settings, self.location, self.term = run.checkpoints, location, term
        self.waiting: list[tuple[dict[str, dict[str, Tensor]], dict[str, Any]]] = []
        self.happened: list[dict[str, Any]] = []
        self.fault: BaseException | None = None
        self.failures = 0
        self.hurried = self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="gradine-saver", daemon=True)
        self.thread.start()

    def save(self, state: TrainState, info: dict[str, Any]) -> None:
        """Hands the state over. Returns when it is copied, or with checkpoints.background=false when it is written."""
        with self.changed:  # before the copy is made: never are there three
            if len(self.waiting) > 1 and not self.waiting[-1][1]["stage_end"]:
                left_out = self.waiting.pop()[1]
                self.happened.append({"event": "save_left_out", "images_seen": left_out["images_seen"],
                                      "resolution": left_out["resolution"],
                                      "reason": "the one before was still being written when the next was due"})
        job = tensors_of(state, copy=self.settings.background), described(state, info)
        with self.changed:
            self.waiting.append(job)
            self.changed.notify_all()
        if not self.settings.background:
            self.wait()

    def events(self) -> Iterator[dict[str, Any]]:
        """What has happened since the last call: `checkpoint`, `save_failed`, `save_left_out`; then raises a fault."""
        with self.changed:
            happened, self.happened = self.happened, []
            fault = self.fault
        yield from (event for event in happened)  # Ray sends into generators, which a list does not take
        if fault:
            raise fault

    def wait(self, hurry: bool = False, timeout: float | None = None) -> bool:
        """Until everything handed over is durable, or will not be: then True. hurry: without pauses between tries."""
        with self.changed:
            self.hurried = hurry
            self.changed.notify_all()
            return bool(self.changed.wait_for(lambda: not self.waiting or self.fault or self.closed, timeout))

    def close(self) -> None:
        """Ends the thread after the save under way; what waits is not written any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def _work(self) -> None:
        try:
            while self._round():
                pass
        except BaseException as error:  # training has to hear of it, whatever it is
            with self.changed:
                self.fault = error
                self.changed.notify_all()

    def _round(self) -> bool:
        """One attempt at what waits first; on leaving, its copy on the host is let go of. -> whether to go on"""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if self.closed:
                return False
            tensors, info = self.waiting[0]
        done = self._attempt(tensors, info)
        with self.changed:
            if not done:
                self.changed.wait_for(lambda: self.closed or self.hurried, self.settings.retry_s)
            if done or (len(self.waiting) > 1 and not info["stage_end"]):  # a newer one makes this one needless
                self.waiting.pop(0)
            self.changed.notify_all()
        return True

    def _attempt(self, tensors: dict[str, dict[str, Tensor]], info: dict[str, Any]) -> bool:
        about = {"images_seen": info["images_seen"], "resolution": info["resolution"], "phase": info["phase"]}
        began = time.perf_counter()
        try:
            path = write(self.location, tensors, info, self.term)
        except Fenced:  # no other try would end otherwise
            raise
        except (OSError, UserError, EnvironmentFault, MemoryError) as error:  # another try may find memory again
            self.failures += 1
            reason = self._reason(tensors, error)
            with self.changed:
                self.happened.append({"event": "save_failed", **about, "failures": self.failures, "reason": reason})
            if self.failures == FAILED_SAVES_IN_A_ROW:
                raise SaveFault(f"{self.failures} checkpoints in a row could not be written below {self.location}: "
                                f"{reason}. The last one that was stands; mend that, and the same command resumes "
                                "from it.") from error
            return False
        self.failures = 0
        with self.changed:
            self.happened.append({"event": "checkpoint", "path": path, **about, "stage_end": info["stage_end"],
                                  "term": self.term.number, "seconds": time.perf_counter() - began})
        return True

    def _reason(self, tensors: dict[str, dict[str, Tensor]], error: Exception) -> str:
        if isinstance(error, MemoryError):
            return "no memory for a file's bytes"
        if not isinstance(error, OSError):
            return str(error)
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not is_remote(self.location):
            needed = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
            disk = next(path for path in (Path(self.location), *Path(self.location).parents) if path.exists())
            reason += f"; it needs {needed:,} bytes, {shutil.disk_usage(disk).free:,} are free"
        return reason


def load_tensors(files: dict[str, bytes], part: str) -> dict[str, Tensor]:
    """The tensors of one file. Damaged if it is no safetensors file, or holds a NaN, an infinity or no float32."""
    try:
        tensors = safetensors.torch.load(files[f"{part}.safetensors"])
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise Damaged(f"{part}.safetensors: {' '.join(str(error).split()):.300}") from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise Damaged(f"{part}.safetensors: {name!r:.80} is {tensor.dtype}, all that is saved is float32")
    if tensors and (bad := non_finite_tensors(tensors.items())):
        raise Damaged(f"{part}.safetensors: {bad[0]!r:.80} is not finite")
    return tensors


def tensors_of(state: TrainState, copy: bool = False) -> dict[str, dict[str, Tensor]]:
    """Every tensor of the state, per file, on the CPU; names are those of the networks' layers.

    copy: none shares memory with the state, which may change.
    """
    return {file: {name: tensor.detach().to("cpu", copy=copy, memory_format=torch.contiguous_format).contiguous()
                   for name, tensor in part.items()} for file, part in parts_of(state).items()}


def parts_of(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Every tensor that is saved, per file, where and as it is."""
    parts = {role: getattr(state, role).state_dict() for role in NETWORKS}
    parts["optimizers"] = {f"{role}.{name}.{moment}": value
                           for role in PLAYERS
                           for name, moments in named_moments(state, role)
                           for moment, value in moments.items() if value is not None}
    for role, history in state.histories.items():
        parts["optimizers"] |= {f"{role}.{name}.history": mean for name, mean in history.means.items()}
        parts["optimizers"][f"{role}.history_steps"] = torch.tensor(float(history.steps))
    if state.augmentation is not None:
        parts["optimizers"]["augmentation"] = state.augmentation
    return parts


def named_moments(state: TrainState, role: str) -> Iterable[tuple[str, dict[str, Tensor]]]:
    optimizer = getattr(state, f"{role}_optimizer")
    return [(name, optimizer.state[parameter]) for name, parameter in getattr(state, role).named_parameters()
            if parameter in optimizer.state]


def restore(state: TrainState, files: dict[str, bytes]) -> None:
    """Loads a checkpoint of the SAME stage into `state`: weights, average, moments, clock, counts.

    Raises Damaged, or UserError where it holds other tensors than this stage's networks have.
    """
    info, stored = state_of(files["state.json"]), load_tensors(files, "optimizers")
    for role in NETWORKS:
        load_network(getattr(state, role), role, files)
    wanted: dict[str, torch.Size] = {}
    for role in PLAYERS:
        optimizer, history = getattr(state, f"{role}_optimizer"), state.histories.get(role)
        kinds = MOMENTS[type(optimizer)] if optimizer.defaults.get("momentum") != 0 else ()
        if any(name.startswith(f"{role}.") and name.endswith(kinds) for name in stored):  # none before its first step
            wanted |= {f"{role}.{name}.{key}": torch.Size() if key == "step" else parameter.shape
                       for name, parameter in getattr(state, role).named_parameters() for key in kinds}
        if history:
            wanted |= {f"{role}.{name}.history": mean.shape for name, mean in history.means.items()}
            wanted[f"{role}.history_steps"] = torch.Size()
    if state.augmentation is not None:
        wanted["augmentation"] = torch.Size()
    refuse_others("optimizers", stored, wanted)
    for role in PLAYERS:
        optimizer, history = getattr(state, f"{role}_optimizer"), state.histories.get(role)
        for name, parameter in getattr(state, role).named_parameters():
            for key in MOMENTS[type(optimizer)]:
                if (tensor := stored.get(f"{role}.{name}.{key}")) is not None:
                    like = tensor.to(parameter.device, copy=True)
                    optimizer.state[parameter][key] = like if key == "step" else _laid_out_as(like, parameter)
            if history:
                history.means[name].copy_(stored[f"{role}.{name}.history"])
        if history:
            history.steps = int(stored[f"{role}.history_steps"])
    if state.augmentation is not None:
        state.augmentation.copy_(stored["augmentation"])
    state.images_seen = info["images_seen"]
    state.masked.copy_(torch.tensor(info["masked"]))


def load_network(network: nn.Module, role: str, files: dict[str, bytes]) -> None:
    """Loads all layers of one network. Raises Damaged, or UserError where the file has not exactly these."""
    stored = load_tensors(files, role)
    refuse_others(role, stored, {name: tensor.shape for name, tensor in network.state_dict().items()})
    network.load_state_dict(stored)


def refuse_others(part: str, stored: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    for name in sorted(stored.keys() ^ shapes.keys()):
        raise UserError(f"{part}: the checkpoint {'lacks' if name in shapes else 'also has'} the tensor {name!r:.80}. "
                        "Resume with the network settings and the version it was written with.")
    for name, tensor in stored.items():
        if tensor.shape != shapes[name]:
            raise UserError(f"{part}.{name} is {list(tensor.shape)} in the checkpoint, {list(shapes[name])} here. "
                            "Use the same network settings.")


def grow(state: TrainState, files: dict[str, bytes]) -> None:
    """Loads another stage's or run's weights where names match; new layers keep their fresh ones, in the average too.

    Raises Damaged, or UserError where a layer of the same name has another shape or one that both must have is missing.
    """
    theirs = state_of(files["state.json"])["resolution"]
    for role in NETWORKS:
        network: nn.Module = getattr(state, role)
        own = network.state_dict()
        shared = {name: tensor for name, tensor in load_tensors(files, role).items() if name in own}
        both = [name for name in own if name.startswith("blocks.") and int(name.split(".")[1]) <= theirs]
        if missing := sorted(set(both) - set(shared)):
            raise UserError(f"{role}: the starting weights of {theirs} px lack {missing[0]!r}, so they are of another "
                            "program or were edited. Start from a checkpoint that gradine wrote.")
        for name, tensor in shared.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{role}.{name} is {list(tensor.shape)} in the starting weights, "
                                f"{list(own[name].shape)} here. Use the same network settings.")
        network.load_state_dict(shared, strict=False)


def refuse_other_channels(run: Run, files: dict[str, bytes]) -> None:
    """UserError for another run's weights that are of other images: a stage without a shared to-RGB would not tell."""
    biases = (tensor for name, tensor in load_tensors(files, "average").items()
              if name.startswith("to_rgb.") and name.endswith(".bias"))
    theirs = next((bias.numel() for bias in biases), run.data.channels)  # other networks' layers tell it themselves
    if theirs != run.data.channels:
        raise UserError(f"init_from: the starting weights make images of {theirs} channels, this run has "
                        f"data.channels={run.data.channels}. Start from a run with the same, or without init_from.")


def _laid_out_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter).copy_(tensor)
