"""The command line, the training loop and what a run leaves behind: in process where that is enough, else for real."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import pty
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import weakref
from pathlib import Path

import datasets
import huggingface_hub
import packaging.requirements
import pytest
import safetensors.torch
import torch
import tqdm
import transformers
from hub_standin import TOKEN, HubStandin
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_way import DistillationTrainer

import data
import distill
from data import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def weights(folder):
    tensors = safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))
    # transformers 5.3 gives LayerNorm its TensorFlow names when it saves a model that it has loaded.
    new_names = {name: name.replace("LayerNorm.gamma", "LayerNorm.weight") for name in tensors}
    return {new_names[name].replace("LayerNorm.beta", "LayerNorm.bias"): tensors[name] for name in tensors}


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def nearly_same_weights(one, other):
    """Equal but for rounding. Softmax ignores a key's bias: its gradient is nothing but rounding, blown up by Adam."""
    one, other = weights(one), weights(other)
    return all(torch.allclose(one[name], other[name], atol=3e-4) for name in one if not name.endswith("key.bias"))


def results(folder):
    return json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))


def metrics(folder):
    """The rows of metrics.jsonl, without their speed."""
    rows = map(json.loads, Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if name != "examples_per_second"} for row in rows]


@pytest.fixture
def command(save_tiny, reviews_folder, tmp_path):
    """command(output, flag=value, ...): the arguments of a small run, 3 epochs of 7 steps, in fp32."""
    teacher = save_tiny("teacher", seed=1, num_hidden_layers=3, hidden_size=48)
    student = save_tiny("student", seed=2)

    def arguments(output, **flags):
        flags = {
            "teacher_id": teacher,
            "student_id": student,
            "dataset_id": reviews_folder,
            "test_split": "test",
            "batch_size": 16,
            "epochs": 3,
            "learning_rate": 1e-3,
            "precision": "fp32",
            **flags,
            "output_dir": str(tmp_path / output),
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    return arguments


def output_of(arguments):
    return arguments[arguments.index("--output_dir") + 1]


def run(arguments):
    """Run in this process; returns the output folder."""
    distill.main(arguments)
    return output_of(arguments)


def refused(arguments, capsys):
    """Run, expect exit code 2, and return the one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        distill.main(arguments)
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "error: " in line
    return line


# Importing torch and transformers takes seconds. Here one process does so once, and each process of a test is its fork.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT}/tests"  # Python 3.11 does not give it sys.path


def child(code, arguments, files, environment):
    """What a process of start() does: `code`, and then the command."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell has it ignored
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    sys.argv = ["distill.py", *arguments]
    torch.set_num_threads(1)
    exec(f"import os, signal, sys, time\nimport torch\nimport distill\n{code}\ndistill.main(sys.argv[1:])", {})


def start(arguments, code="", ranks=None, interrupt_at=None, by=signal.SIGINT, patience=30, files=None, **environment):
    """Run the command in a process of its own, or in several that form a group; `code` comes first.

    As torchrun does, end the other ranks where one fails, though `patience` seconds later. With interrupt_at all get
    the signal `by` when they have printed this text. Returns the exit codes, and what was written to stdout and stderr.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        free.close()
        files = files or [f"{folder}/out", f"{folder}/err"]
        processes = []
        for rank in range(ranks or 1):
            its = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
            process = FORKSERVER.Process(target=child, args=(code, arguments, files, {**its, **environment}))
            processes.append(process)
            process.start()
        deadline = time.monotonic() + 200
        while any(process.is_alive() for process in processes):
            if interrupt_at and os.path.exists(files[0]) and interrupt_at in Path(files[0]).read_text():
                interrupt_at = None
                for process in processes:
                    os.kill(process.pid, by)
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + patience)
            if time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        codes = [process.exitcode for process in processes]
        if not os.path.exists(files[0]) or not os.path.isfile(files[0]):
            return types.SimpleNamespace(codes=codes)
        out, err = [Path(file).read_text() for file in files]
        return types.SimpleNamespace(codes=codes, out=out, err=err)


def start_anew(words, cwd=ROOT, **environment):
    """Run `python WORDS`, which imports all itself; returns the CompletedProcess."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def packages_needed(names):
    """Of the installed packages these, and all that they need: what pip would install."""
    seen, todo = set(), [(name, ()) for name in names]
    while todo:
        name, extras = wanted = todo.pop()
        if wanted not in seen:
            seen.add(wanted)
            package = importlib.metadata.distribution(name)
            yield package
            for needed in map(packaging.requirements.Requirement, package.requires or ()):
                marker = needed.marker
                if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                    todo.append((needed.name, tuple(needed.extras)))


def start_bare(words, folder, packages=("torch", "transformers", "datasets", "tqdm")):
    """start_anew() with these packages and what they need, linked into the folder: no others can be imported.

    The folder must be called site-packages: code from elsewhere, dill pickles by value.
    """
    for package in packages_needed(packages):
        for name in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            link = folder / name
            if not link.exists():
                folder.mkdir(exist_ok=True)
                link.symlink_to(package.locate_file(name))
    return start_anew(["-S", *words], PYTHONPATH=str(folder))  # without site-packages


DIE = """
def at_call(name, owner, number, before=lambda *args: None, counts=lambda *args: True, by=signal.SIGKILL):
    # Get the signal at the number-th call of owner.name for which counts() holds, after before().
    function, calls = getattr(owner, name), []
    def wrapper(*args, **flags):
        calls.extend([1] * counts(*args))
        if counts(*args) and len(calls) == number:
            before(*args)
            sys.stdout.flush()
            os.kill(os.getpid(), by)
        return function(*args, **flags)
    setattr(owner, name, wrapper)

def is_label(path):
    return path.parent.name == "teacher_logits"

def of_student(path):
    return path.name == "checkpoint.pt" and path.parent.name != "teacher"

def half_a_file(state, file):
    torch.serialization.save(state, file)
    file.flush()
    os.truncate(file.name, os.path.getsize(file.name) // 2)

"""


@pytest.fixture
def more_text(tmp_path, reviews):
    """A text file of 60 sentences that are in no split."""
    path = tmp_path / "more.txt"
    path.write_text("".join(f"{text}\n" for text, _ in reviews[200:260]), encoding="utf-8")
    return str(path)


# --- command line ----------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_recipe(monkeypatch):
    monkeypatch.delenv("SM_MODEL_DIR", raising=False)
    args = distill.parse_args([])
    assert args.teacher_id == "textattack/bert-base-uncased-SST-2"
    assert args.student_id == "google/bert_uncased_L-2_H-128_A-2"
    assert (args.dataset_id, args.dataset_config) == ("nyu-mll/glue", "sst2")
    assert (args.epochs, args.batch_size, args.learning_rate, args.seed) == (7, 128, 6e-5, 33)
    assert (args.alpha, args.temperature, args.cache_teacher, args.demo) == (0.5, None, True, False)  # 4, see settle()
    assert args.output_dir == args.checkpoint_dir == "outputs"
    assert distill.parse_args(["--dataset_id", "imdb"]).dataset_config is None


def test_booleans_as_sagemaker_passes_them():
    assert distill.parse_args(["--demo"]).demo is True
    assert distill.parse_args(["--demo", "--cache_teacher", "False"]).cache_teacher is False
    assert distill.parse_args(["--cache_teacher", "TRUE", "--demo", "false"]).demo is False


def test_demo_flags_can_be_overridden():
    args = distill.parse_args(["--demo", "--epochs", "1", "--alpha", "0"])
    assert (args.dataset_id, args.student_id, args.student_layers) == ("demo", "teacher", 2)
    assert (args.epochs, args.alpha, args.test_split) == (1, 0.0, "test")
    args = distill.parse_args(["--demo", "--dataset_id", "my.csv"])  # which has no split of the demo's
    assert (args.dataset_id, args.test_split, args.teacher_epochs) == ("my.csv", None, 2)
    assert distill.parse_args(["--demo", "--teacher_id", "mine/", "--teacher_epochs", "0"]).teacher_id == "mine/"


def test_sagemaker_folders(monkeypatch):
    monkeypatch.setenv("SM_MODEL_DIR", "/opt/ml/model")
    args = distill.Config()
    assert (args.output_dir, args.checkpoint_dir) == ("/opt/ml/model", "/opt/ml/checkpoints")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temparature", "4"], "unrecognized arguments: --temparature"),
        (["--alpha", "1.5"], "--alpha: must be at most 1"),
        (["--alpha", "nan"], "--alpha: must be at least 0"),
        (["--temperature", "0"], "--temperature: must be above 0"),
        (["--temperature", "inf"], "--temperature: must be"),
        (["--epochs", "0"], "--epochs: must be at least 1"),
        (["--epochs", "2.5"], "--epochs: invalid int value"),
        (["--precision", "int8"], "--precision: invalid choice"),
        (["--demo", "maybe"], "--demo: must be true or false"),
        (["--learn", "1"], "unrecognized arguments"),
        (["--unlabeled_split", "test"], "--unlabeled_split needs --unlabeled_id"),
        (["--hub_private"], "--hub_private needs --hub_model_id"),
        (["--teacher_learning_rate", "1e-3"], "--teacher_learning_rate needs --teacher_epochs"),
        (["--unlabeled_id", "more.txt", "--alpha", "1"], "leaves out the teacher"),
        (["--n_trials", "2", "--cache_teacher", "false"], "leave out --cache_teacher"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        distill.parse_args(arguments)
    line = capsys.readouterr().err
    assert error.value.code == 2 and message in line and line.count("\n") == 1


def test_readme_names_no_flag_and_no_figure_that_is_not_there(capsys):
    import bench  # not at the top: it takes a while, and only this test asks for it
    import sm_launch

    configs = (distill.Config, bench.Config, sm_launch.Launch)
    flags = {field.name for config in configs for field in dataclasses.fields(config)}
    readme = Path(ROOT, "README.md").read_text(encoding="utf-8")
    others = {"help", "nproc_per_node", "table", "folder", "seeds", "words"}  # argparse's, torchrun's, bench_quality's
    assert set(re.findall(r"--(\w+)", readme.split("## The loss")[1])) <= flags | others
    measured = "".join(Path(ROOT, "tests", f"{name}.md").read_text(encoding="utf-8") for name in ("quality", "speed"))
    measured = re.sub(" +", " ", measured)  # a table's columns are padded
    tables = (("## What the teacher brings", "| task | ", 5, 1), ("## How fast", "| models", 4, 0))
    for chapter, title, rows, first in tables:
        table = [line for line in readme.split(chapter)[1].split("\n## ")[0].splitlines() if line.startswith("|")]
        assert table[0].startswith(title) and len(table) == 2 + rows
        for cell in (cell.strip() for row in table[2:] for cell in row.strip("|").split("|")[first:]):
            assert f" {cell} |" in measured or f" {cell}: " in measured, cell
    for title in ("The demo", "SST-2, README's rows", "54 classes (Debian), README's rows"):  # alone at 99%
        table = measured.split(f"## {title}\n")[1].split("### Answered alone")[1].splitlines()
        shares = [round(float(row.split(" | ")[3].partition(" ± ")[0])) for row in table[4:7]]
        assert "{}, {} and {}%".format(*shares) in readme


# --- the teacher and its labels --------------------------------------------------------------------------------------


def test_attention_gets_a_mask_that_it_need_not_convert(save_tiny, monkeypatch):
    """Boolean, of four dimensions, and shared by an example's rows."""
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def recording_attention(query, *args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attention(query, *args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording_attention)
    model, _ = data.load_model(save_tiny("model"))
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.arange(5) < torch.tensor([[3], [5]]),
    }
    with torch.no_grad():
        distill.forward(model, inputs)
    assert [mask.dtype for mask in masks] == [torch.bool] * 2
    assert masks[0].data_ptr() == masks[1].data_ptr() == inputs["attention_mask"].data_ptr() and masks[0].stride(2) == 0
    assert torch.equal(masks[0][:, 0, 0], inputs["attention_mask"])


def test_macro_f1():
    # F1 of classes 0, 1, 2, 4 by hand: 4/5, 2/5, 0, 0. Class 3 occurs nowhere and does not count.
    answers, labels = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 0, 4, 1])
    for its, f1 in ((answers, (4 / 5 + 2 / 5 + 0 + 0) / 4), (labels, 1)):
        logits = torch.nn.functional.one_hot(its, 6).float()
        assert distill.score(logits, labels)["macro_f1"] == pytest.approx(f1, rel=1e-12)


