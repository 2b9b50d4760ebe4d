"""The benchmark: its sums against known values, its clock against known times, its runs from end to end."""

import errno
import io
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime.quantization
import pytest
import torch
from hub_standin import HubStandin
from transformers import AutoTokenizer, DistilBertForSequenceClassification

import bench
import data
import distill
from data import UserError

ROOT = Path(__file__).parent.parent


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
    [model] = bench.load_models(bench_args(save_tiny("model", num_hidden_layers=3)), None)
    assert model.figures == {"parameters": embeddings + rest, "without_embeddings": rest}


def test_peak_memory_is_a_models_own(monkeypatch):
    """Of 60 MB on the GPU 20 are this model's weights, and its two calls add 3 and 7."""
    peaks, seen = iter([63_000_000, 67_000_000]), [99_000_000]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.clear)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 60_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(seen))
    network = lambda **inputs: seen.append(next(peaks))  # noqa: E731
    variant = bench.Variant("model", None, [0, 1], network, figures={"megabytes": 20.0})
    assert bench.peak_megabytes(variant, [{}, {}]) == pytest.approx(27)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_peak_memory_on_a_gpu(save_tiny):
    args = bench_args(save_tiny("model"), "--student_id", save_tiny("other"))
    device = torch.device("cuda")
    variant, _ = [bench.in_pytorch(model, "fp32", None, device, args) for model in bench.load_models(args, None)]
    small, large = [
        bench.peak_megabytes(variant, [{"input_ids": torch.ones(size, 32, dtype=torch.long, device="cuda")}])
        for size in (1, 256)
    ]
    assert variant.figures["megabytes"] < small < large
    assert small < 2 * variant.figures["megabytes"]  # the other model is not in it


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


@pytest.mark.parametrize("size", [10**15, None])
def test_out_of_memory_ends_one_model_alone(size):
    def call(model, batch):
        if model == "large" and size is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if model == "large":
            torch.empty(size)

    times = clock(call, ["large", "small"], [0, 1])
    assert list(times) == ["small"]
    assert bench.describe(times.get("large")) == {"error": "out of memory"}


def test_other_errors_are_not_taken_for_out_of_memory():
    with pytest.raises(RuntimeError, match="must match"):
        clock(lambda model, batch: torch.ones(2) + torch.ones(3))


def test_percentiles():
    timing = bench.describe([second / 1000 for second in range(1, 102)])
    assert timing == pytest.approx(
        {"calls": 101, "p25_ms": 26, "p50_ms": 51, "p75_ms": 76, "p90_ms": 91, "p99_ms": 100}
    )
    assert "p99_ms" not in bench.describe([0.001] * 99) and "p90_ms" not in bench.describe([0.001] * 9)


def test_six_layers_take_about_three_times_as_long_as_two(save_tiny, tokenizer):
    shape = {"hidden_size": 128, "intermediate_size": 512}
    # Calls of 1 and 3 ms: longer ones a busy machine would interrupt, and the more of them the longer they are.
    inputs = tokenizer(["a " * 64], truncation=True, max_length=64, return_tensors="pt")
    models = {}
    for layers in (2, 6):
        models[layers], _ = data.load_model(save_tiny(f"layers{layers}", num_hidden_layers=layers, **shape))
    times = clock(lambda layers, batch: models[layers](**batch), models, [inputs], min_run_time=0.5)
    assert 1.5 < min(times[6]) / min(times[2]) < 5  # of which no busy machine has interrupted at least one


# Texts


def test_texts_have_exactly_the_length_asked_for(save_tiny, tokenizer):
    [columns] = bench.text_batches(None, 4, 17)
    assert tokenizer(*columns, truncation=True, max_length=17, return_tensors="pt")["input_ids"].shape == (4, 17)


