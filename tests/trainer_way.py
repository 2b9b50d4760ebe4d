"""The published way: a transformers.Trainer whose loss runs the teacher in every step. The yardstick of our own loop.

    python tests/trainer_way.py --teacher_id T --student_id S --dataset_id FOLDER --epochs 3 --output_dir OUT [--tuned]

T and S are local folders, FOLDER one of train.csv and validation.csv. The last line printed is a JSON object.
"""

import argparse
import contextlib
import json
import time

import datasets
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)


class DistillationTrainer(Trainer):
    """Trainer for a student, with alpha · CE + (1 − alpha) · T² · KL as its loss."""

    def __init__(self, *args, teacher, alpha, temperature, tuned=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.alpha, self.temperature = alpha, temperature
        # Today's Trainer autocasts the model that it trains, and no other: a teacher stays in fp32 unless asked for.
        self.teacher_autocast = self.accelerator.autocast if tuned else contextlib.nullcontext

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)  # with labels among the inputs, its loss is the cross-entropy
        with torch.no_grad(), self.teacher_autocast():
            teacher_logits = self.teacher(**inputs).logits.float()
        soft = F.kl_div(
            F.log_softmax(outputs.logits / self.temperature, dim=-1),
            F.softmax(teacher_logits / self.temperature, dim=-1),
            reduction="batchmean",
        )
        loss = self.alpha * outputs.loss + (1 - self.alpha) * self.temperature**2 * soft
        return (loss, outputs) if return_outputs else loss


def main(argv=None):
    parser = argparse.ArgumentParser()
    for name in ("teacher_id", "student_id", "dataset_id", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), required=True)
    parser.add_argument("--tuned", action="store_true", help="with what Trainer offers to be faster")
    args = parser.parse_args(argv)

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.student_id)
    teacher, student = [
        AutoModelForSequenceClassification.from_pretrained(folder) for folder in (args.teacher_id, args.student_id)
    ]

    def prepare(rows):
        labels = [student.config.label2id[name] for name in rows["label"]]
        return {**tokenizer(rows["text"], truncation=True, max_length=512), "labels": labels}

    splits = datasets.load_dataset(args.dataset_id)
    splits = splits.map(prepare, batched=True, remove_columns=["text", "label"])
    faster = {
        "train_sampling_strategy": "group_by_length",
        "save_only_model": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        alpha=0.5,
        temperature=4.0,
        tuned=args.tuned,
        args=TrainingArguments(
            args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=6e-5,
            fp16=args.precision == "fp16",
            bf16=args.precision == "bf16",
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **(faster if args.tuned else {}),
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda answers: {
            "accuracy": float((answers.predictions.argmax(-1) == answers.label_ids).mean())
        },
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(args.output_dir)
    print(json.dumps({"seconds": seconds, "accuracy": trainer.evaluate()["eval_accuracy"]}))


if __name__ == "__main__":
    main()
