"""The distillation loss: what the true labels say, mixed with what the teacher says."""

import torch
import torch.nn.functional as F

NO_LABEL = -100  # cross_entropy's own ignore_index: such an example teaches through the teacher alone


def distillation_loss(
    student_logits,
    teacher_logits,
    labels,
    alpha,
    temperature,
    *,
    example_count=None,
    label_count=None,
):
    """Mix hard cross-entropy with soft KL divergence, after Hinton, Vinyals and Dean (2015), section 2.1.

        total = alpha · CE(z, labels) + (1 − alpha) · T² · KL(softmax(v / T) ‖ softmax(z / T))

    with z the student's logits, v the teacher's and T the temperature. Dividing by T > 1 softens both distributions, so
    that the teacher's small probabilities, which tell how the wrong classes resemble the right one, are heard.

    Why T²: the gradient of the KL term in z is (softmax(z / T) − softmax(v / T)) / T. For large T the difference in the
    bracket itself shrinks like 1 / T, so the whole gradient shrinks like 1 / T². The factor T² keeps its size, and with
    it the meaning of alpha, independent of T.

    Args:
        student_logits: [B, C], any floating dtype.
        teacher_logits: [B, C]; treated as constants, no gradient reaches them. May be None where alpha is 1.
        labels: [B] class indices, or NO_LABEL (−100) for an example without a true label.
        alpha: weight of the true labels, in [0, 1]. 1 is plain fine-tuning, 0 listens to the teacher alone.
        temperature: T, a float > 0.
        example_count, label_count: what the KL and the cross-entropy sums are divided by; by default the examples and
            the labelled examples given here. When a batch is split over ranks, pass the whole batch's counts: the
            losses of the parts, and so their gradients, then add up to the whole batch's, however uneven the split.

    Returns:
        (total, hard, soft), scalars: the loss to call backward on, and its two parts before mixing, detached: CE, and
        T² · KL.

    Raises:
        ValueError: alpha or temperature out of range, or no teacher_logits although alpha < 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")

    # Under autocast the logits are half precision, too coarse for log and exp: both softmaxes run in at least float32.
    student_logits = _at_least_float32(student_logits)

    # Sum, then divide by a count: what reduction="mean" does, but with a count that may span several ranks.
    # A batch without any label has a hard loss of 0, not 0 / 0.
    if label_count is None:
        label_count = (labels != NO_LABEL).sum()
    hard_sum = F.cross_entropy(student_logits, labels, ignore_index=NO_LABEL, reduction="sum")
    hard = hard_sum / torch.as_tensor(label_count).clamp(min=1)
    if teacher_logits is None:
        if alpha < 1:
            raise ValueError("alpha < 1 needs the teacher's logits")
        return hard, hard.detach(), torch.zeros_like(hard)

    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(_at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    kl_sum = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
    soft = temperature**2 * kl_sum / (example_count or len(labels))  # divided by B: kl_div's "batchmean"

    total = alpha * hard + (1 - alpha) * soft
    return total, hard.detach(), soft.detach()


def _at_least_float32(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
