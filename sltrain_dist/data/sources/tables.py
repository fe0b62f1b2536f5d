"""Documents in a text column of a Parquet or Arrow file, one per row."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from sltrain_dist.data.documents import Fault, Text
from sltrain_dist.errors import DataError

_BATCH_ROWS = 256
_ARROW_FILE = b"ARROW1"
"""First bytes of Arrow's file format; other files are in its stream format, which `datasets` writes."""


def read_column(
    file: io.BufferedReader, shard: str, field: str, first: int, step: int, max_bytes: int
) -> Iterator[tuple[int, Text | Fault]]:
    """Yields rows `first`, `first + step`, … of a column of strings, with their indices.

    Memory is bounded in Parquet by the compressed column of one row group, whose size the file's writer has chosen,
    plus a few hundred documents; in Arrow by one record batch. Row groups before `first` are not fetched.

    Args:
        file: The open file.
        shard: Path or URL of the file: Parquet if it ends in `.parquet`, else Arrow.
        field: Name of the column.
        first: Index of the first row.
        step: Distance to the next.
        max_bytes: Longer texts come as :attr:`Fault.TOO_LONG`.

    Raises:
        DataError: The file does not have exactly one such column, or the column does not hold strings.
    """
    batches = _parquet_batches if shard.split("?", 1)[0].lower().endswith(".parquet") else _arrow_batches
    for row, column in batches(file, shard, field, first):
        start = first - row if row < first else (first - row) % step
        for index in range(start, len(column), step):
            yield row + index, _text(column[index], max_bytes)


def _parquet_batches(file: io.BufferedReader, shard: str, field: str, first: int) -> Iterator[tuple[int, Any]]:
    """Yields batches of the column, with the indices of their first rows."""
    # Imported here, because only tables need it and the import takes a third of a second in every worker.
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        _check_column(parquet.schema_arrow, shard, field)
        row = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if row + rows <= first:
                row += rows
                continue
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field]):
                yield row, batch.column(0)
                row += len(batch)


def _arrow_batches(file: io.BufferedReader, shard: str, field: str, first: int) -> Iterator[tuple[int, Any]]:
    """Yields batches of the column, with the indices of their first rows."""
    import pyarrow as pa

    is_file = file.peek(len(_ARROW_FILE)).startswith(_ARROW_FILE)
    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file) as reader:
        _check_column(reader.schema, shard, field)
        row = 0
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            if row + len(batch) > first:
                yield row, batch.column(field)
            row += len(batch)


def _check_column(schema: Any, shard: str, field: str) -> None:
    import pyarrow as pa

    count = len(schema.get_all_field_indices(field))
    if count == 0:
        raise DataError(f"{shard} has no column {field!r}; set data.text_field to one of {schema.names}")
    if count > 1:
        raise DataError(f"{shard} has {count} columns named {field!r}; rename all but one of them")
    kind = _value_type(schema.field(field).type)
    textual = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    if not any(test(kind) for test in textual):
        raise DataError(f"the column {field!r} of {shard} holds {kind}, not strings; set data.text_field to another")


def _value_type(kind: Any) -> Any:
    """Returns the type of the values of an encoded or extension type."""
    import pyarrow as pa

    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def _text(scalar: Any, max_bytes: int) -> Text | Fault:
    while hasattr(scalar, "value"):  # for dictionary, run-end encoded and extension types
        scalar = scalar.value
    # As bytes: neither format guarantees that strings are UTF-8, and those that are not must be counted.
    buffer = None if scalar is None else scalar.as_buffer()
    if buffer is None:
        return Fault.NO_TEXT
    return Fault.TOO_LONG if buffer.size > max_bytes else Text(buffer.to_pybytes())
