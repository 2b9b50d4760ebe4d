"""The published way: a transformers.Trainer whose loss runs the teacher in every step. The yardstick of our own loop."""

import torch
import torch.nn.functional as F
from transformers import Trainer


class DistillationTrainer(Trainer):
    """Trainer for a student, with alpha · CE + (1 − alpha) · T² · KL as its loss."""

    def __init__(self, *args, teacher, alpha, temperature, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.alpha, self.temperature = alpha, temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)  # with labels among the inputs, its loss is the cross-entropy
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        soft = F.kl_div(
            F.log_softmax(outputs.logits / self.temperature, dim=-1),
            F.softmax(teacher_logits / self.temperature, dim=-1),
            reduction="batchmean",
        )
        loss = self.alpha * outputs.loss + (1 - self.alpha) * self.temperature**2 * soft
        return (loss, outputs) if return_outputs else loss
