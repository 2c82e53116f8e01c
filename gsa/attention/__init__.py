"""The attention layer and its parts: indexer, selection, gates, positions, cache. Source: docs/gsa.md."""
