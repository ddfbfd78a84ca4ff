"""Computing once what further training never changes: the frozen layers before the first trained one.

Where ``trainable`` leaves out a network's first layers, what they compute of an instance is the same in
every run and for every method. Their outputs then take the place of the inputs, and the remaining layers
that of the network; losses and gradients are the same, at a fraction of the cost. Networks that know where
they can be cut are asked (:class:`Splits`), others are cut at the calls of their modules
(:mod:`fimo.models.returned`); each cut is tried, with other values of the trained parameters than the final
model's.
"""

from __future__ import annotations

import copy
import glob
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from fimo.data.duplicates import duplicate_groups
from fimo.data.instances import Inputs, Instances
from fimo.models.copied import duplicate
from fimo.models.final_model import FinalModel, apply, fitting_batch, functional_apply
from fimo.models.returned import cut_at_calls
from fimo.models.row_order import RowMoves
from fimo.models.train_mode import draws
from fimo.models.vocabulary import NotReachedError, entering

if TYPE_CHECKING:  # Lightning is not needed for attribution
    from fimo.data.datamodule import InstancesModule

log = logging.getLogger(__name__)

Data = TypeVar("Data", bound="InstancesModule")
Parts = tuple[nn.Module, nn.Module]
MOST_BYTES = 2**30
"""Of computed inputs; beyond it the network is left whole."""


@runtime_checkable
class Splits(Protocol):
    """A network that knows how to be cut before its first trained layer."""

    def split(self, trainable: Collection[str]) -> Parts | None:
        """Return what comes before and what remains, or None where nothing can be cut off.

        Args:
            trainable: names of the parameters that are trained; the remaining part keeps them.
        """


def without_frozen_part(final_model: FinalModel, data: Data) -> tuple[FinalModel, Data]:
    """Return the trained part of a final model with a copy of the data that enter it.

    The same objects where nothing is frozen, where nothing can be cut off, or where the frozen part draws
    random numbers in training (dropout), which differ from run to run.
    """
    model, (train, test) = trained_part(final_model, data.train, data.test)
    if model is final_model:
        return final_model, data
    found = copy.copy(data)
    found.train, found.test = train, test
    return model, found


def trained_part(final_model: FinalModel, *instances: Instances) -> tuple[FinalModel, tuple[Instances, ...]]:
    """Return the trained part of a final model with what enters it of sets of instances.

    Args:
        instances: the training instances first. See :func:`without_frozen_part`.
    """
    parts = _cut(final_model, instances[0], sum(map(len, instances)))
    if parts is None:
        return final_model, instances
    networks = (final_model.network, *parts)
    try:
        train = _entering(networks, instances[0], alike=True)
        others = [_entering(networks, part) for part in instances[1:]]
    except NotReachedError as error:
        _left_whole(error)
        return final_model, instances
    return _remaining_model(final_model, parts[1]), (train, *others)


def for_runs(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device | str = "cpu",
) -> tuple[FinalModel, Instances, Instances]:
    """Return the trained part of a final model with what enters it in runs.

    Args:
        dtypes: of the runs, for the training instances, and of evaluation, for the test instances.
        device: where what enters is computed, and stays; the model stays where it is.
    """
    parts = _cut(final_model, train, len(train) + len(test))
    if parts is None:
        return final_model, train, test
    networks = (final_model.network, *parts)
    entered: list[Instances] = []
    try:
        for dtype, part in zip(dtypes, (train, test), strict=True):
            entered.append(_entering(networks, part.to(device, dtype), dtype, alike=not entered))
    except NotReachedError as error:
        _left_whole(error)
        return final_model, train, test
    return _remaining_model(final_model, parts[1]), entered[0], entered[1]


def _left_whole(error: NotReachedError) -> None:
    log.info("the frozen part is not cut off: with some instances %s", error)


