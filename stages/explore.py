"""What a generator's latents hold: walks, sums of means, directions that a classifier shows, and the way back to them.

Latents are [N, input_size], images [N, C, R, R] in about [-1, 1], all float32. Only the noise of latents is moved: the
label and the codes behind it stay. Most of N(0, I) lies near the sphere of radius sqrt(latent_size), and a generator
knows no other latents: what is moved is brought back there, and ways lead along great circles. Uniform latents fill a
cube instead: there ways are straight, and what leaves it is brought back to its side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradine.configs.schema import Network, UserError
from gradine.stages.distances import slerp
from gradine.stages.generate import images_at_once
from gradine.stages.latents import Parts

STEP = 0.02  # of the sphere's radius: how far one step towards a classifier's yes goes
SHELL = 3 / math.sqrt(2)  # three standard deviations of the length of N(0, I), which hardly depend on its size

Classify = Callable[[Tensor], Tensor]  # images [N, C, R, R] -> logits [N, K]


def radius(network: Network) -> float:
    return math.sqrt(network.latent_size)


def returned(noise: Tensor, network: Network) -> Tensor:
    """[N, latent_size] such as means of latents, which are too short -> of length sqrt(latent_size), or in the cube."""
    return noise.clamp(-1, 1) if network.latents == "uniform" else F.normalize(noise, dim=1) * radius(network)


def walk(start: Tensor, end: Tensor, steps: int, network: Network) -> Tensor:
    """[input_size] twice -> [steps, input_size] from start to the noise of end, both included, in equal steps: along
    the shorter great circle, the length changing evenly; a straight line for uniform latents."""
    noise = Parts.of(network).noise
    a, b = start[noise], end[noise]
    shares = torch.linspace(0, 1, steps)[:, None]
    if network.latents == "uniform":
        between = torch.lerp(a, b, shares)
    else:
        lengths = torch.lerp(a.norm(), b.norm(), shares)
        between = slerp(a.expand(steps, -1), b.expand(steps, -1), shares) * lengths
    between[0], between[-1] = a, b  # not as rounding leaves them: they show the images of their seeds
    return with_noise(start.repeat(steps, 1), between, network)


def with_noise(latents: Tensor, noise: Tensor, network: Network) -> Tensor:
    """The latents with other noise, and the label and codes they have."""
    return torch.cat([noise, latents[:, Parts.of(network).noise.stop:]], dim=1)


def arithmetic(groups: Sequence[Tensor], network: Network) -> tuple[Tensor, Tensor]:
    """Groups [n, input_size] A, B and, perhaps, C -> their means [2 or 3, input_size], each brought back, and mean
    z(A) - mean z(B) + mean z(C), [1, input_size], brought back too (Radford et al. 2016). The condition of all is that
    of A's first. UserError where nothing is left."""
    noise = Parts.of(network).noise
    means = torch.stack([group[:, noise].mean(dim=0) for group in groups])
    signs = torch.tensor([1.0, -1.0, 1.0])[:len(means), None]
    result = (signs * means).sum(dim=0, keepdim=True)
    if not result.any():
        raise UserError("--plus and --minus name the same images: their difference is nothing. Name others.")
    like = groups[0][:1]
    return (with_noise(like.expand(len(means), -1), returned(means, network), network),
            with_noise(like, returned(result, network), network))


# ---- Directions


def at_once(generator: nn.Module) -> int:
    return images_at_once(cast("int", generator.resolution))


def log_odds(logits: Tensor) -> Tensor:
    """[N, K] -> [N, K]: log p / (1 - p) of each class. Above 0 the classifier says yes; it rises for ever, where p
    saturates. A single logit is the log odds of its class already."""
    if logits.shape[1] == 1:
        return logits
    others = logits[:, None].expand(-1, logits.shape[1], -1).masked_fill(
        torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device), -torch.inf)
    return logits - others.logsumexp(dim=2)


@dataclass(frozen=True)
class Followed:
    """A direction that a classifier's gradients have shown."""

    direction: Tensor  # [latent_size], of length 1
    walked: int  # samples that were no at first
    arrived: int  # and of these, that became yes
    steps: float  # of those: mean


def follow(generator: nn.Module, classify: Classify, latents: Tensor, wanted: int, limit: int, network: Network
           ) -> Followed:
    """From each of the latents that is not of class `wanted`, steps along the gradient of its log odds C(G(z)) until
    the classifier says yes, `limit` at most; the mean of all unit steps, to unit length.

    UserError where no sample needs a step, or none has a gradient.
    """
    total = torch.zeros(network.latent_size, device=latents.device)
    walked = arrived = taken = 0
    for part in latents.split(at_once(generator)):
        z, steps = part.clone(), torch.zeros(len(part), device=part.device)
        for _ in range(limit + 1):
            gradient, odds = gradient_of(generator, classify, z, wanted)
            waiting = (odds <= 0) & (steps < limit)
            if not waiting.any():
                break
            unit = F.normalize(gradient[:, Parts.of(network).noise], dim=1) * waiting[:, None]
            total += unit.sum(dim=0)
            z = torch.where(waiting[:, None], moved(z, unit, STEP * radius(network), network), z)
            steps += waiting
        yes = (steps > 0) & (odds > 0)
        walked += int((steps > 0).sum())
        arrived += int(yes.sum())
        taken += int(steps[yes].sum())
    if not walked:
        raise UserError(f"--class: all {len(latents)} samples are of class {wanted} already: no way leads there. Use a "
                        "class that some are not of, or another --seed.")
    if not total.any():
        raise UserError(f"--class: the score of class {wanted} does not depend on the latents, its gradient is 0. Use "
                        "a classifier that is differentiable and not saturated.")
    return Followed(F.normalize(total, dim=0), walked, arrived, taken / max(1, arrived))


