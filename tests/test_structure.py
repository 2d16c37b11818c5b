"""Who may import whom: configs <- stages <- pipeline, read from the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fault_table

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"configs": {"configs"}, "stages": {"configs", "stages"}, "pipeline": {"configs", "stages", "pipeline"}}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_each_folder_imports_only_what_lies_below_it(folder: str) -> None:
    files = list((ROOT / folder).glob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "gradine" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                assert parts[1] in MAY_IMPORT[folder], f"{file.name} imports {name}"
            assert parts[0] not in MAY_IMPORT, f"{file.name} imports {name} without gradine."


def test_ray_is_imported_by_the_pipeline_alone() -> None:
    for folder in ("configs", "stages"):
        for file in (ROOT / folder).glob("*.py"):
            assert not any(name.split(".")[0] == "ray" for name in imports(file)), file


def test_configs_need_nothing_but_omegaconf() -> None:
    allowed = set(sys.stdlib_module_names) | {"omegaconf", "yaml", "gradine", "PIL"}
    for file in (ROOT / "configs").glob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] in allowed, f"{file.name} imports {name}"


def test_help_needs_no_torch_and_no_ray() -> None:
    code = "import sys; import gradine.pipeline.__main__; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_the_demo_set_is_the_only_file_over_200_kb_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    big = [file.name for file in files if file.is_file() and file.stat().st_size > 200_000]
    assert big == ["demo_images.zip"]


def test_the_page_of_faults_is_what_the_tests_give() -> None:
    assert fault_table.PAGE.read_text() == fault_table.page(), "write it anew: python -m tests.fault_table"


def test_every_row_of_faults_has_a_test_that_make_test_all_runs() -> None:
    selected = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(file.read_text())
        whole = any("mark.fault" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (match := fault_table.NAME.fullmatch(node.name)) and (
                    whole or any(re.search(r"mark\.(fault|slow|row)\b", ast.unparse(mark))
                                 for mark in node.decorator_list)):
                selected.add(match[1].upper())
    assert set(fault_table.ROWS) == selected


def test_every_fault_test_belongs_to_a_row_and_a_row_without_a_passing_one_is_told() -> None:
    assert {row for row, _, _ in fault_table.tests()} <= set(fault_table.ROWS)
    outcomes = {row: {"passed"} for row in fault_table.ROWS}
    assert fault_table.rows_without_a_pass(outcomes) == []
    for bad in ({"skipped"}, {"passed", "failed"}, set()):
        (line,) = fault_table.rows_without_a_pass({**outcomes, "F07": bad})
        assert line.startswith("F07 SIGKILL while old checkpoints are deleted")
