"""Squeezing-Heads: which teacher heads serve a student head (``groups``) and with which weights (``weights``)."""

from squeezeheads.squeezing.groups import GroupSearch, calibrate_groups, group_heads
from squeezeheads.squeezing.residuals import HeadGroups, attention_energy
from squeezeheads.squeezing.weights import mixing_matrix, squeezing_residual

__all__ = [
    "GroupSearch",
    "HeadGroups",
    "attention_energy",
    "calibrate_groups",
    "group_heads",
    "mixing_matrix",
    "squeezing_residual",
]
