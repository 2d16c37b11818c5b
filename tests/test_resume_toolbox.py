"""Of every network and game: a run that was cut goes on to the bits of the unbroken one, and its splits agree.

Six steps of 8, saved after the second, which lies inside every cycle of d_steps and penalty_every.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gradine.configs.schema import Run
from gradine.stages import augment
from gradine.stages.commits import read
from gradine.stages.loop import run_stage
from tests.test_parity import assert_same_checkpoints, finish_all

TENSORS = ("generator", "discriminator", "average", "optimizers")
SIX_STEPS = {"stages.0.resolution": 8, "stages.0.hold_images": 48, "stages.0.batch_size": 8, "tick_images": 48,
             "checkpoints.every_images": 16, "checkpoints.keep": 9, "checkpoints.background": False}
PLAIN = {"training.loss": "non_saturating", "training.penalty": "none", "training.drift": 0}
ADAM = {"training.beta1": 0.5, "training.beta2": 0.9}
DCGAN = {**PLAIN, **ADAM, "network.kind": "dcgan"}
LAYERS = "network.layers"
FREE = {**DCGAN, f"{LAYERS}.generator_norm": "none", f"{LAYERS}.discriminator_norm": "none"}  # of the batch
MLP = {**PLAIN, **ADAM, "network.kind": "mlp", "network.mlp.width": 16}
POINTS = {**MLP, "stages.0.resolution": 1, "training.mirror": False, "network.latent_size": 4,
          "data.channels": 2, "data.points.kind": "ring"}
R3 = {"training.loss": "relativistic", "training.penalty": "r1+r2", "training.drift": 0}
TWO_CLASSES = {"network.classes": 2, "network.conditioning": "concatenated"}
CODES = {"network.codes": 3, "network.continuous_codes": 2}

GAMES: dict[str, dict[str, Any]] = {
    "progressive": {},
    "progressive, bfloat16": {"training.precision": "bfloat16"},
    "progressive, clipped": {"training.penalty": "none", "training.clip": 0.05},
    "progressive, lazy penalty": {"training.penalty_every": 4},
    **{f"progressive, {loss}": {**PLAIN, "training.loss": loss}
       for loss in ("minimax", "non_saturating", "least_squares", "hinge", "relativistic")},
    **{f"progressive, {penalty}": {**PLAIN, "training.penalty": penalty} for penalty in ("gradient", "r1", "r1+r2")},
    "progressive, relativistic": R3,
    **{f"progressive, {conditioning}": {**PLAIN, **TWO_CLASSES, "network.conditioning": conditioning}
       for conditioning in ("concatenated", "projection", "auxiliary")},
    "progressive, codes": {**PLAIN, **CODES},
    "progressive, 3 d_steps": {"training.d_steps": 3},
    "progressive, 2 g_steps": {"training.g_steps": 2},
    "progressive, 3 d_steps and 2 g_steps, relativistic": {**R3, "training.d_steps": 3, "training.g_steps": 2},
    "progressive, sgd": {"training.optimizer": "sgd", "training.momentum": 0},
    "progressive, sgd of D": {**PLAIN, "training.discriminator_optimizer": "sgd", "training.nesterov": True,
                              "training.discriminator_rate": 4},
    "progressive, averaged history": {"training.historical_averaging": 0.1},
    "progressive, noisy labels": {**PLAIN, "training.real_labels": [0.7, 1.2], "training.fake_labels": [0.0, 0.3],
                                  "training.flip_labels": 0.1},
    "progressive, smooth labels": {**PLAIN, "training.loss": "least_squares", "training.real_labels": [0.9]},
    "progressive, matched features": {**PLAIN, "training.feature_matching": True},
    "progressive, diverse": {**PLAIN, "training.diversity": 0.5},
    "progressive, augmented": {**R3, "training.augment": "always"},
    "progressive, augmented, 2 g_steps": {**PLAIN, "training.augment": "adaptive", "training.g_steps": 2},
    "progressive, augmented as it overfits": {"training.augment": "adaptive"},
    "progressive, uniform": {"network.latents": "uniform"},
    "progressive, sphere": {"network.latents": "sphere", "network.output": "tanh"},
    "dcgan": DCGAN,
    "dcgan, channels last": {**DCGAN, "training.channels_last": True},
    "dcgan, bfloat16": {**DCGAN, "training.precision": "bfloat16"},
    "dcgan, clipped": {**DCGAN, "training.loss": "wasserstein", "training.clip": 0.01, "training.d_steps": 3},
    "dcgan, instance": {**DCGAN, f"{LAYERS}.generator_norm": "instance", f"{LAYERS}.discriminator_norm": "instance",
                        "training.penalty": "r1"},
    "dcgan, virtual": {**DCGAN, f"{LAYERS}.generator_norm": "pixel", f"{LAYERS}.discriminator_norm": "virtual",
                       "training.penalty": "r1+r2"},
    "dcgan, virtual of labels": {**DCGAN, **TWO_CLASSES, f"{LAYERS}.generator_norm": "pixel",
                                 f"{LAYERS}.discriminator_norm": "virtual"},
    "dcgan, no norm": {**FREE, "training.loss": "wasserstein", "training.penalty": "gradient"},
    "dcgan, nearest and mean": {**DCGAN, f"{LAYERS}.upsampling": "nearest", f"{LAYERS}.pooling": "mean"},
    "dcgan, shuffle": {**DCGAN, f"{LAYERS}.upsampling": "shuffle", f"{LAYERS}.generator_activation": "leaky_relu"},
    "dcgan, dropout": {**DCGAN, f"{LAYERS}.dropout": 0.5},
    "dcgan, dropout, 2 g_steps": {**DCGAN, f"{LAYERS}.dropout": 0.5, "training.g_steps": 2, "training.d_steps": 3},
    "dcgan, discrimination": {**DCGAN, f"{LAYERS}.minibatch": "discrimination"},
    "dcgan, stddev": {**FREE, f"{LAYERS}.minibatch": "stddev", "training.penalty": "r1"},
    **{f"dcgan, {conditioning}": {**DCGAN, **TWO_CLASSES, "network.conditioning": conditioning}
       for conditioning in ("concatenated", "projection", "auxiliary")},
    "dcgan, codes": {**DCGAN, **CODES},
    "dcgan, labels and codes": {**FREE, **TWO_CLASSES, **CODES, "network.conditioning": "auxiliary"},
    "dcgan, matched features of more": {**DCGAN, "training.feature_matching": True, "training.diversity": 0.1,
                                        "training.historical_averaging": 0.01, "training.real_labels": [0.9]},
    "mlp": {**MLP, "training.penalty": "r1"},
    "mlp, labels": {**MLP, **TWO_CLASSES, **CODES},
    "points": POINTS,
    "points, grid": {**POINTS, **R3, "data.points.kind": "grid", "data.points.modes": 9},
    "points, stddev": {**POINTS, "network.mlp.minibatch": "stddev", "training.penalty": "r1+r2"},
    "points, discrimination": {**POINTS, "network.mlp.minibatch": "discrimination"},
    "points, codes": {**POINTS, **CODES, "training.g_steps": 2},
    "autoencoder": {**ADAM, "network.kind": "autoencoder"},
    "vae": {**ADAM, "network.kind": "vae"},
    "vae, no norm": {**ADAM, "network.kind": "vae", f"{LAYERS}.generator_norm": "pixel",
                     f"{LAYERS}.discriminator_norm": "none"},
}
MANY = {**R3, **TWO_CLASSES, **CODES, "network.conditioning": "auxiliary", "network.latents": "sphere",
        "training.d_steps": 3, "training.g_steps": 2, "training.historical_averaging": 0.1,
        "training.augment": "adaptive", "training.penalty_every": 2, "training.discriminator_optimizer": "sgd",
        "training.nesterov": True, "training.discriminator_rate": 3}
WORKERS = {"progressive": MANY,
           "dcgan": {**FREE, **MANY, f"{LAYERS}.discriminator_norm": "virtual", f"{LAYERS}.minibatch": "stddev",
                     "network.conditioning": "concatenated"},
           "points": {**POINTS, "network.mlp.minibatch": "stddev"}, "vae": GAMES["vae, no norm"]}
# those whose batch may go through the networks in parts, and whose parts have something to agree about
SPLIT = ["progressive", *(f"progressive, {loss}" for loss in (
    "minimax", "non_saturating", "least_squares", "hinge", "relativistic", "r1", "r1+r2", "projection", "auxiliary",
    "codes", "3 d_steps and 2 g_steps, relativistic", "averaged history", "noisy labels", "augmented",
    "augmented as it overfits")), "dcgan, instance", "dcgan, virtual", "dcgan, virtual of labels", "dcgan, no norm",
    "dcgan, stddev", "dcgan, labels and codes", "mlp", "mlp, labels", "points", "points, stddev", "points, codes",
    "vae, no norm"]


QUICK = {"progressive", "progressive, relativistic", "progressive, averaged history", "progressive, sgd of D",
         "progressive, 3 d_steps and 2 g_steps, relativistic", "progressive, augmented as it overfits", "dcgan",
         "dcgan, virtual", "dcgan, dropout", "dcgan, labels and codes", "mlp", "points", "autoencoder", "vae"}


def quick_first(games: Iterable[str]) -> list[Any]:
    """One of each kind in `make test`, the others in `make test-all`."""
    return [game if game in QUICK else pytest.param(game, marks=pytest.mark.slow) for game in games]


@pytest.fixture(autouse=True)
def _augmentation_that_adapts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a D that has overfitted for long would have it: after six steps its probability is far from where it began."""
    monkeypatch.setattr(augment, "TARGET", -2.0)
    monkeypatch.setattr(augment, "PACE", 100)


