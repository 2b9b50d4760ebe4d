"""How fast distill.py is beside the published Trainer, and where its time goes.

    python tests/bench_speed.py                # a section of tests/speed.md; leave the machine alone meanwhile
    python tests/bench_speed.py --latencies    # write tests/latency.md: what bench.py --onnx measures
    python tests/bench_speed.py --draw         # only draw imgs/speed.svg again, from the last section

The ways take turns on this machine, round after round, each run in a process of its own, with the same models, text,
batch size and epochs. The models have the shapes of the published pair, with random weights, since speed does not
depend on them, and of the demo.
"""

# ruff: noqa: E402
import time

BEGIN = time.perf_counter()  # before the imports, which take seconds and are a part of a run

import argparse
import contextlib
import csv
import datetime
import functools
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench
import data
import distill

OUTPUT = "outputs/speed"  # this and all other paths are below ROOT, where main() goes
REPORT = Path("tests/speed.md")
BATCH_SIZE = 32
PUBLISHED, DEMO = "BERT-base → BERT-tiny", "demo: 6 → 2 layers"  # the pairs of models, as the tables name them
ON_GPU = torch.cuda.is_available()
AS_PUBLISHED = "fp16" if ON_GPU else "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Models and text


def save_bert(name, layers, width):
    """A BERT classifier of random weights with BERT's vocabulary; returns its folder."""
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
    distill.save_model(f"{OUTPUT}/{name}", transformers.BertForSequenceClassification(config), tokenizer)
    return f"{OUTPUT}/{name}"


def save_published():
    """The folders of two models with the shapes of the published pair."""
    return save_bert("bert-base", 12, 768), save_bert("bert-tiny", 2, 128)


def save_demo(layers):
    """The demo's model with so many of its layers, evenly spaced; returns its folder."""
    folder = f"{OUTPUT}/minilm-{layers}"
    model, tokenizer = data.load_model("demo", ["negative", "positive"])
    distill.save_model(folder, data.keep_layers(model, layers), tokenizer)
    return folder


