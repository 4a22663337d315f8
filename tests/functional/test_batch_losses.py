import math

import pytest
import torch

from hf_calib.functional import reducing
from hf_calib.functional.batch_losses import mdca_loss, mmce_loss, soft_binned_ece_loss
from hf_calib.functional.losses import cross_entropy_loss

from .every import LargeTensors


pytestmark = pytest.mark.usefixtures("blocks")
ALL = [mmce_loss, soft_binned_ece_loss, mdca_loss]
every_loss = pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, 3, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (7, 3), generator=generator)
    labels[torch.rand(7, 3, generator=generator) < 0.3] = -100
    return logits, labels


def mmce_by_hand(probs, labels):
    rows = [(max(row), float(row.index(max(row)) == label)) for row, label in zip(probs, labels, strict=True)]
    total = sum((c - r) * (d - s) * math.exp(-abs(r - s) / 0.4) for r, c in rows for s, d in rows)
    return math.sqrt(total) / len(rows)


def soft_binned_ece_by_hand(probs, labels, bins=15, temperature=0.01):
    rows = [(max(row), float(row.index(max(row)) == label)) for row, label in zip(probs, labels, strict=True)]
    sizes, offs = [0.0] * bins, [0.0] * bins
    for confidence, right in rows:
        near = [math.exp(-((confidence - (b + 0.5) / bins) ** 2) / temperature) for b in range(bins)]
        for b in range(bins):
            sizes[b] += near[b] / sum(near)
            offs[b] += near[b] / sum(near) * (right - confidence)
    return math.sqrt(sum(s / len(rows) * (o / s) ** 2 for s, o in zip(sizes, offs, strict=True) if s > 0))


def mdca_by_hand(probs, labels):
    n, classes = len(labels), len(probs[0])
    return sum(abs(sum(row[k] for row in probs) - labels.count(k)) / n for k in range(classes)) / classes


BY_HAND = {mmce_loss: mmce_by_hand, soft_binned_ece_loss: soft_binned_ece_by_hand, mdca_loss: mdca_by_hand}


@every_loss
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_it_is_cross_entropy_and_the_gap_by_hand(loss, weight, batch):
    logits, labels = batch
    kept = labels != -100
    gap = BY_HAND[loss](logits[kept].softmax(-1).tolist(), labels[kept].tolist())
    expected = cross_entropy_loss(logits, labels) + weight * gap
    torch.testing.assert_close(loss(logits, labels, weight=weight), expected, rtol=1e-9, atol=0)
    total = loss(logits, labels, weight=weight, reduction="sum")
    torch.testing.assert_close(total, expected * kept.sum(), rtol=1e-9, atol=0)
    each = loss(logits, labels, weight=weight, reduction="none")
    assert (each[~kept] == 0).all()
    torch.testing.assert_close(each.sum(), total)


@every_loss
def test_gradients_are_the_derivatives(loss, batch):
    logits, labels = batch
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda z, r=reduction: loss(z, labels, weight=3.0, reduction=r), (logits.requires_grad_(),)
        )


@every_loss
def test_autocast_changes_nothing(loss, batch):
    logits, labels = batch[0].float(), batch[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, labels)
    assert torch.equal(found, loss(logits, labels))


@every_loss
def test_ignored_rows_leave_no_trace(loss, batch):
    logits, labels = batch
    kept = labels != -100
    logits = torch.where(kept[..., None], logits, torch.nan).requires_grad_()
    value = loss(logits, labels)
    torch.testing.assert_close(value, loss(logits[kept], labels[kept]))
    value.backward()
    assert (logits.grad[~kept] == 0).all()
    assert logits.grad.isfinite().all()


@every_loss
def test_no_kept_row_is_zero(loss):
    for shape in [(3,), (0,)]:
        logits = torch.randn(*shape, 4, requires_grad=True)
        for reduction in ("mean", "sum"):
            value = loss(logits, torch.full(shape, -100), reduction=reduction)
            assert value == 0
            value.backward()
        assert (logits.grad == 0).all()


@every_loss
@pytest.mark.parametrize("right", [True, False], ids=["all right", "all wrong"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_on_saturated_batches(loss, dtype, right):
    logits = torch.zeros(3, 4, dtype=dtype)
    logits[:, 1] = 6e4
    value = loss(logits.requires_grad_(), torch.full((3,), 1 if right else 2))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@every_loss
def test_one_hot_shares_are_labels_and_shares_are_their_mean(loss, batch):
    logits, labels = batch[0].reshape(-1, 4), batch[1].reshape(-1)
    logits, labels = logits[labels != -100], labels[labels != -100]
    one_hot = torch.nn.functional.one_hot(labels, 4).double()
    torch.testing.assert_close(loss(logits, one_hot), loss(logits, labels))
    uniform = torch.full_like(one_hot, 0.25)
    total = cross_entropy_loss(logits, uniform)
    if loss is mdca_loss:
        total = total + (logits.softmax(-1).mean(0) - 0.25).abs().mean()
    elif loss is mmce_loss:
        missing, confidence = 0.25 - logits.softmax(-1).amax(-1), logits.softmax(-1).amax(-1)
        kernel = (-(confidence[:, None] - confidence).abs() / 0.4).exp()
        total = total + (missing @ kernel @ missing).sqrt() / len(missing)
    else:
        return
    torch.testing.assert_close(loss(logits, uniform), total)


@every_loss
def test_class_weights_are_of_the_cross_entropy(loss, batch):
    logits, labels = batch
    gap = loss(logits, labels) - cross_entropy_loss(logits, labels)
    weights = [0.5, 2, 1, 1]
    expected = cross_entropy_loss(logits, labels, class_weights=weights) + gap
    torch.testing.assert_close(loss(logits, labels, class_weights=weights), expected)


@every_loss
def test_beside_the_logits_there_is_only_their_gradient(loss, monkeypatch):
    monkeypatch.setitem(reducing.BLOCK_LOGITS, "cpu", 1000)
    logits = torch.randn(64, 200, requires_grad=True)
    with LargeTensors(logits.numel()) as large:
        loss(logits, torch.arange(64)).backward()
    assert large.made == ["aten.empty_like.default"]


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        *[(loss, {"weight": -1}, "weight: got -1; allowed are finite numbers from 0 up") for loss in ALL],
        *[(loss, {"reduction": "avg"}, "reduction: got 'avg'") for loss in ALL],
        (soft_binned_ece_loss, {"num_bins": 0}, "num_bins: got 0; allowed are integers from 1 up"),
        (soft_binned_ece_loss, {"temperature": 0}, "temperature: got 0; allowed are numbers above 0"),
    ],
)
def test_refusals(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(2, 3), torch.zeros(2).long(), **options)
