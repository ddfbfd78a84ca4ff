"""A run as one value: its data, final model, plan and methods, and what can be asked of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fimo.app.final_models import FinalModels
from fimo.app.plan import Plan
from fimo.app.scoring import Scoring, described
from fimo.cost import Cost
from fimo.data.datamodule import InstancesModule
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.further_training import further_train
from fimo.further_training.sensitivity import Sensitivity
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel
from fimo.models.frozen import without_frozen_part
from fimo.scores import Scores
from fimo.store.description import Indescribable
from fimo.store.files import Store
from fimo.store.fingerprint import Problem


@dataclass(frozen=True)
class Run:
    """What a run measures, with what.

    Args:
        data: its training and test instances.
        final_model: on the CPU.
        plan: the protocol of further training, its seeds, what is left out and which test instances.
        methods: by name.
        settings: of each of them, as configured.
        store: where scores and further training are kept.
        device: of the methods' computations.
        seed: that methods draw from.
        trainer: the Trainer's settings for further training.
        final_models: makes more of them.
        cost: gets the gradient evaluations.
        problem: of final model and training set, for the store; None: not described yet.
    """

    data: InstancesModule
    final_model: FinalModel
    plan: Plan
    methods: Mapping[str, AttributionMethod]
    settings: Mapping[str, Mapping[str, Any]]
    store: Store
    device: torch.device
    seed: int
    trainer: Mapping[str, Any]
    final_models: FinalModels
    cost: Cost = field(default_factory=lambda: Cost("run"))
    problem: Problem | Indescribable | None = None

    @property
    def protocol(self) -> Protocol:
        """Of further training."""
        return self.plan.protocol

    @property
    def seeds(self) -> list[int]:
        """Of the gold standard."""
        return self.plan.seeds

    @property
    def left_out(self) -> Sequence[Any]:
        """Instances, or groups of them, that the gold standard leaves out."""
        return self.plan.left_out

    @property
    def trained_here(self) -> bool:
        """Whether the final model is trained, and not read from a checkpoint."""
        return self.final_models.trained_here

    def of_trained_part(self) -> Run:
        """Return the run of what is trained: what no run changes is computed once."""
        trained, seen = without_frozen_part(self.final_model, self.data)
        return replace(self, final_model=trained, data=seen, problem=None)

    def of_methods(self, names: Collection[str]) -> Run:
        """Return the run of some of its methods."""
        return replace(self, methods={name: m for name, m in self.methods.items() if name in names})

    def with_description(self) -> Run:
        """Return the run whose final model and training set are described, once for all that follows."""
        return replace(self, problem=described(self.final_model, self.data.train))

    def gold_standard(self, cost: Cost) -> Sensitivity:
        """Further train with and without what the plan leaves out.

        Args:
            cost: gets the gradients of all runs, and what was reused.
        """
        plan = self.plan
        return self._further_trained(self.final_model, plan.protocol, plan.seeds, plan.left_out, cost)

    def scoring(self) -> Scoring:
        """Return what computes the methods' scores."""
        return Scoring.of(
            self.final_model, self.data, self.plan, self.seed, self.store, self.device, self.problem
        )

    def scores(self, left_out: Sequence[int] | None = None) -> dict[str, Scores]:
        """Return every method's scores.

        Args:
            left_out: training instances; all N when None.
        """
        chosen = list(range(len(self.data.train)) if left_out is None else left_out)
        scoring, found = replace(self, plan=replace(self.plan, left_out=chosen)).scoring(), {}
        with scoring.sharing(self.methods):
            for name, method in self.methods.items():
                cost = Cost(name)
                found[name] = scoring.scores(name, method, self.settings[name], cost)
                self.cost.gradient_evaluations += cost.gradient_evaluations
        return found

    def leave_out(self, groups: Sequence[Any], seeds: Sequence[int] | None = None) -> Sensitivity:
        """Further train with and without each of some instances or groups of them.

        Args:
            seeds: as many as the run's gold standard when None.
        """
        plan, cost = self.plan, Cost("further_training")
        chosen = plan.seeds if seeds is None else seeds
        found = self._further_trained(self.final_model, plan.protocol, chosen, groups, cost)
        self.cost.gradient_evaluations += cost.gradient_evaluations
        return found

    def retrain(self, groups: Sequence[Any], seeds: Sequence[int]) -> Sensitivity:
        """Train from scratch with and without instances, by the protocol of the final model's own training.

        Each seed has initial parameters of its own; all trainings of a seed are replicas of one batched
        computation. Instances are left out by the run's rule.

        Args:
            groups: L indices, or groups.
            seeds: S.

        Returns:
            raw changes ``[S, 1, J, L]`` after the last epoch.
        """
        protocol, found = self.final_models.protocol(self.data, self.plan.protocol), []
        undescribed = replace(self, problem=None)
        for seed in seeds:
            initial, cost = self.final_models.initial(self.data, seed), Cost("retraining")
            initial = replace(initial, measurement=self.final_model.measurement)
            found.append(
                undescribed._further_trained(initial, protocol, [seed], groups, cost, keep_states=False)
            )
            self.cost.gradient_evaluations += cost.gradient_evaluations
        return joined(found)

    def why_not_from_scratch(self) -> str | None:
        """Return why :meth:`retrain` can't be asked for, or None."""
        return self.final_models.why_not_from_scratch(self.data)

    def with_targets(self, targets: Tensor) -> Run:
        """Return the run with other training targets ``[N]``, and a final model that was trained on them."""
        return self.with_training_set(Instances(self.data.train.inputs, targets))

    def with_training_set(self, train: Instances) -> Run:
        """Return the run with as many other training instances, and a final model trained on them."""
        data, cost = copy.copy(self.data), Cost("final_model")
        data.train = train
        final_model = self.final_models.trained(data, self.store, cost)
        self.cost.gradient_evaluations += cost.gradient_evaluations
        return replace(self, data=data, final_model=final_model, problem=None)

    def randomised(self, seed: int) -> Run:
        """Return the run of an untrained network, with the initial parameters of a seed."""
        return replace(self, final_model=self.final_models.initial(self.data, seed), problem=None)

    def explaining(self, test: Instances) -> Run:
        """Return the run of other test instances."""
        data = copy.copy(self.data)
        data.test = test
        data.origins = {split: origin for split, origin in data.origins.items() if split != "test"}
        return replace(self, data=data, plan=replace(self.plan, test=list(range(len(test)))))

    def measuring_loss(self) -> Run:
        """Return the run in which the training loss is measured, whatever is in this one."""
        if self.final_model.measurement is None:
            return self
        return replace(self, final_model=replace(self.final_model, measurement=None), problem=None)

    def _further_trained(
        self, final_model: FinalModel, protocol: Protocol, seeds: Sequence[int], groups: Sequence[Any],
        cost: Cost, keep_states: bool = True,
    ) -> Sensitivity:  # fmt: skip
        plan = self.plan
        return further_train(
            final_model,
            self.data.train,
            self.data.test[plan.test],
            protocol,
            seeds,
            groups,
            test_index=plan.test,
            store=self.store,
            chunk=plan.chunk,
            subtract_mean=plan.subtract_mean,
            trainer=self.trainer,
            cost=cost,
            problem=self.problem if isinstance(self.problem, Problem) else None,
            keep_states=keep_states,
        )


def joined(found: Sequence[Sensitivity]) -> Sensitivity:
    """Return the last evaluation point of sensitivities of one seed each, as one of all seeds."""

    def last(name: str) -> Tensor:
        return torch.cat([getattr(one, name)[:, -1:] for one in found])

    return dataclasses.replace(
        found[0],
        raw=last("raw"),
        step=found[0].step[-1:],
        epoch=found[0].epoch[-1:],
        seeds=torch.cat([one.seeds for one in found]),
        distance_full=last("distance_full"),
        distance=last("distance"),
        full_losses=last("full_losses"),
    )
