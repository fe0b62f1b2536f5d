"""The checkpoint store: pieces and ranges, kills at every point of a save, damage, and agreement of ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sltrain_dist.checkpoint import manifest, store
from sltrain_dist.checkpoint.contents import damage
from sltrain_dist.checkpoint.manifest import changed_file, checkpoint_name, list_checkpoints, read_manifest
from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.checkpoint.store import CheckpointStore
from sltrain_dist.errors import CheckpointError, DivergedError, StorageError
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.parallel.pieces import SavedRange
from sltrain_dist.runtime.environment import Environment
from tests.support.ranks import SINGLE, on_ranks

TENSORS: dict[str, Tensor] = {
    "model.w": torch.arange(35.0).reshape(5, 7),
    "optim.w.exp_avg": torch.arange(35.0).reshape(5, 7) / 8,
    "model.norm": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
    "model.one": torch.tensor([7.0]),
}


def pieces(tensors: dict[str, Tensor], rank: int, ranks: int) -> Iterator[SavedRange]:
    """Rank's pieces, cut as ZeRO cuts them: at equal distances in all tensors one after another."""
    total = sum(tensor.numel() for tensor in tensors.values())
    share = -(-total // ranks)
    first, last = rank * share, (rank + 1) * share
    passed = 0
    for name, tensor in tensors.items():
        low, high = max(first - passed, 0), min(last - passed, tensor.numel())
        if low < high:
            yield TensorRange(name, tuple(tensor.shape), low, high - low), tensor.reshape(-1)[low:high]
        passed += tensor.numel()


def save(directory: Path, step: int, *, ranks: int = 1, keep: int = 9, tensors: dict[str, Tensor] = TENSORS) -> Path:
    def on_rank(env: Environment) -> Path:
        return CheckpointStore(directory, env, keep).save(
            step, pieces(tensors, env.rank, env.world_size), {"counters": {"step": step}}, "seed: 1\n"
        )

    return on_ranks(ranks, on_rank)[0]


def newest(directory: Path, *, ranks: int = 1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint, and what was reported on the way; every rank has said the same."""

    def on_rank(env: Environment) -> tuple[Path | None, list[str]]:
        said: list[str] = []
        checkpoints = CheckpointStore(directory, env, 9)
        checkpoints.recover(said.append)
        return checkpoints.newest(said.append), said

    answers = on_ranks(ranks, on_rank)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestRanges:
    @pytest.mark.parametrize("ranks", [1, 2, 3, 7])
    def test_every_range_is_read_back(self, tmp_path: Path, ranks: int) -> None:
        reader = CheckpointReader(save(tmp_path, 4, ranks=ranks))
        assert len(list(reader.path.glob("tensors-*-of-*.safetensors"))) == ranks
        for name, tensor in TENSORS.items():
            flat = tensor.reshape(-1)
            assert reader.shapes[name] == tuple(tensor.shape)
            for start in range(len(flat)):
                for length in range(1, len(flat) - start + 1):
                    got = reader.read(name, start, length)
                    assert got.dtype == tensor.dtype
                    assert torch.equal(got, flat[start : start + length]), (name, start, length)

    def test_more_ranks_than_values(self, tmp_path: Path) -> None:
        tensors = {"model.w": torch.tensor([1.0, 2.0])}
        reader = CheckpointReader(save(tmp_path, 1, ranks=3, tensors=tensors))
        assert reader.read("model.w", 0, 2).tolist() == [1.0, 2.0]

    @pytest.mark.parametrize(("name", "start", "length"), [("model.x", 0, 1), ("model.w", 34, 2), ("model.w", 35, 1)])
    def test_what_is_not_there(self, tmp_path: Path, name: str, start: int, length: int) -> None:
        reader = CheckpointReader(save(tmp_path, 1, ranks=2))
        with pytest.raises(CheckpointError, match=rf"does not contain {name}\[{start}:{start + length}\]"):
            reader.read(name, start, length)

    def test_a_gap_between_pieces(self, tmp_path: Path) -> None:
        gap = [(TensorRange("w", (6,), start, 2), torch.ones(2)) for start in (0, 4)]
        path = CheckpointStore(tmp_path, SINGLE, 1).save(1, gap, {}, "")
        assert damage(path) == f"{path} is damaged: no range covers elements 2 to 3 of w"
        with pytest.raises(CheckpointError, match="no range covers elements 2 to 3 of w"):
            CheckpointReader(path)

    def test_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "t5.model").write_bytes(b"pieces")
        path = CheckpointStore(tmp_path / "saved", SINGLE, 1).save(1, [], {}, "", tmp_path / "t5.model")
        assert (path / "tokenizer.model").read_bytes() == b"pieces"
        (path / "tokenizer.model").write_bytes(b"others")
        assert "tokenizer.model does not have the SHA-256" in str(damage(path))

    def test_state_and_configuration(self, tmp_path: Path) -> None:
        reader = CheckpointReader(save(tmp_path, 12, ranks=2))
        assert reader.state == {"counters": {"step": 12}}
        assert (reader.path / "config.yaml").read_text() == "seed: 1\n"
        assert reader.step == read_manifest(reader.path).step == 12


class Killed(BaseException):
    """Stands for SIGKILL: nothing in between may handle it."""


class Killer:
    """Lets the process die before, or in the middle of, the n-th thing that a save does to the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, survives: int) -> None:
        self.left = survives
        rmtree, save_file, rename = shutil.rmtree, store.save_file, Path.rename

        def half_removed(path: Path, **options: Any) -> None:
            for file in sorted(path.glob("*"))[:1]:
                file.unlink()

        def torn(tensors: object, path: Path, **options: Any) -> None:
            path.write_bytes(b"torn")

        def torn_text(path: Path, text: str) -> None:
            path.write_text(text[: len(text) // 2])

        monkeypatch.setattr(store.shutil, "rmtree", self.deadly(rmtree, half_removed))
        monkeypatch.setattr(store, "save_file", self.deadly(save_file, torn))
        monkeypatch.setattr(store, "write_synced", self.deadly(manifest.write_synced, torn_text))
        monkeypatch.setattr(manifest, "write_synced", self.deadly(manifest.write_synced, torn_text))
        monkeypatch.setattr(Path, "rename", self.deadly(rename))

    def deadly(self, does: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.tick()
            if half is not None:
                try:
                    self.tick()
                except Killed:
                    half(*arguments, **options)
                    raise
            return does(*arguments, **options)

        return wrapped

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


OLD = {"model.w": torch.zeros(4)}
NEW = {"model.w": torch.ones(4)}


class TestKill:
    """Whenever a save is killed, a whole checkpoint is found afterwards, and the next save cleans up."""

    def kill_everywhere(self, tmp_path: Path, check: Callable[[Path, bool], None], *, before: list[int]) -> int:
        """Kills a save of step 30 at every point, on a fresh directory each; returns how many points there are."""
        for survives in range(100):
            directory = tmp_path / f"{survives}"
            for step in before:
                save(directory, step, tensors=OLD)
            with pytest.MonkeyPatch.context() as monkeypatch:
                killer = Killer(monkeypatch, survives)
                try:
                    CheckpointStore(directory, SINGLE, 2).save(30, pieces(NEW, 0, 1), {"counters": {}}, "")
                    killed = False
                except Killed:
                    killed = True
            check(directory, killed)
            if not killed:
                assert killer.left >= 0
                return survives
        raise AssertionError("it never came to an end")

    def test_of_a_new_step(self, tmp_path: Path) -> None:
        found = set()

        def check(directory: Path, killed: bool) -> None:
            path, said = newest(directory)
            assert path is not None
            assert said == []
            step = int(path.name[-2:])
            found.add(step)
            assert step in ((20, 30) if killed else (30,))
            assert all(damage(kept) is None for _, kept in list_checkpoints(directory)), "half of one is left"
            value = 1.0 if step == 30 else 0.0
            assert CheckpointReader(path).read("model.w", 0, 4).tolist() == [value] * 4
            save(directory, 40, keep=2)
            assert entries(directory)[-1] == "step_00000040"
            assert len(entries(directory)) == 2

        assert self.kill_everywhere(tmp_path, check, before=[10, 20]) > 10
        assert found == {20, 30}

    def test_of_a_step_that_is_there_already(self, tmp_path: Path) -> None:
        values = set()

        def check(directory: Path, killed: bool) -> None:
            path, said = newest(directory)
            assert path == directory / checkpoint_name(30)
            assert said == []
            (value,) = set(CheckpointReader(path).read("model.w", 0, 4).tolist())
            values.add(value)
            assert killed or value == 1.0
            save(directory, 40)
            assert entries(directory) == [checkpoint_name(30), checkpoint_name(40)]

        assert self.kill_everywhere(tmp_path, check, before=[30]) > 10
        assert values == {0.0, 1.0}

    def test_of_the_very_first(self, tmp_path: Path) -> None:
        def check(directory: Path, killed: bool) -> None:
            path, said = newest(directory)
            assert said == []
            assert path in (directory / checkpoint_name(30), None)
            assert killed or path is not None

        assert self.kill_everywhere(tmp_path, check, before=[]) > 5


class TestKeep:
    def test_newest(self, tmp_path: Path) -> None:
        for step in (2, 10, 100, 123_456_789):
            save(tmp_path, step, keep=3)
        assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100, 123_456_789]
        assert len(entries(tmp_path)) == 3

    def test_what_was_just_saved_stays(self, tmp_path: Path) -> None:
        for step in (20, 30):
            save(tmp_path, step, keep=2)
        path = save(tmp_path, 10, keep=1)  # a rerun from an older checkpoint
        assert path.is_dir()
        assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 30]

    def test_other_files_are_left_alone(self, tmp_path: Path) -> None:
        for name in ("notes.txt", "step_00000001.bak", "step_1"):
            (tmp_path / name).write_text("mine")
        save(tmp_path, 5, keep=1)
        save(tmp_path, 6, keep=1)
        assert entries(tmp_path) == ["notes.txt", "step_00000001.bak", "step_00000006", "step_1"]

    def test_multiples_of_keep_every_are_kept_for_good(self, tmp_path: Path) -> None:
        checkpoints = CheckpointStore(tmp_path, SINGLE, keep=2, keep_every=20)
        for step in (5, 10, 20, 25, 40, 45, 50, 55):
            checkpoints.save(step, pieces(TENSORS, 0, 1), {}, "")
        assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 40, 50, 55]


class TestLeftovers:
    """What an earlier save has left behind does not stop the next, and goes."""

    NAMES = (".incomplete-step_00000006", ".incomplete-step_00000006-0123abcd", ".deleted-step_00000003", ".replaced-x")

    def test_they_go_at_the_start(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        for name in self.NAMES:
            (tmp_path / name).mkdir()
            (tmp_path / name / "state.json").touch()
        assert newest(tmp_path, ranks=2) == (tmp_path / checkpoint_name(3), [])
        assert entries(tmp_path) == [".replaced-x", checkpoint_name(3)], "what is not ours is left alone"

    @pytest.mark.parametrize("kind", [Path.mkdir, Path.touch])
    def test_one_that_cannot_be_removed_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path], None]
    ) -> None:
        """As on NFS, where a file that another process has open keeps its directory."""
        save(tmp_path, 3)
        stuck = [tmp_path / name for name in (".deleted-step_00000003", ".incomplete-step_00000006")]
        for path in stuck:
            kind(path)
        monkeypatch.setattr(store.shutil, "rmtree", lambda path, **options: None)
        monkeypatch.setattr(Path, "unlink", lambda path, **options: None)
        said: list[str] = []
        path = CheckpointStore(tmp_path, SINGLE, 1).save(6, pieces(TENSORS, 0, 1), {}, "", warn=said.append)
        assert damage(path) is None
        assert [step for step, _ in list_checkpoints(tmp_path)] == [6]
        assert len(said) == 3, "the two, and the checkpoint of step 3"
        assert all("cannot be deleted; delete it by hand" in line for line in said)
        assert newest(tmp_path)[0] == path

    def test_a_save_whose_old_ones_cannot_be_renamed_is_a_save(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 3)
        rename = Path.rename

        def refusing(path: Path, target: Path) -> Path:
            if target.name.startswith(".deleted-"):
                raise PermissionError(errno.EPERM, "Operation not permitted")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", refusing)
        said: list[str] = []
        path = CheckpointStore(tmp_path, SINGLE, 1).save(6, pieces(TENSORS, 0, 1), {}, "", warn=said.append)
        assert damage(path) is None
        assert said == ["an old checkpoint cannot be deleted: [Errno 1] Operation not permitted"]


