"""The documented address of :class:`RankTable`, the type that :func:`increlora_rs.rank_table` returns."""

from .reports.tables import RankTable

__all__ = ["RankTable"]
