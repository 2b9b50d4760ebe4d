"""Parameters, megabytes, latency and accuracy of a teacher and its students, as a Markdown table.

    python bench.py --demo                                       # what `python distill.py --demo` has left in outputs
    python bench.py --teacher_id T --student_id S1,S2 --dataset_id nyu-mll/glue --dataset_config sst2

Models are measured as they would be served: in eval mode, under inference_mode, with weights in the given precision.
All get the same texts, each batch padded to its longest, and are compared with the teacher, or else the first student.
"""

import copy
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.stats import binomtest  # comes with sagemaker
from tqdm import tqdm

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
    student_id: list = flag(None, "Hub ids or local folders")
    # Data
    dataset_id: str = flag(None, "Hub id, or local folder or file; without it there is no accuracy")
    dataset_config: str = flag(None, "configuration of a Hub data set")
    train_split: str = flag("train", "split with labels, that the class names are read from")
    eval_split: str = flag("validation", "split to score; slices such as 'test[:1000]' work")
    text_columns: list = flag(None, "one or two; by default found by their usual names")
    label_column: str = flag("label", "column of the true labels")
    max_length: int = flag(512, "tokens per example, at most", at_least=3)
    demo: bool = flag(False, "the demo's test split, and the models that the demo leaves in ./outputs")
    # The grid of measurements; the headline is the first of each list
    batch_sizes: list = flag("1,8,32,128", "examples per batch")
    lengths: list = flag(None, "tokens per example, or real: the data's own; by default real,16,64,128")
    precision: list = flag("fp32", f"of the weights: {', '.join(DTYPES)}")
    compile: bool = flag(False, "measure every model under torch.compile, too")
    onnx: bool = flag(False, "export every model, measure it in ONNX Runtime too, in fp32 and int8")
    min_run_time: float = flag(0.5, "seconds to time each model in each cell, at least", above=0)
    # Machine
    device: str = flag("auto", "auto is cuda where there is a GPU", choices=("auto", "cpu", "cuda"))
    threads: int = flag(torch.get_num_threads(), "CPU threads", at_least=1)
    # What a run leaves behind
    output: str = flag("bench.json", "JSON file of every figure")
    model_card: str = flag(None, "put the tables into DIR/README.md, in place of older ones", metavar="DIR")

    def __post_init__(self):
        self.lengths = self.lengths or (["real"] if self.dataset_id else []) + ["16", "64", "128"]
        self.models = [name for name in (self.teacher_id, *(self.student_id or [])) if name]
        numbers = [size for size in self.lengths if size != "real"]
        data.check(self.models, "no model is named: give --teacher_id and --student_id, one of them, or --demo")
        data.check(len(set(self.models)) == len(self.models), "--student_id: a model is named twice")
        data.check(all(n.isdecimal() and int(n) >= 1 for n in self.batch_sizes), "--batch_sizes: numbers from 1")
        data.check(all(n.isdecimal() and int(n) >= 3 for n in numbers), "--lengths: numbers from 3, or 'real'")
        data.check(self.dataset_id or numbers == self.lengths, "--lengths real needs a data set: give --dataset_id")
        self.batch_sizes = [int(size) for size in self.batch_sizes]
        self.lengths = [size if size == "real" else int(size) for size in self.lengths]


# The defaults under --demo. The test split, since validation chose the student's epoch.
DEMO = {"teacher_id": "./outputs/teacher", "student_id": "./outputs", "dataset_id": "demo", "eval_split": "test"}

# --- The run ---------------------------------------------------------------------------------------------------------


