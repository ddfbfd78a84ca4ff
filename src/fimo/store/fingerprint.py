"""What a result depends on: the one place that says so, for everything that is kept to be used again.

Each function returns a key for the store: the data, networks, functions and settings that go into a result
(see :func:`~fimo.store.description.describe`), the source of the modules of this package that compute it and
of all that they import, and the versions of the libraries below. What changes no result is in no key:
threads, chunk sizes, devices, progress bars, folders, loggers, which other methods run, which other seeds
and instances are asked for.

Where something has no description (:class:`~fimo.store.description.Indescribable`: an open file, a running
generator, code that reads files), the result is computed but not kept, and the log says what stood in the
way.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimo.store.description import Indescribable, describe
from fimo.store.sources import PACKAGE_SOURCES, Sources, origin, package_code, user_code, version

if TYPE_CHECKING:  # a sweep's jobs have a fingerprint before torch is imported
    from torch import Tensor, nn

    from fimo.data.instances import Instances
    from fimo.engine.protocol import Protocol
    from fimo.models.final_model import FinalModel
    from fimo.models.loss_function import LossFunction
    from fimo.store.files import Store

log = logging.getLogger(__name__)

FOLDER_KEYS = ("path", "checkpoint", "file", "prompts", "train", "test", "adapters")
"""Parts of settings' names that may be folders of input files."""

PACKAGES = ("torch", "numpy", "scikit-learn", "pytorch-lightning")
"""Whose versions any result depends on; so it does on those of the packages that its functions are from."""


@dataclass(frozen=True)
class Key:
    """What a result depends on.

    Args:
        parts: that JSON can hold, by name.
        about: the result in words, for the list of what is kept.
    """

    parts: Mapping[str, Any]
    about: str


@dataclass(frozen=True)
class Problem:
    """What all results on one final model and one training set share; large tensors are hashed once.

    Args:
        parts: hashes by name.
        about: in words.
    """

    parts: Mapping[str, Any]
    about: str

    @classmethod
    def of(cls, final_model: FinalModel, train: Instances) -> Problem:
        """Describe a final model and its training set.

        Raises:
            Indescribable: naming the part of the network, the loss or the measurement.
        """
        parts = {
            "network": describe(final_model.network, "network"),
            "trainable": list(final_model.parameters()),
            "loss": describe(final_model.loss.definition, "loss"),
            "measurement": _measurement(final_model),
            "train": data_hash(train),
        }
        name = type(final_model.network).__name__
        return cls(parts, f"{name} of {final_model.size:,} parameters, {len(train):,} training instances")

    def measuring(self, final_model: FinalModel) -> Problem:
        """Return the description of the same final model with another measurement.

        Raises:
            Indescribable: naming the part of the measurement.
        """
        return Problem({**self.parts, "measurement": _measurement(final_model)}, self.about)


def _measurement(final_model: FinalModel) -> str:
    return describe((final_model.measurement or final_model.loss).definition, "measurement")


def training_key(
    network: nn.Module,
    loss: LossFunction,
    settings: Mapping[str, Any],
    train: Instances,
    batches: Callable[..., Any],
    best_on: Instances | None,
) -> Key:
    """Return what the training of a final model depends on.

    Args:
        network: with its initial parameters.
        settings: of optimizer, Trainer, batches and seed.
        batches: makes batches of the training instances.
        best_on: instances by which the best epoch is chosen; None where the last is kept.

    Raises:
        Indescribable: naming the part of the network or loss.
    """
    parts = {
        **settings,
        "network": describe(network, "network"),
        "loss": describe(loss, "loss"),
        "train": data_hash(train),
        "batches": describe(batches, "dataset.train_dataloader"),
        "best_on": None if best_on is None else data_hash(best_on),
        **computed_by("fimo.models.training", "fimo.models.lightning_module"),
    }
    return Key(parts, f"{type(network).__name__}, {len(train):,} training instances, {_words(settings)}")


