"""The check that a run ends with: ``until=check``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from fimo.app.plan import Plan
from fimo.checking.check import check
from fimo.checking.verdict import Verdict
from fimo.data.datamodule import InstancesModule
from fimo.errors import CheckFailedError
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)


def check_run(
    final_model: FinalModel,
    data: InstancesModule,
    plan: Plan,
    methods: Mapping[str, AttributionMethod],
    device: torch.device,
    run_dir: Path,
) -> None:
    """Check what a run would measure, print the lines and write ``check.json``.

    Raises:
        CheckFailedError: a line fails.
    """
    log.info("checking, which takes about a minute at most")
    found = check(
        final_model,
        data.train,
        data.test[plan.test],
        plan.protocol,
        plan.seeds,
        plan.left_out,
        methods=methods,
        subtract_mean=plan.subtract_mean,
        device=device,
    )
    found.save(run_dir / "check.json")
    print(found)
    if not found.passed:
        names = [line.name for line in found if line.verdict == Verdict.FAIL]
        raise CheckFailedError(f"{', '.join(names)}: see {run_dir / 'check.json'}")
