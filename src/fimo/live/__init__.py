"""What a run says while it runs: metrics, tables and files, to any Lightning loggers."""

from fimo.live.log import Log
from fimo.live.outlet import Outlet

__all__ = ["Log", "Outlet"]
