"""Files are whole or as they were, permissions follow the umask, and what may be damaged is read with care."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
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


@pytest.mark.parametrize("failing", ["fsync", "replace"])
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


def test_what_is_written_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content before the name, and the names of new directories in those that were there."""
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", noting)
    write_whole(tmp_path / "file", "x")
    assert synced[0].startswith(str(tmp_path / ".file."))
    assert synced[1:] == [str(tmp_path)]
    synced.clear()
    make_directory(tmp_path / "a" / "b")
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a")]


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
