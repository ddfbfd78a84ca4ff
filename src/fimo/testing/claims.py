"""Claims that hold for every attribution method, and a function that tries them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.api import followed, further_train
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError, reason
from fimo.methods.base import AttributionMethod
from fimo.methods.catalogue import method_of
from fimo.models.copied import duplicate
from fimo.models.final_model import FinalModel
from fimo.models.losses import mean_squared_error
from fimo.scores import Scores
from fimo.testing.cases import CASES, Case

if TYPE_CHECKING:
    from fimo.further_training.sensitivity import Sensitivity
    from fimo.methods.catalogue import Method

PROTOCOL = Protocol(optimizer="sgd", lr=0.05, batch_size=8, epochs=2, leave_out="mask", dtype="float64")
"""The further training that methods are given which follow one."""

SEEDS = (0, 1)

Claim = Callable[["Trial"], str | None]
"""Returns what is wrong, or None."""


@dataclass(frozen=True)
class Trial:
    """A method on a case, with the scores that it gave once."""

    method: AttributionMethod
    case: Case
    scores: Scores

    def again(
        self,
        case: Case | None = None,
        left_out: Sequence[int] | None = None,
        method: AttributionMethod | None = None,
    ) -> Tensor:
        """Return the method's scores with something changed."""
        return attributed(method or self.method, case or self.case, left_out).values

    @property
    def follows_seeds(self) -> bool:
        """Whether scores depend on the order of the training set, through its batches."""
        return self.method.follows_seeds


@dataclass(frozen=True)
class MethodCheck:
    """What became of each claim on each case.

    Args:
        table: ``method,case,claim,passed,detail``; a claim that does not apply is missing.
    """

    table: pd.DataFrame

    @property
    def passed(self) -> bool:
        """Whether no claim failed."""
        return bool(self.table["passed"].all())

    @property
    def failures(self) -> list[str]:
        """One line for each claim that failed."""
        failed = self.table[~self.table["passed"]]
        return [f"{row.claim} ({row.case}): {row.detail}" for row in failed.itertuples()]


def check_method(
    method: Method,
    cases: Collection[str] | None = None,
    skip: Collection[str] = (),
    strict: bool = True,
) -> MethodCheck:
    """Try the claims that hold for every attribution method on small cases.

    Cases to which the method says that it does not apply (``inapplicable``) are left out.

    Args:
        method: an object, a class, or a name.
        cases: names of :data:`~fimo.testing.CASES`; all when None.
        skip: claims (see :data:`~fimo.testing.CLAIMS`) that are no claims of this method: ``sign`` of a
            baseline, say.

    Returns:
        A row for each claim and case.

    Raises:
        AssertionError: claims that fail, one in a line.
        InputError: no such case or claim, or the method applies to none of the cases.

    Example:
        >>> check_method("graddot", cases=["mlp_regression"]).passed
        True
    """
    name, chosen = method_of(method, {})
    for given, known, key in ((cases or (), CASES, "cases"), (skip, CLAIMS, "skip")):
        if unknown := [g for g in given if g not in known]:
            raise InputError(key, f"there is no {unknown[0]!r}; there are {', '.join(known)}")
    rows, reasons = [], []
    for case_name in cases or CASES:
        case = CASES[case_name]()
        if (why := chosen.inapplicable(case.final_model, case.train)) is not None:
            reasons.append(f"{case_name}: {why}")
            continue
        for claim, detail in _tried(chosen, case, skip):
            rows.append((name, case_name, claim, detail is None, detail or ""))
    if not rows:
        raise InputError("method", f"{name} applies to none of the cases ({'; '.join(reasons)})")
    found = MethodCheck(pd.DataFrame(rows, columns=["method", "case", "claim", "passed", "detail"]))
    if strict and not found.passed:
        raise AssertionError("\n".join([f"{name} fails {len(found.failures)} claims:", *found.failures]))
    return found


