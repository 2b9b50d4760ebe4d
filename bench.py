"""Size, latency and accuracy of a teacher and its students, and which texts a student may answer alone.

    python bench.py --demo                                       # what `python distill.py --demo` has left in outputs
    python bench.py --teacher_id T --student_id S1,S2 --dataset_id nyu-mll/glue --dataset_config sst2

Models are measured as they would be served: in eval mode, under inference_mode, with weights in the given precision.
All get the same texts, each batch padded to its longest, and are compared with the teacher, or else the first student.
"""

import contextlib
import copy
import itertools
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

import data
import distill
from distill import flag

# --- Flags -----------------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Config:
    """Measure the size, latency and accuracy of a teacher and its students. Lists are comma-separated."""

    # Models
    teacher_id: str = flag(None, "Hub id or local folder; without it, students are compared with the first of them")
    teacher_column: list = flag(None, "instead of teacher_id: the column of its answers, or one per class")
    student_id: list = flag(None, "Hub ids or local folders")
    # Data
    dataset_id: str = flag(None, "Hub id, or local folder or file; without it there is no accuracy")
    dataset_config: str = flag(None, "configuration of a Hub data set")
    train_split: str = flag("train", "split that the students have learned from")
    eval_split: str = flag("validation", "split to score; slices such as 'test[:1000]' work")
    calibration_split: str = flag(None, "another split, or a file: texts that tell what a student may answer alone")
    text_columns: list = flag(None, "one or two; by default found by their usual names")
    label_column: str = flag("label", "column of the true labels; none: only agreement is scored")
    max_length: int = flag(512, "tokens per example, at most", at_least=3)
    demo: bool = flag(False, "the demo's test split, and the models that the demo leaves in ./outputs")
    # What is timed
    batch_size: int = flag(1, "examples per call", at_least=1)
    length: str = flag(None, "tokens per example, or real: the data's own; by default real, without a data set 64")
    precision: list = flag("fp32", f"of the weights: {', '.join(DTYPES)}")
    compile: bool = flag(False, "measure every model under torch.compile, too")
    onnx: bool = flag(False, "export every model, measure it in ONNX Runtime too, in fp32 and int8")
    min_run_time: float = flag(0.5, "seconds to time each model, at least", above=0)
    # Machine
    device: str = flag("auto", "auto is cuda where there is a GPU", choices=("auto", "cpu", "cuda"))
    threads: int = flag(torch.get_num_threads(), "of all models' calls, by default torch's count of cores", at_least=1)
    # What a run leaves behind
    output: str = flag("bench.json", "JSON file of every figure, in the working folder unless it names another")
    predictions: str = flag(None, "JSON lines file of the first student's answers, sure disagreements first")

    def __post_init__(self):
        self.models = [name for name in (self.teacher_id, *(self.student_id or [])) if name]
        self.length = self.length or ("real" if self.dataset_id else "64")
        number = self.length.isdecimal() and int(self.length) >= 3
        taught = self.dataset_id and bool(self.teacher_id) != bool(self.teacher_column)
        paired = taught and self.student_id and self.calibration_split != self.eval_split
        data.check(len({*self.models}) == len(self.models) > 0, "--teacher_id, --student_id: no model, or one twice")
        data.check(number or (self.dataset_id and self.length == "real"), "--length: from 3, or real with --dataset_id")
        data.check(taught or not self.teacher_column, "--teacher_column: of --dataset_id, instead of --teacher_id")
        data.check(paired or not self.calibration_split, "--calibration_split needs a teacher and another --eval_split")
        data.check(paired or not self.predictions, "--predictions needs --dataset_id, a teacher and --student_id")
        self.length = int(self.length) if number else "real"


# The defaults under --demo. The test split, since validation chose the student's epoch.
DEMO = {"teacher_id": "./outputs/teacher", "student_id": "./outputs", "dataset_id": "demo", "eval_split": "test"}
DEMO |= {"calibration_split": "validation"}

# --- The run ---------------------------------------------------------------------------------------------------------


