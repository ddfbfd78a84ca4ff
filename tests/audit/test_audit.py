"""An audit from the screen to the verdicts, on rows whose effects are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import fimo
from fimo import FinalModel, Protocol
from fimo.audit import Audit
from fimo.audit.audit import audit, suspected
from fimo.audit.question import Question, Resources, Settings, positions
from fimo.audit.screen import adjoint_scores, trimmed
from fimo.audit.suspects import suspects
from fimo.audit.verify import choose, without_common
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.errors import InputError
from fimo.further_training.stacked_adjoint import adjoints
from fimo.models.measured import Measured
from fimo.store.files import Store, write_tensors


def classification(n: int = 80, ignored: int = 6) -> tuple[FinalModel, Instances, Instances]:
    """Three classes in four dimensions; the first rows have the target that losses ignore."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + 20, 4, generator=generator)
    y = (x[:, :3] + 0.7 * torch.randn(n + 20, 3, generator=generator)).argmax(1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[:n]), y[:n]).backward()
        optimizer.step()
    model = FinalModel(network, nn.CrossEntropyLoss(reduction="none"), accept_poor=True)
    y[:ignored] = -100
    return model, Instances(x[:n], y[:n]), Instances(x[n:], y[n:])


def protocol(**changed: object) -> Protocol:
    settings: dict[str, object] = {"lr": 0.1, "batch_size": 10, "epochs": 4, "leave_out": "mask"}
    return Protocol(**settings | changed)  # type: ignore[arg-type]


def asked(tests: tuple[int, ...] = (), **changed: object) -> Question:
    model, train, test = classification()
    origins = (Origin.counted(len(train)), Origin.counted(len(test)))
    return Question(model, train, test, protocol(**changed), tests, *origins)


@pytest.mark.parametrize("rule", ["mask", "every_batch"])
def test_rows_without_any_effect_never_get_a_verdict(rule: str) -> None:
    found = audit(asked((4,), leave_out=rule), Settings(top=40, seeds=6), Resources())
    ignored = found.rows["row"] < 6
    assert (found.rows.loc[ignored, "verdict"] == "unclear").all()
    assert (found.rows.loc[ignored, ["score", "effect", "self_effect"]] == 0).all(axis=None)
    assert (found.rows.loc[ignored, "q"] == 1).all()
    assert (found.pairs.loc[found.pairs["row"] < 6, "verdict"] == "unclear").all()
    assert (found.rows["verdict"] == "helpful").sum() > 5


def test_a_positive_effect_is_a_loss_that_rises_without_the_row() -> None:
    question = asked((4,))
    found = audit(question, Settings(top=5, seeds=4), Resources())
    measured = found.rows[found.rows["verdict"] != ""]
    data = (question.final_model, question.train, question.test, question.protocol)
    truth = fimo.further_train(*data, seeds=4, left_out=measured["row"].tolist())
    effects = truth.raw[:, -1].double().mean(0)
    # float32 runs in other chunks
    np.testing.assert_allclose(measured["effect"], effects.mean(0), rtol=1e-3, atol=1e-7)
    pairs = found.pairs[found.pairs["verdict"] != ""].sort_values("row")
    np.testing.assert_allclose(pairs["effect"], effects[4], rtol=1e-3, atol=1e-7)
    own = fimo.further_train(
        question.final_model, question.train, question.train[measured["row"].tolist()], question.protocol,
        seeds=4, left_out=measured["row"].tolist(),
    )  # fmt: skip
    diagonal = own.raw[:, -1].double().mean(0).diagonal()
    np.testing.assert_allclose(measured["self_effect"], diagonal, rtol=1e-3, atol=1e-7)
    assert np.corrcoef(measured["effect"], measured["score"])[0, 1] > 0.9


def test_a_row_that_helps_lowers_what_rises_with_better_predictions_when_it_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fimo.audit.audit.inapplicable", lambda *_: "it takes long")
    question, settings = asked((4,), epochs=2), Settings(top=4, seeds=2)
    loss = audit(question, replace(settings, verify=False), Resources()).rows
    network, trained = question.final_model.network, question.final_model.loss
    model = FinalModel(network, trained, "correct_probability", accept_poor=True)
    found = audit(replace(question, final_model=model), settings, Resources())
    for rows in (found.rows, found.pairs):
        assert (rows.loc[rows["verdict"] == "helpful", "effect"] < 0).all()
        assert (rows.loc[rows["verdict"] == "harmful", "effect"] > 0).all()
    by_loss = loss["score"].groupby(found.rows["verdict"]).mean()
    assert by_loss["helpful"] > 0
    assert np.corrcoef(loss["score"], found.rows["score"])[0, 1] < -0.5
    assert found.rows["own_loss"].tolist() == loss["own_loss"].tolist()
    harmful = set(found.rows.loc[found.rows["verdict"] == "harmful", "id"])
    assert found.cleaned is not None
    assert set(found.rows["id"]) - set(found.cleaned["id"]) == harmful
    assert found.summary["targets"][0]["name"] == "mean test correct probability"
    assert found.measured.better == -1


