"""Steps per second, where their time goes, and how near that is to what the machine can do:

    python -m tests.bench.step [RESOLUTION ...] [--peer] [--base REF]

Without options: images/s at every resolution, the phases of a step, the share of its convolutions, their arithmetic
beside that of the plain step, and pro-gan-pth 3.4 beside it where --peer has installed it once. --base compares the
steps of this checkout with those of another commit, and shows nothing else. docs/speed.md says how to read each figure.

Everything is a ratio of sides that take turns within one run, after one step each that does not count: machines are
shared, and seconds of one day say nothing about another's. Times are medians; ranges are of all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from gradine.configs.schema import Network
from gradine.stages.formats import ORDER, Format, fastest
from gradine.stages.networks import Discriminator, Generator, upscale
from tests.bench.step_process import gradine_step, seconds

ROOT = Path(__file__).parents[2]
RESOLUTIONS = (4, 8, 16, 32, 64, 128)
BATCH = {4: 16, 8: 16, 16: 16, 32: 8, 64: 4, 128: 4}
FULL: dict[str, Any] = {"latent_size": 512, "fmap_base": 8192, "fmap_max": 512}
NARROW: dict[str, Any] = {"latent_size": 64, "fmap_base": 1024, "fmap_max": 64}  # the demo's
WIDTHS = {"full": FULL, "narrow": NARROW}
PEER = ROOT / ".venv-bench" / "pro-gan-pth-3.4"
ROUNDS, ENOUGH_S, MOST_ROUNDS = 3, 6.0, 15
PHASES = ("reals", "generator forward", "discriminator forward", "penalty", "backward", "optimizer", "average")
HEAVY = {"convolution", "convolution_backward", "_convolution", "mm", "addmm", "bmm", "baddbmm"}

Step = Callable[[], Any]
Times = dict[str, list[float]]


def machine() -> str:
    """What a reader needs to place the figures; neither host nor user."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.partition(":")[::2] for line in info.splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in names.get("flags", "").split()]
    return (f"{names.get('model name', platform.processor() or platform.machine())}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads; {', '.join(flags) or 'no AVX'}; torch {torch.__version__}")


# Turns ---------------------------------------------------------------------------------------------------------------


def race(sides: dict[str, Callable[[], float]]) -> Times:
    """The seconds that each side returned, over rounds in which they take turns; the first round does not count."""
    times: Times = {name: [] for name in sides}
    for side in sides.values():
        side()
    began = time.monotonic()
    for number in itertools.count(1):
        for name, side in sides.items():
            times[name].append(side())
        if number >= ROUNDS and (number >= MOST_ROUNDS or time.monotonic() - began > ENOUGH_S):
            return times
    raise AssertionError


def timed(step: Step) -> Callable[[], float]:
    return partial(seconds, step)


def ratio(times: Times, above: str, below: str) -> str:
    """Of the medians, and the range of the rounds' own."""
    rounds = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return (f"{statistics.median(times[above]) / statistics.median(times[below]):5.2f} "
            f"({min(rounds):.2f} to {max(rounds):.2f})")


def rate(times: list[float], batch: int) -> str:
    """Images/s: of the median step, of the slowest and the fastest."""
    return f"{batch / statistics.median(times):7.1f} ({batch / max(times):.1f} to {batch / min(times):.1f})"


# The table -----------------------------------------------------------------------------------------------------------


def images_per_second(resolution: int) -> dict[str, Format]:
    """Prints both widths' rows. -> by precision, the layout that a run chooses at full width; `default`: its format."""
    batch = BATCH[resolution]
    steps = {f"{width} {form}": timed(gradine_step(resolution, batch, network, form._asdict()))
             for width, network in WIDTHS.items() for form in ORDER}
    times = race(steps)
    for width in reversed(WIDTHS):  # full width last: its choices are returned
        medians = {form: statistics.median(times[f"{width} {form}"]) for form in ORDER}
        chosen = {precision: fastest({form: took for form, took in medians.items() if form.precision == precision})
                  for precision in ("float32", "bfloat16")}
        cells = "".join(f"{rate(times[f'{width} {form}'], batch):>30}  {'last' if form.channels_last else 'first':<5}"
                        for form in chosen.values())
        gained = ratio(times, f"{width} {chosen['float32']}", f"{width} {chosen['bfloat16']}")
        print(f"{resolution:>5}  {width:<7}{batch:>5}{cells}{gained:>22}", flush=True)
    return {**chosen, "default": fastest(medians)}