def run(args, device, conditions):
    """Measure all models and report. Raises UserError."""
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read by the tokenizers when they first start threads

    # 1. Read.
    models, splits, class_names = distill.from_rank0(lambda: read(args))  # a file's errors become a line
    texts = text_batches(splits.get("eval"), args.batch_size, args.length)

    # 2. Every model in every precision and runtime. All are on the device together, since they take turns.
    variants = []
    for precision in args.precision:
        eager = [in_pytorch(model, precision, splits, device, args) for model in models]
        variants += eager
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # beyond its default of 8 torch.compile silently runs eagerly
            variants += [replace(v, runtime="compiled", network=torch.compile(v.network, dynamic=True)) for v in eager]
    if args.onnx:
        exported = [variant for model in models for variant in in_onnx_runtime(model, splits, args)]
        variants += sorted(exported, key=lambda variant: variant.precision)

    # 3. Time, compare and report.
    rows, pairs = measure_all(variants, texts, device, args), []
    if splits:
        column = {role: split.answers for role, split in splits.items()}
        labels, answers = splits["eval"].labels, column if args.teacher_column else variants[0].logits
        for variant, row in zip(variants, rows, strict=True):
            row |= compare(variant.logits["eval"], answers["eval"], labels)
        if args.calibration_split:
            pairs = [*cascades(variants, rows, answers, labels, args)]
        if args.predictions:
            student = variants[args.models.index(args.student_id[0])]
            lines = predictions(splits["eval"], answers["eval"], student.logits["eval"], class_names)
            distill.write("".join(lines), Path(args.predictions))
    results = {**conditions, "arguments": asdict(args), "models": rows, "cascades": pairs}
    distill.write(json.dumps(results, indent=2), Path(args.output))
    print(report(results), json.dumps({"models": rows, "cascades": pairs}), sep="\n")


@dataclass(eq=False)  # so that it can be a key
class Variant:
    """A model in one precision and one runtime: a row of the tables."""

    name: str
    tokenizer: transformers.PreTrainedTokenizerBase
    order: list  # logits[:, order] are those of the data set's classes, or without a data set of the first model's
    network: Callable  # of a batch's inputs, by name
    precision: str = "fp32"
    runtime: str = "PyTorch"  # or compiled, or ONNX Runtime
    figures: dict = field(default_factory=dict)  # its size
    logits: dict = field(default_factory=dict)  # role of a split: [N, C] float32, on the CPU


def read(args):
    """All models as Variants on the CPU, the splits by role, and the class names. Raises UserError."""
    loaded = [data.load_model(name) for name in args.models]
    names = [data.class_names(network.config) for network, _ in loaded]
    splits, class_names = read_splits(args, names[0]) if args.dataset_id else ({}, names[0])
    models = []
    for name, own_names, (network, tokenizer) in zip(args.models, names, loaded, strict=True):
        order, limit = data.match_classes(own_names, class_names), tokenizer.model_max_length
        mismatch = f"{name} has the classes {', '.join(own_names)}, not {', '.join(class_names)}"
        data.check(order, f"{mismatch}: leave it out, or rename them in its config.json")
        data.check(args.length == "real" or args.length <= limit, f"--length: {name} reads {limit} tokens at most")
        figures = {"parameters": network.num_parameters()}
        figures["without_embeddings"] = network.num_parameters(exclude_embeddings=True)
        models.append(Variant(name, tokenizer, order, network, figures=figures))
    return models, splits, class_names


