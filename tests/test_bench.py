"""The benchmark: its sums against known values, its clock against known times, its runs from end to end."""

import copy
import errno
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import bench_speed
import datasets
import onnxruntime.quantization
import pytest
import torch
from hub_standin import HubStandin
from transformers import AutoTokenizer

import bench
import data
import distill

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*(treespec|axis name)")  # the exporter's


@pytest.fixture(autouse=True)
def own_threads(monkeypatch):
    """bench.main sets the number of threads for its process, which here is all tests'."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("--flag", value, ...): bench.main in the test's own folder, on one thread, as briefly as it goes."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments):
        bench.main(["--device", "cpu", "--threads", "1", "--min_run_time", "0.001", *map(str, arguments)])

    return main


@pytest.fixture
def fails(run, capsys):
    """fails("--flag", value, ...): the one line with which bench.main ends, its exit code being 2."""

    def message(*arguments):
        capsys.readouterr()  # what came before, such as the bar of a model that was saved
        with pytest.raises(SystemExit) as exit:
            run(*arguments)
        output = capsys.readouterr()
        assert exit.value.code == 2 and output.out == "" and output.err.count("\n") == 1
        return output.err

    return message


# Size


def test_parameters_are_those_counted_by_hand(save_tiny, tokenizer):
    width, inner = 32, 64
    embeddings = (len(tokenizer) + 64 + 2) * width  # words, positions, token types
    norm = 2 * width
    attention = 4 * (width * width + width) + norm
    feed_forward = (width * inner + inner) + (inner * width + width) + norm
    head = (width * width + width) + (width * 2 + 2)  # pooler, classifier
    rest = norm + 3 * (attention + feed_forward) + head
    [model], _, _ = bench.read(bench_args(save_tiny("model", num_hidden_layers=3)))
    assert model.figures == {"parameters": embeddings + rest, "without_embeddings": rest}


# Latency


def clock(call, models=("model",), batches=(0,), min_run_time=1e-6, device="cpu"):
    return bench.measure(call, models, batches, min_run_time, torch.device(device))


def test_the_clock_agrees_with_a_known_time():
    """The sleeper takes its own time too: on a busy machine it sleeps longer than it should."""
    slept = []

    def sleep(model, batch):
        start = time.perf_counter()
        time.sleep(batch)
        slept.append(time.perf_counter() - start)

    times = clock(sleep, batches=[0.05], min_run_time=0.3)["model"]
    assert sum(times) >= 0.3 and len(slept) == 2 * len(times)
    assert bench.describe(times)["p50_ms"] == pytest.approx(1000 * statistics.median(slept[1::2]), rel=0.05)


def test_models_take_turns_on_the_same_batches():
    seen = []
    times = clock(lambda *turn: seen.append(turn), "AB", [0, 1])
    turns = [(name, batch) for batch in (0, 1) for name in "AB" for _ in range(2)]  # one to warm up, one on the clock
    assert seen == turns * 3  # three times through both batches make at least MIN_CALLS calls
    assert len(times["A"]) == len(times["B"]) == 6


def test_a_model_drops_out_of_the_turns_when_it_has_run_long_enough():
    seconds = {"teacher": 0.1, "student": 0.001}
    times = clock(lambda model, batch: time.sleep(seconds[model]), seconds, min_run_time=0.4)
    assert len(times["teacher"]) == bench.MIN_CALLS
    assert len(times["student"]) > 2 * bench.MIN_CALLS and sum(times["student"]) >= 0.4


def test_the_clock_waits_for_the_gpu_before_and_after_each_call(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    clock(lambda model, batch: seen.append("call"), device="cuda")
    assert seen == ["wait", "call", "wait"] * 2 * bench.MIN_CALLS


def test_the_clock_runs_without_gradients():
    seen = set()
    clock(lambda model, batch: seen.add(torch.is_inference_mode_enabled()))
    assert seen == {True}


def test_percentiles():
    timing = bench.describe([second / 1000 for second in range(1, 102)])
    assert timing == pytest.approx(
        {"calls": 101, "p25_ms": 26, "p50_ms": 51, "p75_ms": 76, "p90_ms": 91, "p99_ms": 100}
    )
    assert "p99_ms" not in bench.describe([0.001] * 99) and "p90_ms" not in bench.describe([0.001] * 9)


# Texts


def test_texts_have_exactly_the_length_asked_for(save_tiny, tokenizer):
    [columns] = bench.text_batches(None, 4, 17)
    assert tokenizer(*columns, truncation=True, max_length=17, return_tensors="pt")["input_ids"].shape == (4, 17)


def test_text_is_read_as_the_tokenizer_reads_it(tokenizer):
    """A special token in the text is one, and the limits are the flag's and the tokenizer's own."""
    text = "a fine title [SEP] and a dull body"
    assert bench.encode(tokenizer, [[text]], 64)["input_ids"].tolist() == tokenizer([text])["input_ids"]
    short = copy.copy(tokenizer)
    short.model_max_length = 7
    assert [bench.encode(short, [[text]], limit)["input_ids"].shape[1] for limit in (5, 64)] == [5, 7]


def test_real_texts_are_the_same_whatever_the_batch_size(reviews_folder):
    split = data.load_splits(reviews_folder)[0]["eval"]
    ones, eights, large = [bench.text_batches(split, size, "real") for size in (1, 8, 128)]
    assert [len(columns[0]) for columns in eights] == [8] * (53 // 8)
    flat = [[text for [column] in batches for text in column] for batches in (ones, eights, large)]
    assert flat[0][: len(flat[1])] == flat[1]
    assert sorted(flat[0]) == sorted(split.texts["text"])
    assert len(large) == 1 and flat[2] == (flat[0] * 3)[:128]  # 53 texts fill a batch by being there twice and more


def test_a_single_file_is_scored_on_the_tenth_that_distill_held_out(run, write_csv, reviews, save_tiny, monkeypatch):
    rows = [(text, ("negative", "positive")[label]) for text, label in reviews[:100]]
    path, load_splits, held_out = write_csv("reviews.csv", rows), data.load_splits, []

    def recording_load_splits(*args):
        splits, class_names = load_splits(*args)
        held_out.append(splits["eval"].texts[:])
        return splits, class_names

    monkeypatch.setattr(data, "load_splits", recording_load_splits)
    names = {"classes": ("positive", "negative")}  # in another order than the data's
    models = ["--teacher_id", save_tiny("teacher", **names), "--student_id", save_tiny("student"), "--dataset_id", path]
    with distill.process_group(torch.device("cpu")):
        distill.read_task(distill.parse_args([*models, "--seed", "7"]))
    run(*models, "--length", 8)
    assert held_out[0] == held_out[1]


# Accuracy


def test_comparison_by_hand():
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    teacher = torch.tensor([[9.0, 0], [0, 9], [0, 9], [0, 9], [9, 0], [9, 0]])  # 0 1 1 wrong wrong 0
    student = torch.tensor([[9.0, 0], [9, 0], [0, 9], [2, 0], [0, 9], [9, 0]])  # 0 wrong 1 0 1 0
    scores = bench.compare(student, teacher, labels)
    assert (scores["accuracy"], scores["agreement"]) == pytest.approx((5 / 6, 3 / 6))
    # Class 0: 3 right, none missed, 1 false alarm: F1 = 6 / 7. Class 1: 2 right, 1 missed, none false: 4 / 5.
    assert scores["macro_f1"] == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert (scores["alone_right"], scores["first_alone_right"], scores["mcnemar_p"]) == (2, 1, 1.0)
    assert scores["accuracy_interval"] == pytest.approx((0.4365, 0.9699), abs=5e-5)
    assert scores["agreement_interval"] == pytest.approx((0.1876, 0.8124), abs=5e-5)
    assert bench.compare(teacher, teacher, labels)["mcnemar_p"] == 1
    unlabeled = bench.compare(student, teacher, torch.full((6,), distill.NO_LABEL))
    assert {key: unlabeled[key] for key in ("agreement", "agreement_interval")} == {
        key: scores[key] for key in ("agreement", "agreement_interval")
    }
    assert not {"accuracy", "accuracy_interval", "mcnemar_p"} & unlabeled.keys()


def test_predictions_begin_with_the_surest_disagreements():
    texts = datasets.Dataset.from_dict({"text": list("abcd")})
    split = data.Split(texts, torch.tensor([0, 1, distill.NO_LABEL, 0]))
    student, teacher = of_confidence([0.7, 0.6, 0.9, 0.8]), of_confidence([0.9] * 4)
    teacher[[1, 3]] *= -1
    lines = [json.loads(line) for line in bench.predictions(split, teacher, student, ["no", "yes"])]
    assert [line["text"] for line in lines] == ["d", "b", "c", "a"]
    last = {"row": 4, "text": "d", "label": "no", "teacher": "yes", "student": "no", "probability": pytest.approx(0.8)}
    assert lines[0] == last and "label" not in lines[2]
    pairs = data.Split(datasets.Dataset.from_dict({"title": ["a"], "body": ["b"]}), split.labels[:1])
    [line] = bench.predictions(pairs, teacher[:1], student[:1], ["no", "yes"])
    assert json.loads(line)["text"] == "a\tb"


# Cascades


def of_confidence(probabilities):
    """Logits of two classes, the first of which has these probabilities; their negative answers otherwise as surely."""
    gap = torch.as_tensor(probabilities, dtype=torch.float64).logit() / 2
    return torch.stack([gap, -gap], 1)


@pytest.mark.parametrize(
    ("promise", "sizes"), [(0.95, (59, 93, 124)), (0.98, (149, 236, 313)), (0.99, (299, 473, 628)), (0.995, (598, 947))]
)
def test_thresholds_are_wilks_tolerance_limits(promise, sizes):
    """As tables of them have it, so many texts prove a promise with no confident error, with one and with two."""
    for errors, size in enumerate(sizes):
        for n, allowed in ((size - 1, errors - 1), (size, errors)):
            sure = torch.linspace(0.99, 0.51, n, dtype=torch.float64)  # and wrong each time
            threshold = bench.least_confidence(of_confidence(sure), -of_confidence(sure), promise)
            assert threshold == (1.0 if allowed < 0 else pytest.approx(sure[allowed].item(), abs=1e-12))
            few = torch.where(torch.arange(n)[:, None] < allowed, of_confidence(sure), -of_confidence(sure))
            assert bench.least_confidence(few, -of_confidence(sure), promise) == (1.0 if allowed < 0 else 0.0)


def test_of_texts_as_sure_as_an_error_none_is_answered_alone():
    """One error is allowed of 93, but the two surest are as sure as each other and as texts without an error."""
    student = of_confidence([0.99] + [0.9] * 40 + [0.6] * 52)
    teacher = student.clone()
    teacher[[5, 9, 60]] *= -1
    threshold = bench.least_confidence(student, teacher, 0.95)
    assert (bench.confidence(student) > threshold).nonzero().tolist() == [[0]]


def test_sure_answers_keep_their_order():
    """Float32 has all of them at 1."""
    student = torch.tensor([[20.0, 0], [22, 0], [24, 0]])
    first, second, third = bench.confidence(student).tolist()
    assert first < second < third < 1 == student.softmax(-1).amin(0)[0]


def test_promises_are_broken_as_rarely_as_promised():
    """In 500 draws of 500 texts, of a student far surer than it should be; their own rate would break half of them."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(4_000, generator=generator, dtype=torch.float64)
    student = of_confidence((right / 2 + 0.5).pow(0.3))
    wrong = torch.rand(4_000, generator=generator) < 0.3 * (1 - right)
    teacher, sure, broken = torch.where(wrong[:, None], -student, student), bench.confidence(student), 0
    for _ in range(500):
        rows = torch.randint(4_000, (500,), generator=generator)
        alone = sure > bench.least_confidence(student[rows], teacher[rows], 0.98)
        assert alone.any()
        broken += (wrong & alone).double().mean().item() > 0.02
    assert 5 < broken < 35  # at most 25 are expected, and fewer since errors are whole


