"""Whatever a result depends on changes its key; what it does not depend on changes none."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from os import environ
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fimo.data.instances import Instances
from fimo.further_training import Protocol, full_runs, further_train
from fimo.methods.catalogue import method_of
from fimo.methods.ekfac import Ekfac
from fimo.methods.graddot import GradDot
from fimo.models.final_model import FinalModel
from fimo.models.losses import correct_probability, cross_entropy, logit_margin, mean_squared_error
from fimo.store import fingerprint
from fimo.store.description import Indescribable, content_of, describe
from fimo.store.files import Store
from fimo.store.fingerprint import Problem, gradients_key, runs_key, scores_key, training_key, trajectory_key
from fimo.store.sources import FOLDER, Sources, origin
from tests import own_fingerprint as own
from tests import own_settings
from tests.cases import CASES

ROOT = Path(__file__).parents[1]
NUMBER = 1


def network() -> own.Net:
    torch.manual_seed(0)
    return own.Net()


# --- networks: one change each, of an attribute that a forward pass can read


def _set(name: str, value: Any) -> Callable[[own.Net], None]:
    return lambda net: setattr(net.second, name, value)


def _twice(net: own.Net) -> None:
    net.again = net.second


def _untied(net: own.Net) -> None:
    net.again = copy.deepcopy(net.first)


def _deep(name: str, value: Any) -> Callable[[own.Net], None]:
    return lambda net: setattr(net.second.helper, name, value)


def _add_one(tensor: str) -> Callable[[own.Net], None]:
    @torch.no_grad()
    def change(net: own.Net) -> None:
        getattr(net.second, tensor)[1] += 1

    return change


@torch.no_grad()
def _parameter(net: own.Net) -> None:
    net.second.linear.weight[1, 1] += 1e-6


def _dtype(net: own.Net) -> None:
    net.second.plain = net.second.plain.double()


def _shape(net: own.Net) -> None:
    net.second.plain = net.second.plain.view(50, 100)


def _persistent(net: own.Net) -> None:
    net.second._non_persistent_buffers_set.clear()


def _class(net: own.Net) -> None:
    net.second.helper.__class__ = type("Helper", (own.Helper,), {})


def _hook(net: own.Net) -> None:
    net.second.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)


def _other_hook(net: own.Net) -> None:
    net.second.register_forward_hook(lambda module, inputs, outputs: 3 * outputs)


def _pre_hook(net: own.Net) -> None:
    net.second.register_forward_pre_hook(lambda module, inputs: None)


class _Symmetric(nn.Module):
    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sign * x


def _parametrised(sign: int) -> Callable[[own.Net], None]:
    def change(net: own.Net) -> None:
        parametrize.register_parametrization(net.second.linear, "weight", _Symmetric(sign))

    return change


def _scale(middle: float) -> Callable[[own.Net], None]:
    weights = torch.ones(2000)
    weights[1000] = middle
    return _set("scale", functools.partial(torch.mul, weights))


NETWORKS: dict[str, Callable[[own.Net], object]] = {
    "a number": _set("gain", 2),
    "float, not int": _set("gain", 1.0),
    "bool, not int": _set("gain", True),
    "None, not int": _set("gain", None),
    "int, not None": _set("maybe", 0),
    "empty, not None": _set("maybe", ()),
    "a truth value": _set("flag", False),
    "a list's entry": _set("widths", [1, 2, 4]),
    "a list's order": _set("widths", [1, 3, 2]),
    "tuple, not list": _set("widths", (1, 2, 3)),
    "a longer tuple": _set("pair", (1, 2, 0)),
    "a dict's value": _set("table", {"first": 1, "second": [2, 4]}),
    "a dict's key": _set("table", {"first": 1, "third": [2, 3]}),
    "a dict's order": _set("table", {"second": [2, 3], "first": 1}),
    "a set's element": _set("names", {"x", "y"}),
    "a text": _set("text", "first"),
    "an activation": _set("act", torch.relu),
    "a lambda": _set("act", lambda x: x + 1),
    "another lambda": _set("act", lambda x: x + 2),
    "a module as activation": _set("act", nn.ELU()),
    "its own argument": _set("act", nn.ELU(0.5)),
    "a partial's tensor in the middle": _scale(2.0),
    "in the last digit": _scale(1.0000001),
    "a NumPy array": _set("maybe", np.arange(3)),
    "another": _set("maybe", np.arange(3) + 1),
    "of another type": _set("maybe", np.arange(3, dtype=np.float32)),
    "a new attribute": _set("more", 1),
    "an object's number": _deep("power", 3),
    "an object's list": _deep("names", ["a", "c"]),
    "an object's dict": _deep("table", {"a": 1, "b": 3}),
    "an object's class": _class,
    "a plain tensor": _add_one("plain"),
    "its dtype": _dtype,
    "its shape": _shape,
    "a buffer": _add_one("kept"),
    "a non-persistent buffer": _add_one("passing"),
    "whether it is saved": _persistent,
    "a parameter": _parameter,
    "which block is used twice": _twice,
    "a copy in the place of a shared block": _untied,
    "the mode": lambda net: net.second.train(False),
    "whether a parameter moves": lambda net: net.second.linear.bias.requires_grad_(False),
    "a hook": _hook,
    "another hook": _other_hook,
    "a hook before": _pre_hook,
    "a parametrisation": _parametrised(1),
    "another parametrisation": _parametrised(-1),
    "an instance's own forward": lambda net: setattr(net, "forward", lambda x: x),
}


def test_whatever_a_forward_pass_can_read_is_in_a_networks_description() -> None:
    found = {"unchanged": describe(network(), "network")}
    for name, change in NETWORKS.items():
        net = network()
        change(net)
        found[name] = describe(net, "network")
    by_key: dict[str, list[str]] = {}
    for name, key in found.items():
        by_key.setdefault(key, []).append(name)
    assert [names for names in by_key.values() if len(names) > 1] == []


def test_equal_networks_have_one_description_whatever_their_addresses_and_history() -> None:
    expected = describe(network(), "network")
    assert describe(network(), "network") == expected
    assert describe(copy.deepcopy(network()), "network") == expected
    hooked = network()
    hooked.register_forward_hook(lambda *_: None).remove()  # the numbers of hooks count a process's
    _hook(hooked)
    plain = network()
    _hook(plain)
    assert describe(hooked, "network") == describe(plain, "network")
    reordered = network()
    attributes = dict(reversed(list(vars(reordered.second).items())))
    vars(reordered.second).clear()
    vars(reordered.second).update(attributes)
    assert describe(reordered, "network") == expected
    strided = network()
    strided.second.plain = torch.stack([strided.second.plain] * 2, 1)[:, 0]
    assert describe(strided, "network") == expected


def test_a_class_attribute_that_was_changed_is_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(network(), "network")
    monkeypatch.setattr(own.Net, "hidden", 5)
    changed = describe(network(), "network")
    monkeypatch.setattr(own.Block, "forward", lambda self, x: x)
    assert len({before, changed, describe(network(), "network")}) == 3


# --- functions


def _functions() -> Iterator[tuple[str, Any]]:
    yield "plain", own.squared
    yield "the package's", mean_squared_error
    yield "another of the package's", cross_entropy
    yield "a closure", own.raised(2)
    yield "another number in it", own.raised(3)
    yield "a float in it", own.raised(2.0)
    yield "a tensor in it", own.raised(torch.ones(3000))
    middle = torch.ones(3000)
    middle[1500] = 2
    yield "that differs in the middle", own.raised(middle)
    yield "a partial", functools.partial(own.weighted, weight=torch.ones(3))
    yield "in the last digit", functools.partial(own.weighted, weight=torch.tensor([1, 1, 1.0000001]))
    yield "by position", functools.partial(own.weighted, torch.ones(3))
    yield "an object", own.Loss(1.0)
    yield "another state", own.Loss(2.0)
    yield "its method", own.Loss(1.0).__call__
    yield "of another state", own.Loss(2.0).__call__
    yield "a module", nn.MSELoss(reduction="none")
    yield "its argument", nn.MSELoss(reduction="sum")
    yield from zip("ab", [lambda o, t: (o - t).abs().mean(1), lambda o, t: (o - t).abs().sum(1)], strict=True)
    yield from zip("cd", [lambda o, t: o * 1, lambda o, t: o * 2], strict=True)  # a constant
    yield from zip("ef", [lambda o, t: o - t, lambda o, t: t - o], strict=True)  # an order
    yield from zip("gh", [lambda o, t, k=k: k * o for k in (1, 2)], strict=True)  # a default
    keyword = own.raised(2)
    keyword.__kwdefaults__ = {"scale": 2.0}
    yield "a keyword's default", keyword


def test_every_part_of_a_function_is_in_its_description() -> None:
    found = {name: describe(function, "loss") for name, function in _functions()}
    assert len(set(found.values())) == len(found)
    again = {name: describe(function, "loss") for name, function in _functions()}
    assert found == again


@pytest.mark.parametrize(
    ("function", "place", "name", "value"),
    [
        (own.focal, own, "GAMMA", 2.0),
        (own.elsewhere, own, "GAMMA", 2.0),  # through a function that it calls
        (own.configured, own.CONFIG, "gamma", [2.0, 1.0]),
        (own.elsewhere, own_settings, "SCALE", 2.0),  # through a module
        (own.focal, own, "squared", own.configured),
        (lambda o, t: own.GAMMA * own.CONFIG.gamma[1], own.CONFIG, "gamma", [0.0, 2.0]),
    ],
)
def test_globals_that_a_function_reads_are_in_its_description(
    function: Any, place: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = describe(function, "loss")
    monkeypatch.setattr(place, name, value)
    assert describe(function, "loss") != before
    monkeypatch.undo()
    assert describe(function, "loss") == before


def _by_import(o: Any, t: Any) -> Any:
    from tests import own_settings as mine

    return mine.SCALE


def _by_name(o: Any, t: Any) -> Any:
    from tests.own_settings import SCALE

    return SCALE


def _by_other_name(o: Any, t: Any) -> Any:
    import tests.own_settings as mine

    return mine.SCALE


def _by_whole_name(o: Any, t: Any) -> Any:
    import tests.own_settings

    return [tests.own_settings.SCALE for _ in range(2)]


@pytest.mark.parametrize("function", [_by_import, _by_name, _by_other_name, _by_whole_name])
def test_what_a_function_imports_when_it_runs_is_in_its_description(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = describe(function, "loss")
    monkeypatch.setattr(own_settings, "SCALE", 2.0)
    changed = describe(function, "loss")
    assert changed != before
    monkeypatch.setattr(own_settings, "OTHER", 2.0, raising=False)
    assert describe(function, "loss") == changed  # what it does not read


def test_relative_imports_in_a_function_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_imports"
    (package / "deep").mkdir(parents=True)
    for name, text in {
        "__init__.py": "", "settings.py": "WIDTH = 1\nother = open", "deep/__init__.py": "",
        "deep/net.py": "def f():\n    from .. import settings\n    return settings.WIDTH\n",
    }.items():  # fmt: skip
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    f = importlib.import_module("own_imports.deep.net").f
    assert f() == 1
    before = describe(f, "loss")
    monkeypatch.setattr(sys.modules["own_imports.settings"], "WIDTH", 2)
    assert describe(f, "loss") != before


VARIABLE = "FIMO_TEST_SCALE"
NAMES = SimpleNamespace(variable="FIMO_TEST_SCALE")


@pytest.mark.parametrize(
    "function",
    [
        lambda o, t: float(os.environ.get("FIMO_TEST_SCALE", "1")),
        lambda o, t: float(os.getenv("FIMO_TEST_SCALE", "1")),
        lambda o, t: [float(environ["FIMO_TEST_SCALE"]) for _ in t],
        lambda o, t: float(os.environ.get(VARIABLE, "1")),
        lambda o, t: float(os.getenv(NAMES.variable, "1")),
        lambda o, t, variable="FIMO_TEST_SCALE": float(os.environ.get(variable, "1")),
        (lambda variable: lambda o, t: float(environ.get(variable, "1")))("FIMO_TEST_SCALE"),
    ],
)
def test_variables_of_the_environment_that_a_function_names_are_in_its_description(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a text, or by one that is a global, an attribute of one, an argument's default or in a closure."""
    before = describe(function, "loss")
    monkeypatch.setenv("FIMO_TEST_OTHER", "2")
    assert describe(function, "loss") == before
    monkeypatch.setenv("FIMO_TEST_SCALE", "2")
    assert describe(function, "loss") != before


