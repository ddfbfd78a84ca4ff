"""The library's public face: what a newcomer writes in ten lines."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fimo
from fimo import api, scores
from fimo.data import conversion
from fimo.further_training import sensitivity
from fimo.methods.graddot import GradDot
from fimo.methods.response import Response
from fimo.models import final_model

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * X[:, :1] ** 2
FT = fimo.Protocol(optimizer="sgd", lr=0.05, batch_size=10, epochs=3)


@pytest.fixture(scope="module")
def model() -> fimo.FinalModel:
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.9, -1.9, 0.4]]))
        network.bias.zero_()
    return fimo.FinalModel(network, "mse")


@pytest.fixture(scope="module")
def truth(model: fimo.FinalModel) -> fimo.Sensitivity:
    return fimo.further_train(model, (X, Y), (X[:4], Y[:4]), FT, seeds=3, left_out=6)


def test_every_public_name_is_there_and_documented() -> None:
    assert 12 <= len(fimo.__all__) <= 18
    for name in fimo.__all__:
        thing = getattr(fimo, name)
        assert inspect.getdoc(thing), name
        assert name in dir(fimo)
    assert not hasattr(fimo, "nothing")


@pytest.mark.parametrize(
    "module", [api, scores, sensitivity, final_model, conversion, fimo.methods], ids=lambda m: m.__name__
)
def test_examples_of_the_documentation_run(module: Any) -> None:
    found = doctest.testmod(module, extraglobs={"fimo": fimo, "torch": torch})
    assert found.failed == 0
    assert found.attempted > 0 or module is conversion


def test_importing_the_package_imports_nothing_heavy() -> None:
    said = (
        "import sys, fimo; print([m for m in ('torch', 'pandas', 'pytorch_lightning') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_attributing_needs_no_lightning_and_no_torchmetrics() -> None:
    said = """
