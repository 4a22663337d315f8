import math

import pytest
import torch
import torch.nn.functional as F

from hf_calib.functional import reducing
from hf_calib.functional.losses import (
    brier_loss,
    confidence_penalty_loss,
    cross_entropy_loss,
    dual_focal_loss,
    focal_loss,
    label_smoothing_loss,
    margin_label_smoothing_loss,
    sample_dependent_focal_loss,
)

from .every import LargeTensors


pytestmark = pytest.mark.usefixtures("blocks")
ALL = [
    cross_entropy_loss,
    label_smoothing_loss,
    margin_label_smoothing_loss,
    focal_loss,
    sample_dependent_focal_loss,
    dual_focal_loss,
    brier_loss,
    confidence_penalty_loss,
]
# Where every class must be possible
NEUTRAL = {label_smoothing_loss: {"label_smoothing": 0.0}, margin_label_smoothing_loss: {"alpha": 0.0}}
of_shares = pytest.mark.parametrize("loss", [loss for loss in ALL if loss is not dual_focal_loss])
every_loss = pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (7, 5), generator=generator)
    labels[torch.rand(7, 5, generator=generator) < 0.3] = -100
    assert (labels == -100).any()
    return logits, labels


@every_loss
def test_gradients_are_the_derivatives(loss, batch):
    logits, labels = batch
    logits.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda z, r=reduction: loss(z, labels, reduction=r), (logits,))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_gradients_for_other_gammas(gamma, batch):
    logits, labels = batch
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, labels, gamma=gamma), (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neutral_settings_equal_cross_entropy(batch, dtype):
    logits, labels = batch[0].to(dtype), batch[1]
    expected = F.cross_entropy(logits.reshape(-1, 4), labels.reshape(-1))
    for loss in (
        cross_entropy_loss(logits, labels),
        focal_loss(logits, labels, gamma=0.0),
        dual_focal_loss(logits, labels, gamma=0.0),
        sample_dependent_focal_loss(logits, labels, gamma=0.0, gamma_less_sure=0.0),
        label_smoothing_loss(logits, labels, label_smoothing=0.0),
        margin_label_smoothing_loss(logits, labels, alpha=0.0),
        margin_label_smoothing_loss(logits, labels, margin=100.0),
        confidence_penalty_loss(logits, labels, beta=0.0),
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.05, 0.1, 0.5])
def test_label_smoothing_equals_torch(batch, label_smoothing):
    logits, labels = batch
    for reduction in ("mean", "sum"):
        expected = F.cross_entropy(
            logits.reshape(-1, 4), labels.reshape(-1), label_smoothing=label_smoothing, reduction=reduction
        )
        loss = label_smoothing_loss(logits, labels, label_smoothing=label_smoothing, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_values_by_hand():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64).log() + 5
    labels = torch.tensor([0, 1])
    expected = {
        cross_entropy_loss: [-math.log(0.6), -math.log(0.2)],
        focal_loss: [-(0.4**3) * math.log(0.6), -(0.8**3) * math.log(0.2)],
        brier_loss: [0.16 + 0.09 + 0.01, 0.04 + 0.64 + 0.36],
        label_smoothing_loss: [
            -0.95 * math.log(0.6) - 0.05 / 3 * math.log(0.6 * 0.3 * 0.1),
            -0.95 * math.log(0.2) - 0.05 / 3 * math.log(0.2 * 0.2 * 0.6),
        ],
        margin_label_smoothing_loss: [
            -math.log(0.6) + 0.1 / 3 * (math.log(0.6 / 0.1) - 1),
            -math.log(0.2) + 0.1 / 3 * 2 * (math.log(0.6 / 0.2) - 1),
        ],
        sample_dependent_focal_loss: [-(0.4**3) * math.log(0.6), -(0.81**5) * math.log(0.19)],
        dual_focal_loss: [-(0.7**5) * math.log(0.6), -(0.8**5) * math.log(0.2)],
        confidence_penalty_loss: [
            -math.log(0.6) + 0.1 * sum(p * math.log(p) for p in (0.6, 0.3, 0.1)),
            -math.log(0.2) + 0.1 * sum(p * math.log(p) for p in (0.2, 0.2, 0.6)),
        ],
    }
    less_sure = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.19, 0.61]], dtype=torch.float64).log() - 3
    for loss in ALL:
        rows = less_sure if loss is sample_dependent_focal_loss else logits
        options = {"margin": 1.0} if loss is margin_label_smoothing_loss else {}
        value = loss(rows, labels, reduction="none", **options)
        torch.testing.assert_close(value, torch.tensor(expected[loss], dtype=torch.float64), rtol=1e-12, atol=0)


