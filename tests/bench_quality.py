"""What the teacher, text without labels and patience bring, on the demo's data: one teacher, several seeds.

    python tests/bench_quality.py                      # the table of students, and README's picture
    python tests/bench_quality.py --table demo         # candidates for the demo's own flags
    python tests/bench_quality.py --table tried        # true labels, layers, temperatures and learning rates
    python tests/bench_quality.py --table tried-all    # the layers again, on all the text
    python tests/bench_quality.py --table classes      # another task, of 54 classes, on Debian or Ubuntu

Every figure is a run of distill.py, kept in outputs/quality: started again, this script makes only the runs that are
missing and goes on in the middle of one that was interrupted (delete the folder after a change to the code). A table
is a section of tests/quality.md; --draw only redraws imgs/quality.svg, from the first of them.
"""

import argparse
import csv
import datetime
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import scipy.stats
import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import bench_speed  # noqa: E402

import data  # noqa: E402
import distill  # noqa: E402

OUTPUT = os.path.join("outputs", "quality")  # below ROOT, where main() goes
TEACHER = os.path.join(OUTPUT, "teacher")
CLASSES_DATA = f"{OUTPUT}/classes-data"
LABELED, SENTENCES = 6824, 269_256  # examples in the demo's training split, and in its text without labels
HELD_OUT = 20_000  # of those sentences, the last: no student sees them
# Trained by two processes together, on two cores.
EXAMPLES_PER_HOUR = 1_300_000 if distill.multiplies_bf16(torch.device("cpu")) else 650_000


def text(count, epochs, **flags):
    """The flags of a run with `count` sentences without labels."""
    return {"epochs": epochs, "unlabeled_id": "demo", "unlabeled_split": f"train[:{count}]", **flags}


ALL = SENTENCES - HELD_OUT
ALONE = {"epochs": 10, "alpha": 1.0}
PATIENT = {"batch_size": 128, "learning_rate": 3e-4}
TEACHER_ALONE = {"alpha": 0.0, "temperature": 2.0}
# The task of 54 classes. By eval: the teacher's learning rate and epoch, the students' rates (of 2e-4, 4e-4).
CLASSES_TEACHER = os.path.join(OUTPUT, "classes-teacher")
CLASSES = {"dataset_id": CLASSES_DATA, "train_split": "train[:6000]"}
FINE_TUNING = {"epochs": 1, "alpha": 1.0, "student_layers": 1, **CLASSES, "teacher_epochs": 6}
FINE_TUNING |= {"teacher_learning_rate": 4e-4, "save_steps": 100}
CLASSES |= {"teacher_id": f"{CLASSES_TEACHER}/teacher", "epochs": 3, "learning_rate": 4e-4}
SENTENCES_OF_CLASSES = {"unlabeled_id": f"{CLASSES_DATA}/sentences.txt", "unlabeled_split": "train[:18000]"}
SOME_TEACHER = ("teacher alone (alpha 0, T 2) on 27,296 sentences", text(27_296, 2, **TEACHER_ALONE), 5)
PATIENT_TEACHER = (f"teacher alone (alpha 0, T 2) on {ALL:,} sentences", text(ALL, 2, **TEACHER_ALONE, **PATIENT), 5)


def tried(title, **flags):
    """A row like SOME_TEACHER but for these flags."""
    return f"the same with {title}", {**SOME_TEACHER[1], **flags}, 3


