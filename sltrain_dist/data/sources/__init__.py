"""Where documents come from: files, HTTP, the Hub, Parquet and Arrow tables, token shards."""
