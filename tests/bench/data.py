"""The data plane against its baselines: python -m tests.bench.data [--images FOLDER] [--only NAME ...] [--memory]

Every figure is a ratio of two sides of one run, which take turns: machines are shared. A side counts with the best of
its rounds, since noise only adds; where a claim is about work on one core, with the CPU time of the process, and the
ratio by the wall beside it. Sides that read or decode have been warmed up, and give the same pixels, which is checked.

--images wants photographs of at least 1024x1024: squares cut from them become JPEGs (quality 92, 4:2:0). Without, crops
of the bundled 64 px set are scaled up and noise is added so that codecs see detail: not what cameras make.
--memory alone shards 20,000 images and sums what all its processes hold.
The other libraries live in .venv-bench, made here where missing; --peers PYTHON names an interpreter that has them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

# Ray reads these when it is imported, torch and numpy when they start their threads.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32),
                  RAY_worker_niceness="0", OMP_NUM_THREADS="1")

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset as wds
from PIL import Image

from gradine.configs.schema import Data
from gradine.pipeline.cluster import worker_environment
from gradine.pipeline.shards import Entry, make_slice, shard
from gradine.stages.data import Images, overlapped, prefetch
from gradine.stages.pixels import encode, suffix

ROOT = Path(__file__).parents[2]
TOP, PHOTOGRAPHS, ROUNDS, ENOUGH_S = 1024, 48, 3, 5.0
SMALL = (4, 8, 16, 32, 64)
OTHERS: list[float] = []  # per cent of the cores that others took, before each round


@dataclass
class Row:
    claim: str
    figure: str
    bar: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        return f"{self.claim:<78}{self.figure:>26}{self.bar:>10}  {verdict}"


def at_most(claim: str, figure: float, bar: float, more: str = "", form: str = ".3f") -> Row:
    return Row(claim, f"{figure:{form}}{more}", f"<= {bar:g}", bool(figure <= bar))


def at_least(claim: str, figure: float, bar: float, more: str = "") -> Row:
    return Row(claim, f"{figure:{'.3f' if figure < 10 else ',.0f'}}{more}", f">= {bar:g}", bool(figure >= bar))


def best(sides: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The least that each side returned, over rounds in which they take turns: ROUNDS, more where they are short."""
    costs: dict[str, list[Any]] = {name: [] for name in sides}
    end = time.monotonic() + ENOUGH_S
    while len(costs[next(iter(sides))]) < ROUNDS or time.monotonic() < end:
        OTHERS.append(psutil.cpu_percent(0.1))  # nothing of ours runs just now
        for name, side in sides.items():
            costs[name].append(side())
    return {name: np.min(costs[name], axis=0) for name in sides}


def cpu_and_wall(work: Callable[[], Any]) -> np.ndarray:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return np.array([time.process_time() - cpu, time.perf_counter() - wall])


def seconds(work: Callable[[], Any]) -> float:
    return float(cpu_and_wall(work)[1])


# What is measured on -------------------------------------------------------------------------------------------------


def make_photographs(given: Path | None, folder: Path) -> list[Path]:
    """PHOTOGRAPHS squares of TOP px as JPEG files, from as many of the given images as there are."""
    folder.mkdir()
    squares = cut_squares(given) if given else invented_squares()
    for number, square in enumerate(islice(squares, PHOTOGRAPHS)):
        content = simplejpeg.encode_jpeg(np.ascontiguousarray(square), 92, "RGB", "420")
        (folder / f"{number:03d}.jpg").write_bytes(content)
    paths = sorted(folder.iterdir())
    if not paths:
        raise SystemExit(f"{given} has no images of {TOP}x{TOP} or more.")
    return list(islice(cycle(paths), PHOTOGRAPHS))


