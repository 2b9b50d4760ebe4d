"""Parameters, bytes, latency and accuracy of a teacher and its students, as a Markdown table.

    python bench.py --demo                                       # what `python distill.py --demo` has left in outputs
    python bench.py --teacher_id T --student_id S1,S2 --dataset_id nyu-mll/glue --dataset_config sst2

Models are measured as they would be served: in eval mode, under inference_mode, with weights in the given precision.
All of them get the same texts, each batch padded to its longest.
"""

import argparse
import copy
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers
from huggingface_hub import snapshot_download
from torch.utils.benchmark import Timer
from tqdm import tqdm

import data
import distill
from data import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Command line

# What --demo changes; a flag given beside it still wins. The test split, since validation chose the student's epoch.
DEMO = {"teacher_id": "./outputs/teacher", "student_id": ["./outputs"], "dataset_id": "demo", "eval_split": "test"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv=None):
    """Parse the command line. An error ends the program: one line on stderr, exit code 2."""
    parser = argparse.ArgumentParser(
        description="Measure the size, latency and accuracy of a teacher and its students.",
        formatter_class=distill.DefaultsFormatter,
        allow_abbrev=False,
    )
    parser.error = distill.fail
    boolean = {"type": distill.true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    add = parser.add_argument
    # Models
    add("--teacher_id", help="Hub id or local folder: the model that the students are compared with")
    add("--student_id", type=list_of(str), default=[], help="Hub ids or local folders, comma-separated")
    # Data
    add("--dataset_id", help="Hub id, or local folder or file; without it there is no accuracy and no real length")
    add("--dataset_config", help="configuration of a Hub data set")
    add("--train_split", default="train", help="split that the class names are read from")
    add("--eval_split", default="validation", help="split to score; slices such as 'test[:1000]' work")
    add("--text_columns", type=distill.column_names, help="one or two columns, comma-separated (default: found)")
    add("--label_column", default="label", help="column of the true labels")
    add("--max_length", type=distill.at_least(int, 3), default=512, help="tokens an example, at most")
    add(
        "--demo",
        **boolean,
        default=False,
        help="the demo's test split, and the models that the demo leaves in ./outputs",
    )
    # The grid of measurements; the headline is the first of each list
    add("--batch_sizes", type=list_of(distill.at_least(int, 1)), default=[1, 8, 32, 128], help="examples per batch")
    add(
        "--lengths",
        type=list_of(length),
        help="tokens per example; real: the data's own (default: real, if there is data, then 16,64,128)",
    )
    add("--precision", type=list_of(str), default=["fp32"], help="of the weights: fp32, bf16, fp16")
    add("--compile", **boolean, default=False, help="measure every model under torch.compile, too")
    add("--onnx", **boolean, default=False, help="export every model, measure it in ONNX Runtime too, in fp32 and int8")
    add(
        "--min_run_time", type=distill.above_zero, default=0.5, help="seconds to time each model in each cell, at least"
    )
    # Machine
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is a GPU")
    add("--threads", type=distill.at_least(int, 1), default=torch.get_num_threads(), help="CPU threads")
    # What a run leaves behind
    add("--output", default="bench.json", help="JSON file of every figure")
    add("--model_card", metavar="DIR", help="put the tables into DIR/README.md, in place of older ones")

    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    if args.lengths is None:
        args.lengths = ["real", 16, 64, 128] if args.dataset_id else [16, 64, 128]
    args.command = shlex.join(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)])
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run(args):
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read by the tokenizers when they first start threads
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # beyond its default of 8 torch.compile silently runs eagerly

    # 1. Read.
    split = class_names = None
    if args.dataset_id:
        roles = {"train": args.train_split, "eval": args.eval_split}
        splits, class_names = data.load_splits(
            args.dataset_id, args.dataset_config, roles, args.text_columns, args.label_column
        )
        split = splits["eval"]
    models = load_models(args, class_names)
    texts = {cell: text_batches(split, *cell) for cell in itertools.product(args.batch_sizes, args.lengths)}

    # 2. Every model in every precision and runtime. All are on the device together, since they take turns.
    variants = []
    for precision in args.precision:
        eager = [in_pytorch(model, precision, split, args) for model in models]
        variants += eager
        if args.compile:
            variants += [compiled(variant) for variant in eager]
    if args.onnx:
        exported = [variant for model in models for variant in in_onnx_runtime(model, split, args)]
        variants += sorted(exported, key=lambda variant: variant.precision)
    if split:
        for variant in variants:
            variant.figures |= compare(variant.logits, variants[0].logits, split.labels)

    # 3. Measure and report.
    cells = []
    for (_, size), batches in tqdm(texts.items(), unit=" cells", leave=False, disable=None):
        cells += measure_cell(variants, batches, size, args)
    first_cell = zip(variants, cells[: len(variants)], strict=True)
    rows = [{**cell, **variant.figures} for variant, cell in first_cell]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if args.onnx:
        versions["onnxruntime"] = importlib.metadata.version("onnxruntime")
    text = report(rows, cells, versions, args)
    arguments = {**vars(args), "device": args.device.type}
    distill.write_json(args.output, {"versions": versions, "arguments": arguments, "models": rows, "cells": cells})
    if args.model_card:
        put_into_card(text, os.path.join(args.model_card, "README.md"))
    print(text)
    print(json.dumps({"models": rows}))


