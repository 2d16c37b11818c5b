"""Which settings are refused together, by the reason told; that what makes sense loads, and what splits no batch."""

from __future__ import annotations

from typing import Any

import pytest

from gradine.configs.combinations import coupling
from gradine.configs.schema import Run, UserError, assign, from_dict

IMAGES = {"name": "game", "data": {"source": "images", "shards": "shards"}, "training": {"drift": 0},
          "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8}, "stages": [{"resolution": 8, "batch_size": 8}]}
POINTS = {"name": "game", "data": {"source": "", "shards": "", "channels": 2, "points": {"kind": "ring"}},
          "network": {"kind": "mlp", "latent_size": 4}, "stages": [{"resolution": 1, "batch_size": 8}],
          "training": {"mirror": False, "loss": "non_saturating", "penalty": "r1", "drift": 0}}
KIND, LAYERS, LOSS, PENALTY = "network.kind", "network.layers", "training.loss", "training.penalty"
DCGAN = {KIND: "dcgan", LOSS: "non_saturating", PENALTY: "none"}
LABELLED = {**DCGAN, "network.classes": 3, "network.conditioning": "concatenated"}
VAE = {KIND: "vae"}


def run(base: dict[str, Any], changes: dict[str, Any]) -> Run:
    raw: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    raw["data"] = {**raw["data"], "points": dict(raw["data"].get("points", {}))}
    raw["stages"] = [dict(stage) for stage in base["stages"]]
    for path, value in changes.items():
        assign(raw, path, value)
    return from_dict(raw)


# ---- What makes sense


@pytest.mark.parametrize("changes", [
    {},
    {KIND: "progressive", "stages": [{"resolution": 4}, {"resolution": 8}], "training.drift": 0.001},
    {PENALTY: "none", "training.clip": 0.01},
    *({LOSS: loss, PENALTY: penalty} for loss in ("minimax", "non_saturating", "least_squares", "hinge", "relativistic")
      for penalty in ("gradient", "r1", "r1+r2", "none")),
    DCGAN,
    {**DCGAN, f"{LAYERS}.discriminator_norm": "virtual", PENALTY: "r1", "training.penalty_every": 4},
    {**DCGAN, f"{LAYERS}.minibatch": "discrimination", f"{LAYERS}.dropout": 0.3},
    {**DCGAN, f"{LAYERS}.minibatch": "stddev", f"{LAYERS}.discriminator_norm": "instance", PENALTY: "r1+r2"},
    {**DCGAN, LOSS: "wasserstein", "training.clip": 0.01},  # as the paper that introduced clipping has it
    LABELLED,
    {**LABELLED, "network.conditioning": "projection", LOSS: "hinge"},
    {**LABELLED, "network.conditioning": "auxiliary", "training.classification": 0.5},
    {**DCGAN, "network.codes": 10, "network.continuous_codes": 2, "training.information": 0.1},
    {**DCGAN, "training.real_labels": [0.7, 1.2], "training.fake_labels": [0.0, 0.3], "training.flip_labels": 0.05},
    {**DCGAN, "training.feature_matching": True, "training.diversity": 0.1, "training.historical_averaging": 1e-3},
    {**DCGAN, "training.augment": "adaptive", "training.d_steps": 3, "training.g_steps": 2},
    {**DCGAN, "training.discriminator_optimizer": "sgd", "training.nesterov": True},
    {KIND: "autoencoder"},
    {**VAE, f"{LAYERS}.upsampling": "shuffle", LOSS: "non_saturating", PENALTY: "none"},  # over a GAN's recipe
    {KIND: "mlp", "network.mlp.minibatch": "stddev"},
], ids=str)
def test_what_makes_sense_loads(changes: dict[str, Any]) -> None:
    run(IMAGES, changes)


@pytest.mark.parametrize("changes", [{}, {"network.codes": 8}, {"network.mlp.minibatch": "discrimination",
                                                                PENALTY: "none"}], ids=str)
def test_games_of_points_load(changes: dict[str, Any]) -> None:
    run(POINTS, changes)


# ---- What does not: the message names what was set on both sides, the reason, and a way out


@pytest.mark.parametrize(("changes", "sides", "reason", "way_out"), [
    ({**DCGAN, "stages": [{"resolution": 8}, {"resolution": 16}]}, ["network.kind=dcgan", "2 stages"],
     "has one resolution", "network.kind=progressive"),
    ({"stages.0.resolution": 1}, ["stage 1px", "data.points.kind=none"], "a point is an image of 1x1 px",
     "resolution from 4 up"),
    ({**DCGAN, "stages.0.resolution": 4}, ["stage 4px", "network.kind=dcgan"], "starts from 4x4", "from 8 up"),
    ({f"{LAYERS}.dropout": 0.1}, ["network.layers", "network.kind=progressive"], "does not have", "kind=dcgan"),
    ({**DCGAN, "network.mlp.width": 8}, ["network.mlp", "network.kind=dcgan"], "does not have", "kind=mlp"),
    ({**DCGAN, "network.pool_before_activation": True}, ["network.pool_before_activation", "network.kind=dcgan"],
     "does not have", "network.kind=progressive"),
    ({**DCGAN, "training.recompute_from": 8}, ["training.recompute_from", "network.kind=dcgan"], "does not have",
     "network.kind=progressive"),
    ({**DCGAN, "network.classes": 3}, ["network.conditioning=none", "network.classes=3"],
     "each needs the other", "both"),
    ({**DCGAN, "network.conditioning": "projection"}, ["network.conditioning=projection", "network.classes=0"],
     "each needs the other", "neither"),
    ({**LABELLED, "network.classes": 1}, ["network.classes=1"], "nothing to tell", "at least 2"),
    ({**DCGAN, "network.codes": 1}, ["network.codes=1"], "tells nothing", "at least 2"),
    ({**LABELLED, "data.labels": "none"}, ["network.conditioning=concatenated", "data.labels=none"],
     "nothing to condition on", "data.labels=auto"),
    ({"training.drift": 0.001, LOSS: "hinge"}, ["training.drift=0.001", "training.loss=hinge"], "saturates by itself",
     "training.drift=0"),
    ({"training.clip": 0.01}, ["training.clip=0.01", "training.penalty=gradient"], "both bound D's slope", "clip=0"),
    ({**DCGAN, "training.clip": 0.01}, ["training.clip=0.01", "training.loss=non_saturating"],
     "how the Wasserstein loss keeps D Lipschitz", "loss=wasserstein"),
    ({**DCGAN, PENALTY: "r1"}, ["network.layers.discriminator_norm=batch", "training.penalty=r1"],
     "batch norm mixes with the others'", "penalty=none"),
    ({**DCGAN, PENALTY: "r1", f"{LAYERS}.discriminator_norm": "none", f"{LAYERS}.minibatch": "discrimination"},
     ["minibatch=discrimination", "training.penalty=r1"], "each sample's own gradient", "stddev"),
    ({PENALTY: "none"}, ["training.loss=wasserstein", "training.penalty=none"], "scores grow for ever", "clip=0.01"),
    ({PENALTY: "r1"}, ["training.loss=wasserstein", "training.penalty=r1"], "nothing keeps D Lipschitz",
     "penalty=gradient"),
    ({LOSS: "hinge", PENALTY: "r1", "training.penalty_at": "final"}, ["training.penalty_at=final",
     "training.penalty=r1"], "has a target", "current"),
    ({LOSS: "hinge", PENALTY: "r1", "training.penalty_target": 750}, ["training.penalty_target=750",
     "training.penalty=r1"], "no target but 0", "penalty=gradient"),
    ({**DCGAN, "training.penalty_every": 16}, ["training.penalty_every=16", "training.penalty=none"],
     "none to leave out", "Use 1"),
    ({**DCGAN, LOSS: "relativistic", "training.feature_matching": True}, ["training.feature_matching",
     "training.loss=relativistic"], "takes the place of G's loss", "one of them"),
    ({LOSS: "hinge", "training.real_labels": [0.9]}, ["training.real_labels=[0.9]", "training.loss=hinge"],
     "no targets", "least_squares"),
    ({"training.flip_labels": 0.1}, ["flip_labels=0.1", "training.loss=wasserstein"], "no targets", "minimax"),
    ({**LABELLED, "training.classification": 2}, ["training.classification=2", "network.conditioning=concatenated"],
     "weighs the auxiliary", "conditioning=auxiliary"),
    ({**DCGAN, "training.information": 2}, ["training.information=2", "network.codes=0"], "weighs what", "Set codes"),
    ({"training.nesterov": True}, ["training.nesterov=true", "training.optimizer=adam"], "momentum of sgd",
     "optimizer=sgd"),
    ({"training.nesterov": True, "training.optimizer": "sgd", "training.momentum": 0}, ["training.nesterov=true",
     "momentum=0"], "momentum of sgd", "momentum=0.9"),
    *(({**VAE, **of_game}, [setting, "network.kind=vae"], "of the game", "Take it out") for setting, of_game in (
        ("network.conditioning", {"network.classes": 3, "network.conditioning": "projection"}),
        ("network.codes", {"network.codes": 3}),
        ("network.continuous_codes", {"network.continuous_codes": 1}),
        ("network.layers.minibatch", {f"{LAYERS}.minibatch": "stddev"}),
        ("network.layers.discriminator_norm=virtual", {f"{LAYERS}.discriminator_norm": "virtual"}),
        ("training.feature_matching", {"training.feature_matching": True}),
        ("training.diversity", {"training.diversity": 1}),
        ("training.clip", {"training.clip": 0.01}),
        ("training.historical_averaging", {"training.historical_averaging": 1}),
        ("training.augment", {"training.augment": "always"}),
        ("training.d_steps", {"training.d_steps": 2}),
        ("training.g_steps", {"training.g_steps": 2}))),
    ({KIND: "autoencoder", "network.latents": "uniform"}, ["network.latents=uniform", "network.kind=autoencoder"],
     "prior is N(0, I)", "network.latents=gaussian"),
    *(({**DCGAN, f"{LAYERS}.discriminator_norm": "none", f"{LAYERS}.generator_norm": "none", **coupled, **split},
       [setting, "workers=", "micro_batch="], "depend on their whole batch", "workers=1")
      for setting, coupled in (("network.layers.generator_norm=batch", {f"{LAYERS}.generator_norm": "batch"}),
                               ("network.layers.discriminator_norm=batch", {f"{LAYERS}.discriminator_norm": "batch"}),
                               ("network.layers.dropout", {f"{LAYERS}.dropout": 0.1}),
                               ("minibatch=discrimination", {f"{LAYERS}.minibatch": "discrimination"}),
                               ("training.feature_matching", {"training.feature_matching": True}),
                               ("training.diversity", {"training.diversity": 1}))
      for split in ({"stages.0.workers": 2}, {"stages.0.micro_batch": 4})),
    ({**DCGAN, "stages.0.batch_size": 1}, ["network.layers.generator_norm=batch", "batch_size=1"], "set beside others",
     "batch_size=2"),
], ids=str)
def test_what_makes_no_sense_is_refused_with_its_reason(changes: dict[str, Any], sides: list[str], reason: str,
                                                        way_out: str) -> None:
    check_refusal(IMAGES, changes, sides, reason, way_out)


@pytest.mark.parametrize(("changes", "side", "reason"), [
    ({"stages.0.resolution": 8}, "stage 8px", "a point is an image of 1x1 px"),
    ({KIND: "progressive"}, "network.kind=progressive", "points have no pixels"),
    ({"training.mirror": True}, "training.mirror=true", "would flip points"),
    ({"training.augment": "always"}, "training.augment=always", "changes images"),
    ({"network.classes": 8, "network.conditioning": "projection"}, "network.conditioning=projection", "no labels"),
    ({"data.sampling": "balanced"}, "data.sampling=balanced", "no labels"),
], ids=str)
def test_what_needs_an_image_is_refused_of_points(changes: dict[str, Any], side: str, reason: str) -> None:
    check_refusal(POINTS, changes, [side, "data.points.kind=ring"], reason, "Use ")


def check_refusal(base: dict[str, Any], changes: dict[str, Any], sides: list[str], reason: str, way_out: str) -> None:
    with pytest.raises(UserError) as caught:
        run(base, changes)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*sides, reason, way_out):
        assert part in message


# ---- Which games split their batch


@pytest.mark.parametrize("changes", [
    {}, {LOSS: "relativistic", PENALTY: "r1+r2"}, {"training.historical_averaging": 1.0}, {"network.codes": 4},
    {LOSS: "hinge", "training.augment": "adaptive"}, {KIND: "mlp", "network.mlp.minibatch": "stddev"},
    {**DCGAN, f"{LAYERS}.generator_norm": "pixel", f"{LAYERS}.discriminator_norm": "virtual"},
    {**VAE, f"{LAYERS}.generator_norm": "instance", f"{LAYERS}.discriminator_norm": "none"},
], ids=str)
def test_a_game_of_independent_samples_splits_over_workers_and_micro_batches(changes: dict[str, Any]) -> None:
    assert coupling(run(IMAGES, changes)) == ""
    run(IMAGES, {**changes, "stages.0.workers": 2})
    run(IMAGES, {**changes, "stages.0.micro_batch": 4})
