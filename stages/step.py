"""One training step: a discriminator update, then a generator update on fresh latents, then the average.

The global batch is split into shares of whole stddev groups; losses are sums over a share's rows / global batch, so
gradients add up to those of the whole batch whatever the split. Nothing here waits for the device: figures come back
as detached tensors, and whoever logs them decides when to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradine.configs.schema import Run
from gradine.stages.growth import Moment
from gradine.stages.losses import critic_loss, generator_loss, gradient_norm, gradient_penalty
from gradine.stages.networks import Discriminator, Generator, box_downscale, shows_older, upscale

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Share:
    """The rows of the global batch that go through the networks together."""

    reals: Tensor  # uint8 [n, C, R, R], in any memory layout
    mirrored: Tensor  # bool [n]
    critic_latents: Tensor  # [n, latent_size], for D's update
    generator_latents: Tensor  # [n, latent_size], for G's
    mix: Tensor  # [n] in [0, 1): where between real and fake the penalty looks

    def pinned(self) -> Share:
        """In memory that a GPU copies from without the host waiting."""
        return Share(*(tensor.pin_memory() for tensor in vars(self).values()))

    def to(self, device: torch.device) -> Share:
        return Share(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


@dataclass
class TrainState:
    """All that a step changes. `checkpoint.py` saves exactly this."""

    generator: Generator
    discriminator: Discriminator
    average: Generator
    generator_adam: torch.optim.Adam
    discriminator_adam: torch.optim.Adam
    masked: Tensor  # [2] updates masked because a gradient was not finite: of D, of G
    images_seen: int = 0


@dataclass(frozen=True)
class Rules:
    """The constants of a stage's steps."""

    penalty_weight: float
    penalty_target: float
    penalty_divisor: int
    drift: float
    average_decay: float  # per step: 0.5 ** (batch / half-life)
    dtype: torch.dtype  # what convolutions are computed in
    penalty_every: int = 1  # steps from one penalty to the next, whose weight grows as much

    @staticmethod
    def of(run: Run, batch_size: int, penalty_divisor: int, precision: str = "") -> Rules:
        """precision: of the stage, where it was chosen apart from the run's."""
        t = run.training
        return Rules(t.penalty_weight, t.penalty_target, penalty_divisor, t.drift,
                     0.5 ** (batch_size / t.average_half_life),
                     torch.bfloat16 if (precision or t.precision) == "bfloat16" else torch.float32, t.penalty_every)


def new_adam(network: nn.Module, run: Run) -> torch.optim.Adam:
    """Fresh Adam: no moments, step 0. Fused, because that one can mask an update on the device (`found_inf`)."""
    betas = (float(run.training.beta1), float(run.training.beta2))
    return torch.optim.Adam(network.parameters(), lr=0.0, betas=betas, eps=1e-8, fused=True)


def prepare_reals(pixels: Tensor, mirrored: Tensor, alpha: float | Tensor) -> Tensor:
    """uint8 [n, C, R, R] -> float in [-1, 1], flipped where asked, faded like the networks' view of the images.

    The result has one memory layout whatever that of `pixels`: the kernels that follow, hence the bits, depend on it.
    """
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return torch.lerp(upscale(box_downscale(images)), images, alpha) if shows_older(alpha) else images


