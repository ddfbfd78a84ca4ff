"""Typed schemas of the configuration, checked after composing and before anything heavy is imported.

Importing this module must stay cheap (no torch), so that a mistake is answered in about a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fimo.app.moved import with_present_paths
from fimo.app.search_path import SearchPath
from fimo.app.trainer_arguments import check_callbacks, check_trainer
from fimo.app.values import check_values
from fimo.errors import InputError, nearest, shortened
from fimo.methods.catalogue import all_methods, own_methods


@dataclass
class Model:
    """``model``: the network, and how the final model is trained where no checkpoint is given."""

    network: Any = MISSING
    loss: Any = "auto"
    measurement: Any = None
    trainable: list[str] = field(default_factory=list)
    checkpoint: Any = None
    seeds: int = 1
    accept_poor: bool = False
    training: str = "auto"
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass
class Trainer:
    """``trainer``: arguments of the Lightning Trainer, those below and any other that Lightning has.

    Those that apply to further training too are :data:`fimo.app.trainer_arguments.OF_BOTH`.
    """

    max_epochs: Any = "auto"
    accelerator: str = "cpu"
    devices: Any = 1
    strategy: str = "auto"
    precision: Any = "32-true"
    gradient_clip_val: float | None = None
    keep: str = "last"
    enable_progress_bar: bool = True


@dataclass
class FurtherTraining:
    """``further_training``: the protocol, the seeds, and whose loss changes are measured."""

    optimizer: str = "sgd"
    lr: float = 0.01
    batch_size: int = 32
    micro_batch_size: int | None = None
    epochs: Any = "auto"
    steps: int | None = None
    leave_out: str = "shift"
    evaluate_every: Any = "epoch"
    momentum: float = 0.0
    nesterov: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: str = "constant"
    dtype: str = "float32"
    evaluation_dtype: str = "float64"
    autocast: str | None = None
    graphs: bool = True
    seeds: Any = 10
    followed_seeds: Any = None
    left_out: Any = 50
    test: Any = None
    subtract_mean: bool = True
    shard: str | None = None
    chunk: Any = "auto"
    save_raw: bool = True


@dataclass
class Evaluation:
    """``evaluation``: how scores are compared with the sensitivity."""

    metrics: list[str] = field(default_factory=lambda: ["cosine", "spearman", "pearson"])
    seed_counts: list[int] | None = None
    bootstrap: int = 200
    shown: int = 30
    tasks: Any = field(default_factory=dict)


@dataclass
class AuditSettings:
    """``audit``: which rows ``mode=audit`` verifies, and how surely."""

    test: list[Any] = field(default_factory=list)
    top: int = 20
    q: float = 0.1
    verify: bool = True
    minutes: float | None = None
    seeds: int = 10
    controls: int | None = None
    certain_labels: bool = False
    act: bool = True


@dataclass
class Config:
    """The whole configuration.

    ``dataset`` and each of ``methods``, ``logger`` and ``callbacks`` are arguments of their ``_target_``.
    """

    dataset: Any = MISSING
    model: Model = field(default_factory=Model)
    trainer: Trainer = field(default_factory=Trainer)
    further_training: FurtherTraining = field(default_factory=FurtherTraining)
    evaluation: Evaluation = field(default_factory=Evaluation)
    audit: AuditSettings = field(default_factory=AuditSettings)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
    store: str = "outputs/store"
    scale: float = 1.0
    mode: str = "study"
    until: str = "report"
    report: bool = True


def validated(config: DictConfig, places: SearchPath) -> DictConfig:
    """Return the composed configuration, checked against the schemas.

    Where no method was chosen, all that there are are in it.

    Args:
        places: where there are methods.

    Raises:
        InputError: naming the first key at fault: unknown (with the nearest known one), of the wrong type,
            missing, or a file that is not there.
    """
    _check_keys(OmegaConf.structured(Config), config, "")
    with open_dict(config):
        config.methods = chosen_methods(config.get("methods") or {}, places)
        _make_lists(OmegaConf.structured(Config), config)
        with_present_paths(config)
    try:
        checked = _merged(config)
        OmegaConf.resolve(checked)
    except OmegaConfBaseException as error:
        key, reason = getattr(error, "full_key", None), getattr(error, "msg", None)
        key = key or _unresolvable(config) or "configuration"
        reason = re.sub(
            r"^\w+ raised while resolving interpolation: ", "", str(reason or error).splitlines()[0]
        )
        raise InputError(str(key), reason.strip('"')) from None
    _check_mandatory(checked)
    check_callbacks(checked.callbacks, checked.trainer.accelerator)
    check_values(checked)
    return checked


def _merged(config: DictConfig) -> DictConfig:
    """Return a configuration with the schema's types and defaults; ``trainer`` keeps all that it has."""
    schema = OmegaConf.structured(Config)
    more = [str(name) for name in config.get("trainer") or {} if name not in list(schema.trainer)]
    typed = OmegaConf.create(config)  # a copy
    with open_dict(typed):
        taken = {name: typed.trainer.pop(name) for name in more}
    merged = OmegaConf.merge(schema, typed)
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged.trainer, False)
    for name, value in taken.items():
        merged.trainer[name] = value
    return merged