def attributed(method: AttributionMethod, case: Case, left_out: Sequence[int] | None = None) -> Scores:
    """Return a method's scores on a case, with torch's generator in a known state."""
    given = (
        followed(case.final_model, case.train, PROTOCOL, SEEDS) if method.follows_further_training else None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return method.attribute(case.final_model, case.train, case.test, left_out, given)


def _tried(method: AttributionMethod, case: Case, skip: Collection[str]) -> Iterator[tuple[str, str | None]]:
    try:
        trial = Trial(method, case, attributed(method, case))
    except Exception as error:  # whatever a user's method raises
        yield "runs", reason(error)
        return
    yield "runs", None
    for name, claim in CLAIMS.items():
        if name in skip:
            continue
        try:
            yield name, claim(trial)
        except Exception as error:
            yield name, reason(error)


# the claims


def shape(trial: Trial) -> str | None:
    """Scores are finite, one for each test and training instance, in the final model's dtype."""
    values, case = trial.scores.values, trial.case
    points = [len(PROTOCOL.evaluation_steps(len(case.train), len(case.train)))]
    expected = [*points * trial.method.follows_further_training, len(case.test), len(case.train)]
    if list(values.shape) != expected:
        return f"shape {list(values.shape)}, expected {expected}"
    if values.dtype != torch.float64:
        return f"{values.dtype} for a model in float64"
    return None if values.isfinite().all() else "some are not finite"


def columns(trial: Trial) -> str | None:
    """Asked for some training instances, their scores are those columns of all."""
    chosen = [7, 2, 11]
    return _differ(trial.again(left_out=chosen), trial.scores.values[..., chosen], trial)


def training_order(trial: Trial) -> str | None:
    """The order of the training set changes nothing but the order of the scores."""
    if trial.follows_seeds:
        return None
    order = torch.randperm(len(trial.case.train), generator=torch.Generator().manual_seed(0))
    other = _with(trial.case, train=trial.case.train[order])
    return _differ(trial.again(other), trial.scores.values[..., order], trial)


def test_order(trial: Trial) -> str | None:
    """Test instances don't depend on one another."""
    order = torch.arange(len(trial.case.test) - 1, -1, -1)
    other = _with(trial.case, test=trial.case.test[order])
    return _differ(trial.again(other), trial.scores.values[..., order, :], trial)


def repeat(trial: Trial) -> str | None:
    """The same object, asked again, gives the same to the bit: nothing of one call is left for the next."""
    trial.again(_with(trial.case, train=trial.case.train[:-1]))
    return None if torch.equal(trial.again(), trial.scores.values) else "other scores the second time"


def twins(trial: Trial) -> str | None:
    """An instance that the training set has twice has one score."""
    if trial.follows_seeds:
        return None
    train, n = trial.case.train, len(trial.case.train)
    doubled = trial.again(_with(trial.case, train=train[[*range(n), 3]]))
    return _differ(doubled[..., 3], doubled[..., n], trial)


def unchanged(trial: Trial) -> str | None:
    """Nothing of the user's is changed: the network, its mode and flags, the instances, torch's settings."""
    case = trial.case
    network = duplicate(case.final_model.network).train()
    model = FinalModel(network, case.final_model.loss, accept_poor=True)
    watched = {**_tensors(case), **{f"network.{k}": v for k, v in network.state_dict().items()}}
    watched |= {f"final_model.{k}": v for k, v in model.state().items()}
    before = {k: v.clone() for k, v in watched.items()}
    flags = [p.requires_grad for p in network.parameters()]
    settings = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    attributed(trial.method, Case(case.name, model, case.train, case.test))
    for name, tensor in watched.items():
        if not torch.equal(tensor, before[name]):
            return f"{name} is another now"
    if not network.training or model.network.training:
        return "the network is in another mode now"
    if flags != [p.requires_grad for p in network.parameters()]:
        return "requires_grad is another now"
    hooked = [n for n, m in model.network.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        return f"hooks are left on {hooked[0] or 'the network'}"
    now = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    return None if now == settings else f"torch's settings are {now} now, were {settings}"


def dtype(trial: Trial) -> str | None:
    """In float32 the scores are in float32, and the same up to rounding."""
    single = trial.again(trial.case.to(torch.float32))
    if single.dtype != torch.float32:
        return f"{single.dtype} for a model in float32"
    alike = _cosine(single, trial.scores.values)
    return None if alike > 0.999 else f"a cosine of {alike:.4f} with those in float64"


def device(trial: Trial) -> str | None:
    """On an accelerator, where there is one, the scores are there, and the same up to rounding."""
    if not torch.cuda.is_available():
        return None
    case = trial.case
    there = trial.again(
        Case(case.name, case.final_model.to("cuda"), case.train.to("cuda"), case.test.to("cuda"))
    )
    if there.device.type != "cuda":
        return f"scores on {there.device} for a model on cuda"
    alike = _cosine(there.cpu(), trial.scores.values)
    return None if alike > 0.999 else f"a cosine of {alike:.4f} with those on the CPU"


def scale(trial: Trial) -> str | None:
    """What is explained may be in any unit: a multiple of it turns no score around."""
    case, loss = trial.case, trial.case.final_model.loss

    def scores_of(multiple: float) -> Tensor:
        model = FinalModel(
            case.final_model.network, loss, lambda outputs, targets: multiple * loss(outputs, targets)
        )
        if trial.method.inapplicable(model, case.train) is not None:
            return torch.ones(1)
        return trial.again(Case(case.name, model, case.train, case.test))

    alike = _cosine(scores_of(1.0), scores_of(4.0))
    return None if alike > 0.999 else f"a cosine of {alike:.3f} between scores of a loss and of 4 times it"


def sign(trial: Trial) -> str | None:
    """Scores are positive where further training without the instance ends with a higher test loss.

    Tried where the answer is plain: a linear model, measured.
    """
    case, truth = _linear(), _truth()
    if trial.method.inapplicable(case.final_model, case.train) is not None:
        return None
    found = trial.again(case)
    alike = _cosine(found[-1] if found.ndim == 3 else found, truth.raw.mean(0)[-1])
    return None if alike > 0.2 else f"a cosine of {alike:.3f} with measured effects"


def unit(trial: Trial) -> str | None:
    """Scores that are said to be in units of test loss, and follow further training, are of its size."""
    if not (trial.method.predicts_loss_change and trial.method.follows_further_training):
        return None
    case, truth = _linear(), _truth()
    if trial.method.inapplicable(case.final_model, case.train) is not None:
        return None
    found, wanted = trial.again(case)[-1].double(), truth.raw.mean(0)[-1].double()
    slope = float((found * wanted).sum() / found.square().sum())
    return None if 0.5 < slope < 2 else f"measured effects are {slope:.2g} times the scores"


ALL: tuple[Claim, ...] = (
    shape, columns, training_order, test_order, repeat, twins, unchanged, dtype, device, scale, sign, unit,
)  # fmt: skip
CLAIMS: dict[str, Claim] = {claim.__name__: claim for claim in ALL}
"""By name; each one's docstring says what it claims."""


def _with(case: Case, train: Instances | None = None, test: Instances | None = None) -> Case:
    return Case(case.name, case.final_model, train or case.train, test or case.test)


def _tensors(case: Case) -> dict[str, Tensor]:
    sets = {"train": case.train, "test": case.test}
    return {f"{k}.{name}": t for k, part in sets.items() for name, t in part.tensors().items()}


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def _differ(found: Tensor, expected: Tensor, trial: Trial) -> str | None:
    """Return how far two sets of scores are apart, where that is more than iterations leave open."""
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, expected {list(expected.shape)}"
    size = float(trial.scores.values.abs().max())
    apart = float((found - expected).abs().max())
    return None if apart <= 1e-3 * size else f"scores differ by {apart / size:.1g} of the largest"


def _linear() -> Case:
    """Return a linear regression after some training, with instances that pull in different directions."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    noise = torch.randn(30, 1, dtype=torch.float64, generator=generator)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + noise
    network = nn.Linear(3, 1).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.8, -1.7, 0.3]]))
        network.bias.zero_()
    model = FinalModel(nn.Sequential(network), mean_squared_error, accept_poor=True)
    return Case("linear", model, Instances(inputs[:24], targets[:24]), Instances(inputs[24:], targets[24:]))


def _truth() -> Sensitivity:
    """Return what further training of the linear case measures."""
    case = _linear()
    return further_train(case.final_model, case.train, case.test, PROTOCOL, SEEDS, None)
