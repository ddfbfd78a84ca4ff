import numpy as np
import pytest
from scipy.special import expit

from fimo.audit.false_discovery import error_probability, list_rates


def planted(seed, share, rows=3000, spread=3.0):
    """Log-odds against labels of two classes, some of them flipped, and against the other labels."""
    generator = np.random.default_rng(seed)
    log_odds = generator.normal(0, spread, rows)  # of the second class, which the predictor knows
    truth = generator.random(rows) < expit(log_odds)
    wrong = generator.random(rows) < share
    label = truth ^ wrong
    suspicion = np.where(label, -log_odds, log_odds)
    return suspicion, -suspicion, wrong


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_lists_hold_the_false_discovery_rate_where_the_truth_is_known(share):
    false, found, shares = [], [], []
    for seed in range(30):
        suspicion, others, wrong = planted(seed, share)
        probability, estimate = error_probability(suspicion, others)
        shares.append(estimate)
        listed = list_rates(probability, suspicion) <= 0.1
        false.append((listed & ~wrong).sum() / max(1, listed.sum()))
        # the longest list that knowledge of the truth would allow
        right = np.cumsum(~wrong[np.argsort(-suspicion)]) / np.arange(1, len(wrong) + 1)
        possible = np.nonzero(right <= 0.1)[0]
        found.append(listed.sum() / (possible[-1] + 1))
    assert np.mean(false) <= 0.1
    assert np.mean(found) > 0.3  # and they are not empty
    assert np.mean(shares) == pytest.approx(share, rel=0.3)


def test_without_errors_nothing_is_listed():
    listed = 0
    for seed in range(20):
        suspicion, others, _ = planted(seed, 0.0)
        probability, _ = error_probability(suspicion, others)
        listed += int((list_rates(probability, suspicion) <= 0.1).sum())
    assert listed == 0


def test_probabilities_rise_with_suspicion_and_rates_fall():
    suspicion, others, _ = planted(0, 0.1)
    probability, _ = error_probability(suspicion, others)
    rates = list_rates(probability, suspicion)
    order = np.argsort(-suspicion)
    assert (np.diff(probability[order]) <= 1e-12).all()
    assert (np.diff(rates[order]) >= 0).all()
    assert ((probability >= 0) & (probability <= 1) & (rates >= 0) & (rates <= 1)).all()


def test_where_no_row_is_ambiguous_the_bold_list_is_longer_and_holds_its_rate():
    false, found = {}, {}
    for certain in (False, True):
        lists = []
        for seed in range(20):
            # classes are certain, and the predictor, which learnt from wrong labels too, no surer
            generator = np.random.default_rng(seed)
            wrong = generator.random(500) < 0.05
            surprise = generator.normal(-3.0, 0.8, 500)
            suspicion = np.where(wrong, -surprise, surprise)
            listed = list_rates(error_probability(suspicion, -suspicion, certain)[0], suspicion) <= 0.1
            hits = (listed & wrong).sum()
            lists.append(((listed.sum() - hits) / max(1, listed.sum()), hits / wrong.sum()))
        false[certain], found[certain] = np.mean(lists, 0)
    assert false[False] <= false[True] <= 0.1
    assert found[True] > found[False] + 0.02