def test_a_cascade_by_hand():
    """At 99.5% the threshold is 0.8: of four texts, the student answers the three of which it is surer."""
    labels = torch.tensor([0, 0, 0, 1])
    teacher, student = of_confidence([0.7] * 4), of_confidence([0.99, 0.9, 0.8, 0.95])
    student[1:] *= -1  # wrong on the second and the third, right on the last, where the teacher is wrong
    seen = of_confidence([0.8] * 600)
    seen[:100] *= -1
    answers = {"eval": teacher, "calibration": of_confidence([0.9] * 600)}
    variants = [
        bench.Variant("teacher", None, [0, 1], None, logits=answers),
        bench.Variant("student", None, [0, 1], None, logits={"eval": student, "calibration": seen}),
        bench.Variant("student", None, [0, 1], None, runtime="compiled"),
        bench.Variant("teacher", None, [0, 1], None, "int8", "ONNX Runtime"),
    ]
    rows = [{"model": {"p50_ms": 8.0}}, {"model": {"p50_ms": 1.0}}, {}, {}]
    args = bench_args("teacher")
    *_, last = pairs = [*bench.cascades(variants, rows, answers, labels, args)]
    assert [(pair["name"], pair["promise"]) for pair in pairs] == [("student", promise) for promise in bench.PROMISES]
    assert last["threshold"] == pytest.approx(0.8, abs=1e-12)
    assert (last["alone"], last["own_agreement"]) == pytest.approx((3 / 4, 1 / 3))
    assert (last["agreement"], last["accuracy"]) == (2 / 4, 3 / 4)  # on the third the teacher answers
    assert (last["ms"], last["speed_up"]) == (1 + 8 / 4, 8 / 3)
    args.teacher_id = None
    [*_, last] = bench.cascades(variants[1:2], rows[1:2], answers, labels, args)
    assert "ms" not in last and last["alone"] == 3 / 4


