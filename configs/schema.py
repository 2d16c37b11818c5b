"""Every setting: its name, unit, default and bounds; how a YAML file becomes one frozen `Run`.

YAML -> the preset it names -> `key.path=value` overrides -> frozen dataclasses, checked on construction.
Images are counted one by one (an int), never in kimg; resolutions are pixels per side.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradine.configs.combinations import refuse_senseless
from gradine.configs.errors import CrashLoop as CrashLoop
from gradine.configs.errors import Diverged as Diverged
from gradine.configs.errors import EnvironmentFault as EnvironmentFault
from gradine.configs.errors import SaveFault as SaveFault
from gradine.configs.errors import UserError as UserError
from gradine.configs.errors import hint, is_power_of_two, redacted_urls, refuse_login, refuse_query
from gradine.configs.errors import one_of as one_of
from gradine.configs.errors import redacted as redacted
from gradine.configs.errors import require as require

RECIPES = Path(__file__).parent
ENCODINGS = ("raw", "png", "webp", "jpeg")


@dataclass(frozen=True, kw_only=True)
class Points:
    """Reals that are drawn, not read: pairs of numbers from equal 2-D normal distributions, whose density is known.

    A pair is an image of 1x1 px with two channels; the run has one stage of resolution 1, and no shards.
    """

    kind: str = "none"  # `gaussian`: one; `ring`: modes on a circle; `grid`: modes in a square; `none`: images
    modes: int = 8  # of the ring; of the grid, a square number
    radius: float = 0.7  # of the ring; half the side of the grid
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of all modes together
    deviations: list[float] = field(default_factory=lambda: [0.05, 0.05])  # standard ones of each mode, in x and y
    correlation: float = 0.0  # of x and y in each mode

    def __post_init__(self) -> None:
        one_of("data.points.kind", self.kind, ["none", "gaussian", "ring", "grid"])
        for name in ("mean", "deviations"):
            pair = getattr(self, name)
            require(len(pair) == 2 and all(map(math.isfinite, pair)),
                    f"data.points.{name}={pair}: give two numbers, [x, y].")
        require(min(self.deviations) > 0 and self.radius > 0,
                f"data.points.deviations={self.deviations}, radius={self.radius} must be positive.")
        require(-1 < self.correlation < 1, f"data.points.correlation={self.correlation} must lie between -1 and 1.")
        require(self.modes >= 2 and (self.kind != "grid" or math.isqrt(self.modes) ** 2 == self.modes),
                f"data.points.modes={self.modes}: use at least 2, and for a grid a square number such as 25.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from and how they become shards. A location is a path, or s3://, gs:// or http(s)://."""

    source: str = MISSING  # folder, zip, tar, WebDataset, IDX or Parquet; `bundled:demo_images.zip` ships with gradine
    shards: str = MISSING  # location of the shards, made if missing
    channels: int = 3  # 3: RGB; 1: gray, and the networks follow
    crop: str = "centre"  # largest `centre` square; `none` refuses what is not square; `random-4`: 4 an image; `tile`
    crop_seed: int = 0  # of random-k
    small: str = "reject"  # an image below the top level: `reject` it, `upscale` it, or `pad` it with the background
    background: str = "white"  # under transparent pixels and around padded ones: a colour's name, or "#rrggbb"
    labels: str = "auto"  # what the source carries; `folders`; `none`; or a .json, .csv or .jsonl file: path, label
    encoding: str = "raw:64,webp"  # kind:up-to-px, the last without: raw, png and webp lose nothing; jpeg is at 95
    shard_images: int = 256  # source images per tar
    max_rejected_share: float = 0.01  # above it, sharding stops instead of training on a torn set
    max_pixels: int = 100_000_000  # a header that claims more is refused before decoding
    sampling: str = "raw"  # `balanced`: every class equally often
    prefetch: int = 2  # batches made ahead of their step
    cache_gb: float = 2.0  # a level whose decoded pixels fit is mapped from a cache file on each node
    cache_dir: str = "~/.cache/gradine"
    download_gb: float = 50.0  # disk per node for shards of a remote location, downloaded ahead of their use
    deadline_s: float = 600.0  # for one file of a remote location, all retries included
    points: Points = field(default_factory=Points)  # instead of images: reals of a known density

    def __post_init__(self) -> None:
        if self.points.kind == "none":
            require(self.channels in (1, 3), f"data.channels={self.channels}: use 3 for colour or 1 for gray.")
        else:
            require(self.channels == 2, f"data.channels={self.channels}: a point has two numbers. Use data.channels=2.")
        if not re.fullmatch(r"random-[1-9]\d{0,2}", self.crop):
            one_of("data.crop", self.crop, ["centre", "none", "tile", "random-4"])
        one_of("data.small", self.small, ["reject", "upscale", "pad"])
        one_of("data.sampling", self.sampling, ["raw", "balanced"])
        if not self.labels.endswith((".json", ".csv", ".jsonl")):
            one_of("data.labels", self.labels, ["auto", "folders", "none"])
        self.encoding_of(4)
        refuse_login("data.source", self.source)
        refuse_login("data.shards", self.shards)
        refuse_query("data.shards", self.shards)
        for name in ("shard_images", "max_pixels", "deadline_s", "prefetch"):
            require(getattr(self, name) > 0, f"data.{name}={getattr(self, name)} must be positive.")
        for name in ("cache_gb", "download_gb"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)} must not be negative.")
        share = self.max_rejected_share
        require(0 <= share < 1, f"data.max_rejected_share={share} is a share of the images: use 0 <= share < 1.")

    def encoding_of(self, resolution: int) -> str:
        """`raw:64,webp` -> raw up to 64 px, webp above."""
        *bounded, last = self.encoding.split(",")
        limits = [(kind, limit) for kind, _, limit in (item.partition(":") for item in bounded)]
        sizes = [int(limit) if limit.isdigit() else 0 for _, limit in limits]
        require(all(sizes) and sizes == sorted(set(sizes)) and ":" not in last,
                f"data.encoding={self.encoding!r} is not kind:px,...,kind with rising px, e.g. raw:64,jpeg.")
        for kind in (*(kind for kind, _ in limits), last):
            one_of("data.encoding", kind, ENCODINGS)
        return next((kind for (kind, _), size in zip(limits, sizes, strict=True) if resolution <= size), last)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What the convolutional networks of one resolution (dcgan, autoencoder, vae) are made of."""

    upsampling: str = "transposed"  # `transposed` convolution of stride 2, `nearest` + convolution, pixel `shuffle`
    pooling: str = "stride"  # of the convolutions; `mean` of 2x2 outputs
    generator_norm: str = "batch"  # `batch`, `instance`, `pixel` or `none`; never after its last layer
    discriminator_norm: str = "batch"  # `batch`, `instance`, `virtual` (a fixed batch of reals) or `none`
    generator_activation: str = "relu"  # or `leaky_relu` of slope 0.2, which the discriminator always has
    dropout: float = 0.0  # share of the generator's feature maps that a training pass leaves out
    minibatch: str = "none"  # what D sees of several samples: `stddev` (of groups of 4), `discrimination` or `none`

    def __post_init__(self) -> None:
        one_of("network.layers.upsampling", self.upsampling, ["transposed", "nearest", "shuffle"])
        one_of("network.layers.pooling", self.pooling, ["stride", "mean"])
        one_of("network.layers.generator_norm", self.generator_norm, ["batch", "instance", "pixel", "none"])
        one_of("network.layers.discriminator_norm", self.discriminator_norm, ["batch", "instance", "virtual", "none"])
        one_of("network.layers.generator_activation", self.generator_activation, ["relu", "leaky_relu"])
        one_of("network.layers.minibatch", self.minibatch, ["none", "stddev", "discrimination"])
        require(0 <= self.dropout < 1, f"network.layers.dropout={self.dropout}: use 0 <= dropout < 1.")


@dataclass(frozen=True, kw_only=True)
class Perceptron:
    """Fully connected networks."""

    width: int = 64  # of a hidden layer
    depth: int = 2  # hidden layers
    minibatch: str = "none"  # what D sees of several samples: `stddev` (of groups of 4), `discrimination` or `none`

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            require(getattr(self, name) > 0, f"network.mlp.{name}={getattr(self, name)} must be positive.")
        one_of("network.mlp.minibatch", self.minibatch, ["none", "stddev", "discrimination"])


AUTOENCODERS = ("autoencoder", "vae")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Widths: a layer after resolution 2**(s+1) has min(fmap_base / 2**s, fmap_max) channels."""

    kind: str = "progressive"  # or, of one resolution: `dcgan`, `mlp` (fully connected), `autoencoder`, `vae`
    latent_size: int = 512
    latents: str = "gaussian"  # N(0, 1); `uniform` in -1..1; `sphere`: of radius sqrt(latent_size)
    output: str = ""  # of the generator: `linear` or `tanh`; "": tanh of dcgan and the autoencoders, else linear
    fmap_base: int = 8192
    fmap_max: int = 512
    pool_before_activation: bool = False  # True: the later program's order; the paper pools after the activation
    layers: Layers = field(default_factory=Layers)  # of dcgan, autoencoder, vae
    mlp: Perceptron = field(default_factory=Perceptron)
    conditioning: str = "none"  # on labels: `concatenated` to D's input, `projection`, `auxiliary` classifier
    classes: int = 0  # of the labels; with conditioning
    codes: int = 0  # values of a categorical code that D's Q head reads back from the image (InfoGAN); 0: none
    continuous_codes: int = 0  # numbers in -1..1 that it reads back too

    def __post_init__(self) -> None:
        one_of("network.kind", self.kind, ["progressive", "dcgan", "mlp", *AUTOENCODERS])
        one_of("network.latents", self.latents, ["gaussian", "uniform", "sphere"])
        one_of("network.output", self.output, ["", "linear", "tanh"])
        one_of("network.conditioning", self.conditioning, ["none", "concatenated", "projection", "auxiliary"])
        for name in ("latent_size", "fmap_base", "fmap_max"):
            require(getattr(self, name) > 0, f"network.{name}={getattr(self, name)} must be positive.")
        for name in ("classes", "codes", "continuous_codes"):
            require(getattr(self, name) >= 0, f"network.{name}={getattr(self, name)} must not be negative.")

    @property
    def autoencodes(self) -> bool:
        """Whether an encoder takes the discriminator's place."""
        return self.kind in AUTOENCODERS

    @property
    def convolutional(self) -> bool:
        """Whether it is made of `layers`."""
        return self.kind == "dcgan" or self.autoencodes

    @property
    def minibatch(self) -> str:
        """What its D sees of several samples."""
        of = {"progressive": "stddev", "dcgan": self.layers.minibatch, "mlp": self.mlp.minibatch}
        return of.get(self.kind, "none")

    @property
    def bounded(self) -> bool:
        """Whether the generator's output passes tanh."""
        return (self.output or ("linear" if self.kind in ("progressive", "mlp") else "tanh")) == "tanh"

    @property
    def input_size(self) -> int:
        """Of the generator: noise, then the label one-hot, then the code one-hot, then the continuous codes."""
        return self.latent_size + self.classes + self.codes + self.continuous_codes


