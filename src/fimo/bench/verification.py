"""Computing a sample of gold standards again: are they what they say they are?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from fimo.bench.gold_standard import SENSITIVITY, GoldStandard, file_hashes
from fimo.bench.making import check_same
from fimo.bench.settings import Setting, identity
from fimo.bench.trained import Trained
from fimo.further_training import further_train
from fimo.store.files import read_tensors

ROUNDING = 1e-3
"""Largest difference that is taken for rounding, relative to the root mean square of the same values. Runs in
float32 on processors that add up in another order stay an order of magnitude below it; a run with another
batch, instance or learning rate is far above."""


class Verdict(StrEnum):
    """What a comparison found."""

    SAME = "same bytes"
    ROUNDING = "rounding"
    DIFFERENT = "DIFFERENT"


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Args:
        what: was compared.
        found: how that ended.
        details: where and by how much it differs.
    """

    what: str
    found: Verdict
    details: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.found}{f' ({self.details})' if self.details else ''}"


@dataclass(frozen=True)
class Sample:
    """How much is computed again, drawn at random.

    Args:
        left_out: instances, or groups of them.
        seeds: of further training.
        final_models: of each setting.
        draw: seed of the draw.
    """

    left_out: int = 3
    seeds: int = 2
    final_models: int = 1
    draw: int = 0

    def of(self, count: int, total: int, generator: torch.Generator) -> list[int]:
        """Return ``count`` of ``total`` positions, in order."""
        return torch.randperm(total, generator=generator)[:count].sort().values.tolist()


def verify(gold: GoldStandard, sample: Sample) -> Iterator[Finding]:
    """Compare a setting's files with its card, and a sample of its runs with runs that are made now."""
    yield files(gold)
    generator = torch.Generator().manual_seed(sample.draw)
    for k in sample.of(sample.final_models, len(gold), generator):
        one = gold[k]
        truth = one.truth
        seeds = sample.of(sample.seeds, len(truth.seeds), generator)
        units = sample.of(sample.left_out, len(truth.left_out), generator)
        members = truth.left_out[:, None] if truth.groups is None else truth.groups
        again = further_train(
            one.final_model(), one.train, one.test, one.protocol, truth.seeds[seeds].tolist(),
            [[i for i in members[u].tolist() if i >= 0] for u in units],
            trainer={"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        )  # fmt: skip
        axes = {
            "seed": truth.seeds[seeds].tolist(), "step": truth.step.tolist(),
            "test instance": truth.test.tolist(), "left-out instance": truth.left_out[units].tolist(),
        }  # fmt: skip
        name = f"{one.folder.name}, {len(seeds)} seeds without {len(units)} instances"
        yield compared(name, truth.raw[seeds][..., units], again.raw, axes)
        stored = read_tensors(one.folder / SENSITIVITY)["sensitivity"]
        yield compared(f"{one.folder.name}, mean over seeds", stored, truth.sensitivity)


def verify_source(gold: GoldStandard, setting: Setting, final_model: int = 0) -> Iterator[Finding]:
    """Compare data and a final model with those that are read and trained now.

    Args:
        setting: of the same name, as it is configured here.
        final_model: position of the one that is trained again.

    Raises:
        InputError: the data are not here, or the setting is configured in another way.
    """
    one = gold[final_model]
    with tempfile.TemporaryDirectory() as store:
        config = setting.config(one.about["seed"], Path(store), one.about["config"]["scale"])
        check_same(one.folder, identity(config))
        trained = Trained.of(config)
    data = trained.run.data
    test = data.test[trained.run.plan.test]
    yield together("training instances, read again", one.train.tensors(), data.train.tensors())
    yield together("test instances, read again", one.test.tensors(), test.tensors())
    state = trained.run.final_model.state()
    yield together(f"{one.folder.name}, trained again", one.parameters, state)


def files(gold: GoldStandard) -> Finding:
    """Return whether the files are those that the card lists."""
    listed, there = gold.card["files"], file_hashes(gold.folder)
    wrong = [f"{name} is missing" for name in listed if name not in there]
    wrong += [f"{name} is not on the card" for name in there if name not in listed]
    wrong += [f"{name} was changed" for name in listed if name in there and listed[name] != there[name]]
    return Finding(f"{len(listed)} files", Verdict.DIFFERENT if wrong else Verdict.SAME, "; ".join(wrong))


def together(what: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Finding:
    """Compare tensors of the same names; what is found is the worst of them."""
    if before.keys() != now.keys():
        return Finding(what, Verdict.DIFFERENT, f"{', '.join(before)}, now {', '.join(now)}")
    found = [compared(name, tensor, now[name]) for name, tensor in before.items()]
    worst = max(found, key=lambda finding: list(Verdict).index(finding.found))
    same = worst.found == Verdict.SAME
    return Finding(what, worst.found, "" if same else f"{worst.what}: {worst.details}")


def compared(
    what: str, before: Tensor, now: Tensor, axes: Mapping[str, Sequence[int]] | None = None
) -> Finding:
    """Compare two tensors byte by byte, and where they differ by value.

    Args:
        axes: names of the axes with what stands at each position, for the first difference.
    """
    if before.shape != now.shape or before.dtype != now.dtype:
        kinds = f"{list(before.shape)} {before.dtype}, now {list(now.shape)} {now.dtype}"
        return Finding(what, Verdict.DIFFERENT, kinds)
    if before.numpy().tobytes() == now.numpy().tobytes():
        return Finding(what, Verdict.SAME)
    difference = (before.double() - now.double()).abs()
    scale = float(before.double().square().mean().sqrt())
    largest = float(difference.max()) / scale if scale else float("inf")
    share = float((difference > 0).double().mean())
    details = (
        f"{share:.1%} of {before.numel():,} values differ, by at most {largest:.1g} of their root mean square"
    )
    if largest <= ROUNDING:
        return Finding(what, Verdict.ROUNDING, details)
    place = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    names = [f"{name} {values[i]}" for (name, values), i in zip((axes or {}).items(), place, strict=False)]
    where = ", ".join(names) if names else f"position {place}"
    value = f"{float(before[tuple(place)]):.6g}, now {float(now[tuple(place)]):.6g}"
    return Finding(what, Verdict.DIFFERENT, f"{details}; most at {where}: {value}")
