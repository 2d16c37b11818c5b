"""Checkpoints: weights and moments as safetensors, the rest as JSON, a MANIFEST that vouches for every byte.

A checkpoint is a folder. It is written beside its final name, every file fsynced, the manifest last, then renamed: a
folder without a valid manifest never counts. Nothing is unpickled. Loading verifies length and sha256 first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gradine.configs.schema import EnvironmentFault, Run, UserError
from gradine.stages.step import TrainState, non_finite_tensors

SCHEMA = 1
MANIFEST = "MANIFEST.json"
NETWORKS = ("generator", "discriminator", "average")
PARTIAL = ".partial-"  # prefix of a folder still being written
SET_ASIDE = ".damaged-"  # in the name of a folder that a valid checkpoint took the place of


class Damaged(ValueError):
    """A checkpoint that must not be used, with the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its state.json describes it; `plan.py` chooses among these."""

    path: str
    resolution: int
    phase: str
    images_seen: int
    stage_end: bool

    @property
    def name(self) -> str:
        return Path(self.path).name


def name_of(resolution: int, phase: str, images_seen: int) -> str:
    return f"r{resolution:04d}-{phase}-{images_seen:09d}"


def save(folder: Path, state: TrainState, info: dict[str, Any]) -> Path:
    """Commits `state` as folder/<name>; `info` holds resolution, phase, stage_end and what else a reader wants.

    Raises EnvironmentFault if the state is not finite or the disk fails; then nothing under the final name changed.
    """
    final = folder / name_of(info["resolution"], info["phase"], state.images_seen)
    tensors = tensors_of(state)
    everything = ((f"{file}/{name}", tensor) for file, part in tensors.items() for name, tensor in part.items())
    if bad := non_finite_tensors(everything):
        raise EnvironmentFault(f"checkpoint {final.name} refused: {len(bad)} tensors are not finite, first {bad[0]}. "
                               "The last checkpoint stands; branch off an earlier stage with a lower learning rate.")
    info = {"schema": SCHEMA, **info, "images_seen": state.images_seen, "skipped": [int(n) for n in state.skipped]}
    files = {f"{file}.safetensors": safetensors.torch.save(part) for file, part in tensors.items()}
    files["state.json"] = json.dumps(info, indent=1).encode()
    try:
        return commit(folder, final, files)
    except OSError as error:
        needed = sum(map(len, files.values()))
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        room = f" It needs {needed:,} bytes, {free:,} are free." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise EnvironmentFault(f"checkpoint {final} could not be written: {error.strerror}.{room} "
                               "The last checkpoint stands; the same command resumes from it.") from error


def commit(folder: Path, final: Path, files: dict[str, bytes]) -> Path:
    """Writes the files and their manifest so that `final` appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{PARTIAL}{final.name}-{os.getpid()}"
    partial.mkdir()
    try:
        for name, content in files.items():
            _write(partial / name, content)
        listing = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
        manifest = {"schema": SCHEMA, "name": final.name, "created": time.time(), "files": listing}
        _write(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_folder(partial)
        if final.exists():  # only a damaged one can be met here: a valid one would have been resumed from
            asides = (final.with_name(f"{final.name}{SET_ASIDE}{n}") for n in range(10**6))
            final.rename(next(path for path in asides if not path.exists()))
        partial.rename(final)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def read(path: str | Path) -> dict[str, bytes]:
    """All files of a checkpoint, verified against its manifest; raises Damaged with the file and the reason."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        listing = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        schema = manifest["schema"]
    except FileNotFoundError:
        raise Damaged(f"{path} has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"{path / MANIFEST} cannot be read: {error}") from error
    if schema != SCHEMA:
        raise Damaged(f"{path} has schema {schema}, this gradine reads {SCHEMA}")
    if extra := sorted({p.name for p in path.iterdir()} - set(listing) - {MANIFEST}):
        raise Damaged(f"{path / extra[0]} is not in the manifest")
    files = {}
    for name, (size, digest) in listing.items():
        if Path(name).name != name:
            raise Damaged(f"{path / MANIFEST} names a file outside the checkpoint: {name!r}")
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise Damaged(f"{file} is missing or no plain file")
        if file.stat().st_size != size:
            raise Damaged(f"{file} has {file.stat().st_size} bytes, its manifest says {size}")
        try:
            files[name] = file.read_bytes()
        except OSError as error:
            raise Damaged(f"{file} cannot be read: {error.strerror}") from error
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise Damaged(f"{file} does not match the sha256 in its manifest")
    return files


def describe(path: Path) -> Checkpoint:
    """What a checkpoint is of, from its state.json alone; `read` verifies the rest before use. Raises Damaged."""
    try:
        listed = json.loads((path / MANIFEST).read_bytes())["files"]["state.json"]["sha256"]
        content = (path / "state.json").read_bytes()
        if hashlib.sha256(content).hexdigest() != listed:
            raise Damaged(f"{path / 'state.json'} does not match the sha256 in its manifest")
        info = json.loads(content)
        return Checkpoint(str(path), info["resolution"], info["phase"], info["images_seen"], info["stage_end"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(str(error) if isinstance(error, Damaged) else
                      f"{path} has no readable {MANIFEST} and state.json ({error})") from error


def find(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints by images seen, and a line for each folder that is none."""
    found, damaged = [], []
    for path in sorted(p for p in folder.glob("r[0-9]*") if SET_ASIDE not in p.name):
        try:
            found.append(describe(path))
        except Damaged as error:
            damaged.append(str(error))
    return sorted(found, key=lambda c: (c.images_seen, c.resolution)), damaged


def newest_valid(found: list[Checkpoint]) -> tuple[tuple[Checkpoint, dict[str, bytes]] | None, list[str]]:
    """The last of `found` that is valid, with its files, or None; and a line for each damaged one passed over."""
    damaged: list[str] = []
    for candidate in reversed(found):
        try:
            return (candidate, read(candidate.path)), damaged
        except Damaged as error:
            damaged.append(str(error))
    return None, damaged


def retire(folder: Path, keep: int, now: int) -> list[str]:
    """Deletes checkpoints inside stages up to images_seen `now` but the newest `keep`; never a stage's final one.

    Later ones were passed over as damaged: they neither count nor go. -> names deleted.
    """
    inside = [c for c in find(folder)[0] if not c.stage_end and c.images_seen <= now]
    for checkpoint in inside[:-keep]:
        doomed = folder / f"{PARTIAL}{checkpoint.name}-retired"
        Path(checkpoint.path).rename(doomed)  # from here on it is an orphan, whatever happens during the deletion
        shutil.rmtree(doomed)
    return [checkpoint.name for checkpoint in inside[:-keep]]


def remove_orphans(folder: Path) -> list[str]:
    """Deletes what a killed save or clean-up left. For the start of a run, under its lock."""
    orphans = sorted(folder.glob(f"{PARTIAL}*"))
    for path in orphans:
        shutil.rmtree(path)
    return [path.name for path in orphans]


def load_tensors(files: dict[str, bytes], part: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(files[f"{part}.safetensors"])
    except (SafetensorError, KeyError) as error:
        raise Damaged(f"{part}.safetensors: {error}") from error


def tensors_of(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Every tensor of the state, per file, on the CPU; names are those of the networks' layers."""
    parts = {role: getattr(state, role).state_dict() for role in NETWORKS}
    parts["optimizers"] = {f"{role}.{name}.{moment}": value
                           for role in ("generator", "discriminator")
                           for name, moments in named_moments(state, role)
                           for moment, value in moments.items()}
    return {file: {name: tensor.detach().to("cpu", memory_format=torch.contiguous_format).contiguous()
                   for name, tensor in part.items()} for file, part in parts.items()}


def named_moments(state: TrainState, role: str) -> Iterable[tuple[str, dict[str, Tensor]]]:
    adam = getattr(state, f"{role}_adam")
    return [(name, adam.state[parameter]) for name, parameter in getattr(state, role).named_parameters()
            if parameter in adam.state]


def restore(state: TrainState, files: dict[str, bytes]) -> None:
    """Loads a checkpoint of the SAME stage into `state`: weights, average, moments, clock, counts."""
    for role in NETWORKS:
        getattr(state, role).load_state_dict(load_tensors(files, role))
    info = json.loads(files["state.json"])
    state.images_seen = info["images_seen"]
    state.skipped.copy_(torch.tensor(info["skipped"]))
    moments = load_tensors(files, "optimizers")
    for role in ("generator", "discriminator"):
        adam = getattr(state, f"{role}_adam")
        for name, parameter in getattr(state, role).named_parameters():
            prefix = f"{role}.{name}."
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if prefix + key in moments:
                    like = moments[prefix + key].to(parameter.device, copy=True)
                    adam.state[parameter][key] = like if key == "step" else _laid_out_as(like, parameter)


def grow(state: TrainState, files: dict[str, bytes]) -> None:
    """Loads another stage's or run's weights where names match; new layers keep their fresh ones, in the average too.

    Raises UserError where a layer of the same name has another shape.
    """
    for role in NETWORKS:
        network: nn.Module = getattr(state, role)
        own = network.state_dict()
        shared = {name: tensor for name, tensor in load_tensors(files, role).items() if name in own}
        for name, tensor in shared.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{role}.{name} is {list(tensor.shape)} in the starting weights, "
                                f"{list(own[name].shape)} here. Use the same network settings.")
        network.load_state_dict(shared, strict=False)


def refuse_other_channels(run: Run, files: dict[str, bytes]) -> None:
    """UserError for another run's weights that are of other images: a stage without a shared to-RGB would not tell."""
    biases = (tensor for name, tensor in load_tensors(files, "average").items()
              if name.startswith("to_rgb.") and name.endswith(".bias"))
    if (theirs := len(next(biases))) != run.data.channels:
        raise UserError(f"init_from: the starting weights make images of {theirs} channels, this run has "
                        f"data.channels={run.data.channels}. Start from a run with the same, or without init_from.")


def _laid_out_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter).copy_(tensor)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
