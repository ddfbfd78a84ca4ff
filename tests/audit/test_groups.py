"""Rows that act together, against planted duplicates, known clusters and groups left out by hand."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tests.cases import CASES
from tests.reference.further_training import plain_run
from torch import nn

from fimo.audit import duplicates as duplicates_module
from fimo.audit.clusters import clusters, cosines, inner_products
from fimo.audit.duplicates import duplicates, near_duplicates
from fimo.audit.groups import Effects, Group, find_groups, group_table, measure_groups
from fimo.audit.removal import Removal
from fimo.audit.result import GROUPS
from fimo.audit.shared import shared
from fimo.data.display import Display
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.engine.protocol import Protocol
from fimo.models.final_model import FinalModel


def planted() -> Instances:
    """Rows 3, 9 and 20 the same, 5 and 6 the same with other targets, 30 nearly 31."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 7.0  # a constant
    x[9] = x[20] = x[3]
    x[6] = x[5]
    x[31] = x[30] + 0.02
    x[31, 3] = 7.0
    y = torch.arange(60) % 3
    y[[9, 20]] = 0
    return Instances(x, y)


def test_planted_duplicates_are_found_whatever_their_targets_are() -> None:
    assert duplicates(planted()) in ([(3, 9, 20), (5, 6)], [(5, 6), (3, 9, 20)])
    words = {"input_ids": torch.tensor([[1, 2], [1, 3], [1, 2]]), "mask": torch.ones(3, 2)}
    assert duplicates(Instances(words, torch.zeros(3))) == [(0, 2)]


def test_near_duplicates_are_within_a_twentieth_of_a_deviation_and_no_exact_ones() -> None:
    train = planted()
    assert near_duplicates(train, [31, 30, 3, 0]) == [(30, 31)]
    assert near_duplicates(train, [0, 1, 2]) == []
    scaled = Instances(train.inputs * torch.tensor([1e-3, 50.0, 1.0, 1.0]), train.targets)
    assert near_duplicates(scaled, [30]) == [(30, 31)]
    assert near_duplicates(Instances({"ids": torch.ones(5, 2)}, torch.zeros(5)), [0]) == []


def test_groups_around_a_leader_do_not_grow_along_chains() -> None:
    x = torch.linspace(0, 10, 500)[:, None]  # neighbours are 0.007 deviations apart
    groups = near_duplicates(Instances(x, torch.zeros(500)), [250, 251, 400])
    assert [len(g) for g in groups] == [15, 15]
    spacing = float(10 / 499 / x.std())
    assert max(groups[0]) - 250 == int(0.05 / spacing)


def plain_groups(x: torch.Tensor, leaders: list[int], distance: float) -> list[tuple[int, ...]]:
    """One leader after another, all of its rows by their differences."""
    standard = (x - x.mean(0)) / x.std(0) / x.shape[1] ** 0.5
    found: list[tuple[int, ...]] = []
    for leader in leaders:
        apart = (standard - standard[leader]).square().sum(1).sqrt()
        members = (apart <= distance).nonzero()[:, 0]
        taken = any(leader in group for group in found)
        if not taken and len(members) > 1 and apart[members].max() > 0:
            found.append(tuple(members.tolist()))
    return found


@pytest.mark.parametrize("kind", ["chain", "crowd", "copies", "levels"])
def test_near_duplicates_are_those_of_one_leader_after_another(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.audit.duplicates.BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 2, generator=generator, dtype=torch.float64)
    if kind == "crowd":
        x[100:] = 0.5 + 1e-3 * x[100:]
    elif kind == "copies":
        x[200:] = x[:200]
        x[:40] = x[40:80] + 1e-3
    elif kind == "levels":
        x = (3 * x).round()
        x[::7] += 1e-2
    leaders = torch.randperm(400, generator=generator)[:150].tolist()
    expected = plain_groups(x, leaders, 0.05)
    assert near_duplicates(Instances(x, torch.zeros(400)), leaders, 0.05) == expected
    assert expected


def test_what_is_near_to_leaders_that_are_near_to_one_another_is_looked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def noted(rows: torch.Tensor, leaders: torch.Tensor, *more: Any) -> Any:
        asked.append(len(leaders))
        return near(rows, leaders, *more)

    near = duplicates_module._near
    monkeypatch.setattr(duplicates_module, "_near", noted)
    x = torch.cat([torch.rand(50, 3), 20 + 1e-4 * torch.rand(500, 3)])
    (group,) = near_duplicates(Instances(x, torch.zeros(550)), list(range(100, 400)))
    assert group == tuple(range(50, 550))
    assert asked == [1]