class TestFinite:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e20])
    @pytest.mark.parametrize("name", ["model.w", "optim.w.exp_avg"])
    def test_nothing_is_saved_that_no_run_could_go_on_from(self, tmp_path: Path, name: str, bad: float) -> None:
        """On whichever rank. 1e20 is finite, but its square is not: too large for a weight."""
        save(tmp_path, 3, ranks=2)
        tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
        tensors[name][4, 6] = bad

        def on_rank(env: Environment) -> str:
            try:
                CheckpointStore(tmp_path, env, 9).save(6, pieces(tensors, env.rank, 2), {}, "")
            except DivergedError as error:
                return str(error)
            return "saved"

        said = on_ranks(2, on_rank)
        assert said[0] == said[1]
        if (name, bad) == ("optim.w.exp_avg", 1e20):
            assert said[0] == "saved"
        else:
            assert f"{name} is not finite or close to overflow, and no checkpoint of it was saved" in said[0]
            assert entries(tmp_path) == [checkpoint_name(3)]


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_all_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    (tmp_path / "t5.model").write_bytes(b"pieces")
    before = os.umask(umask)
    try:
        path = CheckpointStore(tmp_path / "x", SINGLE, 1).save(1, pieces(TENSORS, 0, 1), {}, "", tmp_path / "t5.model")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert len(modes) == 5
    assert set(modes.values()) == {0o666 & ~umask}, modes
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