def save_text(examples):
    """Write so many of the demo's sentences, repeated if too few, and a tenth for eval; returns the folder."""
    folder = Path(OUTPUT, f"text{examples}")
    folder.mkdir(parents=True, exist_ok=True)
    table = data.read_demo("dataset")["train"]
    names = table.features["label"].names
    rows = [(row["text"], names[row["label"]]) for row in table]
    for split, count in (("train", examples), ("validation", min(examples // 10, 1000))):
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *(rows[i % len(rows)] for i in range(count))])
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Runs, each in a process of its own


def run(script, models, text, epochs, *more, batch_size=BATCH_SIZE, ranks=None, threads=None):
    """Run a script from a clean folder. Returns the JSON object that it prints last."""
    folder = f"{OUTPUT}/run"
    shutil.rmtree(folder, ignore_errors=True)
    flags = {"teacher_id": models[0], "student_id": models[1], "dataset_id": text, "epochs": epochs}
    flags |= {"batch_size": batch_size, "output_dir": folder}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, *launcher, script, *more, *words]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def median_and_range(values, digits=1):
    """As text, with the range in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def comparison(title, models, text, epochs, precision, rounds):
    """A row of a table: seconds of training by the three ways, in turn."""
    seconds = {"ours": [], "as published": [], "tuned": []}
    for _ in range(rounds):
        seconds["ours"].append(sum(run("distill.py", models, text, epochs)["seconds"].values()))
        trainers = functools.partial(run, "tests/trainer_way.py", models, text, epochs, "--precision")
        seconds["as published"].append(trainers(AS_PUBLISHED)["seconds"])
        seconds["tuned"].append(trainers(precision, "--tuned")["seconds"])
    row = {"models": title, "epochs": str(epochs)}
    row |= {f"{way} s": f"{statistics.median(seconds[way]):.1f}" for way in seconds}
    for way in ("as published", "tuned"):
        ratios = [theirs / ours for theirs, ours in zip(seconds[way], seconds["ours"], strict=True)]
        row[f"{way} / ours"] = median_and_range(ratios)
    print(row, flush=True)
    return row


def parts_of_a_run(argv):
    """Run distill.main(argv), then print the seconds of its parts, none counted twice, as JSON."""
    seconds = {"imports": time.perf_counter() - BEGIN}
    running = []
    wait = torch.cuda.synchronize if ON_GPU else lambda: None  # else a GPU's work counts where the host waits for it

    @contextlib.contextmanager
    def timed(part):
        wait()
        start = time.perf_counter()
        running.append(0.0)
        try:
            yield
        finally:
            wait()
            elapsed = time.perf_counter() - start
            seconds[part] = seconds.get(part, 0) + elapsed - running.pop()  # less what was clocked inside
            if running:
                running[-1] += elapsed

    def clock(owner, name, part):
        setattr(owner, name, timed(part)(getattr(owner, name)))

    def clocked_rows(*args, train=distill.train):  # a generator works where its next row is asked for
        rows = train(*args)
        return iter(timed("rest of the loop")(lambda: next(rows, None)), None)

    clock(distill, "main", "rest")
    clock(data, "load_splits", "reading text")
    clock(data, "load_model", "loading models")
    clock(data, "tokenize", "tokenizing")
    clock(distill, "label_with_teacher", "labeling")
    clock(distill, "training_step", "student's steps")
    distill.train = clocked_rows
    clock(distill, "evaluate", "evaluation")
    clock(distill, "save_model", "saving the student")
    clock(distill.RunFiles, "add", "rows and checkpoints")
    clock(distill, "digest", "digests")
    clock(distill, "finish", "results and card")
    distill.main(argv)
    print(json.dumps(seconds))


def parts_of_runs(models, text, rounds):
    """Rows of a table: the seconds of the parts of a run of 3 epochs, the longest first."""
    runs = [run("tests/bench_speed.py", models, text, 3, "--parts") for _ in range(rounds)]
    medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    for part in sorted(medians, key=medians.get, reverse=True):
        share = f"{medians[part] / sum(medians.values()):.1%}"
        seconds = median_and_range([run[part] for run in runs], 2)
        yield {"part": part, "s": seconds, "share of the medians": share}


def two_ranks(models, text, rounds):
    """Rows of a table: how many times as fast two processes of one thread are as one of one thread."""
    more = {"batch_size": distill.Config().batch_size, "threads": 1}
    runs = [[run("distill.py", models, text, 3, ranks=n, **more)["seconds"] for n in (1, 2)] for _ in range(rounds)]
    for part in ("labeling", "training"):
        one, two = [[seconds[part] for seconds in column] for column in zip(*runs, strict=True)]
        row = {"": part, "1 rank s": f"{statistics.median(one):.1f}", "2 ranks s": f"{statistics.median(two):.1f}"}
        yield {**row, "times as fast": median_and_range([a / b for a, b in zip(one, two, strict=True)], 2)}


# ---------------------------------------------------------------------------------------------------------------------
# The reports


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=67_349 if ON_GPU else 256, help="sentences to train on")
    parser.add_argument("--rounds", type=int, default=3, help="how often each comparison is made")
    parser.add_argument("--latencies", action="store_true", help="only write tests/latency.md, by bench.py")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from tests/speed.md")
    args = parser.parse_args()
    os.chdir(ROOT)
    distill.quiet_libraries()
    if args.latencies:
        return latencies()
    if not args.draw:
        speed(args)
    draw()


def speed(args):
    """Measure all, and write this precision's section of tests/speed.md."""
    text, published = save_text(args.examples), save_published()
    pairs = {PUBLISHED: published, DEMO: (save_demo(6), save_demo(2))}
    precision = distill.choose_precision("auto", distill.choose_device())

    rows = [comparison(title, pairs[title], text, n, precision, args.rounds) for title in pairs for n in (1, 3, 10)]
    faster = []
    for title, way in itertools.product(pairs, ("as published", "tuned")):
        ratios = [row[f"{way} / ours"].split()[0] for row in rows if row["models"] == title]
        faster.append({"models": title, "the Trainer": way, "times as fast at 1, 3, 10 epochs": ", ".join(ratios)})
    parts = distill.table([*parts_of_runs(published, text, args.rounds)])
    ranks = "Not measured: there is one GPU."
    if not ON_GPU or torch.cuda.device_count() > 1:
        ranks = distill.table([*two_ranks(published, text, args.rounds)])

    processor = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())  # not in torch 2.9
    machine = torch.cuda.get_device_name() if ON_GPU else f"{processor} (cpu, {torch.get_num_threads()} threads)"
    report = f"""{distill.table(faster)}

- {machine}, {args.examples:,} sentences in batches of {BATCH_SIZE}, {args.rounds} rounds.
  BERT's weights are random.
- As published: a `Trainer` that runs the teacher in its loss, in evaluation too ([trainer_way.py](trainer_way.py)), in
  {AS_PUBLISHED}. Tuned: student and teacher in {precision}, 50 batches at a time sorted by length, no optimizer in its
  checkpoints. Ours: {precision}.
- Training: from models and tokens in memory to the saved student, with an evaluation after every epoch and, in ours,
  the teacher's labeling. Medians; ratios with their range.
- {datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}:
  `{shlex.join(["python", "tests/bench_speed.py", *sys.argv[1:]])}`, {(time.perf_counter() - BEGIN) / 60:.0f} minutes

### Seconds of training

{distill.table(rows)}

### Where the time goes

A whole run, {PUBLISHED}, 3 epochs, median and range of {args.rounds} runs:

{parts}

### One process and two

Each with {"its GPU" if ON_GPU else "one thread"}, {PUBLISHED}, 3 epochs in batches of {distill.Config().batch_size}:

{ranks}
"""
    write_section(REPORT, f"In {precision}", report)


