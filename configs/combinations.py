"""Which settings make sense together, each refusal with its reason; and which ones keep a batch in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradine.configs.errors import require

if TYPE_CHECKING:
    from gradine.configs.schema import Run

TARGETED = ("minimax", "non_saturating", "least_squares")  # losses in which D has a target for each sample


def coupling(run: Run) -> str:
    """What of the run's game lets a sample depend on the others of its batch, beyond its stddev group; "": nothing.

    Such a batch goes through the networks in one piece.
    """
    network, training = run.network, run.training
    coupled = {
        "network.layers.generator_norm=batch": network.convolutional and network.layers.generator_norm == "batch",
        "network.layers.discriminator_norm=batch":
            network.convolutional and network.layers.discriminator_norm == "batch",
        "network.layers.dropout": network.convolutional and network.layers.dropout > 0,  # its masks: of one share
        "minibatch=discrimination": network.minibatch == "discrimination",
        "training.feature_matching": training.feature_matching,
        "training.diversity": training.diversity > 0,
    }
    return next((name for name, applies in coupled.items() if applies), "")


def refuse_senseless(run: Run) -> None:
    """UserError for ingredients that make no sense together."""
    _refuse_senseless_network(run)
    if run.data.points.kind != "none":
        _refuse_images_of_points(run)
    if run.network.autoencodes:
        _refuse_game_without_players(run)
    else:
        _refuse_senseless_game(run)
    _refuse_unused_weights(run)
    if reason := coupling(run):
        for stage in run.stages:
            require(stage.workers == 1 and stage.micro_batch in (0, stage.batch_size),
                    f"stage {stage.resolution}px: with {reason} samples depend on their whole batch, which workers="
                    f"{stage.workers} and micro_batch={stage.micro_batch} would split. Use workers=1, micro_batch=0.")
            require(stage.batch_size > 1, f"stage {stage.resolution}px: with {reason} a sample is set beside others of "
                                          "its batch, and batch_size=1 has none. Use batch_size=2 or more.")


def _refuse_senseless_network(run: Run) -> None:
    network, training, kind = run.network, run.training, run.network.kind
    first, points = run.stages[0].resolution, run.data.points.kind
    require(kind == "progressive" or len(run.stages) == 1,
            f"network.kind={kind} has one resolution, the run has {len(run.stages)} stages. "
            "List one, or use network.kind=progressive.")
    require((first == 1) == (points != "none"),
            f"stage {first}px with data.points.kind={points}: a point is an image of 1x1 px, and no other is. "
            "Use data.points.kind with one stage of resolution 1, or a resolution from 4 up without it.")
    require(not network.convolutional or first >= 8,
            f"stage {first}px with network.kind={kind}, which starts from 4x4 px. Use a resolution from 8 up.")
    for name, belongs, of in (("layers", network.convolutional, "dcgan"), ("mlp", kind == "mlp", "mlp")):
        settings = getattr(network, name)
        require(belongs or settings == type(settings)(),
                f"network.{name} is set, which network.kind={kind} does not have. Take it out, or use kind={of}.")
    for name, is_set in (("network.pool_before_activation", network.pool_before_activation),
                         ("training.recompute_from", training.recompute_from > 0)):
        require(kind == "progressive" or not is_set, f"{name} is set, which network.kind={kind} does not have. "
                                                     "Take it out, or use network.kind=progressive.")
    require((network.conditioning == "none") == (network.classes == 0),
            f"network.conditioning={network.conditioning} with network.classes={network.classes}: "
            "each needs the other. Give both, or neither.")
    require(network.classes != 1, "network.classes=1: with one class there is nothing to tell. Use at least 2.")
    require(network.codes != 1, "network.codes=1: a code of one value tells nothing. Use at least 2, or 0.")
    require(network.classes == 0 or run.data.labels != "none",
            f"network.conditioning={network.conditioning} with data.labels=none: there is nothing to condition on. "
            "Use data.labels=auto, or network.conditioning=none and classes=0.")


def _refuse_images_of_points(run: Run) -> None:
    network, training, points = run.network, run.training, f"data.points.kind={run.data.points.kind}"
    require(network.kind == "mlp",
            f"network.kind={network.kind} with {points}: points have no pixels. Use network.kind=mlp.")
    require(not training.mirror, f"training.mirror=true with {points} would flip points. Use training.mirror=false.")
    require(training.augment == "none",
            f"training.augment={training.augment} with {points}: it changes images. Use training.augment=none.")
    require(network.classes == 0,
            f"network.conditioning={network.conditioning} with {points}: points carry no labels. Use none, classes=0.")
    require(run.data.sampling == "raw",
            f"data.sampling={run.data.sampling} with {points}: points carry no labels. Use data.sampling=raw.")


def _refuse_game_without_players(run: Run) -> None:
    network, training = run.network, run.training
    game = {"network.conditioning": network.classes > 0, "network.codes": network.codes > 0,
            "network.continuous_codes": network.continuous_codes > 0,
            "network.layers.minibatch": network.layers.minibatch != "none",
            "network.layers.discriminator_norm=virtual": network.layers.discriminator_norm == "virtual",
            "training.feature_matching": training.feature_matching, "training.diversity": training.diversity > 0,
            "training.clip": training.clip > 0, "training.historical_averaging": training.historical_averaging > 0,
            "training.augment": training.augment != "none", "training.d_steps": training.d_steps > 1,
            "training.g_steps": training.g_steps > 1}
    for name, is_set in game.items():
        require(not is_set, f"{name} is set, which is of the game; network.kind={network.kind} plays none and has no "
                            "discriminator. Take it out.")
    require(network.latents == "gaussian", f"network.latents={network.latents} with network.kind={network.kind}, whose "
                                           "prior is N(0, I). Use network.latents=gaussian.")


def _refuse_senseless_game(run: Run) -> None:
    network, training = run.network, run.training
    loss, penalty = f"training.loss={training.loss}", f"training.penalty={training.penalty}"
    require(training.drift == 0 or training.loss == "wasserstein",
            f"training.drift={training.drift:g} with {loss}: the drift holds scores near 0, which a Wasserstein loss "
            "leaves free; this loss saturates by itself. Use training.drift=0.")
    require(training.clip == 0 or training.penalty == "none",
            f"training.clip={training.clip:g} with {penalty}: both bound D's slope, and clipping undoes the optimum of "
            "the penalty. Use penalty=none, or clip=0.")
    require(training.clip == 0 or training.loss == "wasserstein",
            f"training.clip={training.clip:g} with {loss}: clipping is how the Wasserstein loss keeps D Lipschitz. "
            "Use loss=wasserstein, or clip=0.")
    batch_norm = network.convolutional and network.layers.discriminator_norm == "batch"
    require(not batch_norm or training.penalty == "none",
            f"network.layers.discriminator_norm=batch with {penalty}: the penalty is on each sample's own gradient, "
            "which batch norm mixes with the others'. Use instance or none, or penalty=none.")
    require(network.minibatch != "discrimination" or training.penalty == "none",
            f"minibatch=discrimination with {penalty}: the penalty is on each sample's own gradient, which it mixes "
            "with all others'. Use stddev or none, or penalty=none.")
    require(training.loss != "wasserstein" or training.penalty == "gradient" or training.clip > 0,
            f"{loss} with {penalty} and no clip: nothing keeps D Lipschitz, and its scores grow for ever. "
            "Use penalty=gradient, or clip=0.01.")
    require(training.penalty == "gradient" or training.penalty_at == "current",
            f"training.penalty_at=final with {penalty}: it rescales a norm that has a target. Use current.")
    require(training.penalty == "gradient" or training.penalty_target == 1,
            f"training.penalty_target={training.penalty_target:g} with {penalty}, which has no target but 0. "
            "Use penalty=gradient, or take the target out.")
    require(training.penalty != "none" or training.penalty_every == 1,
            f"training.penalty_every={training.penalty_every} with {penalty}: there is none to leave out. Use 1.")
    require(not training.feature_matching or training.loss != "relativistic",
            f"training.feature_matching with {loss}: it takes the place of G's loss, of which the pairs are one half. "
            "Use one of them.")
    require(not training.changes_labels or training.loss in TARGETED,
            f"training.real_labels={training.real_labels}, fake_labels={training.fake_labels}, flip_labels="
            f"{training.flip_labels:g} with {loss}, which has no targets to smooth, draw or flip. "
            f"Use [1.0], [0.0] and 0, or a loss that has: {', '.join(TARGETED)}.")


def _refuse_unused_weights(run: Run) -> None:
    """A weight that was set and changes nothing would leave its user with a wrong conclusion."""
    network, training = run.network, run.training
    require(training.classification == 1 or network.conditioning == "auxiliary",
            f"training.classification={training.classification:g} with network.conditioning={network.conditioning}: it "
            "weighs the auxiliary classifier's loss. Use conditioning=auxiliary, or take it out.")
    require(training.information == 1 or network.codes + network.continuous_codes > 0,
            f"training.information={training.information:g} with network.codes=0 and continuous_codes=0: it weighs "
            "what D tells of them. Set codes, or take it out.")
    sgd = "sgd" in (training.optimizer_of("generator"), training.optimizer_of("discriminator"))
    require(not training.nesterov or (sgd and training.momentum > 0),
            f"training.nesterov=true with training.optimizer={training.optimizer}, momentum={training.momentum:g}: it "
            "is a way to use the momentum of sgd. Use optimizer=sgd with momentum=0.9, or nesterov=false.")