@every_loss
def test_ignored_rows_leave_no_trace(loss, batch):
    logits, labels = batch
    kept = labels != -100
    logits = torch.where(kept[..., None], logits, torch.nan).requires_grad_()
    losses = loss(logits, labels, reduction="none")
    assert losses.shape == labels.shape
    assert (losses[~kept] == 0).all()
    torch.testing.assert_close(losses[kept], loss(logits[kept], labels[kept], reduction="none"))
    torch.testing.assert_close(loss(logits, labels), losses[kept].mean())
    loss(logits, labels).backward()
    assert (logits.grad[~kept] == 0).all()
    assert logits.grad.isfinite().all()
    other = torch.where(kept, labels, 9)
    torch.testing.assert_close(loss(logits, other, ignore_index=9), loss(logits, labels))


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
def test_sums_over_a_split_are_the_whole(loss, batch):
    logits, labels = batch
    for cuts in ([1, 6], [2, 2, 3]):
        parts = zip(logits.split(cuts), labels.split(cuts), strict=True)
        total = sum(loss(z, y, reduction="sum") for z, y in parts)
        torch.testing.assert_close(total, loss(logits, labels, reduction="sum"), rtol=1e-12, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 6e4])
@pytest.mark.parametrize("right", [True, False], ids=["all right", "all wrong"])
def test_finite_on_saturated_batches(loss, dtype, scale, right):
    logits = torch.zeros(3, 4, dtype=dtype)
    logits[:, 1] = scale
    logits.requires_grad_()
    labels = torch.full((3,), 1 if right else 2)
    value = loss(logits, labels)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad.dtype == dtype
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
def test_focal_is_finite_at_probability_one(gamma):
    # The power's own derivative is infinite there for gamma < 1.
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    value = focal_loss(logits, torch.tensor([0, 0]), gamma=gamma, reduction="none")
    value.sum().backward()
    assert value[0] == 0
    assert (logits.grad[0] == 0).all()
    assert logits.grad.isfinite().all()


@every_loss
def test_a_masked_class_changes_nothing(loss):
    kwargs = {label_smoothing_loss: {"label_smoothing": 0.0}, margin_label_smoothing_loss: {"alpha": 0.0}}.get(
        loss, {}
    )
    logits = torch.tensor([[1.0, 0.5, -torch.inf]], requires_grad=True)
    value = loss(logits, torch.tensor([0]), **kwargs)
    torch.testing.assert_close(value, loss(logits[:, :2], torch.tensor([0]), **kwargs))
    value.backward()
    assert logits.grad.isfinite().all()


@every_loss
def test_half_precision_is_computed_in_float32(loss, batch):
    logits, labels = batch
    for dtype in (torch.bfloat16, torch.float16):
        half = logits.to(dtype)
        assert torch.equal(loss(half, labels), loss(half.float(), labels))