def test_a_run_with_texts_to_calibrate_on(run, save_tiny, write_csv, reviews_folder, reviews, tmp_path, capsys):
    """A file in the data set's folder, or anywhere else, without labels. 300 texts do not prove 99.5%."""
    lines = [text for text, _ in reviews[200:500]]
    write_csv("reviews/traffic.csv", [[text] for text in lines], ["text"])
    Path(tmp_path, "lines.txt").write_text("\n".join(lines) + "\n")
    models = ["--teacher_id", save_tiny("teacher"), "--student_id", save_tiny("student", seed=1), "--length", 8]
    found = []
    for split in (tmp_path / "reviews" / "traffic.csv", "lines.txt", "traffic"):
        more = ["--onnx", "--predictions", "all.jsonl"] if split == "traffic" else []
        run(*models, "--dataset_id", reviews_folder, "--calibration_split", split, *more)
        text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
        rows, pairs = json.loads(last)["models"], json.loads(last)["cascades"]
        found.append([{**pair, "ms": None, "speed_up": None} for pair in pairs[:4]])
        assert "warning" not in text and f"all texts like those of {split} get" in text
    assert found[0] == found[1] == found[2]
    assert json.loads(Path("bench.json").read_text())["cascades"] == pairs
    assert [(pair["name"], pair["precision"], pair["promise"]) for pair in pairs] == [
        (models[3], precision, promise) for precision in ("fp32", "int8") for promise in bench.PROMISES
    ]
    for four in (pairs[:4], pairs[4:]):
        shares = [pair["alone"] for pair in four]
        assert shares == sorted(shares, reverse=True) and four[3]["threshold"] == 1.0
        assert (four[3]["alone"], four[3]["agreement"], four[3]["accuracy"]) == (0, 1, rows[0]["accuracy"])
        assert "own_agreement" not in four[3]
    headings = (
        "promise | threshold | alone | agreement there | pair ms | speed-up | accuracy (95%) | agreement (95%) | p"
    )
    assert f"| model | precision | {headings} |" in [" ".join(line.split()) for line in text.splitlines()]
    for row in rows[4:]:  # int8
        assert f"{row['changed_in_batches']:.1%} of {row['name']}'s" in text
    predictions = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in predictions) == [*range(1, 54)]
    agreement = sum(line["student"] == line["teacher"] for line in predictions) / 53
    accuracy = sum(line["student"] == line["label"] for line in predictions) / 53
    assert (agreement, accuracy) == pytest.approx((rows[1]["agreement"], rows[1]["accuracy"]))


