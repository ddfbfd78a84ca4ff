"""Which methods can be used where."""

from __future__ import annotations

import typing

from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.models.final_model import FinalModel


class Method(typing.Protocol):
    """What is asked of a method."""

    @property
    def follows_further_training(self) -> bool: ...

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None: ...


def why_not(method: Method, final_model: FinalModel, train: Instances, protocol: Protocol) -> str | None:
    """Return why a method can't run on this model, data and further training, or None; it is cheap."""
    return method.inapplicable(final_model, train) or unfollowable(method, protocol)


def unfollowable(method: Method, protocol: Protocol) -> str | None:
    """Return why a method that follows further training can't follow this one, or None.

    All that do differentiate its steps, follow them linearly or count them as time.
    """
    return protocol.update_rule.underivable if method.follows_further_training else None