@pytest.mark.parametrize("game", quick_first(GAMES))
def test_a_run_that_was_cut_goes_on_to_the_bits_of_the_unbroken_one(game: str, tiny_run: Callable[..., Run],
                                                                    tmp_path: Path) -> None:
    run = tiny_run({**SIX_STEPS, **GAMES[game]}, stages=1)
    middle, *_, last = checkpoints_of(run, None, tmp_path / "unbroken")
    *_, resumed = checkpoints_of(run, middle, tmp_path / "cut")
    assert_same(last, resumed)
    start, end = tensors_of(middle), tensors_of(last)
    assert end.keys() >= start.keys()
    for role in ("generator", "discriminator"):  # both did learn after the cut
        weights = [name for name in start if name.startswith(f"{role}.") and name.endswith("weight")]
        assert weights
        assert not all(torch.equal(start[name], end[name]) for name in weights), role


def test_a_growing_run_of_many_ingredients_goes_on_from_inside_a_fade_and_from_its_end(
        tiny_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "PACE", 2_000)  # one stage's probability is where the next one's begins
    run = tiny_run({**MANY, "checkpoints.every_images": 40, "checkpoints.keep": 9, "checkpoints.background": False})
    first = checkpoints_of(run, None, tmp_path / "unbroken")[-1]
    *inside, last = checkpoints_of(run, first, tmp_path / "unbroken", stage=1)
    assert [Path(path).name for path in inside] == [
        "r0008-fade-000000120", "r0008-fade-000000160", "r0008-hold-000000200"]
    for start in inside:
        *_, resumed = checkpoints_of(run, start, tmp_path / Path(start).name, stage=1)
        assert_same(last, resumed)
    # what the cuts went through was not at rest
    before, after = tensors_of(inside[0]), tensors_of(inside[1])
    assert after["optimizers.augmentation"] != before["optimizers.augmentation"]
    assert [tensors_of(path)["optimizers.discriminator.history_steps"] for path in inside] == [5, 10, 5]


