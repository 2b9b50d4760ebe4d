"""The published way: a transformers.Trainer whose loss runs the teacher in every step. The yardstick of our own loop.

    python tests/trainer_way.py --teacher_id T --student_id S --dataset_id FOLDER --output_dir OUT \
        --epochs 3 --batch_size 32 --precision fp32 [--tuned]

T and S are local folders, FOLDER one of train.csv and validation.csv. The last line printed is a JSON object.
"""

import argparse
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
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FiftyBatches(LengthGroupedSampler):
    """Sorts 50 batches at a time by length, as Trainer does from 200 batches on; of less it would sort fewer."""

    def __iter__(self):
        return iter(
            get_length_grouped_indices(self.lengths, self.batch_size, mega_batch_mult=50, generator=self.generator)
        )


class DistillationTrainer(Trainer):
    """Trainer for a student, with alpha · CE + (1 − alpha) · T² · KL as its loss."""

    def __init__(self, *args, teacher, alpha, temperature, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.alpha, self.temperature = alpha, temperature

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return FiftyBatches(sampler.batch_size, lengths=sampler.lengths)
        return sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)  # with labels among the inputs, its loss is the cross-entropy
        # Today's Trainer autocasts the model that it trains, and no other.
        with torch.no_grad(), self.accelerator.autocast():
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
    if args.tuned and args.precision != "fp32":
        teacher.to(HALF[args.precision])  # autocast would convert its weights anew in every step
    label2id = student.config.label2id

    def prepare(rows):
        labels = [label2id[name] for name in rows["label"]]
        return {**tokenizer(rows["text"], truncation=True, max_length=512), "labels": labels}

    splits = datasets.load_dataset(args.dataset_id)
    splits = splits.map(prepare, batched=True, remove_columns=["text", "label"])
    faster = {"train_sampling_strategy": "group_by_length", "save_only_model": True}
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        alpha=0.5,
        temperature=4.0,
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
    trainer.save_model(args.output_dir)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "accuracy": trainer.evaluate()["eval_accuracy"]}))


if __name__ == "__main__":
    main()
