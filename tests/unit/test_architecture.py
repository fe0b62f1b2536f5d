"""The import order of docs/architecture.md, module by module: no breach, no cycle, no torch where none may be."""

from __future__ import annotations

import ast
import configparser
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import REPO

PACKAGE = REPO / "sltrain_dist"

LAYERS = (
    {"errors", "streams"},
    {"files"},
    {"config"},
    {"numerics"},
    {"sparse_lowrank", "data", "optim", "tracking"},
    {"models"},
    {"runtime"},
    {"parallel"},
    {"checkpoint"},
    {"memory"},
    {"inference"},
    {"train"},
    {"hub"},
    {"plan"},
    {"study"},
    {"cli"},
    {"__main__"},
)
"""Lowest first; a package imports itself and what is below it, not its neighbours."""

TORCH_FREE = {
    "errors",
    "streams",
    "files",
    "config.paths",
    "config.run_files",
    "config.strict_yaml",
    "config.schema",
    "config.differences",
    "config.presets",
    "config.load",
    "config.rules",
    "numerics.device",
    "numerics.splitmix",
    "numerics.int8_layout",
    "numerics.tensor_range",
    "sparse_lowrank.sizes",
    "sparse_lowrank.cost",
    "sparse_lowrank.devices",
    "sparse_lowrank.route_kernels",
    "models.count",
    "optim.schedule",
    "optim.restarts",
    "optim.projected.settings",
    "optim.state_layout",
    "runtime.launchers",
    "parallel.placement",
    "parallel.communication",
    "runtime.rank_variables",
    "runtime.reaper",
    "runtime.slurm",
    "runtime.watchdog",
    "checkpoint.manifest",
    "checkpoint.contents",
    "data.order",
    "train.run",
    "train.run_directory",
    "cli",
    "__main__",
}
LEAVES = {
    "sparse_lowrank.sizes",
    "sparse_lowrank.cost",
    "sparse_lowrank.devices",
    "sparse_lowrank.route_kernels",
    "models.count",
    "optim.state_layout",
    "parallel.placement",
    "parallel.communication",
    "data.order",
    "checkpoint.manifest",
}
"""May be imported by everything above config, each other included."""

ONLY_IN = {
    "fcntl": {"files"},
    "deepspeed": {"parallel.zero"},
    "mlflow": {"tracking.mlflow"},
    "sentencepiece": {"data.tokenizer"},
    "tokenizers": {"hub.tokenizer_json"},
    "datasets": {"data.sources.resolve"},
    "jinja2": {"plan.reports.page"},
    "triton": {"sparse_lowrank.kernels.triton_kernels", "optim.triton_step"},
}

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items() if name != "__init__"}

PLANNING_WITH_TORCH = {
    "plan.follow",
    "plan.paper.published",
    "plan.paper.published_optimizers",
    "plan.replay",
    "memory.events",
    "memory.operators",
    "memory.record",
    "memory.record_matrices",
}
"""The rest of the planner runs on login nodes."""
TORCH_FREE |= {
    name for name in MODULES if name.startswith(("memory.", "plan.", "study.", "cli."))
} - PLANNING_WITH_TORCH


@functools.cache
def imports(path: Path) -> set[str]:
    """All modules that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inner = {f"{module}.{alias.name}" for alias in node.names}
            ours = {name for name in inner if name.removeprefix("sltrain_dist.") in MODULES}
            found |= ours or {module}
    return found


def own_imports(name: str) -> set[str]:
    return {i.removeprefix("sltrain_dist.") for i in imports(MODULES[name]) if i.startswith("sltrain_dist.")}


def layer(module: str) -> int:
    return next(i for i, packages in enumerate(LAYERS) if module.partition(".")[0] in packages)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    package = name.partition(".")[0]
    for imported in own_imports(name):
        if imported.partition(".")[0] == package or (imported in LEAVES and layer(name) > layer("config")):
            continue
        assert layer(imported) < layer(name), f"{name} imports {imported}"


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name in done:
            return
        for imported in sorted(own_imports(name) & set(MODULES)):
            visit(imported, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"sltrain_dist.{name}")
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def test_torch_free_modules_import_no_torch() -> None:
    """All in one process, which ends at the first that does."""
    command = [sys.executable, "-c", IMPORT_ALL, *sorted(TORCH_FREE)]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_has_one_home(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(i.partition(".")[0] == library for i in imports(path))}
    assert users == ONLY_IN[library]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_patches_another(name: str) -> None:
    """What must differ on fake tensors has a seam in the code (numerics/device.py)."""
    assert "unittest.mock" not in imports(MODULES[name]) and "unittest" not in imports(MODULES[name])


RENAMES_WITHIN_A_TEMPORARY_DIRECTORY = {"hub.export", "data.prepare.shards"}
"""They name shards whose number is known at the end; the whole directory is put in place by files.py."""


def renames(path: Path) -> bool:
    """Whether a file renames files: `path.rename(new)`, `path.replace(new)`, `os.replace(old, new)` and the like."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, ast.unparse(node.func.value)
            of_path = name == "replace" and len(node.args) == 1 and not node.keywords  # of a text: two arguments
            if name in ("rename", "renames") or of_path or (owner, name) in (("os", "replace"), ("shutil", "move")):
                return True
    return False


def test_only_files_py_makes_things_durable() -> None:
    """Nobody else renames, locks (see ONLY_IN) or makes temporary files."""
    renaming = {name for name, path in MODULES.items() if renames(path)}
    assert renaming == {"files", *RENAMES_WITHIN_A_TEMPORARY_DIRECTORY}
    assert [name for name, path in MODULES.items() if {"tempfile", "filelock"} & imports(path)] == []


SAME_MEANING = {"ddp", "fsdp", "zero", "build", "export", "tokenizer"}
"""Names of two modules each: an engine, or a command, and what it is about."""


def test_a_folder_is_seen_at_a_glance() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        modules = [path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
        assert len(modules) <= 12, f"{folder.name}/ has {len(modules)} modules"


def test_names_are_unique() -> None:
    """Of modules, and of public classes: one word, one meaning."""
    stems = Counter(path.stem for path in MODULES.values() if path.stem not in ("__init__", "__main__"))
    assert {name for name, count in stems.items() if count > 1} == SAME_MEANING
    trees = [ast.parse(path.read_text()) for path in MODULES.values()]
    classes = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1 and not name.startswith("_")] == []


def test_a_wheel_has_all_files_of_the_package() -> None:
    """Python files are packaged by themselves; others, such as templates, must be named in setup.cfg."""
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    named = settings["options.package_data"]["sltrain_dist"].split()
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert sorted(named) == sorted(str(path.relative_to(PACKAGE)) for path in files if path.suffix != ".py")


def test_the_checks_see_a_breach() -> None:
    """Negative control."""
    assert "config.schema" in own_imports("config.load")
    assert layer("train.loop") > layer("parallel.engine") > layer("data.order")