@dataclass
class Variant:
    """A model in one precision and one runtime: a row of the tables."""

    name: str
    precision: str
    runtime: str  # PyTorch, compiled or ONNX Runtime
    network: Callable  # of a batch's inputs, by name
    tokenizer: transformers.PreTrainedTokenizerBase
    figures: dict  # size and scores
    logits: torch.Tensor | None = None  # [N, C] float32, on the CPU, of the evaluation split


def in_pytorch(model, precision, split, args):
    """A model of load_models() as a Variant."""
    network = copy.deepcopy(model.loaded).to(args.device, DTYPES[precision])
    variant = Variant(model.name, precision, "PyTorch", network, model.tokenizer, {**model.size})
    if split:
        tokens = data.tokenize(model.tokenizer, split.texts, args.max_length).to(args.device)
        # "fp32" means no autocast here: the weights are already in their precision.
        variant.logits = distill.predict(network, tokens, "fp32", model.name).cpu()[:, model.order]
    return variant


def compiled(variant):
    network = torch.compile(variant.network, dynamic=True)
    return replace(variant, runtime="compiled", network=network, figures={**variant.figures})


# ---------------------------------------------------------------------------------------------------------------------
# Latency


def measure_cell(variants, texts, size, args):
    """Measure one cell of the grid, whose batches are `texts`: a dictionary for each variant.

    "model", "tokenizer" and "both" hold what describe() gives for the model alone, for turning text into padded
    tensors on the device, and for both together; the last two only where the texts are real.
    """
    max_length = args.max_length if size == "real" else size

    def tokenize(i, batch):
        return encode(variants[i].tokenizer, texts[batch], max_length).to(args.device)

    def forward(i, batch):
        return variants[i].network(**inputs[i][batch])

    def both(i, batch):
        return variants[i].network(**tokenize(i, batch))

    inputs = [[tokenize(i, batch) for batch in range(len(texts))] for i in range(len(variants))]
    cells = []
    for variant in variants:
        cell = {"name": variant.name, "precision": variant.precision, "runtime": variant.runtime}
        cells.append({**cell, "batch_size": len(texts[0][0]), "length": size})
    parts = {"model": forward, "tokenizer": tokenize, "both": both} if size == "real" else {"model": forward}
    for part, call in parts.items():
        calls = {i: functools.partial(call, i) for i in range(len(variants))}
        times = measure(calls, range(len(texts)), args.min_run_time, args.threads)
        for i, cell in enumerate(cells):
            cell[part] = describe(times.get(i))
    teacher = cells[0]["model"]
    for cell, variant, batches in zip(cells, variants, inputs, strict=True):
        if "error" not in cell["model"]:
            p50 = cell["model"]["p50_ms"]
            cell["examples_per_second"] = 1000 * cell["batch_size"] / p50
            cell["speed_up"] = None if "error" in teacher else teacher["p50_ms"] / p50
            cell["memory_bytes"] = memory_bytes(variant.network, batches)
    return cells


def encode(tokenizer, columns, max_length):
    return tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")


SAMPLE = 128  # texts of the data set, the same for all models; enough batches of one text for a p99
MIN_CALLS = 5


