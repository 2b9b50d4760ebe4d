"""The distillation loss against independent oracles."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import NO_LABEL, distillation_loss

B, C = 6, 5


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    student = torch.randn(B, C, dtype=torch.float64, generator=random) * 3
    teacher = torch.randn(B, C, dtype=torch.float64, generator=random) * 3
    return student.requires_grad_(), teacher, torch.randint(C, (B,), generator=random)


def gradient(student, *args, **kwargs):
    (grad,) = torch.autograd.grad(distillation_loss(student, *args, **kwargs)["loss"], student)
    return grad


def test_equal_logits_have_no_soft_loss_and_no_gradient(batch):
    student, _, labels = batch
    parts = distillation_loss(student, student.detach(), labels, alpha=0.0, temperature=3.0)
    assert [parts["loss"].item(), parts["soft_loss"].item()] == pytest.approx([0, 0], abs=1e-14)
    assert gradient(student, student.detach(), labels, 0.0, 3.0).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_alpha_1_is_cross_entropy_bit_for_bit(batch, dtype):
    student, teacher, labels = [tensor.detach() for tensor in batch]
    student = student.to(dtype).requires_grad_()
    expected = F.cross_entropy(student.double() if dtype == torch.float64 else student.float(), labels)
    (expected_grad,) = torch.autograd.grad(expected, student)
    for logits in (teacher.to(dtype), None):
        parts = distillation_loss(student, logits, labels, alpha=1.0, temperature=4.0)
        assert torch.equal(parts["loss"], expected) and torch.equal(parts["hard_loss"], expected)
        assert torch.equal(gradient(student, logits, labels, 1.0, 4.0), expected_grad)


def test_alpha_mixes_the_two_parts(batch):
    student, teacher, labels = batch
    parts = distillation_loss(student, teacher, labels, alpha=0.3, temperature=2.5)
    assert list(parts) == ["loss", "hard_loss", "soft_loss"]
    total, hard, soft = parts.values()
    assert total.item() == pytest.approx(0.3 * hard.item() + 0.7 * soft.item(), rel=1e-12)
    assert total.requires_grad and not hard.requires_grad and not soft.requires_grad


def test_soft_loss_is_the_published_formula(batch):
    student, teacher, labels = batch
    temperature = 3.7
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum() / B
    soft = distillation_loss(student, teacher, labels, 0.0, temperature)["soft_loss"]
    assert soft.item() == pytest.approx(by_hand.item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 20.0])
def test_the_whole_loss_is_the_published_one(batch, alpha, temperature):
    """As the Trainer subclass of the published recipe has it: CE by the model, KLDivLoss(batchmean) of softmax."""
    student, teacher, labels = batch
    soft = torch.nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1)
    )
    published = alpha * F.cross_entropy(student, labels) + (1 - alpha) * soft * temperature**2
    (published_grad,) = torch.autograd.grad(published, student)
    total = distillation_loss(student, teacher, labels, alpha, temperature)["loss"]
    assert total.item() == pytest.approx(published.item(), rel=1e-6, abs=1e-6)
    assert torch.allclose(gradient(student, teacher, labels, alpha, temperature), published_grad, rtol=1e-6, atol=1e-6)


def test_a_constant_added_to_logits_changes_nothing(batch):
    student, teacher, labels = batch
    expected = distillation_loss(student, teacher, labels, 0.5, 2.0)["loss"].item()
    shift = torch.linspace(-50, 50, B, dtype=torch.float64)[:, None]
    for shifted in ((student + shift, teacher), (student, teacher - shift)):
        loss = distillation_loss(*shifted, labels, 0.5, 2.0)["loss"]
        assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 30.0])
def test_gradient_of_the_soft_term(batch, temperature):
    student, teacher, labels = batch
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / B
    assert torch.allclose(gradient(student, teacher, labels, 0.0, temperature), expected.detach(), atol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradient_by_finite_differences(batch, alpha):
    student, teacher, labels = batch
    labels = labels.clone()
    labels[0] = NO_LABEL
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher, labels, alpha, 4.0)["loss"], student)


def test_high_temperature_compares_centred_logits(batch):
    """For T → ∞ distillation becomes matching logits: Hinton et al. (2015), section 2.1, end."""
    student, teacher, labels = batch
    centred = [logits - logits.mean(-1, keepdim=True) for logits in (student, teacher)]
    limit = (centred[0] - centred[1]).square().sum(-1).mean() / (2 * C)
    soft = distillation_loss(student, teacher, labels, 0.0, temperature=1e4)["soft_loss"]
    assert soft.item() == pytest.approx(limit.item(), rel=1e-3)


def test_t_squared_keeps_the_gradients_size(batch):
    student, teacher, labels = batch
    norms = {t: gradient(student, teacher, labels, 0.0, t).norm().item() for t in (1.0, 4.0, 16.0)}
    assert max(norms.values()) < 4 * min(norms.values())
    without = {t: norm / t**2 for t, norm in norms.items()}
    assert without[16.0] < without[1.0] / 60


@pytest.mark.parametrize("sizes", [(1, 5), (2, 1, 3), (4, 2, 0)])
def test_uneven_parts_add_up_to_the_whole_batch(batch, sizes):
    student, teacher, labels = batch
    labels = labels.clone()
    labels[[1, 4]] = NO_LABEL
    whole = distillation_loss(student, teacher, labels, 0.5, 4.0)
    parts = [
        distillation_loss(*part, 0.5, 4.0, example_count=B)
        for part in zip(*(tensor.split(sizes) for tensor in (student, teacher, labels)), strict=True)
    ]
    for name in whole:
        assert sum(part[name].item() for part in parts) == pytest.approx(whole[name].item(), rel=1e-12)
    (grad,) = torch.autograd.grad(sum(part["loss"] for part in parts), student)
    assert torch.allclose(grad, gradient(student, teacher, labels, 0.5, 4.0), atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_each_example_counts_alike(batch, alpha):
    """Labelled: the mix of alpha. Without a label: the teacher alone, whatever alpha. The batch: the mean of both."""
    student, teacher, labels = batch
    labels = labels.clone()
    labels[3:] = NO_LABEL
    total, hard, soft = distillation_loss(student, teacher, labels, alpha, 4.0).values()
    labelled = distillation_loss(student[:3], teacher[:3], labels[:3], alpha, 4.0)["loss"]
    alone = distillation_loss(student[3:], teacher[3:], labels[3:], 0.0, 4.0)["loss"]
    assert total.item() == pytest.approx((3 * labelled.item() + 3 * alone.item()) / 6, rel=1e-12)
    assert hard.item() == pytest.approx(F.cross_entropy(student[:3], labels[:3]).item() * 3 / 6)
    whole = distillation_loss(student, teacher, labels.clamp(min=0), 0.0, 4.0)["loss"]
    assert soft.item() == pytest.approx(whole.item())


def test_two_classes_and_high_temperature_are_regression_of_the_gap():
    """With two classes all that a teacher says is the gap of its logits; T² · KL tends to (Δv − Δz)² / 8."""
    student, teacher = torch.randn(2, B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    gap = (teacher[:, 0] - teacher[:, 1]) - (student[:, 0] - student[:, 1])
    limit = gap.square().mean().item() / 8
    labels = torch.zeros(B, dtype=torch.long)
    soft = [distillation_loss(student, teacher, labels, 0.0, t)["soft_loss"].item() for t in (10.0, 100.0, 1000.0)]
    errors = [abs(loss - limit) for loss in soft]
    assert errors[1] < errors[0] / 50 and errors[2] < 1e-5 * limit


def test_extreme_half_precision_logits():
    student = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]], dtype=torch.float16, requires_grad=True)
    teacher = -student.detach()
    for temperature in (0.5, 1.0, 4.0):
        parts = distillation_loss(student, teacher, torch.tensor([1, 1]), 0.5, temperature)
        assert parts["loss"].dtype == torch.float32 and all(math.isfinite(part.item()) for part in parts.values())
        assert gradient(student, teacher, torch.tensor([1, 1]), 0.5, temperature).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_inside_autocast(dtype):
    student, teacher = torch.randn(B, C).to(dtype), torch.randn(B, C).to(dtype)
    labels = torch.zeros(B, dtype=torch.long)
    expected = distillation_loss(student.float(), teacher.float(), labels, 0.5, 4.0)
    with torch.autocast("cpu", dtype=dtype):
        got = distillation_loss(student, teacher, labels, 0.5, 4.0)
    assert all(part.dtype == torch.float32 and torch.equal(part, expected[name]) for name, part in got.items())


def test_no_gradient_reaches_the_teacher(batch):
    student, teacher, labels = batch
    teacher = teacher.requires_grad_()
    distillation_loss(student, teacher, labels, 0.5, 4.0)["loss"].backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize(("alpha", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, -2.0), (math.nan, 1.0)])
def test_refuses_what_makes_no_sense(batch, alpha, temperature):
    with pytest.raises(ValueError, match="must be"):
        distillation_loss(*batch, alpha, temperature)


def test_needs_a_teacher_unless_alpha_is_1(batch):
    student, _, labels = batch
    with pytest.raises(ValueError, match="teacher's logits"):
        distillation_loss(student, None, labels, 0.5, 4.0)