def _by_import_of_sys(o: Any, t: Any) -> Any:
    import sys as system

    return system.modules["tests.own_settings"].SCALE


def _of_a_file(o: Any, t: Any) -> Any:
    from numpy import load as read

    return read("weights.npy")


@pytest.mark.parametrize(
    ("function", "reads"),
    [
        (lambda o, t: float(open("weight.txt").read()), "open"),  # noqa: SIM115
        (lambda o, t: float(Path("weight.txt").read_text()), r"files \(read_text\)"),
        (lambda o, t: [sys.modules["tests.own_settings"].SCALE for _ in t], "sys.modules"),
        (lambda o, t: importlib.import_module("tests.own_settings").SCALE, "importlib.import_module"),
        (lambda o, t: torch.load("weight.pt") * o, "torch.load"),
        (_by_import_of_sys, "sys.modules"),
        (_of_a_file, "numpy.load"),
    ],
)
def test_what_reads_files_or_modules_by_name_has_no_description(function: Any, reads: str) -> None:
    for thing in (function, functools.partial(function, t=1), [own.squared, function]):
        with pytest.raises(Indescribable, match=rf"reads {reads}, which may change unseen"):
            describe(thing, "loss")


class Loading(nn.Module):
    """Loads its weights by methods that a forward pass does not call."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        if calls:
            torch.load("weights.pt")

    @classmethod
    def from_file(cls, path: str) -> Any:
        return cls(bool(torch.load(path)))

    @torch.no_grad()
    def restore(self, path: str) -> None:
        self.load_state_dict(torch.load(path))

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


class LoadingWhenCalled(Loading):
    def forward(self, x: torch.Tensor) -> Any:
        return self._again(x)

    def _again(self, x: torch.Tensor) -> Any:
        self.restore("weights.pt")
        return self.layer(x)


def test_methods_that_read_files_count_where_code_that_counts_calls_them() -> None:
    assert describe(Loading(False), "network")
    with pytest.raises(Indescribable, match=r"restore.* reads torch\.load"):
        describe(LoadingWhenCalled(False), "network")
    with pytest.raises(Indescribable, match=r"reads torch\.load"):
        describe(Loading(False).restore, "loss")


def test_globals_that_are_read_by_their_names_are_in_a_description(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(o: Any, t: Any) -> Any:
        return globals()["NUMBER"]

    before = describe(read, "loss")
    monkeypatch.setitem(read.__globals__, "NUMBER", 2)
    assert describe(read, "loss") != before


def test_globals_that_a_function_does_not_read_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(own.configured, "loss")
    monkeypatch.setattr(own, "GAMMA", 2.0)
    monkeypatch.setattr(own_settings, "SCALE", 2.0)
    assert describe(own.configured, "loss") == before


def test_objects_that_contain_themselves_have_a_description() -> None:
    def recursive(x: int) -> int:
        return recursive(x - 1) if x else 0

    assert describe(recursive, "f") == describe(recursive, "f")
    loops = []
    for value in (1, 1, 2):
        loop: list[Any] = [value]
        loop.append(loop)
        thing = SimpleNamespace(loop=loop)
        thing.self = thing
        loops.append(describe(thing, "thing"))
    assert loops[0] == loops[1] != loops[2]


@pytest.mark.parametrize(
    ("helper", "reason"),
    [
        (lambda: (x for x in "ab"), "running function"),
        (lambda: open(os.devnull), "state can't be read"),  # noqa: SIM115
        (lambda: torch.empty(3, device="meta"), "without values"),
    ],
)
def test_what_has_no_description_is_named_by_its_path(helper: Any, reason: str) -> None:
    net = network()
    net.second.helper.opened = [helper()]
    with pytest.raises(Indescribable, match=rf"network\.second\.helper\.opened\[0\] .*{reason}"):
        describe(net, "network")


def test_whatever_fails_while_it_is_described_is_a_reason_not_to_keep_it() -> None:
    class Odd:
        __slots__ = ("value",)

        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError("no attributes today")

    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for value, reason in ((Odd(), "no attributes today"), (deep, "nested too deeply")):
        with pytest.raises(Indescribable, match=f"^network .*{reason}"):
            describe(value, "network")


def test_a_description_is_the_same_in_every_process() -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.test_fingerprint import fingerprints\n"
        "print('\\n'.join(fingerprints()))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(FOLDER.parent)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout.split() == fingerprints(), done.stderr


def fingerprints() -> list[str]:
    """Return descriptions of everything above that has the same name in a process of its own."""
    nets = []
    for name, change in NETWORKS.items():
        net = network()
        change(net)
        nets.append(describe(net, name))
    return [*nets, *(describe(function, name) for name, function in _functions())]


# --- whole keys


def regression() -> tuple[FinalModel, Instances, Instances]:
    case = CASES["mlp_regression"]()
    return case.final_model, case.train, case.test


OTHER_VALUES = {
    "optimizer": "adam", "lr": 0.02, "batch_size": 6, "micro_batch_size": 3, "leave_out": "mask",
    "evaluate_every": 3, "momentum": 0.9, "nesterov": True, "betas": (0.8, 0.9), "eps": 1e-6,
    "weight_decay": 0.1, "clip_norm": 1.0, "schedule": "linear", "dtype": "float64",
    "evaluation_dtype": "float32", "autocast": "bfloat16",
}  # fmt: skip
LENGTH = {"epochs", "steps"}
"""Of a run, which holds every shorter one."""
LAUNCHED = {"graphs"}
"""How operations are called, which changes none of them."""


def _problems() -> Iterator[tuple[str, Problem]]:
    model, train, _ = regression()
    network, loss = model.network, model.loss
    yield "unchanged", Problem.of(model, train)
    yield "loss", Problem.of(FinalModel(network, own.squared, loss), train)
    yield "measurement", Problem.of(FinalModel(network, loss, own.squared), train)
    yield "trainable", Problem.of(FinalModel(network, loss, trainable=("0.*",)), train)
    yield "frozen otherwise", Problem.of(FinalModel(network, loss, trainable=("0.weight", "2.*")), train)
    yield "dtype", Problem.of(model.to(dtype=torch.float32), train)
    yield "fewer instances", Problem.of(model, train[:-1])
    yield "another order", Problem.of(model, train[list(range(len(train)))[::-1]])
    target = train.targets.clone()
    target[7] += 1e-12
    yield "a target", Problem.of(model, Instances(train.inputs, target))
    inputs = train.inputs.clone()
    inputs[7, 1] += 1e-12
    yield "an input", Problem.of(model, Instances(inputs, train.targets))
    yield "names of inputs", Problem.of(model, Instances({"x": train.inputs}, train.targets))
    other = copy.deepcopy(network)
    other.gain = 2.0
    yield "an attribute", Problem.of(FinalModel(other, loss), train)


@pytest.fixture
def problem() -> Problem:
    model, train, _ = regression()
    return Problem.of(model, train)


def test_runs_and_trajectories_depend_on_problem_test_instances_and_every_field_of_the_protocol(
    problem: Problem,
) -> None:
    test = regression()[2]
    base = Protocol(epochs=2, momentum=0.5)
    assert {f.name for f in dataclasses.fields(Protocol)} == OTHER_VALUES.keys() | LENGTH | LAUNCHED
    assert runs_key(problem, test, dataclasses.replace(base, graphs=False)) == runs_key(problem, test, base)
    runs = {name: runs_key(p, test, base) for name, p in _problems()}
    runs |= {f"protocol.{name}": runs_key(problem, test, dataclasses.replace(base, **{name: value}))
             for name, value in OTHER_VALUES.items()}  # fmt: skip
    runs["test"] = runs_key(problem, test[1:], base)
    assert_all_differ(runs)
    paths = {name: trajectory_key(p, base, 0) for name, p in _problems() if name != "measurement"}
    paths |= {f"protocol.{name}": trajectory_key(problem, dataclasses.replace(base, **{name: value}), 0)
              for name, value in OTHER_VALUES.items()}  # fmt: skip
    paths["seed"] = trajectory_key(problem, base, 1)
    assert_all_differ(paths)


def test_a_longer_run_holds_a_shorter_one_unless_its_learning_rate_depends_on_the_length(
    problem: Problem,
) -> None:
    test = regression()[2]
    keys = [
        runs_key(problem, test, Protocol(schedule=schedule, epochs=epochs)).parts
        for schedule in ("constant", "cosine")
        for epochs in (2, 3)
    ]
    assert keys[0] == keys[1]
    assert keys[2] != keys[3]


def test_scores_depend_on_problem_method_settings_code_instances_and_seed(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = regression()[2]

    def key(**changed: Any) -> Any:
        arguments = {
            "problem": problem, "test": test, "name": "graddot", "method": GradDot,
            "settings": {"_target_": "fimo.methods.graddot.GradDot", "memory_mb": 1}, "left_out": [1, 2],
            "seed": 0, "followed": None,
        }  # fmt: skip
        return scores_key(**{**arguments, **changed})

    class Mine(GradDot):
        power = 1

    keys = {name: key(problem=p) for name, p in _problems()}
    keys |= {
        "test": key(test=test[1:]),
        "method": key(method=Ekfac),
        "own method": key(method=Mine),
        "memory": key(settings={"_target_": "fimo.methods.graddot.GradDot", "memory_mb": 2}),
        "left out": key(left_out=[1, 3]),
        "order": key(left_out=[2, 1]),
        "groups": key(left_out=[[1, 2]]),
        "seed": key(seed=1),
        "followed": key(followed={"seeds": [0], "protocol": {"lr": 0.1}}),
        "its seeds": key(followed={"seeds": [1], "protocol": {"lr": 0.1}}),
        "its protocol": key(followed={"seeds": [0], "protocol": {"lr": 0.2}}),
    }
    assert key().parts == keys["unchanged"].parts
    monkeypatch.setattr(Mine, "power", 2)
    keys["own method's attribute"] = key(method=Mine)
    monkeypatch.setattr(Mine, "scores", lambda self, test, left_out: None, raising=False)
    keys["own method's code"] = key(method=Mine)
    code = fingerprint.package_code
    for edited in ("fimo.app.scoring", "fimo.methods.graddot"):

        def package_code(*modules: str, edited: str = edited) -> str:
            return code(*modules) + f"{edited} is edited" * (edited in modules)

        monkeypatch.setattr(fingerprint, "package_code", package_code)
        keys[f"source of {edited}"] = key()
    monkeypatch.setattr(fingerprint, "package_code", code)
    assert_all_differ(keys)
    assert key(name="another name").parts == key().parts


@pytest.mark.parametrize("module", ["own_hook", "own_hooks.inner.hooks"])
def test_files_and_code_that_a_methods_settings_name_are_in_its_key(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    checkpoint, source = tmp_path / "model.pt", tmp_path / f"{module.replace('.', '/')}.py"
    for folder in (p for p in source.parents if p.is_relative_to(tmp_path) and p != tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").touch()
    source.write_text("def hook(): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"checkpoints": [str(checkpoint)], "hook": {"_target_": f"{module}.hook"}}

    def key() -> str:
        return str(scores_key(problem, regression()[2], "own", GradDot, settings, [0], 0, None).parts)

    found = [key()]
    for content in (b"1", b"2"):
        checkpoint.write_bytes(content)
        found.append(key())
    source.write_text("def hook(): return 2")
    found.append(key())
    assert len(set(found)) == len(found)


def test_the_version_of_a_library_that_computes_scores_is_in_their_key(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of("captum_tracin", {})[1]

    def key() -> dict[str, object]:
        return dict(scores_key(problem, regression()[2], "captum", type(method), {}, [0], 0, None).parts)

    found = []
    for number in ("0.9", "0.10"):
        monkeypatch.setattr(fingerprint, "version", lambda module, number=number: f"{module}=={number}")
        found.append(key())
    assert found[0].pop("libraries") == {"captum": "captum==0.9"}
    assert found[1].pop("libraries") == {"captum": "captum==0.10"}
    assert found[0] == found[1]


def test_cached_gradients_depend_on_loss_measurement_and_kind() -> None:
    model, train, _ = regression()
    net = CASES["mlp_classification"]().final_model.network
    classes = CASES["mlp_classification"]().train
    keys = {
        "unchanged": gradients_key(model, train, "loss", {"block": 5}),
        "kind": gradients_key(model, train, "outputs", {"block": 5}),
        "block": gradients_key(model, train, "loss", {"block": 6}),
        "instances": gradients_key(model, train[1:], "loss", {"block": 5}),
    }
    for measurement in (logit_margin, correct_probability, lambda o, t: o[:, 0], lambda o, t: o[:, 1]):
        name = f"{measurement!r} {len(keys)}"
        keys[name] = gradients_key(FinalModel(net, cross_entropy, measurement), classes, "measurement", {})
    assert_all_differ(keys)


def test_a_cache_of_gradients_keeps_measurements_apart(tmp_path: Path) -> None:
    case = CASES["conv_net"]()
    network, loss = case.final_model.network, case.final_model.loss

    def scores(measurement: Any, cache: str | None) -> torch.Tensor:
        model = FinalModel(network, loss, measurement)
        return GradDot(memory_mb=0.002, cache=cache).attribute(model, case.train, case.test).values

    for measurement in (logit_margin, correct_probability, lambda o, t: o[:, 0], lambda o, t: 9 * o[:, 0]):
        for _ in range(2):
            # kept ones are dense, others are added up from what enters and leaves layers
            kept, made = scores(measurement, str(tmp_path)), scores(measurement, None)
            torch.testing.assert_close(kept, made, rtol=1e-12, atol=1e-12)


def test_a_final_models_training_depends_on_network_loss_settings_data_and_batches() -> None:
    model, train, test = regression()

    def key(**changed: Any) -> Any:
        arguments = {
            "network": model.network, "loss": mean_squared_error, "train": train, "best_on": None,
            "settings": {"lr": 0.1, "seed": 0}, "batches": own.squared,
        }  # fmt: skip
        return training_key(**{**arguments, **changed})

    other = copy.deepcopy(model.network)
    other.pooling = "mean"
    thawed = copy.deepcopy(model.network).requires_grad_(True)
    assert_all_differ({
        "unchanged": key(), "attribute": key(network=other), "trainable": key(network=thawed),
        "loss": key(loss=own.squared), "data": key(train=train[1:]), "best": key(best_on=test),
        "other best": key(best_on=test[1:]), "setting": key(settings={"lr": 0.2, "seed": 0}),
        "seed": key(settings={"lr": 0.1, "seed": 1}), "batches": key(batches=own.focal),
    })  # fmt: skip


def test_every_key_holds_the_source_that_computes_it_and_the_versions(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, train, test = regression()
    base = Protocol(epochs=1)

    def training() -> fingerprint.Key:
        return training_key(model.network, mean_squared_error, {}, train, own.squared, None)

    makers: dict[str, Callable[[], fingerprint.Key]] = {
        "fimo.further_training.gold_standard": lambda: runs_key(problem, test, base),
        "fimo.further_training.trajectory_recorder": lambda: trajectory_key(problem, base, 0),
        "fimo.models.training": training,
        "fimo.models.lightning_module": training,
        "fimo.curvature.gradients": lambda: gradients_key(model, train, "loss", {}),
        "fimo.app.scoring": lambda: scores_key(problem, test, "graddot", GradDot, {}, [0], 0, None),
    }
    code = fingerprint.package_code
    for edited, make in makers.items():
        keys = {"unchanged": make()}
        with monkeypatch.context() as patch:
            patch.setattr(
                fingerprint,
                "package_code",
                lambda *modules, edited=edited: code(*modules) + "edited" * (edited in modules),
            )
            keys["source"] = make()
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "versions", lambda: {"torch": "0"})
            keys["versions"] = make()
        assert_all_differ(keys)
        assert make().parts == keys["unchanged"].parts


def assert_all_differ(keys: dict[str, fingerprint.Key]) -> None:
    by_key: dict[str, list[str]] = {}
    for name, key in keys.items():
        by_key.setdefault(str(sorted(key.parts.items())), []).append(name)
    assert [names for names in by_key.values() if len(names) > 1] == []


# --- source


@pytest.fixture
def package(tmp_path: Path) -> Callable[[str], Sources]:
    """Return the package's sources as they would be with one module edited."""

    def edited(module: str) -> Sources:
        folder = tmp_path / module / "fimo"
        shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
        path = folder.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        path.write_text(path.read_text() + "\n# edited\n")
        return Sources(folder)

    return edited


