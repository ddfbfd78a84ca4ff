"""Audits against exhaustive gold standards, with rows that have no effect, and against the clock.

    python benchmarks/audit.py recall diabetes           # also digits; concrete with --path FILE
    python benchmarks/audit.py nulls breast_cancer       # false discoveries among rows without any effect
    python benchmarks/audit.py speed rows9000            # also rows50000, concrete and sst2 with --path

``recall`` leaves out every row with 20 seeds that the audit does not use, which takes N x 20 runs, kept in
``--store`` seed by seed: a killed command goes on where it was. For the mean test loss and five test
instances it prints which share of the true top 20 of each side

- the audit verified, and the scores' own top 20 has;
- the audit itself expected to have verified (``recall`` of ``audit.json``, for the mean test loss);
- the gold standard made again with half of the seeds has: the top 20 of a noisy truth can't be found whole;

the correlation of scores with the gold standard, and the share of helpful and harmful verdicts whose sign the
gold standard contradicts by two of its standard errors, and at all.

``nulls`` gives a random half of N rows the target that losses ignore, audits all rows, and prints the mean
share of false ones among the verdicts over ``--repetitions``, at q = .10. Under ``shift`` such rows still
change every later batch; under the other rules their effect is exactly zero. Verdicts of the other rows count
as right, so that this is their false discovery rate at worst where the null rows are half of all.

``speed`` prints what the stages of an audit take, the final model not counted, and the largest memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from fimo.app.config import validated
from fimo.app.experiment import prepare, with_final_model
from fimo.app.journal import Journal
from fimo.app.run import Run
from fimo.app.search_path import SearchPath
from fimo.audit.audit import audit
from fimo.audit.question import Question, Resources, Settings
from fimo.audit.result import Audit
from fimo.cost import peak_memory_mb
from fimo.data.instances import IGNORED, Instances
from fimo.data.origin import Origin
from fimo.engine.protocol import Protocol
from fimo.further_training.gold_standard import further_train
from fimo.models.final_model import FinalModel
from fimo.store.files import Store
from fimo.validation.admission import admit

CONF = Path(__file__).parents[1] / "conf"
TOP = 20
GOLD = range(100, 120)
"""Seeds of the gold standard; audits use 0 to 19."""

ROWS = {"rows9000": (9_000, 23), "rows50000": (50_000, 20)}
"""Numbers of rows and features of tables that are drawn at random."""

OVERRIDES = {"sst2": ["experiment=sst2_small", "model.accept_poor=true"]}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("recall", "nulls", "speed"))
    parser.add_argument("setting", help="a data set, or rows9000, rows50000")
    parser.add_argument("--path", help="of the data set's file or folder")
    parser.add_argument("--store", default=str(Path(tempfile.gettempdir()) / "fimo-benchmark-audit"))
    parser.add_argument("--gold-seeds", type=int, default=len(GOLD))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--rows", type=int, default=120, help="of nulls: training rows of a repetition")
    parser.add_argument("--leave-out", default="shift")
    parser.add_argument("--tests", type=int, default=5, help="test instances explained one by one")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fimo.audit").setLevel(logging.INFO)
    {"recall": recall, "nulls": nulls, "speed": speed}[given.part](given)


def trained(given: argparse.Namespace) -> Run:
    """Return a run of the command line's data set with its final model."""
    chosen = OVERRIDES.get(given.setting, [f"dataset={given.setting}"])
    overrides = [*chosen, "logger=none", "report=false", f"store={given.store}", "mode=audit"]
    overrides += ["trainer.enable_progress_bar=false"]
    overrides += [f"dataset.path={given.path}"] if given.path else []
    if given.setting not in OVERRIDES:
        overrides += [f"further_training.leave_out={given.leave_out}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = validated(compose("config", overrides=overrides), SearchPath((CONF,)))
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        run, found = with_final_model(prepare(config, journal), config, journal)
    print(f"{given.setting}: {found}")
    run = run.of_trained_part()
    return dataclasses.replace(run, final_model=dataclasses.replace(run.final_model, accept_poor=True))


def question_of(run: Run, tests: int) -> Question:
    """Return a run's question, with evenly spaced test instances explained one by one."""
    data = run.data
    chosen = tuple(k * len(data.test) // tests for k in range(tests))
    return Question(
        run.final_model, data.train, data.test, run.plan.protocol, chosen,
        Origin.counted(len(data.train)), Origin.counted(len(data.test)),
    )  # fmt: skip


def recall(given: argparse.Namespace) -> None:
    """Compare an audit's verified rows with the truly largest effects."""
    run = trained(given)
    question = question_of(run, given.tests)
    found = audit(question, Settings(top=TOP, act=False), Resources(Store(given.store)))
    gold = exhaustive(question, GOLD[: given.gold_seeds], Store(given.store))
    print(f"calibration: {found.summary['calibration']['text']}")
    expected = found.summary["recall"]
    print(
        f"the audit expects {expected['estimate']:.3f} [{expected['lower']:.3f}, {expected['upper']:.3f}]\n"
        f"{'target':>16} verified  scores' top  gold again  correlation  wrong clearly  wrong at all"
        "  verdicts"
    )
    tables = [found.rows, *(table for _, table in found.pairs.groupby("test_row"))]
    for m, table in enumerate(tables):
        table = table.sort_values("row")
        effect, sem = gold[:, m].mean(0), gold[:, m].std(0) / len(gold) ** 0.5
        score = torch.tensor(table["score"].to_numpy())
        verified = torch.tensor((table["verdict"] != "").to_numpy())
        signs = torch.tensor(table["verdict"].map({"helpful": 1.0, "harmful": -1.0}).fillna(0.0).to_numpy())
        told = signs != 0
        contradicted = told & (signs * effect < 0)
        print(
            f"{question.targets[m].name:>16} {share(verified, ends(effect)):8.3f} "
            f"{share(mask(ends(score), len(score)), ends(effect)):12.3f} {again(gold[:, m]):11.3f} "
            f"{float(torch.corrcoef(torch.stack([score, effect]))[0, 1]):12.3f} "
            f"{float((contradicted & (effect.abs() > 2 * sem)).sum() / told.sum()):14.3f} "
            f"{float(contradicted.sum() / told.sum()):13.3f} {int(told.sum()):9d}"
        )


def exhaustive(question: Question, seeds: range, store: Store) -> Tensor:
    """Return the adjusted changes ``[S, M, N]`` of the mean test loss and each named test instance's."""
    found, began = [], time.monotonic()
    weight = question.weight[: 1 + len(question.tests), : len(question.test)]
    for seed in seeds:
        truth = further_train(
            question.final_model, question.train, question.test, question.at_end, [seed], None,
            store=store, keep_states=False,
        )  # fmt: skip
        found.append(torch.einsum("mj,jn->mn", weight, truth.adjusted[0, -1].double()))
        print(f"gold standard, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    return torch.stack(found)


def ends(values: Tensor) -> Tensor:
    """Return the positions of the largest and the smallest values."""
    order = values.argsort()
    return torch.cat([order[:TOP], order[-TOP:]])


def mask(index: Tensor, count: int) -> Tensor:
    """Return which of so many positions are among some."""
    found = torch.zeros(count, dtype=torch.bool)
    found[index] = True
    return found


def share(found: Tensor, wanted: Tensor) -> float:
    """Return which share of the wanted positions is marked in ``[N]``."""
    return float(found[wanted].double().mean())


def again(changes: Tensor) -> float:
    """Return the share of one half's top that the other half of the seeds has, over 20 divisions."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(20):
        order = torch.randperm(len(changes), generator=generator)
        first, second = (changes[part].mean(0) for part in order.chunk(2))
        halves = (ends(first), ends(second))
        low = torch.isin(halves[0][:TOP], halves[1][:TOP]).double().mean()
        high = torch.isin(halves[0][TOP:], halves[1][TOP:]).double().mean()
        found.append(float(low + high) / 2)
    return sum(found) / len(found)


def nulls(given: argparse.Namespace) -> None:
    """Count verdicts of rows that losses ignore."""
    run, shares, told = trained(given), [], []
    # the loss by name takes no such target
    loss = nn.CrossEntropyLoss(reduction="none")
    run = dataclasses.replace(run, final_model=FinalModel(run.final_model.network, loss, accept_poor=True))
    for repetition in range(given.repetitions):
        generator = torch.Generator().manual_seed(repetition)
        chosen = torch.randperm(len(run.data.train), generator=generator)[: given.rows]
        null = torch.arange(given.rows) < given.rows // 2
        train = run.data.train[chosen]
        targets = train.targets.clone()
        targets[null] = IGNORED
        question = dataclasses.replace(
            question_of(run, given.tests),
            train=Instances(train.inputs, targets),
            train_origin=Origin.counted(given.rows),
        )
        settings = Settings(top=given.rows // 2, act=False)
        found = audit(question, settings, Resources(Store(given.store)))
        tables = [found.rows, *(table for _, table in found.pairs.groupby("test_row"))]
        of_targets = []
        for table in tables:
            verdict = torch.tensor(
                table.sort_values("row")["verdict"].isin(["helpful", "harmful"]).to_numpy()
            )
            of_targets.append(float((verdict & null).sum() / verdict.sum().clamp(min=1)))
            told.append(float((verdict & ~null).sum() / (~null).sum()))
        shares.append(of_targets)
        print(f"repetition {repetition}: {' '.join(f'{x:.3f}' for x in of_targets)}", flush=True)
    rates = torch.tensor(shares, dtype=torch.float64)
    of_mean, all_targets = rates[:, 0], rates.mean(1)
    for name, values in (("mean test loss", of_mean), ("all targets", all_targets)):
        error = float(values.std() / len(values) ** 0.5)
        print(
            f"{name}: false discovery rate {float(values.mean()):.3f} ± {error:.3f} (at most .10 asked for)"
        )
    print(f"of the rows with an effect, {sum(told) / len(told):.2f} have a verdict")


def speed(given: argparse.Namespace) -> None:
    """Time an audit without a store."""
    if given.setting in ROWS:
        question = drawn(*ROWS[given.setting], given.leave_out)
    else:
        question = question_of(trained(given), given.tests)
    began, before = time.monotonic(), os.times()
    found: Audit = audit(question, Settings(top=TOP, act=False), Resources())
    wall, after = time.monotonic() - began, os.times()
    steps = question.steps
    print(f"{len(question.train):,} rows, {len(question.test):,} test instances, {steps:,} steps")
    print("  ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found.summary["stages"].items()))
    cpu = after.user + after.system - before.user - before.system
    print(f"in all {wall:.1f} s ({cpu:.1f} s of CPU), {peak_memory_mb():,.0f} MB")
    print({k: found.summary[k] for k in ("verified", "controls", "helpful", "harmful", "unclear", "seeds")})
    print(found.summary["recall"]["text"])


def drawn(rows: int, features: int, leave_out: str) -> Question:
    """Return a table drawn at random, with a model trained on it for ten passes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows + rows // 10, features, generator=generator)
    y = x[:, :1].sin() + x[:, 1:2] * x[:, 2:3] + 0.5 * torch.randn(len(x), 1, generator=generator)
    train, test = Instances(x[:rows], y[:rows]), Instances(x[rows:], y[rows:])
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for _ in range(10):
        for part in torch.randperm(rows, generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    epochs = min(20, max(1, 10_000 // -(-rows // 32)))
    protocol = Protocol(lr=0.01, batch_size=32, epochs=epochs, leave_out=leave_out)  # type: ignore[arg-type]
    model = FinalModel(network, "mse", accept_poor=True)
    train, test = admit(model, train, test)
    return Question(model, train, test, protocol, (), Origin.counted(rows), Origin.counted(len(test)))


if __name__ == "__main__":
    main()