@torch.inference_mode()
def measure(calls, batches, min_run_time, threads):
    """Time functions in turn, A B A B …, so that whatever slows the machine for a while slows all of them.

    One that has run long enough drops out: a tiny student needs thousands of calls, in which a large teacher would take
    half an hour.

    Timer makes each call twice to warm up and once on the clock; it synchronises the GPU before and after, and sets
    the number of threads. Its autorange would time many calls as one, and such means have no percentiles.

    Args:
        calls: {name: function of a batch}.
        batches: a list, repeated until every function has run for min_run_time seconds and MIN_CALLS times.

    Returns:
        {name: seconds of every call}, without the functions that ran out of memory.
    """
    times = {name: [] for name in calls}
    while running := [name for name, own in times.items() if len(own) < MIN_CALLS or sum(own) < min_run_time]:
        for batch in batches:
            for name in list(running):
                timer = Timer("call(batch)", globals={"call": calls[name], "batch": batch}, num_threads=threads)
                try:
                    times[name].append(timer.timeit(1).median)
                except RuntimeError as error:  # the CPU's allocator raises a plain RuntimeError
                    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                        raise
                    del times[name]
                    running.remove(name)
    return times


def describe(times):
    """The number of calls, and percentiles in ms: None where the calls are too few for one."""
    if times is None:
        return {"error": "out of memory"}
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    timing = {"calls": len(times)}
    for q in (25, 50, 75, 90, 99):
        enough = len(times) * (100 - q) >= 100  # at least one call beyond the percentile
        timing[f"p{q}_ms"] = 1000 * cuts[q - 1] if enough else None
    return timing


def text_batches(split, batch_size, size):
    """The texts of one cell of the grid: a list of batches, each a list of one or two columns of strings."""
    if size != "real":  # a number is at least one token in every vocabulary, so these can be cut to exactly `size`
        return [[[" ".join(map(str, range(size)))] * batch_size]]
    if batch_size > len(split):
        raise UserError(f"--batch_sizes {batch_size}: the split has only {len(split)} examples")
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: max(SAMPLE, batch_size)]
    return [list(split.texts[part.tolist()].values()) for part in rows.split(batch_size) if len(part) == batch_size]


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def compare(logits, teacher_logits, labels):
    """distill.score() of a model, the confidence interval of its accuracy, and how it differs from its teacher."""
    right, teacher_right = [each.argmax(-1) == labels for each in (logits, teacher_logits)]
    alone, teacher_alone = int((right & ~teacher_right).sum()), int((teacher_right & ~right).sum())
    return {
        **distill.score(logits, labels, teacher_logits),
        "accuracy_interval": wilson(int(right.sum()), len(labels)),
        "alone_right": alone,
        "teacher_alone_right": teacher_alone,
        "mcnemar_p": mcnemar(alone, teacher_alone),
    }


def wilson(hits, n):
    """The 95% interval of a proportion (Wilson, 1927), which unlike p ± 2σ also holds near 0 and 1."""
    z = statistics.NormalDist().inv_cdf(0.975)
    centre, reach = hits + z**2 / 2, z * (hits * (n - hits) / n + z**2 / 4) ** 0.5
    return (centre - reach) / (n + z**2), (centre + reach) / (n + z**2)