def run(args, device, conditions):
    """Measure all models and report. Raises UserError."""
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read by the tokenizers when they first start threads

    # 1. Read.
    split = class_names = None
    if args.dataset_id:
        roles = {"train": args.train_split, "eval": args.eval_split}
        source = (args.dataset_id, args.dataset_config, roles, args.text_columns, args.label_column)
        splits, class_names = distill.from_rank0(lambda: data.load_splits(*source))  # a file's errors become a line
        split = splits["eval"]
    models = load_models(args, class_names)
    texts = {cell: text_batches(split, *cell) for cell in itertools.product(args.batch_sizes, args.lengths)}

    # 2. Every model in every precision and runtime. All are on the device together, since they take turns.
    variants = []
    for precision in args.precision:
        eager = [in_pytorch(model, precision, split, device, args) for model in models]
        variants += eager
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # beyond its default of 8 torch.compile silently runs eagerly
            variants += [replace(v, runtime="compiled", network=torch.compile(v.network, dynamic=True)) for v in eager]
    if args.onnx:
        exported = [variant for model in models for variant in in_onnx_runtime(model, split, args)]
        variants += sorted(exported, key=lambda variant: variant.precision)
    if split:
        for variant in variants:
            variant.figures |= compare(variant.logits, variants[0].logits, split.labels)

    # 3. Measure and report.
    cells = []
    for (_, size), batches in tqdm(texts.items(), unit=" cells", leave=False, disable=None):
        cells += measure_cell(variants, batches, size, device, args)
    rows = [{**cells[i], **variant.figures} for i, variant in enumerate(variants)]
    results = {**conditions, "arguments": asdict(args), "models": rows, "cells": cells}
    distill.write(json.dumps(results, indent=2), Path(args.output))
    text = report(rows, cells, conditions, args)
    if args.model_card:
        put_into_card(text, Path(args.model_card, "README.md"))
    print(text, json.dumps({"models": rows}), sep="\n")


@dataclass(eq=False)  # so that it can be a key
class Variant:
    """A model in one precision and one runtime: a row of the tables."""

    name: str
    tokenizer: transformers.PreTrainedTokenizerBase
    order: list  # logits[:, order] are those of the data set's classes, or without a data set of the first model's
    network: Callable  # of a batch's inputs, by name
    precision: str = "fp32"
    runtime: str = "PyTorch"  # or compiled, or ONNX Runtime
    figures: dict = field(default_factory=dict)  # size and scores
    logits: torch.Tensor | None = None  # [N, C] float32, on the CPU, of the evaluation split


def load_models(args, class_names):
    """All models as Variants on the CPU: they have the same classes and read --lengths tokens."""
    models = []
    for name in args.models:
        network, tokenizer = data.load_model(name)
        own_names = data.class_names(network.config)
        class_names = class_names or own_names
        order = data.match_classes(own_names, class_names)
        mismatch = f"{name} has the classes {', '.join(own_names)}, not {', '.join(class_names)}"
        data.check(order, f"{mismatch}: leave it out, or rename them in its config.json")
        limit = tokenizer.model_max_length
        fits = all(size == "real" or size <= limit for size in args.lengths)
        data.check(fits, f"--lengths: {name} reads {limit} tokens at most")
        figures = {"parameters": network.num_parameters()}
        figures["without_embeddings"] = network.num_parameters(exclude_embeddings=True)
        models.append(Variant(name, tokenizer, order, network, figures=figures))
    return models


def in_pytorch(model, precision, split, device, args):
    """A model of load_models() in this precision, on the device, with its logits."""
    network = copy.deepcopy(model.network).to(device, DTYPES[precision])
    weights = sum(tensor.nbytes for tensor in itertools.chain(network.parameters(), network.buffers()))
    figures = {**model.figures, "megabytes": weights / 1e6}
    variant = replace(model, network=network, precision=precision, figures=figures)
    if split:
        tokens = data.tokenize(model.tokenizer, network.config, args.max_length, split.texts, args.eval_split)
        # "fp32" means no autocast here: the weights are already in their precision.
        variant.logits = distill.predict(network, tokens.to(device), "fp32").cpu()[:, model.order]
    return variant


# --- Latency ---------------------------------------------------------------------------------------------------------

SAMPLE = 128  # texts of the data set, the same for all models; enough batches of one text for a p99
MIN_CALLS = 5


def text_batches(split, batch_size, size):
    """The texts of one cell of the grid: a list of batches, each a list of one or two columns of strings."""
    if size != "real":  # a number is at least one token in every vocabulary, so these can be cut to exactly `size`
        return [[[" ".join(map(str, range(size)))] * batch_size]]
    data.check(batch_size <= len(split), f"--batch_sizes {batch_size}: the split has only {len(split)} examples")
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: max(SAMPLE, batch_size)]
    return [list(split.texts[part.tolist()].values()) for part in rows.split(batch_size) if len(part) == batch_size]


def encode(tokenizer, columns, max_length):
    limit = min(max_length, tokenizer.model_max_length)
    return tokenizer(*columns, truncation=True, max_length=limit, padding=True, return_tensors="pt")


