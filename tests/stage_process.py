"""Trains a run stage after stage without Ray, as one rank of torchrun's environment; prints rank 0's events.

    python stage_process.py CONFIG.yaml OUT        goes on from the newest checkpoint in OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import unpickling  # beside this script
from accelerate import PartialState

from gradine.configs.schema import load
from gradine.pipeline.plan import make_plan
from gradine.stages import commits
from gradine.stages.loop import leave_group, run_stage


def main(config: str, out: str) -> None:
    unpickling.watch()
    run = load(config)
    PartialState(cpu=True)
    for stage in make_plan(run, commits.find(Path(out) / "checkpoints")[0]).stages:
        PartialState().wait_for_everyone()  # rank 0 has written the last stage's end: all start from it
        start = make_plan(run, commits.find(Path(out) / "checkpoints")[0]).start
        for event in run_stage(run, stage, start.path if start else None, out):
            print(json.dumps(event), flush=True)
    leave_group()
    assert not unpickling.offences, unpickling.offences


if __name__ == "__main__":
    main(*sys.argv[1:])