def test_real_texts_are_the_same_whatever_the_batch_size(reviews_folder):
    split = data.load_splits(reviews_folder)[0]["eval"]
    ones, eights = [bench.text_batches(split, size, "real") for size in (1, 8)]
    assert [len(columns[0]) for columns in eights] == [8] * (53 // 8)
    flat = [[text for [column] in batches for text in column] for batches in (ones, eights)]
    assert flat[0][: len(flat[1])] == flat[1]
    assert sorted(flat[0]) == sorted(split.texts["text"])
    with pytest.raises(UserError, match="only 53 examples"):
        bench.text_batches(split, 64, "real")


def test_a_single_file_is_scored_on_the_tenth_that_distill_held_out(run, write_csv, reviews, save_tiny, monkeypatch):
    path, load_splits, held_out = write_csv("reviews.csv", reviews[:100]), data.load_splits, []

    def recording_load_splits(*args):
        splits, class_names = load_splits(*args)
        held_out.append(splits["eval"].texts[:])
        return splits, class_names

    monkeypatch.setattr(data, "load_splits", recording_load_splits)
    models = ["--teacher_id", save_tiny("teacher"), "--student_id", save_tiny("student"), "--dataset_id", path]
    with distill.process_group(torch.device("cpu")):
        distill.read_task(distill.parse_args([*models, "--seed", "7"]))
    run(*models, "--batch_sizes", "1", "--lengths", "8", "--precision", "fp32")
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
    assert bench.compare(teacher, teacher, labels)["mcnemar_p"] == 1


# Tables


def test_model_card_gets_the_table_once(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Model\n")
    bench.put_into_card("one", card)
    assert card.read_text() == "# Model\n\n<!-- bench -->\none\n<!-- /bench -->\n"
    card.write_text(card.read_text() + "\nMore.\n")
    bench.put_into_card("two \\1", card)
    assert card.read_text() == "# Model\n\n<!-- bench -->\ntwo \\1\n<!-- /bench -->\n\nMore.\n"
    card.write_text("<!-- bench --> was never closed\n")
    bench.put_into_card("three", card)
    assert "was never closed" in card.read_text() and "three" in card.read_text()


def test_a_card_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("mine/a student", "mine/reviews", "teacher"):
        Path(folder).mkdir(parents=True)
    flags = ["--teacher_id=org/model", "--student_id", f"./teacher,{tmp_path}/mine/a student", "--model_card", "."]
    args = distill.parse_args([*flags, "--dataset_id", f"{tmp_path}/mine/reviews"], bench.Config)
    assert bench.public_names(args) == {
        "org/model": "org/model",
        "./teacher": "teacher",
        f"{tmp_path}/mine/a student": "a student",
        f"{tmp_path}/mine/reviews": "reviews",
        ".": tmp_path.name,
        "bench.json": "bench.json",
    }
    row = {"name": f"{tmp_path}/mine/a student", "precision": "fp32", "runtime": "PyTorch", "model": {}}
    command = shlex.join(["python", "bench.py", *flags, "--dataset_id", args.dataset_id, "--output=bench.json"])
    conditions = {"device": "cpu", "versions": {}, "load_average": 0.5, "command": command}
    text = bench.report([{**row, "name": "org/model"}, row], [row], conditions, args)
    short = f"--teacher_id=org/model --student_id 'teacher,a student' --model_card {tmp_path.name} --dataset_id reviews"
    assert f"`python bench.py {short} --output=bench.json`" in text
    assert "| a student |" in text and "split of reviews," in text and str(tmp_path) not in text


def test_models_in_folders_of_the_same_name_are_told_apart(tmp_path):
    folders = [tmp_path / run / "student" for run in ("alpha=0.3", "alpha=0.5")]
    for folder in folders:
        folder.mkdir(parents=True)
    names = bench.public_names(bench_args(str(folders[0]), "--student_id", str(folders[1])))
    assert [names[str(folder)] for folder in folders] == ["alpha=0.3/student", "alpha=0.5/student"]


# Whole runs


def test_flags(run, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert bench.Config.__doc__.split(".")[0] in " ".join(capsys.readouterr().out.split())
    args = distill.parse_args(["--demo", "--batch_sizes", "2,3"], bench.Config, bench.DEMO)
    assert (args.teacher_id, args.student_id, args.batch_sizes) == ("./outputs/teacher", ["./outputs"], [2, 3])
    assert args.lengths == ["real", 16, 64, 128]
    assert bench_args("model", "--lengths", "8,9").lengths == [8, 9]


def test_a_terminal_that_lacks_the_dashes(run, save_tiny, reviews_folder, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run("--teacher_id", save_tiny("café"), "--dataset_id", reviews_folder, "--lengths", 8, "--batch_sizes", 1)
    terminal.flush()
    text = terminal.buffer.getvalue().decode("ascii")
    assert "caf\\xe9" in text and "\\u2013" in text


def test_run_over_two_students(run, save_tiny, reviews_folder, capsys, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(dynamic) or model)  # slow on a CPU
    monkeypatch.setattr(distill, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "test CPU"})
    teacher = save_tiny("teacher", num_hidden_layers=4)
    students = [
        save_tiny("bert", seed=3),
        save_tiny("distil", "distilbert", dim=32, n_layers=1, n_heads=2, hidden_dim=64),
    ]
    card = Path(teacher, "README.md")
    card.write_text("# Teacher\n")
    grid = ["--batch_sizes", "2,1", "--lengths", "real,8", "--precision", "fp32,bf16", "--compile"]
    models = ["--teacher_id", teacher, "--student_id", ",".join(students), "--dataset_id", reviews_folder]
    run(*models, *grid, "--eval_split", "test", "--model_card", teacher)

    *markdown, last = capsys.readouterr().out.splitlines()
    markdown = "\n".join(markdown)
    rows = json.loads(last)["models"]
    names = [teacher, *students]
    assert [row["name"] for row in rows] == names * 4  # two precisions, compiled or not
    assert compiled == [True] * 6
    assert [" ".join(line.split()).strip("| ") for line in markdown.splitlines() if line.startswith("| model")] == [
        "model | precision | parameters | without embeddings | MB | p50 ms | speed-up | accuracy (95%)"
        " | macro-F1 | agreement | alone right | p",
        "model | precision | batch | tokens | p50 ms | p90 ms | calls | examples/s | speed-up"
        " | tokenizer p50 ms | both p50 ms",
    ]
    for stated in ("batch 2, real lengths", "test CPU (cpu), 1 CPU threads, load average ", torch.__version__):
        assert stated in markdown
    assert card.read_text() == f"# Teacher\n\n<!-- bench -->\n{markdown}\n<!-- /bench -->\n"
    assert str(tmp_path) not in markdown and "only teacher in fp32, PyTorch got right" in markdown

    results = json.loads(Path("bench.json").read_text())
    assert results["models"] == rows and len(results["cells"]) == 4 * 4 * 3
    for cell in results["cells"]:
        assert cell["model"]["calls"] >= bench.MIN_CALLS and 0 < cell["model"]["p25_ms"] <= cell["model"]["p75_ms"]
        assert ("tokenizer" in cell and "both" in cell) == (cell["length"] == "real")
        [reference] = [
            other
            for other in results["cells"]
            if (other["name"], other["precision"], other["runtime"]) == (teacher, "fp32", "PyTorch")
            and all(other[key] == cell[key] for key in ("batch_size", "length"))
        ]
        assert cell["speed_up"] == pytest.approx(reference["model"]["p50_ms"] / cell["model"]["p50_ms"])
        assert cell["examples_per_second"] == pytest.approx(1000 * cell["batch_size"] / cell["model"]["p50_ms"])
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
    grid = ["--lengths", 8, "--batch_sizes", 1]
    run("--teacher_id", teacher, "--student_id", student, "--dataset_id", reviews_folder, *grid)
    teacher, student = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    assert student["agreement"] == 0
    assert student["accuracy"] == pytest.approx(1 - teacher["accuracy"])


def test_without_a_teacher_the_first_student_is_what_others_are_compared_with(run, save_tiny, reviews_folder, capsys):
    students = [save_tiny(name, seed=seed) for seed, name in enumerate(("one", "two"))]
    run("--student_id", ",".join(students), "--dataset_id", reviews_folder, "--lengths", 8, "--batch_sizes", 1)
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    one, two = json.loads(last)["models"]
    assert (one["name"], one["agreement"], one["speed_up"], one["alone_right"]) == (students[0], 1, 1, 0)
    assert two["agreement"] < 1 and two["speed_up"] == one["model"]["p50_ms"] / two["model"]["p50_ms"]
    assert "teacher" not in text
    assert "answers equal to those of one in fp32, PyTorch" in text


def swap_classes(source, folder):
    """A copy of a model of two classes that names its outputs the other way round."""
    folder = shutil.copytree(source, folder)
    config = json.loads(Path(folder, "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "positive", "1": "negative"}, {"positive": 0, "negative": 1}
    Path(folder, "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_cell_out_of_memory_says_so_and_the_rest_goes_on(run, save_tiny, monkeypatch, capsys):
    forward, threads = DistilBertForSequenceClassification.forward, set()

    def tight(self, input_ids, **inputs):
        threads.add(torch.get_num_threads())
        if input_ids.numel() > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(DistilBertForSequenceClassification, "forward", tight)
    student = save_tiny("student", "distilbert", dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    models = ["--teacher_id", save_tiny("teacher"), "--student_id", student]
    run(*models, "--lengths", "8,32", "--batch_sizes", 1, "--threads", 2)
    assert threads == {2}
    output = capsys.readouterr().out
    assert [line.split(" | ")[4] for line in output.splitlines() if "out of memory" in line] == ["out of memory"]
    assert len(json.loads(Path("bench.json").read_text())["cells"]) == 4


def test_hub_models_without_a_data_set(save_tiny, tmp_path):
    """The command itself: models from a Hub, no data set, and generic class names on one side."""
    for name, classes in (("teacher", ("LABEL_0", "LABEL_1")), ("student", ("negative", "positive"))):
        shutil.copytree(save_tiny(name, classes=classes), tmp_path / "hub" / "models" / "org" / name)
    command = f"{sys.executable} {ROOT}/bench.py --teacher_id org/teacher --student_id org/student --device cpu"
    command += " --lengths 8 --batch_sizes 1 --threads 1 --min_run_time 0.001 --onnx"
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
    [model] = bench.load_models(bench_args(folder), None)
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
    [model] = bench.load_models(args, None)
    assert model.figures["without_embeddings"] < 0.03 * model.figures["parameters"]
    bench.export(model, tmp_path, args)
    fp32, int8 = [(tmp_path / "onnx" / file).stat().st_size for file in bench.ONNX_FILES.values()]
    assert fp32 > 4 * model.figures["parameters"]
    assert int8 < 0.35 * fp32


def bench_args(model, *more):
    return distill.parse_args(["--teacher_id", model, "--lengths", "8", "--threads", "1", *more], bench.Config)


def test_onnx_rows(run, save_tiny, reviews_folder, capsys, tmp_path):
    """One student's classes stand in the other order: the file keeps it, the scores do not see it."""
    teacher = save_tiny("teacher", classes=("negative", "positive"))
    student = swap_classes(teacher, "swapped")
    data_set = ["--dataset_id", reviews_folder, "--lengths", "real,8", "--batch_sizes", "1,3"]
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
    assert results["versions"]["onnxruntime"] in output and len(results["cells"]) == 4 * 6
    rows = {(row["name"], row["precision"], row["runtime"]): row for row in results["models"]}
    for name in (teacher, student):
        eager, fp32, int8 = [
            rows[name, *kind] for kind in (("fp32", "PyTorch"), ("fp32", "ONNX Runtime"), ("int8", "ONNX Runtime"))
        ]
        for key in ("accuracy", "macro_f1", "agreement"):
            assert fp32[key] == eager[key]
        assert fp32["loss"] == pytest.approx(eager["loss"], rel=1e-4)
        assert 0.7 < int8["agreement_with_fp32"] <= 1 and f" {int8['agreement_with_fp32']:.3f} |" in output
        assert "agreement_with_fp32" not in fp32
        for row, file in ((fp32, "model.onnx"), (int8, "model_quantized.onnx")):
            assert row["megabytes"] == (folders[name] / file).stat().st_size / 1e6
        teacher_p50 = rows[teacher, "fp32", "PyTorch"]["model"]["p50_ms"]
        assert int8["speed_up"] == pytest.approx(teacher_p50 / int8["model"]["p50_ms"])
    texts = bench.encode(data.load_model(teacher)[1], [["a fine film", "dull"]], 64)
    ours, theirs = [bench.open_session(folder / "model.onnx", 1)(**texts) for folder in folders.values()]
    torch.testing.assert_close(ours, theirs)  # the student is a copy of the teacher that names its outputs otherwise


def test_a_model_that_cannot_be_exported_loses_its_rows_alone(run, save_tiny, monkeypatch, capsys):
    export = torch.onnx.export

    def fail(network, **options):
        if network.config.model_type == "distilbert":
            raise torch.onnx.errors.OnnxExporterError("no such operator\nand a long story")
        return export(network, **options)

    monkeypatch.setattr(torch.onnx, "export", fail)
    student = save_tiny("student", **DISTILBERT)
    run("--teacher_id", save_tiny("teacher"), "--student_id", student, "--lengths", 8, "--batch_sizes", 1, "--onnx")
    output = capsys.readouterr().out
    assert f"note: {student} is not measured in ONNX Runtime: no such operator and a long story" in output
    names = [row["name"] for row in json.loads(output.splitlines()[-1])["models"]]
    assert [names.count(name) for name in (names[0], student)] == [3, 1]
    assert not Path(student, "onnx").exists()


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
    assert "No space left" in fails("--student_id", model, "--lengths", 8, "--batch_sizes", 1, "--onnx")
    assert sorted(model.rglob("*")) == before
    assert {(model / "onnx" / file).read_text() for file in bench.ONNX_FILES.values()} == {"earlier"}


def test_onnx_ends_with_a_line(fails, save_tiny, monkeypatch):
    model = save_tiny("model")
    flags = ["--student_id", model, "--lengths", 8, "--batch_sizes", 1, "--onnx"]
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


def test_errors_are_one_line_and_exit_code_2(fails, save_tiny, reviews_folder, tmp_path, monkeypatch):
    model = save_tiny("model")
    small = ["--teacher_id", model, "--lengths", 8, "--batch_sizes", 1]
    assert "no model is named" in fails("--lengths", 8)
    assert "nowhere" in fails(*small, "--student_id", tmp_path / "nowhere")
    assert "named twice" in fails(*small, "--student_id", model)
    other = save_tiny("other", classes=("sport", "politics"))
    assert "the classes sport, politics, not negative, positive" in fails(*small, "--student_id", other)
    three = save_tiny("three", classes=("a", "b", "c"))
    assert "the classes a, b, c" in fails(*small, "--student_id", three, "--dataset_id", reviews_folder)
    config = Path(other, "config.json")
    config.write_text(config.read_text().replace('"1": "politics"', '"2": "politics"'))
    assert "id2label" in fails(*small, "--student_id", other)
    assert "64 tokens at most" in fails(*small, "--lengths", "8,65")
    assert "numbers from 3" in fails(*small, "--lengths", "8,2")
    assert "data set" in fails(*small, "--lengths", "real")
    assert "only 53 examples" in fails(*small, "--dataset_id", reviews_folder, "--lengths", "real", "--batch_sizes", 54)
    assert "README.md" in fails(*small, "--model_card", tmp_path)
    assert "cannot write" in fails(*small, "--output", tmp_path / "nowhere" / "bench.json")
    assert "cannot write" in fails(*small, "--output", tmp_path)
    assert "fp32, bf16, fp16" in fails(*small, "--precision", "fp32,int8")
    assert "--batch_sizes" in fails(*small, "--batch_sizes", "1,x")
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