def measure_cell(variants, texts, size, device, args):
    """Measure one cell of the grid, whose batches are `texts`: a dictionary for each variant.

    "model", "tokenizer" and "both" hold what describe() gives for the model alone, for turning text into padded
    tensors on the device, and for both together; the last two only where the texts are real.
    """
    max_length = args.max_length if size == "real" else size

    def tokenize(variant, i):
        return encode(variant.tokenizer, texts[i], max_length).to(device)

    numbers, batch_size = range(len(texts)), len(texts[0][0])
    inputs = {variant: [tokenize(variant, i) for i in numbers] for variant in variants}
    calls = {"model": lambda variant, i: variant.network(**inputs[variant][i])}
    if size == "real":
        calls["tokenizer"] = tokenize
        calls["both"] = lambda variant, i: variant.network(**tokenize(variant, i))
    times = {part: measure(call, variants, numbers, args.min_run_time, device) for part, call in calls.items()}
    cells = []
    for variant in variants:
        cell = {"name": variant.name, "precision": variant.precision, "runtime": variant.runtime}
        cell |= {"batch_size": batch_size, "length": size}
        cell |= {part: describe(times[part].get(variant)) for part in calls}
        cells.append(cell)
        if "error" in cell["model"]:
            continue
        p50, first = cell["model"]["p50_ms"], cells[0]["model"]
        cell["examples_per_second"] = 1000 * batch_size / p50
        if "error" not in first:
            cell["speed_up"] = first["p50_ms"] / p50
        if device.type == "cuda":
            cell["peak_megabytes"] = peak_megabytes(variant, inputs[variant])
    return cells