def chosen_methods(methods: Any, places: SearchPath) -> DictConfig:
    """Return the settings of the methods that run: those chosen, or all.

    Settings of a method that is not chosen (``methods.exact.damping=10x`` alone) change it among all.

    Raises:
        InputError: settings of a method that there is not, or that does not run.
    """
    chosen = {name: node for name, node in methods.items() if "_target_" in (node or {})}
    there = places.files("method")
    known = chosen or own_methods(all_methods(there.values()))
    for name in methods:
        if name not in known:
            if name in there:
                running = list(map(str, known))
                both = f"+method=[{','.join([*running, str(name)])}] runs it too"
                raise InputError(f"methods.{name}", f"does not run; there are {shortened(running)}; {both}")
            raise InputError(f"methods.{name}", f"no such method; {nearest(str(name), list(there))}")
    merged = OmegaConf.merge(known, methods)
    assert isinstance(merged, DictConfig)
    return merged


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain containers."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def _check_keys(schema: DictConfig, config: DictConfig, prefix: str) -> None:
    if prefix == "trainer.":
        check_trainer(config, tuple(map(str, schema)))
    for key in map(str, config):
        full = f"{prefix}{key}"
        if prefix == "trainer." and key not in list(schema):
            continue
        if key not in list(schema):  # `in` alone is false for values that must be given
            raise InputError(full, f"unknown key; {nearest(key, [str(k) for k in schema])}")
        known, given = schema._get_node(key), config._get_node(key)
        typed = OmegaConf.is_dict(known) and known._metadata.object_type not in (dict, None)  # type: ignore[union-attr]
        if typed and isinstance(known, DictConfig):
            if not isinstance(given, DictConfig):
                raise InputError(full, f"expected a group of settings but got {given}")
            _check_keys(known, given, f"{full}.")


def _make_lists(schema: DictConfig, config: DictConfig) -> None:
    """Put single values in lists where lists are expected: ``evaluation.metrics=cosine``."""
    for key in map(str, config):
        if key not in list(schema):  # one of Lightning's arguments
            continue
        known = schema._get_node(key)
        if OmegaConf.is_missing(config, key):
            continue
        if isinstance(known, DictConfig) and isinstance(config[key], DictConfig):
            _make_lists(known, config[key])
        elif isinstance(known, ListConfig) and isinstance(config[key], str | int | float):
            config[key] = [config[key]]


def _unresolvable(node: Any, prefix: str = "") -> str | None:
    """Return the key of the first value whose interpolation fails."""
    if not OmegaConf.is_config(node):
        return None
    for name in range(len(node)) if isinstance(node, ListConfig) else list(node.keys()):
        key = f"{prefix}.{name}" if prefix else str(name)
        try:
            inside = None if OmegaConf.is_missing(node, name) else node[name]
        except OmegaConfBaseException:
            return key
        if (found := _unresolvable(inside, key)) is not None:
            return found
    return None


def _check_mandatory(config: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(missing[0], "must be given")