def read_splits(args, model_classes):
    """The splits to score and to calibrate on, by role, and the data's classes in the order of the first model's."""
    source, answers = (args.dataset_id, args.dataset_config), args.teacher_column or ()
    names, columns = {"train": args.train_split, "eval": args.eval_split}, (args.text_columns, args.label_column)
    splits, class_names = data.load_splits(*source, names, *columns, answers, model_classes)
    data.check((splits["eval"].answers is None) != bool(answers), "--teacher_column: --eval_split has no such column")
    if args.calibration_split:
        names, columns = {"train": args.calibration_split}, splits["eval"].texts.column_names
        file = Path(args.calibration_split).expanduser()
        if file.is_file():
            source, names = (str(file), None), {"train": "train"}
            columns = ["text", *columns[1:]] if file.suffix == ".txt" else columns
        # As text to learn from, which need not have labels: what is compared here are answers.
        found, _ = data.load_splits(*source, names, columns, "none", answers, class_names)
        splits["calibration"] = found["train"]
        train, scored, new = [{*zip(*split.texts[:].values(), strict=True)} for split in splits.values()]
        if known := len(new & (train | scored)):
            print(f"warning: {known:,} texts to calibrate on are in training or eval too: the promises may not hold")
    return {role: split for role, split in splits.items() if role != "train"}, class_names


def in_pytorch(model, precision, splits, device, args):
    """A model of read() in this precision, on the device, with its logits."""
    network = copy.deepcopy(model.network).to(device, DTYPES[precision])
    weights = sum(tensor.nbytes for tensor in itertools.chain(network.parameters(), network.buffers()))
    figures = {**model.figures, "megabytes": weights / 1e6}
    how = (model.tokenizer, network.config, args.max_length)
    tokens = {role: data.tokenize(*how, splits[role].texts, role).to(device) for role in splits}
    # "fp32" means no autocast here: the weights are already in their precision.
    logits = {role: distill.predict(network, tokens[role], "fp32").cpu()[:, model.order] for role in splits}
    return replace(model, network=network, precision=precision, figures=figures, logits=logits)


# --- Latency ---------------------------------------------------------------------------------------------------------

SAMPLE = 128  # texts of the data set, the same for all models; enough batches of one text for a p99
MIN_CALLS = 5


