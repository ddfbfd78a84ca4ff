"""What a run's methods share: fewer passes over the data, and the scores and costs of each method alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.shared_rows import SharedRows, shared_at, shared_rows, tensors_of
from fimo.data.instances import Instances
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.catalogue import method_of
from fimo.methods.gradient import GradientMethod
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from fimo.scores import Scores
from tests.cases import CASES, Case
from tests.curvature.test_module_rows import Text


class OfAUser(GradientMethod):
    """A plug-in that knows nothing of what is shared."""

    def scores(self, problem: AttributionProblem) -> Tensor:
        gradients = InstanceGradients(problem.final_model, self.memory_mb)
        left, right = gradients.losses(problem.test), gradients.losses(problem.removed)
        return left.gram(right)[:, 0, :, 0]


def texts() -> Case:
    """90 training instances, in two batches by their length; the first ones are the shortest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.cat([torch.full((5,), 2), torch.randint(1, 12, (95,), generator=generator)])
    inputs = {
        "input_ids": torch.randint(20, (100, 12), generator=generator),
        "attention_mask": (torch.arange(12) < lengths[:, None]).long(),
    }
    data = Instances(inputs, torch.randint(3, (100,), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FinalModel(Text(20), cross_entropy, accept_poor=True)
    return Case("texts", model, data[:90], data[90:])


def case_of(name: str) -> Case:
    return texts() if name == "texts" else CASES[name]().to(torch.float32)


DAMPED = ("exact", "cg", "lissa", "arnoldi")
OF_LOSSES = ("graddot", "gradcos", "tracin", "datainf", "logra", "less")


def methods(**settings: Any) -> dict[str, AttributionMethod]:
    found = {name: method_of(name, settings)[1] for name in (*OF_LOSSES, "ekfac", "kfac", "trak")}
    damped = {name: method_of(name, {"damping": "auto", **settings})[1] for name in DAMPED}
    return {**found, **damped, "of a user": OfAUser(**settings)}


def scores(case: Case, chosen: Mapping[str, AttributionMethod], left_out: Any) -> dict[str, Scores]:
    found = {}
    for name, method in chosen.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found[name] = method.attribute(case.final_model, case.train, case.test, left_out)
    return found


@contextmanager
def passes(case: Case) -> Iterator[list[int]]:
    """Count forward passes that are differentiated, over as many instances as a training set has."""
    counted = [0]

    def hook(module: nn.Module, args: Any, named: Any, output: Tensor) -> None:
        counted[0] += torch.is_grad_enabled() and len(output) == len(case.train)

    handle = case.final_model.network.register_forward_hook(hook, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()


@pytest.mark.parametrize("left_out", [None, [1, 4, 5]])
@pytest.mark.parametrize("name", [*CASES, "texts"])
def test_scores_and_evaluations_are_those_of_each_method_alone_in_any_order(name: str, left_out: Any) -> None:
    case = case_of(name)
    alone = scores(case, methods(), left_out)
    for order in (list(alone), list(reversed(alone))):
        chosen = methods()
        with shared_rows(case.final_model) as shared:
            found = scores(case, {each: chosen[each] for each in order}, left_out)
            assert shared.seconds > 0
        for each in order:
            assert torch.equal(found[each].values, alone[each].values), each
            assert found[each].gradient_evaluations == alone[each].gradient_evaluations, each


def test_one_pass_serves_all_methods_of_a_run() -> None:
    case = case_of("conv_net")
    chosen = methods()
    of_losses = {name: chosen[name] for name in (*OF_LOSSES, "of a user")}
    with passes(case) as alone:
        scores(case, of_losses, None)
    with passes(case) as together, shared_rows(case.final_model):
        scores(case, of_losses, None)
        assert together == [1]
        scores(case, {n: chosen[n] for n in ("ekfac", "kfac")}, None)
        assert together == [2], "the Gauss-Newton rows are another kind"
    assert alone[0] >= len(of_losses)
    with passes(case) as again:
        scores(case, of_losses, None)
    assert again == alone, "outside of a run nothing is kept"


def test_left_out_instances_that_are_copies_share_their_rows() -> None:
    case = case_of("conv_net")
    method = method_of("graddot", {})[1]
    with shared_rows(case.final_model) as shared:
        for index in ([1, 3], [1, 3]):
            method.attribute(case.final_model, case.train, case.test, index)
        assert len({id(kept.instances) for kept in shared._kept}) == 2  # test and left-out instances
        method.attribute(case.final_model, case.train, case.test, [1, 4])
        assert len({id(kept.instances) for kept in shared._kept}) == 3


def test_models_and_instances_that_differ_share_nothing() -> None:
    case = case_of("mlp_classification")
    other = case.final_model.to()
    flipped = Instances(case.train.inputs, case.train.targets.flip(0))
    with shared_rows(case.final_model) as shared:
        shared.set_of(case.train)
        shared.set_of(flipped)
        assert shared_at(other) is None
        rows = InstanceGradients(case.final_model).losses(case.train)
        assert InstanceGradients(case.final_model).losses(case.train) is rows
        assert InstanceGradients(case.final_model).losses(flipped) is not rows
        assert InstanceGradients(other).losses(case.train) is not rows
        batch = InstanceGradients(case.final_model).losses(case.train[:4])
        assert InstanceGradients(case.final_model).losses(case.train[:4]) is not batch
    assert shared_at(case.final_model) is None


def kept_mb(shared: SharedRows) -> float:
    tensors = {t.data_ptr(): t.numel() * t.element_size() for k in shared._kept for t in tensors_of(k.values)}
    return sum(tensors.values()) / 2**20


@pytest.mark.parametrize("name", ["mlp_classification", "conv_net", "texts"])
def test_what_is_kept_takes_no_more_than_the_memory(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = case_of(name)
    with shared_rows(case.final_model) as shared:
        scores(case, methods(), None)
        whole = kept_mb(shared)
    settings = {"memory_mb": whole / 3}
    alone = scores(case, methods(**settings), None)
    with caplog.at_level("INFO"), shared_rows(case.final_model) as shared:
        for _ in range(2):
            for each, method in methods(**settings).items():
                found = scores(case, {each: method}, None)[each]
                assert kept_mb(shared) <= whole / 3
                assert torch.equal(found.values, alone[each].values), each
                assert found.gradient_evaluations == alone[each].gradient_evaluations, each
        assert shared._kept
    assert any("made again: memory_mb" in line for line in caplog.messages)


def test_methods_with_less_memory_have_the_rest_freed() -> None:
    case = case_of("conv_net")
    with shared_rows(case.final_model) as shared:
        scores(case, methods(), None)
        before = kept_mb(shared)
        for _ in range(2):
            scores(case, {"graddot": method_of("graddot", {"memory_mb": before / 4})[1]}, None)
            assert 0 < kept_mb(shared) <= before / 4


def test_nothing_is_held_when_the_run_ends() -> None:
    case = case_of("conv_net")
    with shared_rows(case.final_model) as shared:
        scores(case, {"datainf": method_of("datainf", {})[1]}, None)
        tensors = [weakref.ref(t) for kept in shared._kept for t in tensors_of(kept.values)]
        assert tensors
        del shared
    gc.collect()
    assert not any(t() is not None for t in tensors)


def test_rows_that_a_method_changes_in_place_are_not_given_to_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = case_of("conv_net")
    expected = InstanceGradients(case.final_model).losses(case.train).dense().clone()
    with caplog.at_level("INFO"), shared_rows(case.final_model) as shared:
        shared.set_of(case.train)
        InstanceGradients(case.final_model).losses(case.train).dense().mul_(2)
        found = InstanceGradients(case.final_model).losses(case.train).dense()
    assert torch.equal(found, expected)
    assert any("changed in place" in line for line in caplog.messages)


def test_instances_and_parameters_that_are_changed_in_place_have_rows_of_their_own() -> None:
    case = case_of("mlp_regression")
    model, train = case.final_model.to(), case.train.to()
    assert isinstance(train.inputs, Tensor)
    train = Instances(train.inputs.clone(), train.targets.clone())
    with shared_rows(model) as shared:
        shared.set_of(train)
        for changed in (train.targets, train.inputs, next(iter(model.parameters().values()))):
            before = InstanceGradients(model).losses(train).dense()
            changed.add_(1)
            found = InstanceGradients(model).losses(train).dense()
            assert not torch.equal(found, before)
            assert torch.equal(found, InstanceGradients(model.to()).losses(train).dense())


def test_cotangents_of_a_user_are_shared_by_no_other() -> None:
    case = case_of("conv_net")
    loss = case.final_model.loss
    with shared_rows(case.final_model) as shared:
        shared.set_of(case.train)
        found = [
            InstanceGradients(case.final_model)
            .rows(case.train, lambda f, y, k=k: k * loss.gradient(f, y)[:, None], "mine")
            .dense()
            for k in (1, 2)
        ]
    torch.testing.assert_close(found[1], 2 * found[0])


def test_samples_are_shared_where_seed_and_number_are_the_same() -> None:
    case = case_of("conv_net")
    settings = [(1, 0), (1, 0), (2, 0), (1, 1)]
    with shared_rows(case.final_model) as shared:
        shared.set_of(case.train)
        rows = [InstanceGradients(case.final_model).sampled(case.train, *each) for each in settings]
    assert rows[0] is rows[1]
    assert len({id(r) for r in rows}) == 3
    assert all(not torch.equal(a.dense(), b.dense()) for a, b in pairwise(rows[1:]) if a.r == b.r)
    alone = InstanceGradients(case.final_model).sampled(case.train, 1, 1)
    assert torch.equal(alone.dense(), rows[3].dense())


def test_a_set_that_is_the_training_set_has_its_loss_gradients() -> None:
    """As test instances, where what is explained is the loss itself."""
    case = case_of("conv_net")
    case = replace(case, test=Instances(case.train.inputs, case.train.targets.clone()))
    with passes(case) as counted, shared_rows(case.final_model):
        scores(case, {"graddot": method_of("graddot", {})[1]}, None)
    assert counted == [1]


def test_kronecker_factors_are_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("conv_net")
    chosen = {name: method_of(name, {})[1] for name in ("ekfac", "kfac")}
    decomposed = []
    eigh = torch.linalg.eigh

    def counted(matrix: Tensor) -> Any:
        decomposed.extend([matrix] if matrix.ndim == 2 else [])  # the others are Hessians in the outputs
        return eigh(matrix)

    monkeypatch.setattr("torch.linalg.eigh", counted)
    alone = scores(case, chosen, None)
    twice = len(decomposed)
    decomposed.clear()
    with shared_rows(case.final_model):
        found = scores(case, chosen, None)
    assert len(decomposed) == twice / 2 + 1  # each has a block of its own for what is left, the BatchNorm
    assert all(torch.equal(found[name].values, alone[name].values) for name in chosen)
