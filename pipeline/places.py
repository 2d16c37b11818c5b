"""Where a stage's workers and an evaluation have a place: how many, on which nodes, and what to do if there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from gradine.configs.schema import EnvironmentFault, Run, Stage, UserError
from gradine.pipeline import plan as planning
from gradine.pipeline.plan import Plan

PLACING_S = 5.0  # to place so many workers before fewer are tried


def refuse_unplaceable(run: Run, plan: Plan, say: Callable[[str], object]) -> None:
    """UserError for a stage or an evaluation that this cluster can never place: now, not in the night.

    Nodes of a cluster that was just started may still come: they are waited for.
    """
    import ray

    joined, said = bool(run.ray.address or os.environ.get("RAY_ADDRESS")), False
    until = time.monotonic() + run.ray.group_timeout_s * joined
    while lacking := unplaceable(run, plan.stages, ray.nodes()):
        if time.monotonic() >= until:
            raise UserError(lacking)
        if not said:
            say(f"waiting up to ray.group_timeout_s={run.ray.group_timeout_s:g} for more nodes: {lacking}")
        said = True
        time.sleep(1.0)


def unplaceable(run: Run, stages: Iterable[int], nodes: list[dict[str, Any]]) -> str:
    """Why these nodes, as ray.nodes() describes them, can not hold a run even when nothing else is there; or ""."""
    there = {kind: sum(node["Resources"].get(kind, 0) for node in nodes if node["Alive"]) for kind in ("CPU", "GPU")}
    have = f"Ray has {len([node for node in nodes if node['Alive']])} nodes with {there['CPU']:g} CPUs and " \
           f"{there['GPU']:g} GPUs"
    if not evaluation_fits(run, nodes):
        return (f"evaluation.cpus={run.evaluation.cpus:g} and .gpus={run.evaluation.gpus:g} fit on no single node: "
                f"{have}. Lower them.")
    taken = {"CPU": 0.0, "GPU": 0.0}
    for stage in (run.stages[index] for index in stages):
        fewest, room = planning.worker_counts(stage)[-1], most_placeable(stage, nodes)
        if fewest > room:
            return (f"stage {stage.resolution}px asks for {fewest} workers of {bundle_text(stage)} each "
                    f"({stage.placement}), {room} of them have a place: {have}. Lower stages.<n>.workers, .min_workers "
                    "or what each asks for.")
        taken = {kind: max(taken[kind], fewest * bundle_of(stage).get(kind, 0)) for kind in taken}
    for kind, wanted in (("CPU", run.evaluation.cpus), ("GPU", run.evaluation.gpus)):
        beside = 0 if run.evaluation.when == "end" else taken[kind]
        if wanted and wanted + beside > there[kind]:
            return (f"evaluation.{kind.lower()}s={wanted:g} does not fit beside the training's {beside:g}: {have}. "
                    "Lower it, or set evaluation.when=end.")
    return ""


def evaluation_fits(run: Run, nodes: Iterable[dict[str, Any]]) -> bool:
    """Whether a node could hold an evaluation, were it idle."""
    asked = {"CPU": run.evaluation.cpus, "GPU": run.evaluation.gpus}
    return any(node["Alive"] and all(node["Resources"].get(kind, 0) >= asked[kind] for kind in asked) for node in nodes)


def bundle_of(stage: Stage) -> dict[str, float]:
    """What one worker asks of Ray."""
    return {kind: amount for kind, amount in (("CPU", stage.cpus), ("GPU", stage.gpus)) if amount} or {"CPU": 0.001}


def most_placeable(stage: Stage, nodes: Iterable[dict[str, Any]]) -> int:
    """How many workers of `stage` these nodes, as ray.nodes() describes them, have room for when nothing else runs."""
    wanted = bundle_of(stage)
    each = [min(int(node["Resources"].get(kind, 0) / amount + 1e-6) for kind, amount in wanted.items())
            for node in nodes if node["Alive"]]
    if stage.placement == "STRICT_SPREAD":
        return sum(room > 0 for room in each)
    return max(each, default=0) if stage.placement == "STRICT_PACK" else sum(each)


def place(stage: Stage, timeout_s: float, crowded: Callable[[str], None]) -> tuple[Any, int]:
    """A placement group for as many workers as the cluster has room for, the most that `stage` may have at best.

    Where there is none soon, `crowded` is told, and room for the fewest it may have is waited for. EnvironmentFault if
    that does not come in time.
    """
    import ray

    counts, until, told = planning.worker_counts(stage), time.monotonic() + timeout_s, False
    while (left := until - time.monotonic()) > 0:
        room = most_placeable(stage, ray.nodes())
        for count in [count for count in counts if count <= room] or counts[-1:]:
            # Fewer are tried soon: what is taken now may stay so, and a node that died is counted for a while.
            if placement := placed(stage, count, min(left if told else left / 2, PLACING_S)):
                return placement, count
            if not told:
                told = True
                crowded(f"{stage.resolution:>5}px waits for {counts[-1]} workers of {bundle_text(stage)} each "
                        f"({stage.placement}): all nodes together have room for {room}, not all of it free; up to "
                        f"ray.group_timeout_s={timeout_s:g}")
                break  # from the most again: there may be room now
    raise EnvironmentFault(f"stage {stage.resolution}px: {counts[-1]} workers of {bundle_text(stage)} each "
                           f"({stage.placement}) could not be placed within ray.group_timeout_s={timeout_s:g}. Is the "
                           "cluster busy, or a node down?")


def placed(stage: Stage, count: int, timeout_s: float) -> Any:
    """A placement group for `count` workers, or None if there was no room in time."""
    import ray

    placement = ray.util.placement_group([bundle_of(stage)] * count, strategy=stage.placement)
    try:
        if placement.wait(timeout_s):
            return placement
    except BaseException:  # a signal, or its places would stay taken
        ray.util.remove_placement_group(placement)
        raise
    ray.util.remove_placement_group(placement)
    return None


def bundle_text(stage: Stage) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in bundle_of(stage).items())