def text_batches(split, batch_size, length):
    """The texts that are timed: a list of batches, each a list of one or two columns of strings."""
    if length != "real":  # a number is at least one token in every vocabulary, so these can be cut to exactly `length`
        return [[[" ".join(map(str, range(length)))] * batch_size]]
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    rows = rows.repeat(-(-batch_size // len(split)))[: max(SAMPLE, batch_size)]  # a small split's fill a batch together
    return [list(split.texts[part.tolist()].values()) for part in rows.split(batch_size) if len(part) == batch_size]


def encode(tokenizer, columns, max_length):
    limit = min(max_length, tokenizer.model_max_length)
    return tokenizer(*columns, truncation=True, max_length=limit, padding=True, return_tensors="pt")


def measure_all(variants, texts, device, args):
    """Time all variants on `texts`, a list of batches. Returns a row of the table for each, a dictionary.

    Of real texts, turning them into padded tensors on the device is timed too: "tokenizer", and with the model, "both".
    """
    batches, max_length = range(len(texts)), args.max_length if args.length == "real" else args.length

    def tokenize(variant, i):
        return encode(variant.tokenizer, texts[i], max_length).to(device)

    inputs = {variant: [tokenize(variant, i) for i in batches] for variant in variants}
    calls = {"model": lambda variant, i: variant.network(**inputs[variant][i])}
    if args.length == "real":
        calls |= {"tokenizer": tokenize, "both": lambda variant, i: variant.network(**tokenize(variant, i))}
    times = {part: measure(call, variants, batches, args.min_run_time, device) for part, call in calls.items()}
    rows = []
    for variant in variants:
        row = {"name": variant.name, "precision": variant.precision, "runtime": variant.runtime, **variant.figures}
        rows.append(row | {part: describe(times[part][variant]) for part in calls})
        rows[-1]["speed_up"] = rows[0]["model"]["p50_ms"] / rows[-1]["model"]["p50_ms"]
    return rows


@torch.inference_mode()
def measure(call, models, batches, min_run_time, device):
    """Time call(model, batch) for models in turn, A B A B …: what slows the machine for a while slows all of them.

    A model drops out after min_run_time seconds and MIN_CALLS calls: a tiny student needs thousands of calls, in which
    a large teacher would take half an hour. Returns {model: seconds of every call}.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    times = {model: [] for model in models}
    while running := [model for model, own in times.items() if len(own) < MIN_CALLS or sum(own) < min_run_time]:
        for batch, model in itertools.product(batches, running):
            for _ in range(2):  # the first call warms up, after another model's turn
                synchronize()
                start = time.perf_counter()
                call(model, batch)
                synchronize()
                seconds = time.perf_counter() - start
            times[model].append(seconds)
    return times


def describe(times):
    """The number of calls, and percentiles in ms: those beyond which there is at least one call."""
    enough = [q for q in (25, 50, 75, 90, 99) if len(times) * (100 - q) >= 100]
    times = 1000 * torch.tensor(times, dtype=torch.float64)
    return {"calls": len(times), **{f"p{q}_ms": times.quantile(q / 100).item() for q in enough}}


# --- Accuracy, and cascades: a student answers the texts of which it is sure, the teacher all others -----------------

PROMISES = (0.95, 0.98, 0.99, 0.995)  # shares of all texts that get the teacher's answer, at least
RISK = 0.05  # of a broken promise, over the draw of the texts to calibrate on


def compare(logits, first_logits, labels):
    """distill.score() of a model, Wilson's 95% intervals and, with labels, McNemar's test against the first model."""
    from scipy.stats import binomtest  # only a data set needs it

    answers, first_answers = logits.argmax(-1), first_logits.argmax(-1)
    right, first_right = answers == labels, first_answers == labels
    scores = distill.score(logits, labels, first_logits)
    for name, hits in (("accuracy", right), ("agreement", answers == first_answers)):
        interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        scores |= {f"{name}_interval": tuple(interval)} if name in scores else {}
    if "accuracy" in scores:  # if both models are equally good, what only one got right is the toss of a coin
        alone, first_alone = int((right & ~first_right).sum()), int((first_right & ~right).sum())
        p = binomtest(min(alone, first_alone), alone + first_alone or 1).pvalue
        scores |= {"alone_right": alone, "first_alone_right": first_alone, "mcnemar_p": p}
    return scores


def predictions(split, teacher_logits, logits, class_names):
    """Yield a line of JSON for each text: first where student and teacher disagree, what the student is surest of."""
    (sure, answers), theirs = logits.double().softmax(-1).max(-1), teacher_logits.argmax(-1)
    for i in (sure + (answers != theirs)).argsort(descending=True, stable=True).tolist():
        named = {"label": split.labels[i], "teacher": theirs[i], "student": answers[i]}
        named = {key: class_names[place] for key, place in named.items() if place != distill.NO_LABEL}
        line = {"row": i + 1, "text": "\t".join(split.texts[i].values()), **named, "probability": sure[i].item()}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def cascades(variants, rows, answers, labels, args):
    """Yield what each student, and its int8 file, may answer alone under each promise, and how that does on eval."""
    for (variant, row), promise in itertools.product(zip(variants, rows, strict=True), PROMISES):
        if variant.name == args.teacher_id or (variant.runtime != "PyTorch" and variant.precision != "int8"):
            continue  # others than int8 answer as in PyTorch
        threshold = least_confidence(variant.logits["calibration"], answers["calibration"], promise)
        own, teachers = variant.logits["eval"], answers["eval"]
        alone = confidence(own) > threshold
        pair = {"name": variant.name, "precision": variant.precision, "runtime": variant.runtime}
        pair |= {"promise": promise, "threshold": threshold, "alone": alone.double().mean().item()}
        if alone.any():
            pair["own_agreement"] = (own.argmax(-1) == teachers.argmax(-1))[alone].double().mean().item()
        if args.teacher_id:  # a column takes no time
            pair["ms"] = row["model"]["p50_ms"] + (1 - pair["alone"]) * rows[0]["model"]["p50_ms"]
            pair["speed_up"] = rows[0]["model"]["p50_ms"] / pair["ms"]
        yield pair | compare(torch.where(alone[:, None], own, teachers), teachers, labels)


def confidence(logits):
    """The highest probability of each example, [N] float64: in float32 all sure answers would be 1."""
    return logits.double().softmax(-1).amax(-1)


def least_confidence(logits, teacher_logits, promise):
    """The confidence above which a student may answer alone, by its and its teacher's logits [n, C] for n texts.

    Confident disagreements break the promise. Their share of all texts like these grows as the threshold falls, and
    somewhere passes 1 - promise. Below that place, c or fewer of n texts are such with a probability of at most
    P(Bin(n, 1 - promise) <= c). For the most c that keep it within RISK, the threshold is the confidence of the
    (c + 1)-th most confident one: 1, no text is answered alone, if n is too small; 0, all are, if there is none.
    Each text serves to choose and to prove: this is a nonparametric tolerance limit (Wilks 1941; Bates et al. 2021).
    """
    from scipy.stats import binom

    too_many = int(binom.ppf(RISK, len(logits), 1 - promise))  # c + 1
    disagree = logits.argmax(-1) != teacher_logits.argmax(-1)
    ranked = [1.0, *confidence(logits)[disagree].sort(descending=True).values.tolist(), 0.0]
    return ranked[min(too_many, len(ranked) - 1)]


# --- The tables ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "model": "{name}",
    "precision": "{precision}, {runtime}",
    "parameters": "{parameters:,}",
    "without embeddings": "{without_embeddings:,}",
    "MB": "{megabytes:,.1f}",
    "promise": "{promise:.1%}",
    "threshold": "{threshold:.4f}",
    "alone": "{alone:.1%}",
    "agreement there": "{own_agreement:.3f}",
    "p50 ms": "{model[p50_ms]:,.2f}",
    "p99 ms": "{model[p99_ms]:,.2f}",
    "with tokenizer": "{both[p50_ms]:,.2f}",
    "pair ms": "{ms:,.2f}",
    "speed-up": "{speed_up:,.2f}",
    "accuracy (95%)": "{accuracy:.3f} ({accuracy_interval[0]:.3f}–{accuracy_interval[1]:.3f})",
    "agreement (95%)": "{agreement:.3f} ({agreement_interval[0]:.3f}–{agreement_interval[1]:.3f})",
    "as in fp32": "{agreement_with_fp32:.3f}",
    "p": "{mcnemar_p:.2g}",
}


def report(results):
    """The Markdown text: a row for each model, one for each promise of a student, and what the columns mean."""
    args, rows, pairs = results["arguments"], results["models"], results["cascades"]
    first = f"{rows[0]['name']} in {shown(rows[0], 'precision')}"
    teacher = f"the column {','.join(args['teacher_column'])}" if args["teacher_column"] else first
    size = "real lengths" if args["length"] == "real" else f"{args['length']} tokens"
    notes = [
        f"p50: median at batch {args['batch_size']}, {size}, padded to the longest text. Speed-up: over {first}.",
        "MB: the weights, or the ONNX file. Embeddings are only looked up: they take memory, but hardly any time.",
    ]
    if "agreement" in rows[0]:
        where = f"on the {args['eval_split']} split of {args['dataset_id']}; brackets: Wilson's 95% intervals"
        notes.append(f"Agreement: the share of answers that are those of {teacher}, {where}.")
    if "accuracy" in rows[0]:
        notes.append(f"p: by McNemar's exact test, of a difference as large from {teacher} if both are equally good.")
    changed = [f"{row['changed_in_batches']:.1%} of {row['name']}'s" for row in rows if "changed_in_batches" in row]
    if changed:
        apart = f"In batches of 32, whose texts share a scale, it changes {', '.join(changed)} answers."
        notes.append(f"As in fp32: the share of int8's answers that are those of the fp32 file, text by text. {apart}")
    if pairs:
        least = data.listed(next(n for n in itertools.count() if promise**n <= RISK) for promise in PROMISES)
        notes += [
            f"Promise: with {1 - RISK:.0%} confidence, at least this share of all texts like those of"
            f" {args['calibration_split']} get the answer of {teacher}. Accuracy falls by no more than the rest."
            f" It takes at least {least} texts, is not for each class, and ends where texts or teacher change.",
            "Alone: the share that the student answers; but for its agreement there, the rest is of both together.",
        ]
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    threads = f"{args['threads']} CPU threads, load average {results['load_average']:.1f} before the start"
    notes.append(f"Measured on {results['device']}, {threads}, {versions}: `{results['command']}`")
    return "\n\n".join([*map(table, filter(None, (rows, pairs))), "\n".join(f"- {note}" for note in notes)])


def table(rows):
    """Rows of figures in Markdown: the COLUMNS that at least one of them fills."""
    filled = [heading for heading in COLUMNS if any(shown(row, heading) != "–" for row in rows)]
    return distill.table([{heading: shown(row, heading) for heading in filled} for row in rows])


def shown(row, heading):
    try:
        return COLUMNS[heading].format(**row)
    except KeyError:  # not measured, or too few calls for this percentile
        return "–"


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------

ONNX_FILES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}  # in onnx/: what transformers.js loads by default


def in_onnx_runtime(model, splits, args):
    """A model of read() exported to ONNX, as Variants in fp32 and int8; none where it cannot be exported."""
    folder = Path(model.name).expanduser()
    # A teacher's folder may be another's, and in one that is named like a Hub id transformers would find, from then on,
    # these files in place of the Hub's model.
    if model.name in (args.teacher_id, "demo") or not folder.is_dir():
        folder = Path(args.output).parent / "onnx_models" / (folder.resolve().name if folder.is_dir() else model.name)
        with data.writing(folder):
            model.network.config.save_pretrained(folder)
            data.save_tokenizer(model.tokenizer, folder)
    logging.disable(logging.ERROR)  # about packages that nothing here needs, and what the note below says
    try:
        with data.writing(folder / "onnx"):
            export(model, folder, args)
    except data.UserError:  # other logits, a folder that cannot be written
        raise
    except Exception as error:  # whatever the exporter and the quantizer meet in an unknown model
        while error.__cause__ is not None:
            error = error.__cause__
        [cause, *_] = re.split(r"\.\s", re.sub(r"\x1b\[[\d;]*m", "", str(error)))  # its first sentence, without colors
        reason = f"{data.one_line(cause or error)} ({type(error).__name__})"
        distill.say(f"note: {model.name} is not measured in ONNX Runtime: {reason}")
        return []
    finally:
        logging.disable(logging.NOTSET)
    distill.say(f"{model.name} in ONNX: {folder / 'onnx'}")
    variants = []
    for precision, file in ONNX_FILES.items():
        path = folder / "onnx" / file
        network, megabytes = open_session(path, args.threads), path.stat().st_size / 1e6
        figures = {**model.figures, "megabytes": megabytes}
        variants.append(replace(model, network=network, precision=precision, runtime="ONNX Runtime", figures=figures))
        # One by one: in int8 the scale of a batch depends on all its texts, and so do the answers.
        variants[-1].logits = {role: predict(variants[-1], split.texts, args) for role, split in splits.items()}
    if splits:
        fp32, int8 = [variant.logits["eval"].argmax(-1) for variant in variants]
        batched = predict(variants[-1], splits["eval"].texts.iter(32), args).argmax(-1)
        figures["agreement_with_fp32"] = (fp32 == int8).double().mean().item()
        figures["changed_in_batches"] = (batched != int8).double().mean().item()
    return variants


def predict(variant, batches, args):  # in ONNX Runtime
    inputs = (encode(variant.tokenizer, columns.values(), args.max_length) for columns in batches)
    return torch.cat([variant.network(**batch) for batch in inputs])[:, variant.order]


def export(model, folder, args):
    """Write ONNX_FILES. Raises UserError if the fp32 one does not give PyTorch's logits, alone and padded."""
    import onnxscript  # only --onnx needs these
    from onnxruntime.quantization import quantize_dynamic

    texts = [" ".join(map(str, range(n))) for n in range(1, 80, 10)]
    example = dict(encode(model.tokenizer, [texts[:2]], args.max_length))
    axes = {name: {0: "batch", 1: "length"} for name in example}
    with tempfile.TemporaryDirectory(dir=folder) as temporary, open(os.devnull, "w") as nowhere:
        fp32, int8 = [Path(temporary, file) for file in ONNX_FILES.values()]
        options = {"kwargs": example, "dynamic_shapes": axes, "output_names": ["logits"], "verbose": False}
        with contextlib.redirect_stderr(nowhere):  # it prints the graph of what it cannot export
            program = torch.onnx.export(model.network, **options)
        onnxscript.ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # stack traces with local paths
        program.save(fp32, external_data=False)
        network = open_session(fp32, args.threads)
        for size in (1, 8):  # another order of the same sums makes differences of about 1e-5
            inputs = encode(model.tokenizer, [texts[:size]], args.max_length)
            difference = (model.network(**inputs).logits - network(**inputs)).abs().max().item()
            data.check(difference <= 1e-3, f"{model.name}: in ONNX its logits differ by {difference:.2g}")
        # int8 are the weights of matrix products and embeddings. A scale for each column costs nothing and more than
        # halves the error. Seven bits: with eight, CPUs without VNNI instructions overflow in the sums of two products.
        quantize_dynamic(fp32, int8, per_channel=True, reduce_range=True)
        (folder / "onnx").mkdir(exist_ok=True)  # where only complete files appear
        for file in (fp32, int8):
            file.replace(folder / "onnx" / file.name)


def open_session(path, threads):
    """An ONNX file as a function of a batch's inputs, by name, that returns the logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # By default a session's threads keep spinning after a call, on cores that the model whose turn is next needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def network(**inputs):
        [logits] = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(logits)

    return network


# --- Checks before the start, main -----------------------------------------------------------------------------------


def check_before_start(args, device):
    """Fail early on what would otherwise fail at the end, or give figures that mean nothing."""
    packages = [find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")]
    # torch emulates a precision that the hardware lacks, but slower than fp32: nobody would serve a model that way.
    native = {"fp32": True, "bf16": distill.multiplies_bf16(device)}
    native["fp16"] = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    lacking = [precision for precision in args.precision if not native.get(precision)]
    data.check(args.device in ("auto", device.type), "--device cuda: torch sees no CUDA GPU here; use --device cpu")
    data.check(not args.onnx or device.type == "cpu", "--onnx measures on the CPU: add --device cpu")
    data.check(not args.onnx or all(packages), "--onnx needs packages: pip install onnx onnxscript onnxruntime")
    data.check(not lacking, f"this {device.type} does not compute in {', '.join(lacking)}: try {', '.join(DTYPES)}")
    data.check(not args.dataset_id or find_spec("scipy"), "--dataset_id needs a package: pip install scipy")
    for file in filter(None, (args.output, args.predictions)):
        writable = os.access(Path(file).parent, os.W_OK) and not os.path.isdir(file)
        data.check(writable, f"cannot write the file {file}: make its folder, or choose another")


def main(argv=None):
    args = distill.parse_args(argv, Config, DEMO)
    distill.quiet_libraries()
    with distill.errors_as_lines("no figures are kept"):
        device = torch.device("cpu") if args.device == "cpu" else distill.choose_device()
        check_before_start(args, device)
        # Arm has no model name, and torch 2.9 no torch.cpu.get_capabilities().
        cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or os.uname().machine
        conditions = {
            "command": shlex.join(["python", "bench.py", *(argv or sys.argv[1:])]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu} (cpu)",
            "load_average": os.getloadavg()[0],  # what competes for the CPUs spoils all figures, PyTorch's most
            "versions": {name: version(name) for name in ("torch", "transformers", *["onnxruntime"] * args.onnx)},
        }
        with distill.process_group(device):
            run(args, device, conditions)


if __name__ == "__main__":
    main()