import sys, torch, fimo
x = torch.randn(8, 2)
model, data = fimo.FinalModel(torch.nn.Linear(2, 1), "mse", accept_poor=True), (x, x[:, :1])
fimo.attribute(model, data, data, "graddot")
heavy = ("torchmetrics", "pytorch_lightning", "transformers", "wandb", "sklearn")
print([m for m in heavy if m in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


FORMS = {
    "tensors": ((X, Y), {}),
    "arrays": ((X.numpy(), Y.numpy()), {}),
    "instances": (fimo.Instances(X, Y), {}),
    "data set": (TensorDataset(X, Y), {}),
    "loader": (DataLoader(TensorDataset(X, Y), batch_size=7), {}),
    "frame": (pd.DataFrame(torch.cat([X, Y], 1).numpy(), columns=list("abcy")), {"target": "y"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_scores(model: fimo.FinalModel, form: str) -> None:
    data, columns = FORMS[form]
    found = fimo.attribute(model, data, data, method="graddot", **columns)
    gradients = 2 * (X @ model.parameters()["weight"].T + model.parameters()["bias"] - Y)
    rows = torch.cat([X * gradients, gradients], 1)
    torch.testing.assert_close(found.values, rows @ rows.T)
    assert (found.method, found.access, found.of_themselves) == ("graddot", "FiMO", True)
    assert found.self_influence()[3] == pytest.approx(float(rows[3].square().sum()), rel=1e-5)


def test_a_method_is_a_name_a_class_or_an_object(model: fimo.FinalModel) -> None:
    named, of_class, of_object = (
        fimo.attribute(model, (X, Y), (X[:2], Y[:2]), method=m, left_out=[3, 5])
        for m in ("graddot", GradDot, GradDot())
    )
    assert torch.equal(named.values, of_class.values)
    assert torch.equal(named.values, of_object.values)
    assert named.left_out.tolist() == [3, 5]
    assert not named.of_themselves


def test_several_methods_give_what_each_gives_alone_by_its_name(model: fimo.FinalModel) -> None:
    several = ["graddot", "datainf", Response]
    found = fimo.attribute(model, (X, Y), (X[:4], Y[:4]), several, 6, further_training=FT, seeds=2)
    assert list(found) == ["graddot", "datainf", "Response"]
    for name, method in zip(found, several, strict=True):
        alone = fimo.attribute(model, (X, Y), (X[:4], Y[:4]), method, 6, further_training=FT, seeds=2)
        assert torch.equal(found[name].values, alone.values)
        assert found[name].gradient_evaluations == alone.gradient_evaluations
        assert found[name].method == name
        assert found[name].seconds > 0
    assert list(fimo.attribute(model, (X, Y), (X[:4], Y[:4]), ["graddot"])) == ["graddot"]
    for given, said in (([], "empty list"), (["graddot", "graddot"], "two are called 'graddot'")):
        with pytest.raises(fimo.InputError, match=said):
            fimo.attribute(model, (X, Y), (X[:4], Y[:4]), given)


def test_settings_go_with_a_name_and_are_checked(model: fimo.FinalModel) -> None:
    strong = fimo.attribute(model, (X, Y), (X[:2], Y[:2]), method="exact", damping=1e6)
    plain = fimo.attribute(model, (X, Y), (X[:2], Y[:2]), method="graddot")
    torch.testing.assert_close(strong.values * 1e6 * len(X), plain.values, rtol=1e-3, atol=1e-6)
    with pytest.raises(fimo.InputError, match="dampening: exact has no such setting; did you mean damping"):
        fimo.attribute(model, (X, Y), (X, Y), method="exact", dampening=1.0)
    with pytest.raises(fimo.InputError, match="method: there is no 'grad-dot'; did you mean graddot"):
        fimo.attribute(model, (X, Y), (X, Y), method="grad-dot")


def test_methods_that_follow_further_training_predict_the_truth(
    model: fimo.FinalModel, truth: fimo.Sensitivity
) -> None:
    found = fimo.attribute(
        model,
        (X, Y),
        (X[:4], Y[:4]),
        "response",
        further_training=FT,
        seeds=truth.seeds,
        left_out=truth.left_out,
        removal="own",
    )
    assert found.step is not None
    assert found.step.tolist() == truth.step.tolist()
    torch.testing.assert_close(
        found.values, truth.raw.mean(0), rtol=1e-3, atol=1e-6
    )  # exact on a linear model
    assert found.followed == (0, 1, 2)
    with pytest.raises(fimo.InputError, match=r"further_training"):
        fimo.attribute(model, (X, Y), (X, Y), "response")


def test_a_single_test_instance_may_be_a_slice_of_a_column_of_numpys(model: fimo.FinalModel) -> None:
    column = Y.numpy()[:, 0][:, None]  # of a slice, the last stride is 0
    found = fimo.attribute(model, (X.numpy(), column), (X.numpy()[:1], column[:1]), "graddot")
    expected = fimo.attribute(model, (X, Y), (X[:1], Y[:1].clone()), "graddot")
    torch.testing.assert_close(found.values, expected.values)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"extremes": 0}, "extremes: expected at least 1 but got 0"),
        ({"extremes": "10"}, "extremes: expected a whole number but got '10'"),
        ({"extremes": 1.5}, "extremes: expected a whole number but got 1.5"),
        ({"extremes": True}, "extremes: expected a whole number but got True"),
        ({"dimension": "big"}, "dimension: expected a whole number, or auto, but got 'big'"),
        ({"dimension": 2.5}, "dimension: expected a whole number, or auto, but got 2.5"),
        ({"dimension": 0}, "dimension: expected at least 1, or auto, but got 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(model: fimo.FinalModel, given: Any, said: str) -> None:
    with pytest.raises(fimo.InputError, match=said):
        fimo.attribute(model, (X, Y), (X[:2], Y[:2]), "logra", **given)


def test_a_store_that_is_a_file_is_refused(model: fimo.FinalModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    followed: dict[str, Any] = {"further_training": FT, "seeds": 2, "store": tmp_path / "file"}
    for method, given in (("logra", {"cache": str(tmp_path / "file")}), ("response", followed)):
        with pytest.raises(fimo.InputError, match=r"store: expected a folder but .*file"):
            fimo.attribute(model, (X, Y), (X[:2], Y[:2]), method, **given)


def test_scores_of_all_rows_are_judged_on_those_left_out(
    model: fimo.FinalModel, truth: fimo.Sensitivity
) -> None:
    every = fimo.attribute(model, (X, Y), (X[:4], Y[:4]), "graddot")
    some = fimo.attribute(model, (X, Y), (X[:4], Y[:4]), "graddot", left_out=truth.left_out)
    table = fimo.evaluate({"every": every, "some": some, "mine": some.values}, truth)
    wide = table.query("metric == 'cosine' and seeds == 3").pivot(
        index="step", columns="method", values="mean"
    )
    np.testing.assert_allclose(wide["every"], wide["some"])
    np.testing.assert_allclose(wide["mine"], wide["some"])
    assert {"ceiling", "ceiling_lower", "followed_seeds"} <= set(table)
    groups = fimo.further_train(model, (X, Y), (X[:4], Y[:4]), FT, seeds=3, left_out=[[0, 1], [2], [4, 5, 6]])
    summed = torch.stack([every.values[:, u].sum(1) for u in ([0, 1], [2], [4, 5, 6])], 1)
    both = fimo.evaluate({"every": every, "summed": summed}, groups, ["cosine"])
    wide = both.query("seeds == 3").pivot(index="step", columns="method", values="mean")
    np.testing.assert_allclose(wide["every"], wide["summed"], rtol=1e-5)
    with pytest.raises(fimo.InputError, match="there are no scores of the training instances 5"):
        fimo.evaluate({"few": every.select(torch.tensor([0, 1, 2]))}, truth)


def test_the_table_of_methods_says_what_each_needs_and_costs() -> None:
    table = fimo.methods()
    names = {p.stem for p in (Path(__file__).parents[1] / "conf" / "method").glob("*.yaml")}
    assert set(table.index) == names
    assert list(table) == ["summary", "access", "needs", "cost", "use"]
    assert (table != "").all(axis=None)
    assert issubclass(fimo.methods.response.Response, Response)  # type: ignore[attr-defined]


def test_top_rows_and_the_whole_table(model: fimo.FinalModel, tmp_path: Path) -> None:
    found = fimo.attribute(model, (X, Y), (X[:4], Y[:4]), "graddot")
    top = found.top(test=2, k=3)
    assert top["train"].tolist() == found.values[2].argsort(descending=True)[:3].tolist()
    assert found.top(test=2, k=1, harmful=True)["score"].iloc[0] == pytest.approx(
        float(found.values[2].min())
    )
    frame = found.to_frame()
    assert frame.query("test == 1 and train == 7")["score"].iloc[0] == float(found.values[1, 7])
    assert len(frame) == 4 * 30
    found.save(tmp_path / "scores.safetensors")
    again = fimo.Scores.load(tmp_path / "scores.safetensors")
    assert torch.equal(again.values, found.values)
    assert (again.method, again.of_themselves) == ("graddot", False)
    with pytest.raises(fimo.InputError, match=r"test: expected 0 to 3 but got 4"):
        found.top(test=4)
    with pytest.raises(fimo.InputError, match="are of other test instances"):
        found.self_influence()


def test_a_plot_shows_the_most_helpful_and_the_most_harmful(model: fimo.FinalModel) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = fimo.attribute(model, (X, Y), (X[:4], Y[:4]), "graddot")
    figure = found.plot(test=0, k=3)
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]  # a notebook shows it
    axes = figure.axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    wanted = [*found.top(0, 3)["train"], *found.top(0, 3, harmful=True)["train"][::-1]]
    assert labels == [f"#{i}" for i in wanted]
    assert len(axes.patches) == 6


def test_a_report_of_scores_opens_without_a_run(
    model: fimo.FinalModel, truth: fimo.Sensitivity, tmp_path: Path
) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    found = {
        "graddot": fimo.attribute(model, (X, Y), (X[:4], Y[:4]), "graddot"),
        "response": fimo.attribute(
            model, (X, Y), (X[:4], Y[:4]), "response", further_training=FT, seeds=[5, 6, 7]
        ),
    }
    path = fimo.report(found, tmp_path / "report.html", truth)
    page = path.read_text()
    assert "graddot" in page
    assert "response" in page
    untimed = {"mine": GradDot().attribute(model, fimo.Instances(X, Y), fimo.Instances(X[:4], Y[:4]))}
    assert fimo.report(untimed, tmp_path / "mine.html", truth).exists()
    with pytest.raises(fimo.InputError, match="truth: a report of scores"):
        fimo.report(found, tmp_path / "report.html")
    with pytest.raises(fimo.InputError, match="is missing: this is no folder of a finished run"):
        fimo.load_run(tmp_path)


def test_where_larger_values_are_better_what_helps_has_a_negative_score(tmp_path: Path) -> None:
    model = fimo.FinalModel(nn.Linear(3, 2), "cross_entropy", "correct_probability", accept_poor=True)
    classes = (Y[:, 0] > 0).long()
    one = (X, classes), (X[:4], classes[:4])
    found = fimo.attribute(model, *one, "graddot")
    found.save(tmp_path / "scores.safetensors")
    for each in (found, fimo.Scores.load(tmp_path / "scores.safetensors")):
        assert each.top(0, 1)["train"].item() == each.values[0].argmin()
        assert each.top(0, 1, harmful=True)["train"].item() == each.values[0].argmax()
    unknown = dataclasses.replace(found, measured=None)
    assert unknown.top(0, 1)["train"].item() == found.values[0].argmax()
    truth = fimo.further_train(model, *one, FT, seeds=3, left_out=6)
    truth.save(tmp_path / "sensitivity.safetensors")
    assert fimo.Sensitivity.load(tmp_path / "sensitivity.safetensors").measured == found.measured
    of_loss = fimo.attribute(dataclasses.replace(model, measurement=None), *one, "graddot")
    with pytest.raises(fimo.InputError, match="they are changes of the test loss, and the sensitivity is of"):
        fimo.evaluate({"graddot": of_loss}, truth)
    if importlib.util.find_spec("matplotlib") is not None:
        assert "positive: the instance harms" in found.plot(0).axes[0].get_xlabel()
        assert "what is measured rises without" in unknown.plot(0).axes[0].get_xlabel()
    if importlib.util.find_spec("plotly") is not None:
        page = fimo.report({"mine": unknown}, tmp_path / "report.html", truth).read_text()
        assert "lowers the mean correct probability" in page
        page = fimo.report(found, tmp_path / "report.html", dataclasses.replace(truth, measured=None))
        assert "lowers the mean correct probability" in page.read_text()


def test_what_is_a_little_wrong_is_said_in_one_line(
    model: fimo.FinalModel, truth: fimo.Sensitivity, tmp_path: Path
) -> None:
    data = (X, Y)
    with pytest.raises(fimo.InputError, match=r"further_training: expected a fimo\.Protocol.* but got 'sgd'"):
        fimo.further_train(model, data, data, "sgd", 2, [0])  # type: ignore[arg-type]
    with pytest.raises(fimo.InputError, match=r"further_training: expected a fimo\.Protocol"):
        fimo.attribute(model, data, data, "response", further_training={"lr": 0.1})  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(fimo.InputError, match=r"device: cuda is not here .*there are cpu"):
            fimo.attribute(model, data, data, "graddot", device="cuda")
    for device in ("gpu", None, 1.5):
        for call in (
            lambda device: fimo.attribute(model, data, data, "graddot", device=device),
            lambda device: fimo.further_train(model, data, data, FT, 2, [0], device=device),
            lambda device: fimo.audit(model, data, data, FT, device=device),
            lambda device: fimo.check(model, data, data, FT, device=device),
        ):
            with pytest.raises(fimo.InputError, match=rf"^device: expected one of cpu.* but got {device!r}$"):
                call(device)
    found = fimo.attribute(model, data, (X[:4], Y[:4]), "graddot")
    with pytest.raises(fimo.InputError, match=r"scores: expected scores by name"):
        fimo.evaluate(found, truth)  # type: ignore[arg-type]
    assert set(fimo.evaluate({"graddot": found}, truth, "cosine")["metric"]) == {"cosine"}
    with pytest.raises(fimo.InputError, match="test: expected 0 to 3 but got first"):
        found.top(test="first")  # type: ignore[arg-type]
    with pytest.raises(fimo.InputError, match="truth: expected what further_train returns but got NoneType"):
        fimo.evaluate({"g": found}, None)  # type: ignore[arg-type]
    with pytest.raises(fimo.InputError, match="scores of g: expected Scores or an array but got object"):
        fimo.evaluate({"g": object()}, truth)  # type: ignore[dict-item]
    found.save(tmp_path / "scores.safetensors")
    truth.save(tmp_path / "truth.safetensors")
    (tmp_path / "text").write_text("no tensors")
    for read, file, said in (
        (fimo.Sensitivity, "scores", r"scores\.safetensors: holds no tensor 'sensitivity'"),
        (fimo.Scores, "truth", r"truth\.safetensors: holds no tensor 'scores'"),
    ):
        with pytest.raises(fimo.InputError, match=said):
            read.load(tmp_path / f"{file}.safetensors")
        with pytest.raises(fimo.InputError, match="text: is no safetensors file"):
            read.load(tmp_path / "text")
        with pytest.raises(fimo.InputError, match="can't be read"):
            read.load(tmp_path)
        with pytest.raises(fimo.InputError, match="none: there is no such file"):
            read.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("method", "setting", "said"),
    [
        ("trak", {"dimension": 2.5}, r"dimension: expected a whole number but got 2\.5"),
        ("random", {"seed": "a"}, "seed: expected a whole number but got 'a'"),
        ("ekfac", {"samples": True}, "samples: expected a whole number but got True"),
        ("graddot", {"memory_mb": "1"}, "memory_mb: expected a number but got '1'"),
        ("tracin", {"lr": -1.0}, r"lr: expected positive learning rates but got \[-1\.0\]"),
        ("less", {"lr": [float("nan")]}, r"lr: expected positive learning rates but got \[nan\]"),
        ("tracin", {"checkpoints": []}, "checkpoints: expected at least one but got none"),
    ],
)
def test_settings_of_another_kind_are_refused_as_on_the_command_line(
    model: fimo.FinalModel, method: str, setting: dict[str, Any], said: str
) -> None:
    with pytest.raises(fimo.InputError, match=f"^{said}"):
        fimo.attribute(model, (X, Y), (X[:4], Y[:4]), method, **setting)


def test_numpy_s_numbers_and_paths_are_settings(model: fimo.FinalModel, tmp_path: Path) -> None:
    data = (model, (X, Y), (X[:4], Y[:4]))
    found = fimo.attribute(*data, "logra", dimension=np.int64(2), damping=np.float32(0.5), cache=tmp_path)
    kept = fimo.attribute(*data, "logra", dimension=2, damping=0.5, cache=str(tmp_path))
    assert torch.equal(found.values, kept.values)
    assert torch.equal(
        fimo.attribute(*data, "tracin", lr=np.array([2.0])).values,
        fimo.attribute(*data, "tracin", lr=2).values,
    )


def test_scores_of_other_test_instances_or_of_other_further_training_are_refused(
    model: fimo.FinalModel, truth: fimo.Sensitivity, tmp_path: Path
) -> None:
    other = fimo.attribute(model, (X, Y), (X[4:8], Y[4:8]), "graddot")
    truth.save(tmp_path / "truth.safetensors")
    other.save(tmp_path / "scores.safetensors")
    read = fimo.Sensitivity.load(tmp_path / "truth.safetensors")
    for scores_, gold in ((other, truth), (fimo.Scores.load(tmp_path / "scores.safetensors"), read)):
        with pytest.raises(fimo.InputError, match="scores of g: they explain other test instances"):
            fimo.evaluate({"g": scores_}, gold)
    for name, given, problem in (
        ("train", (model, (X.flip(0), Y.flip(0))), "are of other training instances .* another order"),
        ("model", (fimo.FinalModel(torch.nn.Linear(3, 1), "mse", accept_poor=True), (X, Y)), "another final"),
    ):
        moved = fimo.attribute(*given, (X[:4], Y[:4]), "graddot")
        moved.save(tmp_path / f"{name}.safetensors")
        for scores_, gold in ((moved, truth), (fimo.Scores.load(tmp_path / f"{name}.safetensors"), read)):
            with pytest.raises(fimo.InputError, match=f"scores of g: they .*{problem}"):
                fimo.evaluate({"g": scores_}, gold)
        kept = moved.values[:, truth.left_out]
        table = fimo.evaluate({"g": kept.numpy()}, truth)
        assert table.equals(fimo.evaluate({"g": kept}, truth))
    wide = fimo.attribute(model.to(dtype=torch.float64), (X, Y), (X[:4], Y[:4]), "graddot")
    assert len(fimo.evaluate({"g": wide}, truth))
    arrays = fimo.attribute(model, (X, Y), (X[:4].double().numpy(), Y[:4].numpy()), "graddot")
    assert len(fimo.evaluate({"g": arrays}, read))
    longer = fimo.Protocol(optimizer="sgd", lr=0.05, batch_size=10, epochs=3, evaluate_every=2)
    found = fimo.attribute(model, (X, Y), (X[:4], Y[:4]), "response", further_training=longer, seeds=2)
    with pytest.raises(fimo.InputError, match=r"they predict \[2, 4, 6, 8, 9\] steps .* not \[3, 6, 9\]"):
        fimo.evaluate({"response": found}, truth)


def test_results_do_not_depend_on_the_process_s_default_type(model: fimo.FinalModel) -> None:
    def found() -> dict[str, torch.Tensor]:
        data = ((X, Y), (X[:4], Y[:4]))
        audit = fimo.audit(model, *data, FT, top=3)
        effects = torch.tensor(audit.rows.select_dtypes("number").fillna(0.0).to_numpy(), dtype=torch.float64)
        methods = ["random", "arnoldi", "graddot", "trak", "datainf"]
        return {"audit": effects} | {m: s.values for m, s in fimo.attribute(model, *data, methods).items()}

    usual = found()
    torch.set_default_dtype(torch.float64)
    try:
        other = found()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, values in usual.items():
        torch.testing.assert_close(other[name], values, rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_default_device_for_all_new_tensors_is_refused(
    model: fimo.FinalModel, truth: fimo.Sensitivity
) -> None:
    data = ((X, Y), (X[:4], Y[:4]))
    torch.set_default_device("meta")  # stands for a GPU's
    try:
        for run in (
            lambda: fimo.further_train(model, *data, FT),
            lambda: fimo.attribute(model, *data, "graddot"),
            lambda: fimo.audit(model, *data, FT),
            lambda: fimo.evaluate({"itself": truth.sensitivity}, truth),
            lambda: fimo.check(model, *data, FT),
        ):
            with pytest.raises(fimo.InputError, match=r"^device: torch\.set_default_device has made meta"):
                run()
    finally:
        torch.set_default_device(None)


def scores_of_all(model: fimo.FinalModel, data: Any) -> dict[str, torch.Tensor]:
    names = ["graddot", "datainf", "less", "bif", "trak", "unlearning"]
    found = {n: s.values for n, s in fimo.attribute(model, *data, names, further_training=FT).items()}
    truth = fimo.further_train(model, *data, FT, seeds=2, left_out=4)
    effects = fimo.audit(model, *data, FT, top=3).rows["score"]
    return found | {"truth": truth.raw, "audit": torch.tensor(effects.to_numpy())}


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("state", STATES)
def test_results_do_not_depend_on_what_the_caller_has_switched_on(state: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1)
    )
    data = ((X, Y), (X[:4], Y[:4]))
    usual = scores_of_all(fimo.FinalModel(network, "mse", accept_poor=True), data)
    with STATES[state]():
        found = scores_of_all(fimo.FinalModel(network, "mse", accept_poor=True), data)
    assert all(torch.equal(found[name], values) for name, values in usual.items())


@pytest.mark.parametrize("given", ["requires_grad", "inference", "both"])
def test_features_that_are_a_network_s_outputs_are_constants(given: str) -> None:
    torch.manual_seed(0)
    network, encoder = nn.Linear(3, 1), nn.Linear(3, 3)
    usual = scores_of_all(
        fimo.FinalModel(network, "mse", accept_poor=True),
        ((encoder(X).detach(), Y), (encoder(X[:4]).detach(), Y[:4])),
    )
    context = torch.inference_mode if given == "inference" else torch.enable_grad
    with context():
        data = ((encoder(X), Y), (encoder(X[:4]), Y[:4]))
    taken = [fimo.Instances(*part) for part in data] if given == "both" else data
    found = scores_of_all(fimo.FinalModel(network, "mse", accept_poor=True), taken)
    for name, values in usual.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0, msg=name)
    assert data[0][0].requires_grad == (given != "inference")  # the user's own


def test_hooks_of_backward_passes_stay_behind(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network, data = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), ((X, Y), (X[:4], Y[:4]))
    usual = scores_of_all(fimo.FinalModel(network, "mse", accept_poor=True), data)
    network[0].register_full_backward_hook(
        lambda module, inner, outer: (2 * inner[0],) if inner[0] is not None else None
    )
    network[2].register_full_backward_pre_hook(lambda module, outer: (3 * outer[0],))
    found = scores_of_all(fimo.FinalModel(network, "mse", accept_poor=True), data)
    assert "Linear: hooks of its backward pass are left out" in caplog.text
    assert network[2]._backward_pre_hooks
    assert all(torch.equal(found[name], values) for name, values in usual.items())


def test_arrays_of_scores_are_taken_as_numbers_or_refused(truth: fimo.Sensitivity) -> None:
    given = truth.sensitivity[0] + 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    usual = fimo.evaluate({"mine": given}, truth)
    forms = [given.numpy(), given.tolist(), pd.DataFrame(given.numpy()), given.clone().requires_grad_()]
    for form in forms:
        pd.testing.assert_frame_equal(fimo.evaluate({"mine": form}, truth), usual)
    holed = given.clone()
    holed[1, 2] = torch.nan
    for wrong, said in (
        (holed, r"1 of 24 are NaN or infinite, the first at \[1, 2\]"),
        (given / 0, "24 of 24 are NaN or infinite"),
        (given.to(torch.complex64), "expected real numbers but got torch.complex64"),
        ("high", "expected Scores or an array but got str"),
    ):
        with pytest.raises(fimo.InputError, match=rf"^scores of mine: {said}"):
            fimo.evaluate({"mine": wrong}, truth)


def test_scores_that_leave_the_range_of_numbers_are_refused(model: fimo.FinalModel) -> None:
    data = ((1e15 * X, Y), (1e15 * X[:4], Y[:4]))
    for name in ("graddot", "gradcos", "datainf", "less", "tracin"):
        with pytest.raises(
            fimo.InputError, match=r"^method: \w+ gives \d+ of 120 scores that are NaN or inf"
        ):
            fimo.attribute(model, *data, name)
    with pytest.raises(fimo.InputError, match=r"^method: GradDot gives \d+ of \d+ scores"):
        fimo.attribute(model, *data, "graddot", extremes=1)
    wide = fimo.FinalModel(nn.Linear(3, 1).double(), "mse", accept_poor=True)
    assert fimo.attribute(wide, *data, "graddot").values.isfinite().all()
    assert fimo.attribute(wide, *data, "lissa", damping="auto").values.isfinite().all()


@pytest.mark.parametrize("x", [(X, X), [X, X], list(X)])
def test_inputs_in_a_list_are_refused_with_what_to_do(model: fimo.FinalModel, x: Any) -> None:
    with pytest.raises(
        fimo.InputError, match=r"^train: expected \(X, y\) but X is a (tuple|list) of \d+ arrays"
    ):
        fimo.attribute(model, (x, Y), (X[:4], Y[:4]), "graddot")
    with pytest.raises(
        fimo.InputError, match=r"^train: expected elements \(inputs, target\), of two parts each"
    ):
        fimo.attribute(model, [(X[0], Y[0]), (X[1], Y[1], 3)], (X[:4], Y[:4]), "graddot")


def test_threads_of_the_user_s_may_share_a_final_model() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(4, 1))
    model, data = fimo.FinalModel(network, "mse", accept_poor=True), ((X, Y), (X[:4], Y[:4]))

    def run(name: str) -> torch.Tensor:
        if name == "truth":
            return fimo.further_train(model, *data, FT, seeds=2, left_out=4).raw
        return fimo.attribute(model, *data, name, further_training=FT).values

    names = ["truth", "graddot", "datainf", "unrolled", "less", "unlearning", "ekfac", "bif"] * 2
    expected = [run(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, names), expected))