def latencies():
    """Write what bench.py measures, of the published pair's shapes and, if its run is there, of the demo."""
    teacher, student = save_published()
    flags = ["--teacher_id", teacher, "--student_id", student, "--length", "32"]
    runs = {"The published pair's shapes, with random weights": flags}
    if os.path.exists("outputs/results.json"):
        runs["The demo"] = ["--demo"]
        runs["The demo in batches of 32"] = ["--demo", "--batch_size", "32"]
        runs["The demo in batches of 32, of 64 tokens"] = ["--demo", "--batch_size", "32", "--length", "64"]
    for title, flags in runs.items():
        output = Path(OUTPUT, "bench.json")
        bench.main([*flags, "--onnx", "--output", str(output)])
        text = f"{datetime.date.today()}.\n\n{bench.report(distill.read(output))}"
        write_section(Path("tests/latency.md"), title, text)


def write_section(path, title, text):
    """Put a section into a Markdown file: in place of the one with this title, else at the end."""
    head, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = dict(section.strip().split("\n\n", 1) for section in sections) | {title: text.strip()}
    distill.write(head + "\n".join(f"## {title}\n\n{text}\n" for title, text in texts.items()), path)


def read_table(text, *columns):
    """The first table with these columns in a Markdown text: its rows, dictionaries of texts."""
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if cells and set(columns) <= set(cells[0]):
            return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    raise ValueError(f"there is no table with the columns {', '.join(columns)}")


# ---------------------------------------------------------------------------------------------------------------------
# The picture

# As far from white as from GitHub's dark page, so that text and lines show on both.
GRAY, BLUE, RED, OCHER = "#797979", "#2079e0", "#d4456a", "#a06f00"


def draw():
    """Draw imgs/speed.svg, of the last section: seconds of training against epochs."""
    rows = read_table(REPORT.read_text(encoding="utf-8").rpartition("\n## ")[2], "ours s", "tuned s")
    with picture("speed", columns=2) as both:
        for axes, title in zip(both, (PUBLISHED, DEMO), strict=True):
            of_pair = [row for row in rows if row["models"] == title]
            epochs = [int(row["epochs"]) for row in of_pair]
            seconds = {way: [float(row[f"{way} s"]) for row in of_pair] for way in ("as published", "tuned", "ours")}
            top = 1.12 * max(map(max, seconds.values()))
            close = seconds["tuned"][-1] - seconds["ours"][-1] < 0.1 * top  # then ours stands below its line
            names = {"as published": "published Trainer", "tuned": "tuned Trainer", "ours": "distill.py"}
            for (way, values), color in zip(seconds.items(), (RED, OCHER, BLUE), strict=True):
                axes.plot(epochs, values, "o-", color=color, linewidth=2.5, markersize=5, clip_on=False)
                style = {"xy": (epochs[-1], values[-1]), "textcoords": "offset points", "color": color}
                side = {"tuned": "bottom", "ours": "top"}.get(way) if close else None
                axes.annotate(f"{values[-1]:.0f} s", xytext=(7, 0), va=side or "center", **style)
                place = {"xytext": (-6, 5), "va": "bottom"}
                if way == "ours" and close:
                    place = {"xytext": (-6, -32), "va": "top"}
                axes.annotate(names[way], ha="right", **place, **style)
            axes.set_title(title, fontsize="medium")
            axes.set(xlim=(0, epochs[-1]), ylim=(0, top), xticks=epochs, xlabel="epochs")
        both[0].set_ylabel("seconds of training")


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
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GRAY),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.1, height), layout="constrained")
        yield figure.subplots(1, columns)
        figure.savefig(f"imgs/{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--parts"]:
        parts_of_a_run(sys.argv[2:])
    else:
        main()
