"""What the teacher, text without labels and patience bring: one teacher, several seeds.

    python tests/bench_quality.py                      # students with and without the teacher, and their picture
    python tests/bench_quality.py --table demo         # candidates for the demo's own flags
    python tests/bench_quality.py --table tried        # true labels, temperatures and learning rates
    python tests/bench_quality.py --table classes      # 54 classes: 12,000 labels and more text (Debian or Ubuntu)
    python tests/bench_quality.py --table classes-all  # the same with all labels

Every figure is a run of distill.py, kept in outputs/quality: started again, this script makes only the runs that are
missing and goes on in the middle of one that was interrupted (delete the folder after a change to the code). A table is
a section of tests/quality.md; --draw only draws imgs/quality.svg again, from the first table there.
"""

import argparse
import csv
import datetime
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_speed
import numpy as np
import safetensors.torch
import scipy.stats
import torch
from bench_speed import data, distill
from tqdm import tqdm

OUTPUT = "outputs/quality"  # this and all other paths are below ROOT, where main() goes
REPORT = Path("tests/quality.md")
SENTENCES, HELD_OUT = 269_256, 20_000  # of the demo's text without labels; the last 20,000 are seen by no student
CLASSES_DATA = f"{OUTPUT}/classes-data"
TEACHER, FEW_TEACHER, ALL_TEACHER = (f"{OUTPUT}/{name}" for name in ("teacher", "few-teacher", "all-teacher"))

ALONE = {"epochs": 10, "alpha": 1.0}
PATIENT = {"batch_size": 128, "learning_rate": 3e-4}
TEACHER_ALONE = {"alpha": 0.0, "temperature": 2.0}
# 54 classes, few labels or all. By eval: the teachers' epoch and rate (over 6e-4, two epochs of few labels); the
# students' rate (over 2e-4, with 6,000 labels).
FEW_LABELS, ALL_LABELS = ({"dataset_id": CLASSES_DATA, "train_split": split} for split in ("train[:12000]", "train"))
FINE_TUNING = {"teacher_learning_rate": 3e-4, "save_steps": 100, "epochs": 1, "alpha": 1.0, "student_layers": 1}
TEACHERS = {  # folder -> flags of the run that leaves it
    TEACHER: {"epochs": 1},
    FEW_TEACHER: {**FEW_LABELS, **FINE_TUNING, "teacher_epochs": 8},
    ALL_TEACHER: {**ALL_LABELS, **FINE_TUNING, "teacher_epochs": 4},
}
FEW = {**FEW_LABELS, "teacher_id": f"{FEW_TEACHER}/teacher", "epochs": 3, "learning_rate": 4e-4}
ALL = {**FEW, **ALL_LABELS, "teacher_id": f"{ALL_TEACHER}/teacher"}
ON_DESCRIPTIONS = {**FEW, **TEACHER_ALONE, "unlabeled_id": CLASSES_DATA, "unlabeled_split": "train[12000:]"}
ON_SENTENCES = {**FEW, **TEACHER_ALONE, "epochs": 1}
ON_SENTENCES |= {"unlabeled_id": f"{CLASSES_DATA}/sentences.txt", "unlabeled_split": "train[:30000]"}


def on_text(count, seeds, **flags):
    """A row: the teacher alone, on so many of the demo's sentences without labels."""
    flags = {"epochs": 2, "unlabeled_id": "demo", "unlabeled_split": f"train[:{count}]", **TEACHER_ALONE, **flags}
    return f"teacher alone (alpha 0, T 2) on {count:,} sentences", flags, seeds


def tried(title, **flags):
    """A row like "some-teacher" but for these flags."""
    return f"the same with {title}", {**on_text(27_296, 3)[1], **flags}, 3


