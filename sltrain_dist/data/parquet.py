"""Documents in a text column of a Parquet file, one a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from sltrain_dist.data.documents import Text
from sltrain_dist.errors import DataError

_BATCH_ROWS = 256


def read_column(file: IO[bytes], shard: str, field: str, first: int, step: int) -> Iterator[tuple[int, Text | None]]:
    """Rows `first`, `first + step`, … of a column of strings, with their indices; None where there is no text.

    Row groups before `first` are not fetched. Memory is bounded by one row group's compressed column, which
    the file's writer has chosen, and some hundred documents.

    Raises:
        DataError: The file has no such column, or it does not hold strings.
    """
    # Here, because only Parquet files need it and it takes a third of a second to import in every worker.
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        schema = parquet.schema_arrow
        if field not in schema.names:
            raise DataError(f"{shard} has no column {field!r}, it has {schema.names}; set data.text_field")
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
            raise DataError(f"the column {field!r} of {shard} holds {kind}, not strings; set data.text_field")
        row = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if row + rows <= first:
                row += rows
                continue
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes: Parquet does not promise that a string is UTF-8, and one that is not must be counted.
                column = column.cast(pa.large_binary())
                start = first - row if row < first else (first - row) % step
                for index in range(start, len(column), step):
                    value = column[index].as_py()
                    yield row + index, None if value is None else Text(value)
                row += len(column)
