"""What the teacher, text without labels and patience bring: one teacher, several seeds.

    python tests/bench_quality.py                      # students of the demo
    python tests/bench_quality.py --table sst2 --folder FOLDER  # of SST-2, from the files that --help names
    python tests/bench_quality.py --table sst2-readme --folder FOLDER  # README's rows alone
    python tests/bench_quality.py --table trec --folder FOLDER  # of six classes of questions
    python tests/bench_quality.py --table classes      # 54 classes: 12,000 labels and more text (Debian or Ubuntu)
    python tests/bench_quality.py --table classes-readme  # README's rows alone
    python tests/bench_quality.py --table classes-all  # the same with all labels

Every figure is a run of distill.py, kept in outputs/quality: started again, this script makes only the runs that are
missing and goes on in the middle of one that was interrupted (delete the folder after a change to the code). A run's
logits are kept beside it, in logits.safetensors. A section of tests/quality.md has a table's figures; --report only
writes it, from the runs that have ended; --draw only draws imgs/quality.svg and imgs/cascade.svg again, from it.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_speed
import numpy as np
import safetensors.torch
import torch
from bench_speed import bench, data, distill
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

OUTPUT = "outputs/quality"  # this and all other paths are below ROOT, where main() goes
REPORT = Path("tests/quality.md")
SENTENCES, HELD_OUT = 269_256, 20_000  # of the demo's text without labels; the last 20,000 are seen by no student
CLASSES_DATA = f"{OUTPUT}/classes-data"
SST2_DATA, TREC_DATA = f"{OUTPUT}/sst2-data", f"{OUTPUT}/trec-data"  # links to --folder
FILES = {  # of these folders
    SST2_DATA: """train.tsv and validation.tsv are GLUE's (sentence and label; the Hub's nyu-mll/glue, sst2), test.tsv
  is the 1,821 positive and negative test sentences of the Stanford Sentiment Treebank, whose labels GLUE hides""",
    TREC_DATA: "train.tsv and test.tsv are TREC's questions (question and coarse; the Hub's CogComp/trec)",
}
TEACHER, SST2_TEACHER, TREC_TEACHER, FEW_TEACHER, ALL_TEACHER = (
    f"{OUTPUT}/{name}" for name in ("teacher", "sst2-teacher", "trec-teacher", "few-teacher", "all-teacher")
)
PROMISES = (0.95, 0.98, 0.99)  # the shares of all texts that get the teacher's answer, from the student or the teacher

ALONE = {"epochs": 10, "alpha": 1.0}
PATIENT = {"batch_size": 128, "learning_rate": 3e-4}
TEACHER_ALONE = {"alpha": 0.0, "temperature": 2.0}
# 54 classes, few labels or all. By eval: the teachers' epoch and rate (over 6e-4, two epochs of few labels); the
# students' rate (over 2e-4, with 6,000 labels).
FEW_LABELS, ALL_LABELS = ({"dataset_id": CLASSES_DATA, "train_split": split} for split in ("train[:12000]", "train"))
FINE_TUNING = {"teacher_learning_rate": 3e-4, "epochs": 1, "alpha": 1.0, "student_layers": 1}
SST2_FINE_TUNING = {"dataset_id": SST2_DATA, **FINE_TUNING, "teacher_epochs": 3}
TREC = {"dataset_id": TREC_DATA, "text_columns": "question", "label_column": "coarse"}
TREC |= {"train_split": "train[:90%]", "eval_split": "train[90%:]"}
TEACHERS = {  # folder -> flags of the run that leaves it; of a table's candidates, the best by eval is used
    TEACHER: {"epochs": 1},
    **{f"{SST2_TEACHER}-{lr}": {**SST2_FINE_TUNING, "teacher_learning_rate": lr} for lr in ("2e-5", "5e-5", "1e-4")},
    TREC_TEACHER: {**TREC, **FINE_TUNING, "teacher_learning_rate": 1e-4, "teacher_epochs": 3},
    FEW_TEACHER: {**FEW_LABELS, **FINE_TUNING, "teacher_epochs": 8},
    ALL_TEACHER: {**ALL_LABELS, **FINE_TUNING, "teacher_epochs": 4},
}
FEW = {**FEW_LABELS, "epochs": 3, "learning_rate": 4e-4}
ALL = {**FEW, **ALL_LABELS}
ON_DESCRIPTIONS = {**FEW, **TEACHER_ALONE, "unlabeled_id": CLASSES_DATA, "unlabeled_split": "train[12000:]"}
ON_SENTENCES = {**FEW, **TEACHER_ALONE, "epochs": 1}
ON_SENTENCES |= {"unlabeled_id": f"{CLASSES_DATA}/sentences.txt", "unlabeled_split": "train[:30000]"}
SST2 = {"dataset_id": SST2_DATA}
SST2_ALONE = {**SST2, "epochs": 4, "alpha": 1.0}


def on_text(count, seeds, **flags):
    """A row: the teacher alone, on so many of the demo's sentences without labels."""
    flags = {"epochs": 2, "unlabeled_id": "demo", "unlabeled_split": f"train[:{count}]", **TEACHER_ALONE, **flags}
    return f"teacher alone (alpha 0, T 2) on {count:,} sentences", flags, seeds


