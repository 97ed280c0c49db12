"""A library compiled on this machine: random numbers and steps of samplers, where torch is slow."""

from bnnflow.compiled.routines import (
    is_tracked,
    is_untracked_cpu,
    key_of,
    langevin,
    library,
    max_norm,
    normal_like,
    stratified_rows,
    turned,
)

__all__ = [
    "is_tracked",
    "is_untracked_cpu",
    "key_of",
    "langevin",
    "library",
    "max_norm",
    "normal_like",
    "stratified_rows",
    "turned",
]