# Phases --------------------------------------------------------------------------------------------------------------


def own_seconds(marks: Iterable[tuple[str, float, float]]) -> Counter[str]:
    """(name, begin, end) of labels that lie beside or inside one another -> each one's time without those inside it."""
    own: Counter[str] = Counter()
    around: list[tuple[str, float]] = []  # the labels open at this moment, and their ends
    for name, begin, end in sorted(marks, key=lambda mark: (mark[1], -mark[2])):
        while around and around[-1][1] <= begin:
            around.pop()
        if around:
            own[around[-1][0]] -= end - begin
        own[name] += end - begin
        around.append((name, end))
    return own


def profiled(step: Step) -> tuple[Counter[str], Counter[str]]:
    """A step's seconds by phase and by operator, each without what lies inside it. Processor's side; no GPU's."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, \
            torch.profiler.record_function("rest"):
        step()
    marks = [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in profile.events()
             if event.name in (*PHASES, "rest")]
    operators = Counter({row.key: row.self_cpu_time_total / 1e6 for row in profile.key_averages()})
    return own_seconds(marks), operators


def shares(spent: Counter[str], names: Iterable[str]) -> str:
    whole = sum(spent.values())
    return "".join(f"{spent[name] / whole:>{max(len(name), 6) + 2}.1%}" for name in names)


def phases(resolution: int, form: Format) -> None:
    spent, operators = profiled(gradine_step(resolution, BATCH[resolution], FULL, form._asdict()))
    print(f"{resolution:>5}  {form!s:<25}{shares(spent, (*PHASES, 'rest'))}")
    most = [each for each in operators.most_common(9) if each[0] not in (*PHASES, "rest")]
    print(" " * 7 + ", ".join(f"{name.removeprefix('aten::')} {took / sum(spent.values()):.1%}" for name, took in most),
          flush=True)


# The limit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Like:
    """What decides how long an operator takes on a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Calls(TorchDispatchMode):
    """Notes every convolution and matrix product, of the forward and the backwards alike.

    flops: floating-point operations of the convolutions, two for a product and its sum. By the formulas of torch's
    FlopCounterMode, which itself cannot look into the autograd.grad of a module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any, Any]] = []
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name in HEAVY:
            arguments = tree_map_only(Tensor, lambda t: Like(t.shape, t.stride(), t.dtype), (args, kwargs))
            self.seen.append((func, *arguments))
        result = func(*args, **kwargs)
        if "conv" in name:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result

    def bare(self) -> Step:
        """The same calls, in their order, on noise of the same layouts; tensors that are alike are one."""
        noise: dict[Like, Tensor] = {}

        def made(like: Like) -> Tensor:
            if like not in noise:  # in as much memory as the strides reach: an expanded tensor has little
                reach = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride, strict=True))
                noise[like] = torch.randn(reach).to(like.dtype).as_strided(like.shape, like.stride)
            return noise[like]

        calls = [(func, *tree_map_only(Like, made, (args, kwargs))) for func, args, kwargs in self.seen]

        @torch.no_grad()
        def again() -> None:
            for func, args, kwargs in calls:
                func(*args, **kwargs)

        return again


def noted(step: Step) -> Calls:
    step()  # the first may look around
    with Calls() as calls:
        step()
    return calls


def share_of_the_limit(resolution: int, form: Format) -> None:
    step = gradine_step(resolution, BATCH[resolution], FULL, form._asdict())
    calls = noted(step)
    times = race({"convolutions": timed(calls.bare()), "step": timed(step)})
    kinds = Counter(func._schema.name.removeprefix("aten::") for func, _, _ in calls.seen)
    print(f"{resolution:>5}  {form!s:<25}{ratio(times, 'convolutions', 'step'):>22}   "
          + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), flush=True)


# Arithmetic ----------------------------------------------------------------------------------------------------------


def plain_step(resolution: int, batch: int, all_gradients: bool) -> Step:
    """The same function step by step as the paper says it, on tensors without content: only its arithmetic counts.

    Upscale, then 3x3; reals, fakes and mixed images one after another; autograd's own second backward. `all_gradients`:
    G's phase takes D's too, as backward() does by itself. Biases and norms, which no convolution sees, are left out.
    """
    networks = [kind(Network(), resolution, resolution > 4).to("meta") for kind in (Generator, Discriminator)]
    g, d = (dict(network.named_parameters()) for network in networks)
    sizes = [4 * 2**n for n in range(resolution.bit_length() - 2)]

    def active(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.leaky_relu(F.conv2d(x, weight, padding=weight.shape[-1] // 2), 0.2)

    def generated() -> Tensor:
        x = F.leaky_relu(F.linear(torch.empty(batch, 512, device="meta"), g["blocks.4.dense.weight"]), 0.2)
        x = older = active(g, "blocks.4.conv", x.view(batch, -1, 4, 4))
        for size in sizes[1:]:
            older, x = x, active(g, f"blocks.{size}.conv1", active(g, f"blocks.{size}.conv0", upscale(x)))
        images = F.conv2d(x, g[f"to_rgb.{resolution}.weight"])
        if resolution == 4:
            return images
        return torch.lerp(upscale(F.conv2d(older, g[f"to_rgb.{resolution // 2}.weight"])), images, 0.5)

    def scores(images: Tensor) -> Tensor:
        x = active(d, f"from_rgb.{resolution}.conv", images)
        for size in reversed(sizes[1:]):
            x = F.avg_pool2d(active(d, f"blocks.{size}.conv1", active(d, f"blocks.{size}.conv0", x)), 2)
            if size == resolution:
                x = torch.lerp(active(d, f"from_rgb.{size // 2}.conv", F.avg_pool2d(images, 2)), x, 0.5)
        deviation = x.view(4, -1, *x.shape[1:]).var(dim=0).sqrt().mean(dim=(1, 2, 3))
        x = torch.cat([x, deviation.repeat(4).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)], dim=1)
        x = F.leaky_relu(F.linear(active(d, "blocks.4.conv", x).flatten(1), d["blocks.4.dense0.weight"]), 0.2)
        return F.linear(x, d["blocks.4.dense1.weight"])

    def step() -> None:
        with torch.no_grad():
            fakes = generated()
        mixed = torch.empty_like(fakes, requires_grad=True)
        loss = scores(torch.empty_like(fakes)).sum() + scores(fakes).sum()
        (slope,) = torch.autograd.grad(scores(mixed).sum(), mixed, create_graph=True)
        used = [value for name, value in d.items() if name.endswith("weight")]
        (loss + slope.square().sum().sqrt()).backward(inputs=used)
        used = [value for name, value in g.items() if name.endswith("weight")] + (used if all_gradients else [])
        scores(generated()).sum().backward(inputs=used)

    return step


def arithmetic(resolution: int) -> None:
    """Prints our convolutions' operations over those of the plain step. Whatever the format: they are the same."""
    batch, form, ours = BATCH[resolution], {"precision": "float32", "channels_last": False}, []
    for pool in (False, True):
        step = gradine_step(resolution, batch, {**FULL, "pool_before_activation": pool}, form)
        ours.append(noted(step).flops)
    plain, everything = (noted(plain_step(resolution, batch, all_gradients)).flops for all_gradients in (False, True))
    print(f"{resolution:>5}{ours[0] / batch / 1e9:>12.2f}{ours[0] / plain:>14.3f}{ours[0] / everything:>20.3f}"
          f"{ours[1] / plain:>24.3f}", flush=True)