def mcnemar(one_alone, other_alone):
    """Exact two-sided p value of McNemar's test (1947), given the number of examples that each model alone got right.

    If the models are equally good, each of these examples is the toss of a coin: p is a tail of the binomial.
    """
    n = one_alone + other_alone
    tail, ways = 0, 1  # ways is n choose k, from its predecessor: math.comb would be slow for thousands of examples
    for k in range(min(one_alone, other_alone) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def report(rows, cells, versions, args):
    """The Markdown text: the headlines, a row for each model, the conditions of the measurement, and the grid."""
    where = f"batch {args.batch_sizes[0]}, {args.lengths[0]} {'lengths' if args.lengths[0] == 'real' else 'tokens'}"
    headlines = []
    for row in rows:
        headline = variant_name(row) in (variant_name(rows[0]), "int8, ONNX Runtime")
        if row["name"] != args.teacher_id and headline and row.get("speed_up"):
            ratio = f"{row['speed_up']:.2f} times as fast as {args.teacher_id}"
            headlines.append(
                f"**{row['name']} in {variant_name(row)} is {ratio} in {variant_name(rows[0])}** ({where})."
            )
    memory = "the weights and the peak of a forward pass" if args.device.type == "cuda" else "the weights"
    notes = [
        f"p50: median at {where}, each batch padded to its longest text. "
        f"Speed-up: over {args.teacher_id} in {variant_name(rows[0])}.",
        f"Memory: {memory}. Embeddings are only looked up: they take memory, but hardly any time.",
    ]
    if args.dataset_id:
        notes += [
            f"Accuracy: on the {args.eval_split} split of {args.dataset_id}, with Wilson's 95% interval.",
            "Agreement: share of answers equal to the teacher's. Alone right: examples that only this model : only the "
            "teacher got right; p: McNemar's exact test.",
        ]
    for row in rows:
        if "agreement_with_fp32" in row:
            share = f"{row['agreement_with_fp32']:.1%} of the examples"
            notes.append(f"ONNX Runtime: {row['name']} gives the same answer in int8 as in fp32 on {share}.")
    notes.append(
        f"Measured on {args.device_name} ({args.device.type}, {args.threads} CPU threads, load average {args.load:.1f} "
        f"before the start), "
        f"{', '.join(f'{package} {version}' for package, version in versions.items())}: `{args.command}`"
    )
    notes = "\n".join(f"- {note}" for note in notes)
    models = table([model_columns(row) for row in rows])
    grid = table([cell_columns(cell, args) for cell in cells])
    return "\n\n".join([*headlines, models, notes, grid])


def model_columns(row):
    columns = {
        "model": row["name"],
        "precision": variant_name(row),
        "parameters": shown(row["parameters"], ",.0f"),
        "without embeddings": shown(row["without_embeddings"], ",.0f"),
        "disk MB": shown(row["disk_bytes"], ",.1f", 1e6),
        "memory MB": shown(row.get("memory_bytes"), ",.1f", 1e6),
        "p50 ms": row["model"].get("error") or shown(row["model"]["p50_ms"]),
        "speed-up": shown(row.get("speed_up")),
    }
    if "accuracy" in row:
        low, high = row["accuracy_interval"]
        columns["accuracy (95%)"] = f"{row['accuracy']:.3f} ({low:.3f}–{high:.3f})"
        columns["macro-F1"] = shown(row["macro_f1"], ".3f")
        columns["agreement"] = shown(row["agreement"], ".3f")
        columns["alone right"] = f"{row['alone_right']} : {row['teacher_alone_right']}"
        columns["p"] = shown(row["mcnemar_p"], ".2g")
    return columns


def cell_columns(cell, args):
    timed = cell["model"]
    columns = {
        "model": cell["name"],
        "precision": variant_name(cell),
        "batch": str(cell["batch_size"]),
        "tokens": str(cell["length"]),
        "p50 ms": timed.get("error") or shown(timed["p50_ms"]),
        **{f"{name} ms": shown(timed.get(f"{name}_ms")) for name in ("p90", "p99")},
        "calls": shown(timed.get("calls"), ".0f"),
        "examples/s": shown(cell.get("examples_per_second"), ",.0f"),
        "speed-up": shown(cell.get("speed_up")),
    }
    if "real" in args.lengths:
        columns |= {f"{part} p50 ms": shown(cell.get(part, {}).get("p50_ms")) for part in ("tokenizer", "both")}
    if args.device.type == "cuda":
        columns["peak MB"] = shown(cell.get("memory_bytes"), ",.1f", 1e6)
    return columns


def variant_name(row):
    return row["precision"] if row["runtime"] == "PyTorch" else f"{row['precision']}, {row['runtime']}"


def shown(value, form=",.2f", unit=1):
    return "–" if value is None else format(value / unit, form)


def table(rows):
    """Dictionaries with the same keys as a Markdown table, all columns but the first aligned to the right."""
    header = list(rows[0])
    rule = ["---" if name == header[0] else "---:" for name in header]
    lines = [header, rule, *[row.values() for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put_into_card(text, path, name="bench"):
    """Put text between the markers of that name in a file, or at its end if it has no such markers."""
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    with open(path, encoding="utf-8") as file:
        card = file.read()
    before, old, after = re.split(f"(<!-- {name} -->.*?<!-- /{name} -->|$)", card, maxsplit=1, flags=re.DOTALL)
    with distill.complete_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(before + block + after if old else f"{card.rstrip()}\n\n{block}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Models and their size


def load_models(args, class_names):
    """The teacher, then the students: namespaces of name, loaded (on the CPU, in float32), tokenizer, order and size.

    A model's logits[:, order] are those of the data set's classes, or without a data set of the teacher's.

    Raises UserError for a model that cannot be loaded, has other classes, or cannot read --lengths tokens.
    """
    models = []
    for name in (args.teacher_id, *args.student_id):
        model, tokenizer = distill.load_model(name)
        own_names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        class_names = class_names or own_names
        # Both ways round: without a data set it may be the teacher whose classes are only called LABEL_0, LABEL_1.
        order = data.match_classes(own_names, class_names) or data.match_classes(class_names, own_names)
        if order is None:
            raise UserError(
                f"{name} has the classes {', '.join(own_names)}, not {', '.join(class_names)}: leave it out, "
                "or rename its classes in its config.json"
            )
        for tokens in args.lengths:
            if tokens != "real" and tokens > tokenizer.model_max_length:
                raise UserError(f"--lengths {tokens}: {name} reads {tokenizer.model_max_length} tokens at most")
        args.max_length = min(args.max_length, tokenizer.model_max_length)
        size = {"parameters": model.num_parameters(), "disk_bytes": disk_bytes(name)}
        size["without_embeddings"] = model.num_parameters(exclude_embeddings=True)  # see the note in report()
        models.append(argparse.Namespace(name=name, loaded=model, tokenizer=tokenizer, order=order, size=size))
    return models


def disk_bytes(model_id):
    """Bytes of the weight files in the model's folder or the Hub's cache, in whatever precision they were saved."""
    folder = data.demo_model() if model_id == "demo" else os.path.expanduser(model_id)
    if not os.path.isdir(folder):
        folder = snapshot_download(folder, local_files_only=True)
    # In the order in which transformers looks for them. Other files, such as teacher_logits, may lie beside them.
    for kind in (r"model(-.*-of-.*)?\.safetensors", r"pytorch_model(-.*-of-.*)?\.bin"):
        sizes = [entry.stat().st_size for entry in os.scandir(folder) if re.fullmatch(kind, entry.name)]
        if sizes:
            return sum(sizes)


@torch.inference_mode()
def memory_bytes(model, batches):
    """Bytes of the weights; on a GPU, the peak over the forward passes of some batches, weights included.

    None for ONNX Runtime, which does not say.
    """
    if not isinstance(model, torch.nn.Module):
        return None
    weights = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    if not next(model.parameters()).is_cuda:
        return weights
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - weights  # the other models are on the GPU too
    for inputs in batches:
        model(**inputs)
    return torch.cuda.max_memory_allocated() - others


# ---------------------------------------------------------------------------------------------------------------------
# ONNX Runtime

ONNX_FILES = {"fp32": "model.onnx", "int8": "model_int8.onnx"}  # in onnx/, where transformers.js and Optimum look
TOLERANCE = 1e-3  # of logits; another order of the same sums makes a difference of about 1e-5


def in_onnx_runtime(model, split, args):
    """A model of load_models() exported to ONNX, as Variants in fp32 and int8; none where it cannot be exported.

    The files stay in onnx/ in the model's folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        try:
            export(model, temporary)
        except Exception as error:  # whatever the exporter and the quantizer meet in an unknown model
            distill.say(f"note: {model.name} is not measured in ONNX Runtime: {data.one_line(error)}")
            return []
        check_export(model, temporary, split, args)
        folder = onnx_folder(model, args.output)
        for file in ONNX_FILES.values():
            distill.complete_copy(os.path.join(temporary, file), os.path.join(folder, file))

    variants = []
    for precision, file in ONNX_FILES.items():
        path = os.path.join(folder, file)
        figures = {**model.size, "disk_bytes": os.path.getsize(path)}
        network = open_session(path, args.threads)
        variant = Variant(model.name, precision, "ONNX Runtime", network, model.tokenizer, figures)
        if split:
            # One by one: in int8 the scale of a batch depends on all its texts, and so do the answers.
            examples = (encode(model.tokenizer, texts.values(), args.max_length) for texts in split.texts.iter(1))
            variant.logits = torch.cat([network(**inputs) for inputs in examples])[:, model.order]
        variants.append(variant)
    if split:
        fp32, int8 = [variant.logits.argmax(-1) for variant in variants]
        variants[1].figures["agreement_with_fp32"] = (fp32 == int8).double().mean().item()
    return variants


def export(model, folder):
    """Write ONNX_FILES: the model as it is, and with the weights of its matrix products and embeddings in int8."""
    from onnxruntime.quantization import quantize_dynamic  # only --onnx needs it

    example = model.tokenizer(["one", "two words"], padding=True, return_tensors="pt")
    axes = {name: {0: "batch", 1: "length"} for name in example}
    fp32, int8 = [os.path.join(folder, file) for file in ONNX_FILES.values()]
    logging.disable(logging.WARNING)  # about packages that nothing here needs
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                model.loaded, kwargs=dict(example), output_names=["logits"], dynamic_shapes=axes, verbose=False
            )
            program.save(fp32, external_data=False)
            # A scale for each column costs nothing and more than halves the error. Seven bits: with eight, CPUs without
            # VNNI instructions overflow in the sums of two products.
            quantize_dynamic(fp32, int8, per_channel=True, reduce_range=True)
    finally:
        logging.disable(logging.NOTSET)


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


@torch.inference_mode()
def check_export(model, folder, split, args):
    """Raise UserError where the exported model does not give PyTorch's logits for some texts, alone and padded."""
    network = open_session(os.path.join(folder, ONNX_FILES["fp32"]), args.threads)
    columns = list(split.texts[:8].values()) if split else [[" ".join(map(str, range(n))) for n in range(1, 80, 10)]]
    for size in (1, 8):
        inputs = encode(model.tokenizer, [column[:size] for column in columns], args.max_length)
        difference = (model.loaded(**inputs).logits - network(**inputs)).abs().max().item()
        if not difference <= TOLERANCE:
            raise UserError(f"{model.name}: exported to ONNX, its logits differ from PyTorch's by {difference:.2g}")


def onnx_folder(model, output):
    """The folder of a model's ONNX files, made if need be: in the model's own folder, or for a Hub id beside output."""
    folder = os.path.expanduser(model.name)
    if model.name == "demo" or not os.path.isdir(folder):
        # Not in a folder named like the id: from then on transformers would load it in place of the Hub's model.
        folder = os.path.join(os.path.dirname(output), "onnx_models", model.name)
        model.loaded.config.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
    folder = os.path.join(folder, "onnx")
    os.makedirs(folder, exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the start


def check_before_start(args):
    """Choose the device, and fail early on what would otherwise fail at the end."""
    models = [args.teacher_id, *args.student_id]
    if args.teacher_id is None:
        raise UserError("no model is named: give --teacher_id and --student_id, or use --demo")
    if len(set(models)) < len(models):
        raise UserError(f"a model is named twice: {', '.join(models)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    args.device = torch.device("cpu") if args.device == "cpu" else distill.choose_device()
    args.device_name = device_name(args.device)
    if args.onnx and args.device.type == "cuda":
        raise UserError("--onnx measures on the CPU: add --device cpu")
    # torch emulates a precision that the hardware lacks, but slower than fp32: nobody would serve a model that way.
    native = {"fp32": True, "bf16": distill.multiplies_bf16(args.device)}
    native["fp16"] = args.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    for precision in args.precision:
        if not native.get(precision):
            raise UserError(f"{args.device_name} has no arithmetic in {precision}: try another of {', '.join(DTYPES)}")
    if args.onnx and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UserError("--onnx needs packages: pip install onnx onnxscript onnxruntime")
    if args.dataset_id is None and "real" in args.lengths:
        raise UserError("--lengths real needs a data set: name one by --dataset_id")
    if not os.access(os.path.dirname(args.output) or ".", os.W_OK):
        raise UserError(f"cannot write {args.output}: make its folder first, or choose another --output")
    if args.model_card and not os.path.isfile(os.path.join(args.model_card, "README.md")):
        raise UserError(f"--model_card: {args.model_card} holds no README.md to put the tables into")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.9 has no such function
    return capabilities().get("cpu_name", platform.machine())


# ---------------------------------------------------------------------------------------------------------------------
# Types of flags


def list_of(kind):
    def parse(text):
        return [kind(part.strip()) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"  # argparse says "invalid list of int value"
    return parse


def length(text):
    return text if text == "real" else distill.at_least(int, 3)(text)


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(argv=None):
    args = parse_args(argv)
    distill.quiet_libraries()
    try:
        check_before_start(args)
        args.load = os.getloadavg()[0]  # processes that compete for the CPUs: they spoil all figures, PyTorch's most
        with distill.process_group(args.device):
            run(args)
    except UserError as error:
        distill.fail(error)


if __name__ == "__main__":
    main()