def critic_objective(state: TrainState, share: Share, alpha: float | Tensor, rules: Rules,
                     penalised: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """D's loss summed over the share's rows, and sums of what one wants to see.

    Reals, fakes and what lies between them pass D as one batch, so that its weights are scaled, and read, once.
    """
    with labelled("reals"):
        reals = prepare_reals(share.reals, share.mirrored, alpha)
    with torch.no_grad(), labelled("generator forward"):
        fakes = state.generator(share.critic_latents, alpha, rules.dtype)
    images = [reals, fakes]
    if penalised:
        images.append(torch.lerp(reals, fakes, share.mix.view(-1, 1, 1, 1)))
    with labelled("discriminator forward"):
        scores, pull = state.discriminator.linearised(torch.cat(images), alpha, rules.dtype, sets=len(images))
        real_scores, fake_scores = scores.chunk(len(images))[:2]
    losses = critic_loss(real_scores, fake_scores, rules.drift)
    seen = {"score_real": real_scores.sum(), "score_fake": fake_scores.sum()}
    if penalised:
        with labelled("penalty"):
            norm = gradient_norm(pull(torch.ones_like(real_scores))) / rules.penalty_divisor
            penalty = gradient_penalty(norm, rules.penalty_weight, rules.penalty_target)
        losses = losses + rules.penalty_every * penalty
        seen |= {"penalty": penalty.sum(), "gradient_norm": norm.sum()}
    loss = losses.sum()
    return loss, {"loss_d": loss, **seen}


def generator_objective(state: TrainState, share: Share, alpha: float | Tensor,
                        rules: Rules) -> tuple[Tensor, dict[str, Tensor]]:
    """G's loss summed over the share's rows."""
    with labelled("generator forward"):
        fakes = state.generator(share.generator_latents, alpha, rules.dtype)
    with labelled("discriminator forward"):
        loss = generator_loss(state.discriminator(fakes, alpha, rules.dtype)).sum()
    return loss, {"loss_g": loss}


@dataclass(frozen=True)
class Objectives:
    """What the two updates minimise: as written above, or compiled (compiling.py)."""

    critic: Callable[[TrainState, Share, float, Rules, bool], tuple[Tensor, dict[str, Tensor]]] = critic_objective
    generator: Callable[[TrainState, Share, float, Rules], tuple[Tensor, dict[str, Tensor]]] = generator_objective


def train_step(state: TrainState, shares: list[Share], moment: Moment, rules: Rules,
               reduce: Reduce | None = None, objectives: Objectives = Objectives()) -> dict[str, Tensor]:
    """Updates `state` by one step at `moment`; returns this worker's part of the batch means, detached.

    `reduce` sums a tensor over all workers; None: there is but one.
    """
    batch, alpha = moment.phase.batch_size, moment.alpha
    penalised = (moment.images_seen - moment.phase.start) // batch % rules.penalty_every == 0
    seen: dict[str, Tensor] = {}

    def accumulate(network: nn.Module, objective: Callable[[Share], tuple[Tensor, dict[str, Tensor]]]) -> None:
        network.zero_grad(set_to_none=True)
        parameters = list(network.parameters())
        for share in shares:
            loss, figures = objective(share)
            with labelled("backward"):  # of this network only: the other's gradients are neither computed nor kept
                (loss / batch).backward(inputs=parameters)
            for name, figure in figures.items():
                seen[name] = seen.get(name, 0) + figure.detach() / batch
        for parameter in parameters:  # of the older branch, once the newer alone is seen
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if reduce:
            reduce_gradients(network, reduce)

    accumulate(state.discriminator, lambda share: objectives.critic(state, share, alpha, rules, penalised))
    finite_d = masked_update(state.discriminator_adam, moment.learning_rate)
    accumulate(state.generator, lambda share: objectives.generator(state, share, alpha, rules))
    finite_g = masked_update(state.generator_adam, moment.learning_rate)
    update_average(state.average, state.generator, (1 - rules.average_decay) * finite_g)
    state.masked += 1 - torch.stack([finite_d, finite_g])
    state.images_seen += batch
    return seen


def labelled(name: str) -> AbstractContextManager[Any]:
    """What a profiler calls this part of a step; compilers have labels of their own."""
    return nullcontext() if torch.compiler.is_compiling() else torch.profiler.record_function(name)


def reduce_gradients(network: nn.Module, reduce: Reduce) -> None:
    """Sums every gradient over the workers, as one vector in the order of the parameters.

    Data-parallel wrappers choose their buckets anew after the first step, and with three workers or more the order of
    a sum depends on its place in a bucket: a resumed run would then differ from the unbroken one.
    """
    gradients = [in_memory_order(parameter.grad) for parameter in network.parameters() if parameter.grad is not None]
    summed = reduce(torch.cat(gradients))
    for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part)


def in_memory_order(tensor: Tensor) -> Tensor:
    """All entries as they lie there, a view of [n]: weights that lie channels last need no reordering to be summed."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.permute(0, 2, 3, 1).view(-1)


def masked_update(adam: torch.optim.Adam, learning_rate: float) -> Tensor:
    """One Adam step, unless a gradient is not finite: then weights, moments and Adam's step stay. -> 1.0 or 0.0.

    Gradients are already reduced, hence equal on all workers, and so is the decision.
    """
    gradients = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
    with labelled("optimizer"):
        finite = torch.isfinite(largest_entry(gradients)).to(torch.float32)
        for group in adam.param_groups:
            group["lr"] = learning_rate
        adam.found_inf = 1 - finite  # type: ignore[attr-defined]  # the fused kernels' own switch, as loss scalers use
        adam.step()
    return finite


def largest_entry(tensors: list[Tensor]) -> Tensor:
    """Its absolute value; NaN or infinity if any tensor holds one."""
    if tensors[0].is_cuda:
        return torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))  # all of them in one kernel
    return torch.stack([tensor.abs().amax() for tensor in tensors]).amax()  # on CPUs twenty times as fast


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, weight: Tensor) -> None:
    """average += weight * (network - average); weight 0 changes nothing."""
    with labelled("average"):
        for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(parameter, weight)


def non_finite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or infinity. Waits for the device: for log ticks and saves."""
    named = list(tensors)
    flags = torch.stack([torch.isfinite(tensor).all() for _, tensor in named]).tolist()
    return [name for (name, _), finite in zip(named, flags, strict=True) if not finite]