LOSSES = ("wasserstein", "minimax", "non_saturating", "least_squares", "hinge", "relativistic")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The game (by default WGAN-GP with drift), its optimizers and what both nets share. See docs/toolbox.md."""

    seed: int = 0  # all randomness is a function of (seed, images seen, purpose)
    loss: str = "wasserstein"  # or `minimax`, `non_saturating`, `least_squares`, `hinge`, `relativistic` (pairs)
    penalty: str = "gradient"  # norm to its target between reals and fakes; `r1`: to 0 at reals, `r1+r2`: at both
    penalty_weight: float = 10.0  # of `r1` and `r2`: gamma, of which half is the factor
    penalty_target: float = 1.0  # norm the gradient is pulled to; 750 in the paper's CIFAR-10 setting
    penalty_at: str = "current"  # `final`: the norm as seen from the final resolution, as the published runs have it
    drift: float = 0.001  # weight of D(real)**2, with the Wasserstein loss
    clip: float = 0.0  # D's weights stay within -clip..clip; 0: any
    real_labels: list[float] = field(default_factory=lambda: [1.0])  # D's target: [0.9]; drawn between two: [0.7, 1.2]
    fake_labels: list[float] = field(default_factory=lambda: [0.0])  # the same for fakes: [0, 0.3]
    flip_labels: float = 0.0  # probability that a sample has the other's target
    feature_matching: bool = False  # G matches the mean of D's inner features instead of raising scores
    historical_averaging: float = 0.0  # weight of |weights - their mean since the phase began|**2, of both players
    diversity: float = 0.0  # weight of: D's features of reals lie farther apart than those of fakes (D up, G down)
    classification: float = 1.0  # weight of the auxiliary classifier's loss, in both players' objectives
    information: float = 1.0  # weight of the codes' mutual-information bound, in both players' objectives
    likelihood_std: float = 0.1  # of the vae's pixels around what its decoder gives
    d_steps: int = 1  # steps of D for one of G; each shows a batch of reals
    g_steps: int = 1  # steps of G after it
    optimizer: str = "adam"  # of G; or `sgd`
    discriminator_optimizer: str = ""  # "": the same
    discriminator_rate: float = 1.0  # D's learning rate over the stage's
    beta1: float = 0.0
    beta2: float = 0.99
    momentum: float = 0.9  # of sgd
    nesterov: bool = False
    augment: str = "none"  # of all that D sees: `always` (DiffAugment), `adaptive`: as often as D overfits (ADA)
    lr_ramp_images: int = 0  # the learning rate climbs from 0 over the run's first images; 40,000 in the paper
    average_half_life: int = 10_000  # images after which a weight has lost half its say in the averaged generator
    mirror: bool = True  # flip each real left-right with probability 1/2
    penalty_every: int = 1  # steps of D from one gradient penalty to the next, its weight times as many
    precision: str = "auto"  # `float32`; `bfloat16`: convolutions, all else in float32; `auto`: the faster, measured
    channels_last: bool | None = None  # memory format inside the networks; null: the faster, measured as a stage starts
    compile: bool = False  # torch.compile the networks: a minute at a stage's start, plain where its backend cannot
    recompute_from: int = 0  # blocks from this resolution on keep no feature maps but compute them again; 0: none
    deterministic: bool = False  # bit-equal repeats: slower on GPUs; an open format is bf16 channels last, unmeasured

    def __post_init__(self) -> None:
        one_of("training.loss", self.loss, LOSSES)
        one_of("training.penalty", self.penalty, ["gradient", "r1", "r1+r2", "none"])
        one_of("training.penalty_at", self.penalty_at, ["current", "final"])
        one_of("training.precision", self.precision, ["auto", "float32", "bfloat16"])
        one_of("training.optimizer", self.optimizer, ["adam", "sgd"])
        one_of("training.discriminator_optimizer", self.discriminator_optimizer, ["", "adam", "sgd"])
        one_of("training.augment", self.augment, ["none", "always", "adaptive"])
        require(self.penalty_weight >= 0 and self.drift >= 0,
                f"training.penalty_weight={self.penalty_weight}, drift={self.drift} must not be negative.")
        for name in ("clip", "historical_averaging", "diversity", "classification", "information"):
            require(getattr(self, name) >= 0, f"training.{name}={getattr(self, name)} must not be negative.")
        for name in ("d_steps", "g_steps"):
            require(getattr(self, name) >= 1, f"training.{name}={getattr(self, name)} must be at least 1.")
        for name in ("real_labels", "fake_labels"):
            ends = getattr(self, name)
            require(len(ends) in (1, 2) and sorted(ends) == ends and all(map(math.isfinite, ends)),
                    f"training.{name}={ends}: give one target, [0.9], or the two it is drawn between, [0.7, 1.2].")
        require(0 <= self.flip_labels < 0.5, f"training.flip_labels={self.flip_labels}: use 0 <= flip_labels < 0.5.")
        require(self.penalty_target > 0, f"training.penalty_target={self.penalty_target} must be positive.")
        require(self.likelihood_std > 0, f"training.likelihood_std={self.likelihood_std} must be positive.")
        require(0 <= self.beta1 < 1, f"training.beta1={self.beta1}: use 0 <= beta1 < 1.")
        require(0 < self.beta2 < 1, f"training.beta2={self.beta2}: use 0 < beta2 < 1.")
        require(0 <= self.momentum < 1, f"training.momentum={self.momentum}: use 0 <= momentum < 1.")
        require(self.discriminator_rate > 0, f"training.discriminator_rate={self.discriminator_rate} must be positive.")
        require(self.penalty_every >= 1, f"training.penalty_every={self.penalty_every} must be at least 1.")
        require(self.recompute_from == 0 or (self.recompute_from >= 8 and is_power_of_two(self.recompute_from)),
                f"training.recompute_from={self.recompute_from} is no resolution of a block: use 8, 16, 32, ... or 0.")
        require(self.average_half_life > 0, f"training.average_half_life={self.average_half_life} must be positive.")
        require(self.lr_ramp_images >= 0, f"training.lr_ramp_images={self.lr_ramp_images} must not be negative.")

    @property
    def changes_labels(self) -> bool:
        """Whether D's targets are other than 1 for reals and 0 for fakes."""
        return (self.real_labels, self.fake_labels, self.flip_labels) != ([1.0], [0.0], 0.0)

    def optimizer_of(self, role: str) -> str:
        """`adam` or `sgd`, of `generator` or `discriminator`."""
        return (role == "discriminator" and self.discriminator_optimizer) or self.optimizer


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution: fade the new layers in, then hold."""

    resolution: int = MISSING  # pixels per side, a power of two
    fade_images: int = 600_000  # ignored by the first stage: nothing to fade from
    hold_images: int = 600_000
    batch_size: int = 16  # summed over workers
    learning_rate: float = 0.001  # both networks
    workers: int = 1  # Accelerate processes; at most one per minibatch-stddev group
    min_workers: int = 0  # starts with as few where no more can be placed, and takes nodes that come; 0: all or none
    placement: str = "PACK"  # on few nodes; `SPREAD`: many; `STRICT_SPREAD`: one worker a node; `STRICT_PACK`: one node
    micro_batch: int = 0  # images per forward pass; 0: a worker's whole share at once
    threads: int = 0  # CPU threads per worker; 0: `cpus` if above 1, else the cores divided by the workers
    cpus: float = 1.0  # logical CPUs a worker asks of Ray
    gpus: float = 0.0  # GPUs a worker asks of Ray; 0 trains on the CPU
    precision: str = ""  # of this stage; "": training.precision, and in a run's own config.yaml what that came to
    channels_last: bool | None = None  # the same

    def __post_init__(self) -> None:
        where = f"stage {self.resolution}px"
        require((self.resolution >= 4 or self.resolution == 1) and is_power_of_two(self.resolution),
                f"{where}: resolution={self.resolution} must be a power of two from 4 up, "
                f"e.g. {2 ** max(2, round(self.resolution).bit_length() - 1)}.")
        for name in ("fade_images", "hold_images", "micro_batch", "threads"):
            require(getattr(self, name) >= 0, f"{where}: {name}={getattr(self, name)} must not be negative.")
        for name in ("batch_size", "workers", "learning_rate"):
            require(getattr(self, name) > 0, f"{where}: {name}={getattr(self, name)} must be positive.")
        require(self.learning_rate < 1, f"{where}: learning_rate={self.learning_rate} is not below 1.")
        require(self.cpus >= 0 and self.gpus >= 0, f"{where}: cpus={self.cpus}, gpus={self.gpus} must not be negative.")
        require(self.gpus in (0, 1) or (self.workers == 1 and 0 < self.gpus < 1),
                f"{where}: gpus={self.gpus}: a worker uses one GPU. Use 1 or 0 (or a share, if it is the only one).")
        require(0 <= self.min_workers <= self.workers, f"{where}: min_workers={self.min_workers} is not between 0 and "
                                                       f"workers={self.workers}.")
        one_of(f"{where}: placement", self.placement, ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])
        if self.precision:
            one_of(f"{where}: precision", self.precision, ["float32", "bfloat16"])


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is saved when, where to, and what of it stays."""

    every_images: int = 100_000  # beside the one at each stage's end, which is always kept
    keep: int = 2  # newest checkpoints inside a stage that stay
    best: str = "swd"  # the checkpoint with the lowest of this distance at each resolution stays too
    pin: list[str] = field(default_factory=list)  # names of checkpoints that stay whatever comes
    location: str = ""  # "": the run folder; a path, s3:// or gs://: checkpoints go below <location>/<name> instead
    background: bool = True  # False: training waits while a checkpoint is written, and holds no second copy of it
    retry_s: float = 30.0  # until a failed save is tried again, training going on; three in a row stop the run

    def __post_init__(self) -> None:
        require(self.every_images > 0, f"checkpoints.every_images={self.every_images} must be positive.")
        require(self.keep >= 1, f"checkpoints.keep={self.keep}: keep at least 1, or a fault has nowhere to go back to.")
        require(self.retry_s >= 0, f"checkpoints.retry_s={self.retry_s} must not be negative.")
        refuse_login("checkpoints.location", self.location)
        refuse_query("checkpoints.location", self.location)


