"""The one schema of a rerank request, for HTTP bodies, lines of a batch and rows of Parquet. Standard library only."""

from reranker.request.parse import ParsedRequest, json_schema, parse_request

__all__ = ["ParsedRequest", "json_schema", "parse_request"]
