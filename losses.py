"""The distillation loss: what the true labels say, mixed with what the teacher says."""

import torch
import torch.nn.functional as F

NO_LABEL = -100  # cross_entropy's own ignore_index: such an example teaches through the teacher alone


def distillation_loss(student_logits, teacher_logits, labels, alpha, temperature, *, example_count=None):
    """Mix hard cross-entropy with soft KL divergence, after Hinton, Vinyals and Dean (2015), section 2.1.

    The loss of an example with a label y is

        alpha · CE(z, y) + (1 − alpha) · T² · KL(softmax(v / T) ‖ softmax(z / T))

    with z the student's logits, v the teacher's and T the temperature. An example without a label learns from the
    teacher alone: its loss is T² · KL, whatever alpha is. The batch's loss is the mean over its examples.

    Dividing by T > 1 softens both distributions, so that the teacher's small probabilities, which say how the wrong
    classes resemble the right one, count.

    Why T²: the gradient of the KL term in z is (softmax(z / T) − softmax(v / T)) / T. For large T the difference in the
    bracket itself shrinks like 1 / T, so the whole gradient shrinks like 1 / T². The factor T² keeps its size, and with
    it the meaning of alpha, independent of T.

    Args:
        student_logits: [B, C], any floating dtype.
        teacher_logits: [B, C]; treated as constants, no gradient reaches them. May be None where alpha is 1.
        labels: [B] class indices, or NO_LABEL (−100) for an example without a true label.
        alpha: weight of the true labels, in [0, 1]. 1 is plain fine-tuning, 0 listens to the teacher alone.
        temperature: T, a float > 0.
        example_count: what the sums over examples are divided by; by default B. When a batch is split over ranks, pass
            the whole batch's count: the losses of the parts, and so their gradients, then add up to the whole batch's,
            however uneven the split.

    Returns:
        (total, hard, soft), scalars: the loss to call backward on, and, detached, the two terms before mixing, CE and
        T² · KL, each summed over the examples that have it and divided by example_count.

    Raises:
        ValueError: alpha or temperature out of range, or no teacher_logits although alpha < 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")
    example_count = example_count or len(labels)

    # Under autocast the logits are half precision, too coarse for log and exp: both softmaxes run in at least float32.
    student_logits = _at_least_float32(student_logits)
    hard = F.cross_entropy(student_logits, labels, ignore_index=NO_LABEL, reduction="sum") / example_count
    if teacher_logits is None:
        if alpha < 1:
            raise ValueError("alpha < 1 needs the teacher's logits")
        return hard, hard.detach(), torch.zeros_like(hard)

    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(_at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    kl = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(-1)
    soft = temperature**2 * kl
    weighted = torch.where(labels == NO_LABEL, soft, (1 - alpha) * soft)

    total = alpha * hard + weighted.sum() / example_count
    return total, hard.detach(), soft.detach().sum() / example_count


def _at_least_float32(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
