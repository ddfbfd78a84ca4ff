"""What an audit's cleaning is worth where labels were spoiled on purpose.

    python benchmarks/cleaning.py                     # minutes for each data set on two cores
    python benchmarks/cleaning.py digits --share 0.05

gives a share of scikit-learn's digits or breast cancer training labels another class, trains a network on
them, and audits it: how many rows the cleaned table lacks, how many of these were spoiled, and the proof:
test loss and accuracy of further training without them, without as many random rows, and on all, on test rows
(with right labels) that did not choose them.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import fimo
from fimo.data.bundled import BundledData
from fimo.data.instances import Instances
from fimo.evaluation.label_errors import flip_labels

TEST_SHARE = 0.3


def spoiled(name: str, share: float, seed: int) -> tuple[Instances, Instances, torch.Tensor]:
    """Return training instances with some wrong labels, test instances, and which are wrong ``[N]``."""
    data = BundledData(name, test_size=TEST_SHARE, split_seed=seed)
    data.setup()
    generator = torch.Generator().manual_seed(seed)
    labels, wrong = flip_labels(data.train.targets, share, data.outputs, generator)
    return Instances(data.train.inputs, labels), data.test, wrong


def trained(train: Instances, classes: int, epochs: int, width: int, seed: int) -> nn.Module:
    """Return a network that was trained on all rows."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(train.inputs.shape[1], width), nn.ReLU(), nn.Linear(width, classes))  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(epochs):
        for index in torch.randperm(len(train)).split(32):
            batch = train[index]
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch.inputs), batch.targets).backward()
            optimizer.step()
    return network


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["digits", "breast_cancer"], help="of data sets")
    parser.add_argument("--share", type=float, default=0.1, help="of the labels that are spoiled")
    parser.add_argument("--epochs", type=int, default=20, help="of the final model's and of further training")
    parser.add_argument("--width", type=int, default=64, help="of the network")
    parser.add_argument("--top", type=int, default=20, help="rows verified on each side")
    parser.add_argument("--seeds", type=int, default=5, help="of further training")
    parser.add_argument("--repeats", type=int, default=1, help="splits, spoiled labels and final models")
    arguments = parser.parse_args()
    for name in arguments.names:
        for seed in range(arguments.repeats):
            train, test, wrong = spoiled(name, arguments.share, seed)
            classes = int(train.targets.max()) + 1
            network = trained(train, classes, arguments.epochs, arguments.width, seed)
            model = fimo.FinalModel(network, "cross_entropy", accept_poor=True)
            protocol = fimo.Protocol(lr=0.05, batch_size=32, epochs=arguments.epochs, leave_out="mask")
            began = time.monotonic()
            found = fimo.audit(model, train, test, protocol, top=arguments.top, seeds=arguments.seeds)
            assert found.cleaned is not None
            removed = sorted(set(range(len(train))) - set(found.cleaned["row"]))
            print(
                f"{name}, repeat {seed}: {len(train)} rows, {int(wrong.sum())} of them spoiled; "
                f"{len(removed)} removed, {int(wrong[removed].sum())} of these spoiled; "
                f"{time.monotonic() - began:.0f} s"
            )
            for line in found.summary.get("proof", ()):
                print(f"  {line}")


if __name__ == "__main__":
    main()
