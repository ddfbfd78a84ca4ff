"""Fact tracing: which sentences state a fact, and what is made of scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.facts import RELATIONS, FactsData
from fimo.data.instances import IGNORED
from fimo.data.language import LanguageData
from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.scores import Scores
from fimo.tasks import FactTracing
from fimo.tasks.fact_tracing import GOLD_STANDARD, KEY, WORD_OVERLAP, statements, traced, word_overlap


def facts(**arguments: Any) -> FactsData:
    data = FactsData(people=6, asked=9, **arguments)
    data.setup()
    return data


def run_of(data: Any, scores: Tensor | None = None, network: nn.Module | None = None) -> Any:
    tests = torch.arange(len(data.test))
    found = {} if scores is None else {"given": Scores(scores, torch.arange(len(data.train)), test=tests)}
    model: Any = SimpleNamespace(measurement=None)
    if network is not None:
        model = FinalModel(network, "language_modelling", accept_poor=True)
    return SimpleNamespace(
        data=data, scores=lambda: found, final_model=model, seeds=[0, 1],
        leave_out=lambda groups, seeds: SimpleNamespace(raw=(scores + 0 * len(groups))[None, None]),
    )  # fmt: skip


class Knows(nn.Module):
    """Says what follows in given sequences; of those from ``wrong`` on, another token."""

    def __init__(self, data: LanguageData, wrong: int) -> None:
        super().__init__()
        assert isinstance(data.test.inputs, dict)
        self.scale = nn.Parameter(torch.ones(()))
        self.vocabulary, self.inputs = data.outputs, data.test.inputs["input_ids"]
        self.says = data.test.targets.clamp(min=0)
        self.says[wrong:] = (self.says[wrong:] + 1) % data.outputs

    def forward(self, input_ids: Tensor) -> Tensor:
        row = (input_ids[:, None] == self.inputs[None]).all(-1).int().argmax(1)
        return self.scale * nn.functional.one_hot(self.says[row], self.vocabulary)


def test_a_fact_s_sentences_state_it_and_its_prompt_is_another_one() -> None:
    data = facts(statements=3)
    _, stated = statements(run_of(data))
    assert (stated.sum(1) == 3).all()
    train, test = data.texts("train"), data.texts("test")
    for j, question in enumerate(test):
        name = next(word for word in question.split() if word.istitle())
        place = question.split()[-1]
        (relation,) = {
            r for r, begins in RELATIONS.items() if any(b.format(name) in question for b in begins)
        }
        stating = [begin for begin in RELATIONS[relation] if f"{begin.format(name)} {place}." in train]
        assert sorted(f"{begin.format(name)} {place}." for begin in stating) == sorted(
            train[i] for i in stated[j].nonzero()[:, 0]
        )
        assert f"{question}." not in train
    assert data.decisions == ()  # every word is known
    assert (data.test.targets != IGNORED).sum(1).tolist() == [1] * 9


def test_recall_and_rank_are_those_counted_by_hand() -> None:
    stated = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]]).bool()
    scores = torch.tensor([[4.0, 1, 3, 2], [4, 3, 2, 1]])
    table = traced({"by_hand": scores}, stated, [1, 2, 4]).set_index("k")
    assert table["mean"].tolist() == [0.25, 0.25, 1]
    assert table["chance"].tolist() == [0.25, 0.5, 1]
    assert table["reciprocal_rank"].tolist() == [(1 + 1 / 4) / 2] * 3


def test_equal_scores_are_in_random_order() -> None:
    stated = torch.zeros(400, 20, dtype=torch.bool)
    stated[torch.arange(400), torch.arange(400) % 20] = True
    table = traced({"constant": torch.zeros(400, 20)}, stated, [5])
    assert table["mean"][0] == pytest.approx(5 / 20)


def test_word_overlap_is_bm25() -> None:
    passages = ["a b b", "b c", "d d d d e"]
    found = word_overlap(["b, C?"], passages)[0]
    idf = {"b": math.log(1 + 1.5 / 2.5), "c": math.log(1 + 2.5 / 1.5)}
    lengths = [1.5 * (0.25 + 0.75 * n / (10 / 3)) for n in (3, 2, 5)]
    first = idf["b"] * 2 * 2.5 / (2 + lengths[0])
    second = (idf["b"] + idf["c"]) * 2.5 / (1 + lengths[1])
    assert found.tolist() == pytest.approx([first, second, 0])


def test_the_task_judges_by_what_the_model_knows() -> None:
    data = facts()
    _, stated = statements(run_of(data))
    wrong = stated.double()
    wrong[6:] *= -1  # of what the model does not know
    task = FactTracing(counts=[1, 3], seeds=1)
    table = task(run_of(data, wrong, Knows(data, wrong=6))).set_index(["method", "k"])
    assert table.loc[("given", 3), "mean"] == 1
    assert table.loc[("given", 1), "mean"] == pytest.approx(1 / 3)
    assert table.loc[(GOLD_STANDARD, 1), "reciprocal_rank"] == 1
    assert (table["tests"] == 6).all()
    assert 0.1 < table.loc[(WORD_OVERLAP, 3), "mean"] < 1
    everything = FactTracing(counts=[3], known=False)(run_of(data, wrong, Knows(data, 6))).set_index("method")
    assert everything.loc["given", "mean"] < 0.7
    assert GOLD_STANDARD not in everything.index
    with pytest.raises(InputError, match="knows no fact"):
        task(run_of(data, wrong, Knows(data, wrong=0)))


def test_facts_may_be_columns_of_one_s_own(tmp_path: Path) -> None:
    def written(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    train = written("train.jsonl", [{"text": f"sentence {k}.", "says": "ab"[k % 2]} for k in range(6)])
    prompts = written("prompts.jsonl", [{"prompt": "a", "completion": "b", "says": "b"}])
    data = LanguageData(train, prompts, fact="says")
    data.setup()
    assert statements(run_of(data))[1].tolist() == [[False, True] * 3]
    for arguments, key, said in (
        ({}, "dataset.fact", "no column of dataset.path .* name it by dataset.fact"),
        ({"fact": "fact"}, "dataset.fact", "no column of dataset.path"),
    ):
        data = LanguageData(train, prompts, **arguments)  # type: ignore[arg-type]
        data.setup()
        with pytest.raises(InputError, match=said) as caught:
            FactTracing(counts=[1]).check(run_of(data))
        assert caught.value.key == key


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: FactTracing(counts=[0]), "evaluation.tasks.fact_tracing.counts"),
        (lambda: FactTracing(counts=[999]).check(run_of(facts())), "evaluation.tasks.fact_tracing.counts"),
        (lambda: FactTracing([1], seeds=3).check(run_of(facts())), "evaluation.tasks.fact_tracing.seeds"),
        (lambda: FactTracing().check(run_of(SimpleNamespace(name="d", test=[]))), KEY),
        (lambda: FactsData(people=1), "dataset.people"),
        (lambda: FactsData(statements=4), "dataset.statements"),
        (lambda: FactsData(asked=999), "dataset.asked"),
        (lambda: FactsData(same_place=2), "dataset.same_place"),
    ],
)  # fmt: skip
def test_what_can_t_be_judged_is_refused(make: Any, key: str) -> None:
    FactTracing(counts=[len(facts().train)]).check(run_of(facts()))  # all of them can be counted
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.key == key
