"""memory/recording_store.py: recordings outlive the process, and whatever happens to them on disk, plans are right."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sltrain_dist
from sltrain_dist.config.load import build_config, merged
from sltrain_dist.config.schema import Config
from sltrain_dist.memory import record, recorded_model, recording_store
from sltrain_dist.memory.estimate import estimate, recordings_of
from sltrain_dist.memory.recording import dumps, loads
from sltrain_dist.numerics import device
from tests.support.configs import PLANNED

pytestmark = pytest.mark.slow

CONFIG = build_config(
    merged(PLANNED, {"parallel": {"engine": "ddp"}, "optim": {"state_bits": 8}, "eval": {"source": "embedded"}})
)


def forget() -> None:
    """What a new process would not know."""
    recording_store._found.clear()
    recording_store.problems.clear()
    recording_store.directory.cache_clear()
    recorded_model.model_of.cache_clear()


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield recording_store.directory()
    forget()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was recorded."""
    kinds: list[str] = []
    for kind in ("layer", "ends", "evaluation", "step"):
        make = getattr(record, f"record_{kind}")

        def wrapped(*args: Any, kind: str = kind, make: Any = make) -> Any:
            kinds.append(kind)
            return make(*args)

        monkeypatch.setattr(record, f"record_{kind}", wrapped)
    return kinds


def test_what_is_on_disk_is_not_recorded_again(directory: Path, made: list[str]) -> None:
    first = estimate(CONFIG)
    assert {"layer", "ends", "evaluation", "step"} == set(made)
    assert len(list(directory.glob("*.json"))) == len(made)
    made.clear()
    forget()
    assert estimate(CONFIG) == first and made == []


def test_models_of_other_depth_and_other_engines_share_recordings(made: list[str]) -> None:
    estimate(CONFIG)
    made.clear()
    estimate(_changed(CONFIG, {"model": {"num_layers": 7}}))
    estimate(_changed(CONFIG, {"optim": {"update": "per_layer"}}))
    estimate(_changed(CONFIG, {"parallel": {"engine": "fsdp"}, "train": {"global_batch": 8}}), ranks=4)
    assert set(made) <= {"step"}  # of shards


def test_what_a_recording_depends_on_makes_another(made: list[str]) -> None:
    estimate(CONFIG)
    for changed in ({"data": {"seq_len": 24}}, {"reparam": {"rank": 4}}, {"train": {"dtype": "fp32"}}):
        made.clear()
        estimate(_changed(CONFIG, changed))
        assert "layer" in made


def test_only_some_layers_are_recomputed(made: list[str]) -> None:
    every_third = {"activation_checkpointing": "selective", "checkpoint_policy": "blocks", "checkpoint_every": 3}
    config = _changed(CONFIG, {"model": {"num_layers": 7}, "train": every_third})
    assert recorded_model.recorded_model(config, "cuda").order == (0, 1, 1, 0, 1, 1, 0)
    assert made.count("layer") == 2


def _changed(config: Config, values: dict[str, Any]) -> Config:
    return build_config(merged(config.model_dump(exclude_unset=True), values))


DAMAGES: dict[str, Any] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "a number of another value": lambda text: text.replace(b"1", b"2"),
    "of another kind": lambda text: b"0\n{}\n{}",
    "no text": lambda text: b"\xff\x00" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_recorded_anew(directory: Path, damage: str, made: list[str]) -> None:
    first = estimate(CONFIG)
    for path in directory.glob("*.json"):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    count = len(made)
    made.clear()
    forget()
    assert estimate(CONFIG) == first and len(made) == count
    made.clear()
    forget()
    assert estimate(CONFIG) == first and made == []  # they are whole again


