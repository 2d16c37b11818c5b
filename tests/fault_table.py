"""docs/faults.md: which faults gradine survives, from the tests that inject them: python -m tests.fault_table

A test belongs to a row by its name, `test_f07_...`; the first line of its docstring says what it injects. `make
test-all` fails if a row has no test that passed, `make test` if the page is not the one these tests give.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
NAME = re.compile(r"test_(f\d\d)_(\w+)")
ROWS = {
    "F01": ("SIGKILL at every system call of a save that changes the disk",
            "the newest valid checkpoint is the old or the new one, to the bit; the next start cleans up by itself"),
    "F02": ("power loss: what was not synced is lost or comes in another order",
            "the same in every state the disk may be left in; a writer that forgets a sync is caught"),
    "F03": ("one bit flipped in any file of a checkpoint",
            "refused by the file's name before it is loaded; the checkpoint before it is taken"),
    "F04": ("a file cut, zeroed, emptied, missing, or one too many", "as F03"),
    "F05": ("no space at a write of a checkpoint, the ledger, figures or the cache",
            "what is there stays; training goes on, or ends with its own exit code and the bytes needed and free; "
            "it recovers when there is space again"),
    "F06": ("input/output errors, a disk turned read-only, no permission, a quota",
            "a save that failed is never called saved; it is counted; three in a row end the run"),
    "F07": ("SIGKILL while old checkpoints are deleted",
            "at every instant there is one to resume from, and the last of every finished stage; pinned and best stay"),
    "F08": ("two processes on one run folder",
            "the second ends within seconds and names the first; one that slept through a takeover cannot commit"),
    "F09": ("the clock turned back, file times scrambled, links that lead nowhere",
            "the newest is chosen by lineage, images seen and term, as manifests say them"),
    "F10": ("a hostile checkpoint", "nothing in it runs, nothing outside is read, memory stays small, one clear line"),
    "F11": ("resuming with other settings, another architecture, other data, another schema",
            "refused key by key before any worker starts; safe settings may change; every release's checkpoints load"),
    "F12": ("resuming with 1, then 2, then 4 workers, then 1",
            "the same images in the same order and groups; the same bits between 1 worker that accumulates two "
            "micro-batches and 2 workers, gradients within 1e-6 for other splits"),
    "F13": ("SIGKILL of the workers at random moments",
            "weights, moments, average, clock and the log of image ids are those of the run that was never killed"),
    "F14": ("a node is killed, a worker's or the head",
            "the run goes on by itself, or once the head is back by the same command, to the same bits and images"),
    "F15": ("SIGTERM to the driver, Ctrl-C, a stopped job",
            "a checkpoint within the grace period, documented exit codes; the second signal ends it at once"),
    "F16": ("SIGTERM to one worker alone", "all stop after the same step, with one checkpoint"),
    "F17": ("a worker that is frozen",
            "found within ray.step_timeout_s and named, the stacks of all saved; a new group goes on from the newest "
            "checkpoint to the same bits"),
    "F18": ("a thread that reads images is stuck, holds the interpreter's lock or is killed with its worker",
            "the reason names worker, shard and image; no image is lost or shown twice"),
    "F19": ("a worker several times slower than the others", "named within 50 steps, with the phase in which it lags; "
            "training goes on; no alarm in 1,000 healthy steps"),
    "F20": ("a node, or the store of checkpoints, is cut off",
            "a new group goes on; what the cut-off worker still commits does not count; its node joins again by "
            "itself and is used"),
    "F21": ("a host without memory, whose kernel ends a worker",
            "told as such; the group starts again with less kept in memory ahead, then with a smaller micro-batch"),
    "F22": ("an allocator without memory",
            "the micro-batch is halved; batch and stddev groups stay; the choice is kept"),
    "F23": ("the same step fails again and again", "it stops with its own exit code and leaves what is known of it"),
    "F24": ("NaN or infinity in a loss, gradient, weight, moment, average or input",
            "the update is masked on every worker alike; a state that is not finite is rolled back, never committed"),
    "F25": ("updates that are masked", "counted, hidden nowhere; twenty in a row are F24"),
    "F26": ("divergence, a player that wins for good, a spike",
            "an alarm with its figure and rule; none on healthy runs"),
    "F27": ("the generator collapses to few images", "an alarm when that checkpoint is measured"),
    "F28": ("corrupt images",
            "set aside with their reason; the others keep their keys and bytes; too many stop the run"),
    "F29": ("decompression bombs", "refused from the header, in little memory"),
    "F30": ("images of every kind: 16 bits, CMYK, palettes, transparency, rotation, colour profiles, animations",
            "the right pixels, or a rejection with its reason; never garbage"),
    "F31": ("tars cut, flipped, with links, devices and sparse members",
            "an error or a rejection, never an image lost silently; nothing is written outside"),
    "F32": ("pickles and commands in the place of images", "never decoded, never run"),
    "F33": ("a network that breaks, stalls and answers with errors",
            "tried again until a deadline; the same bytes in the same order"),
    "F34": ("shards that are missing, swapped or edited", "refused; the order does not depend on the listing"),
    "F35": ("resuming at any batch of any epoch, while batches are prefetched",
            "every image once an epoch, in the same order"),
    "F36": ("no token, a wrong one, one that others can read; ports open to other machines",
            "401 and 403 on the dashboard and its jobs; no Ray is joined or started that lets in whoever reaches it"),
    "F37": ("other runs and Rays on the same machine are killed, stopped and ended",
            "none touches another; nothing is ended by its name"),
    "F38": ("secrets in the environment and in URLs", "in no file of the run, no log, no message"),
    "F39": ("an evaluation that dies, hangs or gives no finite figure; its weights or kept statistics are damaged",
            "training goes on to the same bits; no half of an evaluation: a figure that is missing says why; kept "
            "statistics are made again; the next command measures what this one could not"),
    "F40": ("a night that starts while the last one still runs, or is missed; a tracker or webhook that hangs or fails",
            "the second refuses or waits its turn; the next one goes on to the same bits; no step waits; a night after "
            "the run's end changes nothing"),
}


def tests() -> Iterator[tuple[str, str, str]]:
    """(row, the test's sentence, what it injects) of every fault test, by file and line."""
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and (match := NAME.fullmatch(node.name)):
                injected = (ast.get_docstring(node) or "").split("\n")[0].rstrip(".")
                yield match[1].upper(), match[2].replace("_", " "), injected


def page() -> str:
    lines = ["# What a run survives", "", "Made from the tests by `python -m tests.fault_table`; `make test-all` "
             "runs them, and fails if a row has none that passes.", "", "| | fault | what holds | shown by |",
             "|---|---|---|---|"]
    there = list(tests())
    for row, (fault, holds) in ROWS.items():
        shown = "<br>".join(f"{sentence}{f' *({injected})*' if injected else ''}"
                            for of, sentence, injected in there if of == row)
        lines.append(f"| {row} | {fault} | {holds} | {shown or '**nothing yet**'} |")
    return "\n".join(lines) + "\n"


def rows_without_a_pass(outcomes: dict[str, set[str]]) -> list[str]:
    """A line for each row that failed or of which nothing passed. outcomes: of the tests that ran, by row."""
    lines = []
    for row in ROWS:
        seen = outcomes.get(row, set())
        if "failed" in seen or "passed" not in seen:
            lines.append(f"{row} {ROWS[row][0]}: {', '.join(sorted(seen)) or 'no test ran'}")
    return lines


# As a pytest plugin (`-p tests.fault_table`): the rows of what ran --------------------------------------------------

_outcomes: dict[str, set[str]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    match = NAME.match(report.nodeid.rpartition("::")[2])
    if match and (report.when == "call" or report.outcome != "passed"):
        _outcomes.setdefault(match[1].upper(), set()).add(report.outcome)


def pytest_sessionfinish(session: Any) -> None:
    if rows_without_a_pass(_outcomes) and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lacking = rows_without_a_pass(_outcomes)
    terminalreporter.section("faults")
    for line in lacking or [f"each of {len(ROWS)} rows has tests that passed"]:
        terminalreporter.line(line)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(list(tests()))} tests of {len(ROWS)} rows")