@torch.inference_mode()
def measure(call, models, batches, min_run_time, device):
    """Time call(model, batch) for models in turn, A B A B …: what slows the machine for a while slows all of them.

    A model drops out after min_run_time seconds and MIN_CALLS calls: a tiny student needs thousands of calls, in which
    a large teacher would take half an hour. Returns {model: seconds of every call}, without those out of memory.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    times = {model: [] for model in models}
    while running := [model for model, own in times.items() if len(own) < MIN_CALLS or sum(own) < min_run_time]:
        for batch, model in itertools.product(batches, running):
            if model not in times:
                continue
            try:
                for _ in range(2):  # the first call warms up, after another model's turn
                    synchronize()
                    start = time.perf_counter()
                    call(model, batch)
                    synchronize()
                    seconds = time.perf_counter() - start
                times[model].append(seconds)
            except RuntimeError as error:  # the CPU's allocator raises a plain RuntimeError
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                del times[model]
    return times


def describe(times):
    """The number of calls, and percentiles in ms: those beyond which there is at least one call."""
    if times is None:
        return {"error": "out of memory"}
    enough = [q for q in (25, 50, 75, 90, 99) if len(times) * (100 - q) >= 100]
    return {"calls": len(times), **{f"p{q}_ms": 1000 * float(np.percentile(times, q)) for q in enough}}


@torch.inference_mode()
def peak_megabytes(variant, batches):
    """The most GPU memory that a model occupies in its calls: with its weights, without the other models."""
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() / 1e6 - variant.figures["megabytes"]
    for inputs in batches:
        variant.network(**inputs)
    return torch.cuda.max_memory_allocated() / 1e6 - others


# --- Accuracy --------------------------------------------------------------------------------------------------------


def compare(logits, first_logits, labels):
    """distill.score() of a model, Wilson's interval of its accuracy, and how it differs from the first model.

    McNemar's test: if two models are equally good, each example that only one got right is the toss of a coin.
    """
    right, first_right = [each.argmax(-1) == labels for each in (logits, first_logits)]
    alone, first_alone = int((right & ~first_right).sum()), int((first_right & ~right).sum())
    return {
        **distill.score(logits, labels, first_logits),
        "accuracy_interval": tuple(binomtest(int(right.sum()), len(labels)).proportion_ci(method="wilson")),
        "alone_right": alone,
        "first_alone_right": first_alone,
        "mcnemar_p": binomtest(min(alone, first_alone), alone + first_alone or 1).pvalue,
    }


# --- The tables ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "model": "{name}",
    "precision": "{precision}, {runtime}",
    "parameters": "{parameters:,}",
    "without embeddings": "{without_embeddings:,}",
    "MB": "{megabytes:,.1f}",
    "batch": "{batch_size}",
    "tokens": "{length}",
    "p50 ms": "{model[p50_ms]:,.2f}",
    "p90 ms": "{model[p90_ms]:,.2f}",
    "p99 ms": "{model[p99_ms]:,.2f}",
    "calls": "{model[calls]}",
    "examples/s": "{examples_per_second:,.0f}",
    "speed-up": "{speed_up:,.2f}",
    "tokenizer p50 ms": "{tokenizer[p50_ms]:,.2f}",
    "both p50 ms": "{both[p50_ms]:,.2f}",
    "peak MB": "{peak_megabytes:,.1f}",
    "accuracy (95%)": "{accuracy:.3f} ({accuracy_interval[0]:.3f}–{accuracy_interval[1]:.3f})",
    "macro-F1": "{macro_f1:.3f}",
    "agreement": "{agreement:.3f}",
    "as in fp32": "{agreement_with_fp32:.3f}",
    "alone right": "{alone_right} : {first_alone_right}",
    "p": "{mcnemar_p:.2g}",
}
GRID_ONLY = ("batch", "tokens", "p90 ms", "p99 ms", "calls", "examples/s", "tokenizer p50 ms", "both p50 ms", "peak MB")


def report(rows, cells, conditions, args):
    """The Markdown text: a row for each model, the conditions of the measurement, and the grid."""
    names = public_names(args)
    rows, cells = [[{**row, "name": names[row["name"]]} for row in part] for part in (rows, cells)]
    named = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    command = re.sub(f"(?<![^ ,='])({named})(?![^ ,'])", lambda found: names[found[0]], conditions["command"])
    where = f"batch {args.batch_sizes[0]}, {args.lengths[0]} {'lengths' if args.lengths[0] == 'real' else 'tokens'}"
    base = f"{rows[0]['name']} in {shown(rows[0], 'precision')}"
    notes = [
        f"p50: median at {where}, each batch padded to its longest text. Speed-up: over {base}.",
        "MB: the weights, or the ONNX file. Embeddings are only looked up: they take memory, but hardly any time.",
    ]
    if args.dataset_id:
        notes += [
            f"Accuracy: on the {args.eval_split} split of {names[args.dataset_id]}, with Wilson's 95% interval.",
            f"Agreement: share of answers equal to those of {base}; as in fp32: to those of the model's own fp32 file.",
            f"Alone right: examples that only this model : only {base} got right; p: McNemar's exact test.",
        ]
    versions = ", ".join(f"{package} {version}" for package, version in conditions["versions"].items())
    threads = f"{args.threads} CPU threads, load average {conditions['load_average']:.1f} before the start"
    notes.append(f"Measured on {conditions['device']}, {threads}, {versions}: `{command}`")
    notes = "\n".join(f"- {note}" for note in notes)
    return "\n\n".join([table(rows, GRID_ONLY), notes, table(cells)])


def public_names(args):
    """What a card says for each path among the flags: its last part, or as many as tell all apart; Hub ids stay."""
    given = [value for value in (*args.models, args.dataset_id, args.model_card, args.output) if value]
    paths = [Path(os.path.abspath(os.path.expanduser(value))) for value in given]
    parts = [path.parts[1:] if path.exists() else (value,) for value, path in zip(given, paths, strict=True)]
    n = next(n for n in itertools.count(1) if len({each[-n:] for each in parts}) == len(set(parts)))
    return {value: "/".join(each[-n:]) for value, each in zip(given, parts, strict=True)}


def table(rows, leave_out=()):
    """Rows of figures in Markdown: the COLUMNS that at least one of them fills."""
    lines = [{heading: shown(row, heading) for heading in COLUMNS if heading not in leave_out} for row in rows]
    filled = [heading for heading in lines[0] if any(line[heading] != "–" for line in lines)]
    return distill.table([{heading: line[heading] for heading in filled} for line in lines])


def shown(row, heading):
    try:
        return COLUMNS[heading].format(**row)
    except KeyError:  # not measured, or too few calls for this percentile
        return row["model"].get("error", "–") if heading == "p50 ms" else "–"


def put_into_card(text, path):
    """Put text between the bench markers of a Markdown file, or at its end if it has none."""
    card, block = path.read_text(encoding="utf-8"), f"<!-- bench -->\n{text}\n<!-- /bench -->"
    before, old, after = re.split("(<!-- bench -->.*?<!-- /bench -->|$)", card, maxsplit=1, flags=re.DOTALL)
    distill.write(before + block + after if old else f"{card.rstrip()}\n\n{block}\n", path)


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------

ONNX_FILES = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}  # in onnx/: what transformers.js loads by default


def in_onnx_runtime(model, split, args):
    """A model of load_models() exported to ONNX, as Variants in fp32 and int8; none where it cannot be exported.

    The files go to onnx/ in a student's folder, or to onnx_models/ beside --output: a teacher's may be another's.
    """
    folder = Path(model.name).expanduser()
    if model.name in (args.teacher_id, "demo") or not folder.is_dir():
        # Not in a folder named like a Hub id: from then on transformers would load it in place of the Hub's model.
        folder = Path(args.output).parent / "onnx_models" / public_names(args)[model.name]
        with data.writing(folder):
            model.network.config.save_pretrained(folder)
            data.save_tokenizer(model.tokenizer, folder)
    logging.disable(logging.WARNING)  # about packages that nothing here needs
    try:
        with data.writing(folder / "onnx"):
            export(model, folder, args)
    except data.UserError:  # other logits, a folder that cannot be written
        raise
    except Exception as error:  # whatever the exporter and the quantizer meet in an unknown model
        distill.say(f"note: {model.name} is not measured in ONNX Runtime: {data.one_line(error)}")
        return []
    finally:
        logging.disable(logging.NOTSET)
    distill.say(f"{model.name} in ONNX: {folder / 'onnx'}")
    variants = []
    for precision, file in ONNX_FILES.items():
        path = folder / "onnx" / file
        network = open_session(path, args.threads)
        figures = {**model.figures, "megabytes": path.stat().st_size / 1e6}
        variant = replace(model, precision=precision, runtime="ONNX Runtime", network=network, figures=figures)
        if split:
            # One by one: in int8 the scale of a batch depends on all its texts, and so do the answers.
            examples = (encode(model.tokenizer, texts.values(), args.max_length) for texts in split.texts)
            variant.logits = torch.cat([network(**inputs) for inputs in examples])[:, model.order]
        variants.append(variant)
    if split:
        fp32, int8 = [variant.logits.argmax(-1) for variant in variants]
        variants[1].figures["agreement_with_fp32"] = (fp32 == int8).double().mean().item()
    return variants


def export(model, folder, args):
    """Write ONNX_FILES. Raises UserError if the fp32 one does not give PyTorch's logits, alone and padded."""
    import onnxscript  # only --onnx needs these
    from onnxruntime.quantization import quantize_dynamic

    texts = [" ".join(map(str, range(n))) for n in range(1, 80, 10)]
    example = dict(encode(model.tokenizer, [texts[:2]], args.max_length))
    axes = {name: {0: "batch", 1: "length"} for name in example}
    with warnings.catch_warnings(action="ignore"), tempfile.TemporaryDirectory(dir=folder) as temporary:
        fp32, int8 = [Path(temporary, file) for file in ONNX_FILES.values()]
        program = torch.onnx.export(
            model.network, kwargs=example, output_names=["logits"], dynamic_shapes=axes, verbose=False
        )
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
    packages = [importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")]
    # torch emulates a precision that the hardware lacks, but slower than fp32: nobody would serve a model that way.
    native = {"fp32": True, "bf16": distill.multiplies_bf16(device)}
    native["fp16"] = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    lacking = [precision for precision in args.precision if not native.get(precision)]
    folder, card = Path(args.output).parent, Path(args.model_card or ".", "README.md")
    data.check(args.device in ("auto", device.type), "--device cuda: torch sees no CUDA GPU here; use --device cpu")
    data.check(not args.onnx or device.type == "cpu", "--onnx measures on the CPU: add --device cpu")
    data.check(not args.onnx or all(packages), "--onnx needs packages: pip install onnx onnxscript onnxruntime")
    data.check(not lacking, f"this {device.type} does not compute in {', '.join(lacking)}: try {', '.join(DTYPES)}")
    writable = os.access(folder, os.W_OK) and not os.path.isdir(args.output)
    data.check(writable, f"cannot write the file {args.output}: make its folder, or choose another --output")
    data.check(not args.model_card or card.is_file(), f"--model_card: there is no {card} to put the tables into")


def main(argv=None):
    args = distill.parse_args(argv, Config, DEMO)
    distill.quiet_libraries()
    with distill.errors_as_lines("no figures are kept"):
        device = torch.device("cpu") if args.device == "cpu" else distill.choose_device()
        check_before_start(args, device)
        packages = ("torch", "transformers", "onnxruntime") if args.onnx else ("torch", "transformers")
        cpu = f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())} (cpu)"
        conditions = {
            "command": shlex.join(["python", "bench.py", *(argv or sys.argv[1:])]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "load_average": os.getloadavg()[0],  # what competes for the CPUs spoils all figures, PyTorch's most
            "versions": {package: importlib.metadata.version(package) for package in packages},
        }
        with distill.process_group(device):
            run(args, device, conditions)


if __name__ == "__main__":
    main()
