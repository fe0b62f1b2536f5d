"""Sources of documents: files, HTTP, the Hub, Parquet and Arrow tables, token shards."""
