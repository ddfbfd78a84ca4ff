"""What an attribution method returns: scores, their standard errors, and what was needed for them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from fimo.errors import InputError, shortened
from fimo.extras import STATIC_FIGURES, require
from fimo.models.measured import Measured
from fimo.store.files import read_as, write_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Access(StrEnum):
    """What a method needs to see (Wei et al., 2025, section 2)."""

    FINAL_MODEL = "FiMO"
    CHECKPOINTS = "CPA"
    TRAINING_ALGORITHM = "TAA"


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Scores of test instances for left-out training instances, as one method computed them.

    Sign: a positive score means that removing the training instance raises what is measured of the test
    instance: its loss, or ``model.measurement``, of which larger values may be better.

    Args:
        values: ``[J, L]``, or ``[E, J, L]`` where the method predicts each amount of further training.
        left_out: ``[L]`` int64, indices into the training set (of groups: their first members).
        method: its name.
        access: what it saw.
        predicts_loss_change: whether values are in units of what is measured (else only their order matters).
        sem: standard errors of ``values`` (same shape); None where they are not known.
        sem_adjusted: the same of ``values`` minus their mean over left-out instances.
        withheld: why standard errors are missing, or NaN in part; empty where that needs no reason.
        step: ``[E]`` int64, optimizer steps of further training, where values have that axis and it is known.
        epoch: ``[E]`` int64, epochs completed or begun at each of these.
        followed: seeds whose runs of further training the method followed.
        gradient_evaluations: gradients of one instance's loss, or products with its Jacobian: the declared
            cost, without that of full runs which are handed over.
        notes: what a reader must know of this computation: choices made and why, convergence, trust.
        groups: ``[L, G]`` int64, members of left-out groups, padded with -1; None for single instances.
        test: ``[J]`` int64, which instances of a larger test set these are, where that is known.
        seconds: wall-clock time of computing them, full runs included; NaN where it wasn't measured.
        test_hash, train_hash, model_hash: of what they are of, where it is known; see
            :class:`fimo.Sensitivity`.
        ranks: for how many places at each end :meth:`top` is right, where others were left out.
        of_themselves: whether test instance k is left-out instance k, so that the diagonal is self-influence.
        measured: what they are changes of, and which direction of it is better; None where it isn't known.

    Raises:
        InputError: shapes that don't fit.
    """

    values: Tensor
    left_out: Tensor
    method: str = ""
    access: Access = Access.FINAL_MODEL
    predicts_loss_change: bool = False
    sem: Tensor | None = None
    sem_adjusted: Tensor | None = None
    withheld: str = ""
    step: Tensor | None = None
    epoch: Tensor | None = None
    followed: tuple[int, ...] = ()
    gradient_evaluations: int = 0
    notes: tuple[str, ...] = ()
    groups: Tensor | None = None
    test: Tensor | None = None
    of_themselves: bool = False
    test_hash: str = ""
    train_hash: str = ""
    model_hash: str = ""
    seconds: float = math.nan
    ranks: int | None = None
    measured: Measured | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if len(shape) not in (2, 3) or shape[-1] != len(self.left_out):
            expected = f"[J, {len(self.left_out)}] or [E, J, {len(self.left_out)}]"
            raise InputError("scores", f"expected the shape {expected} but got {list(shape)}")
        for name in ("sem", "sem_adjusted"):
            bars = getattr(self, name)
            if bars is not None and tuple(bars.shape) != shape:
                raise InputError(name, f"expected the scores' shape {list(shape)} but got {list(bars.shape)}")
        for name in ("step", "epoch"):
            points = getattr(self, name)
            if points is not None and (len(shape) != 3 or len(points) != shape[0]):
                raise InputError(name, f"does not fit scores of shape {list(shape)}")

    def __repr__(self) -> str:
        *points, tests, left_out = self.values.shape
        along = f", at {points[0]} amounts of further training" if points else ""
        return f"Scores({self.method} ({self.access}): {tests} test x {left_out} left-out instances{along})"

    @property
    def last(self) -> Tensor:
        """Values ``[J, L]`` after all further training (where they have that axis)."""
        return self.values[-1] if self.values.ndim == 3 else self.values

    def at_end(self) -> Scores:
        """Return the scores ``[J, L]`` after all further training alone."""
        if self.values.ndim == 2:
            return self
        sem, adjusted = (None if x is None else x[-1] for x in (self.sem, self.sem_adjusted))
        return replace(self, values=self.last, step=None, epoch=None, sem=sem, sem_adjusted=adjusted)

    def bars(self, subtract_mean: bool) -> Tensor | None:
        """Return the standard errors of values as they are judged: adjusted as the sensitivity is.

        Those of raw values stand in where only they are known.
        """
        adjusted = self.sem_adjusted if subtract_mean else None
        return self.sem if adjusted is None else adjusted

    def grouped(self, groups: Sequence[Sequence[int]]) -> Scores:
        """Return the scores of groups of training instances: the sums over their members.

        What members' errors have of their own adds in squares. What all left-out instances share, the part
        of the variance that goes when their mean is subtracted, adds up, and is left in adjusted scores only
        where groups differ in size.

        Args:
            groups: training indices, each among ``left_out``; groups of one select (and order) instances.

        Raises:
            InputError: an index was not left out.
        """
        place = {i: k for k, i in enumerate(self.left_out.tolist())}
        if missing := sorted({i for group in groups for i in group if i not in place}):
            raise InputError(
                "left_out", f"there are no scores of the training instances {shortened(missing)}"
            )
        positions = [[place[i] for i in group] for group in groups]
        left_out, members = stacked(groups)
        chosen: dict[str, Any] = {"left_out": left_out, "groups": members, "of_themselves": False}
        if members is None:
            columns = [p for (p,) in positions]
            for name in ("values", "sem", "sem_adjusted"):
                if (tensor := getattr(self, name)) is not None:
                    chosen[name] = tensor[..., columns] + 0.0  # no negative zeros, as in sums
            return replace(self, **chosen)
        membership = torch.zeros(len(place), len(groups), dtype=self.values.dtype, device=self.values.device)
        for column, group in enumerate(positions):
            membership[group, column] = 1
        chosen["values"] = self.values @ membership
        if self.sem is not None and self.sem_adjusted is not None:
            size = membership.sum(0)
            raw, adjusted = self.sem.square(), self.sem_adjusted.square()
            shared = (raw - adjusted).mean(-1, keepdim=True).clamp(min=0)
            chosen["sem"] = (raw @ membership + shared * (size**2 - size)).sqrt()
            chosen["sem_adjusted"] = (adjusted @ membership + shared * (size - size.mean()) ** 2).sqrt()
        else:
            chosen |= {"sem": None, "sem_adjusted": None}
        return replace(self, **chosen)

    def to(self, device: torch.device | str) -> Scores:
        """Return the same with all tensors on a device."""
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def select(self, columns: Tensor) -> Scores:
        """Return the scores of some left-out instances, by their positions ``[K]`` among the L."""
        parts = {name: getattr(self, name) for name in ("values", "sem", "sem_adjusted")}
        chosen: dict[str, Any] = {
            name: part[..., columns] for name, part in parts.items() if part is not None
        }
        groups = None if self.groups is None else self.groups[columns]
        return replace(self, **chosen, left_out=self.left_out[columns], groups=groups, of_themselves=False)

    def extremes(self, k: int) -> Scores:
        """Return the scores of the training instances that :meth:`top` of up to k names.

        They are among the k highest or lowest of a test instance, or of the mean over test instances.

        Raises:
            InputError: k below 1, or above what these scores hold.
        """
        self._check_rank(k)
        last = self.last
        rows = torch.cat([last.double(), last.double().mean(0, keepdim=True)])
        ends = [rows.argsort(descending=d, stable=True)[:, :k] for d in (True, False)]
        return replace(self.select(torch.cat(ends).unique()), ranks=k)

    def top(self, test: int | None = None, k: int = 10, harmful: bool = False) -> pd.DataFrame:
        """Return the training instances that matter most to a test instance, after all further training.

        Args:
            test: position of the test instance, 0 to J - 1; None for the mean over all.
            k: how many.
            harmful: those that harm most, instead of those that help most. An instance helps where its score
                is positive; where larger values of what is measured are better, as of a probability, where
                it is negative. What isn't known (``measured``) is taken to be a loss.

        Returns:
            ``train,score`` by rank from 1, the largest effect first; ``sem`` too where it is known of one
            test instance.

        Raises:
            InputError: no such test instance, k below 1, or above what :meth:`extremes` left.

        Example:
            >>> scores = Scores(torch.tensor([[0.1, -2.0, 3.0]]), left_out=torch.tensor([4, 5, 6]))
            >>> scores.top(test=0, k=2)["train"].tolist()
            [6, 4]
        """
        self._check_rank(k)
        row = self._row(self.values, test)
        order = row.argsort(descending=(self._better > 0) != harmful, stable=True)[:k]
        table = pd.DataFrame({"train": self.left_out[order].tolist(), "score": row[order].tolist()})
        if self.sem is not None and test is not None:
            table["sem"] = self._row(self.sem, test)[order].tolist()
        return table.set_axis(pd.RangeIndex(1, len(table) + 1, name="rank"))

    def self_influence(self) -> pd.Series:
        """Return each left-out instance's score for its own loss, by training index.

        Instances that the model knows only because they are in its training set have large ones: wrong labels
        and rare cases (Feldman and Zhang, 2020).

        Raises:
            InputError: the test instances are others than the left-out ones.

        Example:
            >>> own = Scores(torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.tensor([0, 1]), of_themselves=True)
            >>> own.self_influence().tolist()
            [1.0, 2.0]
        """
        if not self.of_themselves:
            raise InputError(
                "scores",
                "are of other test instances; fimo.attribute(model, train, train, ...) has their own",
            )
        index = pd.Index(self.left_out.tolist(), name="train")
        return pd.Series(self.last.diagonal().tolist(), index, name="score")

    def to_frame(self) -> pd.DataFrame:
        """Return all scores in rows: ``test,train,score``; ``step``, ``epoch``, ``sem`` where known."""
        values = self.values if self.values.ndim == 3 else self.values[None]
        points, tests, left_out = values.shape
        columns: dict[str, Any] = {}
        for name in ("step", "epoch"):
            if (known := getattr(self, name)) is not None:
                columns[name] = known.repeat_interleave(tests * left_out).tolist()
        columns["test"] = torch.arange(tests).repeat_interleave(left_out).repeat(points).tolist()
        columns["train"] = self.left_out.repeat(points * tests).tolist()
        columns["score"] = values.flatten().tolist()
        if self.sem is not None:
            columns["sem"] = self.sem.flatten().tolist()
        return pd.DataFrame(columns)

    def plot(self, test: int | None = None, k: int = 10) -> Figure:
        """Draw the k most helpful and the k most harmful training instances of a test instance.

        Args:
            test, k: as for :meth:`top`.

        Returns:
            A matplotlib figure, which a notebook shows; error bars are standard errors.

        Raises:
            InputError: as :meth:`top`; or matplotlib is not installed.
        """
        require("plot", STATIC_FIGURES)
        count = len(self.left_out)
        k = k if self.ranks is None else min(k, self.ranks)
        helpful = self.top(test, min(k, -(-count // 2)))
        harmful = self.top(test, min(k, max(1, count // 2)), harmful=True)[::-1] if count > 1 else helpful[:0]
        table = pd.concat([helpful, harmful])
        figure = _figure(figsize=(6, 1.2 + 0.22 * len(table)), layout="constrained")
        axes = figure.add_subplot()
        colours = ["tab:blue" if self._better * score > 0 else "tab:red" for score in table["score"]]
        axes.barh(range(len(table)), table["score"], xerr=table.get("sem"), color=colours, ecolor="0.4")
        axes.set_yticks(range(len(table)), [f"#{i}" for i in table["train"]])
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4), useMathText=True)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_ylabel("training instance")
        name = "what is measured" if self.measured is None else f"the test {self.measured.name}"
        unit = f"change of {name} when removed" if self.predicts_loss_change else "score"
        said = f"{name} rises without the instance"
        if self.measured is not None and self.measured.known:
            said = f"the instance {self.measured.positive}"
        axes.set_xlabel(f"{unit}\n(positive: {said})")  # beside the axis's power of ten
        of = "mean over test instances" if test is None else f"test instance {test}"
        axes.set_title(f"{self.method or 'scores'}: {of}")
        return figure

    @property
    def _better(self) -> int:
        """The sign of scores of instances that help."""
        return 1 if self.measured is None else self.measured.better

    def _check_rank(self, k: int) -> None:
        if k < 1:
            raise InputError("k", f"expected at least 1 but got {k}")
        if self.ranks is not None and k > self.ranks:
            raise InputError("k", f"these scores were made with extremes={self.ranks}; expected at most that")

    def _row(self, values: Tensor, test: int | None) -> Tensor:
        """Return ``[L]`` of one test instance, or of the mean over all, after all further training."""
        last = (values[-1] if values.ndim == 3 else values).double()
        if test is None:
            return last.mean(0)
        if isinstance(test, bool | str) or not 0 <= int(test) < len(last):
            raise InputError("test", f"expected 0 to {len(last) - 1} but got {test}")
        return last[int(test)]

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: ``scores``, ``left_out`` and what else is known, the rest as metadata."""
        tensors = {name: getattr(self, field) for name, field in TENSORS.items()}
        tensors["followed_seeds"] = torch.tensor(self.followed) if self.followed else None
        rest = {name: getattr(self, name) for name in METADATA}
        if self.measured is not None:
            rest["measured"] = asdict(self.measured)
        # as one entry, since safetensors writes several in any order
        fields = {"fields": json.dumps(rest)}
        write_tensors(Path(path), {k: v for k, v in tensors.items() if v is not None}, fields)

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """Read what :meth:`save` wrote, or a file with ``scores`` and ``left_out`` alone.

        Raises:
            InputError: the file holds no scores.
        """
        tensors, metadata = read_as(Path(path), "scores", "left_out")
        rest = json.loads(metadata.get("fields", "{}"))
        fields: dict[str, Any] = {field: tensors.get(name) for name, field in TENSORS.items()}
        followed = tensors.get("followed_seeds", torch.tensor([])).long()
        rest["notes"] = tuple(rest.get("notes", ()))
        rest["access"] = Access(rest.get("access", Access.FINAL_MODEL))
        if "measured" in rest:
            rest["measured"] = Measured(**rest["measured"])
        return cls(**fields, followed=tuple(followed.tolist()), **rest)


def stacked(groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Return groups' first members ``[L]``, and all ``[L, G]`` padded with -1; None where each has one."""
    width = max(len(group) for group in groups)
    members = torch.tensor([[*group, *[-1] * (width - len(group))] for group in groups])
    return members[:, 0].clone(), members if width > 1 else None


TENSORS = {
    "scores": "values",
    **{name: name for name in ("left_out", "test", "sem", "sem_adjusted", "step", "epoch", "groups")},
}
"""Of a file of scores: the field that each of its tensors holds."""

METADATA = (
    "method",
    "test_hash",
    "train_hash",
    "model_hash",
    "access",
    "predicts_loss_change",
    "withheld",
    "gradient_evaluations",
    "notes",
    "of_themselves",
    "ranks",
    "seconds",
)
"""Fields that are kept beside them, as JSON."""


def _figure(**arguments: Any) -> Figure:
    """Return a matplotlib figure that notebooks show, without being asked to."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=100)
            return picture.getvalue()

    return Shown(**arguments)
