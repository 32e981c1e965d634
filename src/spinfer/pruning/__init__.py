"""Pruning: dense weights in, dense weights with zeros out."""

from spinfer.pruning.magnitude import prune_magnitude_

__all__ = ["prune_magnitude_"]
