"""Files are whole or as they were, permissions follow the umask, and what may be damaged is read with care."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist import files
from sltrain_dist.errors import StorageError
from sltrain_dist.files import (
    SealedModel,
    has_its_name,
    make_directory,
    open_regular,
    parse_model,
    read_model,
    write_whole,
    writing,
    writing_directory,
)


@pytest.fixture(params=[0o002, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_new_files_follow_the_umask_and_old_ones_keep_their_permissions(tmp_path: Path, umask: int) -> None:
    write_whole(tmp_path / "new", "text")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask
    (tmp_path / "new").chmod(0o600)
    write_whole(tmp_path / "new", b"other")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").read_bytes() == b"other"


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    write_whole(tmp_path / "file", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, full)
    said = r"the list cannot be written \(No space left on device\); free space"
    with pytest.raises(StorageError, match=said), writing("the list"):
        write_whole(tmp_path / "file", "new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is synced, in order."""
    names: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        names.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", noting)
    return names


def test_what_is_written_is_on_the_disk(tmp_path: Path, synced: list[str]) -> None:
    """The content before the name, and the names of new directories in those that were there."""
    write_whole(tmp_path / "file", "x")
    assert synced[0].startswith(str(tmp_path / ".file."))
    assert synced[1:] == [str(tmp_path)]
    synced.clear()
    make_directory(tmp_path / "a" / "b")
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a")]


class TestDirectory:
    def test_it_has_no_name_before_it_is_on_the_disk(self, tmp_path: Path, synced: list[str]) -> None:
        with writing_directory(tmp_path / "a" / "b") as temporary:
            synced.clear()  # the name of a
            (temporary / "c").mkdir()
            for file in (temporary / "one", temporary / "c" / "two"):
                file.write_text("x")
            assert temporary.parent == tmp_path / "a" and not (tmp_path / "a" / "b").exists()
        below = {f"{temporary}{name}" for name in ("", "/one", "/c", "/c/two")}
        assert set(synced[:-1]) == below and synced[-1] == str(tmp_path / "a")
        assert (tmp_path / "a" / "b" / "c" / "two").read_text() == "x"
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]

    def test_it_follows_the_umask(self, tmp_path: Path, umask: int) -> None:
        with writing_directory(tmp_path / "new"):
            pass
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask

    @pytest.mark.parametrize("failing", ["fsync", "rename"])
    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os if failing == "fsync" else Path, failing, full)
        with pytest.raises(OSError, match="No space left"), writing_directory(tmp_path / "new", shared=True):
            pass
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("shared", [False, True])
    def test_the_content_of_another_stays(self, tmp_path: Path, shared: bool) -> None:
        refused = nullcontext() if shared else pytest.raises(OSError, match=r"(?i)exists|not empty")
        with refused, writing_directory(tmp_path / "new", shared=shared) as temporary:
            (temporary / "ours").touch()
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "theirs").touch()
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]

    def test_an_empty_one_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        with writing_directory(tmp_path / "new") as temporary:
            (temporary / "ours").touch()
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours"]

    @pytest.mark.parametrize("shared", [False, True])
    def test_after_a_kill(self, tmp_path: Path, shared: bool) -> None:
        """What it left goes at the next start; where another process may be at work, not before a day is over."""
        program = (
            "import os, signal, sys; from pathlib import Path\n"
            "from sltrain_dist.files import writing_directory\n"
            "with writing_directory(Path(sys.argv[1])) as temporary:\n"
            "    (temporary / 'half').touch()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        path = tmp_path / "[new]"
        killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
        assert killed.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        of_another = tmp_path / f".[new].b{left.name.removeprefix('.[new]')}"
        of_another.mkdir()
        with writing_directory(path, shared=shared) as temporary:
            assert left.exists() == shared and of_another.exists()
            (temporary / "whole").touch()
        assert [each.name for each in path.iterdir()] == ["whole"]
        if shared:
            os.utime(left, (time.time() - 25 * 3600,) * 2)
            with writing_directory(path, shared=True) as temporary:
                (temporary / "later").touch()
        assert sorted(tmp_path.iterdir()) == sorted([path, of_another])
        assert [each.name for each in path.iterdir()] == ["whole"]


def test_whether_a_file_still_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w") as file:
        assert has_its_name(file, path)
        path.rename(tmp_path / "other")
        assert not has_its_name(file, path)
        path.touch()
        assert not has_its_name(file, path)


@pytest.mark.parametrize("kind", ["device", "pipe", "directory"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(OSError, match="is not a regular file"):
        open_regular(path)


class Listed(SealedModel):
    name: str
    count: int
    sizes: dict[str, int]


LISTED = Listed(name="a b", count=3, sizes={"x": 1, "y": 20})


def test_every_flipped_bit_is_found() -> None:
    content = LISTED.sealed().encode()
    assert parse_model(content, Listed).model_dump(exclude={"checksum"}) == LISTED.model_dump(exclude={"checksum"})
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError) as caught:
                parse_model(bytes(flipped), Listed)
            assert "\n" not in str(caught.value)


def test_a_manifest_of_before_checksums() -> None:
    values = json.loads(LISTED.sealed())
    del values["checksum"]
    assert parse_model(json.dumps(values), Listed).count == 3
    values["chacksum"] = "0" * 64
    with pytest.raises(ValueError, match="chacksum: Extra inputs"):
        parse_model(json.dumps(values), Listed)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"name": "a", "count": 1, "sizes": ' + b'{"x": ' * 100_000,
        b'{"name": "a", "count": Infinity, "sizes": {}}',
        b'{"name": "a", "count": NaN, "sizes": {}}',
        b'{"name": "a", "count": 1.5, "sizes": {}}',
        b'{"name": "a", "count": true, "sizes": {}}',
        b'{"name": null, "count": 1, "sizes": {}}',
        b'{"name": "\\ud800", "count": 1, "sizes": {}}',
        b'{"name": "a", "count": 1, "sizes": {"x": null}}',
        b'{"name": "a", "count": 1, "sizes": [["x", 1]]}',
        b'{"name": "a", "count": 1}',
    ],
)
def test_what_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_model(tmp_path / "list.json", Listed)


def test_a_file_has_no_name_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyError), files.writing_whole(path) as file:
        file.write(b"some")
        assert not path.exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with files.writing_whole(path) as file:
        file.write(b"all")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"all"]


def test_a_lock_is_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("w") as other:
        assert files.lock(one) and not files.lock(other)
        one.close()
        assert files.lock(other, wait=True)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with (tmp_path / "lock").open("w") as one:
        assert files.lock(one)