FAMILIES = ("swd", "ms_ssim", "fd", "kid", "neighbors", "is", "path_length", "copies", "discriminator",
            "classes")  # of metrics; the last of conditional runs alone
FEATURES = {"pixels": "pixels16", "lite0": "lite0_224", "lite0_128": "lite0_128", "inception": "inception",
            "inception_clean": "inception_clean"}  # settings -> what the metrics' names end with
FORMER_METRICS = {"frechet_pixels16": "fd_pixels16"}  # names in runs of before 0.2
INCEPTION_METRICS = {"fd": "fid", "kid": "kid", "is": "is"}  # what the field calls them, with its own features alone


def features_suffix(features: str) -> str:
    """`lite0` -> `lite0_224`; of `module:function` the function."""
    return FEATURES.get(features, features.rpartition(":")[2])


def metric_name(kind: str, features: str) -> str:
    """`fd`, `lite0` -> `fd_lite0_224`; `fd`, `inception_clean` -> `fid_clean`."""
    if features in ("inception", "inception_clean") and kind in INCEPTION_METRICS:
        return INCEPTION_METRICS[kind] + features.removeprefix("inception")
    return f"{kind}_{features_suffix(features)}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of the averaged generator at each stage's end, in a Ray task beside the training. See docs/metrics.md."""

    when: str = "stage"  # `stage`: at its end; `checkpoint`: at those still kept by their turn; `end`: after training
    count: int = 20_000  # images per set at most; the reals, and what some metrics can take, are other bounds
    features: list[str] = field(default_factory=lambda: ["pixels"])  # also `lite0`, `lite0_128`: with gradine[features]
    metrics: list[str] = field(default_factory=lambda: [*FAMILIES])
    floor: bool = True  # reals in two sets, for the noise floor; False: one set of all, as published distances have it
    held_out: str = ""  # location of shards that are not trained on: memorisation shows against them
    inception: str = ""  # file or URL of the published Inception weights, for the features `inception`
    inception_sha256: str = ""  # of that file, where it is another one than the usual state dict
    memory_gb: float = 8.0  # the images of two sets fit in this, or SWD's count is lowered
    untrained: bool = True  # score an untrained generator too, to see how far the training came
    cpus: float = 1.0
    gpus: float = 0.0
    samples: int = 64  # images in a grid
    deadline_s: float = 0.0  # one that takes longer is ended, its figures are null; 0: 4 x predicted, an hour at least

    def __post_init__(self) -> None:
        one_of("evaluation.when", self.when, ["stage", "checkpoint", "end"])
        require(self.cpus >= 0 and self.gpus >= 0 and self.memory_gb > 0,
                f"evaluation.cpus={self.cpus}, gpus={self.gpus} or memory_gb={self.memory_gb} is negative.")
        require(self.count >= 2, f"evaluation.count={self.count} must be at least 2.")
        require(self.samples >= 1, f"evaluation.samples={self.samples} must be at least 1.")
        require(self.deadline_s >= 0, f"evaluation.deadline_s={self.deadline_s} must not be negative.")
        for name in self.metrics:
            one_of("evaluation.metrics", name, FAMILIES)
        for name in self.features:
            if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
                one_of("evaluation.features", name, [*FEATURES, "module:function"])
        names = [features_suffix(name) for name in self.features]
        require("clean" not in names, f"evaluation.features={self.features}: `clean` would be taken for Inception's. "
                                      "Call the function something else.")
        require(len(set(names)) == len(names), f"evaluation.features={self.features} holds two of the same name.")
        require(re.fullmatch(r"|[0-9a-f]{64}", self.inception_sha256) is not None,
                f"evaluation.inception_sha256={self.inception_sha256!r} is no sha256: 64 digits and letters a to f.")
        refuse_login("evaluation.held_out", self.held_out)
        refuse_query("evaluation.held_out", self.held_out)
        refuse_login("evaluation.inception", self.inception)
        require("://" not in self.inception or "?" not in self.inception,
                "evaluation.inception has a query, which would be written down. Download the file, and give its path.")

    def distances(self) -> list[str]:
        """The names of the metrics of which less is better, and by which a checkpoint can be the best."""
        kinds = [kind for kind in ("fd", "kid") if kind in self.metrics]
        return ["swd"] * ("swd" in self.metrics) + [metric_name(k, name) for k in kinds for name in self.features]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    address: str = ""  # "": RAY_ADDRESS if set, else a Ray of our own on this machine; `auto` joins the node's cluster
    group_timeout_s: float = 300.0  # to wait for a stage's workers to be placed
    grace_s: float = 25.0  # after SIGTERM or Ctrl-C, to end the step and write a checkpoint
    step_timeout_s: float = 900.0  # a worker that gets no further for so long hangs: its group is started again
    setup_timeout_s: float = 3600.0  # the same before its first step: decoding a level into the cache takes long
    trust_network: bool = False  # True: also work with a Ray that asks for no token beyond this machine

    def __post_init__(self) -> None:
        for name in ("group_timeout_s", "grace_s", "step_timeout_s", "setup_timeout_s"):
            require(getattr(self, name) > 0, f"ray.{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, from images to report."""

    name: str = MISSING
    runs: str = "runs"  # the run folder is <runs>/<name>
    preset: str = ""  # which of the recipe's `presets` was applied
    resume: str = "auto"  # `auto`: go on from what is there; `fresh`: want an empty folder; a resolution: branch there
    branch: str = "continue"  # with a resolution: `continue` that branch when given again, or start a `new` one
    init_from: str = ""  # a run folder whose newest weights this run starts from
    tick_images: int = 0  # images between progress lines; 0: 200 per phase
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=Training)
    stages: list[Stage] = field(default_factory=list)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    evaluation: Evaluation = field(default_factory=Evaluation)
    ray: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages is empty. List at least one, e.g. `- {resolution: 4}`.")
        sizes = [stage.resolution for stage in self.stages]
        doubled = [sizes[0] * 2**i for i in range(len(sizes))]
        require(sizes == doubled, f"stages have resolutions {sizes}: each must double the one before, e.g. {doubled}.")
        require(self.stages[0].hold_images > 0, f"stage {sizes[0]}px: hold_images=0 leaves it nothing to train on, the "
                                                "first stage has no fade. Use hold_images above 0.")
        for stage in self.stages[1:]:
            require(stage.fade_images + stage.hold_images > 0,
                    f"stage {stage.resolution}px: fade_images=0 and hold_images=0 leave it nothing to train on. "
                    "Give it some, or take it and the stages above it out.")
        refuse_senseless(self)
        final, base = sizes[-1], self.network.fmap_base
        require(base >= final // 2, f"network.fmap_base={base} leaves layers at {final}px without a channel. "
                                    f"Use at least {final // 2}.")
        require("/" not in self.name and self.name not in ("", ".", ".."),
                f"name={self.name!r} must be a plain folder name. Set the parent folder with runs=.")
        one_of("branch", self.branch, ["continue", "new"])
        choices = ["auto", "fresh", *map(str, sizes[1:])]
        require(self.resume in choices, f"resume={self.resume!r} is not possible: no stage to resume at. "
                                        f"Use one of: {', '.join(choices)}.")
        for stage in self.stages:
            check_shares(stage)
        require("://" not in self.data.shards or self.data.deadline_s < self.ray.step_timeout_s,
                f"data.deadline_s={self.data.deadline_s:g} for a file of {self.data.shards} is not below "
                f"ray.step_timeout_s={self.ray.step_timeout_s:g}: workers that wait for it would be taken for hung. "
                "Raise that too.")

    @property
    def final_resolution(self) -> int:
        return self.stages[-1].resolution

    def format_of(self, stage: Stage) -> tuple[str, bool | None]:
        """A stage's precision and whether its images lie channels last; `auto` and None are still open."""
        last = self.training.channels_last if stage.channels_last is None else stage.channels_last
        return stage.precision or self.training.precision, last

    def is_open(self, stage: Stage) -> bool:
        """Whether its format is to be measured."""
        return "auto" in self.format_of(stage) or None in self.format_of(stage)

    def with_format(self, index: int, precision: str, channels_last: bool | None) -> Run:
        """The run with this for what a stage's format leaves open."""
        stage, (asked, last) = self.stages[index], self.format_of(self.stages[index])
        stage = replace(stage, precision=precision if asked == "auto" else stage.precision,
                        channels_last=channels_last if last is None else stage.channels_last)
        return replace(self, stages=[*self.stages[:index], stage, *self.stages[index + 1:]])