RUNS, SCORES = ("fimo.further_training.gold_standard",), ("fimo.app.scoring", "fimo.methods.ekfac")


@pytest.mark.parametrize(
    ("module", "runs", "scores"),
    [
        ("curvature.kronecker", False, True),
        ("methods.gradient", False, True),
        ("models.losses", True, True),
        ("engine.driver", True, True),  # imported inside a function
        ("engine.optimizers", True, True),
        ("methods.response", False, False),
        ("reporting.report", False, False),
        ("app.command", False, False),
        ("app.sweep", False, False),
        ("app.experiment", False, False),
        ("app.config", False, False),
        ("evaluation.metrics", False, False),
    ],
)
def test_an_edited_module_changes_the_keys_of_what_it_computes_and_no_other(
    package: Callable[[str], Sources], module: str, runs: bool, scores: bool
) -> None:
    edited = package(module)
    assert (edited.code(*RUNS) != Sources().code(*RUNS)) is runs
    assert (edited.code(*SCORES) != Sources().code(*SCORES)) is scores


def test_a_users_module_counts_with_all_that_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    files = {
        "__init__.py": "",
        "net.py": "from . import layers\nimport numpy\n\ndef make():\n    from own_package.deep import f",
        "layers.py": "WIDTH = 1",
        "deep.py": "def f(): pass",
        "unused.py": "",
    }
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert origin("own_package.net") == "user"
    found = [Sources().code("own_package.net")]
    for name in ("net.py", "layers.py", "deep.py"):
        (package / name).write_text(files[name] + "\n# edited")
        found.append(Sources().code("own_package.net"))
    assert len(set(found)) == 4
    (package / "unused.py").write_text("# edited")
    assert Sources().code("own_package.net") == found[-1]