SST2_TEXT = on_text(SENTENCES - HELD_OUT, 5, **SST2, **PATIENT)
# name -> (title, flags, number of seeds)
ROWS = {
    "alone": ("labels alone (alpha 1)", ALONE, 5),
    "some-teacher": on_text(27_296, 5),
    "both": ("labels and teacher (alpha 0.5, T 4)", {"epochs": 10}, 3),
    "sst2-alone": ("labels alone (alpha 1)", SST2_ALONE, 5),
    "sst2-both": ("labels and teacher (alpha 0.5, T 4)", {**SST2, "epochs": 4}, 3),
    "sst2-taught": ("teacher alone (alpha 0, T 2)", {**SST2, "epochs": 4, **TEACHER_ALONE}, 3),
    "sst2-text": SST2_TEXT,
    "sst2-patient": ("labels alone (alpha 1), 5,270 steps", {**SST2_ALONE, **PATIENT, "epochs": 10}, 3),
    "sst2-longer": ("labels alone (alpha 1), 8 epochs", {**SST2_ALONE, "epochs": 8}, 1),
    "sst2-faster": ("labels alone (alpha 1), a learning rate of 4e-4", {**SST2_ALONE, "learning_rate": 4e-4}, 1),
    "sst2-half": on_text((SENTENCES - HELD_OUT) // 2, 1, **SST2, **PATIENT),
    "sst2-quarter": on_text((SENTENCES - HELD_OUT) // 4, 1, **SST2, **PATIENT),
    "sst2-layer": (f"{SST2_TEXT[0]}, one layer", {**SST2_TEXT[1], "student_layers": 1}, 1),
    "trec-alone": ("labels alone (alpha 1)", {**TREC, "alpha": 1.0}, 3),
    "trec-both": ("labels and teacher (alpha 0.5, T 4)", TREC, 3),
    "few-alone": ("labels alone (alpha 1)", {**FEW, "alpha": 1.0}, 5),
    "few-patient": ("labels alone (alpha 1), 2,444 steps", {**FEW, "alpha": 1.0, "epochs": 13}, 3),
    "few-both": ("labels and teacher (alpha 0.5, T 4)", FEW, 5),
    "few-little": ("labels and teacher (alpha 0.1, T 2)", {**FEW, "alpha": 0.1, "temperature": 2.0}, 3),
    "few-taught": ("teacher alone (alpha 0, T 2)", {**FEW, **TEACHER_ALONE}, 3),
    "few-sentences": ("teacher alone (alpha 0, T 2) on 30,000 sentences", ON_SENTENCES, 3),
    "few-more": ("teacher alone (alpha 0, T 2) on the other descriptions", ON_DESCRIPTIONS, 5),
    "all-alone": ("labels alone (alpha 1)", {**ALL, "alpha": 1.0}, 3),
    "all-both": ("labels and teacher (alpha 0.5, T 4)", ALL, 3),
}
CLASSES_ROWS = "few-alone few-patient few-both few-little few-taught few-sentences few-more"
TABLES = {  # name -> (title, teacher, rows), of which the first is the control
    "demo": ("The demo", TEACHER, "alone both some-teacher"),
    "sst2": ("SST-2", SST2_TEACHER, " ".join(name for name in ROWS if name.startswith("sst2-"))),
    "sst2-readme": ("SST-2, README's rows", f"{SST2_TEACHER}-5e-5", "sst2-alone sst2-both sst2-text"),
    "trec": ("Six classes of questions (TREC)", TREC_TEACHER, "trec-alone trec-both"),
    "classes": ("54 classes (Debian)", FEW_TEACHER, CLASSES_ROWS),
    "classes-readme": ("54 classes (Debian), README's rows", FEW_TEACHER, "few-alone few-both few-more"),
    "classes-all": ("54 classes (Debian), all labels", ALL_TEACHER, "all-alone all-both"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", choices=TABLES, default="demo", help="default: %(default)s")
    parser.add_argument("--folder", type=os.path.abspath, help="SST-2: {}. TREC: {}.".format(*FILES.values()))
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), help="runs a row, at most")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the section, from the runs that have ended")
    parser.add_argument("--words", action="store_true", help="only what counting words reaches, without any model")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from tests/quality.md")
    args = parser.parse_args()
    os.chdir(bench_speed.ROOT)
    if not args.draw:
        distill.quiet_libraries()
        with distill.errors_as_lines(), distill.process_group(distill.choose_device()):
            write_table(args)
    draw()
    draw_cascades()


def write_table(args):
    """Make the runs of a table that are missing, and write its section."""
    title, folder, names = TABLES[args.table]
    candidates = [each for each in TEACHERS if each.startswith(folder)]
    flags = TEACHERS[candidates[0]]
    dataset = flags.get("dataset_id", "demo")
    if dataset == CLASSES_DATA:
        debian()
    elif args.folder:
        os.makedirs(OUTPUT, exist_ok=True)
        Path(dataset).unlink(missing_ok=True)
        os.symlink(args.folder, dataset)
    files_note = f"\n- FOLDER: {FILES[dataset]}." if dataset in FILES else ""
    command = f"python tests/bench_quality.py --table {args.table}" + " --folder FOLDER" * (dataset in FILES)
    command += f" --seeds {args.seeds}" * (args.seeds < 5)
    if args.words:
        return write_words(title, read_splits(flags), f"`{command} --words`{files_note}")
    candidates = [each for each in candidates if has_ended(each) or not args.report]
    scores = {each: run(each, TEACHERS[each])["teacher"] for each in candidates}
    folder = max(scores, key=lambda each: (scores[each]["eval_accuracy"], -scores[each]["eval_loss"]))
    splits = read_splits(flags)
    teacher = logits(f"{folder}/teacher", splits)
    runs = make_runs(names.split(), splits, folder, args)
    control = next(iter(runs.values()))
    rows = {ROWS[name][0]: runs[name] for name in runs}
    rows["TF-IDF and logistic regression"] = [{"logits": count_words(splits)}]
    lines = [line(title, own, control, teacher, splits) for title, own in rows.items()]
    cascades = [cascade(title, own, teacher) for title, own in rows.items()]

    right = 100 * distill.score(teacher["test"], splits["test"].labels)["accuracy"]
    results = control[0]["results"]
    examples, versions = results["examples"], results["versions"]
    files = [f"{run['results']['student']['model']}/results.json" for own in runs.values() for run in own]
    date = datetime.date.fromtimestamp(max(map(os.path.getmtime, files)))
    held_out = f"{HELD_OUT:,} sentences of the demo's text that no student has seen"
    unseen = held_out if "held_out" in splits else "the test sentences"
    made_by = {each: {**distill.DEMO, **TEACHERS[each]} for each in scores}
    rates = ";\n  ".join(f"{made_by[each]['teacher_learning_rate']}, {on_both(scores[each])}" for each in scores)
    report = f"""{distill.table(lines)}

- Mean ± standard deviation over seeds. One teacher for all: {right:.2f}% right
  on the {examples["test"]:,} test sentences. It is the best by accuracy on the {examples["eval"]:,} of eval, of
  {made_by[folder]["teacher_epochs"]} epochs at each learning rate: {rates}.
- Every row trains on the {examples["train"]:,} labeled sentences; what a row names is added without labels.
- % of the teacher's, on test: with its 95% interval by a bootstrap over test sentences and seeds together; of one
  seed, over sentences alone.
- Agreement: the same answer as the teacher's, on {unseen}.
- Against the first row, on test: the mean difference between runs of the same seed, with its 95% interval by the same
  bootstrap, paired.
- {date}, {results["device"]}, {args.processes} runs at a time, {results["threads"]} CPU thread(s) each,
  {results["arguments"]["precision"]}, the rows scored in fp32,
  torch {versions["torch"]}, transformers {versions["transformers"]}:
  `{command}`{files_note}

### Answered alone

{distill.table(cascades)}

- The share of test texts, in %, that a student answers alone where student and teacher together are to give the
  teacher's answer to 95%, 98% or 99% of all texts, with 95% confidence: those with a probability above a threshold,
  which bench.py finds on eval. The teacher answers all else.
- Threshold: the median over seeds. Broken: the seeds where both together agree with the teacher on less of test than
  promised, at 95%, 98% and 99%. Test is a sample too: a promise that is kept can look broken there.
"""
    print(report)
    bench_speed.write_section(REPORT, title, report)


def write_words(title, splits, command):
    """Write what counting words reaches: a section by itself, made in a minute."""
    found, row = count_words(splits), {"": "TF-IDF and logistic regression"}
    for role in ("eval", "test"):
        row[f"{role} accuracy %"] = f"{100 * distill.score(found[role], splits[role].labels)['accuracy']:.2f}"
    examples = ", ".join(f"{len(splits[role]):,} {role}" for role in ("train", "eval", "test"))
    report = f"{distill.table([row])}\n\n- {examples} examples. {datetime.date.today()}: {command}\n"
    print(report)
    bench_speed.write_section(REPORT, f"Counting words: {title}", report)


def make_runs(names, splits, teacher, args):
    """All runs of these rows, seed by seed: name -> a list of results and logits."""
    plan = [(name, seed) for seed in range(1, args.seeds + 1) for name in names if seed <= ROWS[name][2]]
    folders = {each: "{}/{}-{}".format(OUTPUT, *each) for each in plan}
    missing = [each for each in plan if not has_ended(folders[each])]
    print(f"{len(missing)} of {len(plan)} runs are missing", flush=True)
    if args.report:
        plan, missing = [each for each in plan if each not in missing], []
    of_text = ("dataset_id", "train_split", "eval_split", "text_columns", "label_column")
    of_text += ("unlabeled_id", "unlabeled_split")
    for text in {tuple((flag, ROWS[name][1].get(flag)) for flag in of_text) for name, _ in missing}:
        label_once({flag: value for flag, value in text if value}, teacher)

    threads = max(1, os.cpu_count() // args.processes)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the runs
    runs = {name: [] for name in names if any(name == planned for planned, _ in plan)}
    with ThreadPoolExecutor(args.processes) as pool:
        made = pool.map(lambda each: run(folders[each], {"seed": each[1], **ROWS[each[0]][1]}, teacher), plan)
        for (name, seed), results in zip(plan, tqdm(made, "runs", len(plan)), strict=True):
            runs[name].append({"results": results, "logits": logits(folders[name, seed], splits)})
    return runs


def has_ended(folder):
    return os.path.exists(f"{folder}/results.json")


def words(flags):
    flags = {"test_split": "test", **flags}
    return ["--demo"] + [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


def run(folder, flags, teacher=None):
    """Run distill.py, or continue it, unless the same command has run to its end before; returns its results.json.

    A student is taught by the teacher of another run's folder.
    """
    note, labels = Path(folder, "command.json"), Path(folder, "teacher_logits")
    if teacher:
        flags = {"teacher_epochs": 0, "teacher_id": f"{teacher}/teacher", **flags}
    if distill.read(note) != words(flags):
        shutil.rmtree(folder, ignore_errors=True)
        distill.write(json.dumps(words(flags)), note)
    if not has_ended(folder):
        if teacher and not labels.is_symlink():
            labels.symlink_to("../teacher_logits")  # one for all: the files' names say what they depend on
        with open(f"{folder}/log.txt", "a", encoding="utf-8") as log:
            command = [sys.executable, "distill.py", *words(flags), "--output_dir", folder]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    return distill.read(Path(folder, "results.json"))


def label_once(text, teacher):
    """Let the teacher label the text of these flags before several runs at a time do."""
    flags = {"teacher_epochs": 0, "teacher_id": f"{teacher}/teacher", "output_dir": OUTPUT, **text}
    args, device = distill.parse_args(words(flags)), distill.choose_device()
    args.precision = distill.choose_precision(args.precision, device)
    task = distill.read_task(args).to(device)
    distill.label_with_teacher(args, task, distill.digest(task.teacher))


def read_splits(flags):
    """The splits of the data set that these flags name, by role; of the demo, also what no student has seen."""
    args = distill.parse_args(words(flags))
    roles = {"train": args.train_split, "eval": args.eval_split, "test": args.test_split}
    splits, _ = data.load_splits(args.dataset_id, None, roles, args.text_columns, args.label_column)
    if args.dataset_id == "demo":
        texts = data.take(data.read_demo("unlabeled"), f"train[-{HELD_OUT}:]")
        splits["held_out"] = data.Split(texts, torch.full((len(texts),), distill.NO_LABEL))
    return splits


def logits(folder, splits):
    """What the model in a folder answers, in fp32, as it is served: role -> [N, C], for all splits but training's."""
    path = f"{folder}/logits.safetensors"
    if not os.path.exists(path):
        model, tokenizer = data.load_model(folder)
        device, found = distill.choose_device(), {}
        for role in splits.keys() - {"train"}:
            tokens = data.tokenize(tokenizer, model.config, 512, splits[role].texts, role).to(device)
            found[role] = distill.predict(model.to(device), tokens, "fp32").cpu()
        safetensors.torch.save_file(found, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return safetensors.torch.load_file(path)


def count_words(splits):
    """The same of a logistic regression that counts words and pairs of words: of three, the best on eval."""
    texts = {role: split.texts[split.texts.column_names[0]] for role, split in splits.items()}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts["train"])
    features, labels = {role: words.transform(texts[role]) for role in texts}, splits["train"].labels
    models = [LogisticRegression(C=c, max_iter=1000).fit(features["train"], labels) for c in (1, 10, 100)]
    best = max(models, key=lambda model: model.score(features["eval"], splits["eval"].labels))
    return {role: torch.from_numpy(best.predict_log_proba(features[role])) for role in splits}


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


def line(title, runs, control, teacher, splits):
    """A row of a section's first table."""

    def percent(role, name):
        scores = [distill.score(run["logits"][role], splits[role].labels, teacher[role]) for run in runs]
        return mean_and_sd([100 * its[name] for its in scores])

    def right(models):
        answers = np.stack([each["test"].argmax(-1) for each in models])
        return answers == splits["test"].labels.numpy()

    steps = "–"
    if "results" in runs[0]:
        arguments, examples = runs[0]["results"]["arguments"], runs[0]["results"]["examples"]
        steps = arguments["epochs"] * math.ceil((examples["train"] + examples["unlabeled"]) / arguments["batch_size"])
        steps = f"{steps:,} of {arguments['batch_size']}"
    ours, controls = [right([run["logits"] for run in group]) for group in (runs, control)]
    share, low, high = bootstrap(lambda one, other: 100 * one / other, ours, right([teacher] * len(runs)))
    pairs = min(len(ours), len(controls))
    difference = bootstrap(lambda one, other: 100 * (one - other), ours[:pairs], controls[:pairs])
    return {
        "student": title,
        "steps": steps,
        "seeds": str(len(runs)),
        "eval accuracy %": percent("eval", "accuracy"),
        "test accuracy %": percent("test", "accuracy"),
        "macro-F1 %": percent("test", "macro_f1"),
        "% of the teacher's": f"{share:.1f} ({low:.1f}–{high:.1f})",
        "agreement %": percent("held_out" if "held_out" in splits else "test", "agreement"),
        "against the first row": "–" if runs is control else "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference),
    }


def cascade(title, runs, teacher):
    """A row of a section's second table: what a student may answer alone, calibrated on eval, measured on test."""
    row, broken = {"student": title}, []
    for promise in PROMISES:
        thresholds, shares, errors = [], [], []
        for model in (run["logits"] for run in runs):
            thresholds.append(bench.least_confidence(model["eval"], teacher["eval"], promise))
            alone = bench.confidence(model["test"]) > thresholds[-1]
            shares.append(100 * alone.double().mean().item())
            errors.append((alone & (model["test"].argmax(-1) != teacher["test"].argmax(-1))).double().mean().item())
        row[f"alone at {promise:.0%}"] = mean_and_sd(shares, 1)
        broken.append(str(sum(error > 1 - promise for error in errors)))
    row["threshold at 99%"] = f"{statistics.median(thresholds):.4f}"
    return row | {"broken": f"{', '.join(broken)} of {len(runs)}"}


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


def mean_and_sd(values, digits=2):
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def on_both(scores):
    return "{:.2f}% on eval, {:.2f}% on test".format(*[100 * scores[f"{role}_accuracy"] for role in ("eval", "test")])


def draw():
    """Draw imgs/quality.svg: test accuracy on SST-2 of the students of several seeds beside their teacher's."""
    section = REPORT.read_text(encoding="utf-8").partition(f"## {TABLES['sst2'][0]}\n")[2]
    teacher = float(re.search(r"One teacher for all: ([\d.]+)%", section)[1])
    rows = [row for row in bench_speed.read_table(section, "student", "test accuracy %") if row["seeds"] != "1"]
    scores = [[*map(float, row["test accuracy %"].split(" ± "))] for row in rows]
    low = min(mean - spread for mean, spread in scores)
    high = max([teacher, *(mean + spread for mean, spread in scores)])
    with bench_speed.picture("quality", height=max(4.2, 1.1 + 0.44 * len(rows))) as axes:
        across = axes.get_yaxis_transform()  # x from 0 to 1 across the axes, y as in the data
        for y, (row, (mean, spread)) in enumerate(zip(rows, scores, strict=True)):
            color = bench_speed.GRAY if row["student"].startswith("labels alone") else bench_speed.BLUE
            axes.errorbar(mean, y, xerr=spread, fmt="o", color=color, linewidth=2.5, markersize=6, capsize=4)
            axes.text(1.02, y, f"{mean:.1f}", transform=across, va="center", color=color)
            student, steps = re.sub(r" \(.*?\)|, [\d,]+ steps", "", row["student"]), row["steps"].split()[0]
            name = f"{student}; {steps} steps, {row['seeds']} seeds"
            axes.text(0, y - 0.28, name, transform=across, fontsize=10, va="bottom", color=color)
        axes.axvline(teacher, color=bench_speed.RED, linewidth=1.5, linestyle="--", zorder=0)
        axes.text(teacher, -1, "teacher, 6 layers ", ha="right", va="center", color=bench_speed.RED)
        axes.text(1.02, -1, f"{teacher:.1f}", transform=across, va="center", color=bench_speed.RED)
        axes.set(ylim=(len(rows) - 0.6, -1.2), xlim=(low - 0.2, high + 0.2), yticks=[])
        axes.set_xlabel("SST-2 test accuracy % of students of 2 MiniLM layers,\nmean ± standard deviation over seeds")
        axes.spines["left"].set_visible(False)


def draw_cascades():
    """Draw imgs/cascade.svg: the share of test texts that students answer alone, against what is promised."""
    text, columns = REPORT.read_text(encoding="utf-8"), [f"alone at {promise:.0%}" for promise in PROMISES]
    names = ("sst2-readme", "demo", "classes-readme", "trec")
    titles = [TABLES[name][0] for name in names if f"## {TABLES[name][0]}\n" in text]
    colors = {"labels alone": bench_speed.GRAY, "labels and teacher": bench_speed.OCHER}
    colors |= {"teacher alone, on more text": bench_speed.BLUE, "counting words": bench_speed.RED}
    if not titles:
        return
    with bench_speed.picture("cascade", columns=len(titles), height=3.6) as panels:
        first = np.ravel(panels)[0]
        for axes, title in zip(np.ravel(panels), titles, strict=True):
            for row in bench_speed.read_table(text.partition(f"## {title}\n")[2], *columns):
                shares = [[*map(float, row[column].split(" ± ")), 0][:2] for column in columns]
                name = re.sub(r" \(.*?\)", "", row["student"])
                name = {"teacher": "teacher alone, on more text", "TF-IDF": "counting words"}.get(name.split()[0], name)
                style = {"fmt": "o-", "color": colors[name], "linewidth": 2.5, "markersize": 5, "capsize": 4}
                axes.errorbar(columns, *zip(*shares, strict=True), label=name, clip_on=False, **style)
            axes.set(ylim=(0, 100), xticks=range(3), xticklabels=[f"{100 * promise:.0f}" for promise in PROMISES])
            axes.set_title(re.sub(r"^The |,.*|.*\(|\)", "", title), fontsize=12)
            axes.tick_params(labelleft=axes is first)
        first.set_ylabel("% answered alone")
        first.figure.supxlabel("promised agreement with the teacher, % of all texts", fontsize=12)
        lines = first.get_legend_handles_labels()
        first.figure.legend(*lines, loc="outside upper center", ncols=2, frameon=False, fontsize=11)


if __name__ == "__main__":
    main()