# Other programs, other commits ---------------------------------------------------------------------------------------


class Process:
    """step_process.py in a process of its own, so that two programs never train at once."""

    def __init__(self, checkout: Path, *peer: Path) -> None:
        # The text of this checkout, whatever checkout it trains.
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("step_process.py"), *peer],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout)

    def ask(self, **what: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(what), file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        raise SystemExit("a process that trains steps has ended; its error is above.")

    def step(self, name: str, **what: Any) -> Callable[[], float]:
        self.ask(make=name, **what)
        return partial(self.ask, step=name)

    def close(self) -> None:
        with self.process:  # closes its pipes and waits for it
            pass


def install_peer() -> None:
    if not (PEER / "pro_gan_pytorch").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--target", PEER, "pro-gan-pth==3.4"], check=True)
        (PEER.parent / ".gitignore").write_text("*\n")


def beside_peer(resolution: int, chosen: dict[str, Format]) -> None:
    """Prints how many times as fast a step is as that program's, of the same widths and batch."""
    what = {"resolution": resolution, "batch": BATCH[resolution]}
    wide = {**FULL, "fmap_base": 16384 if resolution >= 64 else 8192}
    float32 = chosen["float32"]._asdict()
    with closing(Process(ROOT)) as ours, closing(Process(ROOT, PEER)) as theirs:
        times = race({
            "theirs": theirs.step("theirs", **what),
            "float32": ours.step("float32", network=wide, training=float32, **what),
            "default": ours.step("default", network=wide, training=chosen["default"]._asdict(), **what),
            "pool": ours.step("pool", network={**wide, "pool_before_activation": True}, training=float32, **what)})
    print(f"{resolution:>5}{BATCH[resolution]:>7}{rate(times['theirs'], BATCH[resolution]):>28}"
          + "".join(f"{ratio(times, 'theirs', side):>24}" for side in ("float32", "default", "pool")), flush=True)


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A commit's files in a temporary folder."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "base"
        subprocess.run([*git, "add", "--quiet", "--detach", place, ref], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", place], check=True)


def compare(ref: str, resolutions: list[int]) -> None:
    """Prints new images/s over those of the commit `ref`."""
    compared = [Format("float32", channels_last=False), Format("bfloat16", channels_last=True)]
    print(f"images/s of this checkout over those of {ref}, full width\n"
          f"   px  batch{''.join(f'{form!s:>24}' for form in compared)}", flush=True)
    with checkout(ref) as folder, closing(Process(ROOT)) as new, closing(Process(folder)) as old:
        for resolution in resolutions:
            cells = []
            for form in compared:
                what = {"resolution": resolution, "batch": BATCH[resolution], "network": FULL,
                        "training": form._asdict()}
                times = race({"old": old.step("old", **what), "new": new.step("new", **what)})
                cells.append(ratio(times, "old", "new"))
            print(f"{resolution:>5}{BATCH[resolution]:>7}{''.join(f'{cell:>24}' for cell in cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step costs, as ratios of one run.")
    parser.add_argument("resolutions", nargs="*", type=int, metavar="PX", help=f"of {RESOLUTIONS}; all without any")
    parser.add_argument("--peer", action="store_true", help="install pro-gan-pth 3.4 below .venv-bench")
    parser.add_argument("--base", metavar="REF", help="compare with this commit, and nothing else")
    asked = parser.parse_args()
    if unknown := set(asked.resolutions) - set(RESOLUTIONS):
        parser.error(f"no step of {unknown} px. Use some of {RESOLUTIONS}.")
    asked.resolutions = asked.resolutions or RESOLUTIONS
    print(machine(), f"load {os.getloadavg()[0]:.1f} at the start\n", sep="; ", flush=True)
    if asked.base:
        compare(asked.base, asked.resolutions)
        return
    if asked.peer:
        install_peer()
    print(f"images/s, median and range; the layout a run chooses\n   px  width  batch{'float32':>30}{'bfloat16':>37}"
          f"{'bfloat16 / float32':>27}")
    chosen = {resolution: images_per_second(resolution) for resolution in asked.resolutions}
    print(f"\nphases of a step, full width    {''.join(f'  {name:>6}' for name in (*PHASES, 'rest'))}")
    for resolution in asked.resolutions:
        phases(resolution, chosen[resolution]["default"])
    print("\nconvolutions called bare / whole step, full width; bar 0.85 from 16 px")
    for resolution in asked.resolutions:
        for precision in ("float32", "bfloat16"):
            share_of_the_limit(resolution, chosen[resolution][precision])
    print("\nconvolutions' arithmetic, full width, in a fade\n   px  GFLOP/image    / plain    / all gradients    "
          "pool_before / plain\n" + " " * 21 + "bar 0.95            bar 0.90                bar 0.75")
    for resolution in asked.resolutions:
        arithmetic(resolution)
    if PEER.exists():
        print(f"\nimages/s over those of pro-gan-pth 3.4, same widths and batch\n   px  batch{'its images/s':>28}"
              f"{'float32; bar 1.1':>24}{'default; bar 2.0':>24}{'pool_before; bar 1.35':>24}")
        for resolution in (each for each in asked.resolutions if each > 4):  # that program's step fades at 8 px first
            beside_peer(resolution, chosen[resolution])


if __name__ == "__main__":
    main()
