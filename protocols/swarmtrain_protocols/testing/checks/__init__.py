"""Checkers of simulated worlds, one file for each invariant or family of invariants.

A docstring begins with the numbers of what its file watches; docs/reliability.md lists them all,
and what is watched nowhere. Whatever must be right is recomputed from what sites truly did
(``testing/truth.py``) and from the entries of the log (``oracle.py``, ``pl_oracle.py``), with plain
NumPy in member order, one rounding per operation; nothing is taken from the code under test but the
codecs.
"""