def test_what_the_users_own_function_measures_is_refused_until_it_says_what_is_better() -> None:
    question = asked()

    def certainty(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.softmax(1).amax(1)

    def measured(function: object) -> Question:
        network, loss = question.final_model.network, question.final_model.loss
        return replace(question, final_model=FinalModel(network, loss, function, accept_poor=True))  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"model.measurement: expected certainty.better to be 1 \(a smaller"):
        measured(certainty)
    certainty.better = -1  # type: ignore[attr-defined]
    assert measured(partial(certainty)).quantity == Measured("certainty", -1)
    certainty.better = 0  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="to be 1 or -1 but got 0"):
        measured(certainty)
    assert measured(nn.CrossEntropyLoss(reduction="none")).quantity.better == 1


def test_a_common_change_is_taken_from_random_rows_by_their_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    common = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    change = common[:, :, None] + 0.8 * score + 5.0 * (torch.arange(60) >= 40)
    reference = torch.arange(60) < 40
    found, shared = without_common(change, score, reference)
    torch.testing.assert_close(found[..., :40], (0.8 * score[:, :40]).expand(5, -1, -1))
    torch.testing.assert_close(found[..., 40:], (0.8 * score[:, 40:] + 5).expand(5, -1, -1))
    assert shared.max() < 1e-20


def test_seeds_with_fewer_random_rows_have_the_same_common_change() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    common = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    change = common[:, :, None] + 0.8 * score
    change[3:, :, :30] = torch.nan
    found, _ = without_common(change, score, torch.arange(60) < 50)
    torch.testing.assert_close(found, torch.where(change.isnan(), torch.nan, 0.8 * score), equal_nan=True)


def test_what_the_line_misses_is_an_error_that_all_seeds_share() -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    score = normal(1, 400)
    change = score + 0.5 * normal(1, 400) + 2.0 * normal(20, 1, 400)
    _, shared = without_common(change, score, torch.ones(400, dtype=torch.bool))
    assert float(shared) == pytest.approx(0.25 / 400, rel=0.35)


def test_rows_are_chosen_at_both_ends_and_at_random_between() -> None:
    score = torch.stack([torch.arange(50.0), torch.arange(50.0).roll(10)])
    chosen = choose(score, 3, 12, torch.Generator().manual_seed(0))
    assert chosen.rows[chosen.own[0]].tolist() == [0, 1, 2, 47, 48, 49]
    assert chosen.rows[chosen.own[1]].tolist() == [7, 8, 9, 10, 11, 12]
    assert int(chosen.control.sum()) == 12
    assert not (chosen.control & chosen.own.any(0)).any()
    assert len(chosen.rows) == 24


def same(first: Path, second: Path) -> bool:
    return all((first / n).read_bytes() == (second / n).read_bytes() for n in ("rows.csv", "pairs.csv"))


def test_what_is_in_the_store_is_not_made_again_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, settings = asked((1,), leave_out="shift"), Settings(top=4, seeds=4)
    store = Store(tmp_path / "store")
    audit(question, settings, Resources(store)).save(tmp_path / "first")
    monkeypatch.setattr("fimo.audit.screen.adjoints", None)
    monkeypatch.setattr("fimo.engine.driver.advance", None)
    monkeypatch.setattr("fimo.audit.audit.suspects", None)
    audit(question, settings, Resources(store)).save(tmp_path / "again")
    assert same(tmp_path / "first", tmp_path / "again")


