"""What methods share that project training gradients to rows: held in memory, or kept for all runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.projected_gradients import (
    Project,
    ProjectedGradients,
    kept_files,
    kept_key,
    kept_tensor,
    projected_gradients,
)
from fimo.curvature.search import extremes
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.gradient import STORAGE, GradientMethod
from fimo.models.final_model import FinalModel
from fimo.store.fingerprint import Key
from fimo.validation.admission import admit


@dataclass(frozen=True)
class Projected:
    """How a final model's training gradients become rows.

    Args:
        project: computes those of some instances, in the final model's dtype.
        width: K, entries of a row.
        kind: of gradients and projection, in a word.
        settings: all that they depend on besides the final model, its loss and the training instances.
        code: the modules that compute them.
    """

    project: Project
    width: int
    kind: str
    settings: Mapping[str, Any]
    code: tuple[str, ...]


class ProjectedRowsMethod(GradientMethod):
    """A method of projected training gradients, one row ``[K]`` for each instance at each checkpoint.

    They are the same for all test instances. With ``cache``, each checkpoint's are kept in files whose folder
    is named by all that they depend on: what is there is read, by any run or method setting that needs the
    same, and a run that was killed goes on after the last whole file.

    Args:
        memory_mb: see :class:`~fimo.methods.gradient.GradientMethod`.
        storage: type in which rows are held or kept; the model's when None.
        cache: a folder that keeps them.
    """

    def gradients(self, final_model: FinalModel) -> InstanceGradients:
        return InstanceGradients(final_model, self.memory_mb)  # what is kept is projected

    def models(self, final_model: FinalModel) -> Iterator[FinalModel]:
        """Yield the model at each checkpoint that rows are made at."""
        yield final_model

    @abstractmethod
    def projected(self, gradients: InstanceGradients, train: Instances, checkpoint: int) -> Projected:
        """Return how training gradients at a checkpoint become rows; nothing long is computed yet.

        Args:
            gradients: of the model at the checkpoint.
            checkpoint: its number, from 0.
        """

    def rows(
        self, gradients: InstanceGradients, train: Instances, projected: Projected
    ) -> ProjectedGradients:
        """Return the rows of all training instances; those that are not kept are made."""
        return projected_gradients(
            train, projected.project, projected.width, self._kept_dtype(gradients.final_model),
            gradients.memory, self._folder, self._key(gradients.final_model, train, projected),
        )  # fmt: skip

    def keep(self, final_model: FinalModel, train: Any, part: tuple[int, int] = (0, 1)) -> int:
        """Make the projected training gradients in ``cache`` that are missing, and nothing else.

        Several processes with one folder share the work by themselves. Machines without a common folder make
        parts; the folders' files, copied together, are the bytes that one would have made.

        Args:
            train: all N training instances, in any form of :func:`fimo.data.conversion.to_instances`.
            part: (k, n): the k-th of n parts of the files, k from 0.

        Returns:
            How many were made now: one of each instance and checkpoint where none was there.

        Raises:
            InputError: no ``cache``, no such part, or what can't be kept.
        """
        if self._folder is None:
            raise InputError("cache", "expected a folder that keeps projected gradients but got null")
        k, n = part
        if not 0 <= k < n:
            raise InputError("part", f"expected (k, n) with k from 0 to n - 1 but got {part}")
        train, _ = admit(final_model, train)
        total = 0
        for checkpoint, model in enumerate(self.models(final_model)):
            projected = self.projected(self.gradients(model), train, checkpoint)
            files, made = kept_files(
                train, projected.project, projected.width, self._kept_dtype(model),
                self._folder, self._key(model, train, projected), part,
            )  # fmt: skip
            if files is None:
                raise InputError("cache", "nothing can be kept of a network or a loss without a description")
            total += made
        return total

    def kept(
        self,
        gradients: InstanceGradients,
        train: Instances,
        kind: str,
        settings: Mapping[str, Any],
        code: tuple[str, ...],
        make: Callable[[], Tensor],
    ) -> Tensor:
        """Return a tensor of all training gradients that rows depend on, kept in ``cache`` beside them."""
        key = kept_key(gradients.final_model, train, kind, settings, gradients.dtype, code)
        return kept_tensor(self._folder, key, make, gradients.device)

    def at_the_ends(
        self,
        problem: AttributionProblem,
        queries: Tensor,
        blocks: Iterator[tuple[Tensor, Tensor]],
        k: int,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> AttributionProblem:
        """Return the same problem of the left-out instances at the ends of a test instance's order alone.

        Args:
            queries: ``[J, K]``, whose products with rows are the scores; their mean is a query, too.
            blocks, scale: of the left-out instances, see :func:`~fimo.curvature.search.extremes`.
            k: how many at each end.
        """
        found = extremes(torch.cat([queries, queries.mean(0, keepdim=True)]), blocks, k, scale)
        at = torch.cat([found.highest_at, found.lowest_at]).unique().cpu()
        return replace(problem, left_out=problem.index[at])

    def _key(self, final_model: FinalModel, train: Instances, projected: Projected) -> Callable[[], Key]:
        dtype = self._kept_dtype(final_model)
        return kept_key(final_model, train, projected.kind, projected.settings, dtype, projected.code)

    @property
    def _folder(self) -> Path | None:
        return None if self.cache is None else Path(self.cache)

    def _kept_dtype(self, final_model: FinalModel) -> torch.dtype:
        return STORAGE[self.storage] if self.storage else next(iter(final_model.parameters().values())).dtype


def side_by_side(
    several: Sequence[ProjectedGradients], index: Tensor | None, factor: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of C checkpoints as one ``[m, C K]`` of each training instance, with their lengths.

    Args:
        several: whose rows come in equal blocks.
        index: of which training instances; None for all.
        factor: of each one's row, in the same order; ones when None.
    """
    start = 0
    for blocks in zip(*(each.chosen(index) for each in several), strict=True):
        rows, lengths = blocks[0]
        if len(blocks) > 1:
            rows = torch.cat([some for some, _ in blocks], 1)
            lengths = rows.float().norm(dim=1)
        if factor is not None:
            some = factor[start : start + len(rows)].float()
            rows, lengths = rows.float() * some[:, None], lengths * some.abs()
            start += len(rows)
        yield rows, lengths
