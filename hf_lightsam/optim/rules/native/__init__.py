"""Kernels of this package's own for CPUs: what an ascent does to each weight, in one pass over memory.

torch has no kernel that takes weights from one place and writes what becomes of them to another, so that an ascent by
its kernels is a copy and a step within the copy; its norm takes a multiple of the time in which memory is read; and of
a factored state it knows nothing. The kernels here are two short files of C and OpenMP, built by the machine's own
compiler for its own processor, in a fraction of a second, when a process first asks for them. What they compute is
what torch's do, up to rounding; the bits do not depend on the number of threads, but on compiler and processor.
"""

from .build import can_take, library
from .elementwise import adagrad, adam, root, scaled, total_norm
from .factored import FactoredSums

__all__ = ["FactoredSums", "adagrad", "adam", "can_take", "library", "root", "scaled", "total_norm"]