def test_classes_that_a_student_seldom_answers():
    def scores(**recalls):
        return {"eval": {name: {"precision": r or None, "recall": r, "count": 9} for name, r in recalls.items()}}

    by_class = {"train": {"a": 9, "b": 9, "c": 7500}, "teacher": scores(a=0.8, b=0.8, c=0.0)}
    by_class["student"] = scores(a=0.4, b=0.3, c=0.0)
    assert distill.seldom_answered(by_class) == ["b (9 training examples)", "c (7,500 training examples)"]


def test_a_teacher_in_another_order_gives_the_same_student(command, save_tiny):
    """Labels move, by name: flip teacher's and student's classes, and nothing may change but the student's order."""
    plain = run(command("plain", teacher_id=save_tiny("t1", seed=7)))
    teacher = flip_head(save_tiny("t2", seed=7, classes=("POSITIVE", "Negative")))
    student = flip_head(save_tiny("s2", seed=2, classes=("positive", "negative")))
    other = run(command("other", teacher_id=teacher, student_id=student))
    one, two = results(plain), results(other)
    assert one["teacher"]["eval_accuracy"] == two["teacher"]["eval_accuracy"]
    assert (one["classes"], two["classes"]) == (["negative", "positive"], ["positive", "negative"])
    assert nearly_same_weights(plain, flip_head(other))


def flip_head(folder):
    flipped = weights(folder)
    for name in ("classifier.weight", "classifier.bias"):
        flipped[name] = flipped[name].flip(0).contiguous()
    safetensors.torch.save_file(flipped, f"{folder}/model.safetensors", {"format": "pt"})
    return folder


def test_generic_class_names_are_said_and_others_refused(command, save_tiny, capsys):
    run(command("generic", teacher_id=save_tiny("t1", classes=("LABEL_0", "LABEL_1")), epochs=1))
    said = "assumed to be in the same order: LABEL_0, LABEL_1 and the classes negative, positive"
    assert said in capsys.readouterr().out
    line = refused(command("other", teacher_id=save_tiny("t2", classes=("sport", "arts"))), capsys)
    assert "(sport, arts)" in line and "(negative, positive)" in line
    more = run(command("more", teacher_id=save_tiny("t3", classes=("negative", "neutral", "positive")), epochs=1))
    assert results(more)["classes"] == ["negative", "neutral", "positive"]  # of which the data have two


def test_cached_and_live_teacher_give_the_same_run(command):
    cached = run(command("cached"))
    live = run(command("live", cache_teacher="false"))
    assert [len(os.listdir(f"{folder}/teacher_logits")) for folder in (cached, live)] == [3, 2]  # eval and test alone
    assert nearly_same_weights(cached, live)
    start = command("x")[command("x").index("--student_id") + 1]
    assert not nearly_same_weights(cached, start)  # there was something to learn
    assert not nearly_same_weights(cached, run(command("hotter", temperature=2.0)))  # and the comparison would see it


@pytest.fixture
def labeled(monkeypatch):
    """The numbers of examples that the teacher labels, a list that grows."""
    predict, counts = distill.predict, []

    def watched_predict(model, tokens, *others):
        if model.config.hidden_size == 48:
            counts.append(len(tokens))
        return predict(model, tokens, *others)

    monkeypatch.setattr(distill, "predict", watched_predict)
    return counts


def test_labels_are_made_in_parts_and_found_again(command, save_tiny, more_text, labeled, monkeypatch, capsys):
    monkeypatch.setattr(distill, "PART", 16)
    other = save_tiny("other", seed=9, hidden_size=48)

    def count(**flags):
        labeled.clear()
        capsys.readouterr()
        run(command("run", epochs=1, **flags))
        assert all(size <= 16 for size in labeled)
        return sum(labeled), capsys.readouterr().out

    assert count()[0] == 101 + 53 + 29
    first = len(os.listdir(f"{output_of(command('run'))}/teacher_logits"))
    assert first == 7 + 4 + 2
    asked, said = count(alpha=0.1)
    assert asked == 0 and "teacher's labels for train: 101 of 101 found in" in said
    asked, said = count(unlabeled_id=more_text)
    assert asked == 161 - 96 and "96 of 161 found" in said  # the six whole parts before the new text
    for flags in ({"max_length": 12}, {"precision": "bf16"}, {"teacher_id": other}):
        asked, said = count(**flags)
        assert asked == 183 and "found" not in said, flags
    assert count()[0] == 0  # all have a file of their own


def test_a_killed_labeling_goes_on(command, labeled, monkeypatch):
    arguments, parts = command("killed", epochs=1), "distill.PART = 16\n"
    killed = start(arguments, parts + DIE + 'at_call("write", distill, 4, counts=lambda _, path: is_label(path))')
    assert killed.codes == [-signal.SIGKILL]
    assert len(os.listdir(f"{output_of(arguments)}/teacher_logits")) == 3
    monkeypatch.setattr(distill, "PART", 16)
    run(arguments)
    assert sum(labeled) == 183 - 3 * 16
    whole = run(command("whole", epochs=1))
    assert same_weights(whole, output_of(arguments)) and sum(labeled) == 183 - 3 * 16 + 183


def test_alpha_1_asks_the_teacher_for_no_training_label(command, labeled):
    folder = run(command("control", alpha=1.0, epochs=1))
    assert labeled == [53, 29]
    assert results(folder)["student"]["eval_agreement"] > 0


def test_a_cased_student_gets_its_own_tokens(command, save_tiny, tokenizer, write_csv, reviews):
    titles = [(text.title(), ("negative", "positive")[label]) for text, label in reviews[:154]]
    write_csv("reviews/train.csv", titles[:101])
    write_csv("reviews/validation.csv", titles[101:])
    cased = transformers.BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False)
    student = save_tiny("cased", tokenizer=cased)
    cached = run(command("cached", student_id=student))
    live = run(command("live", student_id=student, cache_teacher="false"))
    assert nearly_same_weights(cached, live)


def test_a_distilbert_student_of_a_bert_teacher_on_pairs(command, save_tiny, write_csv, reviews):
    """Sentence pairs have token types; BERT takes them, DistilBERT does not."""
    rows = [(a[0], b[0], int(a[1] == b[1])) for a, b in zip(reviews[:60], reviews[60:120], strict=True)]
    student = save_tiny("student2", "distilbert", dim=32, n_layers=2, n_heads=2, hidden_dim=64, classes=("0", "1"))
    flags = {
        "dataset_id": write_csv("pairs.csv", rows, ("sentence1", "sentence2", "label")),
        "train_split": "train[:40]",
        "eval_split": "train[40:]",
        "test_split": "train[40:50]",
        "max_length": 40,
    }
    folder = run(command("pairs", **flags, teacher_id=save_tiny("t", classes=("0", "1")), student_id=student))
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "distilbert"


def test_a_useless_teacher_is_warned_about(command, save_tiny, capsys):
    folder = save_tiny("useless")
    constant = weights(folder)
    constant["classifier.weight"].zero_()
    constant["classifier.bias"] = torch.tensor([1.0, 0.0])
    safetensors.torch.save_file(constant, f"{folder}/model.safetensors", {"format": "pt"})
    saved = results(run(command("run", teacher_id=folder)))
    said = capsys.readouterr().out
    assert "warning: the teacher is no better than that (not fine-tuned? see --teacher_epochs)" in said
    assert saved["student"]["eval_accuracy"] > saved["teacher"]["eval_accuracy"]  # and an able one is not blamed:
    able = {"eval": distill.Examples(None, torch.tensor([0, 1, 1]), torch.eye(2)[[0, 1, 1]])}
    distill.report_teacher({"eval_accuracy": 0.9}, able, ["negative", "positive"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{}, {"alpha": 1.0}, {"cache_teacher": "false"}])
