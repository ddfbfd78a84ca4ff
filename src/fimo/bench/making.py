"""Making gold standards: one final model of a setting after another, then the setting's card."""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from fimo.app.effects import with_rows
from fimo.app.environment import versions
from fimo.app.plan import part
from fimo.bench.card import write_card
from fimo.bench.gold_standard import ABOUT, CARD, FINAL_MODEL, SENSITIVITY
from fimo.bench.settings import Setting, identity
from fimo.bench.trained import Trained
from fimo.cost import Cost, measured
from fimo.errors import InputError
from fimo.evaluation.ceiling import noise_ceilings
from fimo.evaluation.metrics import DEFAULT
from fimo.further_training.sensitivity import Sensitivity, check_finite
from fimo.store.files import written_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """Where gold standards are made, and how much of them.

    Args:
        folder: of the settings.
        store: what a killed run goes on from.
        models: final models of each setting.
        scale: of seeds, left-out and test instances and epochs.
    """

    folder: Path
    store: Path
    models: int
    scale: float = 1.0


def make(settings: Sequence[Setting], making: Making, shard: str | None = None) -> dict[str, str]:
    """Make gold standards that are not there yet; processes with the same store share the work.

    Args:
        shard: ``k/n`` makes the k-th of n parts of the final models.

    Returns:
        why settings were left out, by name: their data, or a GPU, are not here.

    Raises:
        InputError: naming ``--shard``; or no setting could be made.
    """
    k, n = (0, 1) if shard is None else part(shard, "--shard")
    left_out: dict[str, str] = {}
    units = [(setting, seed) for setting in settings for seed in range(making.models)]
    for setting, seed in units[k::n]:
        if setting.name in left_out:
            continue
        try:
            if make_final_model(setting, seed, making):
                finish(setting, making)
        except InputError as error:  # the other settings go on
            left_out[setting.name] = str(error)
            log.warning("%s is left out: %s", setting.name, error)
    if left_out and len(left_out) == len({setting.name for setting, _ in units[k::n]}):
        raise InputError("setting", f"nothing was made: {'; '.join(left_out.values())}")
    return left_out


def finish(setting: Setting, making: Making) -> None:
    """Write a setting's card once all its final models are there."""
    folder = making.folder / setting.name
    if all((folder / f"{FINAL_MODEL}{seed}" / ABOUT).exists() for seed in range(making.models)):
        write_card(folder, setting.name, setting.about)


def make_final_model(setting: Setting, seed: int, making: Making) -> bool:
    """Train one final model of a setting and measure its sensitivities, unless they are there.

    Returns:
        whether the setting's card must be written: something was made, or there is none.

    Raises:
        InputError: naming the key of the setting at fault, or ``--folder`` where there are others.
    """
    folder = making.folder / setting.name / f"{FINAL_MODEL}{seed}"
    config = setting.config(seed, making.store, making.scale)
    if (folder / ABOUT).exists():
        check_same(folder, identity(config))
        return not (folder.parent / CARD).exists()
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError("trainer.accelerator", "it is for a GPU, and none is here")
    began = time.monotonic()
    trained = Trained.of(copy.deepcopy(config))  # which gets numbers where it says auto
    with measured("further_training") as cost:
        truth = with_rows(trained.run.gold_standard(cost), trained.run.data)
    check_finite(truth.sensitivity)
    trained.write(folder)
    truth.save(folder / SENSITIVITY)
    about = about_final_model(config, trained, truth, cost)
    with written_aside(folder / ABOUT) as aside:  # last: a folder that has it is complete
        aside.write_text(json.dumps(about, indent=1))
    log.info(
        "%s, final model %d: %.0f s, noise ceiling (cosine) at the end %.3f",
        setting.name, seed, time.monotonic() - began, about["ceilings"]["cosine"]["upper"][-1],
    )  # fmt: skip
    return True


def check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder that was made by another configuration.

    Raises:
        InputError: naming the first key that differs.
    """
    before = flat(json.loads((folder / ABOUT).read_text())["config"])
    now = flat(json.loads(json.dumps(config)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            was, wanted = before.get(key), now.get(key)
            raise InputError("--folder", f"{folder} was made with {key}={was}, not {wanted}; choose another")


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def about_final_model(config: DictConfig, trained: Trained, truth: Sensitivity, cost: Cost) -> dict[str, Any]:
    """Return what is known of a final model and its gold standard, for ``about.json``."""
    plan = trained.run.plan
    steps = plan.protocol.total_steps(len(trained.run.data.train))
    return {
        "seed": config.seed,
        "config": identity(config),
        "data": trained.data,
        "model": trained.model,
        "quality": trained.quality,
        "protocol": asdict(plan.protocol),
        "seeds": plan.seeds,
        "followed_seeds": plan.followed,
        "left_out": len(plan.left_out),
        "test": len(plan.test),
        "step": truth.step.tolist(),
        "epoch": truth.epoch.tolist(),
        "ceilings": ceilings(truth),
        "cost": {
            "steps": steps * len(plan.seeds) * (len(plan.left_out) + 1),
            "gradient_evaluations": cost.gradient_evaluations,
            "seconds": {"final_model": trained.cost.seconds, "further_training": cost.seconds},
        },
        "versions": versions(),
        "machine": machine(trained.run.device),
    }


def ceilings(truth: Sensitivity) -> dict[str, dict[str, list[float]]]:
    """Return the noise ceilings of the mean over all seeds, ``upper`` and ``lower`` ``[E]``, by metric."""
    found: dict[str, dict[str, list[float]]] = {}
    for metric in DEFAULT:
        both = noise_ceilings(truth.raw, metric, truth.subtract_mean, [len(truth.seeds)])
        found[metric] = {"upper": both.upper[:, 0].tolist(), "lower": both.lower[:, 0].tolist()}
    return found


def machine(device: torch.device) -> dict[str, str | int]:
    """Return where this is computed: rounding, and seconds, depend on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "system": platform.platform(),
        "device": name,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Return the processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")  # Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