# table -> name -> (title, flags, number of seeds). A table's first row is its control.
TABLES = {
    # The first two rows take 1,070 steps; patience is thousands.
    "quality": {
        "alone": ("labels alone (alpha 1)", ALONE, 5),
        "some-teacher": SOME_TEACHER,
        "patient-alone": ("labels alone (alpha 1), 4,050 steps", {**ALONE, "epochs": 75, **PATIENT}, 3),
        "patient-100k": (
            "teacher alone (alpha 0, T 2) on 100,000 sentences",
            text(100_000, 2, **TEACHER_ALONE, **PATIENT),
            3,
        ),
        "patient": PATIENT_TEACHER,
    },
    # All take about as long as the demo does, with the labeling of their text.
    "demo": {
        "demo": ("labels and teacher (alpha 0.5, T 4), 5 epochs", {"epochs": 5}, 5),
        "demo-teacher": ("teacher alone (alpha 0, T 2), 5 epochs", {"epochs": 5, **TEACHER_ALONE}, 5),
        "demo-text-teacher": (
            "teacher alone (alpha 0, T 2) on 7,500 sentences, 2 epochs",
            text(7_500, 2, **TEACHER_ALONE),
            5,
        ),
    },
    "tried": {
        "some-teacher": SOME_TEACHER,
        "some": tried("labels and teacher (alpha 0.5, T 4)", alpha=0.5, temperature=4.0),
        "layers-1-2": tried("layers 1 and 2", student_id=f"{OUTPUT}/layers-0,1"),
        "layers-1-4": tried("layers 1 and 4", student_id=f"{OUTPUT}/layers-0,3"),
        "layers-1-6": tried("layers 1 and 6", student_id=f"{OUTPUT}/layers-0,5"),
        "T-1": tried("T 1", temperature=1.0),
        "T-4": tried("T 4", temperature=4.0),
        "lr-1e-4": tried("a learning rate of 1e-4", learning_rate=1e-4),
        "lr-4e-4": tried("a learning rate of 4e-4", learning_rate=4e-4),
        "lr-6e-4": tried("a learning rate of 6e-4", learning_rate=6e-4),
        "both": ("labels and teacher (alpha 0.5, T 4), no other text", {"epochs": 10}, 3),
        "alone": ("labels alone (alpha 1), no other text", ALONE, 3),
    },
    "tried-all": {
        "patient": PATIENT_TEACHER,
        "patient-first": (
            "the same with layers 1 and 2",
            {**PATIENT_TEACHER[1], "student_id": f"{OUTPUT}/layers-0,1"},
            2,
        ),
    },
    "classes": {
        "classes-alone": ("labels alone (alpha 1)", {**CLASSES, "alpha": 1.0}, 5),
        "classes-both": ("labels and teacher (alpha 0.5, T 4)", CLASSES, 3),
        "classes-teacher-alone": ("teacher alone (alpha 0, T 2)", {**CLASSES, **TEACHER_ALONE}, 3),
        "classes-text": (
            "teacher alone (alpha 0, T 2) on 18,000 sentences",
            {**CLASSES, **TEACHER_ALONE, **SENTENCES_OF_CLASSES, "epochs": 1},
            5,
        ),
        "classes-little": ("labels and teacher (alpha 0.1, T 2)", {**CLASSES, "alpha": 0.1, "temperature": 2.0}, 3),
    },
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", choices=TABLES, default="quality", help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="beside the first one (default: all of the table)")
    parser.add_argument("--seeds", type=int, help="runs a row, at most (default: 2 to 5, by the row)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw the picture")
    args = parser.parse_args(argv)
    if args.draw:
        return draw()
    if args.seeds is not None and args.seeds < 2:
        parser.error("--seeds must be at least 2: the spread is what this measures")
    table = TABLES[args.table]
    control = next(iter(table))
    chosen = [control, *args.rows] if args.rows else table
    if unknown := set(chosen) - set(table):
        parser.error(f"no row {', '.join(unknown)} in this table; it has {', '.join(table)}")
    rows = {name: table[name] for name in table if name in chosen}
    threads = max(1, os.cpu_count() // args.processes)
    os.chdir(ROOT)
    os.makedirs(OUTPUT, exist_ok=True)
    distill.quiet_libraries()

    classes = args.table == "classes"
    teacher = CLASSES_TEACHER if classes else TEACHER
    with distill.process_group(distill.choose_device()):
        if classes:
            debian()
        distilled = run(teacher, FINE_TUNING if classes else {"epochs": 1})
        for layers in () if classes else ([0, 1], [0, 3], [0, 5]):
            save_layers(layers)
        for _, flags, _ in rows.values():
            label_once(flags)
        teacher_answers = answers(f"{teacher}/teacher", CLASSES_DATA if classes else "demo")
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the runs
        with ThreadPoolExecutor(args.processes) as pool:
            runs = run_all(rows, args.seeds, pool)

    lines = [line(title, runs[name], runs[control], teacher_answers, classes) for name, (title, _, _) in rows.items()]
    first = runs[control][0]
    examples, versions = first["results"]["examples"], first["results"]["versions"]
    held_out = "the test split" if classes else f"{HELD_OUT:,} sentences of the demo's text that no student has seen"
    interval = "Student's t), which\n  covers the randomness of training only, not that of the choice of test sentences"
    if classes:
        interval = "a paired bootstrap\n  over test examples and seeds together)"
    report = f"""{distill.table(lines)}

- Mean ± standard deviation over seeds. One teacher for all: {100 * distilled["teacher"]["test_accuracy"]:.2f}% right on
  the {examples["test"]:,} test sentences.
- Every row trains on the {examples["train"]:,} labeled examples; the sentences that it names, without
  labels, are added.
- % of the teacher's: with its 95% interval, by a bootstrap over test sentences and seeds together.
- Agreement: the same answer as the teacher's, on {held_out}.
- Against the first row: the mean difference between runs of the same seed and its 95% interval ({interval}.
- {datetime.date.today()}, {first["results"]["device"]}, {args.processes} runs at a time, {threads} CPU thread(s) each,
  {first["results"]["arguments"]["precision"]}, torch {versions["torch"]}, transformers {versions["transformers"]}:
  `{" ".join(["python tests/bench_quality.py", *(sys.argv[1:] if argv is None else argv)])}`
"""
    print(report)
    put_section(SECTIONS[args.table], report)
    if args.table == "quality":
        draw()


def run(folder, flags):
    """Run distill.py, or continue it, unless the same command has run to its end before; returns its results.json."""
    fine_tunes = folder in (TEACHER, CLASSES_TEACHER)
    if not fine_tunes:
        flags = {"teacher_epochs": 0, "teacher_id": f"{TEACHER}/teacher", "save_steps": 500, **flags}
    command = ["--demo"] + [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    note, results = os.path.join(folder, "command.json"), os.path.join(folder, "results.json")
    if distill.read(Path(note)) != command:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        distill.write(json.dumps(command), Path(note))
    if not os.path.exists(results):
        labels = os.path.join(folder, "teacher_logits")
        if not fine_tunes and not os.path.exists(labels):
            shutil.copytree(f"{labels_folder(flags)}/teacher_logits", labels, copy_function=os.link)
        with open(os.path.join(folder, "log.txt"), "a", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, "distill.py", *command, "--output_dir", folder],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    return distill.read(Path(results))


def debian():
    """Write, unless they are there, Debian's package descriptions: short ones by section, the long ones' sentences."""
    if os.path.exists(f"{CLASSES_DATA}/sentences.txt"):  # written last
        return
    packages = {}  # normalized short description -> the first package's (description, section)
    for record in output("apt-cache", "dumpavail").split("\n\n"):
        fields = dict(re.findall(r"^(Description|Section): (.*)", record, re.MULTILINE))
        text, section = fields.get("Description", "").strip(), fields.get("Section", "").rpartition("/")[2]
        if text and section not in ("", "oldlibs", "tasks", "debug", "metapackages"):
            packages.setdefault(data.normalize(text), (text, section))
    rows = list(packages.values())
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    held_out = len(rows) // 20
    bounds = {"test": (0, held_out), "validation": (held_out, 2 * held_out), "train": (2 * held_out, None)}
    os.makedirs(CLASSES_DATA, exist_ok=True)
    for split, (start, end) in bounds.items():
        with open(f"{CLASSES_DATA}/{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows[start:end]])
    english = ("-o", "Acquire::Languages=en")
    files = output("apt-get", "indextargets", *english, "--format", "$(FILENAME)", "Created-By: Translations").split()
    if not files:
        sys.exit("there are no long descriptions: apt-get -o Acquire::Languages=en update")
    sentences = {}
    for record in output("/usr/lib/apt/apt-helper", "cat-file", *files).split("\n\n"):
        long = record.partition("Description-en:")[2].partition("\n")[2]
        for paragraph in re.split(r"\n \.(?:\n|$)|\n(?=  |\s*[-*•+] )", long):  # list items are paragraphs
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()).lstrip("-*•+ ")):
                if 3 <= len(sentence.split()) <= 15:  # about as long as the short descriptions, or twice
                    sentences[data.normalize(sentence)] = sentence
    sentences = list(sentences.values())
    order = np.random.default_rng(0).permutation(len(sentences))
    distill.write("".join(f"{sentences[i]}\n" for i in order), Path(CLASSES_DATA, "sentences.txt"))


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def labels_folder(flags):
    prefix = "classes-" if "dataset_id" in flags else ""
    return os.path.join(OUTPUT, f"{prefix}labels{flags.get('unlabeled_split', '')}")


def label_once(flags):
    """Let the teacher label the text of these flags, for all runs on it."""
    names = ("teacher_id", "dataset_id", "train_split", "unlabeled_id", "unlabeled_split")
    words = [f"--{name}={flags[name]}" for name in names if name in flags]
    command = ["--demo", "--teacher_epochs=0", f"--teacher_id={TEACHER}/teacher", *words]
    args = distill.parse_args([*command, f"--output_dir={labels_folder(flags)}"])
    device = distill.choose_device()
    args = replace(args, precision=distill.choose_precision(args.precision, device))
    print(f"labels in {args.output_dir}", flush=True)
    distill.label_with_teacher(args, distill.read_task(args).to(device))


def save_layers(layers):
    """Save the two layers of the teacher, counted from 0, as a student of their own."""
    folder = os.path.join(OUTPUT, f"layers-{','.join(map(str, layers))}")
    if os.path.exists(folder):
        return
    model, tokenizer = data.load_model(f"{TEACHER}/teacher")
    model.bert.encoder.layer = torch.nn.ModuleList([model.bert.encoder.layer[i] for i in layers])
    model.config.num_hidden_layers = len(layers)
    os.makedirs(folder)
    distill.save_model(folder, model, tokenizer)


def run_all(rows, seeds, pool):
    """All runs of all rows, seed by seed: name -> a list of what scored_run gives."""
    plan = [
        (name, seed, flags)
        for seed in range(1, 6)
        for name, (_, flags, count) in rows.items()
        if seed <= min(count, seeds or count)
    ]
    missing = [
        flags
        for name, seed, flags in plan
        if not os.path.exists(os.path.join(OUTPUT, f"{name}-{seed}", "results.json"))
    ]
    examples = sum(flags["epochs"] * train_size(flags) for flags in missing)
    print(f"{len(missing)} runs to make: about {examples / EXAMPLES_PER_HOUR:.1f} hours on two cores", flush=True)
    futures = [
        (name, pool.submit(scored_run, os.path.join(OUTPUT, f"{name}-{seed}"), {"seed": seed, **flags}))
        for name, seed, flags in plan
    ]
    runs = {name: [] for name in rows}
    for name, future in tqdm(futures, desc="runs"):
        runs[name].append(future.result())
    return runs


def train_size(flags):
    splits = (flags.get("train_split", str(LABELED)), flags.get("unlabeled_split", "0"))
    return sum(int(re.sub(r"\D", "", split)) for split in splits)


def scored_run(folder, flags):
    """A run's results and its student's answers."""
    return {"results": run(folder, flags), "answers": answers(folder, flags.get("dataset_id", "demo"))}


PREDICTING = threading.Lock()  # the threads share one process group


def answers(folder, dataset_id):
    """What the model in a folder answers: role -> [N] classes, on the test sentences and the demo's held-out ones."""
    path = os.path.join(folder, "answers.safetensors")
    if not os.path.exists(path):
        with PREDICTING:
            model, tokenizer = data.load_model(folder)
            splits, _ = data.load_splits(dataset_id, None, {"train": "train", "eval": "validation", "test": "test"})
            texts = {"test": splits["test"].texts}
            if dataset_id == "demo":
                texts["held_out"] = data.take(data.read_demo("unlabeled"), f"train[-{HELD_OUT}:]")
            device = distill.choose_device()
            precision = distill.choose_precision("auto", device)
            found = {}
            for role in texts:
                tokens = data.tokenize(tokenizer, texts[role], 512).to(device)
                found[role] = distill.predict(model.to(device), tokens, precision).argmax(-1).cpu()
            found["test_labels"] = splits["test"].labels
            safetensors.torch.save_file(found, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
    return {role: tensor.numpy() for role, tensor in safetensors.torch.load_file(path).items()}


def line(title, runs, control, teacher, paired):
    """A row of the table."""
    accuracy, f1, control_accuracy = [
        [100 * run["results"]["student"][name] for run in group]
        for group, name in ((runs, "test_accuracy"), (runs, "test_macro_f1"), (control, "test_accuracy"))
    ]
    arguments, examples = runs[0]["results"]["arguments"], runs[0]["results"]["examples"]
    steps = arguments["epochs"] * math.ceil((examples["train"] + examples["unlabeled"]) / arguments["batch_size"])
    role = "held_out" if "held_out" in teacher else "test"
    agreement = [100 * (run["answers"][role] == teacher[role]).mean() for run in runs]
    labels = runs[0]["answers"]["test_labels"]
    right, control_right = [np.stack([run["answers"]["test"] == labels for run in group]) for group in (runs, control)]
    teacher_right = np.broadcast_to(teacher["test"] == labels, right.shape)
    share, low, high = bootstrap(lambda ours, theirs: 100 * ours / theirs, right, teacher_right)
    verdict = "at least 99%" if low >= 99 else "99% within the error" if high >= 99 else "below 99%"
    pairs = min(len(runs), len(control))
    if paired:
        difference = bootstrap(lambda ours, theirs: 100 * (ours - theirs), right[:pairs], control_right[:pairs])
    else:
        differences = [ours - theirs for ours, theirs in zip(accuracy[:pairs], control_accuracy[:pairs], strict=True)]
        mean = statistics.mean(differences)
        half = scipy.stats.t.ppf(0.975, pairs - 1) * statistics.stdev(differences) / math.sqrt(pairs)
        difference = mean, mean - half, mean + half
    return {
        "student": title,
        "steps": f"{steps:,} of {arguments['batch_size']}",
        "seeds": str(len(runs)),
        "test accuracy %": mean_and_sd(accuracy),
        "macro-F1 %": mean_and_sd(f1),
        "% of the teacher's": f"{share:.1f} ({low:.1f}–{high:.1f}): {verdict}",
        "agreement %": mean_and_sd(agreement),
        "against the first row": "–" if runs is control else "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference),
    }


def bootstrap(compare, ours, theirs):
    """compare(our accuracy, their accuracy), with its 95% interval: test sentences and seeds are drawn again.

    ours and theirs are [seeds, sentences] bool, which sentences each seed's model answers right.
    """
    generator = np.random.default_rng(0)
    seeds, sentences = ours.shape
    values = []
    for _ in range(10_000):
        columns = generator.integers(sentences, size=sentences)
        rows = generator.integers(seeds, size=seeds)
        values.append(compare(ours[rows][:, columns].mean(), theirs[rows][:, columns].mean()))
    return compare(ours.mean(), theirs.mean()), *np.percentile(values, (2.5, 97.5))


def mean_and_sd(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


SECTIONS = {
    "quality": "Students of the demo's teacher",
    "demo": "Candidates for the demo",
    "tried": "What was tried",
    "tried-all": "The layers again, on all the text",
    "classes": "54 classes",
}


def put_section(title, text):
    """Put text below the heading in tests/quality.md, in place of what stands there."""
    path = Path(ROOT, "tests", "quality.md")
    before, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {section.partition("\n")[0]: section for section in sections}
    sections[title] = f"{title}\n\n{text.strip()}\n\n"
    distill.write(before + "".join(f"## {section}" for section in sections.values()).rstrip() + "\n", path)


def draw():
    """Draw imgs/quality.svg, test accuracy of the students beside their teacher's, from tests/quality.md."""
    text = Path(ROOT, "tests", "quality.md").read_text(encoding="utf-8")
    teacher = float(re.search(r"One teacher for all: ([\d.]+)%", text)[1])
    rows = bench_speed.table_in("quality.md", "student", "test accuracy %")
    scores = [[float(number) for number in row["test accuracy %"].split(" ± ")] for row in rows]
    low = min(mean - spread for mean, spread in scores)
    high = max([teacher, *(mean + spread for mean, spread in scores)])
    with bench_speed.picture("quality", height=max(4.2, 1.1 + 0.44 * len(rows))) as axes:
        right_edge = axes.get_yaxis_transform()  # x from 0 to 1 across the axes, y as in the data
        for y, (row, (mean, spread)) in enumerate(zip(rows, scores, strict=True)):
            colour = bench_speed.GREY if row["student"].startswith("labels alone") else bench_speed.BLUE
            axes.errorbar(mean, y, xerr=spread, fmt="o", color=colour, linewidth=2.5, markersize=6, capsize=4)
            axes.text(1.02, y, f"{mean:.1f}", transform=right_edge, va="center", color=colour)
            axes.text(low, y - 0.28, row["student"], fontsize=10.5, va="bottom", color=colour)
        axes.axvline(teacher, color=bench_speed.RED, linewidth=1.5, linestyle="--", zorder=0)
        axes.text(teacher, -1, "teacher ", ha="right", va="center", color=bench_speed.RED)
        axes.text(1.02, -1, f"{teacher:.1f}", transform=right_edge, va="center", color=bench_speed.RED)
        axes.set(ylim=(len(rows) - 0.6, -1.2), xlim=(low - 0.2, high + 0.2), yticks=[])
        axes.set_xlabel("test accuracy %, mean ± standard deviation over seeds")
        axes.spines["left"].set_visible(False)


if __name__ == "__main__":
    main()