def check_shares(stage: Stage) -> None:
    """The batch splits into whole minibatch-stddev groups, the groups into workers and micro-batches, or UserError."""
    batch, group = stage.batch_size, min(4, stage.batch_size)
    where = f"stage {stage.resolution}px: batch_size={batch}"
    require(batch % group == 0, f"{where} does not split into minibatch-stddev groups of {group}. "
                                f"Use a multiple of {group}, e.g. batch_size={batch // group * group + group}.")
    groups = batch // group
    fitting = max(n for n in range(1, groups + 1) if groups % n == 0 and n <= stage.workers)
    require(groups % stage.workers == 0,
            f"{where} has {groups} minibatch-stddev groups of {group}, which {stage.workers} workers do not divide. "
            f"Use workers={fitting}, or a batch_size that is a multiple of {group * stage.workers}.")
    share = batch // stage.workers
    micro = stage.micro_batch or share
    require(micro % group == 0 and share % micro == 0,
            f"{where}: micro_batch={micro} does not split a worker's {share} images into whole groups of {group}. "
            f"Use a multiple of {group} that divides {share}, e.g. micro_batch={group}.")


def load(recipe: str | Path, overrides: Iterable[str] = ()) -> Run:
    """A `Run` from a YAML file, or the name of a bundled recipe, and `key.path=value` overrides (`*` is every item).

    Raises UserError in one line for an unreadable file, an unknown key, a wrong type, bound or combination.
    """
    raw = _read_yaml(find_recipe(recipe))
    presets = raw.pop("presets", None)
    pairs = [_split(text) for text in overrides]
    # a run's own config.yaml has no `presets`: its `preset` tells what was applied when it was written
    preset = dict(pairs).get("preset", raw.get("preset") if presets else None)
    for path, value in _preset_changes(presets, str(preset)).items() if preset else ():
        assign(raw, path, value)
    run = _with(raw, pairs)
    # Not among the checks of Run itself: a checkpoint may be measured afterwards by other metrics than its run's.
    best, measured = run.checkpoints.best, run.evaluation.distances()
    one_of("checkpoints.best", FORMER_METRICS.get(best, best), measured or ["swd"])
    return run