@every_loss
@pytest.mark.parametrize(
    ("logits", "labels", "kwargs", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long(), {}, r"logits: got a torch.int64 tensor"),
        (torch.zeros(2, 3), torch.zeros(2).bool(), {}, r"labels: got a torch.bool tensor; allowed are class numbers"),
        (
            torch.zeros(2, 3),
            torch.zeros(3).long(),
            {},
            r"labels: got torch.int64 of shape \(3,\) for .*2, 3",
        ),
        (torch.tensor(0.0), torch.tensor(0), {}, r"labels: got torch.int64 of shape \(\) for logits of shape \(\)"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"class_weights": [1, 2]}, r"class_weights: got shape \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"class_weights": 2.0}, r"class_weights: got shape \(\)"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"class_weights": [1, -1, 1]}, r"class_weights: got \[1.0, -1.0"),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"class_weights": [0, 0, 0]},
            "class_weights: .* not all of them 0",
        ),
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, r"labels: got 3; allowed are 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), {}, r"labels: got -1; allowed are 0 to 2"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {"reduction": "avg"}, r"reduction: got 'avg'; allowed are 'mean'"),
    ],
)
def test_refusals(loss, logits, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        loss(logits, labels, **kwargs)


@of_shares
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2), r"labels: got torch.float32 of shape \(2,\) for logits of shape \(2, 3\); allowed for"),
        (torch.full((2, 3), 0.5), r"labels: row 0 is \[0.5, 0.5, 0.5\] with sum 1.5; allowed are shares from 0 up"),
        (torch.tensor([[0.5, 0.5, 0], [2, -1, 0]]), r"labels: row 1 is \[2.0, -1.0, 0.0\]"),
        (torch.full((2, 3), torch.nan), r"labels: row 0 is \[nan"),
    ],
)
def test_shares_out_of_range(loss, labels, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(2, 3), labels)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (focal_loss, "gamma"),
        (dual_focal_loss, "gamma"),
        (sample_dependent_focal_loss, "gamma"),
        (sample_dependent_focal_loss, "gamma_less_sure"),
        (margin_label_smoothing_loss, "margin"),
        (margin_label_smoothing_loss, "alpha"),
        (confidence_penalty_loss, "beta"),
    ],
)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1", True, None])
def test_hyperparameters_out_of_range(loss, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got .*; allowed are finite numbers from 0 up"):
        loss(torch.zeros(2, 3), torch.zeros(2).long(), **{name: value})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1", True, None, 1.0])
def test_label_smoothing_out_of_range(value):
    with pytest.raises(ValueError, match=r"label_smoothing: got .*; allowed are numbers in \[0, 1\)"):
        label_smoothing_loss(torch.zeros(2, 3), torch.zeros(2).long(), label_smoothing=value)


# -- soft labels and class weights


@of_shares
def test_a_row_of_shares_is_the_mean_over_its_labels(loss, batch):
    logits, labels = batch[0].requires_grad_(), batch[1]
    shares = torch.rand(7, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shares[0, 0, 1] = 0
    shares /= shares.sum(-1, keepdim=True)
    ignored = labels == -100
    shares[ignored] = -100
    each = [loss(logits, torch.full_like(labels, k).where(~ignored, -100), reduction="none") for k in range(4)]
    expected = (torch.stack(each, -1) * shares.where(~ignored[..., None], 0.0)).sum(-1)
    found = loss(logits, shares, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss(logits, shares), expected[~ignored].mean())
    assert torch.autograd.gradcheck(lambda z: loss(z, shares), (logits,))


def test_the_dual_focal_loss_has_no_shares():
    with pytest.raises(ValueError, match=r"labels: got a torch.float32 tensor; allowed for the dual focal loss"):
        dual_focal_loss(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))


@of_shares
def test_a_masked_class_without_a_share_changes_nothing(loss):
    kwargs = {label_smoothing_loss: {"label_smoothing": 0.0}, margin_label_smoothing_loss: {"alpha": 0.0}}.get(
        loss, {}
    )
    logits = torch.tensor([[1.0, 0.5, -torch.inf]], requires_grad=True)
    value = loss(logits, torch.tensor([[0.5, 0.5, 0.0]]), **kwargs)
    torch.testing.assert_close(value, loss(logits[:, :2], torch.tensor([[0.5, 0.5]]), **kwargs))
    value.backward()
    assert logits.grad.isfinite().all()


@every_loss
def test_a_class_of_weight_two_counts_as_twice_its_rows(loss, batch):
    logits, labels = batch[0].reshape(-1, 4).requires_grad_(), batch[1].reshape(-1)
    twice = torch.cat([torch.arange(35), (labels == 2).nonzero()[:, 0]])
    weights = [1, 1, 2, 1]
    for reduction in ("mean", "sum"):
        found = loss(logits, labels, class_weights=weights, reduction=reduction)
        torch.testing.assert_close(found, loss(logits[twice], labels[twice], reduction=reduction))
    assert (loss(logits, labels, class_weights=[0, 0, 1, 0], reduction="none")[labels != 2] == 0).all()
    if loss is not dual_focal_loss:
        one_hot = F.one_hot(labels.clamp_min(0), 4).double().where(labels[:, None] != -100, -100.0)
        torch.testing.assert_close(
            loss(logits, one_hot, class_weights=weights), loss(logits, labels, class_weights=weights)
        )
        shares = torch.full((2, 4), 0.25, dtype=torch.float64)
        each = [loss(logits[:2], torch.full((2,), k), reduction="none") * weights[k] for k in range(4)]
        found = loss(logits[:2], shares, class_weights=weights, reduction="none")
        torch.testing.assert_close(found, torch.stack(each).mean(0))


def test_class_weights_of_cross_entropy_are_torchs(batch):
    logits, labels = batch[0].reshape(-1, 4), batch[1].reshape(-1)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, labels, weight=weights, reduction=reduction)
        found = cross_entropy_loss(logits, labels, class_weights=weights, reduction=reduction)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # weights are float32


@of_shares
def test_shares_may_be_rounded_as_their_precision_rounds(loss):
    shares = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(logits, shares.bfloat16()), loss(logits, shares), rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="labels: row 0 is"):
        loss(logits, (0.95 * shares).bfloat16())


@every_loss
def test_autocast_changes_nothing(loss, batch):
    logits, labels = batch[0].float(), batch[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, labels)
    assert torch.equal(found, loss(logits, labels))


@pytest.mark.parametrize("weights", ["balanced", {"a": 1}, [None, 1, 1], [[1], [1, 2]]])
def test_class_weights_that_are_no_numbers(weights):
    with pytest.raises(ValueError, match=r"class_weights: got .*; allowed are a tensor or a list of numbers"):
        cross_entropy_loss(torch.zeros(2, 3), torch.zeros(2).long(), class_weights=weights)


# -- memory


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_the_logits_there_is_only_their_gradient(loss, dtype, monkeypatch):
    monkeypatch.setitem(reducing.BLOCK_LOGITS, "cpu", 1000)
    logits = torch.randn(64, 100, dtype=dtype, requires_grad=True)
    labels = torch.arange(64).where(torch.arange(64) % 5 > 0, -100)
    with LargeTensors(logits.numel()) as large:
        loss(logits, labels).backward()
    assert large.made == ["aten.empty_like.default"]
    with LargeTensors(logits.numel()) as large:
        F.cross_entropy(logits.detach().float().requires_grad_(), labels).backward()
    assert len(large.made) > 1