def _remaining_model(final_model: FinalModel, after: nn.Module) -> FinalModel:
    names = tuple(glob.escape(name) for name in final_model.parameters())
    frozen = sum(
        p.numel() for n, p in final_model.network.named_parameters() if n not in final_model.parameters()
    )
    frozen -= sum(p.numel() for p in after.parameters()) - final_model.size
    log.info("%d frozen parameters before the first trained layer are evaluated once", frozen)
    return FinalModel(after, final_model.loss, final_model.measurement, names, final_model.accept_poor)


def _cut(final_model: FinalModel, train: Instances, count: int) -> Parts | None:
    """Return the parts of a network, tried, or None where it is left whole.

    Args:
        count: instances to compute what enters the trained part of.
    """
    names, probe = final_model.parameters(), train[:4]
    if len(names) == len(list(final_model.network.parameters())):
        return None
    for parts in _possible(final_model.network, names, probe):
        before, after = parts
        if not any(True for _ in before.parameters()) or not _agree(final_model, before, after, train):
            continue
        if _draws(before, train) or _bytes(before, probe, count) > MOST_BYTES:
            return None
        return parts
    return None


def _possible(network: nn.Module, trainable: Collection[str], probe: Instances) -> Iterator[Parts]:
    """Yield ways to cut a network, the simplest first."""
    parts = split(network, trainable)
    if parts is not None:
        yield parts
    for keep_all in (False, True):
        try:
            parts = cut_at_calls(network, trainable, probe.inputs, keep_all)
        except Exception as error:  # code between modules that looks at them, or at their values
            log.info("the frozen part can't be cut off (%s)", type(error).__name__)
            return
        if parts is None:
            return
        yield parts


def split(network: nn.Module, trainable: Collection[str]) -> Parts | None:
    """Cut a network before its first trained layer, or return None; see :class:`Splits`."""
    if isinstance(network, Splits):
        return network.split(trainable)
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        return _before_last_layer(network, trainable)
    children = list(network.named_children())
    first = next(
        (k for k, (name, _) in enumerate(children) if any(t.startswith(f"{name}.") for t in trainable)), 0
    )
    if first == 0:
        return None
    return nn.Sequential(OrderedDict(children[:first])), remaining(OrderedDict(children[first:]))


def remaining(children: OrderedDict[str, nn.Module]) -> nn.Sequential:
    """Return a sequence whose input was computed by other layers, marked by a leading identity."""
    return nn.Sequential(OrderedDict([("computed", nn.Identity()), *children.items()]))


class Entering(nn.Module):
    """What enters a layer of a network, whose outputs are the network's.

    Calls raise :class:`~fimo.models.vocabulary.NotReachedError` with a batch where they aren't.

    Args:
        layer: its name.
    """

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network, self.layer = network, layer

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        layer = self.network.get_submodule(self.layer)
        assert isinstance(layer, nn.Linear)
        return entering(layer, lambda: self.network(*inputs, **named))


def _before_last_layer(network: nn.Module, trainable: Collection[str]) -> Parts | None:
    """Cut any network before a linear layer that alone is trained; that it is the last one is tried later."""
    names = {name.rpartition(".")[0] for name in trainable}
    if len(names) != 1:
        return None
    path = names.pop()
    layer = network.get_submodule(path)
    if not path or type(layer) is not nn.Linear or "forward" in vars(layer):
        return None
    after: nn.Module = layer
    for name in reversed(path.split(".")):  # nested, so that its parameters keep their names
        after = nn.Sequential(OrderedDict([(name, after)]))
    return Entering(network, path), remaining(OrderedDict(after.named_children()))