def test_texts_that_student_or_score_know_are_told(run, save_tiny, reviews_folder, capsys):
    models = ["--teacher_id", save_tiny("teacher"), "--student_id", save_tiny("student", seed=1), "--length", 8]
    for split, known in (("train[:30]", 30), ("validation[:10]", 10), ("test", None)):
        run(*models, "--dataset_id", reviews_folder, "--calibration_split", split)
        warning = f"warning: {known} texts to calibrate on are in training or eval too"
        assert (warning in capsys.readouterr().out) == bool(known)


def test_a_teacher_that_is_a_column_takes_no_time(run, save_tiny, write_csv, reviews, capsys):
    """It gives the student's answer where the student is sure, and else any: half may be answered alone. No labels."""
    student, texts = save_tiny("student"), [text for text, _ in reviews[:850]]
    model, tokenizer = data.load_model(student)
    with torch.inference_mode():
        logits = model(**bench.encode(tokenizer, [texts], 64)).logits
    answers, sure = logits.argmax(-1).tolist(), bench.confidence(logits)
    sure = (sure > sure.median()).tolist()
    names = [("negative", "positive")[answers[n] if sure[n] else n % 2] for n in range(850)]
    rows = list(zip(texts, names, strict=True))
    for name, part in (("train", rows[:50]), ("test", rows[50:150]), ("validation", rows[150:])):
        folder = Path(write_csv(f"answers/{name}.csv", part, ["text", "answer"])).parent
    flags = ["--dataset_id", folder, "--teacher_column", "answer", "--label_column", "none", "--eval_split", "test"]
    run("--student_id", student, *flags, "--calibration_split", "validation", "--length", 8)
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    [row], pairs = json.loads(last)["models"], json.loads(last)["cascades"]
    own = [("negative", "positive")[answer] for answer in answers[50:150]]
    assert row["agreement"] == pytest.approx(sum(map(str.__eq__, own, names[50:150])) / 100)
    assert "accuracy" not in row and "accuracy (95%)" not in text and "ms" not in pairs[0]
    assert 0.3 < pairs[2]["alone"] < 0.7 and pairs[2]["agreement"] == pairs[2]["own_agreement"] == 1
    assert "equal" not in text and "those of the column answer" in text


@pytest.mark.parametrize("order", [("negative", "positive"), ("positive", "negative")])
def test_the_training_split_needs_no_labels(run, save_tiny, reviews_folder, reviews, write_csv, capsys, order):
    """Nor do others: --label_column none. The names are the models', whatever their order."""
    teacher = save_tiny("teacher", classes=order)
    flags = ["--teacher_id", teacher, "--dataset_id", reviews_folder, "--length", 8]
    run(*flags)
    [with_labels] = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    write_csv("reviews/train.csv", [[text] for text, _ in reviews[:101]], ["text"])
    run(*flags)
    [without] = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert without["accuracy"] == with_labels["accuracy"] and without["loss"] == with_labels["loss"]
    write_csv("reviews/validation.csv", [[text] for text, _ in reviews[101:154]], ["text"])
    run(*flags, "--label_column", "none")
    [unlabeled] = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert unlabeled["agreement"] == 1 and "accuracy" not in unlabeled


# Whole runs


