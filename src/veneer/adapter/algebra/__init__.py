"""Combine several updates of one weight, Σ w_i ΔW_i with ΔW_i = s_i B_i A_i, into one low-rank update.

`factors` is exact arithmetic on factors, `sparse` the methods that choose single values (TIES, DARE, DELLA, …), `bases`
the bases in which they may do so, `spectral` the methods on singular vectors, and `methods` the table of all. Pure
functions on matrices; nothing given is changed.
"""

from veneer.adapter.algebra.factors import Term
from veneer.adapter.algebra.methods import METHODS, SPACES, Merged, Plan, combine, plan

__all__ = ["METHODS", "SPACES", "Merged", "Plan", "Term", "combine", "plan"]