@pytest.mark.parametrize(
    ("module", "whose"),
    [("torch.nn", "installed"), ("json", "installed"), ("fimo.store", "package"), ("tests.cases", "user"),
     ("__main__", "main"), ("numpy", "installed"), (None, "installed")],
)  # fmt: skip
def test_modules_are_told_apart_by_whose_they_are(module: str | None, whose: str) -> None:
    assert origin(module) == whose


# --- what is kept, and what is not


def _gain(value: float) -> FinalModel:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.gain = nn.Linear(4, 1).double(), value

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.gain * self.linear(x))

    return FinalModel(Gain(), mean_squared_error)


def test_a_second_network_with_other_attributes_never_gets_the_firsts_results(tmp_path: Path) -> None:
    _, train, test = regression()
    protocol, store = Protocol(batch_size=5, epochs=1), Store(tmp_path)
    for value in (1.0, 3.0):
        model = _gain(value)
        stored = further_train(model, train, test, protocol, [0], [1, 2], store=store)
        assert torch.equal(stored.raw, further_train(model, train, test, protocol, [0], [1, 2]).raw)
        path = next(full_runs(model, train, protocol, [0], store=store)).parameters[-1]
        expected = next(full_runs(model, train, protocol, [0])).parameters[-1]
        assert all(torch.equal(path[name], expected[name]) for name in expected)