def test_a_teacher_whose_outputs_are_in_another_order_is_warned_about(command, save_tiny, write_csv, capsys, flags):
    """LABEL_0 and LABEL_1 are taken in the order of the data's classes; the labels show that they are not."""
    words = {"good ": "positive", "bad ": "negative"}
    write_csv("reviews/train.csv", [(word * (i % 9 + 1), words[word]) for i in range(30) for word in words])
    write_csv("reviews/validation.csv", [(word * 10, words[word]) for word in words])
    made = {"student_id": save_tiny("new", seed=5), "alpha": 1.0, "epochs": 9, "test_split": "validation"}
    teacher = run(command("made", **made))
    tensors = weights(teacher)
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name].flip(0)
    safetensors.torch.save_file(tensors, f"{teacher}/model.safetensors", {"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(teacher)
    config.id2label, config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    config.save_pretrained(teacher)
    capsys.readouterr()
    run(command("run", teacher_id=teacher, test_split="validation", **flags))
    said = capsys.readouterr().out
    assert "assumed to be in the same order: LABEL_0, LABEL_1 and the classes negative, positive" in said
    assert "of the answers agree with the labels; in the order positive, negative, 100% would" in said


def test_a_damaged_teacher_labels_nothing(command, save_tiny, capsys):
    folder = save_tiny("damaged")
    damaged = weights(folder)
    damaged["classifier.weight"][0, 0] = math.nan
    safetensors.torch.save_file(damaged, f"{folder}/model.safetensors", {"format": "pt"})
    for alpha in (0.5, 1.0):
        arguments = command("run", teacher_id=folder, alpha=alpha)
        assert "the teacher's answers are not finite: its weights are damaged" in refused(arguments, capsys)
        assert os.listdir(output_of(arguments)) == []


def test_a_sound_teacher_that_overflows_in_fp16_is_not_called_damaged(command, save_tiny, capsys):
    folder = save_tiny("large")
    large = weights(folder)
    large["classifier.weight"] *= 1e7  # beyond fp16's 65,504, not beyond the others
    safetensors.torch.save_file(large, f"{folder}/model.safetensors", {"format": "pt"})
    line = refused(command("fp16", teacher_id=folder, precision="fp16"), capsys)
    assert "are not finite: try --precision fp32 or bf16" in line
    run(command("fp32", teacher_id=folder, epochs=1))


def test_a_teacher_is_fine_tuned_first_and_found_again(command, more_text, capsys):
    flags = {"teacher_epochs": 2, "teacher_learning_rate": 1e-3, "student_id": "teacher", "student_layers": 1}
    folder = run(command("run", **flags, epochs=1, learning_rate=1e-12))
    teacher, student = weights(f"{folder}/teacher"), weights(folder)
    shared = [name for name in student if "layer.0" in name or "embeddings" in name]
    assert len(shared) > 15 and not any("layer.1." in name for name in student)
    last = {name: name.replace("layer.0", "layer.2") for name in shared}  # of the teacher's three
    assert all(torch.allclose(student[name], teacher[last[name]], atol=1e-6) for name in shared)
    original = weights(command("x")[1])
    assert not torch.allclose(teacher["classifier.weight"], original["classifier.weight"], atol=1e-4)

    def again(**others):
        run(command("run", **{**flags, "epochs": 1, **others}))
        assert all(torch.equal(teacher[name], tensor) for name, tensor in weights(f"{folder}/teacher").items())
        return f"it has been already, in {folder}/teacher" in capsys.readouterr().out

    assert again(alpha=0.2) and again(temperature=2.0) and again(student_layers=2)
    assert again(unlabeled_id=more_text)  # a teacher learns from labeled text alone
    # Another teacher's training is begun in the same folder and diverges: the first is no longer there to be found.
    refused(command("run", **{**flags, "teacher_learning_rate": 1e30}, epochs=1), capsys)
    assert not again()


def test_a_teacher_in_a_folder_of_that_name(command, tmp_path, monkeypatch):
    """ "teacher" is also the word by which --student_id means the teacher."""
    flags = {"teacher_epochs": 1, "epochs": 1, "student_layers": 2}
    by_path = run(command("path", **flags, student_id=tmp_path / "teacher"))
    monkeypatch.chdir(tmp_path)
    by_name = run(command("name", **flags, teacher_id="teacher", student_id=tmp_path / "teacher"))
    assert same_weights(f"{by_path}/teacher", f"{by_name}/teacher") and same_weights(by_path, by_name)


def test_what_is_wrong_with_the_student_is_told_before_its_teacher_is_trained(command, monkeypatch, capsys):
    monkeypatch.setattr(distill, "fine_tune_teacher", None)
    for flags, message in (
        ({"student_id": "./nowhere"}, "no such folder: ./nowhere"),
        ({"student_layers": 3}, "2 layers"),
        ({"student_id": "teacher", "student_layers": 4}, "3 layers"),
        ({"test_split": "tset"}, "Unknown split 'tset'"),
        ({"unlabeled_id": "nofile.txt"}, "no such file or folder: nofile.txt"),
    ):
        assert message in refused(command("run", **flags, teacher_epochs=1), capsys)


def test_the_teachers_memory_is_freed_before_the_student_trains(command, monkeypatch):
    teachers, alive = [], []
    predict, step = distill.predict, distill.training_step

    def watched_predict(model, *args):
        teachers.append(weakref.ref(model))
        return predict(model, *args)

    def watched_step(*args):
        alive.append(teachers[0]() is not None)
        return step(*args)

    monkeypatch.setattr(distill, "predict", watched_predict)
    monkeypatch.setattr(distill, "training_step", watched_step)
    run(command("run", epochs=1))
    assert len(alive) == 7 and not any(alive)


# --- the training loop -----------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts how often the host reads a value back, for which it would have to wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device(command, monkeypatch):
    step, reads = distill.training_step, HostReads()

    def watched_step(*args):
        with reads:
            return step(*args)

    monkeypatch.setattr(distill, "training_step", watched_step)
    run(command("run", epochs=1))
    assert reads.count == 0
    with reads:
        torch.ones(1).item()
    assert reads.count == 1  # the counter counts


def test_learning_rate():
    args = distill.parse_args(["--learning_rate", "1", "--warmup_ratio", "0.2"])
    assert [distill.learning_rate_at(step, 10, args) for step in range(10)] == [
        0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8,
    ]  # fmt: skip
    args.warmup_ratio = 0.0
    assert distill.learning_rate_at(0, 10, args) == 1.0 and distill.learning_rate_at(9, 10, args) == pytest.approx(0.1)


def test_half_precision_trains(command):
    gently = {"epochs": 1, "learning_rate": 1e-4}
    exact = run(command("exact", **gently))
    for precision in ("bf16", "fp16"):
        half = run(command(precision, **gently, precision=precision))
        one, other = weights(exact), weights(half)
        assert {tensor.dtype for tensor in other.values()} == {torch.float32}
        assert 0 < max((one[name] - other[name]).abs().max().item() for name in one) < 0.05
        assert metrics(exact)[-1]["eval_loss"] == pytest.approx(metrics(half)[-1]["eval_loss"], rel=0.02)


def test_compiled_trains_the_same(command, save_tiny, tmp_path, monkeypatch):
    """torch.compile for real, by the C++ compiler, whose code differs in rounding alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = {"student_id": save_tiny("one", num_hidden_layers=1), "epochs": 1, "learning_rate": 1e-4}
    plain = run(command("plain", **flags))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    compiled = run(command("compiled", **flags, compile="true"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # the check before the start, and the student
    assert nearly_same_weights(plain, compiled) and not same_weights(plain, compiled)


def test_compile_without_a_compiler_is_told_before_the_work(command, tmp_path):
    words = [f"{ROOT}/distill.py", *command("run", compile="true")]  # torch looks at CXX when it is imported
    told = start_anew(words, CXX="no-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr
    assert "error: --compile does not work on this machine: " in told.stderr
    # A line of torch 2.9's own beside it.
    assert re.sub(r"\[Gloo\] .*\n", "", told.stdout) == "on cpu, in fp32, processes: 1\n"


def test_gradients_are_unscaled_before_they_are_clipped(command, monkeypatch):
    """In fp16 the scaler multiplies the loss by 65,536; the norm that is clipped must be that of the true gradient."""
    clip, norms = torch.nn.utils.clip_grad_norm_, {"fp32": [], "fp16": []}

    def recording_clip(*args):
        norms[precision].append(clip(*args).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip)
    for precision in norms:
        run(command(precision, precision=precision, epochs=1, learning_rate=1e-5))
    pairs = [(true, half) for true, half in zip(*norms.values(), strict=True) if math.isfinite(half)]
    assert len(pairs) >= 3  # the first steps overflow, until the scaler has found a smaller scale
    for true, half in pairs:
        assert half == pytest.approx(true, rel=0.1)


def test_a_loss_that_is_not_finite_stops_the_run(command, capsys, monkeypatch):
    step, calls = distill.training_step, []

    def poisoned_step(student, *args):
        calls.append(1)
        if len(calls) == 10:  # in the second epoch
            with torch.no_grad():
                next(student.parameters()).mul_(float("nan"))
        return step(student, *args)

    arguments = command("run", log_steps=1, save_minutes=0)
    with monkeypatch.context() as patched:
        patched.setattr(distill, "training_step", poisoned_step)
        assert refused(arguments, capsys).endswith("error: the loss is not finite: lower the learning rate\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as before the run
    state = torch.load(f"{output_of(arguments)}/checkpoint.pt", weights_only=True)
    assert state["step"] == 9 and all(tensor.isfinite().all() for tensor in state["model"].values())

    def printed(arguments):
        run(arguments)
        return re.findall(r"epoch [23]/3: loss .*", capsys.readouterr().out)

    # And it can be continued: in the middle of the second epoch, whose mean loss is printed.
    undisturbed = command("undisturbed", log_steps=1)
    assert printed(arguments) == printed(undisturbed) != []
    assert same_weights(output_of(arguments), output_of(undisturbed))


def test_one_skipped_fp16_step_does_not_stop_the_run(command, monkeypatch):
    step, calls, changed = distill.training_step, [], []

    def overflowing_step(student, optimizer, scaler, *others):
        calls.append(1)
        if len(calls) == 3:
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
        before = [parameter.clone() for parameter in student.parameters()]
        losses = step(student, optimizer, scaler, *others)
        changed.append(not all(map(torch.equal, before, student.parameters())))
        return losses

    monkeypatch.setattr(distill, "training_step", overflowing_step)
    folder = run(command("run", precision="fp16", epochs=8))
    assert not changed[2] and changed[-1]
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_the_best_epoch_is_kept_by_what_was_asked_for(command, monkeypatch):
    """Three epochs, each the best by something else; and among equals the lowest loss decides."""
    scores = [
        {"accuracy": 0.7, "macro_f1": 0.6, "loss": 0.9},
        {"accuracy": 0.6, "macro_f1": 0.7, "loss": 0.8},
        {"accuracy": 0.7, "macro_f1": 0.5, "loss": 0.8},
        {"accuracy": 0.5, "macro_f1": 0.6, "loss": 0.7},
    ]
    for best_by, epoch in (("accuracy", 3), ("macro_f1", 2), ("loss", 4)):
        given, models = iter([*scores, {"accuracy": 0.0}, {"accuracy": 0.0}]), []

        def evaluate(model, *args, given=given, models=models):
            models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"macro_f1": 0, "loss": 0, **next(given)}

        monkeypatch.setattr(distill, "evaluate", evaluate)
        kept = weights(run(command(best_by, best_by=best_by, epochs=4)))
        assert [all(torch.equal(kept[name], model[name]) for name in kept) for model in models[:4]] == [
            number == epoch for number in (1, 2, 3, 4)
        ], best_by


def test_fifty_steps_are_the_trainers(command, tmp_path, tokenizer, write_csv, reviews, monkeypatch):
    """The published Trainer subclass, on the same batches in the same order, ends at the same weights."""
    write_csv("reviews/train.csv", [(text, ("negative", "positive")[label]) for text, label in reviews[:160]])
    arguments = command("ours", cache_teacher="false", epochs=5, learning_rate=5e-5, seed=7)
    monkeypatch.setattr(distill, "finish", lambda *args: None)  # it would delete the checkpoint
    state = torch.load(f"{run(arguments)}/checkpoint.pt", weights_only=True)
    assert state["step"] == 50
    ours = state["model"]

    examples = [{**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in reviews[:160]]
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batches = [rows.tolist() for epoch in range(5) for rows in data.training_batches(lengths, 16, 7, epoch)]
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    teacher, student = [
        transformers.AutoModelForSequenceClassification.from_pretrained(options[name])
        for name in ("--teacher_id", "--student_id")
    ]
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        alpha=0.5,
        temperature=4.0,
        args=transformers.TrainingArguments(
            str(tmp_path / "trainer"), max_steps=50, learning_rate=5e-5, report_to="none", use_cpu=True
        ),
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        examples, batch_sampler=batches, collate_fn=collate
    )
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer.train()
    theirs = student.state_dict()
    # Softmax ignores a key's bias: its gradient is nothing but rounding, blown up by Adam.
    names = [name for name in theirs if not name.endswith("key.bias")]
    assert max((ours[name] - theirs[name]).abs().max().item() for name in names) < 1e-5
    assert max((ours[name] - before[name]).abs().max().item() for name in names) > 1e-3


# --- what a run says -------------------------------------------------------------------------------------------------


class Hasty(tqdm.tqdm):
    """tqdm with a twentieth of a second for a minute."""

    def __init__(self, **options):
        super().__init__(**{name: 0.05 if value == 60 else value for name, value in options.items()})


def test_without_a_terminal_a_line_a_minute_says_where_the_run_is(command, monkeypatch, capfd):
    forward = distill.forward
    monkeypatch.setattr(distill, "tqdm", Hasty)
    monkeypatch.setattr(distill, "PREDICTION_TOKENS", {"cpu": 128})
    monkeypatch.setattr(distill, "forward", lambda *args: time.sleep(0.02) or forward(*args))
    run(command("run", epochs=2, log_steps=1))
    out, err = capfd.readouterr()
    assert err == "" and not re.search(r"[\r\x1b\x08]", out)
    rate = r"[ \d.]+ examples/s"
    for stage, more in (("epoch 1/2", r", loss=\d\.\d{4}"), ("teacher labels train", "")):
        lines = re.findall(rf"^{stage}: (\d+) of 101 examples{more}, {rate}$", out, re.MULTILINE)
        done = [int(count) for count in lines]
        assert len(set(done)) >= 2 and done == sorted(done) and done[0] > 0 and done[-1] <= 101, out


def test_on_a_terminal_the_bar_stays_alone(command):
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    shown, slow = (
        [],
        "step = distill.training_step\ndistill.training_step = lambda *args: time.sleep(0.1) or step(*args)",
    )

    def watch():
        with contextlib.suppress(OSError):  # when the terminal is closed
            while True:
                shown.append(os.read(controller, 100_000))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert start(command("run", epochs=1), slow, files=[os.ttyname(terminal)] * 2).codes == [0]
    os.close(terminal)
    watcher.join()
    os.close(controller)
    shown = b"".join(shown).decode()
    assert re.search(r"\repoch 1/1: +\d+%\|.*\| \d+/101 \[", shown)
    assert "of 101 examples" not in shown


def test_a_run_leaves_what_the_design_says(command, capfd, reviews):
    old_umask = os.umask(0o027)
    try:
        folder = run(command("run", report_to="tensorboard", log_steps=3))
    finally:
        os.umask(old_umask)
    out, err = capfd.readouterr()
    assert not re.search(r"[\r\x1b]", out + err), "control characters in a file"
    assert err == "" and "examples/s" not in out  # it took less than a minute
    assert re.sub(r"\[Gloo\] .*\n", "", out).startswith("on cpu, in fp32, processes: 1\n")  # torch 2.9's own line
    headline = json.loads(out.splitlines()[-1])
    saved = results(folder)
    assert headline == {name: saved[name] for name in ("teacher", "student", "seconds")}
    assert saved["seconds"].keys() == {"labeling", "training"}
    for who in ("teacher", "student"):
        assert {"parameters", "eval_accuracy", "test_accuracy"} <= saved[who].keys()
    assert {"eval_agreement", "test_agreement", "eval_macro_f1", "test_macro_f1"} <= saved["student"].keys()
    assert saved["arguments"]["alpha"] == 0.5 and saved["versions"]["torch"] == torch.__version__
    assert saved["examples"] == {"train": 101, "eval": 53, "test": 29, "unlabeled": 0} and saved["search"] == []
    by_class = saved["by_class"]["student"]["test"]
    assert list(by_class) == ["negative", "positive"] and sum(its["count"] for its in by_class.values()) == 29
    found = sum((its["recall"] or 0) * its["count"] for its in by_class.values())
    assert found / 29 == pytest.approx(saved["student"]["test_accuracy"])

    rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl", encoding="utf-8")]
    assert [(row["step"], row["epoch"]) for row in rows] == [
        (3, 1), (6, 1), (7, 1), (9, 2), (12, 2), (14, 2), (15, 3), (18, 3), (21, 3),
    ]  # fmt: skip
    names = {"step", "epoch", "loss", "hard_loss", "soft_loss", "learning_rate", "examples_per_second"}
    scores = {"epoch_loss", "eval_accuracy", "eval_macro_f1", "eval_loss", "eval_agreement"}
    assert [set(row) for row in rows] == [names | (scores if row["step"] % 7 == 0 else set()) for row in rows]
    assert rows[-1]["loss"] < rows[0]["loss"]
    ends = [row for row in rows if "eval_loss" in row]
    steps = zip(ends, (3, 2, 1), (3, 3, 3), (1, 2, 3), strict=True)  # of each epoch's rows
    for end, *counts in steps:
        losses = [row["loss"] for row in rows if row["epoch"] == end["epoch"]]
        mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / 7
        assert end["epoch_loss"] == pytest.approx(mean, rel=1e-6)
        assert f"epoch {end['epoch']}/3: loss {mean:.4f}; eval accuracy {end['eval_accuracy']:.4f}, " in out
    best = max(ends, key=lambda row: (row["eval_accuracy"], -row["eval_loss"]))
    assert saved["student"]["eval_accuracy"] == best["eval_accuracy"]
    assert saved["student"]["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)

    assert not os.path.exists(f"{folder}/checkpoint.pt") and os.listdir(f"{folder}/runs")
    assert not [name for name in os.listdir(folder) if "tmp" in name or name.startswith(".")]
    written = [f"{folder}/{name}" for name in os.listdir(folder) if name not in ("runs", "teacher_logits")]
    written += [f"{folder}/teacher_logits/{name}" for name in os.listdir(f"{folder}/teacher_logits")]
    assert {stat.S_IMODE(os.stat(file).st_mode) for file in written} == {0o640}  # as the umask says
    classify = transformers.pipeline("text-classification", folder)
    answers = classify([text for text, _ in reviews[154:183]], truncation=True)
    right = [
        answer["label"] == ("negative", "positive")[label]
        for answer, (_, label) in zip(answers, reviews[154:183], strict=True)
    ]
    assert sum(right) / 29 == pytest.approx(saved["student"]["test_accuracy"])

    # Another student in its place: bench.py's export of the first one goes.
    os.mkdir(f"{folder}/onnx")
    Path(f"{folder}/onnx/model.onnx").touch()
    run(command("run", epochs=1))
    assert not os.path.exists(f"{folder}/onnx")


def test_model_card(command):
    folder = run(command("run", epochs=1))
    card, saved = huggingface_hub.ModelCard.load(f"{folder}/README.md"), results(folder)
    assert card.data.pipeline_tag == "text-classification" and card.data.library_name == "transformers"
    assert card.data.base_model is None and card.data.datasets is None  # a local folder is no id on the Hub,
    assert card.data.eval_results is None  # and scores need one; the table has them all the same
    assert distill.results_table(saved) in card.content
    args = distill.parse_args(["--demo", "--output_dir", folder])
    distill.write_model_card(args, saved)
    demo = huggingface_hub.ModelCard.load(f"{folder}/README.md").data
    assert demo.datasets == ["cornell-movie-review-data/rotten_tomatoes"]
    assert demo.eval_results is None  # its splits are not the Hub's
    assert data.hub_id("demo", "model") == demo.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.hub_id("google/bert_uncased_L-2_H-128_A-2", "model") == "google/bert_uncased_L-2_H-128_A-2"


def test_class_names_that_the_terminal_cannot_show(command, save_tiny, write_csv, reviews):
    rows = [(text, ("gut", "schön")[label]) for text, label in reviews[:60]]
    flags = {"dataset_id": write_csv("deutsch.csv", rows), "test_split": "train[:30]", "epochs": 1}
    teacher = save_tiny("deutsch", classes=("gut", "schön"))
    arguments = command("run", **flags, teacher_id=teacher, student_id="teacher")
    # The interpreter reads PYTHONIOENCODING when it starts; alone, a process needs no network either.
    script = f"{ROOT}/distill.py"
    finished = start_anew([script, *arguments], PYTHONIOENCODING="ascii", GLOO_SOCKET_IFNAME="eth9")
    assert finished.returncode == 0 and finished.stderr == "", finished.stderr
    assert "classes: gut, sch\\xf6n" in finished.stdout
    assert results(output_of(arguments))["classes"] == ["gut", "schön"]


@pytest.mark.parametrize("last", ["on cpu", "trial 1"])
def test_who_reads_the_output_may_leave(command, tmp_path, last):
    """As `| head` does: nothing on stderr, and the exit code that a shell gives to such a program."""
    out, err = str(tmp_path / "out"), str(tmp_path / "err")
    os.mkfifo(out)

    def read():
        with open(out) as file:
            next(line for line in file if last in line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    finished = start(command("run", n_trials=3), files=[out, err])
    reader.join()
    assert (finished.codes, Path(err).read_text()) == ([141], "")


def test_two_runs_in_a_notebook(command):
    """Its stdout is no file, and the process goes on."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        one, other = [run(command(output, epochs=1)) for output in ("one", "other")]
    assert same_weights(one, other) and json.loads(out.getvalue().splitlines()[-1])["student"]["model"] == other


def test_a_missing_package_is_named(command, monkeypatch, capsys):
    for module, flags, message in (
        ("tensorboard", {"report_to": "tensorboard"}, "pip install tensorboard"),
        ("optuna", {"n_trials": 2}, "pip install optuna"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            assert message in refused(command("run", **flags), capsys)


def test_data_errors_end_the_run_before_anything_is_written(command, capsys, write_csv):
    arguments = command(
        "run", dataset_id=write_csv("one.csv", [("a", 1), ("b", 1)]), eval_split="train", test_split="train"
    )
    assert "two classes" in refused(arguments, capsys)
    assert os.listdir(output_of(arguments)) == []


def test_the_output_does_not_overwrite_its_input(command, capsys):
    arguments = command("student", student_id=output_of(command("student")))
    assert "would be overwritten" in refused(arguments, capsys)
    folder = output_of(command("run"))
    shutil.copytree(command("run")[1], f"{folder}/teacher")
    assert "would be overwritten" in refused(command("run", teacher_id=f"{folder}/teacher", teacher_epochs=1), capsys)
    run(command("run", teacher_id=f"{folder}/teacher", epochs=1))  # writes no teacher


def test_a_folder_with_a_readme_of_its_own_is_left_alone(command, capsys):
    arguments = command("run")
    os.makedirs(output_of(arguments))
    for name in ("README.md", "config.json"):
        Path(output_of(arguments), name).write_text("mine")
        assert f"has a {name} that is not a run's: choose another --output_dir" in refused(arguments, capsys)
        assert os.listdir(output_of(arguments)) == [name]
        Path(output_of(arguments), name).unlink()


def test_another_student_in_the_folder_leaves_no_file_of_the_first(command, save_tiny, tokenizer):
    """Loading would read an added_tokens.json with the new student's vocabulary."""
    arguments = command("run", epochs=1)
    run(arguments)
    folder = Path(output_of(arguments))
    listing = folder / distill.MODEL_FILES
    for name, text in (("added_tokens.json", '{"[EXTRA]": 30522}'), ("notes.txt", "mine")):
        (folder / name).write_text(text)
    listing.write_text(json.dumps([*json.loads(listing.read_text()), "added_tokens.json"]))  # as if it had written it
    run(command("run", epochs=1, student_id=save_tiny("other", seed=3)))
    assert not (folder / "added_tokens.json").exists() and (folder / "notes.txt").read_text() == "mine"
    assert set(json.loads(listing.read_text())) <= set(os.listdir(folder))


def test_a_second_run_keeps_out_of_the_first_ones_folders(command, monkeypatch):
    train, others = distill.train, []

    def while_it_trains(*args):
        others.extend(start(words) for words in (arguments, command("other", checkpoint_dir=folder)))
        return train(*args)

    arguments = command("run", epochs=1)
    folder = output_of(arguments)
    with monkeypatch.context() as patched:
        patched.setattr(distill, "train", while_it_trains)
        run(arguments)
    line = f"distill.py: error: another run is writing in {folder}: wait, or choose another --output_dir\n"
    assert [(other.codes, other.err) for other in others] == [([2], line)] * 2
    run(arguments)  # the first one has let it go

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run(arguments)


# --- against a stand-in for the Hub, with the real clients ------------------------------------------------------------

GLUE_README = """---
configs:
- config_name: sst2
  data_files:
  - split: train
    path: sst2/train-*
  - split: validation
    path: sst2/validation-*
  - split: test
    path: sst2/test-*
---
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub/models").mkdir(parents=True)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with HubStandin(tmp_path / "hub") as hub:
        yield hub


def pushed_text(folder):
    return "".join(path.read_text(errors="replace") for path in folder.iterdir())


def test_the_published_command_line_and_a_push(hub, tmp_path, save_tiny, old_repository, reviews):
    """The published pair and GLUE's SST-2 in small, as their repositories are laid out."""
    save_tiny("hub/models/textattack/bert-base-uncased-SST-2", classes=("LABEL_0", "LABEL_1"))
    old_repository(str(tmp_path / "hub/models/google/bert_uncased_L-2_H-128_A-2"))
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "idx": datasets.Value("int32"),
        }
    )
    glue = tmp_path / "hub/datasets/nyu-mll/glue"
    for split, rows in (("train", reviews[:200]), ("validation", reviews[200:250]), ("test", reviews[250:270])):
        columns = {
            "sentence": [text for text, _ in rows],
            "label": [-1 if split == "test" else label for _, label in rows],  # as GLUE hides them
            "idx": list(range(len(rows))),
        }
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(glue / "sst2" / f"{split}-00000-of-00001.parquet")
    (glue / "README.md").write_text(GLUE_README)

    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": TOKEN}
    words = [f"{ROOT}/distill.py", "--hub_model_id", "me/tiny-sst2"]
    finished = start_anew(words, cwd=tmp_path, **environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "" and TOKEN not in finished.stdout
    saved = results(tmp_path / "outputs")
    assert saved["arguments"]["epochs"] == 7 and saved["examples"] == {"train": 200, "eval": 50, "unlabeled": 0}
    assert TOKEN not in json.dumps(saved)
    # It is the Hub's default whether a repository is public: an organization's may be private.
    assert not {"visibility", "private"} & hub.created["me/tiny-sst2"].keys()
    pushed = tmp_path / "hub/models/me/tiny-sst2"
    assert same_weights(pushed, tmp_path / "outputs")
    assert {"README.md", "config.json", "tokenizer.json", "metrics.jsonl"} <= set(os.listdir(pushed))
    assert not [name for name in os.listdir(pushed) if "logits" in name or "checkpoint" in name or "results" in name]
    assert TOKEN not in pushed_text(pushed) and str(tmp_path) not in pushed_text(pushed)
    card = huggingface_hub.ModelCard.load(pushed / "README.md").data
    assert card.base_model == "google/bert_uncased_L-2_H-128_A-2" and card.datasets == ["nyu-mll/glue"]
    [score] = card.eval_results
    assert (score.metric_type, score.metric_value) == ("accuracy", saved["student"]["eval_accuracy"])
    assert (score.dataset_type, score.dataset_config, score.dataset_split) == ("nyu-mll/glue", "sst2", "validation")

    hidden = start_anew([words[0], "--test_split", "test", "--output_dir", "third"], cwd=tmp_path, **environment)
    assert hidden.returncode == 2 and "hidden, as in GLUE's test splits" in hidden.stderr


@pytest.fixture
def pushing(hub, monkeypatch, tmp_path):
    """The stand-in, for runs in this process."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (("ENDPOINT", hub.url), ("HUGGINGFACE_CO_URL_TEMPLATE", files)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()  # it has read the proxies' settings
    return hub


def test_what_the_hub_refuses_is_told_before_the_work(command, pushing, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(distill, "read_task", None)

        def told(repository):
            line = refused(command("run", hub_model_id=repository), capsys)
            assert f"cannot create {repository} on the Hub" in line and TOKEN not in line
            return line

        assert "Repo id must" in told("not/a/repository")
        (pushing.folder / "models/me/old").mkdir(parents=True)
        pushing.refuse_push = True
        for repository in ("me/new", "me/old"):  # also where the repository is there already
            assert "rights" in told(repository)
        pushing.refuse_push = False
        patched.delenv("HF_TOKEN")
        for repository in ("me/new", "me/old"):
            told(repository)
    assert pushing.created == {}


def test_only_what_the_run_wrote_is_pushed(command, pushing, tmp_path, monkeypatch):
    arguments = command("here", hub_model_id="me/student", epochs=1)
    folder = Path(output_of(arguments))
    folder.mkdir()
    mine = ("customers.json", "notes.txt", "train.jsonl", "other.safetensors")
    for name in mine:
        (folder / name).write_text("mine")
    run(arguments)
    pushed = set(os.listdir(pushing.folder / "models/me/student"))
    assert {"README.md", "metrics.jsonl", "config.json", "model.safetensors", "tokenizer.json"} <= pushed
    assert not pushed & {*mine, "results.json"} and all((folder / name).read_text() == "mine" for name in mine)


def test_another_student_on_the_hub_leaves_no_file_of_the_first(command, pushing, save_tiny):
    repository = pushing.folder / "models/me/student"
    run(command("here", hub_model_id="me/student", epochs=1))
    listing = json.loads((repository / distill.MODEL_FILES).read_text())
    for name in ("added_tokens.json", "notes.txt"):
        (repository / name).write_text("{}")
    (repository / distill.MODEL_FILES).write_text(json.dumps([*listing, "added_tokens.json"]))  # as if pushed with them
    run(command("here", hub_model_id="me/student", epochs=1, student_id=save_tiny("other", seed=3)))
    assert not (repository / "added_tokens.json").exists() and (repository / "notes.txt").exists()
    assert {*listing, "README.md", "metrics.jsonl", distill.MODEL_FILES, "notes.txt"} == set(os.listdir(repository))


def test_what_was_said_of_the_model_on_the_hub_stays(command, pushing):
    repository = pushing.folder / "models/me/student"
    repository.mkdir(parents=True)
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- reviews\npipeline_tag: fill-mask\n---\nmine\n"
    (repository / "README.md").write_text(card)
    run(command("run", hub_model_id="me/student", epochs=1))
    its = huggingface_hub.ModelCard.load(repository / "README.md").data
    assert (its.license, its.language, its.tags) == ("apache-2.0", ["en"], ["reviews", "knowledge-distillation"])
    assert its.pipeline_tag == "text-classification"


def test_a_public_repository_is_not_taken_for_a_private_one(command, pushing, monkeypatch, capsys):
    (pushing.folder / "models/me/public").mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(distill, "read_task", None)
        line = refused(command("run", hub_model_id="me/public", hub_private="true"), capsys)
    assert "me/public exists and is public: make it private on the Hub" in line


def test_a_push_that_fails_need_not_train_again(command, pushing, tmp_path, capsys, monkeypatch):
    """The Hub takes the repository, of which only the name is given, and later refuses the commit."""
    arguments, card = command("run", hub_model_id="student", hub_private="true"), distill.write_model_card
    with monkeypatch.context() as patched:
        patched.setattr(distill, "write_model_card", lambda *args: card(*args) or setattr(pushing, "refuse_push", True))
        line = refused(arguments, capsys)
    folder = output_of(arguments)
    assert f"the student is safe in {folder}" in line and TOKEN not in line
    assert pushing.created["testuser/student"]["visibility"] == "private"
    pushing.refuse_push = False
    monkeypatch.setattr(distill, "training_step", None)
    assert same_weights(run(arguments), pushing.folder / "models/testuser/student")
    assert f"pushed to {pushing.url}/testuser/student\n" in capsys.readouterr().out
    assert str(tmp_path) not in pushed_text(pushing.folder / "models/testuser/student")
    assert not os.path.exists(f"{folder}/checkpoint.pt")


# --- continuing ------------------------------------------------------------------------------------------------------

# The teacher has 2 epochs of 7 steps, the student 3; each epoch has 4 rows, and checkpoints.
MOMENTS = {
    "fine-tuning the teacher": 'at_call("training_step", distill, 10)',
    "the teacher is finished": """import pathlib
at_call("unlink", pathlib.Path, 1, counts=lambda path, **_: path.name == "checkpoint.pt")""",
    "labeling": 'at_call("write", distill, 2, counts=lambda _, path: is_label(path))',
    "within an epoch": 'at_call("training_step", distill, 14 + 11)',
    "evaluating an epoch": 'at_call("evaluate", distill, 2 + 1 + 2)',
    "between a best epoch and its checkpoint": 'at_call("write", distill, 4, counts=lambda _, file: of_student(file))',
    "writing a checkpoint": 'at_call("save", torch, 13, half_a_file, counts=lambda value, _: isinstance(value, dict))',
    "after the last epoch": 'at_call("finish", distill, 2)',
}


EVERY_OTHER_STEP = {"log_steps": 2, "save_minutes": 0}


@pytest.fixture
def with_dropout(command, save_tiny):
    """Dropout makes the random state matter; the teacher is fine-tuned first, so that there are two trainings."""
    teacher = save_tiny("dropout", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    flags = {"teacher_id": teacher, "student_id": "teacher", "student_layers": 1, "teacher_epochs": 2}
    return lambda output: command(output, **flags, **EVERY_OTHER_STEP)


def test_killed_at_any_moment_and_started_again_ends_the_same(with_dropout, capsys):
    undisturbed, left = run(with_dropout("undisturbed")), []
    for moment, line in MOMENTS.items():
        arguments = with_dropout(moment.replace(" ", "_"))
        killed = start(arguments, DIE + line)
        assert killed.codes == [-signal.SIGKILL], (moment, killed.err)
        capsys.readouterr()
        folder = run(arguments)
        continued = "continuing at step " in capsys.readouterr().out
        assert continued == (moment not in ("labeling", "the teacher is finished")), moment
        assert not os.path.exists(f"{folder}/checkpoint.pt")
        left.extend([moment] * os.path.exists(f"{folder}/teacher/checkpoint.pt"))
        for part in (".", "teacher"):
            assert same_weights(f"{undisturbed}/{part}", f"{folder}/{part}"), moment
            assert metrics(f"{undisturbed}/{part}") == metrics(f"{folder}/{part}"), moment
    assert left == []  # a checkpoint of a finished teacher, in the way of another teacher's


def test_a_checkpoint_of_every_step_can_be_continued(command):
    """The last step of an epoch is the one that might fall between the epoch's two halves."""
    undisturbed = run(command("undisturbed", log_steps=1))
    arguments = command("killed", log_steps=1, save_minutes=0)
    assert start(arguments, DIE + 'at_call("evaluate", distill, 2)').codes == [-signal.SIGKILL]
    assert same_weights(undisturbed, run(arguments))


def test_a_run_that_goes_on_with_an_empty_folder_saves_its_best_student(command, tmp_path, capsys, monkeypatch):
    arguments = command("run", checkpoint_dir=tmp_path / "kept")
    with monkeypatch.context() as patched:
        patched.setattr(distill, "finish", lambda *args: distill.fail("stopped here"))
        assert "stopped here" in refused(arguments, capsys)
    os.rename(output_of(arguments), tmp_path / "before")
    assert same_weights(run(arguments), tmp_path / "before")


def test_the_seconds_of_training_count_the_last_save(command, monkeypatch):
    save = distill.save_model
    monkeypatch.setattr(distill, "save_model", lambda *args: time.sleep(2) or save(*args))
    assert results(run(command("run", epochs=1)))["seconds"]["training"] > 2


def test_checkpoints_that_cannot_be_continued(command, save_tiny, capsys, monkeypatch):
    monkeypatch.setattr(distill, "finish", lambda *args: distill.fail("stopped here"))
    refused(command("run"), capsys)
    for work in ("label_with_teacher", "fine_tune_teacher"):  # what is refused is refused before it
        monkeypatch.setattr(distill, work, None)
    path = f"{output_of(command('run'))}/checkpoint.pt"
    untouched = Path(path).read_bytes()
    for flags in ({}, {"teacher_epochs": 1}):
        line = refused(command("run", alpha=0.25, epochs=9, **flags), capsys)
        assert path in line and "alpha was 0.5, is 0.25" in line and "epochs was 3, is 9" in line
    assert Path(path).read_bytes() == untouched
    teacher = command("run")[1]
    save_tiny(os.path.basename(teacher), seed=99, num_hidden_layers=3, hidden_size=48)
    assert "digest of the teacher was" in refused(command("run"), capsys)
    for damaged in (untouched[: len(untouched) // 2], b"", b"no checkpoint"):
        Path(path).write_bytes(damaged)
        line = refused(command("run"), capsys)
        assert f"{path} is damaged" in line and "delete it" in line


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------

INTERRUPTED = "distill.py: interrupted: the same command continues from the last checkpoint\n"
# One rank dawdles: it is in Python when the signal comes, while the others wait for it in a collective operation.
DAWDLE = """
step, calls = distill.training_step, []
def dawdling_step(*args):
    calls.append(1)
    if len(calls) == 12 and os.environ.get("RANK", "0") == "DAWDLER":
        print("now", flush=True)
        time.sleep(20)
    return step(*args)
distill.training_step = dawdling_step
"""


def test_ctrl_c(command):
    undisturbed, arguments = run(command("undisturbed")), command("interrupted")
    stopped = start(arguments, DAWDLE.replace("DAWDLER", "0"), interrupt_at="now")
    assert stopped.codes == [130] and stopped.err == INTERRUPTED
    state = torch.load(f"{output_of(arguments)}/checkpoint.pt", weights_only=True)
    assert state["step"] == 7
    assert same_weights(undisturbed, run(arguments))


def test_ctrl_c_reaches_every_rank(command):
    undisturbed = command("undisturbed")
    assert start(undisturbed, ranks=2).codes == [0, 0]
    for rank in ("0", "1"):
        arguments = command(f"interrupted{rank}")
        stopped = start(arguments, DAWDLE.replace("DAWDLER", rank), ranks=2, interrupt_at="now")
        assert stopped.codes == [130, 130] and stopped.err == INTERRUPTED, (rank, stopped)
        assert start(arguments, ranks=2).codes == [0, 0]
        assert same_weights(output_of(undisturbed), output_of(arguments))


def test_sigterm_stops_a_single_process_at_the_next_step(command):
    """The next row may be half a minute away, longer than a container platform waits."""
    undisturbed, arguments = command("undisturbed", log_steps=100), command("stopped", log_steps=100)
    assert start(undisturbed).codes == [0]
    stopped = start(arguments, DIE + 'at_call("training_step", distill, 10, by=signal.SIGTERM)')
    assert stopped.codes == [143]
    assert stopped.err == "distill.py: stopped by SIGTERM at step 10: the same command continues there\n"
    again = start(arguments)
    assert again.codes == [0] and "continuing at step 10\n" in again.out
    assert same_weights(output_of(undisturbed), output_of(arguments))
    assert metrics(output_of(arguments))[-1]["epoch_loss"] == pytest.approx(
        metrics(output_of(undisturbed))[-1]["epoch_loss"]
    )


def test_sigterm_after_the_last_row_is_not_lost(command):
    """Else a job that is told to stop would go on to the student's training."""
    flags = {"teacher_epochs": 1, "epochs": 1}
    arguments = command("stopped", **flags)
    assert start(arguments, DIE + 'at_call("evaluate", distill, 1, by=signal.SIGTERM)').codes == [-signal.SIGTERM]
    assert not os.path.exists(f"{output_of(arguments)}/metrics.jsonl")
    again = start(arguments)
    assert again.codes == [0] and "continuing at step 7\n" in again.out
    assert same_weights(output_of(arguments), run(command("undisturbed", **flags)))


def test_a_second_sigterm_ends_the_run_at_once(command):
    arguments = command("twice")
    twice = 'at_call("training_step", distill, 3, by=signal.SIGTERM, before=lambda *_: os.kill(os.getpid(), 15))'
    assert start(arguments, DIE + twice).codes == [-signal.SIGTERM]
    assert not os.path.exists(f"{output_of(arguments)}/checkpoint.pt")


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size):
    """Let no file grow beyond it, as `ulimit -f` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


# File -> from which call of which function on the disk is full, and the size limit. The calls of write(): 3 for labels,
# 1 for an empty metrics.jsonl, 7 for checkpoints, 1 for results, 1 for the model card.
FULL_DISKS = {
    "teacher_logits/": (distill, "write", 2, 100),
    "metrics.jsonl": (distill.RunFiles, "add", 1, 10),
    "model.safetensors": (distill, "save_model", 2, 100_000),
    "checkpoint.pt": (distill, "write", 6, 100_000),
    "results.json": (distill, "write", 12, 100),
    "README.md": (distill, "write", 13, 100),
}


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(command, monkeypatch, capsys):
    undisturbed = run(command("undisturbed", log_steps=5))
    for file, (owner, name, number, size) in FULL_DISKS.items():
        function, calls = getattr(owner, name), []
        arguments = command(file.strip("/."), log_steps=5, save_minutes=0)
        folder = output_of(arguments)
        with contextlib.ExitStack() as limit, monkeypatch.context() as patched:

            def limiting(*args, function=function, calls=calls, number=number, size=size, limit=limit):
                calls.append(1)
                if len(calls) == number:
                    limit.enter_context(file_size_limit(size))
                return function(*args)

            patched.setattr(owner, name, limiting)
            line = refused(arguments, capsys)
        assert re.search(f"error: cannot write {folder}/{file}[^ ]*, fix that and repeat .*: File too large", line), (
            line
        )
        run(arguments)
        assert same_weights(folder, undisturbed), file
        assert metrics(folder) == metrics(undisturbed), file
        assert not [name for name in os.listdir(folder) if "tmp" in name or name.startswith(".")]


# --- several processes -----------------------------------------------------------------------------------------------


def test_a_full_disk_ends_every_rank_with_exit_code_2(command):
    finished = start(
        command("run"),
        """
import resource
save_model = distill.save_model
def save_on_full_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save_model(*args)
distill.save_model = save_on_full_disk
""",
        ranks=2,
    )
    assert finished.codes == [2, 2], finished.err
    assert finished.err.count("\n") == finished.err.count("error: cannot write") == 1


RECORD_GRADIENTS = """
distill.PART, step, clip = 32, distill.training_step, torch.nn.utils.clip_grad_norm_

def watched_step(*args):
    assert not getattr(args[0], "will_sync_module_buffers", bool)(), "DDP sends constants"
    return step(*args)

def recording_clip(*args):
    with open(distill.parse_args(sys.argv[1:]).output_dir + "/norms" + os.environ.get("RANK", "0"), "a") as file:
        print(clip(*args).item(), file=file)

distill.training_step, torch.nn.utils.clip_grad_norm_ = watched_step, recording_clip
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_train_like_one(command, ranks):
    one, several = command("one"), command("several")
    assert start(one, RECORD_GRADIENTS).codes == [0]
    finished = start(several, RECORD_GRADIENTS, ranks=ranks)
    assert finished.codes == [0] * ranks and "Warning" not in finished.err, finished.err
    assert len(re.findall("eval accuracy", finished.out)) == 1 + 3 + 1  # one rank speaks: teacher, epochs, table
    one, several = output_of(one), output_of(several)
    assert nearly_same_weights(one, several)
    assert results(several)["processes"] == ranks
    # Exactly the same evaluation: the same batches, each computed by one rank.
    assert results(one)["teacher"] == results(several)["teacher"]
    # Adam would hide a gradient of the wrong size, so compare the gradients too.
    norms = [[float(line) for line in open(f"{folder}/norms0")] for folder in (one, several)]
    assert len(norms[0]) == 21 and norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert {open(f"{several}/norms{rank}").read() for rank in range(1, ranks)} == {open(f"{several}/norms0").read()}
    losses = [[row["loss"] for row in metrics(folder)] for folder in (one, several)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_ranks_do_not_wait_for_parameters_that_are_not_reached(command, save_tiny):
    """BigBird's classifier leaves its pooler out."""
    flags = {"student_id": save_tiny("big_bird", "big_bird", attention_type="original_full"), "epochs": 1}
    one, two = command("one", **flags), command("two", **flags)
    for arguments, ranks in ((one, None), (two, 2)):
        finished = start(arguments, ranks=ranks)
        assert set(finished.codes) == {0}, finished.err
    assert nearly_same_weights(output_of(one), output_of(two))
    assert any("pooler" in name for name in weights(output_of(two)))


def test_torchrun(command):
    """The real command: too little work for each rank is one line, in which all ranks agree."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", f"{ROOT}/distill.py"]
    finished = start_anew([*words, *command("run", batch_size=1)])
    assert finished.returncode != 0 and '/distill.py", line' not in finished.stderr  # only torchrun's own traceback
    errors = [line for line in finished.stderr.splitlines() if "error: batches of 1 examples" in line]
    assert len(errors) == 1, finished.stderr
    assert "exitcode  : 2 " in finished.stderr, finished.stderr  # of the first; torchrun may end the other itself
    arguments = command("run", epochs=1)
    finished = start_anew([*words, *arguments])
    assert finished.returncode == 0 and results(output_of(arguments))["processes"] == 2


def test_torchrun_restarts_a_run_from_its_checkpoint(command, tmp_path):
    """The agent's store still has the addresses of the first group, of which a process is dead."""
    script = tmp_path / "killed_once.py"
    moment = 'if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":\n'
    moment += '    at_call("training_step", distill, 11)\n'
    script.write_text(f"import os, signal, sys\nimport torch\nimport distill\n{DIE}{moment}distill.main()")
    arguments, undisturbed = command("restarted", **EVERY_OTHER_STEP), command("undisturbed", **EVERY_OTHER_STEP)
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max_restarts=2", str(script)]
    finished = start_anew([*words, *arguments])
    assert finished.returncode == 0 and "continuing at step 10\n" in finished.stdout, finished.stderr
    assert start(undisturbed, ranks=2).codes == [0, 0]
    assert same_weights(output_of(undisturbed), output_of(arguments))


@pytest.mark.parametrize(("ranks", "codes"), [(None, [2]), (2, [1, 2])])
def test_out_of_memory_is_one_line(command, ranks, codes):
    """Late in an epoch, and on one rank alone: the other learns of it when its partner has gone."""
    late = DIE.replace("os.kill(os.getpid(), by)", "torch.empty(2**45)")  # which the CPU's allocator refuses
    late += 'if os.environ.get("RANK", "1") == "1":\n    at_call("training_step", distill, 13)'
    finished = start(command("run"), late, ranks=ranks)
    assert finished.codes == codes, finished.err
    assert "out of memory: lower --batch_size or --max_length\n" in finished.err
    assert ranks or finished.err.count("\n") == 1


def test_main_runs_in_a_thread(command):
    """As in a notebook's or a server's: signals can be handled in the main thread alone."""
    arguments = command("run", epochs=1)
    thread = threading.Thread(target=distill.main, args=(arguments,))
    thread.start()
    thread.join()
    assert "student" in results(output_of(arguments))


def test_a_search_in_a_job_of_one_replica(command):
    """Kubernetes sets RANK and WORLD_SIZE, but no LOCAL_WORLD_SIZE."""
    arguments = command("run", n_trials=1, epochs=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assert start(arguments, **job).codes == [0] and len(results(output_of(arguments))["search"]) == 1


def test_on_gpus_each_kind_of_tensor_has_its_backend(monkeypatch):
    """Rank 0's answers are CPU tensors, the gradients lie on the GPU."""
    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend=None, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0"}
    for name, value in {**group, "SM_NETWORK_INTERFACE_NAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with distill.process_group(torch.device("cuda")):
        pass
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    backends = torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend(asked[0] or "undefined"))
    assert backends.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_a_rank_without_its_group_is_one_line(command, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "the processes cannot form a group, start them by torchrun: " in refused(command("run"), capsys)


def test_too_few_gpus_are_told_before_any_process_connects(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 processes on this machine, but 1 GPUs: lower --nproc_per_node" in refused([], capsys)


@pytest.fixture
def chosen(monkeypatch):
    """chosen(gpus, name=value, ...): what choose_device() returns where torch sees so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made_current.append(device))
    made_current = []

    def choose(gpus, **environment):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name in ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        device = distill.choose_device()
        assert made_current.pop() == device
        return str(device)

    return choose


def test_a_process_takes_a_gpu_of_its_own(chosen):
    shared, node = {"TORCHELASTIC_RUN_ID": "none"}, {"LOCAL_WORLD_SIZE": "4"}
    assert chosen(1) == "cuda:0"
    assert chosen(4, LOCAL_RANK="3", **node, **shared) == "cuda:3"
    assert chosen(4, LOCAL_RANK="3", CUDA_VISIBLE_DEVICES="0,1,2,3", **node) == "cuda:3"
    # srun --gpus-per-task=1 or =2, or a wrapper under mpirun: others than its own are hidden from a process.
    assert chosen(1, LOCAL_RANK="3", CUDA_VISIBLE_DEVICES="0", **node) == "cuda:0"
    assert chosen(2, LOCAL_RANK="3", CUDA_VISIBLE_DEVICES="6,7", **node) == "cuda:1"
    assert chosen(1, LOCAL_RANK="3", CUDA_VISIBLE_DEVICES="GPU-8f2c") == "cuda:0"
    for one in ({}, {"CUDA_VISIBLE_DEVICES": "0"}):  # which torchrun's processes share
        with pytest.raises(UserError, match="4 processes on this machine, but 1 GPUs: lower --nproc_per_node"):
            chosen(1, LOCAL_RANK="0", **node, **shared, **one)


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(tmp_path, monkeypatch, capsys):
    def init():
        raise RuntimeError("the NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name, value in (("SM_NUM_GPUS", "1"), ("PATH", f"{tmp_path}:{os.environ['PATH']}")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            line = refused([], capsys)
            assert "torch cannot use this machine's GPU (with CUDA_VISIBLE_DEVICES= it takes the CPU): " in line
            assert "the NVIDIA driver on your system is too old" in line
            patched.setenv("CUDA_VISIBLE_DEVICES", "")
            assert distill.choose_device().type == "cpu"


WAIT_FOR_RANK_0 = """
import datetime
import torch.distributed as dist
init = dist.init_process_group
dist.init_process_group = lambda *args, **flags: init(*args, **flags, timeout=datetime.timedelta(seconds=2))
with distill.process_group(torch.device("cpu")):
    assert distill.from_rank0(lambda: time.sleep(4) or "downloaded", timeout=distill.DOWNLOADS) == "downloaded"
    print("waited", flush=True)
    distill.from_rank0(lambda: time.sleep(4))
"""


def test_only_downloads_are_waited_for_longer_than_torch_does():
    finished = start([], WAIT_FOR_RANK_0, ranks=2)
    assert finished.codes == [1, 1] and finished.out.count("waited") == 2, finished.err
    assert "imed out" in finished.err  # Gloo: "Timed out waiting 2000ms for recv operation to complete"


def test_two_ranks_continue_where_one_was_killed(command, save_tiny):
    flags = {"teacher_id": save_tiny("dropout", hidden_dropout_prob=0.1), "student_id": "teacher", **EVERY_OTHER_STEP}
    undisturbed = command("undisturbed", **flags)
    assert start(undisturbed, ranks=2).codes == [0, 0]
    for moment, step in (('at_call("training_step", distill, 11)', 10), ('at_call("evaluate", distill, 2)', 12)):
        arguments = command(f"killed{step}", **flags)
        killed = start(arguments, f'{DIE}if os.environ["RANK"] == "1":\n    {moment}', ranks=2)
        assert killed.codes == [1, -signal.SIGKILL], killed.err
        again = start(arguments, ranks=2)
        assert again.codes == [0, 0] and f"continuing at step {step}\n" in again.out
        assert same_weights(output_of(undisturbed), output_of(arguments))


def test_sigterm_to_one_rank_stops_all_at_the_next_row(command, save_tiny):
    flags = {"teacher_id": save_tiny("dropout", hidden_dropout_prob=0.1), "student_id": "teacher", "log_steps": 4}
    undisturbed = command("undisturbed", **flags)
    assert start(undisturbed, ranks=2).codes == [0, 0]
    # Within a step, and after the ranks have told each other at the end of an epoch: then at the row after that.
    for moment, number, step in (("training_step", 10, 12), ("evaluate", 2, 16)):
        arguments = command(moment, **flags)
        term = f'at_call("{moment}", distill, {number}, by=signal.SIGTERM)'
        stopped = start(arguments, f'{DIE}if os.environ["RANK"] == "1":\n    {term}', ranks=2)
        assert stopped.codes == [143, 143], stopped.err
        line = f"distill.py: stopped by SIGTERM at step {step}: the same command continues there\n"
        assert stopped.err == line
        again = start(arguments, ranks=2)
        assert again.codes == [0, 0] and f"continuing at step {step}\n" in again.out
        assert same_weights(output_of(undisturbed), output_of(arguments))
        assert metrics(output_of(undisturbed)) == metrics(output_of(arguments))


# --- text without labels ---------------------------------------------------------------------------------------------


def test_unlabeled_text_teaches_through_the_teacher_alone(command, write_csv, reviews, more_text, capsys):
    """With alpha 0 it must be as good as labeled text; then with labels of which none may be looked at."""
    unlabeled = run(command("unlabeled", unlabeled_id=more_text, alpha=0.0))
    assert "unlabeled: 60 examples; left out: 0 also in eval or test, 0 empty" in capsys.readouterr().out
    assert results(unlabeled)["examples"] == {"train": 101, "eval": 53, "test": 29, "unlabeled": 60}
    wrong = write_csv("wrong.csv", [(text, 1 - label) for text, label in reviews[200:260]])
    half = [run(command(f"half{i}", unlabeled_id=path)) for i, path in enumerate((more_text, wrong))]
    assert same_weights(*half)
    names = ("negative", "positive")
    write_csv("reviews/train.csv", [(text, names[label]) for text, label in reviews[:101] + reviews[200:260]])
    assert same_weights(unlabeled, run(command("labeled", alpha=0.0)))
    assert not nearly_same_weights(half[0], run(command("labeled_half")))


def test_unlabeled_text_is_mixed_with_labeled_in_every_epoch(command, more_text, monkeypatch):
    step, counts = distill.training_step, []

    def watched_step(*args):
        labels, example_count = args[4], args[6]
        counts.append({"labeled": int((labels != distill.NO_LABEL).sum()), "examples": example_count})
        return step(*args)

    monkeypatch.setattr(distill, "training_step", watched_step)
    run(command("run", unlabeled_id=more_text))
    epochs = [counts[i : i + 11] for i in (0, 11, 22)]  # 161 examples in batches of 15 or less
    for epoch in epochs:
        labeled = [batch["labeled"] for batch in epoch]
        assert sum(labeled) == 101 and sum(batch["examples"] for batch in epoch) == 161
        assert min(labeled) > 0 and sum(batch["labeled"] < batch["examples"] for batch in epoch) >= 10
    assert len(counts) == 33 and epochs[0] != epochs[1]


# --- search ----------------------------------------------------------------------------------------------------------


def trials_of(folder):
    return results(folder)["search"]


def best_of(trials):
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    return max(complete, key=lambda trial: trial["value"])


def its_flags(trial):
    return {name: int(value) if name == "epochs" else value for name, value in params_of(trial).items()}


def params_of(trial):
    return {name: trial[name] for name in distill.SEARCHED}


def test_a_search_finds_what_its_best_trial_found(command, labeled, monkeypatch, capsys):
    found, train = [], distill.train  # the trainings: one a trial, then the student's

    def recording_train(args, training, *others):
        found.append(training)
        return train(args, training, *others)

    monkeypatch.setattr(distill, "train", recording_train)
    folder = run(command("search", n_trials=7, alpha=1.0))  # the flag is not what the search goes by
    assert labeled == [101, 53, 29]
    saved, trials = results(folder), trials_of(folder)
    assert [trial["number"] for trial in trials] == list(range(7))
    for trial in trials:
        assert trial["state"] in ("COMPLETE", "PRUNED")
        assert 2 <= trial["epochs"] <= 10 and 1e-5 <= trial["learning_rate"] <= 1e-3
        assert 0 <= trial["alpha"] <= 1 and 2 <= trial["temperature"] <= 30
    assert len({trial["learning_rate"] for trial in trials}) == 7
    assert not {"trials", ".saving"} & set(os.listdir(folder))

    best = best_of(trials)
    kept = [trial for trial in trials if trial["value"] == best["value"] and trial["state"] == "COMPLETE"]
    best = min(kept, key=lambda trial: found[trial["number"]].best_row["eval_loss"])
    assert {name: saved["arguments"][name] for name in distill.SEARCHED} == params_of(best)
    trained = found[best["number"]].best_weights  # it had others before it, and left nothing behind
    assert len(found) == 8 and all(torch.equal(trained[name], found[7].best_weights[name]) for name in trained)
    assert saved["student"]["eval_accuracy"] == best["value"]
    by_itself = run(command("alone", **its_flags(best)))  # what the trial ran, as a command of its own
    assert same_weights(folder, by_itself) and metrics(folder) == metrics(by_itself)
    assert saved["student"]["test_accuracy"] == results(by_itself)["student"]["test_accuracy"]

    # The same command finds its work done, and with more trials it goes on. Another command has a study of its own.
    capsys.readouterr()
    run(command("search", n_trials=1, seed=34))
    assert "search: 0 of 1 trials are done" in capsys.readouterr().out
    longer = trials_of(run(command("search", n_trials=8)))  # without the alpha, which is searched anyway
    assert "search: 7 of 8 trials are done" in capsys.readouterr().out
    assert longer[:7] == trials and len(longer) == 8
    assert longer[7]["learning_rate"] not in {trial["learning_rate"] for trial in trials}
    monkeypatch.setattr(distill, "rebuild_study", None)
    assert trials_of(run(command("search", n_trials=8))) == longer
    assert "search: 8 of 8 trials are done" in capsys.readouterr().out


def test_a_trial_below_the_median_is_stopped(command, monkeypatch, capsys):
    """Each trial is worse than the one before it: the sixth has five others to be compared with."""
    rebuild_study, trials = distill.rebuild_study, []
    monkeypatch.setattr(distill, "rebuild_study", lambda its, *more: trials.append(its) or rebuild_study(its, *more))
    parts = dict.fromkeys(("loss", "hard_loss", "soft_loss"), torch.zeros(()))
    monkeypatch.setattr(distill, "training_step", lambda *args: parts)
    monkeypatch.setattr(
        distill,
        "evaluate",
        lambda *args: {"accuracy": 0.9 - 0.1 * len(trials[-1]), "macro_f1": 0.5, "loss": 1.0, "agreement": 0.5},
    )
    folder = run(command("run", n_trials=6))
    trials = trials_of(folder)
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert "trial 5: pruned" in capsys.readouterr().out
    assert results(folder)["arguments"]["epochs"] == trials[0]["epochs"]


def test_a_trial_that_diverges_is_told_and_the_search_goes_on(command, monkeypatch, capsys):
    train, failing = distill.train, [True, False, False]

    def diverging(*args):
        if failing.pop(0):
            raise distill.Diverged(args[0])
        return train(*args)

    monkeypatch.setattr(distill, "train", diverging)
    folder = run(command("some", n_trials=2))
    said = capsys.readouterr()
    assert "trial 0: fail" in said.out and said.err == ""
    assert [trial["state"] for trial in trials_of(folder)] == ["FAIL", "COMPLETE"]
    assert "NaN" not in Path(folder, "results.json").read_text()  # which is not JSON
    failing = [False] * 3
    trials = trials_of(run(command("some", n_trials=3)))
    assert [trial["state"] for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert len({trial["learning_rate"] for trial in trials}) == 3
    failing = [True] * 2
    assert "no trial has run to its end" in refused(command("all", n_trials=2), capsys)


def test_a_search_on_a_full_disk(command, monkeypatch, capsys):
    rebuild_study, arguments = distill.rebuild_study, command("run", n_trials=1)
    with contextlib.ExitStack() as limit, monkeypatch.context() as patched:
        full = lambda *its: limit.enter_context(file_size_limit(10)) or rebuild_study(*its)  # noqa: E731
        patched.setattr(distill, "rebuild_study", full)
        line = refused(arguments, capsys)
    assert f"cannot write {output_of(arguments)}/trials.jsonl, fix " in line and ": File too large\n" in line
    assert trials_of(run(arguments))[-1]["state"] == "COMPLETE"


def test_a_trial_whose_line_was_cut_short_is_made_again(command, capsys):
    trials = trials_of(run(command("search", n_trials=3, epochs=1)))
    path = Path(output_of(command("search")), "trials.jsonl")
    path.write_text(path.read_text()[:-9])
    capsys.readouterr()
    assert trials_of(run(command("search", n_trials=3, epochs=1))) == trials
    assert "search: 2 of 3 trials are done" in capsys.readouterr().out
    assert [json.loads(line) for line in path.read_text().splitlines()] == trials


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_killed_search_goes_on_as_if_nothing_had_been(command, ranks):
    """All ranks train each trial; the trial that was cut short is made again, with the same hyperparameters."""
    one = ranks or 1
    flags = {"n_trials": 3, "epochs": 1, "log_steps": 3}
    undisturbed = command("undisturbed", **flags)
    finished = start(undisturbed, ranks=ranks)
    assert finished.codes == [0] * one and finished.out.count("trial 1: complete") == 1, finished.err
    arguments = command("search", **flags)
    killed = start(
        arguments, f'{DIE}if os.environ.get("RANK", "1") == "1":\n    at_call("train", distill, 3)', ranks=ranks
    )
    assert -signal.SIGKILL in killed.codes
    assert len(distill.read(Path(output_of(arguments), "trials.jsonl"))) == 2
    # Then once more, while the best hyperparameters are trained again.
    again = 'at_call("write", distill, 4, counts=lambda _, path: of_student(path))'
    killed = start(arguments, DIE + again, ranks=ranks)
    assert -signal.SIGKILL in killed.codes and "search: 2 of 3 trials are done" in killed.out
    finished = start(arguments, ranks=ranks)
    assert finished.codes == [0] * one and "search: 3 of 3 trials are done" in finished.out
    trials = trials_of(output_of(arguments))
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 3
    assert trials == trials_of(output_of(undisturbed)) and len({trial["learning_rate"] for trial in trials}) == 3
    assert same_weights(output_of(undisturbed), output_of(arguments))
    found = {name: results(output_of(arguments))["arguments"][name] for name in distill.SEARCHED}
    alone = command("alone", **found, log_steps=3)
    assert start(alone, ranks=ranks).codes == [0] * one
    assert same_weights(output_of(arguments), output_of(alone)) and results(output_of(alone))["processes"] == one


def test_a_checkpoint_of_other_hyperparameters_is_refused_after_more_trials(command, monkeypatch, capsys):
    rebuild_study, rates = distill.rebuild_study, (1e-3, 1e-5)  # with such a teacher, it is best to learn little

    def with_these_rates(trials, *more):
        study = rebuild_study(trials, *more)
        study.enqueue_trial({"alpha": 0.0, "learning_rate": rates[len(trials)]})
        return study

    monkeypatch.setattr(distill, "rebuild_study", with_these_rates)
    with monkeypatch.context() as patched:
        patched.setattr(distill, "finish", lambda *args: distill.fail("stopped here"))
        refused(command("run", n_trials=1, best_by="loss"), capsys)
    line = refused(command("run", n_trials=2, best_by="loss"), capsys)
    assert "was left by another command (best epochs was " in line and "best learning_rate was " in line


# --- a teacher that is a column of answers, and data without labels --------------------------------------------------

NAMES = ("negative", "positive")
CUTS = {"train": (0, 101), "validation": (101, 154), "test": (154, 183)}  # as in reviews_folder


@pytest.fixture
def column_command(command, tmp_path, reviews):
    """column_command(output, cells, flag=value, ...): a run on the reviews with the columns that cells(split) gives."""

    def arguments(output, cells, suffix="parquet", label=True, **flags):
        folder = tmp_path / f"data_{output}"
        for split, (start, stop) in CUTS.items():
            rows = {"text": [text for text, _ in reviews[start:stop]], **cells(split)}
            labels = {"label": [NAMES[y] for _, y in reviews[start:stop]]} if label else {}
            table = datasets.Dataset.from_dict({**rows, **labels})
            (table.to_parquet if suffix == "parquet" else table.to_csv)(folder / f"{split}.{suffix}")
        flags = {"text_columns": "text", "teacher_column": "teacher", "dataset_id": folder, **flags}
        return command(output, **flags)[2:]  # without --teacher_id

    return arguments


def hard_answers(reviews, wrong=7, spellings=(NAMES, NAMES)):
    """Of every split: the labels, every seventh of them wrong."""

    def cells(split):
        labels = [label != (i % wrong == 0) for i, (_, label) in enumerate(reviews)]
        return {"teacher": [spellings[i % 2][labels[i]] for i in range(*CUTS[split])]}

    return cells


def test_a_column_of_a_teachers_logits_trains_the_very_same_student(command, column_command):
    model = run(command("model"))
    files = map(torch.load, Path(model, "teacher_logits").iterdir())
    logits = {len(part): part.numpy() for part in files}

    def cells(split):
        start, stop = CUTS[split]
        return {"teacher": list(logits[stop - start])}

    column = run(column_command("column", cells))
    assert same_weights(model, column) and metrics(model) == metrics(column)
    teacher, its = results(model)["teacher"], results(column)["teacher"]
    assert its == {**teacher, "model": "column teacher", "parameters": None} and its["eval_accuracy"] > 0
    assert results(model)["student"] == {**results(column)["student"], "model": model}
    assert results(column)["arguments"]["temperature"] == 4.0 and "labeling" not in results(column)["seconds"]
    card = Path(column, "README.md").read_text(encoding="utf-8")
    assert "from the answers in column teacher," in " ".join(card.split())
    assert re.search(r"\| parameters     \| +\| +[\d,]+ \|", card)  # of a column none are known
    assert metrics(column) != metrics(run(column_command("softer", cells, temperature=8)))


@pytest.mark.parametrize("layout", ["columns", "struct"])
def test_each_layout_trains_the_same(column_command, layout):
    def probability(split):
        return [0.02 + 0.96 * (i % 17) / 16 for i in range(*CUTS[split])]

    def columns(split):
        return {"p_positive": probability(split), "p_negative": [1 - p for p in probability(split)]}

    def struct(split):
        return {"teacher": [{"positive": p, "negative": 1 - p} for p in probability(split)]}

    def bare(split):
        return {"teacher": [[1 - p, p] for p in probability(split)]}

    flags = {"struct": (struct, "parquet"), "columns": (columns, "csv")}[layout]
    names = {"columns": "p_positive,p_negative", "struct": "teacher"}[layout]
    one, other = run(column_command("bare", bare)), run(column_command(layout, *flags, teacher_column=names))
    assert metrics(one) == metrics(other) and same_weights(one, other)
    assert results(other)["arguments"]["temperature"] == 4.0


def test_hard_answers_of_a_language_model(column_command, reviews, capsys):
    answers = hard_answers(reviews, spellings=[(" negative", "POSITIVE"), ("Negative", "positive ")])
    folder = run(column_command("hard", answers, "csv", alpha=0.0))
    said = capsys.readouterr().out
    assert said.count("column 'teacher': hard answers, by name") == 3 and "teacher: eval accuracy 0.8" in said
    assert results(folder)["arguments"]["temperature"] == 1.0
    softer = run(column_command("softer", answers, "csv", alpha=0.0, temperature=2))
    assert "warning: --temperature 2 raises answers of 0" in capsys.readouterr().out
    assert results(softer)["arguments"]["temperature"] == 2.0 and not same_weights(softer, folder)


def test_the_loss_of_hard_answers_is_cross_entropy():
    logits, labels = torch.randn(5, 54), torch.randint(54, (5,))
    answers = torch.full((5, 54), data.LOG_ZERO).scatter(1, labels[:, None], 0.0)
    parts = distill.distillation_loss(logits, answers, torch.full((5,), distill.NO_LABEL), 0.5, 1.0)
    torch.testing.assert_close(parts["loss"], torch.nn.functional.cross_entropy(logits, labels), rtol=1e-4, atol=1e-4)


def agreement_alone(folder):
    """Whether no score of a run needs labels."""
    found = results(folder)
    names = [name for who in ("teacher", "student") for name in found[who]] + list(metrics(folder)[-1])
    card = Path(folder, "README.md").read_text(encoding="utf-8")
    needs = [name for name in names if "accuracy" in name or "macro_f1" in name]
    assert found["arguments"]["best_by"] == "agreement" and found["examples"]["train"] == 0
    return not needs and "accuracy" not in card and "true labels" not in card and found["student"]["test_agreement"] > 0


def test_data_without_labels(command, column_command, reviews, capsys):
    """The teacher is a column, or a model; the labels that it would have found have no part in it."""
    column = run(column_command("column", hard_answers(reviews, wrong=10**9), label=False, label_column="none"))
    said = capsys.readouterr().out
    assert agreement_alone(column) and results(column)["classes"] == ["negative", "positive"]
    assert "accuracy" not in said and "always answering" not in said
    rows = [row for row in metrics(column) if "eval_loss" in row]
    assert results(column)["student"]["eval_agreement"] == max(row["eval_agreement"] for row in rows)
    model = run(command("model", label_column="none", text_columns="text"))
    assert agreement_alone(model) and results(model)["examples"]["unlabeled"] == 101
    # The same answers as by the teacher alone, where there are labels.
    assert same_weights(model, run(command("labeled", alpha=0.0, best_by="agreement")))


def test_a_few_labels_for_measuring(command, reviews_folder, write_csv, reviews, capsys):
    write_csv("reviews/train.csv", [(text,) for text, _ in reviews[:101]], ["text"])
    folder = run(command("run"))
    assert "training split has no column 'label'" in capsys.readouterr().out
    assert results(folder)["examples"] == {"train": 0, "unlabeled": 101, "eval": 53, "test": 29}
    assert {"eval_accuracy", "eval_agreement"} <= set(results(folder)["student"])
    assert results(folder)["arguments"]["best_by"] == "accuracy"
    assert "training split has no labels" in refused(command("alpha", alpha=1.0), capsys)
    assert "has no column 'label'" in refused(command("fine_tuned", teacher_epochs=1), capsys)


def test_scored_splits_without_answers_have_no_agreement(column_command, reviews, capsys):
    """The usual way to measure: a few rows labeled by people."""
    answers = hard_answers(reviews)
    arguments = column_command("run", lambda split: answers(split) if split == "train" else {}, best_by="agreement")
    folder = run(arguments)
    student = results(folder)["student"]
    assert "eval has no answers: the best epoch is that of best accuracy" in capsys.readouterr().out
    assert "eval_agreement" not in student and "test_agreement" not in student and student["test_accuracy"] > 0
    assert student["eval_accuracy"] == max(row.get("eval_accuracy", 0) for row in metrics(folder))
    assert results(folder)["teacher"] == {"model": "column teacher", "parameters": None}
    folder = run(column_command("search", lambda split: {} if split == "test" else answers(split), n_trials=1))
    assert "eval_agreement" in results(folder)["student"] and "test_agreement" not in results(folder)["student"]


def test_unlabeled_text_with_a_column(column_command, reviews, write_csv, capsys):
    rows = [(text, NAMES[label]) for text, label in reviews[200:260]]
    flags = {"unlabeled_id": write_csv("more.csv", rows, ["text", "teacher"]), "alpha": 0.0}
    more = run(column_command("more", hard_answers(reviews), **flags))
    assert results(more)["examples"] == {"train": 101, "unlabeled": 60, "eval": 53, "test": 29}
    assert not same_weights(more, run(column_command("less", hard_answers(reviews), alpha=0.0)))
    flags["unlabeled_id"] = write_csv("no.csv", [(text,) for text, _ in rows], ["text"])
    assert "has no column 'teacher'" in refused(column_command("no", hard_answers(reviews), **flags), capsys)


def test_a_column_in_a_search(column_command, reviews, capsys):
    flags = {"label": False, "label_column": "none", "n_trials": 2}
    folder = run(column_command("search", hard_answers(reviews), **flags))
    trials = trials_of(folder)
    assert {trial["state"] for trial in trials} == {"COMPLETE"} and "temperature" not in trials[0]
    assert results(folder)["student"]["eval_agreement"] == max(trial["value"] for trial in trials)
    assert results(folder)["arguments"]["temperature"] == 1.0
    capsys.readouterr()
    run(column_command("search", hard_answers(reviews), **flags, temperature=0.5))
    assert "search: 0 of 2 trials are done" in capsys.readouterr().out  # those were of another temperature


def test_a_column_on_two_ranks_killed_and_continued(column_command, reviews, capsys):
    flags = {"label": False, "label_column": "none"}
    one = run(column_command("one", hard_answers(reviews), **flags))
    arguments = column_command("two", hard_answers(reviews), **flags)
    killed = start(arguments, f'{DIE}if os.environ["RANK"] == "1":\n    at_call("training_step", distill, 11)', ranks=2)
    assert killed.codes == [1, -signal.SIGKILL], killed.err
    other = column_command("two", hard_answers(reviews, wrong=5), **flags)
    finished = start(other, ranks=2)
    assert finished.codes == [2, 2] and "digest of the teacher was" in finished.err
    again = start(column_command("two", hard_answers(reviews), **flags), ranks=2)
    assert again.codes == [0, 0] and "continuing at step 7\n" in again.out
    assert nearly_same_weights(one, output_of(arguments))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher_id": "x"}, "--teacher_column takes the place of --teacher_id"),
        ({"teacher_epochs": 1}, "--teacher_column .*--teacher_epochs"),
        ({"cache_teacher": "false"}, "--teacher_column .*--cache_teacher"),
        ({"student_id": "teacher"}, "--teacher_column .*--student_id teacher"),
        ({"label_column": "none", "alpha": 1}, "--alpha 1 .*no labels"),
        ({"label_column": "lable"}, "has no column 'lable'"),
        ({"teacher_column": "answer"}, "has no column 'answer'"),
    ],
)
def test_what_does_not_go_with_a_column(column_command, reviews, flags, message, capsys):
    arguments = column_command("run", hard_answers(reviews), **flags)
    if "teacher_id" in flags:
        arguments += ["--teacher_id", "x"]
    assert re.search(message, refused(arguments, capsys))
    assert not os.path.exists(f"{output_of(arguments)}/metrics.jsonl")


def test_a_teacher_is_not_fine_tuned_without_labels(command, capsys):
    assert "but --label_column is none" in refused(command("run", label_column="none", teacher_epochs=1), capsys)


@pytest.mark.parametrize(
    "flags",
    [
        {"teacher_epochs": 1, "teacher_learning_rate": 3e-5, "student_id": "teacher"},
        {"teacher_epochs": 1, "cache_teacher": "false"},
        {"best_by": "agreement"},
    ],
)
def test_the_flags_of_a_run_without_a_teacher_can_be_added(command, capsys, flags):
    words = command("run", **flags)
    folder = run(words) + "-alone"
    added = re.search("to compare: add (.*)", capsys.readouterr().out)[1].split()
    run([*words, *added])
    out = capsys.readouterr().out
    assert results(folder)["arguments"]["alpha"] == 1
    assert "fine-tuned first" not in out and "eval agreement" in out


# ---------------------------------------------------------------------------------------------------------------------
# With the packages alone that a run needs: of requirements.txt the SageMaker SDK brings 130 others

EACH = """
import distill
for words in {commands}:
    try:
        distill.main(words)
        print("exit code 0", flush=True)
    except SystemExit as end:
        print("exit code", end.code, flush=True)
"""


def test_four_packages_are_enough_for_a_run(command, save_tiny, tmp_path):
    """What else a flag or a model needs is named."""
    folder = Path(save_tiny("spm", "deberta-v2"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    (folder / "spm.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    needed = {"--n_trials=1": "optuna", "--report_to=tensorboard": "tensorboard", "--hf_token_secret=it": "boto3"}
    needed |= {f"--student_id={folder}": "sentencepiece"}
    commands = [command("run"), *([*command("refused"), flag] for flag in needed)]
    finished = start_bare(["-c", EACH.format(commands=commands)], tmp_path / "site-packages")
    assert re.findall("exit code (.*)", finished.stdout) == ["0", "2", "2", "2", "2"], finished.stderr
    assert results(tmp_path / "run")["student"]["test_accuracy"] >= 0
    lines = [line for line in finished.stderr.splitlines() if "error: " in line]
    assert all(name in line for name, line in zip(needed.values(), lines, strict=True)), lines


def test_bench_needs_scipy_too(command, tmp_path):
    words = ["bench.py", *command("run")[:6], "--output", str(tmp_path / "bench.json"), "--min_run_time", "0.001"]
    refused = start_bare(words, tmp_path / "site-packages")
    assert refused.returncode == 2 and "pip install scipy" in refused.stderr and refused.stderr.count("\n") == 1
    finished = start_bare(words, tmp_path / "site-packages", ["scipy"])
    assert finished.returncode == 0, finished.stderr
    assert "accuracy" in finished.stdout
