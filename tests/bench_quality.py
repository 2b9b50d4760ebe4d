"""What the teacher brings, and what text without labels brings, on the demo's data: one teacher, several seeds.

    python tests/bench_quality.py --seeds 5

Every figure is a run of distill.py, kept in outputs/quality: started again, this script makes only the runs that are
missing (delete the folder after a change to the code). The table goes into README.md, between its markers.
"""

import argparse
import datetime
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import scipy.stats
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import bench  # noqa: E402
import distill  # noqa: E402

OUTPUT = os.path.join("outputs", "quality")  # below ROOT, where main() goes
TEACHER = os.path.join(OUTPUT, "teacher-33")
LABELLED = 6824  # examples in the demo's training split
GRID = [(alpha, temperature) for alpha in (0.0, 0.25, 0.75) for temperature in (2.0, 8.0)]


def run(name, seed, **flags):
    """Run distill.py, unless the same command has run before; returns its results.json."""
    folder = os.path.join(OUTPUT, f"{name}-{seed}")
    flags = {"seed": seed, **flags}
    if folder != TEACHER:
        flags |= {"teacher_epochs": 0, "teacher_id": f"{TEACHER}/teacher"}
    command = ["--demo"] + [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    note, results = os.path.join(folder, "command.json"), os.path.join(folder, "results.json")
    if distill.read_json(note) != command:
        os.makedirs(folder, exist_ok=True)
        # The teacher's labels depend on the text alone: the first run on a text labels it for the others.
        cache = os.path.join(folder, "teacher_logits.safetensors")
        labels = os.path.join(OUTPUT, f"labels{flags.get('unlabeled_split', '')}.safetensors")
        if os.path.exists(labels):
            shutil.copy(labels, cache)
        with open(os.path.join(folder, "log.txt"), "w", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, "distill.py", *command, "--output_dir", folder],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        os.replace(cache, labels)
        distill.write_json(note, command)
    return distill.read_json(results)


def best_on_eval(epochs, pool):
    """The (alpha, temperature) of the grid with the best accuracy on eval, by one run each of a seed of its own."""
    runs = [pool.submit(run, f"grid-{a}-{t}", 0, epochs=epochs, alpha=a, temperature=t) for a, t in GRID]
    scores = [run.result()["student"] for run in tqdm(runs, desc="grid")]
    return max(zip(scores, GRID, strict=True), key=lambda pair: (pair[0]["eval_accuracy"], -pair[0]["eval_loss"]))[1]


def settings(args, pool):
    """The table's rows: title -> (name, flags). Text without labels takes the place of epochs: steps stay the same."""
    alpha, temperature = best_on_eval(args.epochs, pool)
    who = "labels and teacher" if alpha else "teacher alone"
    best = f"{who} (alpha {alpha:g}, T {temperature:g}: the best of {len(GRID)} on eval)"
    plans = {
        "labels alone (alpha 1)": ("alone", {"epochs": args.epochs, "alpha": 1.0}),
        "labels and teacher (alpha 0.5, T 4)": ("distilled", {"epochs": args.epochs}),
        best: ("best", {"epochs": args.epochs, "alpha": alpha, "temperature": temperature}),
    }
    for count in args.unlabeled:
        epochs = round(args.epochs * LABELLED / (LABELLED + count))
        flags = {"epochs": epochs, "unlabeled_id": "demo", "unlabeled_split": f"train[:{count}]"}
        title = f"labels, teacher (alpha 0.5, T 4) and {count:,} sentences without labels"
        plans[title] = (f"unlabeled{count}", flags)
    return plans


def cells(runs, control):
    """One setting's runs as a row's cells, paired with the control's runs of the same seeds."""
    accuracy, agreement, control_accuracy = [
        [100 * run["student"][name] for run in group]
        for group, name in ((runs, "test_accuracy"), (runs, "test_agreement"), (control, "test_accuracy"))
    ]
    of_teacher = statistics.mean(accuracy) / runs[0]["teacher"]["test_accuracy"]
    if runs is control:
        return [mean_and_sd(accuracy), f"{of_teacher:.1f}", mean_and_sd(agreement), "–", "–"]
    differences = [ours - theirs for ours, theirs in zip(accuracy, control_accuracy, strict=True)]
    mean = statistics.mean(differences)
    half = scipy.stats.t.ppf(0.975, len(runs) - 1) * statistics.stdev(differences) / math.sqrt(len(runs))
    verdict = "better" if mean > half else "worse" if mean < -half else "not told apart"
    interval = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
    return [mean_and_sd(accuracy), f"{of_teacher:.1f}", mean_and_sd(agreement), interval, verdict]


def mean_and_sd(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs a row (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="where no text is added (default: %(default)s)")
    parser.add_argument(
        "--unlabeled", type=int, nargs="*", default=[27296], help="rows with so many sentences (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: the spread is what this measures")
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.processes))
    os.chdir(ROOT)
    os.makedirs(OUTPUT, exist_ok=True)
    teacher = run("teacher", 33, epochs=1)["teacher"]

    with ThreadPoolExecutor(args.processes) as pool:
        plans = settings(args, pool)
        futures = [
            [pool.submit(run, name, seed, **flags) for seed in range(1, args.seeds + 1)]
            for name, flags in plans.values()
        ]
        rows = [[future.result() for future in row] for row in tqdm(futures, desc="rows")]

    header = ["student", "test accuracy %", "% of the teacher's", "agreement %", "against labels alone", "verdict"]
    lines = [[title, *cells(runs, rows[0])] for title, runs in zip(plans, rows, strict=True)]
    first = rows[0][0]
    test, flags, versions = first["examples"]["test"], first["arguments"], first["versions"]
    text = bench.table([dict(zip(header, line, strict=True)) for line in lines])
    steps = args.epochs * math.ceil(LABELLED / flags["batch_size"])
    text += f"""

- Mean ± standard deviation of {args.seeds} seeds. Every row takes about {steps:,} steps
  of {flags["batch_size"]} at a learning rate of {flags["learning_rate"]:g}.
- One teacher for all: {100 * teacher["test_accuracy"]:.2f}% right on the {test} test sentences.
- Against labels alone: the mean difference between runs of the same seed and its 95% interval (Student's t). The
  interval covers the randomness of training only, not that of the choice of test sentences.
- {datetime.date.today()}, {first["device"]}, {args.processes} runs at a time of {first["threads"]} threads each,
  {flags["precision"]}, torch {versions["torch"]}, transformers {versions["transformers"]}:
  `{" ".join(["python tests/bench_quality.py", *(sys.argv[1:] if argv is None else argv)])}`
"""
    print(text)
    bench.put_into_card(text, "README.md", "quality")


if __name__ == "__main__":
    main()