def shard_settings(source: str, shards: str, overrides: Iterable[str]) -> Data:
    """The checked `Data` of shards that are made without a run, from `key=value` texts without their `data.`."""
    raw = {"name": "shards", "stages": [{"resolution": 4}], "data": {"source": source, "shards": shards}}
    return _with(raw, [_split(f"data.{text}") for text in overrides]).data


def with_evaluation(run: Run, overrides: Iterable[str]) -> Run:
    """The run with `key=value` texts of its `evaluation`, without that prefix. UserError as from `load`."""
    return _with(as_dict(run), [_split(f"evaluation.{text}") for text in overrides])


def _with(raw: dict[str, Any], pairs: list[tuple[str, Any]]) -> Run:
    for path, value in pairs:
        assign(raw, path, value)
    _refuse_unknown_keys(raw, Run, "")
    return from_dict(raw)


def from_dict(raw: dict[str, Any]) -> Run:
    """A checked `Run` from plain nested data, such as `as_dict` gives."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Run), raw)
        missing = sorted(OmegaConf.missing_keys(merged))
        missing = [re.sub(r"\[(\d+)\]", r".\1", key) for key in missing]  # as an override spells it
        require(not missing, f"{', '.join(missing)} must be set: in the YAML file, or as {''.join(missing[:1])}=VALUE.")
        return typing.cast(Run, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        hint = " Write whole numbers as 100_000, not 1e5." if "Integer" in reason else ""
        where = error.full_key or "the configuration"
        if error.object_type is Stage and error.parent_node is not None:  # list items do not know their index
            where = f"stage {typing.cast(Any, OmegaConf.to_container(error.parent_node))['resolution']}px: {where}"
        raise UserError(f"{where}: {reason}.{hint}") from error


def as_dict(run: Run) -> dict[str, Any]:
    return asdict(run)


def dump(run: Run) -> str:
    """The run as YAML text, every default written out; `load` reads it back equal but for a secret in data.source."""
    raw = asdict(run)
    raw["data"]["source"] = redacted_urls(run.data.source)
    return yaml.safe_dump(raw, sort_keys=False)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': [1]}} -> {'a.b.0': 1}, to compare two configurations key by key."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def find_recipe(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    bundled = {file.relative_to(RECIPES).with_suffix("").as_posix(): file for file in RECIPES.rglob("*.yaml")}
    require(str(recipe) in bundled, f"no configuration {str(recipe)!r}: neither a file nor a bundled recipe"
                                    f"{hint(str(recipe), bundled)} Bundled: {', '.join(sorted(bundled))}.")
    return bundled[str(recipe)]


def _preset_changes(presets: Any, name: str) -> dict[str, Any]:
    require(bool(presets), f"preset={name!r} is unknown: this configuration has no presets. Leave preset= out.")
    require(isinstance(presets, dict), "presets must hold `name: {key.path: value}` lines.")
    by_name = {str(key): changes or {} for key, changes in presets.items()}
    one_of("preset", name, by_name)
    require(isinstance(by_name[name], dict), f"presets.{name} must hold `key.path: value` lines.")
    return by_name[name]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    require(isinstance(raw, dict), f"{path} must hold `key: value` lines, not a {type(raw).__name__}.")
    return typing.cast(dict[str, Any], raw)


def _split(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    require(bool(equals and path), f"override {text!r} is not of the form key.path=value, e.g. training.seed=1.")
    if value.startswith("#"):  # a colour, where YAML would see a comment
        return path, value
    try:
        return path, typing.cast(Any, OmegaConf.to_container(OmegaConf.create(f"value: {value}")))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {text!r}: the value is not valid YAML.") from error


def assign(raw: Any, path: str, value: Any, above: str = "") -> None:
    """Sets `path` in nested dicts and lists; a `*` stands for every item of a list. `above`: where `raw` lies."""
    head, _, rest = path.partition(".")
    here = f"{above}{head}."
    if isinstance(raw, list):
        require(head == "*" or (head.isdigit() and int(head) < len(raw)),
                f"override {above}{path}: no item {head!r} in a list of {len(raw)}. Use 0 to {len(raw) - 1}, or *.")
        for index in range(len(raw)) if head == "*" else [int(head)]:
            if rest:
                assign(raw[index], rest, value, here)
            else:
                raw[index] = value
    else:
        require(isinstance(raw, dict), f"override {above}{path}: {head!r} lies below a plain value.")
        if rest:
            if raw.get(head) is None:
                raw[head] = {}
            assign(raw[head], rest, value, here)
        else:
            raw[head] = value


def _refuse_unknown_keys(raw: Any, schema: Any, prefix: str) -> None:
    kinds = typing.get_type_hints(schema)
    known = [f.name for f in fields(schema)]
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.')} must hold `key: value` lines with keys: {', '.join(known)}.")
    for key, value in raw.items():
        require(key in known, f"{prefix}{key} is not a setting{hint(str(key), known)} Known: {', '.join(known)}.")
        kind = kinds[key]
        if is_dataclass(kind) and value is not None:
            _refuse_unknown_keys(value, kind, f"{prefix}{key}.")
        elif typing.get_origin(kind) is list:
            if not isinstance(value, list):
                raise UserError(f"{prefix}{key}={value!r} must be a list, one item per line after a `-`.")
            of = typing.get_args(kind)[0]
            for index, item in enumerate(value if is_dataclass(of) else ()):
                _refuse_unknown_keys(item, of, f"{prefix}{key}.{index}.")
