"""Single files as people have them: compressed, encoded and named in every way that their own tools accept."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import zipfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from pyarrow import feather

from sltrain_dist.config.schema import DataConfig
from sltrain_dist.data.documents import Fault
from sltrain_dist.data.sources import identity
from sltrain_dist.data.sources.compression import decompressed
from sltrain_dist.data.sources.identity import check_unchanged, identify
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.data.sources.resolve import read_documents, resolve_source
from sltrain_dist.errors import DataError
from tests.support.data import write_shard

CONTENT = b"".join(b'{"text": "line %d"}\n' % number for number in range(300))
COMPRESS = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstd.compress}
SKIPPABLE = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"


def read(data: bytes, codec: str) -> bytes:
    return decompressed(io.BytesIO(data), codec, "name").read()


@pytest.mark.parametrize("codec", COMPRESS)
def test_one_stream_or_several(codec):
    stream = COMPRESS[codec](CONTENT)
    assert read(stream, codec) == CONTENT
    assert read(stream * 3, codec) == CONTENT * 3
    assert read(COMPRESS[codec](b""), codec) == b""


@pytest.mark.parametrize("codec", COMPRESS)
def test_what_is_cut_anywhere_is_truncated(codec):
    stream = COMPRESS[codec](CONTENT)
    for start in (b"", stream):
        for length in range(len(stream)):
            if length or not start:
                data = start + stream[:length]
                if codec == "bz2" and start and length < 10:
                    continue  # bzip2 takes so little for garbage
                with pytest.raises(EOFError, match="ends in the middle"):
                    read(data, codec)


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_flipped_bit_is_found(codec):
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    stream = bytearray(zstd.compress(CONTENT, options=checked) if codec == "zstd" else COMPRESS[codec](CONTENT))
    stream[len(stream) // 2] ^= 4
    with pytest.raises((gzip.BadGzipFile, OSError, lzma.LZMAError, zstd.ZstdError)):
        read(bytes(stream), codec)


@pytest.mark.parametrize("codec", COMPRESS)
def test_another_format_is_refused(codec):
    for data in (b"<html>404</html>" * 9, bytes(40), b"{"):
        with pytest.raises((OSError, lzma.LZMAError, zstd.ZstdError, EOFError)):
            read(data, codec)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.json", "gzip"), ("a.jsonl.gzip", "gzip"), ("a.jsonl.zst", "xz"), ("a.jsonl.zstd", "zstd"), ("a.gz", "bz2")],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, codec):
    (tmp_path / name).write_bytes(COMPRESS[codec](CONTENT))
    with pytest.raises(DataError, match=rf"{name} is a {codec} file by its content, but not by its name; rename it"):
        list(read_documents(str(tmp_path / name), "text"))


def test_tables_and_archives_by_other_names(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.json")
    feather.write_feather(pa.table({"text": ["a"]}), str(tmp_path / "b.feather"))
    with zipfile.ZipFile(tmp_path / "c.jsonl", "w") as file:
        file.writestr("c", CONTENT)
    for name, remedy in (("a.json", r"end in \.parquet"), ("b.feather", r"end in \.arrow"), ("c.jsonl", "unpack it")):
        with pytest.raises(DataError, match=f"{name} is a .* file by its content, .*{remedy}"):
            list(read_documents(str(tmp_path / name), "text"))


@pytest.mark.parametrize(
    ("codec", "after", "accepted"),
    [
        ("gzip", bytes(3), True),
        ("gzip", b"garbage", True),
        ("gzip", bytes(70_000) + b"garbage", True),
        ("gzip", b"\x1f", False),
        ("gzip", b"\x1f\x8bgarbage", False),
        ("bz2", b"garbage", True),
        ("bz2", b"BZhgarbage", True),
        ("xz", bytes(4), True),
        ("xz", bytes(80_000), True),
        ("xz", bytes(3), False),
        ("xz", b"garbage, more than a header", False),
        ("zstd", SKIPPABLE, True),
        ("zstd", b"garbage", False),
        ("zstd", bytes(4), False),
    ],
)
def test_what_may_follow(codec, after, accepted, caplog):
    """What gzip, bzip2, xz and zstd themselves accept and refuse."""
    data = COMPRESS[codec](CONTENT) + after
    if not accepted:
        with pytest.raises((OSError, lzma.LZMAError, zstd.ZstdError, EOFError)):
            read(data, codec)
        return
    caplog.clear()
    assert decompressed(io.BytesIO(data), codec, f"{codec} {after[-9:]!r}").read() == CONTENT
    assert ("ignored garbage after the compressed data" in caplog.text) == (b"garbage" in after)


def test_padding_and_skippable_frames_between_streams():
    xz, frame = lzma.compress(CONTENT), zstd.compress(CONTENT)
    assert read(xz + bytes(8) + xz, "xz") == CONTENT * 2
    assert read(SKIPPABLE + frame + SKIPPABLE + SKIPPABLE + frame, "zstd") == CONTENT * 2
    with pytest.raises(lzma.LZMAError):
        read(bytes(4) + xz, "xz")


@pytest.mark.parametrize("codec", ["gzip", "bz2", "xz", "zstd"])
def test_little_is_held_of_what_expands_much(codec):
    """A thousandfold expansion comes in pieces, byte by byte if that is asked for."""
    zeros = bytes(20_000_000)
    file = decompressed(io.BytesIO(COMPRESS[codec](zeros)), codec, "name")
    raw = file.raw
    sizes = [len(raw.read(1000)) for _ in range(5)]
    assert all(0 < size <= 1000 for size in sizes)
    assert sum(sizes) + len(raw.readall()) == len(zeros)


def test_a_large_window_names_its_remedy(tmp_path):
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    (tmp_path / "x.jsonl.zst").write_bytes(compressor.compress(CONTENT) + compressor.flush())
    with pytest.raises(DataError, match=r"x\.jsonl\.zst.*window of more than 128 MiB.*--long"):
        list(read_documents(str(tmp_path / "x.jsonl.zst"), "text"))


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_unicode_in_any_form(tmp_path, encoding, suffix):
    lines = [json.dumps({"text": f"Ж{number} \U0001f600\u2028\u0a0a"}, ensure_ascii=False) for number in range(5000)]
    content = "\n".join(lines).encode(encoding)
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(zstd.compress(content) if suffix else content)
    found = [line.decode("utf-8-sig").removesuffix("\n") for _, line in read_documents(str(path), "text")]
    assert found == lines


def test_damaged_utf_16_is_named(tmp_path):
    content = '{"text": "a"}\n'.encode("utf-16") + b"\x00\xd8" + '{"text": "a"}\n'.encode("utf-16-le")
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jsonl.*UnicodeDecodeError.*utf-16"):
        list(read_documents(str(tmp_path / "x.jsonl"), "text"))
    (tmp_path / "x.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16")[:-1])
    with pytest.raises(DataError, match="truncated data"):
        list(read_documents(str(tmp_path / "x.jsonl"), "text"))


def test_the_limit_of_a_line(tmp_path):
    lines = [b"x" * 20, b"y" * 21, b"", b"z" * 3_000_000, b"end"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = [line for _, line in read_documents(str(tmp_path / "x.jsonl"), "text", max_bytes=20)]
    assert found == [lines[0] + b"\n", Fault.TOO_LONG, b"\n", Fault.TOO_LONG, b"end"]
    (tmp_path / "x.jsonl").write_bytes(b"x" * 21)
    assert list(read_documents(str(tmp_path / "x.jsonl"), "text", max_bytes=20)) == [(0, Fault.TOO_LONG)]
    assert list(read_documents(str(tmp_path / "x.jsonl"), "text", max_bytes=21)) == [(0, b"x" * 21)]
    assert DataConfig().max_document_bytes == MAX_DOCUMENT_BYTES


@pytest.mark.slow
def test_a_line_without_end_takes_no_memory(tmp_path):
    """Of 300 MB of zeros, 20 kB compressed each, no more than the limit is ever held."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    content = [compressor.compress(bytes(1 << 20)) for _ in range(300)]
    (tmp_path / "x.jsonl.gz").write_bytes(b"".join([*content, compressor.compress(b"\nend"), compressor.flush()]))
    import tracemalloc

    tracemalloc.start()
    found = list(read_documents(str(tmp_path / "x.jsonl.gz"), "text", max_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(0, Fault.TOO_LONG), (1, b"end")]
    assert peak < 8 << 20


def test_identities_tell_content_and_not_dates(tmp_path):
    path, large = tmp_path / "a", tmp_path / "large"
    path.write_bytes(b"abc")
    large.write_bytes(bytes(1_000_000))
    expected = identify([str(path), str(large), str(tmp_path / "none"), "https://host/x"])
    assert set(expected) == {str(path), str(large)}
    os.utime(path, ns=(1, 1))
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    check_unchanged(str(path), expected[str(path)])
    check_unchanged(str(copy), expected[str(path)])
    check_unchanged(str(path), None)
    for content in (b"abd", b"ab", b"abcd", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{path} has changed since the run began: {len(content)} bytes"):
            check_unchanged(str(path), expected[str(path)])
    path.unlink()
    with pytest.raises(DataError, match="does not exist any more"):
        check_unchanged(str(path), expected[str(path)])
    for place in (0, identity._HASHED_BYTES - 1, -1, -identity._HASHED_BYTES):
        changed = bytearray(1_000_000)
        changed[place] = 1
        large.write_bytes(changed)
        with pytest.raises(DataError, match="has changed"):
            check_unchanged(str(large), expected[str(large)])


def test_a_file_that_changes_while_it_is_read(tmp_path):
    """Cut short, an uncompressed file would only seem to have fewer documents, and a compressed one to be corrupt."""
    for name in ("x.jsonl", "x.jsonl.gz"):
        shard = write_shard(tmp_path / name, [os.urandom(40).hex() for _ in range(20_000)])
        expected = identify([shard])[shard]
        assert len(list(read_documents(shard, "text", expected=expected))) == 20_000
        documents = read_documents(shard, "text", expected=expected)
        next(documents)
        os.truncate(shard, expected.size // 2)
        with pytest.raises(DataError, match="has changed since the run began"):
            list(documents)
        with pytest.raises(DataError, match="has changed since the run began"):
            next(read_documents(shard, "text", expected=expected))


def test_names_that_are_not_utf_8(tmp_path):
    write_shard(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), ["a"])
    for source in (str(tmp_path), str(tmp_path / "*.jsonl")):
        (shard,) = resolve_source(source)
        assert os.fsencode(shard).endswith(b"caf\xe9.jsonl")
        assert len(list(read_documents(shard, "text"))) == 1