def test_products_of_noisy_effects_are_on_average_those_without_noise() -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true = normal(40, 6)
    # a seed's own noise in all rows, as of the full run that they are compared with, and each row's
    noisy = [true + 2 * normal(8, 40, 1) + normal(8, 40, 6) for _ in range(200)]
    each = torch.stack([inner_products(effects) for effects in noisy])
    errors = (each.mean(0) - true.T @ true) / (each.std(0) / 200**0.5)
    assert errors.abs().max() < 4
    plain = torch.stack([effects.mean(0).T @ effects.mean(0) for effects in noisy])
    assert ((plain.mean(0) - true.T @ true) / (plain.std(0) / 200**0.5)).min() > 15
    normed = true / true.norm(dim=0)
    torch.testing.assert_close(cosines(true), normed.T @ normed)


def test_rows_with_effects_along_known_directions_become_these_clusters() -> None:
    generator = torch.Generator().manual_seed(2)
    directions = torch.linalg.qr(torch.randn(30, 3, generator=generator, dtype=torch.float64))[0]
    of = torch.tensor([0, 1, 0, 2, 1, 0, 1, 2, 0])
    sizes = torch.rand(9, generator=generator, dtype=torch.float64) + 0.5
    effects = directions[:, of] * sizes
    noisy = effects + 0.2 * torch.randn(20, 30, 9, generator=generator, dtype=torch.float64)
    rows = [10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert clusters(noisy, rows) == [(10, 12, 15, 18), (11, 14, 16)]  # the two of direction 2 are too few
    opposite = effects.clone()
    opposite[:, 0] *= -1  # acts against the others
    assert clusters(opposite, rows) == [(11, 14, 16), (12, 15, 18)]
    nothing = torch.randn(20, 30, 9, generator=generator, dtype=torch.float64)
    assert clusters(nothing, rows) == []


def test_groups_are_one_of_each_set_the_largest_summed_scores_first() -> None:
    train, score = planted(), torch.zeros(60)
    score[[3, 9, 20]], score[[5, 6]], score[[40, 41, 42]] = 1.0, -2.0, 0.1
    effects = torch.zeros(8, 4)
    effects[0, :3], effects[1, 3] = 1.0, 1.0
    found = find_groups(train, score, effects, [40, 41, 42, 43])
    assert found == [
        Group("duplicates with other targets", (5, 6)),
        Group("duplicates", (3, 9, 20)),
        Group("cluster", (40, 41, 42)),
        Group("near duplicates", (30, 31)),
    ]
    assert find_groups(train, score, effects, [40, 41, 42, 43], most=0) == []
    same = torch.zeros(8, 3)
    same[0] = 1.0
    again = find_groups(train, score, same, [3, 9, 20])
    assert [g.kind for g in again if g.rows == (3, 9, 20)] == ["duplicates"]


def test_a_groups_effect_is_that_of_leaving_it_out_by_hand() -> None:
    case = CASES["mlp_regression"]()
    protocol = Protocol(lr=0.1, batch_size=5, epochs=3, dtype="float64", leave_out="mask")
    groups, seeds = [Group("cluster", (1, 4, 7)), Group("duplicates", (0, 9))], [0, 2, 3]
    effects = measure_groups(groups, case.final_model, case.test, Removal(case.train, protocol, seeds))

    def changes(rows: tuple[int, ...]) -> np.ndarray:
        found = []
        for seed in seeds:
            runs = [
                plain_run(case.final_model, case.train, case.test, protocol, seed, unit)[0][-1]
                for unit in ((), rows)
            ]
            found.append(float((runs[1] - runs[0]).mean()))
        return np.array(found)

    generator = torch.Generator().manual_seed(0)
    sizes = np.full(8, 3)
    drawn = [torch.randperm(len(case.train), generator=generator)[:k].tolist() for k in sizes]
    random = np.stack([changes(tuple(rows)) for rows in drawn], 1)  # [S, R]
    slope = random @ sizes / (sizes @ sizes)
    scatter = ((random.mean(0) - slope.mean() * sizes) ** 2).sum() / 7 / (sizes @ sizes)
    p = []
    for k, group in enumerate(groups):
        measured, size = changes(group.rows), len(group.rows)
        assert float(effects.mean[k]) == pytest.approx(measured.mean(), rel=1e-5)
        assert float(effects.sem[k]) == pytest.approx(stats.sem(measured), rel=1e-4)
        beyond = measured - slope * size
        error = np.sqrt(stats.sem(beyond) ** 2 + scatter * size**2)
        assert float(effects.beyond[k]) == pytest.approx(beyond.mean(), rel=1e-4)
        assert float(effects.beyond_sem[k]) == pytest.approx(error, rel=1e-4)
        p.append(2 * stats.t.sf(abs(beyond.mean()) / error, 2))
    expected = [min(2 * min(p), max(p)) if v == min(p) else max(p) for v in p]
    assert effects.q.tolist() == pytest.approx(expected, rel=1e-3)
    ones, beyond = torch.ones(3), torch.tensor([0.2, -0.1, 0.3])
    three = Effects(-ones, ones, beyond, ones, torch.full((3,), 0.05))
    assert three.verdicts(0.1) == ["helpful", "harmful", "helpful"]
    assert Effects(ones, ones, beyond, ones, torch.full((3,), 0.2)).verdicts(0.1) == ["unclear"] * 3


def test_groups_of_a_model_that_still_improves_are_not_helpful_for_their_number() -> None:
    torch.manual_seed(0)
    x = torch.randn(120, 4, dtype=torch.float64)
    data = Instances(x, x @ torch.randn(4, 1, dtype=torch.float64))
    model = FinalModel(nn.Linear(4, 1).double(), "mse", accept_poor=True)
    protocol = Protocol(lr=0.01, batch_size=10, epochs=2, dtype="float64", leave_out="mask")
    chosen = [Group("cluster", tuple(range(k, 120, 6))) for k in range(5)]  # as random as any
    effects = measure_groups(chosen, model, data[:20], Removal(data, protocol, [0, 1, 2]))
    assert bool((effects.mean > 5 * effects.sem).all())  # shorter steps
    assert abs(float(effects.beyond.mean())) < 0.1 * float(effects.mean.mean())
    assert effects.verdicts(0.05) == ["unclear"] * 5


def test_what_members_share_is_said_and_what_all_have_is_not() -> None:
    rng = np.random.default_rng(0)

    def person(age: float, work: str, label: str, text: str = "") -> Display:
        row = {"age": age, "height": float(rng.normal(170, 10)), "work": work, "one": 1.0}
        return Display(label, row, text or None)

    others = [
        person(float(rng.uniform(20, 60)), "ab"[k % 2] * 3, "no" if k % 3 else "yes") for k in range(200)
    ]
    members = [person(85.0 + k, "rare", "yes") for k in range(4)]
    said = shared(members, others)
    assert said.startswith("all yes; ")
    assert "work rare (0% of the others)" in said
    assert "age 85 to 88 (others mostly " in said
    assert "height" not in said
    assert "one" not in said.replace("none", "")
    assert shared(others[:50], others[50:]) == ""


def test_words_that_members_share_are_said() -> None:
    others = [Display("spam", text=f"the meeting number {k} is on monday") for k in range(100)]
    members = [Display("spam", text=f"the Refund for order {k} was refused") for k in range(5)]
    assert shared(members, others) == "words for, order, refund, refused, was"
    assert shared(others[:3], others[3:]) == ""


def test_the_table_names_members_by_the_users_rows_and_ids() -> None:
    origin = Origin(np.arange(100, 106), tuple("abcdef"))
    numbers = (torch.tensor([v]) for v in (0.2, 0.01, 0.15, 0.02, 0.03))
    effects = Effects(*numbers)
    table = group_table(
        [Group("cluster", (1, 3))],
        effects,
        torch.arange(6.0),
        origin,
        lambda k: Display("x", {"v": float(k)}),
        0.1,
    )
    assert list(table) == list(GROUPS)
    line = table.iloc[0]
    assert (line["rows"], line["ids"], line["size"], line["score"]) == ("101 103", "b d", 2, 4.0)
    assert line["verdict"] == "helpful"
    assert (line["beyond_random"], line["beyond_random_sem"]) == pytest.approx((0.15, 0.02))
    nothing = torch.empty(0)
    empty = group_table([], Effects(*[nothing] * 5), nothing, origin, lambda k: Display("x"), 0.1)
    assert list(empty) == list(GROUPS)
    assert isinstance(empty, pd.DataFrame)
    assert len(empty) == 0


def test_near_duplicates_of_many_rows_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimo.audit.duplicates.BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(60, 5, generator=generator)
    x = torch.cat([x, x + 0.04 * torch.randn(60, 5, generator=generator), x[:3]])
    leaders = list(range(0, 60, 2))
    z = (x.double() - x.double().mean(0)) / x.double().std(0)
    apart = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist") / 5**0.5
    expected, taken = [], set[int]()
    for leader in leaders:
        members = (apart[leader] <= 0.05).nonzero().flatten().tolist()
        if leader not in taken and len(members) > 1 and apart[leader, members].max() > 0:
            taken.update(members)
            expected.append(tuple(members))
    assert len(expected) > 5
    assert near_duplicates(Instances(x, torch.zeros(len(x))), leaders) == expected


def test_duplicates_of_many_rows_are_found_without_a_copy_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimo.data.duplicates.HASHED", 64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 300, generator=generator)[torch.randint(700, (1000,), generator=generator)]
    x[5], x[900] = 0.0, -0.0  # the same number
    groups: dict[tuple[float, ...], list[int]] = {}
    for k, row in enumerate(x.tolist()):
        groups.setdefault(tuple(v + 0.0 for v in row), []).append(k)
    train = Instances(x, torch.zeros(len(x)))
    tracemalloc.start()  # of NumPy's arrays, which copies that are sorted are
    try:
        found = duplicates(train)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(found) == sorted(tuple(rows) for rows in groups.values() if len(rows) > 1)
    assert most < 0.5 * x.numel() * x.element_size()