def runs_key(problem: Problem, test: Instances, protocol: Protocol) -> Key:
    """Return what further-training runs depend on, but for their seed, left-out instances and length."""
    parts = {
        **problem.parts,
        "test": data_hash(test),
        "protocol": protocol.key(),
        **computed_by("fimo.further_training.gold_standard"),
    }
    return Key(parts, f"{problem.about}, {len(test):,} test instances, {_protocol(protocol)}")


def trajectory_key(problem: Problem, protocol: Protocol, seed: int) -> Key:
    """Return what a full run's trajectory depends on, but for its length."""
    parts = {
        **{name: part for name, part in problem.parts.items() if name != "measurement"},
        "protocol": protocol.key(),
        "seed": seed,
        **computed_by("fimo.further_training.trajectory_recorder"),
    }
    return Key(parts, f"{problem.about}, seed {seed}, {_protocol(protocol)}")


def adjoint_key(
    problem: Problem, test: Instances, weight: Tensor, protocol: Protocol, step: int, seed: int
) -> Key:
    """Return what the derivatives of weighted test losses along a full run depend on, after so many steps."""
    parts = {
        **problem.parts,
        "test": data_hash(test),
        "weight": describe(weight, "weight"),
        "protocol": protocol.key(),
        "step": step,
        "seed": seed,
        **computed_by("fimo.further_training.stacked_adjoint"),
    }
    return Key(parts, f"{problem.about}, {len(weight)} adjoints of seed {seed}, {_protocol(protocol)}")


def out_of_sample_key(problem: Problem, protocol: Protocol) -> Key:
    """Return what predictions of training rows depend on by what did not see them."""
    parts = {**problem.parts, "protocol": protocol.key(), **computed_by("fimo.audit.suspects")}
    return Key(parts, f"{problem.about}, predictions out of sample")


def suspects_key(problem: Problem, protocol: Protocol, certain: bool) -> Key:
    """Return what it depends on which rows' targets are taken to be wrong."""
    return Key(
        {**out_of_sample_key(problem, protocol).parts, "certain": certain}, f"{problem.about}, suspects"
    )


def scores_key(
    problem: Problem,
    test: Instances,
    name: str,
    method: type,
    settings: Mapping[str, Any],
    left_out: Sequence[Any],
    seed: int,
    followed: Mapping[str, Any] | None,
) -> Key:
    """Return what a method's scores depend on.

    Args:
        name: of the method, in words only.
        settings: of the method, as configured.
        left_out: whose scores, in this order.
        seed: that methods draw from.
        followed: the further training that the method is handed, where it follows it.

    Raises:
        Indescribable: naming the part of the method.
    """
    parts = {
        **problem.parts,
        "test": data_hash(test),
        "method": _portable(settings),
        "class": describe(method, method.__name__),
        "libraries": {m: version(m) for modules in getattr(method, "packages", {}).values() for m in modules},
        "named": named_in(settings),
        "left_out": left_out,
        "seed": seed,
        "followed": followed,
        **computed_by("fimo.app.scoring", method.__module__),
    }
    return Key(parts, f"{name}, {len(test):,} x {len(left_out):,} scores, {problem.about}")


def job_key(config: Any, libraries: Mapping[str, str]) -> str:
    """Return a hash of all that a job's files depend on: configuration, what it names, all code, versions.

    Args:
        config: as plain containers. Files count by their size and time, as they may be large.
        libraries: versions of other libraries' modules that compute its methods' scores.
    """
    named = sorted(set(_named(config, _file_stamp)))
    return digest(_portable(config), named, code_identity(), sorted(libraries.items()))


def code_identity() -> str:
    """Return a hash of the whole package's source and of the versions that results depend on."""
    return digest(PACKAGE_SOURCES.everything(), versions())


def gradients_key(
    final_model: FinalModel, instances: Instances, kind: str, settings: Mapping[str, Any]
) -> Key:
    """Return what a cached block of gradients depends on.

    Raises:
        Indescribable: naming the part of the network, the loss or the measurement.
    """
    problem = Problem.of(final_model, instances)
    parts = {**problem.parts, "kind": kind, **settings, **computed_by("fimo.curvature.gradients")}
    return Key(parts, f"{kind}, {problem.about}")


