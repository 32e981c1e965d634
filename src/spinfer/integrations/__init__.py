"""The only rooms that import other inference libraries."""
