"""The audit: which of all training rows matter, surely, and what to do about them."""

from fimo.audit.result import Audit

__all__ = ["Audit"]
