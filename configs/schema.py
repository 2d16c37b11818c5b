"""Every setting: its name, unit, default and bounds; how a YAML file becomes one frozen `Run`.

YAML -> the preset it names -> `key.path=value` overrides -> frozen dataclasses, checked on construction.
Images are counted one by one (an int), never in kimg; resolutions are pixels per side.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

RECIPES = Path(__file__).parent
ENCODINGS = ("raw", "png", "webp", "jpeg")
SECRET_NAMES = re.compile("(TOKEN|SECRET|PASSWORD|PASSWD|_PASS|_AUTH|API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY|"
                          "WEBHOOK|(?<!GOOGLE_APPLICATION_)CREDENTIALS)$", re.IGNORECASE)  # that one is a path
# What is no secret to strike out: shorter values stand in any text (a 1, a flag), and a plain word in lower case, such
# as postgres for a password, stands in paths (/home/postgres) that must stay right. From 12 letters on it may be a
# pass phrase, and is no longer a word that paths hold by chance.
NO_SECRET = re.compile(r"[\s\S]{0,7}|[a-z]{8,11}")


def redacted(text: str) -> str:
    """`text` with `***` for the values of secret variables of the environment, and for what URLs keep secret."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and not NO_SECRET.fullmatch(value):
            text = text.replace(value, "***")
    return redacted_urls(text)


def redacted_urls(text: str) -> str:
    """https://user:password@host/a.zip?signature=abc -> https://***@host/a.zip?***"""
    text = re.sub(r"""(\w://)[^/\s?'"]*@""", r"\1***@", text)
    return re.sub(r"""(\w://[^\s?'"]*\?)[^\s'"]+""", r"\1***", text)


class UserError(ValueError):
    """Wrong input: one line that names the thing, its value, the rule and the way out. Exit code 2."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*_redacted_texts(arguments))


class EnvironmentFault(RuntimeError):
    """The machine or cluster failed us (disk full, worker lost for good), and another try would meet it again."""

    exit_code = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*_redacted_texts(arguments))


def _redacted_texts(arguments: tuple[Any, ...]) -> list[Any]:
    """Of an error: it may be shown, logged and written down anywhere."""
    return [redacted(argument) if isinstance(argument, str) else argument for argument in arguments]


class SaveFault(EnvironmentFault):
    """Three checkpoints in a row could not be written."""

    exit_code = 4


class CrashLoop(EnvironmentFault):
    """Training failed three times without progress."""

    exit_code = 5


class Diverged(EnvironmentFault):
    """The state was not finite once more after all roll-backs a run may have."""

    exit_code = 6


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    require(value in allowed, f"{name}={value!r} is unknown{_hint(value, allowed)} Use one of: {', '.join(allowed)}.")


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def refuse_login(name: str, location: str) -> None:
    """UserError for a URL that holds a user or password: settings are written into the run folder."""
    require("@" not in re.split("[/?#]", location.partition("://")[2], maxsplit=1)[0],
            f"{name} holds a user and password, which would be written down. Put them into ~/.netrc "
            "(http) or the environment (AWS_ACCESS_KEY_ID, ...), and leave them out here.")


def refuse_query(name: str, location: str) -> None:
    require("://" not in location or "?" not in location,
            f"{name}={location!r} has a query, which the files below it cannot have. Give the folder's URL alone.")


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

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), f"data.channels={self.channels}: use 3 for colour or 1 for gray.")
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
class Network:
    """Widths: a layer after resolution 2**(s+1) has min(fmap_base / 2**s, fmap_max) channels."""

    latent_size: int = 512
    fmap_base: int = 8192
    fmap_max: int = 512
    pool_before_activation: bool = False  # True: the later program's order; the paper pools after the activation

    def __post_init__(self) -> None:
        for name in ("latent_size", "fmap_base", "fmap_max"):
            require(getattr(self, name) > 0, f"network.{name}={getattr(self, name)} must be positive.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Objective (WGAN-GP with drift), optimizer (Adam) and what both nets share."""

    seed: int = 0  # all randomness is a function of (seed, images seen, purpose)
    penalty_weight: float = 10.0
    penalty_target: float = 1.0  # norm the gradient is pulled to; 750 in the paper's CIFAR-10 setting
    penalty_at: str = "current"  # `final`: the norm as seen from the final resolution, as the published runs have it
    drift: float = 0.001  # weight of D(real)**2
    beta1: float = 0.0
    beta2: float = 0.99
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
        one_of("training.penalty_at", self.penalty_at, ["current", "final"])
        one_of("training.precision", self.precision, ["auto", "float32", "bfloat16"])
        require(self.penalty_weight >= 0 and self.drift >= 0,
                f"training.penalty_weight={self.penalty_weight}, drift={self.drift} must not be negative.")
        require(self.penalty_target > 0, f"training.penalty_target={self.penalty_target} must be positive.")
        require(0 <= self.beta1 < 1, f"training.beta1={self.beta1}: use 0 <= beta1 < 1.")
        require(0 < self.beta2 < 1, f"training.beta2={self.beta2}: use 0 < beta2 < 1.")
        require(self.penalty_every >= 1, f"training.penalty_every={self.penalty_every} must be at least 1.")
        require(self.recompute_from == 0 or (self.recompute_from >= 8 and is_power_of_two(self.recompute_from)),
                f"training.recompute_from={self.recompute_from} is no resolution of a block: use 8, 16, 32, ... or 0.")
        require(self.average_half_life > 0, f"training.average_half_life={self.average_half_life} must be positive.")
        require(self.lr_ramp_images >= 0, f"training.lr_ramp_images={self.lr_ramp_images} must not be negative.")


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
        require(self.resolution >= 4 and is_power_of_two(self.resolution),
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


FAMILIES = ("swd", "ms_ssim", "fd", "kid", "neighbors", "is", "path_length", "copies", "discriminator")  # of metrics
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
    bundled = {file.stem: file for file in RECIPES.glob("*.yaml")}
    require(str(recipe) in bundled, f"no configuration {str(recipe)!r}: neither a file nor a bundled recipe"
                                    f"{_hint(str(recipe), bundled)} Bundled: {', '.join(sorted(bundled))}.")
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
        require(key in known, f"{prefix}{key} is not a setting{_hint(str(key), known)} Known: {', '.join(known)}.")
        kind = kinds[key]
        if is_dataclass(kind) and value is not None:
            _refuse_unknown_keys(value, kind, f"{prefix}{key}.")
        elif typing.get_origin(kind) is list:
            if not isinstance(value, list):
                raise UserError(f"{prefix}{key}={value!r} must be a list, one item per line after a `-`.")
            of = typing.get_args(kind)[0]
            for index, item in enumerate(value if is_dataclass(of) else ()):
                _refuse_unknown_keys(item, of, f"{prefix}{key}.{index}.")


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
