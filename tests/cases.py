"""The shared list of small cases, as the library publishes it."""

from fimo.testing.cases import CASES, LINEAR_CASES, Case, mlp, trained

__all__ = ["CASES", "LINEAR_CASES", "Case", "mlp", "trained"]
