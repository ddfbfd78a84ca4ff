"""Which sweep a run's folder is a job of, as Hydra wrote it down."""

from __future__ import annotations

from pathlib import Path


def sweep_job(run_dir: Path) -> tuple[str | None, list[str]]:
    """Return the sweep a job belongs to (None for a single run) and its overrides."""
    path = run_dir / ".hydra" / "hydra.yaml"
    if not path.exists():
        return None, []
    from omegaconf import OmegaConf

    hydra = OmegaConf.load(path).hydra
    sweep = None
    if str(hydra.mode).endswith("MULTIRUN"):
        sweep = Path(str(OmegaConf.to_container(hydra.sweep, resolve=False)["dir"])).name  # type: ignore[index,call-overload]
        if "$" in sweep:  # the folder's name holds the time, which only the job's own folder tells
            sweep = run_dir.resolve().parent.name
    return sweep, [str(o) for o in hydra.overrides.task]
