"""How fast distill.py is beside the published Trainer, where its time goes, and how it grows with the data.

    python tests/bench_speed.py                # measure; leave the machine alone meanwhile
    python tests/bench_speed.py --latencies    # only what bench.py --onnx measures for the published pair
    python tests/bench_speed.py --draw         # only redraw the picture from tests/speed.md

The ways take turns on this machine, round after round, each run in a process of its own, with the same models, text,
batch size and epochs. The models have the shapes of the published pair, with random weights, since speed does not
depend on them, and of the demo. The figures go into tests/speed.md, or tests/latency.md, and into imgs/speed.svg.
"""

# ruff: noqa: E402
import time

BEGIN = time.perf_counter()  # before the imports, which take seconds and are a part of a run

import argparse
import contextlib
import csv
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import bench
import data
import distill
from losses import distillation_loss

OUTPUT = os.path.join(ROOT, "outputs", "speed")
BATCH_SIZE = 32
PUBLISHED, DEMO = "BERT-base → BERT-tiny", "demo: 6 → 2 layers"  # the pairs of models, as the tables name them
ON_GPU = torch.cuda.is_available()
AS_PUBLISHED = "fp16" if ON_GPU else "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Models and text


def save_bert(name, layers, width):
    """A BERT classifier of random weights with BERT's vocabulary; returns its folder."""
    folder = os.path.join(OUTPUT, name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(data.demo_model())
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_published():
    """The folders of two models with the shapes of the published pair."""
    return save_bert("bert-base", 12, 768), save_bert("bert-tiny", 2, 128)


def save_demo(name, layers):
    """The demo's model with so many of its layers, evenly spaced; returns its folder."""
    folder = os.path.join(OUTPUT, name)
    model, tokenizer = distill.load_model("demo", ["negative", "positive"], layers)
    distill.save_model(folder, model, tokenizer)
    return folder


def save_text(examples):
    """Write so many of the demo's sentences, repeated if too few, and a tenth for eval; returns the folder."""
    folder = os.path.join(OUTPUT, f"text{examples}")
    os.makedirs(folder, exist_ok=True)
    rows = data.read_demo("dataset")["train"]
    rows = list(zip(rows["text"], rows["label"], strict=True))
    names = ("negative", "positive")
    for split, count in (("train", examples), ("validation", min(examples // 10, 1000))):
        with open(os.path.join(folder, f"{split}.csv"), "w", newline="", encoding="utf-8") as file:
            repeated = (rows[i % len(rows)] for i in range(count))
            csv.writer(file).writerows([("text", "label"), *((text, names[label]) for text, label in repeated)])
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Runs, each in a process of its own


def timed(command, threads=None):
    """Run a command; returns the seconds that its process took, and the JSON object in the last line it printed."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    start = time.perf_counter()
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, json.loads(finished.stdout.splitlines()[-1])


def ours(models, text, epochs, batch_size=BATCH_SIZE, ranks=None, threads=None, parts=False):
    """Run distill.py from a clean folder. Returns the process's seconds, and those of "labeling" and "training".

    With parts=True the second result is what `parts_of_a_run` prints instead.
    """
    folder = os.path.join(OUTPUT, "ours")
    shutil.rmtree(folder, ignore_errors=True)
    flags = {
        "teacher_id": models[0],
        "student_id": models[1],
        "dataset_id": text,
        "epochs": epochs,
        "batch_size": batch_size,
        "output_dir": folder,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = [os.path.abspath(__file__), "--parts"] if parts else [os.path.join(ROOT, "distill.py")]
    seconds, printed = timed([*(start if ranks else [sys.executable]), *script, *words], threads)
    return seconds, printed if parts else printed["seconds"]


def trainers(models, text, epochs, precision, tuned):
    """Run the Trainer way from a clean folder. Returns the process's seconds, and those of training."""
    folder = os.path.join(OUTPUT, "trainer")
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, os.path.join(ROOT, "tests", "trainer_way.py"), "--teacher_id", models[0]]
    command += ["--student_id", models[1], "--dataset_id", text, "--epochs", str(epochs), "--output_dir", folder]
    command += ["--batch_size", str(BATCH_SIZE), "--precision", precision] + ["--tuned"] * tuned
    seconds, printed = timed(command)
    return seconds, printed["seconds"]


def median_and_range(values, digits=1):
    """As text, with the range in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def comparison(title, models, text, precision, rounds):
    """The three ways in turn, at 1, 3 and 10 epochs. Yields a row of each of two tables: training, whole process."""
    for epochs in (1, 3, 10):
        runs = []  # a round's [training, process] seconds of each way
        for _ in range(rounds):
            process, seconds = ours(models, text, epochs)
            runs.append([(sum(seconds.values()), process)])
            for its_precision, tuned in ((AS_PUBLISHED, False), (precision, True)):
                runs[-1].append(trainers(models, text, epochs, its_precision, tuned)[::-1])
        rows = []
        for kind in (0, 1):
            mine, published, tuned = zip(*([way[kind] for way in run] for run in runs), strict=True)
            ratios = [
                median_and_range([b / a for a, b in zip(mine, theirs, strict=True)]) for theirs in (published, tuned)
            ]
            rows.append(
                [title, str(epochs), *(f"{statistics.median(way):.1f}" for way in (mine, published, tuned)), *ratios]
            )
        yield rows


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes


def parts_of_a_run(argv):
    """Run distill.main(argv), then print the seconds of its parts, none counted twice, and the peak memory, as JSON."""
    seconds = {"imports": time.perf_counter() - BEGIN}
    running = []
    wait = torch.cuda.synchronize if ON_GPU else lambda: None  # else a GPU's work counts where the host waits for it

    def clock(module, name, part):
        function = getattr(module, name)

        def clocked(*args, **kwargs):
            wait()
            start = time.perf_counter()
            running.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                elapsed = time.perf_counter() - start
                seconds[part] = seconds.get(part, 0) + elapsed - running.pop()  # less what was clocked inside
                if running:
                    running[-1] += elapsed

        setattr(module, name, clocked)

    clock(distill, "main", "rest")
    for module, name, part in (
        (data, "load_splits", "reading text"),
        (data, "load_model", "loading models"),
        (data, "tokenize", "tokenizing"),
        (distill, "label_with_teacher", "labeling"),
        (distill, "training_step", "student's steps"),
        (distill, "train", "rest of the loop"),
        (distill, "evaluate", "evaluation"),
        (distill, "save_model", "saving the student"),
        (distill.RunFiles, "save_checkpoint", "checkpoints"),
        (distill, "digest", "digests"),
        (distill, "finish", "results and card"),
    ):
        clock(module, name, part)
    distill.main(argv)
    # Not getrusage's ru_maxrss: a process starts out with its parent's.
    with open("/proc/self/status", encoding="ascii") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    print(json.dumps({"seconds": seconds, "peak": 1024 * peak}))


def parts_of_runs(models, text, rounds):
    """Rows of a table: the seconds of the parts of a run of 3 epochs, the longest first."""
    runs = [ours(models, text, 3, parts=True)[1]["seconds"] for _ in range(rounds)]
    seconds = {part: [run[part] for run in runs] for part in runs[0]}
    medians = {part: statistics.median(seconds[part]) for part in seconds}
    for part in sorted(medians, key=medians.get, reverse=True):
        yield [part, median_and_range(seconds[part], 2), f"{medians[part] / sum(medians.values()):.1%}"]


def loop_overhead(models, text, rounds=15):
    """An epoch of train() without evaluation and files, over its bare steps on batches in memory: ratios of seconds."""
    argv = ["--teacher_id", models[0], "--student_id", models[1], "--dataset_id", text, "--epochs", "1"]
    args = distill.parse_args([*argv, "--batch_size", str(BATCH_SIZE), "--output_dir", os.path.join(OUTPUT, "loop")])
    distill.evaluate, distill.say = lambda *_: {"accuracy": 0.0, "loss": 0.0}, lambda *_: None
    device = distill.choose_device()
    with distill.process_group(device):
        args = replace(args, precision=distill.choose_precision(args.precision, device))
        task = distill.read_task(args).to(device)
        student, examples = task.student, task.student_splits["train"]
        examples.teacher_logits = torch.randn(len(examples.labels), 2, device=device)
        batches = data.training_batches(examples.tokens.lengths, BATCH_SIZE, args.seed, 0)
        batches = [examples.tokens.batch(rows) for rows in batches]

        def bare():
            optimizer = distill.make_optimizer(student, args)
            student.train()
            start = time.perf_counter()
            for rows, inputs in batches:
                with distill.autocast(device, args.precision):
                    answers = distill.forward(student, inputs)
                logits, labels = examples.teacher_logits[rows], examples.labels[rows]
                loss, *_ = distillation_loss(answers, logits, labels, args.alpha, args.temperature)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if ON_GPU:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        def whole():  # without an identity it leaves no files
            return distill.train(args, "student", student, None, {"train": examples, "eval": None}).seconds

        bare(), whole()  # warm up
        return [whole() / bare() for _ in range(rounds)]


def padding(text):
    """The share of padding among the computed tokens: in labeling, in training, and in random batches."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(data.demo_model())
    tokens = data.tokenize(tokenizer, data.load_splits(text)[0]["train"].texts, 512)

    def share(batches):
        computed = sum(len(rows) * int(tokens.lengths[rows].max()) for rows in batches)
        return 1 - int(tokens.lengths.sum()) / computed

    return (
        share(data.prediction_batches(tokens.lengths, distill.PREDICTION_TOKENS["cuda" if ON_GPU else "cpu"])),
        share(data.training_batches(tokens.lengths, BATCH_SIZE, 0, 0)),
        share(torch.randperm(len(tokens)).split(BATCH_SIZE)),
    )


def growth(models, sizes):
    """Rows of a table: seconds and peak memory of a whole run, and what each further example adds."""
    before = None
    for size in sizes:
        _, parts = ours(models, save_text(size), 1, parts=True)
        seconds, peak = sum(parts["seconds"].values()), parts["peak"]
        further = ["", ""]
        if before:
            further = [
                f"{(now - then) / (size - before[0]):.0f}"
                for now, then in ((1e6 * seconds, 1e6 * before[1]), (peak, before[2]))
            ]
        yield [f"{size:,}", f"{seconds:.1f}", further[0], f"{peak / 1e6:,.0f}", further[1]]
        before = size, seconds, peak


def two_ranks(models, text, rounds):
    """Rows of a table: how many times as fast two processes of one thread are as one of one thread."""
    default = distill.parse_args([]).batch_size
    runs = {
        size: [[ours(models, text, 3, size, ranks, threads=1)[1] for ranks in (1, 2)] for _ in range(rounds)]
        for size in (BATCH_SIZE, default)
    }
    for part, size in (("labeling", default), ("training", BATCH_SIZE), ("training", default)):
        one, two = [[run[i][part] for run in runs[size]] for i in (0, 1)]
        yield [
            part if part == "labeling" else f"{part}, batches of {size}",
            *(f"{statistics.median(way):.1f}" for way in (one, two)),
            median_and_range([a / b for a, b in zip(one, two, strict=True)], 2),
        ]


# ---------------------------------------------------------------------------------------------------------------------
# The report


def table(header, rows):
    text = distill.table([dict(zip(header, row, strict=True)) for row in rows])
    print(text, flush=True)
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=67_349 if ON_GPU else 400, help="sentences to train on")
    parser.add_argument("--rounds", type=int, default=3, help="how often each comparison is made")
    parser.add_argument("--sizes", default="5000,50000,500000", help="of the data sets that show how a run grows")
    parser.add_argument("--latencies", action="store_true", help="only measure the published pair as bench.py does")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from tests/speed.md")
    args = parser.parse_args(argv)
    if args.draw:
        return draw()
    distill.quiet_libraries()
    if args.latencies:
        return latencies()
    text, sizes = save_text(args.examples), [int(size) for size in args.sizes.split(",")]
    published = save_published()
    demo = save_demo("minilm-6", 6), save_demo("minilm-2", 2)
    tiny = (save_bert("tiny", 1, 64),) * 2
    precision = distill.choose_precision("auto", distill.choose_device())

    header = ["models", "epochs", "ours s", "as published s", "tuned s", "as published / ours", "tuned / ours"]
    pairs = []
    for title, models in ((PUBLISHED, published), (DEMO, demo)):
        for pair in comparison(title, models, text, precision, args.rounds):
            print(*pair, sep="\n", flush=True)
            pairs.append(pair)
    training, process = [table(header, rows) for rows in zip(*pairs, strict=True)]

    parts = table(["part", "s", "share of the medians"], parts_of_runs(published, text, args.rounds))
    ranks = "one GPU only"
    if not ON_GPU or torch.cuda.device_count() > 1:
        ranks = table(["", "1 rank s", "2 ranks s", "times as fast"], two_ranks(published, text, args.rounds))
    grown = table(
        ["examples", "s", "µs per further example", "peak MB", "bytes per further example"], growth(tiny, sizes)
    )
    overheads = [median_and_range(loop_overhead(models, text), 2) for models in (published, demo)]
    paddings = table(
        ["share of padding", "labeling", "training", "random batches"],
        [
            [f"{name} sentences", *(f"{share:.1%}" for share in padding(folder))]
            for name, folder in ((f"{args.examples:,}", text), ("the demo's 6,824", save_text(6824)))
        ],
    )

    ways = (f"as published ({AS_PUBLISHED})", f"tuned ({precision})")
    ratios = table(
        ["models", "the Trainer", "training at 1, 3, 10 epochs", "whole process"],
        [
            [title, way, *(", ".join(pair[kind][column].split()[0] for pair in of_title) for kind in (0, 1))]
            for title, of_title in ((PUBLISHED, pairs[:3]), (DEMO, pairs[3:]))
            for way, column in zip(ways, (5, 6), strict=True)
        ],
    )

    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    conditions = f"{device}, {args.examples:,} sentences in batches of {BATCH_SIZE}, {args.rounds} rounds"
    report = f"""# How fast distill.py is

How many times as fast as the Trainer:

{ratios}

{conditions}. Training includes an evaluation after every
epoch and, in ours, the teacher's labeling.

- As published: a `Trainer` that runs the teacher in its loss, in evaluation too
  ([trainer_way.py](trainer_way.py)), in {AS_PUBLISHED}. Tuned: student and teacher in {precision}, 50
  batches at a time sorted by length, no optimizer in its checkpoints. Ours: {precision}.
- Training: from models and tokens in memory to the saved student. Whole process: imports, reading and loading too.
  Medians; ratios with their range.
- {datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}:
  `{" ".join(["python tests/bench_speed.py", *(sys.argv[1:] if argv is None else argv)])}`,
  {(time.perf_counter() - BEGIN) / 60:.0f} minutes

Seconds of training:

{training}

Seconds of the whole process:

{process}

Where the time goes, {PUBLISHED}, 3 epochs, median and range of {args.rounds} runs:

{parts}

Without evaluation and files, an epoch of `train` takes {overheads[0]} times (BERT) and {overheads[1]} times (demo) as
long as bare forward, backward, clip and step on batches in memory (15 rounds).

{paddings}

One process and two, {"each with its GPU" if ON_GPU else "each with one thread"}, {PUBLISHED}, 3 epochs:

{ranks}

How time and memory grow with the data (teacher and student of one layer, 64 wide; 1 epoch):

{grown}
"""
    print(report)
    distill.write(report, Path(ROOT, "tests", "speed.md"))
    draw()


def latencies():
    """Write tests/latency.md: what bench.py measures for the published pair's shapes, in PyTorch and ONNX Runtime."""
    teacher, student = save_published()
    output = Path(OUTPUT, "bench.json")
    flags = ["--batch_sizes", "1", "--lengths", "32", "--onnx", "--output", str(output)]
    bench.main(["--teacher_id", teacher, "--student_id", student, *flags])
    found = distill.read(output)
    names = ("model", "precision", "MB", "p50 ms", "speed-up")
    rows = [{name: bench.shown(row, name).replace(f"{OUTPUT}/", "") for name in names} for row in found["models"]]
    report = f"""# The published pair's shapes, measured by bench.py

Random weights, one text of 32 tokens at a time: `python tests/bench_speed.py --latencies`, {datetime.date.today()},
{found["device"]}, torch {torch.__version__}, transformers {transformers.__version__}.

{distill.table(rows)}
"""
    distill.write(report, Path(ROOT, "tests", "latency.md"))


# ---------------------------------------------------------------------------------------------------------------------
# The picture

# As far from white as from GitHub's dark page, so that text and lines show on both.
GREY, BLUE, RED, OCHRE = "#797979", "#2079e0", "#d4456a", "#a06f00"


def draw():
    """Draw imgs/speed.svg, seconds of training against epochs, from tests/speed.md."""
    rows = table_in("speed.md", "ours s", "tuned s")
    with picture("speed", columns=2) as both:
        for axes, title in zip(both, (PUBLISHED, DEMO), strict=True):
            of_pair = [row for row in rows if row["models"] == title]
            epochs = [int(row["epochs"]) for row in of_pair]
            seconds = {way: [float(row[f"{way} s"]) for row in of_pair] for way in ("as published", "tuned", "ours")}
            top = 1.12 * max(map(max, seconds.values()))
            close = seconds["tuned"][-1] - seconds["ours"][-1] < 0.2 * top  # then the name stands below the line
            names = {"as published": "published Trainer", "tuned": "tuned", "ours": "distill.py"}
            for (way, values), colour in zip(seconds.items(), (RED, OCHRE, BLUE), strict=True):
                below = way == "ours" and close
                axes.plot(epochs, values, "o-", color=colour, linewidth=2.5, markersize=5, clip_on=False)
                end = (epochs[-1], values[-1])
                axes.annotate(f"{values[-1]:.0f} s", end, (7, 0), textcoords="offset points", va="center", color=colour)
                axes.annotate(
                    names[way],
                    end,
                    (-6, -34 if below else 5),
                    textcoords="offset points",
                    ha="right",
                    va="top" if below else "bottom",
                    color=colour,
                )
            axes.set_title(title, fontsize="medium")
            axes.set(xlim=(0, epochs[-1]), ylim=(0, top), xticks=epochs, xlabel="epochs")
        both[0].set_ylabel("seconds of training")


def table_in(file, *columns):
    """The first table with these columns in a file of tests/: its rows, as text by column."""
    for paragraph in Path(ROOT, "tests", file).read_text(encoding="utf-8").split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in paragraph.splitlines() if line.startswith("|")]
        lines = [[cell.strip() for cell in line] for line in lines]
        if lines and set(columns) <= set(lines[0]):
            return [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]
    raise ValueError(f"tests/{file} has no table with the columns {', '.join(columns)}")


@contextlib.contextmanager
def picture(name, columns=1, height=4.2):
    """Axes side by side to draw on; afterwards they are imgs/NAME.svg, the same bytes for the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": name,
        "font.size": 12,  # shown about 440 pixels wide, a point is a pixel
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.1, height), layout="constrained")
        yield figure.subplots(1, columns)
        path = os.path.join(ROOT, "imgs", f"{name}.svg")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--parts"]:
        parts_of_a_run(sys.argv[2:])
    else:
        main()
