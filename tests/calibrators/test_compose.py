"""Chains, one-vs-rest: equal to what their members do by hand, whatever they are made of, saved and loaded."""

import pytest
import torch

from hf_calib.calibrators import AutoCalibrator, Chain, IsotonicCalibration, OneVsRest, PerLabel, TemperatureScaling
from hf_calib.calibrators.compose import log_odds

from .test_rows import events_of, rows_of


def test_a_chain_fits_each_member_on_what_comes_before():
    logits, labels = rows_of()
    chain = Chain([TemperatureScaling(), IsotonicCalibration()]).fit(logits, labels)
    first = TemperatureScaling().fit(logits, labels)
    second = IsotonicCalibration().fit(first(logits), labels)
    assert torch.equal(chain(logits), second(first(logits)))
    assert chain.num_labels == 3


def test_what_is_given_stays_as_it_is():
    template = TemperatureScaling()
    for kind in (Chain, OneVsRest):
        kind([template]).fit(*rows_of())
        assert template.num_labels is None


def test_a_chain_of_fitted_members_needs_no_fit():
    logits, labels = rows_of()
    first = TemperatureScaling().fit(logits, labels)
    second = IsotonicCalibration().fit(first(logits), labels)
    assert torch.equal(Chain([first, second])(logits), second(first(logits)))
    with pytest.raises(ValueError, match="not fitted"):
        Chain([first, IsotonicCalibration()])(logits)


def test_a_chain_keeps_accuracy_where_every_member_does():
    assert Chain([TemperatureScaling()]).preserves_accuracy
    assert not Chain([TemperatureScaling(), IsotonicCalibration()]).preserves_accuracy


def test_one_vs_rest_by_hand():
    logits, labels = rows_of()
    lifted = OneVsRest(TemperatureScaling()).fit(logits, labels)
    p = logits.softmax(-1)
    mapped = []
    for k in range(3):
        odds = (p[:, k] / (1 - p[:, k])).log()
        single = TemperatureScaling(task="binary").fit(odds, (labels == k).long())
        assert lifted.members[k].temperature.item() == pytest.approx(single.temperature.item(), rel=1e-5)
        mapped.append(single(odds).sigmoid())
    expected = torch.stack(mapped, -1)
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(lifted.log_probs(logits).exp(), expected, atol=1e-6, rtol=0)


def test_log_odds_do_not_cancel_near_1():
    odds = log_odds(torch.tensor([[50.0, 0.0, 0.0], [0.0, 700.0, 1.0]], dtype=torch.float64))
    assert odds[0, 0].item() == pytest.approx(50 - torch.tensor(2.0).log().item(), rel=1e-9)
    assert odds[1, 1].item() == pytest.approx(699 - torch.tensor(-1.0).exp().log1p().item(), rel=1e-9)
    pair = log_odds(torch.tensor([[1.0, 4.0]]))
    assert pair.tolist() == [[pytest.approx(-3), pytest.approx(3)]]


def test_log_odds_of_what_cannot_occur():
    odds = log_odds(torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]]))
    assert odds.tolist() == [[torch.inf, -torch.inf, -torch.inf], [0, 0, -torch.inf]]


@pytest.mark.parametrize("task", [None, "binary", "multilabel"])
@pytest.mark.parametrize("kind", [Chain, OneVsRest])
def test_composed_calibrators_come_back_as_they_were(kind, task, tmp_path):
    logits, labels = rows_of() if task is None else events_of(labels=2)
    if task == "binary":
        logits, labels = logits[:, 0], labels[:, 0]
    calibrator = kind([Chain([TemperatureScaling(), IsotonicCalibration()])], task=task).fit(logits, labels)
    calibrator.save_pretrained(tmp_path)
    loaded = AutoCalibrator.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert torch.equal(loaded(logits), calibrator(logits))
    assert loaded.tensors().keys() == calibrator.tensors().keys()
    assert torch.equal(loaded.fit(logits, labels)(logits), calibrator(logits))  # refitted as it was


def test_wrong_members_are_refused():
    for members, message in (
        ([], "members: got none; allowed are calibrators"),
        (["temperature"], "members: got 'temperature'; allowed are calibrators with task=None"),
        ([TemperatureScaling(task="binary")], r"members: got TemperatureScaling\(not fitted\); allowed are"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            Chain(members)


def test_another_calibrator_for_each_label(tmp_path):
    logits, labels = events_of(labels=2)
    members = [TemperatureScaling(task="binary"), IsotonicCalibration(task="binary")]
    calibrator = PerLabel(members).fit(logits, labels)
    for k, member in enumerate(members):
        assert torch.equal(calibrator(logits)[:, k], member.fit(logits[:, k], labels[:, k])(logits[:, k]))
    assert torch.equal(PerLabel(members)(logits), calibrator(logits))  # of fitted members it needs no fit
    calibrator.save_pretrained(tmp_path)
    assert torch.equal(AutoCalibrator.from_pretrained(tmp_path)(logits), calibrator(logits))
    with pytest.raises(ValueError, match=r"^logits: got 3 labels; allowed are 2, one for each member"):
        calibrator.fit(*events_of())
    with pytest.raises(ValueError, match=r"^members: got .*; allowed are calibrators with task='binary'"):
        PerLabel([TemperatureScaling()])