def _entering(
    networks: tuple[nn.Module, nn.Module, nn.Module],
    instances: Instances,
    dtype: torch.dtype | None = None,
    alike: bool = False,
) -> Instances:
    """Return what enters the trained part of instances: of each its own, whatever its batch was.

    Args:
        networks: the whole one, what comes before and what remains.
        dtype: of copies of them that compute it, on the instances' device; they themselves do when None.
        alike: instances are exactly the same where they were before, as what is left out with duplicates is.

    Raises:
        NotReachedError: it isn't so.
    """

    def there(network: nn.Module) -> nn.Module:
        if dtype is None:
            return network
        return duplicate(network).to(device=instances.targets.device, dtype=dtype)

    whole, before, after = networks
    entered, moved = computed(there(before), instances)
    if moved and not _same_in_other_batches(there(whole), there(after), instances, entered):
        raise NotReachedError("rows are taken in another order, or some of them")
    if not alike:
        return entered
    group = duplicate_groups(instances)
    count = int(group.max()) + 1
    if count < len(group):  # in another batch rounding may be another
        place = torch.arange(len(group))
        first = torch.full((count,), len(group)).scatter_reduce(0, group, place, "amin")
        entered = entered[first[group].to(entered.targets.device)]
    if int(duplicate_groups(entered).max()) + 1 < count:
        raise NotReachedError("it gives the same as with others")
    return entered


@torch.no_grad()
def computed(before: nn.Module, instances: Instances) -> tuple[Instances, bool]:
    """Return instances with a network's outputs in the place of their inputs.

    Returns:
        The instances, and whether rows of a batch may be in another order.
    """
    found: list[Inputs] = []
    moved = False
    for batch in instances.batches(fitting_batch(instances)):
        with RowMoves(before, batch.inputs) as moves:
            found.append(apply(before, batch.inputs))
        moved |= moves.noted
    first = found[0]
    if isinstance(first, Tensor):
        return Instances(torch.cat([f for f in found if isinstance(f, Tensor)]), instances.targets), moved
    together = {name: torch.cat([f[name] for f in found if isinstance(f, dict)]) for name in first}
    return Instances(together, instances.targets), moved


@torch.no_grad()
def _same_in_other_batches(
    whole: nn.Module, after: nn.Module, instances: Instances, entered: Instances
) -> bool:
    """Return whether what entered with other instances gives each instance's outputs, in a random order."""
    order = torch.randperm(len(instances), generator=torch.Generator().manual_seed(0))
    for rows in order.to(instances.targets.device).split(fitting_batch(instances)):
        ours, theirs = apply(after, entered[rows].inputs), apply(whole, instances[rows].inputs)
        if not _alike(ours, theirs):
            return False
    return True


@torch.no_grad()
def _agree(final_model: FinalModel, before: nn.Module, after: nn.Module, train: Instances) -> bool:
    """Return whether the parts give the network's outputs, with other values of the trained parameters.

    Tried on instances together, and on others one by one, where a network may cut off other padding.
    """
    other = moved(final_model.parameters())
    try:
        for probe in _probes(train):
            whole = functional_apply(final_model.network, other, probe.inputs)
            entered, _ = computed(before, probe)
            if len(entered) != len(probe):
                return False
            if not _alike(functional_apply(after, other, entered.inputs), whole):
                return False
    except Exception as error:  # a model of another structure than expected
        log.info("the frozen part can't be cut off (%s)", type(error).__name__)
        return False
    return True


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def _probes(train: Instances) -> Iterator[Instances]:
    yield train[:4]
    yield from train[torch.linspace(0, len(train) - 1, min(8, len(train))).long()].batches(1)


def moved(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters that are moved by a tenth of their size, or a little from zero (fresh adapters)."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, p in parameters.items():
        noise = torch.randn(p.shape, generator=generator).to(p)
        found[name] = p + 0.1 * (p.square().mean().sqrt() + 0.1) * noise
    return found


def _bytes(before: nn.Module, probe: Instances, count: int) -> int:
    tensors = computed(before, probe)[0].tensors()
    each = sum(t[0].numel() * t.element_size() for name, t in tensors.items() if name != "targets")
    return each * count


def _draws(before: nn.Module, train: Instances) -> bool:
    """Return whether a network draws random numbers in train mode."""
    return draws(duplicate(before).train(), train[:2].inputs)