class TestGoingBack:
    def test_later_ones_are_renamed_and_kept(self, tmp_path: Path) -> None:
        for step in (10, 20, 30):
            save(tmp_path, step)
        (tmp_path / checkpoint_name(30) / "manifest.json").unlink()
        renamed = on_ranks(2, lambda env: CheckpointStore(tmp_path, env, 1).abandon_after(10))
        assert renamed[0] == renamed[1]
        assert [path.name[:23] for path in renamed[0]] == ["abandoned-step_00000020", "abandoned-step_00000030"]
        assert damage(renamed[0][0]) is None
        assert newest(tmp_path) == (tmp_path / checkpoint_name(10), [])
        save(tmp_path, 20, keep=1)
        assert entries(tmp_path) == [*sorted(path.name for path in renamed[0]), checkpoint_name(20)]

    def test_names_do_not_collide(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Twice within a second, as after the clock was set back."""
        monkeypatch.setattr(store.time, "strftime", lambda _: "20260101T000000")
        for _ in range(3):
            for step in (10, 20):
                save(tmp_path, step)
            CheckpointStore(tmp_path, SINGLE, 1).abandon_after(10)
        name = "abandoned-step_00000020-20260101T000000"
        assert entries(tmp_path) == [name, f"{name}.2", f"{name}.3", checkpoint_name(10)]

    def test_nothing_is_later(self, tmp_path: Path) -> None:
        save(tmp_path, 10)
        assert CheckpointStore(tmp_path, SINGLE, 1).abandon_after(10) == []
        assert CheckpointStore(tmp_path / "nowhere", SINGLE, 1).abandon_after(0) == []
        assert entries(tmp_path) == [checkpoint_name(10)]

    def test_own_checkpoints_are_known(self, tmp_path: Path) -> None:
        checkpoints = CheckpointStore(tmp_path / "run" / "checkpoints", SINGLE, 1)
        assert checkpoints.holds(tmp_path / "run")
        assert checkpoints.holds(tmp_path / "run" / "checkpoints" / checkpoint_name(1))
        assert checkpoints.holds(tmp_path / "x" / ".." / "run")
        assert not checkpoints.holds(tmp_path / "other")
        assert not checkpoints.holds(tmp_path / "other" / "checkpoints" / checkpoint_name(1))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class TestDamage:
    @pytest.mark.parametrize("file", ["tensors-00001-of-00002.safetensors", "state.json", "config.yaml"])
    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
            (lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
            (flip, "does not have the SHA-256"),
            (Path.unlink, "cannot be read: No such file"),
        ],
    )
    def test_of_a_file(self, tmp_path: Path, file: str, harm: Callable[[Path], Any], said: str) -> None:
        save(tmp_path, 3)
        path = save(tmp_path, 6, ranks=2)
        assert damage(path) is None
        harm(path / file)
        problem = damage(path)
        assert problem is not None
        assert said in problem
        assert str(path / file) in problem
        assert newest(tmp_path) == (tmp_path / checkpoint_name(3), [f"checkpoint skipped: {problem}"])

    @pytest.mark.parametrize(
        ("harm", "said"),
        [
            (Path.unlink, "is not a checkpoint: it has no manifest.json"),
            (lambda path: path.write_text(path.read_text()[:40]), "is damaged: "),
            (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged: "),
            (lambda path: path.write_text("[]"), "is damaged: "),
            (lambda path: path.write_text("{}"), "is damaged: "),
            (lambda path: edit(path, step="late"), "is damaged: "),
            (lambda path: edit(path, format=2), "has format 2; this version reads format 1"),
        ],
    )
    def test_of_the_manifest(self, tmp_path: Path, harm: Callable[[Path], Any], said: str) -> None:
        save(tmp_path, 3)
        path = save(tmp_path, 6)
        harm(path / "manifest.json")
        found, reported = newest(tmp_path)
        assert found == tmp_path / checkpoint_name(3)
        assert len(reported) == 1
        assert said in reported[0]
        assert str(path) in reported[0]

    def test_of_all(self, tmp_path: Path) -> None:
        for step in (3, 6):
            flip(save(tmp_path, step) / "state.json")
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; restore one"):
            newest(tmp_path)

    def test_there_is_none(self, tmp_path: Path) -> None:
        assert newest(tmp_path / "nowhere") == (None, [])

    @pytest.mark.parametrize("ranks", [2, 3, 5])
    def test_ranks_share_the_reading_and_agree(self, tmp_path: Path, ranks: int) -> None:
        save(tmp_path, 3)
        path = save(tmp_path, 6, ranks=3)
        files = sorted(read_manifest(path).files)
        assert len(files) == 5
        for file in files:
            content = (path / file).read_bytes()
            flip(path / file)
            found, said = newest(tmp_path, ranks=ranks)
            assert found == tmp_path / checkpoint_name(3)
            assert str(path / file) in said[0]
            problems = [changed_file(path, part=part, parts=ranks) for part in range(ranks)]
            assert len([problem for problem in problems if problem is not None]) == 1
            (path / file).write_bytes(content)
        assert newest(tmp_path, ranks=ranks) == (path, [])

    def test_reader_of_damaged_files(self, tmp_path: Path) -> None:
        path = save(tmp_path, 6)
        (path / "tensors-00000-of-00001.safetensors").write_bytes(b"no")
        with pytest.raises(CheckpointError, match=f"{path}/tensors-00000-of-00001.safetensors cannot be read"):
            CheckpointReader(path)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    save(tmp_path, 3, ranks=2)
    write = store.save_file

    def full_disk(tensors: object, path: Path, **options: Any) -> None:
        if f"-{failing:05d}-of" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(store, "save_file", full_disk)

    def on_rank(env: Environment) -> str:
        with pytest.raises(StorageError) as caught:
            CheckpointStore(tmp_path, env, 1).save(6, pieces(TENSORS, env.rank, 2), {}, "")
        return str(caught.value)

    messages = on_ranks(2, on_rank)
    assert messages[0] == messages[1]
    assert f"rank {failing}: the checkpoint in {tmp_path} cannot be written (No space left on device)" in messages[0]
    assert entries(tmp_path) == [checkpoint_name(3)]
    assert newest(tmp_path, ranks=2) == (tmp_path / checkpoint_name(3), [])
