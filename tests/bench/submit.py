"""From `gradine submit` to the first training step, on a head that is up: python -m tests.bench.submit

Starts a head of its own, submits a short run of the smoke recipe twice, and reads where the seconds went from the
client, Ray's log of the job and the run's ledger. The first brings its code and makes its shards, the second finds both
there. Bar: 45 s on two cores to the first step of a cluster that is warm, the second row.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from tests.head import Head, started_head

PARTS = ("client", "job starts", "joins Ray", "shards", "workers", "first step", "all")


def seconds_of(head: Head, folder: Path, name: str) -> tuple[list[float], float]:
    """Of one submit: each part's seconds, then those from the job's end to that of its client."""
    began = time.time()
    code, out, err = head.gradine(
        "submit", "smoke", f"name={name}", f"runs={folder}/runs", f"data.shards={folder}/shards", "tick_images=16",
        "stages.*.hold_images=160", "stages.*.fade_images=160", "evaluation.when=end", "evaluation.count=100")
    returned = time.time()
    if code:
        sys.exit(out + err)
    (job,) = set(re.findall(rf"gradine-{name}-\d+-\d+", out))
    logs = head.logs()
    taken = stamp((logs / f"job-driver-{job}.log").read_text())
    supervisor = (logs / "jobs" / f"supervisor-{job}.log").read_text()
    ledger = [json.loads(line) for line in (folder / "runs" / name / "ledger.jsonl").read_text().splitlines()]
    first = {line["event"]: line["time"] for line in reversed(ledger)}
    marks = [began, taken, stamp(supervisor), first["start"], first["resume"], first["group"], first["tick"]]
    parts = [after - before for before, after in itertools.pairwise(marks)]
    return [*parts, marks[-1] - began], returned - stamp(supervisor.splitlines()[-1])


def stamp(log: str) -> float:
    """The first time that a log of Ray's gives."""
    found = re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", log)
    assert found, log[:200]
    return datetime.strptime(found[0], "%Y-%m-%d %H:%M:%S,%f").timestamp()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, started_head() as one:
        print("".join(f"{part:>12}" for part in ("seconds", *PARTS)) + "     end seen after")
        for name in ("cold", "warm"):
            parts, late = seconds_of(one, Path(temporary), name)
            print(f"{name:>12}" + "".join(f"{part:>12.1f}" for part in parts) + f"{late:>19.1f}", flush=True)