def test_flags(run, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "which texts a student may answer alone." in " ".join(capsys.readouterr().out.split())
    args = distill.parse_args(["--demo", "--batch_size", "2"], bench.Config, bench.DEMO)
    assert (args.teacher_id, args.student_id, args.batch_size) == ("./outputs/teacher", ["./outputs"], 2)
    assert (args.eval_split, args.calibration_split, args.length) == ("test", "validation", "real")
    assert distill.parse_args(["--student_id", "model"], bench.Config).length == 64


def test_a_terminal_that_lacks_the_dashes(run, save_tiny, reviews_folder, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run("--teacher_id", save_tiny("café"), "--dataset_id", reviews_folder, "--length", 8)
    terminal.flush()
    text = terminal.buffer.getvalue().decode("ascii")
    assert "caf\\xe9" in text and "\\u2013" in text


def test_run_over_two_students(run, save_tiny, reviews_folder, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(dynamic) or model)  # slow on a CPU
    monkeypatch.setattr(distill, "multiplies_bf16", lambda device: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as in torch 2.9
    teacher = save_tiny("teacher", num_hidden_layers=4)
    students = [save_tiny("bert", seed=3), save_tiny("distil", **DISTILBERT)]
    flags = ["--batch_size", 2, "--precision", "fp32,bf16", "--compile", "--eval_split", "test"]
    run("--teacher_id", teacher, "--student_id", ",".join(students), "--dataset_id", reviews_folder, *flags)

    *markdown, last = capsys.readouterr().out.splitlines()
    markdown = "\n".join(markdown)
    rows = json.loads(last)["models"]
    names = [teacher, *students]
    assert [row["name"] for row in rows] == names * 4  # two precisions, compiled or not
    assert compiled == [True] * 6
    assert [" ".join(line.split()).strip("| ") for line in markdown.splitlines() if line.startswith("| model")] == [
        "model | precision | parameters | without embeddings | MB | p50 ms | with tokenizer | speed-up"
        " | accuracy (95%) | agreement (95%) | p",
    ]
    for stated in ("batch 2, real lengths", " (cpu), 1 CPU threads, load average ", f"torch {version('torch')}"):
        assert stated in markdown
    assert f"those of {teacher} in fp32, PyTorch, on the test split of {reviews_folder}" in markdown

    results = json.loads(Path("bench.json").read_text())
    assert results["models"] == rows and results["cascades"] == []
    assert results["device"].removesuffix(" (cpu)") in Path("/proc/cpuinfo").read_text() + os.uname().machine
    for row in rows:
        assert row["model"]["calls"] >= bench.MIN_CALLS and 0 < row["model"]["p25_ms"] <= row["model"]["p75_ms"]
        assert row["tokenizer"]["p50_ms"] > 0 and row["both"]["p50_ms"] > 0
        assert row["speed_up"] == pytest.approx(rows[0]["model"]["p50_ms"] / row["model"]["p50_ms"])
    for name, fp32, bf16 in zip(names, rows[:3], rows[6:9], strict=True):
        assert fp32["megabytes"] == pytest.approx(Path(name, "model.safetensors").stat().st_size / 1e6, rel=0.01)
        assert fp32["megabytes"] == pytest.approx(2 * bf16["megabytes"], rel=1e-3)

    splits, _ = data.load_splits(reviews_folder, split_names={"train": "train", "test": "test"})
    with distill.process_group(torch.device("cpu")):
        for name, row in zip(students, rows[1:3], strict=True):
            model, tokenizer = data.load_model(name)
            tokens = data.tokenize(tokenizer, model.config, 64, splits["test"].texts, "test")
            logits = distill.predict(model, tokens, "fp32")
            scores = distill.score(logits, splits["test"].labels)
            assert row["accuracy"] == pytest.approx(scores["accuracy"])
            assert row["loss"] == pytest.approx(scores["loss"], rel=1e-4)


def test_classes_are_compared_by_name_not_by_position(run, save_tiny, reviews_folder, capsys):
    """A student whose classes stand in the other order gives the same answers."""
    teacher = save_tiny("teacher", classes=("negative", "positive"))
    student = swap_classes(teacher, "swapped")
    run("--teacher_id", teacher, "--student_id", student, "--dataset_id", reviews_folder, "--length", 8)
    teacher, student = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert student["agreement"] == 0
    assert student["accuracy"] == pytest.approx(1 - teacher["accuracy"])


def test_without_a_teacher_the_first_student_is_what_others_are_compared_with(run, save_tiny, reviews_folder, capsys):
    students = [save_tiny(name, seed=seed) for seed, name in enumerate(("one", "two"))]
    run("--student_id", ",".join(students), "--dataset_id", reviews_folder, "--length", 8)
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    one, two = json.loads(last)["models"]
    assert (one["name"], one["agreement"], one["speed_up"], one["alone_right"]) == (students[0], 1, 1, 0)
    assert two["agreement"] < 1 and two["speed_up"] == one["model"]["p50_ms"] / two["model"]["p50_ms"]
    assert "teacher" not in text.replace(str(Path(students[0]).parent), "")
    assert f"answers that are those of {students[0]} in fp32, PyTorch" in text


def swap_classes(source, folder):
    """A copy of a model of two classes that names its outputs the other way round."""
    folder = shutil.copytree(source, folder)
    config = json.loads(Path(folder, "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "positive", "1": "negative"}, {"positive": 0, "negative": 1}
    Path(folder, "config.json").write_text(json.dumps(config))
    return str(folder)


def test_latency_md_is_written_by_four_calls(save_tiny, tmp_path, monkeypatch):
    main, brief = bench.main, ["--device", "cpu", "--threads", "1", "--min_run_time", "0.001"]
    monkeypatch.setattr(bench, "main", lambda argv: main([*brief, *(word for word in argv if word != "--onnx")]))
    monkeypatch.setattr(bench_speed, "save_published", lambda: (save_tiny("large"), save_tiny("small")))
    monkeypatch.chdir(tmp_path)
    for folder in ("tests", "outputs/speed"):
        Path(folder).mkdir(parents=True)
    Path("tests/latency.md").write_text("# Latencies\n\n## The demo\n\nOf yesterday.\n")
    save_tiny("outputs/teacher"), save_tiny("outputs", seed=1)
    Path("outputs/results.json").write_text("{}")
    bench_speed.latencies()
    head, *sections = Path("tests/latency.md").read_text().split("\n## ")
    sections = {title: text for title, _, text in (section.partition("\n") for section in sections)}
    assert head == "# Latencies\n" and "yesterday" not in sections["The demo"]
    told = ("batch 1, 32 tokens", "batch 1, real lengths", "batch 32, real lengths", "batch 32, 64 tokens")
    assert [title.startswith("The demo") for title in sections] == [True, False, True, True]
    first, second, *others = sections.values()
    for text, where in zip((second, first, *others), told, strict=True):
        assert f"p50: median at {where}," in text and ("| promise |" in text) == ("--demo" in text)


def test_hub_models_without_a_data_set(save_tiny, tmp_path):
    """The command itself: models from a Hub, no data set, and generic class names on one side."""
    for name, classes in (("teacher", ("LABEL_0", "LABEL_1")), ("student", ("negative", "positive"))):
        shutil.copytree(save_tiny(name, classes=classes), tmp_path / "hub" / "models" / "org" / name)
    command = f"{sys.executable} {ROOT}/bench.py --teacher_id org/teacher --student_id org/student --device cpu"
    command += " --length 8 --threads 1 --min_run_time 0.001 --onnx"
    with HubStandin(tmp_path / "hub") as hub:
        ended = subprocess.run(
            command.split(),
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr and "torchvision" not in ended.stderr  # the exporter has much to say
    rows = json.loads(ended.stdout.splitlines()[-1])["models"]
    folder = tmp_path / "onnx_models" / "org" / "student"  # complete: what transformers.js and Optimum load
    for file in ("onnx/model.onnx", "onnx/model_quantized.onnx", "tokenizer.json", "config.json"):
        assert (folder / file).is_file()
    assert "accuracy" not in rows[0] and "accuracy" not in ended.stdout


# ONNX Runtime

DISTILBERT = {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
ROBERTA = {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("shape", "pairs", "inputs"),
    [
        ({}, True, ["attention_mask", "input_ids", "token_type_ids"]),
        (DISTILBERT, False, ["attention_mask", "input_ids"]),
        (ROBERTA, False, ["attention_mask", "input_ids"]),
    ],
    ids=["bert", "distilbert", "roberta"],
)
def test_onnx_gives_the_logits_of_pytorch(save_tiny, tokenizer, reviews, tmp_path, shape, pairs, inputs):
    if shape is ROBERTA:  # its own tokenizer gives no token types
        tokenizer = AutoTokenizer.from_pretrained(data.demo_model(), model_input_names=inputs)
    folder = save_tiny("model", max_position_embeddings=160, tokenizer=tokenizer, **shape)
    [model], _, _ = bench.read(bench_args(folder))
    bench.export(model, tmp_path, bench_args(folder))
    path = str(tmp_path / "onnx" / "model.onnx")
    network = bench.open_session(path, threads=1)
    given = onnxruntime.InferenceSession(path).get_inputs()
    assert sorted(each.name for each in given) == inputs
    assert {each.type for each in given} == {"tensor(int64)"}

    texts = [text for text, _ in reviews[:100]]
    columns = [texts, texts[::-1]] if pairs else [texts]
    batches = [[column[i : i + size] for column in columns] for size in (1, 7) for i in range(0, 100, size)]
    for length in (3, 4, 37, 128):  # without padding, whatever the batch
        batches += [[[" ".join(["word"] * (length - 2))] * size] for size in (1, 7)]
    lengths, padded = set(), 0
    for batch in batches:
        encoded = bench.encode(model.tokenizer, batch, 128)
        with torch.inference_mode():
            torch.testing.assert_close(network(**encoded), model.network(**encoded).logits, rtol=0, atol=1e-3)
        lengths.add(encoded["input_ids"].shape[1])
        padded += int((encoded["attention_mask"] == 0).any())
    assert {3, 128} <= lengths and 10 < padded < len(batches) - 100


def test_int8_shrinks_embeddings_too(save_tiny, tmp_path):
    """Of this model 97% are embeddings: were they left in fp32, the file would hardly shrink."""
    args = bench_args(save_tiny("model"), "--max_length", "64")
    [model], _, _ = bench.read(args)
    assert model.figures["without_embeddings"] < 0.03 * model.figures["parameters"]
    bench.export(model, tmp_path, args)
    fp32, int8 = [(tmp_path / "onnx" / file).stat().st_size for file in bench.ONNX_FILES.values()]
    assert fp32 > 4 * model.figures["parameters"]
    assert int8 < 0.35 * fp32


def bench_args(model, *more):
    return distill.parse_args(["--teacher_id", model, "--length", "8", "--threads", "1", *more], bench.Config)


def test_onnx_rows(run, save_tiny, reviews_folder, capsys, tmp_path):
    """One student's classes stand in the other order: the file keeps it, the scores do not see it."""
    teacher = save_tiny("teacher", classes=("negative", "positive"))
    student = swap_classes(teacher, "swapped")
    data_set = ["--dataset_id", reviews_folder, "--batch_size", 3]
    before = sorted(Path(teacher).rglob("*"))
    run("--teacher_id", teacher, "--student_id", student, *data_set, "--onnx")
    output = capsys.readouterr().out
    assert sorted(Path(teacher).rglob("*")) == before  # the folder of a teacher may be another's
    folders = {teacher: Path("onnx_models", "teacher", "onnx"), student: Path(student, "onnx")}
    for name, folder in folders.items():
        assert f"{name} in ONNX: {folder}\n" in output
        assert sorted(os.listdir(folder)) == ["model.onnx", "model_quantized.onnx"]
        for file in folder.iterdir():
            for place in (str(ROOT), str(tmp_path), sys.prefix, "site-packages", ".py"):
                assert place.encode() not in file.read_bytes()
    assert {"config.json", "tokenizer.json"} <= set(os.listdir("onnx_models/teacher"))
    results = json.loads(Path("bench.json").read_text())
    assert results["versions"]["onnxruntime"] in output
    rows = {(row["name"], row["precision"], row["runtime"]): row for row in results["models"]}
    for name in (teacher, student):
        eager, fp32, int8 = [
            rows[name, *kind] for kind in (("fp32", "PyTorch"), ("fp32", "ONNX Runtime"), ("int8", "ONNX Runtime"))
        ]
        for key in ("accuracy", "macro_f1", "agreement"):
            assert fp32[key] == eager[key]
        assert fp32["loss"] == pytest.approx(eager["loss"], rel=1e-4)
        assert 0.7 < int8["agreement_with_fp32"] <= 1 and f" {int8['agreement_with_fp32']:.3f} |" in output
        assert 0 <= int8["changed_in_batches"] < 0.3
        assert "agreement_with_fp32" not in fp32 and "changed_in_batches" not in fp32
        for row, file in ((fp32, "model.onnx"), (int8, "model_quantized.onnx")):
            assert row["megabytes"] == (folders[name] / file).stat().st_size / 1e6
        teacher_p50 = rows[teacher, "fp32", "PyTorch"]["model"]["p50_ms"]
        assert int8["speed_up"] == pytest.approx(teacher_p50 / int8["model"]["p50_ms"])
    texts = bench.encode(data.load_model(teacher)[1], [["a fine film", "dull"]], 64)
    ours, theirs = [bench.open_session(folder / "model.onnx", 1)(**texts) for folder in folders.values()]
    torch.testing.assert_close(ours, theirs)  # the student is a copy of the teacher that names its outputs otherwise


def test_a_model_that_cannot_be_exported_loses_its_rows_alone(run, save_tiny, monkeypatch, capfd):
    """What it prints of its graph is not seen, and the cause is the first sentence of the first error."""
    export = torch.onnx.export

    def fail(network, **options):
        if network.config.model_type != "distilbert":
            return export(network, **options)
        print("graph():", file=sys.stderr)
        try:
            raise KeyError("no such operator")
        except KeyError as error:
            try:
                raise ValueError("\x1b[31mNo decomposition\nof v2.0\x1b[0m. A long story") from error.__context__
            except ValueError as cause:
                raise torch.onnx.errors.OnnxExporterError("Failed. \x1b[96mThis is step 1/3\x1b[0m") from cause

    monkeypatch.setattr(torch.onnx, "export", fail)
    student = save_tiny("student", **DISTILBERT)
    capfd.readouterr()
    run("--teacher_id", save_tiny("teacher"), "--student_id", student, "--length", 8, "--onnx")
    output = capfd.readouterr()
    note = f"note: {student} is not measured in ONNX Runtime: No decomposition of v2.0 (ValueError)\n"
    assert note in output.out and "graph()" not in output.err and "\x1b[31m" not in output.out + output.err
    names = [row["name"] for row in json.loads(output.out.splitlines()[-1])["models"]]
    assert [names.count(name) for name in (names[0], student)] == [3, 1]
    assert not Path(student, "onnx").exists()


def test_what_the_exporter_itself_refuses_is_one_sentence(run, save_tiny, capfd):
    """A GPT-2 returns its cache, and Longformer's graph depends on its input: so says the export, at length."""
    gpt2 = save_tiny("gpt2", "gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0)
    longformer = save_tiny("longformer", "longformer", attention_window=8, max_position_embeddings=66)
    capfd.readouterr()
    run("--student_id", f"{gpt2},{longformer}", "--length", 8, "--onnx")
    output = capfd.readouterr()
    notes = [line.partition("ONNX Runtime: ")[2] for line in output.out.splitlines() if line.startswith("note: ")]
    assert [note.split()[0] for note in notes] == ["Found", "Could"]
    assert all(len(note) < 200 and re.search(r" \(\w+\)$", note) for note in notes), notes
    assert "\x1b[9" not in output.out + output.err and "def forward" not in output.err


def test_onnx_files_appear_only_when_complete(fails, save_tiny, monkeypatch):
    """On a disk that gets full meanwhile the earlier files stay, and nothing lies about."""
    model = Path(save_tiny("model"))
    (model / "onnx").mkdir()
    for file in bench.ONNX_FILES.values():
        (model / "onnx" / file).write_text("earlier")
    before = sorted(model.rglob("*"))

    def fill(source, target, **options):
        Path(target).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnxruntime.quantization, "quantize_dynamic", fill)
    assert "No space left" in fails("--student_id", model, "--length", 8, "--onnx")
    assert sorted(model.rglob("*")) == before
    assert {(model / "onnx" / file).read_text() for file in bench.ONNX_FILES.values()} == {"earlier"}


def test_onnx_ends_with_a_line(fails, save_tiny, monkeypatch):
    model = save_tiny("model")
    flags = ["--student_id", model, "--length", 8, "--onnx"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "pip install onnx onnxscript onnxruntime" in fails(*flags)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "choose_device", lambda: torch.device("cuda"))
        patch.setattr(distill, "multiplies_bf16", lambda device: True)
        assert "--device cpu" in fails(*flags, "--device", "auto")
    open_session = bench.open_session
    monkeypatch.setattr(bench, "open_session", lambda *a: lambda **inputs: open_session(*a)(**inputs) + 0.01)
    assert "logits differ by 0.01" in fails(*flags)
    assert not Path("bench.json").exists() and not Path(model, "onnx").exists()


# Errors


def test_errors_are_one_line_and_exit_code_2(fails, save_tiny, reviews_folder, write_csv, tmp_path, monkeypatch):
    model = save_tiny("model")
    small = ["--teacher_id", model, "--length", 8]
    assert "no model, or one twice" in fails("--length", 8)
    assert "nowhere" in fails(*small, "--student_id", tmp_path / "nowhere")
    assert "no model, or one twice" in fails(*small, "--student_id", model)
    other = save_tiny("other", classes=("sport", "politics"))
    assert "the classes sport, politics, not negative, positive" in fails(*small, "--student_id", other)
    three = save_tiny("three", classes=("a", "b", "c"))
    assert "the classes a, b, c" in fails(*small, "--student_id", three, "--dataset_id", reviews_folder)
    config = Path(other, "config.json")
    config.write_text(config.read_text().replace('"1": "politics"', '"2": "politics"'))
    assert "id2label" in fails(*small, "--student_id", other)
    assert "64 tokens at most" in fails("--teacher_id", model, "--length", 65)
    for length in ("2", "x", "real"):
        assert "--length: from 3, or real with --dataset_id" in fails("--teacher_id", model, "--length", length)
    assert "at least 1" in fails(*small, "--batch_size", 0)
    scored = [*small, "--dataset_id", reviews_folder]
    pair = [*scored, "--student_id", save_tiny("student")]
    assert "needs a teacher and another" in fails(*pair, "--calibration_split", "validation")
    assert "needs a teacher and another" in fails(*scored, "--calibration_split", "test")
    assert "--predictions needs" in fails("--dataset_id", reviews_folder, *pair[-2:], "--predictions", "all.jsonl")
    assert "instead of --teacher_id" in fails(*pair, "--teacher_column", "answer")
    assert "instead of --teacher_id" in fails("--student_id", model, "--teacher_column", "answer")
    assert "split 'nowhere'" in fails(*pair, "--calibration_split", "nowhere")
    write_csv("pairs.csv", [["one", "two"]] * 9, ("sentence1", "sentence2"))
    assert "has no column 'text', only sentence1" in fails(*pair, "--calibration_split", "pairs.csv")
    assert "cannot write" in fails(*pair, "--predictions", tmp_path / "nowhere" / "all.jsonl")
    assert "cannot write" in fails(*small, "--output", tmp_path / "nowhere" / "bench.json")
    assert "cannot write" in fails(*small, "--output", tmp_path)
    assert "fp32, bf16, fp16" in fails(*small, "--precision", "fp32,int8")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy", None)
        assert "pip install scipy" in fails(*scored)
    monkeypatch.setattr(distill, "multiplies_bf16", lambda device: False)
    assert "this cpu does not compute in bf16" in fails(*small, "--precision", "fp32,bf16")
    assert "this cpu does not compute in : try" in fails(*small, "--precision", "fp32,")
    assert "File name too long" in fails(*small, "--dataset_id", "x" * 300)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in fails(*small, "--device", "cuda")
    assert not Path("bench.json").exists()


def test_ctrl_c_ends_with_a_line(run, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupt)
    with pytest.raises(SystemExit) as exit:
        run("--student_id", "model")
    assert exit.value.code == 130 and capsys.readouterr().err.endswith("interrupted: no figures are kept\n")
