"""The forest beside the networks: the same as scikit-learn's out of bag, grown and asked in parts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from fimo.audit import out_of_sample
from fimo.audit.out_of_sample import TREES, _trees, _unseen_by_trees


@pytest.mark.parametrize("forest", [RandomForestClassifier, RandomForestRegressor])
@pytest.mark.filterwarnings("ignore:Some inputs do not have OOB scores")
def test_a_forest_in_parts_predicts_what_a_whole_one_does(
    forest: type[RandomForestClassifier] | type[RandomForestRegressor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_sample, "TREES", 11)
    monkeypatch.setattr(out_of_sample, "AT_A_TIME", 4)
    monkeypatch.setattr(out_of_sample, "BLOCK", 7)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((90, 5)).astype(np.float32)
    y = (x[:, 0] + 0.5 * generator.standard_normal(90) > 0).astype(int)
    whole = forest(n_estimators=11, min_samples_leaf=3, oob_score=True, random_state=3).fit(x, y)
    classes = forest is RandomForestClassifier
    expected = whole.oob_decision_function_ if classes else whole.oob_prediction_[:, None]
    found = _unseen_by_trees(forest, x, y, 2 if classes else 1, 3, min_samples_leaf=3)
    np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [100, 20_000, 30_000, 100_000, 1_000_000])
def test_each_row_has_the_votes_of_as_many_trees_whatever_the_number_of_rows(rows: int) -> None:
    seen = min(rows, out_of_sample.ROWS_OF_A_TREE)
    votes = _trees(rows) * (1 - 1 / rows) ** seen
    assert votes == pytest.approx(TREES / np.e, rel=0.01)
    assert _trees(20_000) == TREES
