"""A library compiled on this machine: random numbers, steps of samplers and
assignment problems, where torch or scipy is slow.
"""

from bnnflow.compiled.routines import (
    assigned,
    is_tracked,
    is_untracked_cpu,
    key_of,
    langevin,
    library,
    max_norm,
    normal_like,
    stratified_rows,
    turned,
    unit,
)

__all__ = [
    "assigned",
    "is_tracked",
    "is_untracked_cpu",
    "key_of",
    "langevin",
    "library",
    "max_norm",
    "normal_like",
    "stratified_rows",
    "turned",
    "unit",
]