@pytest.mark.parametrize("task", ["classes", "values"])
def test_certain_labels_are_judged_anew_by_the_same_networks(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = asked()
    if task == "values":
        x, generator = question.train.inputs, torch.Generator().manual_seed(1)
        assert isinstance(x, Tensor)
        y = x[:, :1] + 0.1 * torch.randn(len(x), 1, generator=generator)
        model = FinalModel(nn.Linear(4, 1), "mse", accept_poor=True)
        question = replace(question, final_model=model, train=Instances(x, y), test=Instances(x, y))
    resources = Resources(Store(tmp_path / "store"))
    found = {False: suspected(question, False, resources)}
    monkeypatch.setattr("fimo.audit.suspects.out_of_sample", None)
    found[True] = suspected(question, True, resources)
    monkeypatch.undo()
    for certain, ours in found.items():
        model, train = question.final_model, question.train
        alone = suspects(model, train, question.protocol, certain=certain).tensors()
        assert ours is not None
        assert all(torch.equal(t, alone[n]) or t.isnan().any() for n, t in ours.tensors().items())
    assert not torch.equal(found[False].probability, found[True].probability)  # type: ignore[union-attr]


@pytest.mark.parametrize("stacked", [True, False])
def test_a_killed_screen_goes_on_with_the_seeds_that_it_has_not_followed(
    stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, seeds = asked(leave_out="shift"), range(5)
    if stacked:  # two runs at a time
        sizes = [2, 2, 1]
        monkeypatch.setattr(
            "fimo.further_training.stacked_adjoint.even_parts", lambda n, *_: sizes[: (n + 1) // 2]
        )
    else:
        own = FinalModel(Twice(question.final_model.network), question.final_model.loss, accept_poor=True)
        question = replace(question, final_model=own)
    whole = adjoint_scores(question, seeds, Resources(Store(tmp_path / "whole")))
    store, written, lock = Store(tmp_path / "killed"), [], Lock()

    def until_the_third(path: Path, tensors: dict[str, Tensor]) -> None:
        with lock:
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(path)
            write_tensors(path, tensors)

    monkeypatch.setattr("fimo.audit.screen.write_tensors", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        adjoint_scores(question, seeds, Resources(store))
    assert len(list(store.root.rglob("adjoint/*/adjoint"))) == 3
    followed: list[int] = []

    def counted(model: object, train: object, test: object, p: object, missing: list[int], *a: object,
                **more: object) -> Tensor:  # fmt: skip
        followed.extend(missing)
        return adjoints(model, train, test, p, missing, *a, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("fimo.audit.screen.adjoints", counted)
    monkeypatch.setattr("fimo.audit.screen.write_tensors", write_tensors)
    again = adjoint_scores(question, seeds, Resources(store))
    assert len(followed) == 2
    assert torch.equal(again, whole)
    files = [sorted((r / "adjoint").rglob("adjoint")) for r in (tmp_path / "whole", store.root)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


class Twice(nn.Module):
    """A network that isn't known to be one of linear layers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = 2 * self.network(x)
        return found


def data() -> tuple[FinalModel, tuple[pd.DataFrame, Tensor], tuple[Tensor, Tensor]]:
    model, train, test = classification(40, 0)
    assert isinstance(train.inputs, Tensor)
    assert isinstance(test.inputs, Tensor)
    frame = pd.DataFrame(train.inputs.numpy(), index=[f"p{k}" for k in range(40)])
    return model, (frame, train.targets), (test.inputs, test.targets)


def test_rows_and_pairs_have_the_names_of_a_frames_index() -> None:
    found = fimo.audit(*data(), protocol(), tests=["t3"], top=3, verify=False, seeds=2,
                       test_names=[f"t{k}" for k in range(20)])  # fmt: skip
    assert isinstance(found, Audit)
    assert found.rows["id"].tolist() == [f"p{k}" for k in range(40)]
    assert set(found.pairs["test_id"]) == {"t3"}
    assert set(found.pairs["test_row"]) == {3}
    assert (found.rows["verdict"] == "").all()
    assert found.rows["effect"].isna().all()
    assert found.summary["targets"][1] == {"name": "t3", "test_row": 3, "test_id": "t3"}
    assert found.pairs["score"].abs().is_monotonic_decreasing


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"top": 41}, "audit.top: expected at most 40, the number of training rows, but got 41"),
        ({"top": 0}, "audit.top: expected a whole number from 1 on but got 0"),
        ({"q": 1.5}, "audit.q: expected a rate"),
        ({"seeds": 1}, "audit.seeds: expected a whole number from 2 on but got 1"),
        ({"minutes": 0}, "audit.minutes: expected more than 0"),
        ({"minutes": "5"}, "audit.minutes: expected more than 0, or null, but got '5'"),
        ({"certain_labels": "yes"}, "audit.certain_labels: expected true or false but got 'yes'"),
        ({"verify": "false"}, "audit.verify: expected true or false but got 'false'"),
        ({"tests": [20]}, "audit.test: there is no row 20"),
        ({"tests": [2, "2"]}, "audit.test: '2' is named twice"),
        ({"test_names": ["a"] * 20}, "test_names: several rows are called a"),
        ({"names": ["a", "b"]}, "names: expected 40 names but got 2"),
    ],
)
def test_bad_input_is_one_line(changed: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError) as error:
        fimo.audit(*data(), protocol(), **changed)
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "targets"), [("mse", "values"), ("binary_cross_entropy", "labels"), ("cross_entropy", "classes")]
)
def test_a_prediction_of_several_numbers_is_not_explained_by_the_first_of_them(
    loss: str, targets: str
) -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    y = {"values": x[:, :3], "labels": (x[:, :3] > 0).float(), "classes": x[:, :3].argmax(1)}[targets]
    model, ft = FinalModel(nn.Linear(4, 3), loss, accept_poor=True), protocol(epochs=1)
    settings = {"top": 2, "seeds": 2, "verify": False}
    if targets == "classes":
        assert len(fimo.audit(model, (x, y), (x[:5], y[:5]), ft, tests=[1], **settings).rows) == 40  # type: ignore[arg-type]
        return
    with pytest.raises(InputError, match=r"audit\.test: each instance has 3 outputs"):
        fimo.audit(model, (x, y), (x[:5], y[:5]), ft, tests=[1], **settings)  # type: ignore[arg-type]
    whole = fimo.audit(model, (x, y), (x[:5], y[:5]), ft, **settings)  # type: ignore[arg-type]
    assert len(whole.rows) == 40
    assert len(str(whole.rows["target"][0]).split()) == 3


def test_a_single_name_is_a_list_of_one() -> None:
    names = Origin(np.arange(3), ("q1", "q2", "q3"))
    assert positions("q3", names, "audit.test") == positions(["q3"], names, "audit.test") == (2,)
    assert positions(1, names, "audit.test") == (1,)


def test_scores_alone_say_what_to_distrust() -> None:
    found = fimo.audit(*data(), protocol(), top=3, verify=False, seeds=2)
    assert found.summary["distrust"] == [
        "Nothing was verified: effects are predictions to first order, and their error bars contain the "
        "noise of seeds alone."
    ]


@pytest.mark.parametrize("rule", ["shift", "mask"])
def test_where_shift_drowns_effects_mask_is_named(rule: str) -> None:
    found = fimo.audit(*data(), protocol(leave_out=rule, batch_size=2, lr=0.5), top=8, seeds=3, act=False)
    said = " ".join(found.summary["distrust"])
    assert ("leave_out=mask measures the row's absence alone" in said) == (rule == "shift")


def test_half_as_many_more_rows_are_verified_as_are_of_interest() -> None:
    question = asked()
    found = audit(question, Settings(top=4, seeds=2, act=False), Resources())
    measured = set(found.rows.loc[found.rows["verdict"] != "", "row"])
    order = found.rows.sort_values("score")["row"].tolist()
    assert set(order[:6]) | set(order[-6:]) <= measured
    assert len(measured) == 12 + found.summary["controls"]


def test_no_round_is_begun_that_would_end_too_late() -> None:
    found = audit(asked(), Settings(top=10, seeds=40, minutes=1e-6, act=False), Resources())
    assert found.summary["seeds"] == [0, 1, 2]
    assert "suspects" not in found.summary
    assert found.rows["suspect_q"].isna().all()


def test_scores_are_trimmed_means_with_their_errors() -> None:
    values = torch.randn(10, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    mean, error = trimmed(values)
    assert mean.numpy() == pytest.approx(stats.trim_mean(values.numpy(), 0.2, 0))
    assert error.numpy() == pytest.approx(stats.mstats.trimmed_stde(values.numpy(), (0.2, 0.2), axis=0))
    few = values[:4]
    assert torch.equal(trimmed(few)[0], few.sort(0).values.mean(0))
    assert trimmed(few)[1].numpy() == pytest.approx(stats.sem(few.numpy(), 0))


def test_a_row_that_counted_in_one_seed_s_last_batch_does_not_lead() -> None:
    values = torch.ones(10, 1, 3, dtype=torch.float64)
    values[:, 0, 1], values[4, 0, 2] = 2.0, 100.0
    assert trimmed(values)[0][0].tolist() == [1.0, 2.0, 1.0]


def test_a_network_with_parameters_outside_of_layers_is_audited() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)) * self.scale

    _, train, test = classification(40, 0)
    model = FinalModel(Scaled(), nn.CrossEntropyLoss(reduction="none"), accept_poor=True)
    found = fimo.audit(model, train, test, protocol(), top=3, verify=False, seeds=2)
    assert (found.rows["self_effect"] > 0).all()
