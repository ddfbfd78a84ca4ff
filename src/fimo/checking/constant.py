"""Whether the final model is better than one that ignores its inputs."""

from __future__ import annotations

from fimo.checking.problem import Clock, Problem
from fimo.checking.verdict import Line, fails, passes, warns
from fimo.validation.poor import Comparison, compared, untold


def constant(problem: Problem, clock: Clock) -> Line:
    """Compare the final model's test loss with that of the best constant outputs."""
    name, model = "constant predictor", problem.final_model
    found = compared(model, problem.train, problem.test)
    if not isinstance(found, Comparison):
        return warns(name, untold(found))
    own, best = found.own_test, found.constant_test
    ratio = float(own.mean() / best.mean())
    text = (
        f"mean test loss {own.mean():.4g}; of the best constant outputs {best.mean():.4g} "
        f"({len(own)} test instances)"
    )
    if found.poor is not None:
        return (warns if model.accept_poor else fails)(name, found.poor, ratio)
    worse = own - best
    error = float(worse.std() / len(own) ** 0.5) if len(own) > 1 else 0.0
    if worse.mean() > error:
        return warns(name, f"{text}: overfitted, or are test instances prepared in another way?", ratio)
    if ratio > 0.95 if best.mean() > 0 else worse.mean() > -error:  # a log density's may be negative
        return warns(name, f"{text}: there is little that training instances could explain", ratio)
    return passes(name, text, ratio)