def projected_key(
    final_model: FinalModel,
    instances: Instances,
    kind: str,
    settings: Mapping[str, Any],
    modules: Sequence[str],
) -> Key:
    """Return what kept projections of instances' gradients depend on: no measurement, whatever the kind.

    Args:
        kind: of the gradients and their projection, ``layers`` ...
        settings: that say which projection it is, and how its rows are kept.
        modules: of this package that compute it.

    Raises:
        Indescribable: naming the part of the network or the loss.
    """
    problem = Problem.of(final_model, instances)
    parts = {
        **{name: part for name, part in problem.parts.items() if name != "measurement"},
        "kind": kind,
        **settings,
        **computed_by(*modules),
    }
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    return Key(parts, f"projected ({kind}, {words}), {problem.about}")


def computed_by(*modules: str) -> dict[str, Any]:
    """Return what stands for the code of some modules: source with all that they import, and versions."""
    return {
        "code": package_code(*(m for m in modules if origin(m) == "package")),
        "own_code": [user_code(m) for m in sorted(modules) if origin(m) == "user"],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that any result depends on."""
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}}


def data_hash(instances: Instances) -> str:
    """Return a hash of instances' tensors by name, type, shape and bytes."""
    return describe([(n, t.detach()) for n, t in sorted(instances.tensors().items())], "data")


def named_in(settings: Any) -> list[str]:
    """Return hashes of what settings name: files, and modules by the dotted names of what is in them."""
    return sorted(set(_named(settings, file_hash)))


def _named(node: Any, of_file: Callable[[Path], str], key: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, entry in node.items():
            yield from _named(entry, of_file, str(name))
    elif isinstance(node, list | tuple):
        for entry in node:
            yield from _named(entry, of_file, key)
    elif isinstance(node, str | Path) and (text := str(node)):
        for path in _files(Path(text), any(word in key for word in FOLDER_KEYS)):
            yield f"file:{path}:{of_file(path)}"
        if "." in text and all(part.isidentifier() for part in text.split(".")):
            yield from _code(text)


def _code(dotted: str) -> Iterator[str]:
    """Yield a hash of the module that a dotted name is in, with what it imports, where none is installed."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if Sources().path(module) is not None:
            whole = package_code if origin(module) == "package" else user_code
            yield f"code:{whole(module)}"
            return


def contents(folder: Path, pattern: str) -> list[str]:
    """Return the name and hash of every file of a pattern in a folder."""
    return [f"{path.relative_to(folder)}:{file_hash(path)}" for path in sorted(folder.rglob(pattern))]


def file_hash(path: Path) -> str:
    """Return a hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def digest(*parts: Any) -> str:
    """Return a hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _file_stamp(path: Path) -> str:
    return f"{path.stat().st_size}:{path.stat().st_mtime_ns}"


def _files(path: Path, folders: bool) -> list[Path]:
    """Return the file that a text names, or all files of the folder; nothing where it names none."""
    try:
        if path.is_file():
            return [path]
        return sorted(p for p in path.rglob("*") if p.is_file()) if folders and path.is_dir() else []
    except (OSError, ValueError):  # too long, or not a path at all
        return []


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _protocol(protocol: Protocol) -> str:
    return f"{protocol.optimizer} lr {protocol.lr:g} batch {protocol.batch_size} {protocol.leave_out}"


def _portable(settings: Any) -> Any:
    """Return settings as values that JSON can hold."""
    return json.loads(json.dumps(settings, default=str))


@contextlib.contextmanager
def kept(store: Store | None, kind: str, key: Callable[[], Key]) -> Iterator[Path]:
    """Yield the folder of a result: in the store, or one that is deleted afterwards.

    The latter where there is no store, or where the result depends on something without a description.
    """
    folder = folder_of(store, kind, key)
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fimo-") as name:
        yield Path(name)


def folder_of(store: Store | None, kind: str, key: Callable[[], Key]) -> Path | None:
    """Return the folder of a result in the store; None where it can't be kept, and then say why."""
    if store is None:
        return None
    try:
        made = key()
        return store.folder(kind, made.parts, made.about)
    except Indescribable as error:
        log.warning("%s are not kept in the store: %s", kind.replace("_", " "), error)
        return None