# name -> (title, flags, number of seeds)
ROWS = {
    "alone": ("labels alone (alpha 1)", ALONE, 5),
    "some-teacher": on_text(27_296, 5),
    "patient-alone": ("labels alone (alpha 1), 4,050 steps", {**ALONE, "epochs": 75, **PATIENT}, 3),
    "patient-100k": on_text(100_000, 3, **PATIENT),
    "patient": on_text(SENTENCES - HELD_OUT, 5, **PATIENT),
    "demo": ("labels and teacher (alpha 0.5, T 4), 5 epochs", {"epochs": 5}, 5),
    "demo-text-teacher": on_text(7_500, 5),
    "some": tried("labels and teacher (alpha 0.5, T 4)", alpha=0.5, temperature=4.0),
    "T-1": tried("T 1", temperature=1.0),
    "T-4": tried("T 4", temperature=4.0),
    "lr-1e-4": tried("a learning rate of 1e-4", learning_rate=1e-4),
    "lr-4e-4": tried("a learning rate of 4e-4", learning_rate=4e-4),
    "lr-6e-4": tried("a learning rate of 6e-4", learning_rate=6e-4),
    "both": ("labels and teacher (alpha 0.5, T 4)", {"epochs": 10}, 3),
    "few-alone": ("labels alone (alpha 1)", {**FEW, "alpha": 1.0}, 5),
    "few-patient": ("labels alone (alpha 1), 2,444 steps", {**FEW, "alpha": 1.0, "epochs": 13}, 3),
    "few-both": ("labels and teacher (alpha 0.5, T 4)", FEW, 5),
    "few-little": ("labels and teacher (alpha 0.1, T 2)", {**FEW, "alpha": 0.1, "temperature": 2.0}, 3),
    "few-taught": ("teacher alone (alpha 0, T 2)", {**FEW, **TEACHER_ALONE}, 3),
    "few-sentences": ("teacher alone (alpha 0, T 2) on 30,000 sentences", ON_SENTENCES, 3),
    "few-more": ("teacher alone (alpha 0, T 2) on 41,165 descriptions", ON_DESCRIPTIONS, 5),
    "all-alone": ("labels alone (alpha 1)", {**ALL, "alpha": 1.0}, 3),
    "all-both": ("labels and teacher (alpha 0.5, T 4)", ALL, 3),
}
TABLES = {  # name -> (title, rows), of which the first is the control
    "quality": ("Students with and without the teacher", "alone some-teacher patient-alone patient-100k patient"),
    "demo": ("Candidates for the demo's flags", "demo demo-text-teacher"),  # both take about as long as the demo
    "tried": ("Other changes", "some-teacher some T-1 T-4 lr-1e-4 lr-4e-4 lr-6e-4 both alone"),
    "classes": ("54 classes (Debian)", "few-alone few-patient few-both few-little few-taught few-sentences few-more"),
    "classes-all": ("54 classes (Debian), all labels", "all-alone all-both"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", choices=TABLES, default="quality", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 6), help="runs a row, at most")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from tests/quality.md")
    args = parser.parse_args()
    os.chdir(bench_speed.ROOT)
    if not args.draw:
        distill.quiet_libraries()
        with distill.process_group(distill.choose_device()):
            write_table(args)
    if args.draw or args.table == "quality":
        draw()


def write_table(args):
    """Make the runs of a table that are missing, and write its section."""
    title, names = TABLES[args.table]
    folder = {"classes": FEW_TEACHER, "classes-all": ALL_TEACHER}.get(args.table, TEACHER)
    classes = folder != TEACHER
    if classes:
        debian()
    fine_tuning = run(folder, TEACHERS[folder])
    teacher = answers(f"{folder}/teacher", classes)
    runs = make_runs(names.split(), classes, args)
    control = next(iter(runs.values()))
    lines = [line(ROWS[name][0], runs[name], control, teacher) for name in runs]

    results = control[0]["results"]
    examples, versions = results["examples"], results["versions"]
    files = [f"{run['results']['student']['model']}/results.json" for own in runs.values() for run in own]
    date = datetime.date.fromtimestamp(max(map(os.path.getmtime, files)))
    unseen = "the test sentences" if classes else f"{HELD_OUT:,} sentences of the demo's text that no student has seen"
    interval = "the same bootstrap, paired" if classes else "Student's t over seeds, the test sentences being given"
    report = f"""{distill.table(lines)}

- Mean ± standard deviation over seeds. One teacher for all: {100 * fine_tuning["teacher"]["test_accuracy"]:.2f}% right
  on the {examples["test"]:,} test sentences, by eval accuracy the best of
  {fine_tuning["arguments"]["teacher_epochs"]} epochs.
- Every row trains on the {examples["train"]:,} labeled sentences; what a row names is added without labels.
- % of the teacher's: with its 95% interval by a bootstrap over test sentences and seeds together.
- Agreement: the same answer as the teacher's, on {unseen}.
- Against the first row: the mean difference between runs of the same seed, with its 95% interval by
  {interval}.
- {date}, {results["device"]}, {args.processes} runs at a time, {results["threads"]} CPU thread(s) each,
  {results["arguments"]["precision"]}, torch {versions["torch"]}, transformers {versions["transformers"]}:
  `{shlex.join(["python", "tests/bench_quality.py", *sys.argv[1:]])}`
"""
    print(report)
    bench_speed.write_section(REPORT, title, report)


def make_runs(names, classes, args):
    """All runs of these rows, seed by seed: name -> a list of results and answers."""
    plan = [(name, seed) for seed in range(1, args.seeds + 1) for name in names if seed <= ROWS[name][2]]
    folders = {each: "{}/{}-{}".format(OUTPUT, *each) for each in plan}
    missing = [name for name, seed in plan if not os.path.exists(f"{folders[name, seed]}/results.json")]
    print(f"{len(missing)} of {len(plan)} runs are missing", flush=True)
    of_text = ("teacher_id", "dataset_id", "train_split", "unlabeled_id", "unlabeled_split")
    for text in {tuple((flag, ROWS[name][1].get(flag)) for flag in of_text) for name in missing}:
        label_once({flag: value for flag, value in text if value})

    threads = max(1, os.cpu_count() // args.processes)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the runs
    runs = {name: [] for name in names}
    with ThreadPoolExecutor(args.processes) as pool:
        made = pool.map(lambda each: run(folders[each], {"seed": each[1], **ROWS[each[0]][1]}), plan)
        for (name, seed), results in zip(plan, tqdm(made, "runs", len(plan)), strict=True):
            runs[name].append({"results": results, "answers": answers(folders[name, seed], classes)})
    return runs


def words(flags):
    return ["--demo"] + [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


def run(folder, flags):
    """Run distill.py, or continue it, unless the same command has run to its end before; returns its results.json."""
    note, results, labels = [Path(folder, name) for name in ("command.json", "results.json", "teacher_logits")]
    if folder not in TEACHERS:
        flags = {"teacher_epochs": 0, "teacher_id": f"{TEACHER}/teacher", "save_steps": 500, **flags}
    if distill.read(note) != words(flags):
        shutil.rmtree(folder, ignore_errors=True)
        distill.write(json.dumps(words(flags)), note)
    if not results.exists():
        if folder not in TEACHERS and not labels.is_symlink():
            labels.symlink_to("../teacher_logits")  # one for all: the files' names say what they depend on
        with open(f"{folder}/log.txt", "a", encoding="utf-8") as log:
            command = [sys.executable, "distill.py", *words(flags), "--output_dir", folder]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    return distill.read(results)


def label_once(text):
    """Let the teacher label the text of these flags before several runs at a time do."""
    flags = {"teacher_epochs": 0, "teacher_id": f"{TEACHER}/teacher", "output_dir": OUTPUT, **text}
    args, device = distill.parse_args(words(flags)), distill.choose_device()
    args.precision = distill.choose_precision(args.precision, device)
    distill.label_with_teacher(args, distill.read_task(args).to(device))


def answers(folder, classes):
    """What the model in a folder answers: role -> [N] classes, on the test sentences and the demo's held-out ones."""
    path = f"{folder}/answers.safetensors"
    if not os.path.exists(path):
        model, tokenizer = data.load_model(folder)
        splits, _ = data.load_splits(CLASSES_DATA if classes else "demo", None, {"train": "train", "test": "test"})
        texts, found = {"test": splits["test"].texts}, {"test_labels": splits["test"].labels}
        if not classes:
            texts["held_out"] = data.take(data.read_demo("unlabeled"), f"train[-{HELD_OUT}:]")
        device = distill.choose_device()
        precision = distill.choose_precision("auto", device)
        for role in texts:
            tokens = data.tokenize(tokenizer, texts[role], 512).to(device)
            found[role] = distill.predict(model.to(device), tokens, precision).argmax(-1).cpu()
        safetensors.torch.save_file(found, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return {role: tensor.numpy() for role, tensor in safetensors.torch.load_file(path).items()}


def debian():
    """Write, unless they are there, Debian's package descriptions: short ones by section, the long ones' sentences."""
    sentences_file = Path(CLASSES_DATA, "sentences.txt")
    if sentences_file.exists():  # written last
        return
    packages = {}  # normalized short description -> the first package's (description, section)
    for record in output("apt-cache", "dumpavail").split("\n\n"):
        fields = dict(re.findall(r"^(Description|Section): (.*)", record, re.MULTILINE))
        text, section = fields.get("Description", "").strip(), fields.get("Section", "").rpartition("/")[2]
        if text and section not in ("", "oldlibs", "tasks", "debug", "metapackages"):
            packages.setdefault(data.normalize(text), (text, section))
    rows = shuffled(packages)
    held_out = len(rows) // 20
    splits = {"test": rows[:held_out], "validation": rows[held_out : 2 * held_out], "train": rows[2 * held_out :]}
    os.makedirs(CLASSES_DATA, exist_ok=True)
    for split in splits:
        with open(f"{CLASSES_DATA}/{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *splits[split]])
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
    distill.write("".join(f"{sentence}\n" for sentence in shuffled(sentences)), sentences_file)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def shuffled(dictionary):
    values = list(dictionary.values())
    return [values[i] for i in np.random.default_rng(0).permutation(len(values))]


# ---------------------------------------------------------------------------------------------------------------------
# A row of a table, and the picture


def line(title, runs, control, teacher):
    """A row of a table."""
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
    pairs = min(len(runs), len(control))
    if role == "test":
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
        "% of the teacher's": f"{share:.1f} ({low:.1f}–{high:.1f})",
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


def draw():
    """Draw imgs/quality.svg: test accuracy of the students beside their teacher's."""
    section = REPORT.read_text(encoding="utf-8").partition(f"## {TABLES['quality'][0]}\n")[2]
    teacher = float(re.search(r"One teacher for all: ([\d.]+)%", section)[1])
    rows = bench_speed.read_table(section, "student", "test accuracy %")
    scores = [[float(number) for number in row["test accuracy %"].split(" ± ")] for row in rows]
    low = min(mean - spread for mean, spread in scores)
    high = max([teacher, *(mean + spread for mean, spread in scores)])
    with bench_speed.picture("quality", height=max(4.2, 1.1 + 0.44 * len(rows))) as axes:
        right_edge = axes.get_yaxis_transform()  # x from 0 to 1 across the axes, y as in the data
        for y, (row, (mean, spread)) in enumerate(zip(rows, scores, strict=True)):
            color = bench_speed.GRAY if row["student"].startswith("labels alone") else bench_speed.BLUE
            axes.errorbar(mean, y, xerr=spread, fmt="o", color=color, linewidth=2.5, markersize=6, capsize=4)
            axes.text(1.02, y, f"{mean:.1f}", transform=right_edge, va="center", color=color)
            axes.text(low, y - 0.28, row["student"], fontsize=10.5, va="bottom", color=color)
        axes.axvline(teacher, color=bench_speed.RED, linewidth=1.5, linestyle="--", zorder=0)
        axes.text(teacher, -1, "teacher ", ha="right", va="center", color=bench_speed.RED)
        axes.text(1.02, -1, f"{teacher:.1f}", transform=right_edge, va="center", color=bench_speed.RED)
        axes.set(ylim=(len(rows) - 0.6, -1.2), xlim=(low - 0.2, high + 0.2), yticks=[])
        axes.set_xlabel("test accuracy %, mean ± standard deviation over seeds")
        axes.spines["left"].set_visible(False)


if __name__ == "__main__":
    main()
