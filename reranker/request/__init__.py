"""The one schema of a rerank request, for HTTP bodies, lines of a batch and rows of Parquet. Standard library only."""