def cut_squares(folder: Path) -> Iterator[np.ndarray]:
    """From every photograph one, then a second from each that has room, and so on."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    for number in range(8):
        for path in paths:
            with Image.open(path) as image:
                across, down = image.width // TOP, image.height // TOP
                if number < across * down:
                    left, top = number % across * TOP, number // across * TOP
                    yield np.asarray(image.convert("RGB").crop((left, top, left + TOP, top + TOP)))


def invented_squares() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(ROOT / "configs" / "demo_images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
        for name in names[::len(names) // PHOTOGRAPHS]:
            small = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            pixels = np.asarray(small.resize((TOP, TOP), Image.Resampling.BICUBIC)).astype(np.float32)
            for size, strength in ((TOP, 2), (TOP // 2, 4), (TOP // 4, 6), (TOP // 8, 8)):
                noise = Image.fromarray(rng.normal(0, strength, (size, size)).astype(np.float32))
                pixels += np.asarray(noise.resize((TOP, TOP), Image.Resampling.BICUBIC))[..., None]
            yield pixels.clip(0, 255).astype(np.uint8)


def many(photographs: list[Path], folder: Path, count: int) -> Path:
    """`count` hard links to the photographs."""
    folder.mkdir()
    for number, path in enumerate(islice(cycle(photographs), count)):
        os.link(path, folder / f"{number:06d}.jpg")
    return folder


@contextmanager
def own_ray() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False,
             configure_logging=False, runtime_env=worker_environment(threads=1))
    try:
        yield ray
    finally:
        ray.shutdown()


class Sets:
    """Shards that several claims read, made when first asked for: (crop, encoding, resolution) -> settings."""

    def __init__(self, photographs: list[Path], folder: Path) -> None:
        self.photographs, self.folder = photographs, folder

    def data(self, crop: str, encoding: str, resolution: int, **settings: Any) -> Data:
        shards = self.folder / re.sub(r"\W", "-", f"{crop}-{encoding}-{resolution}")
        data = Data(source=str(self.photographs[0].parent), shards=str(shards), crop=crop, encoding=encoding,
                    shard_images=8, cache_dir=str(self.folder / "cache"), **settings)
        if not shards.exists():
            with own_ray():
                shard(data, resolution)
        return data


def tars_of(data: Data, resolution: int) -> list[str]:
    return [str(path) for path in sorted(Path(data.shards, f"r{resolution:04d}").glob("*.tar"))]


def contents_of(data: Data, resolution: int) -> list[bytes]:
    from tests.bench.peers import image_bytes

    return list(image_bytes(tars_of(data, resolution)))


# The claims ----------------------------------------------------------------------------------------------------------


def sharding(sets: Sets) -> Iterator[Row]:
    """The whole pyramid in one process against decoding and encoding its top."""
    for encoding, count, bar in (("raw:64,jpeg", Data.shard_images, 1.8), ("raw:64,webp", 32, 1.3),
                                 ("raw:64,png", 32, 1.3), ("raw:128,webp", 32, 1.3), ("raw:256,webp", 32, 1.3)):
        paths = list(islice(cycle(sets.photographs), count))
        data = Data(source=str(paths[0].parent), shards=str(sets.folder / "slice"), encoding=encoding)
        Path(data.shards).mkdir(exist_ok=True)
        entries = [Entry(f"{n:08d}", path.name, path.stat().st_size, None) for n, path in enumerate(paths)]
        found = best({"pyramid": partial(cpu_and_wall, partial(make_slice, data.source, entries, 0, data, TOP)),
                      "top": partial(cpu_and_wall, partial(reencode, paths, data.encoding_of(TOP)))})
        cpu, wall = found["pyramid"] / found["top"]
        yield at_most(f"pyramid {TOP}..4 as {encoding} against its top alone ({found['top'][0] / count * 1e3:.1f} ms "
                      "of CPU)", cpu, bar, f" (wall {wall:.2f})")


def reencode(photographs: list[Path], kind: str) -> None:
    for path in photographs:
        encode(simplejpeg.decode_jpeg(path.read_bytes(), "RGB"), kind)


def cores(sets: Sets) -> Iterator[Row]:
    """`shard` on a Ray of two CPUs, one of them taken by a reservation on the slow side; its workers are warm."""
    count, made = 8 * PHOTOGRAPHS, itertools.count()
    source = many(sets.photographs, sets.folder / "many", count)

    def on(ray: Any, cpus: int) -> float:
        data = Data(source=str(source), shards=str(sets.folder / f"cores{next(made)}"), encoding="raw:64,jpeg",
                    shard_images=24)
        taken = ray.util.placement_group([{"CPU": 1}]) if cpus == 1 else None
        if taken and not taken.wait(30):
            raise RuntimeError("Ray did not give the CPU that one side goes without")
        ray.get([ray.remote(num_cpus=1)(start_up).remote() for _ in range(cpus)])
        try:
            return seconds(lambda: shard(data, TOP))
        finally:
            shutil.rmtree(data.shards)
            if taken:
                ray.util.remove_placement_group(taken)

    half = sets.photographs[:PHOTOGRAPHS // 2]
    with own_ray() as ray:
        sides = {"one": lambda: on(ray, 1), "two": lambda: on(ray, 2),
                 "bare one": lambda: seconds(lambda: on_threads(1, half)),
                 "bare two": lambda: seconds(lambda: on_threads(2, half))}
        on(ray, 2)
        found = best(sides)
    yield at_least(f"shard: two cores against one ({count / found['two']:.0f} images/s on two)",
                   found["one"] / found["two"], 1.8)
    yield Row("the machine: two threads of the bare codec against one", f"{found['bare one'] / found['bare two']:.3g}")


def start_up() -> None:
    """Keeps a worker busy while the next one starts: an idle one would be taken twice."""
    import gradine.pipeline.shards  # noqa: F401

    time.sleep(1)


def on_threads(threads: int, photographs: list[Path]) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda path: reencode([path], "jpeg"), photographs))


def cache(sets: Sets) -> Iterator[Row]:
    """Tiles of 64 px and the levels below from the mapped cache, in batches of 64."""
    for size in SMALL:
        yield from cache_at(size, sets.data("tile", "raw:64,webp", 64), sets.photographs[:8])


def cache_at(size: int, data: Data, photographs: list[Path]) -> Iterator[Row]:
    few = [path.read_bytes() for path in photographs]
    with closing(Images(data, size, decode_threads=2)) as images:
        count = 4 * len(images)
        found = best({"ours": lambda: seconds(lambda: read(images, 64, count)) / count,
                      "opened": lambda: seconds(lambda: [opened(content, size) for content in few]) / len(few),
                      "wds": lambda: wds_seconds(wds_samples(data, size))})
    yield at_least(f"{size} px from the cache against opening and resizing the {TOP} px photographs",
                   found["opened"] / found["ours"], 20, " x")
    yield at_least(f"{size} px from the cache ({1e-3 / found['ours']:,.0f}k images/s) against wds on the same shards",
                   found["wds"] / found["ours"], 5, " x")


def read(images: Images, batch: int, count: int) -> None:
    for seen in range(0, count, batch):
        images.pixels(images.ids(0, seen, batch))


def opened(content: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BOX))


def wds_samples(data: Data, size: int) -> Any:
    ending = suffix(data.encoding_of(size), data.channels)
    return wds.WebDataset(tars_of(data, size), shardshuffle=False).decode("rgb8").to_tuple(ending)


def wds_seconds(samples: Any) -> float:
    """Seconds an image over one pass."""
    began = time.perf_counter()
    count = sum(1 for _ in samples)
    return (time.perf_counter() - began) / count


def streaming(sets: Sets) -> Iterator[Row]:
    """TOP px without a cache: two decode threads, batches of 4 made ahead, as in training."""
    for encoding in ("raw:64,jpeg", "raw:64,webp"):
        yield from stream(sets.data("centre", encoding, TOP, cache_gb=0))


def stream(data: Data) -> Iterator[Row]:
    kind, contents = data.encoding_of(TOP), contents_of(data, TOP)
    loader = torch.utils.data.DataLoader(wds_samples(data, TOP).batched(4), batch_size=None, num_workers=2,
                                         persistent_workers=True)
    with closing(Images(data, TOP, decode_threads=2)) as images:
        sides = {"bare": lambda: seconds(lambda: decode_bare(contents, kind)) / len(contents),
                 "ours": lambda: read_ahead(images, 4, len(images)),
                 "wds": lambda: wds_seconds(wds_samples(data, TOP)),
                 "wds, 2 workers": lambda: seconds(lambda: [len(batch) for batch in loader]) / len(contents)}
        for warm in sides.values():
            warm()
        found = best(sides)
    wds_best = min(found["wds"], found["wds, 2 workers"])
    yield at_least(f"{TOP} px {kind} streamed ({1 / found['ours']:.0f} images/s) against the bare codec on two threads",
                   found["bare"] / found["ours"], 0.9)
    yield at_least(f"{TOP} px {kind} streamed against wds, in-process or two workers", wds_best / found["ours"], 1)


def decode_bare(contents: list[bytes], kind: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda content: bare(content, kind), contents))


def bare(content: bytes, kind: str) -> None:
    """What the codec itself does; its pixels are dropped."""
    if kind == "jpeg":
        simplejpeg.decode_jpeg(content, "RGB")
    else:
        Image.open(io.BytesIO(content)).load()


def read_ahead(images: Images, batch: int, count: int) -> float:
    """Seconds an image, made ahead by a thread as in training."""
    began = time.perf_counter()
    ahead = prefetch(overlapped(images.decoding(images.ids(0, seen, batch)) for seen in range(0, count, batch)))
    with closing(ahead):  # type: ignore[type-var]  # a generator has close()
        for pixels in ahead:
            torch.from_numpy(pixels)
    return (time.perf_counter() - began) / count


# Other libraries -----------------------------------------------------------------------------------------------------


class Peer:
    """Another library in a process of its environment; see peers.py."""

    def __init__(self, python: Path, library: str, workers: int, folder: Path) -> None:
        self.library, self.log = library, (folder / f"{library}-{workers}.log").open("w+")
        environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"}  # they leave files at home
        self.process = subprocess.Popen(
            [python, ROOT / "tests" / "bench" / "peers.py", library, str(workers), folder / f"{library}-{workers}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(what), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise RuntimeError(f"{self.library} ended: {self.log.read()[-2000:]}")
        return json.loads(answer)

    def pass_s(self) -> float:
        """Seconds an image over one shuffled pass."""
        answer = self.ask(sum=False)
        return answer["seconds"] / answer["images"]

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def peers_python() -> Path:
    """The interpreter of .venv-bench, which is made where missing; its torch is that of constraints-cpu.txt."""
    folder = ROOT / ".venv-bench"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print("making .venv-bench ...", file=sys.stderr, flush=True)
        constraints = (ROOT / "constraints-cpu.txt").read_text().splitlines()
        pinned = [line for line in constraints if line.startswith("torch==")]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        (folder / ".gitignore").write_text("*\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned, "litdata",
                        "mosaicml-streaming", "webdataset", "simplejpeg", "pillow>=12.2"], check=True)
        ready.touch()
    return python


def peers(sets: Sets, python: Path) -> Iterator[Row]:
    """The same encoded bytes through litdata and mosaicml-streaming, shuffled, 0 and 2 workers, the better of them."""
    folder = sets.folder / "peers"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(closing(Peer(python, library, workers, folder)))
                  for library in ("litdata", "mosaic") for workers in (0, 2)]
        for crop, encoding, top, sizes in (("tile", "raw:64,webp", 64, (4, 16, 64)),
                                           ("tile", "raw:64,webp", 256, (128, 256)),
                                           ("centre", "raw:64,webp", TOP, (TOP,)),
                                           ("centre", "raw:64,jpeg", TOP, (TOP,))):
            for size in sizes:
                yield from side_by_side(sets.data(crop, encoding, top), sets.data(crop, encoding, top, cache_gb=0),
                                        size, others)


def side_by_side(cached: Data, streamed: Data, size: int, others: list[Peer]) -> Iterator[Row]:
    batch, kind = 4 if size == TOP else 64, cached.encoding_of(size)
    for other in others:
        other.ask(tars=tars_of(cached, size), kind=kind, resolution=size, batch=batch)
    with closing(Images(cached, size, 2)) as mapped, closing(Images(streamed, size, 2)) as decoding:
        ids = np.arange(len(mapped))
        sums = [*(int(images.pixels(ids).sum(dtype=np.int64)) for images in (mapped, decoding)),
                *(other.ask(sum=True)["sum"] for other in others)]  # and all are warm
        if len(set(sums)) > 1:
            raise RuntimeError(f"{size} px {kind}: the sides read different pixels, their sums are {sums}")
        few = max(1, 20_000 // len(ids)) * len(ids) if size <= 64 else len(ids)
        found = best({"mapped": lambda: read_ahead(mapped, batch, few),
                      "decoding": lambda: read_ahead(decoding, batch, len(ids)),
                      **{f"{other.library}/{n}": other.pass_s for n, other in enumerate(others)}})
    fastest = {library: min(cost for name, cost in found.items() if name.startswith(library))
               for library in ("litdata", "mosaic")}
    bar = min(fastest.values())
    theirs = ", ".join(f"{library} {1 / cost:,.0f}" for library, cost in fastest.items())
    for name, way in (("mapped", "cached"), ("decoding", "streamed")):
        claim = f"{size} px {kind} {way} {1 / found[name]:,.0f}/s; {theirs}"
        # Any real set of TOP px outgrows the cache: there the streamed side is what a user has.
        if (way == "streamed") == (size == TOP):
            yield at_least(claim, bar / found[name], 1, " x")
        else:
            yield Row(claim, f"{bar / found[name]:.3g} x")


# Memory --------------------------------------------------------------------------------------------------------------


def reading_memory(sets: Sets) -> Iterator[Row]:
    for encoding in ("raw:64,jpeg", "raw:64,webp"):
        data = sets.data("centre", encoding, TOP)
        asked = [sys.executable, "-m", "tests.bench.data", "--read-in-batches", data.shards]
        grown = float(subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        yield at_most(f"streaming {TOP} px {data.encoding_of(TOP)} in batches of 4: growth of the peak beyond imports, "
                      "MB", grown, 300, form=".0f")


def print_growth(shards: str) -> None:
    """MB by which the peak of this process grows over its imports while it streams."""
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with closing(Images(Data(source="", shards=shards, cache_gb=0), TOP, decode_threads=2)) as images:
        read_ahead(images, 4, 5 * len(images))
    print(status_mb("VmHWM") - before)


def status_mb(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found[1]) / 1024


def sharding_memory(sets: Sets, count: int = 20_000) -> Iterator[Row]:
    """`gradine shard` and the Ray it starts: the sum over all processes, every half second."""
    source, out = many(sets.photographs, sets.folder / "memory", count), sets.folder / "memory-shards"
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen([sys.executable, "-m", "gradine.pipeline", "shard", source, out, "--resolution", "256"],
                               cwd=ROOT, stdout=log, stderr=log)
        peaks = np.zeros(2)
        while process.poll() is None:
            peaks = np.maximum(peaks, tree_gb(process))
            time.sleep(0.5)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(log.read().decode()[-2000:])
    minutes = (time.perf_counter() - began) / 60
    yield at_most(f"sharding {count:,} images at 256 px ({minutes:.1f} minutes): peak sum of PSS, GB", peaks[0], 1.5,
                  f" (RSS {peaks[1]:.2f})")


def tree_gb(process: psutil.Process) -> np.ndarray:
    """Sums of PSS and RSS over a process and all that it started."""
    total = np.zeros(2)
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = each.memory_full_info()
                total += memory.pss / 1e9, memory.rss / 1e9
    return total


def main() -> None:
    parts = {"sharding": sharding, "cores": cores, "cache": cache, "streaming": streaming, "peers": peers,
             "reading-memory": reading_memory, "sharding-memory": sharding_memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts)[:-1])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--read-in-batches", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read_in_batches:
        print_growth(asked.read_in_batches)
        return
    torch.set_num_threads(1)
    broken = False
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        folder = Path(temporary)
        sets = Sets(make_photographs(asked.images, folder / "photographs"), folder)
        size = sum(path.stat().st_size for path in sets.photographs) / len(sets.photographs)
        kind = "photographs" if asked.images else "invented images"
        print(f"{len(set(sets.photographs))} {kind} of {TOP} px, {size / 1e3:.0f} kB each\n"
              f"{Row('claim', 'figure', 'bar')}", flush=True)
        for name in ["sharding-memory"] if asked.memory else asked.only:
            try:
                part = parts[name]
                for row in part(sets, asked.peers or peers_python()) if name == "peers" else part(sets):
                    print(row, flush=True)
            except Exception as error:  # the other claims are still measured
                broken = True
                print(Row(name, f"broken: {type(error).__name__}: {error}"), flush=True)
    if OTHERS:
        print(f"Between the rounds others took {np.mean(OTHERS):.0f} % of the cores, at most {max(OTHERS):.0f} %. "
              "Above 20 %, figures by the wall are doubtful.")
    raise SystemExit(broken)


if __name__ == "__main__":
    main()