def test_what_can_not_be_described_is_computed_and_not_kept_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, train, test = regression()
    with open(os.devnull) as opened:  # a global that the loss reads

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            assert not opened.closed
            return mean_squared_error(outputs, targets)

        odd = FinalModel(model.network, loss)
        arguments = (train, test, Protocol(batch_size=5, epochs=1), [0], [1, 2])
        found = further_train(odd, *arguments, store=Store(tmp_path))
        next(full_runs(odd, train, arguments[2], [0], store=Store(tmp_path)))
    assert torch.equal(found.raw, further_train(model, *arguments).raw)
    assert not list(tmp_path.iterdir())
    assert "further training are not kept in the store: loss.opened is a _io.TextIOWrapper" in caplog.text


def test_threads_chunks_devices_and_order_of_runs_change_no_key(tmp_path: Path) -> None:
    model, train, test = regression()
    protocol, store = Protocol(batch_size=5, epochs=1), Store(tmp_path)
    threads = torch.get_num_threads()
    further_train(model, train, test, protocol, [0, 1], [1, 2], store=store, chunk=1)
    try:
        torch.set_num_threads(2)
        from fimo.cost import Cost

        cost = Cost("again")
        trainer = {"accelerator": "cpu", "enable_progress_bar": True}
        further_train(model.to("cpu"), train, test, protocol, [1, 0], [2, 1], store=store, chunk=3,
                      trainer=trainer, cost=cost)  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert cost.reused == 1
    assert len(list(tmp_path.glob("further_training/*"))) == 1


def test_a_key_is_readable_and_holds_no_address(tmp_path: Path, problem: Problem) -> None:
    test = regression()[2]
    key = runs_key(problem, test, Protocol(epochs=1))
    folder = Store(tmp_path).folder("further_training", key.parts, key.about)
    text = (folder / "key.json").read_text()
    assert not re.search(r"0x[0-9a-f]{6}", text)
    assert "Sequential of 71 parameters, 23 training instances, 5 test instances, sgd lr 0.01" in text


def test_the_content_of_a_tensor_is_its_elements_whatever_its_strides() -> None:
    numbers = torch.arange(12.0).view(3, 4)
    for tensor in (numbers, numbers.T, numbers[:, 1:2], numbers[:1, 1:2], numbers[:0], torch.tensor(3.0)):
        assert bytes(content_of(tensor)) == tensor.numpy().tobytes()
    column = torch.from_numpy(np.ones(3, np.float32)[:, None][:1].copy())
    for tensor in (column, column.as_strided((1, 1), (1, 0)), torch.ones(1).expand(1)):
        assert bytes(content_of(tensor)) == np.float32(1).tobytes()
        assert describe(tensor, "tensor")