def test_other_sources_are_recorded_anew(directory: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    estimate(CONFIG)
    made.clear()
    forget()
    monkeypatch.setattr(recording_store.importlib.metadata, "version", lambda name: "another")
    assert recording_store.directory() != directory
    estimate(CONFIG)
    assert "layer" in made


def test_a_source_that_changes_changes_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(sltrain_dist.__file__).parent
    shutil.copytree(package, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(recording_store.sltrain_dist, "__file__", str(tmp_path / "package" / "__init__.py"))
    versions = {recording_store._version()}
    for source in recording_store._SOURCES:
        path = tmp_path / "package" / source
        path = path if path.suffix else next(path.rglob("[a-z]*.py"))
        path.write_text(path.read_text() + "# changed")
        versions.add(recording_store._version())
    assert len(versions) == 1 + len(recording_store._SOURCES)


def test_all_that_records_is_among_the_sources() -> None:
    """Settings are in the keys, and errors and files are not recorded."""
    code = "import sys, sltrain_dist.memory.record, sltrain_dist.plan.paper.published; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    paths = {
        name.removeprefix("sltrain_dist.").replace(".", "/") for name in modules if name.startswith("sltrain_dist.")
    }
    aside = ("config/", "config", "errors", "files", "plan", "streams", "tracking")
    missing = {p for p in paths if not p.startswith(tuple(s.removesuffix(".py") for s in recording_store._SOURCES))}
    assert {path for path in missing if not path.startswith(aside[0]) and path not in aside} == set()


@pytest.mark.parametrize("around", ["no_grad", "inference_mode", "autocast", "math"])
def test_recordings_do_not_depend_on_the_state_of_torch(around: str, made: list[str]) -> None:
    mixed = _changed(CONFIG, {"train": {"dtype": "mixed", "activation_checkpointing": "full"}})
    mixed = _changed(mixed, {"reparam": {"method": "lowrank"}})
    expected = [estimate(config) for config in (CONFIG, mixed)]
    for path in recording_store.directory().glob("*.json"):
        path.unlink()
    forget()
    state = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "math": lambda: sdpa_kernel(SDPBackend.MATH),
    }[around]
    with state():
        assert [estimate(config) for config in (CONFIG, mixed)] == expected
        assert torch.is_autocast_enabled("cpu") is (around == "autocast")
    assert made.count("layer") == 4


def test_recordings_of_this_machines_operators_are_not_kept(directory: Path) -> None:
    estimate(CONFIG, device="cpu")
    assert not list(directory.glob("*.json"))


def test_threads_may_record_at_once() -> None:
    """A GPU is emulated in the whole process, and no longer than a recording takes."""
    others = [_changed(CONFIG, {"data": {"seq_len": length}}) for length in (8, 24, 40)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(estimate, others))
    assert not device.is_emulated("cuda")
    forget()
    assert found == [estimate(config) for config in others]


def test_threads_that_want_the_same_make_it_once(made: list[str]) -> None:
    request = recordings_of(CONFIG)[0]
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: request.get(), range(4))
    assert all(other is first for other in others) and made == ["layer"]


@pytest.mark.parametrize("problem", ["a file", "full", "read-only"])
def test_where_nothing_can_be_written_plans_are_right(
    tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    expected = estimate(CONFIG)
    forget()
    if problem == "a file":
        (tmp_path / "elsewhere").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
        number = errno.ENOSPC if problem == "full" else errno.EROFS

        def refuse(*unused: Any) -> None:
            raise OSError(number, "cannot be written")

        monkeypatch.setattr(recording_store, "write_whole", refuse)
    assert estimate(CONFIG) == expected
    assert len(recording_store.problems) == 1 and str(recording_store.directory()) in recording_store.problems[0]
    made.clear()
    assert estimate(CONFIG) == expected and made == []  # this process remembers


def test_several_processes_may_record_the_same_at_once(directory: Path) -> None:
    code = (
        "import json, sys; from sltrain_dist.config.load import build_config;"
        "from sltrain_dist.memory.estimate import estimate;"
        "print(estimate(build_config(json.loads(sys.argv[1]))).peak_bytes)"
    )
    values = CONFIG.model_dump_json(exclude_unset=True)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, values], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    peaks = {process.communicate()[0].strip() for process in processes}
    assert peaks == {str(estimate(CONFIG).peak_bytes)}
    assert not list(directory.glob("*.tmp"))


def test_missing_recordings_are_made_by_several_processes(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_store, "_MIN_FOR_PROCESSES", 2)
    reports: list[tuple[int, int]] = []
    recording_store.record_missing(recordings_of(CONFIG), 2, lambda done, total: reports.append((done, total)))
    assert reports[0] == (0, 3) and reports[-1] == (3, 3)
    estimate(CONFIG)
    assert set(made) == {"step"}


def test_recordings_are_read_as_they_were_written() -> None:
    for request in recordings_of(CONFIG):
        recording = request.get()
        assert asdict(loads(dumps(recording))) == asdict(recording)