def gradient_of(generator: nn.Module, classify: Classify, latents: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """d log odds / d z, [N, input_size], and the log odds themselves, [N], of one class."""
    latents = latents.detach().requires_grad_()
    with torch.enable_grad():
        odds = log_odds(classify(generator(latents)))[:, wanted]
        if not odds.requires_grad:
            raise UserError("--classifier: its logits have no gradient: it must be made of torch operations on the "
                            "images, without no_grad or detach.")
        (gradient,) = torch.autograd.grad(odds.sum(), latents)
    return gradient, odds.detach()


def moved(latents: Tensor, direction: Tensor, amount: float, network: Network) -> Tensor:
    """latents + amount * direction, [latent_size] or [N, latent_size]; each then as far out as it was, or in the cube.

    amount is in standard deviations of Gaussian latents along a direction of length 1.
    """
    noise = latents[:, Parts.of(network).noise]
    there = noise + amount * direction
    if network.latents == "uniform":
        return with_noise(latents, there.clamp(-1, 1), network)
    return with_noise(latents, F.normalize(there, dim=1) * noise.norm(dim=1, keepdim=True), network)


def between_means(latents: Tensor, labels: Tensor, wanted: int, network: Network) -> Tensor:
    """[latent_size], of length 1: from the mean of the other samples to that of class `wanted`. Labels: [N]."""
    noise, of_class = latents[:, Parts.of(network).noise], labels == wanted
    if of_class.all() or not of_class.any():
        raise UserError(f"--labels: {'all' if of_class.any() else 'none'} of the {len(labels)} samples are of class "
                        f"{wanted}: a direction leads from some to others. Label samples of both kinds.")
    return F.normalize(noise[of_class].mean(dim=0) - noise[~of_class].mean(dim=0), dim=0)


@torch.no_grad()
def odds_along(generator: nn.Module, classify: Classify, latents: Tensor, direction: Tensor, amounts: Sequence[float],
               network: Network) -> Tensor:
    """[len(amounts), N, K]: the log odds of all classes as the samples move along a direction."""
    return torch.stack([torch.cat([
        log_odds(classify(generator(part)))
        for part in moved(latents, direction, amount, network).split(at_once(generator))]) for amount in amounts])


# ---- Nearest training images


def nearest(points: Tensor, blocks: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """[N, D] and others in blocks [n, D] -> [N, count] Euclidean distances, the nearest first, and places among the
    others. Differences are squared as they are: expanded into products they would cancel where copies are."""
    distances, places, seen = points.new_zeros(len(points), 0), torch.zeros(len(points), 0, dtype=torch.int64), 0
    for block in blocks:
        here = torch.cdist(points, block, compute_mode="donot_use_mm_for_euclid_dist")
        both = torch.cat([distances, here], dim=1)
        both_places = torch.cat([places, torch.arange(seen, seen + len(block)).expand(len(points), -1)], dim=1)
        distances, order = both.topk(min(count, both.shape[1]), largest=False)
        places, seen = both_places.gather(1, order), seen + len(block)
    return distances, places


# ---- From images to latents


def kept(noise: Tensor, network: Network) -> Tensor:
    """[N, latent_size] brought back to where latents are drawn: for Gaussian ones a shell, since their lengths vary."""
    if network.latents != "gaussian":
        return returned(noise, network)
    lengths = noise.norm(dim=1, keepdim=True)
    return noise * (lengths.clamp(radius(network) - SHELL, radius(network) + SHELL) / lengths.clamp_min(1e-12))


def squared_error(shown: Tensor, targets: Tensor) -> Tensor:
    """[N, C, R, R] twice -> [N], means over pixels. Pixels end at -1 and 1: a generator that goes beyond what is black
    or white there shows the same."""
    beyond = (targets.abs() >= 1) & (shown * targets > 1)
    return (shown - targets).masked_fill(beyond, 0).square().mean(dim=(1, 2, 3))


def inverted(generator: nn.Module, image: Tensor, starts: Tensor, steps: int, rate: float, network: Network
             ) -> tuple[Tensor, float]:
    """The latents [input_size] whose image is nearest to `image`, [C, R, R], in the mean square of pixels, and that
    mean square: Adam on the noise from each of `starts`, [n, input_size], the learning rate falling from `rate` to 0
    along half a cosine; the best end counts.
    """
    noise = starts[:, Parts.of(network).noise].clone().requires_grad_()
    targets = image.expand(len(starts), -1, -1, -1)
    optimizer = torch.optim.Adam([noise], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            shown = generator(with_noise(starts, noise, network))
            optimizer.zero_grad()
            squared_error(shown, targets).sum().backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                noise.copy_(kept(noise, network))
    with torch.no_grad():
        ends = with_noise(starts, noise.detach(), network)
        errors = squared_error(generator(ends), targets)
    best = int(errors.argmin())
    return ends[best], float(errors[best])


# ---- Codes


def traversals(latents: Tensor, columns: int, network: Network) -> dict[str, Tensor]:
    """For each part of the condition that the network has, the latents [N, n, input_size] that differ in its value
    alone: `label` and `code` take all theirs, each `continuous-i` n = `columns` from -2 to 2, twice what is drawn."""
    parts, found = Parts.of(network), dict[str, Tensor]()
    for name, part in (("label", parts.label), ("code", parts.code)):
        if size := part.stop - part.start:
            varied = latents[:, None].repeat(1, size, 1)
            varied[:, :, part] = torch.eye(size)
            found[name] = varied
    for number in range(network.continuous_codes):
        varied = latents[:, None].repeat(1, columns, 1)
        varied[:, :, parts.continuous.start + number] = torch.linspace(-2, 2, columns)
        found[f"continuous-{number}"] = varied
    return found
