"""What runs on one device: centroids, gate, routing lists, block attention, merge. Knows no ranks."""

from .types import KVPart, QueryRows, query_rows

__all__ = ["KVPart", "QueryRows", "query_rows"]
