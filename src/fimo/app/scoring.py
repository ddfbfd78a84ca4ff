"""Methods' scores of a run, cached by content."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from fimo.cost import Cost
from fimo.curvature.shared_rows import shared_at, shared_rows
from fimo.engine.leave_out import make_rule
from fimo.engine.replicas import Unit
from fimo.errors import InputError
from fimo.further_training import evaluation_points, full_runs
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.base import AttributionMethod
from fimo.scores import Scores, stacked
from fimo.store.description import Indescribable
from fimo.store.files import Store
from fimo.store.fingerprint import Key, Problem, kept, scores_key
from fimo.validation import choices

if TYPE_CHECKING:  # no code of these is in the scores, whose key holds the source of what is imported here
    from fimo.app.plan import Plan
    from fimo.data.datamodule import InstancesModule
    from fimo.data.instances import Instances
    from fimo.engine.protocol import Protocol
    from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)

LEAST_SECONDS = 0.1
"""Less time that is spared is not worth a line."""


def applicable(
    methods: Mapping[str, AttributionMethod], final_model: FinalModel, train: Instances, protocol: Protocol
) -> tuple[dict[str, AttributionMethod], dict[str, str]]:
    """Split methods into those that can run here, and the reasons of those that can't.

    Args:
        final_model: trained or not; only its structure matters.
        protocol: of further training.

    Raises:
        InputError: none can.
    """
    skipped = {
        name: reason
        for name, method in methods.items()
        if (reason := method.why_not(final_model, train, protocol)) is not None
    }
    kept = {name: method for name, method in methods.items() if name not in skipped}
    if not kept:
        raise InputError("method", "; ".join(f"{n} does not apply: {r}" for n, r in skipped.items()))
    return kept, skipped


@dataclass(frozen=True)
class Scoring:
    """What all methods of a run are given. Their scores are computed once, and then read from the store.

    Args:
        final_model: on the device to use.
        train: all N training instances.
        test: the J instances to explain.
        plan: their indices, what is left out, and the further training to follow.
        seed: that methods draw from, alike in any run.
        store: where scores are kept.
        problem: of final model and training set, :func:`described` once.
    """

    final_model: FinalModel
    train: Instances
    test: Instances
    plan: Plan
    seed: int
    store: Store
    problem: Problem | Indescribable

    @classmethod
    def of(
        cls, final_model: FinalModel, data: InstancesModule, plan: Plan, seed: int, store: Store,
        device: torch.device, problem: Problem | Indescribable | None = None,
    ) -> Scoring:  # fmt: skip
        """Return it for a final model and its data, which are described unless they were before."""
        problem = described(final_model, data.train) if problem is None else problem
        return cls(final_model.to(device), data.train, data.test[plan.test], plan, seed, store, problem)

    def sharing(self, methods: Collection[str]) -> AbstractContextManager[object]:
        """Return a context in which methods, if they are several, share the gradients that they take."""
        return shared_rows(self.final_model) if len(methods) > 1 else nullcontext()

    def scores(self, name: str, method: AttributionMethod, settings: Mapping[str, Any], cost: Cost) -> Scores:
        """Return a method's scores on the CPU; a group's are the sums over its members.

        Args:
            settings: of the method, as configured.
            cost: gets the gradient evaluations, and what was reused.
        """
        with (
            kept(self.store, "scores", lambda: self._key(name, method, settings)) as folder,
            FileLock(folder / "lock"),
        ):
            path = folder / "scores.safetensors"
            if path.exists():
                cost.recall(folder)
                return replace(Scores.load(path), method=name)
            found = replace(self._computed(method, cost), method=name)
            cost.gradient_evaluations = found.gradient_evaluations
            found.save(path)
            cost.keep(folder)
        return found

    def _key(self, name: str, method: AttributionMethod, settings: Mapping[str, Any]) -> Key:
        if isinstance(self.problem, Indescribable):
            raise self.problem
        plan, followed = self.plan, None
        if method.follows_further_training:
            followed = {
                "protocol": plan.protocol.key(),
                "steps": self._points,
                "seeds": plan.followed * method.follows_seeds,
            }
        units = summed(self.plan, method, self.train)
        return scores_key(self.problem, self.test, name, type(method), settings, units, self.seed, followed)

    def _computed(self, method: AttributionMethod, cost: Cost) -> Scores:
        train, test = self._on_device
        shared = shared_at(self.final_model)
        before = 0.0 if shared is None else shared.seconds
        added = summed(self.plan, method, self.train)
        members = sorted({i for unit in added for i in unit})
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            given = self._further_training(train, cost)
            found = method.attribute(self.final_model, train, test, torch.tensor(members), given)
        if shared is not None and shared.seconds > before:
            # charged as if the method had taken them itself, so that the order of methods makes no difference
            spared = shared.seconds - before
            cost.reuse(spared)
            level = logging.INFO if spared >= LEAST_SECONDS else logging.DEBUG
            log.log(level, "gradients that take %.1f s were there already", spared)
        left_out, groups = stacked(choices.units(self.plan.left_out, len(train)))
        found = replace(
            found.to("cpu").grouped(added),
            left_out=left_out,
            groups=groups,
            test=torch.tensor(self.plan.test),
        )
        if not torch.isfinite(found.values).all():
            log.warning("%s gave scores that are not finite", type(method).__name__)
        return found

    @functools.cached_property
    def _on_device(self) -> tuple[Instances, Instances]:
        """The training and test instances, where the final model is."""
        device = next(iter(self.final_model.parameters().values())).device
        return self.train.to(device), self.test.to(device)

    @property
    def _points(self) -> list[int]:
        return [int(step) for step in evaluation_points(self.plan.protocol, len(self.train))[0]]

    def _further_training(self, train: Instances, cost: Cost) -> FurtherTraining:
        """Return what a method that follows further training is handed; runs nothing yet.

        Args:
            cost: of the method; pays for full runs that are there already when they are first asked for.
        """
        plan, payers = self.plan, itertools.chain([cost], itertools.repeat(None))
        return FurtherTraining(
            plan.protocol,
            tuple(self._points),
            tuple(plan.followed),
            lambda: full_runs(
                self.final_model,
                train,
                plan.protocol,
                plan.followed,
                store=self.store,
                device=train.targets.device,
                problem=None if isinstance(self.problem, Indescribable) else self.problem,
                cost=next(payers),
            ),
        )


def described(final_model: FinalModel, train: Instances) -> Problem | Indescribable:
    """Return what all scores of a final model and a training set depend on, or why it can't be described."""
    try:
        return Problem.of(final_model, train)
    except Indescribable as error:
        return error


def summed(plan: Plan, method: AttributionMethod, train: Instances) -> list[Unit]:
    """Return, for each of what the gold standard leaves out, the instances whose scores are added.

    Methods that follow further training leave out by its rule themselves whatever goes with an instance.
    """
    rule = make_rule(plan.protocol, train)
    units = choices.units(plan.left_out, len(train))
    own = method.follows_further_training
    return [rule.distinct(unit) if own else rule.members(unit) for unit in units]