@pytest.mark.slow
@pytest.mark.parametrize("game", WORKERS)
def test_two_workers_equal_one_that_accumulates_to_the_bit(game: str, tiny_run: Callable[..., Run],
                                                           tmp_path: Path) -> None:
    run = tiny_run({**SIX_STEPS, **WORKERS[game], "stages.0.micro_batch": 4}, stages=1)
    finish_all(run, tmp_path / "one", 1)
    finish_all(replace(run, stages=[replace(run.stages[0], workers=2)]), tmp_path / "two", 2)
    assert_same_checkpoints(tmp_path / "two", tmp_path / "one", at_least=3)


@pytest.mark.parametrize("game", quick_first(SPLIT))
def test_a_batch_in_two_parts_has_the_gradients_of_the_whole(game: str, tiny_run: Callable[..., Run],
                                                             tmp_path: Path) -> None:
    """One step of sgd, whose momentum then holds the gradients themselves; D's first, by which G's are then taken."""
    step = {**SIX_STEPS, "stages.0.hold_images": 16, "stages.0.batch_size": 16, **GAMES[game],
            "training.optimizer": "sgd", "training.discriminator_optimizer": "", "training.momentum": 0.9,
            "training.nesterov": False, "training.d_steps": 1}
    whole, split = (tensors_of(checkpoints_of(tiny_run({**step, **change}, stages=1), None, tmp_path / name)[-1])
                    for name, change in (("whole", {}), ("split", {"stages.0.micro_batch": 8})))
    gradients = [name for name in whole if name.endswith("momentum_buffer")]
    assert {name.split(".")[1] for name in gradients} == {"generator", "discriminator"}
    for name in gradients:
        largest = max(whole[name].abs().max().item(), 0.05)  # a bias of D sums up what nearly cancels
        torch.testing.assert_close(split[name], whole[name], rtol=1e-5, atol=1e-5 * largest,
                                   msg=lambda text, name=name: f"{name}: {text}")


def checkpoints_of(run: Run, start: str | None, out: Path, stage: int = 0) -> list[str]:
    return [event["path"] for event in run_stage(run, stage, start, out) if event["event"] == "checkpoint"]


def assert_same(one: str, other: str) -> None:
    """Every tensor equal to the bit, and the same clock, phase and counts."""
    assert Path(one).name == Path(other).name
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    told = [json.loads(read(path)["state.json"]) for path in (one, other)]
    for key in ("images_seen", "phase", "resolution", "stage_end", "masked", "skipped", "data"):
        assert told[0][key] == told[1][key], key


def tensors_of(path: str) -> dict[str, Tensor]:
    """`generator.blocks.4.conv.weight`, `optimizers.generator.blocks.4.conv.weight.exp_avg` -> tensor"""
    files = read(path)
    return {f"{part}.{name}": tensor for part in TENSORS
            for name, tensor in safetensors.torch.load(files[f"{part}.safetensors"]).items()}
