"""The command line, the training loop and what a run leaves behind: in process where that is enough, else for real."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import weakref

import datasets
import huggingface_hub
import pytest
import safetensors.torch
import torch
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
    with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
        return json.load(file)


def metrics(folder):
    """The rows of metrics.jsonl, without their speed."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
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


def start(arguments, code=None, torchrun=None, script=f"{ROOT}/distill.py", cwd=ROOT, **environment):
    """Run a script, or `code`, in a process of its own, or in several by torchrun; returns the CompletedProcess."""
    command = [sys.executable, "-c", code] if code else [sys.executable, script]
    if torchrun:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={torchrun}",
            "--standalone",
            script,
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# --- command line ----------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_recipe(monkeypatch):
    monkeypatch.delenv("SM_MODEL_DIR", raising=False)
    args = distill.parse_args([])
    assert args.teacher_id == "textattack/bert-base-uncased-SST-2"
    assert args.student_id == "google/bert_uncased_L-2_H-128_A-2"
    assert (args.dataset_id, args.dataset_config) == ("nyu-mll/glue", "sst2")
    assert (args.epochs, args.batch_size, args.learning_rate, args.seed) == (7, 128, 6e-5, 33)
    assert (args.alpha, args.temperature, args.cache_teacher, args.demo) == (0.5, 4.0, True, False)
    assert args.output_dir == args.checkpoint_dir == "outputs"
    assert distill.parse_args(["--dataset_id", "imdb"]).dataset_config is None


def test_booleans_as_sagemaker_passes_them():
    assert distill.parse_args(["--demo"]).demo is True
    assert distill.parse_args(["--demo", "--cache_teacher", "False"]).cache_teacher is False
    assert distill.parse_args(["--cache_teacher", "TRUE", "--demo", "false"]).demo is False


def test_demo_flags_can_be_overridden():
    args = distill.parse_args(["--demo", "--epochs", "1", "--alpha", "0"])
    assert (args.dataset_id, args.student_id, args.student_layers) == ("demo", "teacher", 2)
    assert (args.epochs, args.alpha) == (1, 0.0)


def test_sagemaker_folders(monkeypatch):
    monkeypatch.setenv("SM_MODEL_DIR", "/opt/ml/model")
    args = distill.parse_args([])
    assert (args.output_dir, args.checkpoint_dir) == ("/opt/ml/model", "/opt/ml/checkpoints")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temparature", "4"], "unrecognized arguments: --temparature"),
        (["--alpha", "1.5"], "--alpha: must be between 0 and 1"),
        (["--alpha", "nan"], "--alpha: must be between 0 and 1"),
        (["--temperature", "0"], "--temperature: must be greater than 0"),
        (["--temperature", "inf"], "--temperature: must be greater than 0"),
        (["--epochs", "0"], "--epochs: must be at least 1"),
        (["--epochs", "2.5"], "--epochs: invalid int value"),
        (["--precision", "int8"], "--precision: invalid choice"),
        (["--demo", "maybe"], "--demo: must be true or false"),
        (["--text_columns", "a,b,c"], "--text_columns: must be one or two"),
        (["--learn", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    assert message in refused(arguments, capsys)


def test_readme_tells_every_flag(capsys):
    with pytest.raises(SystemExit):
        distill.parse_args(["--help"])
    flags = set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"}
    with open(f"{ROOT}/README.md", encoding="utf-8") as file:
        told = set(re.findall(r"`(--\w+)`", file.read().split("## Flags")[1].split("## What a run leaves")[0]))
    assert told == flags


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def old_repository(tmp_path, save_tiny):
    """google/bert_uncased_L-2_H-128_A-2 as it is: config.json without model_type, vocab.txt, pytorch_model.bin."""

    def make(folder):
        os.makedirs(folder)
        model = transformers.BertForPreTraining(
            transformers.BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        torch.save(model.state_dict(), os.path.join(folder, "pytorch_model.bin"))
        config = model.config.to_diff_dict()
        for name in ("model_type", "transformers_version", "architectures", "dtype"):
            config.pop(name, None)
        config["vocab_size"] = model.config.vocab_size
        distill.write_json(os.path.join(folder, "config.json"), config)
        with open(f"{data.demo_model()}/vocab.txt", "rb") as source, open(f"{folder}/vocab.txt", "wb") as copy:
            copy.write(source.read())
        return model

    return make


def test_the_published_student_loads(old_repository, tmp_path, tokenizer):
    folder = str(tmp_path / "google" / "bert_uncased_L-2_H-128_A-2")
    original = old_repository(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "pytorch_model.bin", "vocab.txt"]
    distill.quiet_libraries()
    model, its_tokenizer = distill.load_model(folder, ["negative", "positive"])
    assert type(model) is transformers.BertForSequenceClassification
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(model.bert.state_dict()[query], original.bert.state_dict()[query])
    text = "An EMBARRASSING film"
    assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert its_tokenizer.model_max_length == 512
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_an_old_model_of_another_type(tmp_path):
    folder = tmp_path / "roberta-tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert distill.load_config(str(folder)).model_type == "roberta"
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type"):
        distill.load_model(str(tmp_path / "something"))


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "roberta", "xlm-roberta", "albert", "deberta"])
def test_padding_does_not_change_logits(save_tiny, tokenizer, reviews, model_type):
    """The four-dimensional mask of forward() above all: the same logits as for each text alone, without any mask."""
    changes = {"pad_token_id": 0}
    if model_type == "distilbert":
        changes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if model_type in ("albert", "electra"):
        changes |= {"embedding_size": 32}
    model, tokenizer = distill.load_model(save_tiny("model", model_type, **changes))
    assert distill.longest_input(model) == (63 if "roberta" in model_type else 64)
    texts = datasets.Dataset.from_dict({"text": [text for text, _ in reviews[:30]]})
    tokens = data.tokenize(tokenizer, texts, 60)
    with torch.no_grad():
        alone = torch.cat(
            [model(input_ids=ids[None]).logits for ids in tokens.ids.long().split(tokens.lengths.tolist())]
        )
        [(_, inputs)] = tokens.batches([torch.arange(30)])
        assert torch.allclose(distill.forward(model, inputs), alone, atol=1e-5)
    assert alone.std() > 0.01


def test_attention_gets_a_mask_that_it_need_not_convert(save_tiny, monkeypatch):
    """Additive, in the type of the queries, and shared by an example's rows."""
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def recording_attention(query, *args, attn_mask=None, **options):
        masks.append(attn_mask)
        assert attn_mask.dtype == query.dtype
        return attention(query, *args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording_attention)
    model, _ = distill.load_model(save_tiny("model"))
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.arange(5) < torch.tensor([[3], [5]]),
    }
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            distill.forward(model, inputs)
    assert [mask.dtype for mask in masks] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert masks[0].data_ptr() == masks[1].data_ptr() and masks[0].stride(2) == 0
    assert masks[0][:, 0, 0].tolist() == [[0, 0, 0, -math.inf, -math.inf], [0] * 5]


def test_macro_f1():
    # F1 of classes 0, 1, 2, 4 by hand: 4/5, 2/5, 0, 0. Class 3 occurs nowhere and does not count.
    answers, labels = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 0, 4, 1])
    assert distill.macro_f1(answers, labels) == pytest.approx((4 / 5 + 2 / 5 + 0 + 0) / 4, rel=1e-12)
    assert distill.macro_f1(labels, labels) == 1


def test_layers_classes_and_errors(save_tiny, monkeypatch):
    folder = save_tiny("model", num_hidden_layers=4, classes=("positive", "negative"))
    whole, _ = distill.load_model(folder)
    model, _ = distill.load_model(folder, ["negative", "positive"], layers=3)
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 3
    for ours, its in enumerate((0, 1, 3)):  # evenly spaced, and the last
        expected = whole.bert.encoder.layer[its].state_dict()
        for name, weight in model.bert.encoder.layer[ours].state_dict().items():
            assert torch.equal(weight, expected[name])
    assert torch.equal(model.classifier.weight, whole.classifier.weight[[1, 0]])
    bigger, _ = distill.load_model(folder, ["a", "b", "c"], seed=5)
    assert bigger.classifier.weight.shape == (3, 32) and bigger.config.id2label[2] == "c"
    assert torch.equal(
        bigger.classifier.weight, distill.load_model(folder, ["a", "b", "c"], seed=5)[0].classifier.weight
    )
    with pytest.raises(UserError, match="has 4 layers: --student_layers 5 is too many"):
        distill.load_model(folder, layers=5)
    with pytest.raises(UserError, match="no such folder"):
        distill.load_model("./nowhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # saves the retries
    with pytest.raises(UserError, match=r"cannot load output/teacher: .*no local folder has that name"):
        distill.load_model("output/teacher")  # misspelt, it looks like a Hub id
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{folder}/{name}")
    with pytest.raises(UserError, match="no usable tokenizer"):
        distill.load_model(folder)
    with pytest.raises(UserError, match="do not belong together"):
        distill.load_model(save_tiny("small", vocab_size=1000))


def test_weights_are_float32_whatever_the_file_holds(save_tiny, tmp_path):
    folder = save_tiny("model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).half()
    model.save_pretrained(folder)
    assert {p.dtype for p in distill.load_model(folder)[0].parameters()} == {torch.float32}


def test_missing_weights_are_not_passed_over(save_tiny, capsys):
    folder = save_tiny("model")
    kept = {name: tensor for name, tensor in weights(folder).items() if "layer.1.output.dense" not in name}
    safetensors.torch.save_file(kept, f"{folder}/model.safetensors", {"format": "pt"})
    distill.load_model(folder)
    assert re.search(r"warning: .* lacks weights.*: bert.encoder.layer.1.output.dense", capsys.readouterr().out)

    headless = {name: tensor for name, tensor in weights(save_tiny("model")).items() if "classifier" not in name}
    safetensors.torch.save_file(headless, f"{folder}/model.safetensors", {"format": "pt"})
    distill.load_model(folder)
    assert "lacks weights, now random: classifier.bias, classifier.weight (not f" in capsys.readouterr().out
    distill.load_model(folder, ["negative", "positive"])  # to be trained: a new head is what it needs
    assert capsys.readouterr().out == ""

    misfits = weights(save_tiny("model"))
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    misfits[name] = torch.zeros(3)
    safetensors.torch.save_file(misfits, f"{folder}/model.safetensors", {"format": "pt"})
    for class_names in (None, ["negative", "positive"]):
        with pytest.raises(UserError):
            distill.load_model(folder, class_names)


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_a_teacher_in_another_order_gives_the_same_student(command, save_tiny):
    """Its classes are matched by name: swap the rows of its head and their names, and nothing may change."""
    plain = run(command("plain", teacher_id=save_tiny("t1", seed=7)))
    folder = save_tiny("t2", seed=7, classes=("POSITIVE", "Negative"))
    swapped = weights(folder)
    for name in ("classifier.weight", "classifier.bias"):
        swapped[name] = swapped[name].flip(0).contiguous()
    safetensors.torch.save_file(swapped, f"{folder}/model.safetensors", {"format": "pt"})
    other = run(command("other", teacher_id=folder))
    assert same_weights(plain, other)
    assert results(plain)["teacher"]["eval_accuracy"] == results(other)["teacher"]["eval_accuracy"]


def test_generic_class_names_are_said_and_others_refused(command, save_tiny, capsys):
    run(command("generic", teacher_id=save_tiny("t1", classes=("LABEL_0", "LABEL_1")), epochs=1))
    assert "the teacher does not name its classes (LABEL_0, LABEL_1): assumed to be in" in capsys.readouterr().out
    line = refused(command("other", teacher_id=save_tiny("t2", classes=("sport", "arts"))), capsys)
    assert "(sport, arts)" in line and "(negative, positive)" in line
    line = refused(command("count", teacher_id=save_tiny("t3", classes=("negative", "neutral", "positive"))), capsys)
    assert "(negative, neutral, positive)" in line


def test_cached_and_live_teacher_give_the_same_run(command):
    cached = run(command("cached"))
    live = run(command("live", cache_teacher="false"))
    assert os.path.exists(f"{cached}/teacher_logits.safetensors") and not os.path.exists(
        f"{live}/teacher_logits.safetensors"
    )
    assert nearly_same_weights(cached, live)
    start = command("x")[command("x").index("--student_id") + 1]
    assert not nearly_same_weights(cached, start)  # there was something to learn
    assert not nearly_same_weights(cached, run(command("hotter", temperature=2.0)))  # and the comparison would see it


def count_forwards(monkeypatch):
    calls = []
    predict = distill.predict
    monkeypatch.setattr(distill, "predict", lambda *args: calls.append(args[3]) or predict(*args))
    return calls


def test_the_cache_serves_another_alpha_and_no_other_teacher_text_or_length(
    command, save_tiny, write_csv, reviews, monkeypatch, capsys
):
    calls = count_forwards(monkeypatch)

    def labelled(**flags):
        calls.clear()
        capsys.readouterr()
        run(command("run", epochs=1, **flags))
        return [call for call in calls if "teacher" in call], capsys.readouterr().out

    everything = ["teacher labels train", "teacher labels eval", "teacher labels test"]
    assert labelled()[0] == everything
    asked, said = labelled(alpha=0.1)
    assert asked == [] and "teacher's labels for train, eval, test: from" in said
    asked, said = labelled(max_length=12)
    assert asked == everything and "made with another text: labelling again" in said
    asked, said = labelled(teacher_id=save_tiny("other", seed=9), max_length=12)
    assert asked == everything and "made with another teacher" in said
    asked, said = labelled(teacher_id=save_tiny("other", seed=9), max_length=12, precision="bf16")
    assert asked == everything and "made with another precision" in said
    write_csv("reviews/train.csv", [(text, ("negative", "positive")[label]) for text, label in reviews[1:102]])
    asked, said = labelled(teacher_id=save_tiny("other", seed=9), max_length=12, precision="bf16")
    assert asked == ["teacher labels train"] and "another text" in said


def test_alpha_1_asks_the_teacher_for_no_training_label(command, monkeypatch):
    calls = count_forwards(monkeypatch)
    folder = run(command("control", alpha=1.0, epochs=1))
    assert "teacher labels train" not in calls and "teacher labels eval" in calls
    assert results(folder)["student"]["eval_agreement"] > 0


def test_a_cased_student_gets_its_own_tokens(command, save_tiny, tokenizer, write_csv, reviews, capsys):
    titles = [(text.title(), ("negative", "positive")[label]) for text, label in reviews[:154]]
    write_csv("reviews/train.csv", titles[:101])
    write_csv("reviews/validation.csv", titles[101:])
    cased = transformers.BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False)
    student = save_tiny("cased", tokenizer=cased)
    cached = run(command("cached", student_id=student))
    assert "teacher and student have different tokenizers" in capsys.readouterr().out
    live = run(command("live", student_id=student, cache_teacher="false"))
    assert nearly_same_weights(cached, live)


def test_a_distilbert_student_of_a_bert_teacher_on_pairs(command, save_tiny, write_csv, reviews):
    """Sentence pairs have token types; BERT takes them, DistilBERT does not."""
    rows = [(a[0], b[0], int(a[1] == b[1])) for a, b in zip(reviews[:60], reviews[60:120], strict=True)]
    path = write_csv("pairs.csv", rows, ("sentence1", "sentence2", "label"))
    student = save_tiny("student2", "distilbert", dim=32, n_layers=2, n_heads=2, hidden_dim=64, classes=("0", "1"))
    folder = run(
        command(
            "pairs",
            dataset_id=path,
            train_split="train[:40]",
            eval_split="train[40:]",
            test_split="train[40:50]",
            teacher_id=save_tiny("t", classes=("0", "1")),
            student_id=student,
            max_length=40,
        )
    )
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "distilbert"


def test_pairs_of_a_distilbert_teacher_keep_the_bert_students_token_types(save_tiny, tokenizer):
    distilbert = transformers.DistilBertTokenizer.from_pretrained(data.demo_model())
    pairs = datasets.Dataset.from_dict({"a": ["one two", "three"], "b": ["four", "five six"]})
    split, single = data.Split(pairs, torch.zeros(2)), data.Split(pairs.select_columns("a"), torch.zeros(2))
    has_types = "token_type_ids" in distilbert("a", "b")
    assert data.same_tokenizer(distilbert, tokenizer, split) is has_types
    assert data.same_tokenizer(distilbert, tokenizer, single)


def test_teacher_is_fine_tuned_first_and_gives_the_student_its_layers(command, capsys, monkeypatch):
    flags = {"teacher_epochs": 2, "teacher_learning_rate": 1e-3, "student_id": "teacher", "student_layers": 1}
    folder = run(command("run", **flags, epochs=1, learning_rate=1e-12))
    teacher, student = weights(f"{folder}/teacher"), weights(folder)
    shared = [name for name in student if "layer.0" in name or "embeddings" in name]
    assert len(shared) > 15 and not any("layer.1." in name for name in student)
    last = {name: name.replace("layer.0", "layer.2") for name in shared}  # of the teacher's three
    assert all(torch.allclose(student[name], teacher[last[name]], atol=1e-6) for name in shared)
    original = weights(command("x")[1])
    assert not torch.allclose(teacher["classifier.weight"], original["classifier.weight"], atol=1e-4)
    before = teacher
    capsys.readouterr()
    run(command("run", **flags, epochs=1, alpha=0.2))
    said = capsys.readouterr().out
    assert "teacher: fine-tuned already" in said and "teacher's labels for train" in said
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(f"{folder}/teacher").items())

    # Another teacher's training is begun in the same folder and given up: the first is no longer there to be found.
    with monkeypatch.context() as patched:
        patched.setattr(distill, "save_checkpoint", lambda *args: distill.fail("stopped here"))
        refused(command("run", **{**flags, "teacher_epochs": 1}, epochs=1), capsys)
    run(command("run", **flags, epochs=1))
    assert "fine-tuned already" not in capsys.readouterr().out
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(f"{folder}/teacher").items())


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
    assert not any(alive)


def test_a_useless_teacher_is_warned_about(command, save_tiny, capsys):
    folder = save_tiny("useless")
    constant = weights(folder)
    constant["classifier.weight"].zero_()
    constant["classifier.bias"] = torch.tensor([1.0, 0.0])
    safetensors.torch.save_file(constant, f"{folder}/model.safetensors", {"format": "pt"})
    run(command("run", teacher_id=folder, epochs=1))
    assert (
        "warning: the teacher is no better than that (not fine-tuned? see --teacher_epochs)" in capsys.readouterr().out
    )


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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(command, precision):
    gently = {"epochs": 1, "learning_rate": 1e-4}
    exact, half = run(command("exact", **gently)), run(command("half", **gently, precision=precision))
    one, other = weights(exact), weights(half)
    assert {tensor.dtype for tensor in other.values()} == {torch.float32}
    assert 0 < max((one[name] - other[name]).abs().max().item() for name in one) < 0.05
    losses = [
        [json.loads(line) for line in open(f"{folder}/metrics.jsonl")][-1]["eval_loss"] for folder in (exact, half)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


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

    monkeypatch.setattr(distill, "training_step", poisoned_step)
    arguments = command("run", save_steps=1)
    assert "loss is not finite at step 10: lower --learning_rate" in refused(arguments, capsys)
    state = torch.load(f"{output_of(arguments)}/checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 9 and all(tensor.isfinite().all() for tensor in state["model"].values())
    monkeypatch.setattr(distill, "training_step", step)

    def printed(arguments):
        run(arguments)
        return re.findall(r"student, epoch [23].*", capsys.readouterr().out)

    # And it can be continued: in the middle of the second epoch, whose mean loss is printed.
    assert printed(arguments) == printed(command("undisturbed")) != []
    assert same_weights(output_of(arguments), output_of(command("undisturbed")))


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


def test_fifty_steps_are_the_trainers(command, tmp_path, save_tiny, tokenizer, write_csv, reviews, monkeypatch):
    """The published Trainer subclass, on the same batches in the same order, ends at the same weights."""
    write_csv("reviews/train.csv", [(text, ("negative", "positive")[label]) for text, label in reviews[:160]])
    arguments = command("ours", cache_teacher="false", epochs=5, learning_rate=5e-5, seed=7)
    save_checkpoint, states = distill.save_checkpoint, []

    def keeping_checkpoint(checkpoint, stage, progress, model, *others):
        states.append((progress.step, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        save_checkpoint(checkpoint, stage, progress, model, *others)

    monkeypatch.setattr(distill, "save_checkpoint", keeping_checkpoint)
    run(arguments)
    steps, ours = states[-1]
    assert steps == 50

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


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_design_says(command, capfd, reviews):
    folder = run(command("run", report_to="tensorboard"))
    out, err = capfd.readouterr()
    assert not re.search(r"[\r\x1b]", out + err), "control characters in a file"
    assert err == ""
    headline = json.loads(out.splitlines()[-1])
    saved = results(folder)
    assert headline == {name: saved[name] for name in headline} and {"teacher", "student", "seconds"} <= headline.keys()
    for who in ("teacher", "student"):
        assert {"parameters", "eval_accuracy", "test_accuracy"} <= saved[who].keys()
    assert {"eval_agreement", "test_agreement", "eval_macro_f1", "test_macro_f1"} <= saved["student"].keys()
    assert saved["arguments"]["alpha"] == 0.5 and saved["versions"]["torch"] == torch.__version__

    rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl", encoding="utf-8")]
    training = [row for row in rows if "loss" in row]
    assert set(training[0]) == {
        "step", "epoch", "loss", "hard_loss", "soft_loss", "learning_rate", "examples_per_second",
    }  # fmt: skip
    assert training[-1]["step"] == 21 and training[-1]["loss"] < training[0]["loss"]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["epoch"] for row in evaluations] == [1, 2, 3]
    assert set(evaluations[0]) == {"epoch", "eval_accuracy", "eval_macro_f1", "eval_loss", "eval_agreement"}
    best = max(evaluations, key=lambda row: (row["eval_accuracy"], -row["eval_loss"]))
    assert saved["student"]["eval_accuracy"] == best["eval_accuracy"]
    assert saved["student"]["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)

    assert not os.path.exists(f"{folder}/checkpoint.pt") and os.listdir(f"{folder}/runs")
    assert not [name for name in os.listdir(folder) if "tmp" in name or name.startswith(".")]
    classify = transformers.pipeline("text-classification", folder)
    answers = classify([text for text, _ in reviews[154:183]], truncation=True)
    assert {answer["label"] for answer in answers} <= {"negative", "positive"}
    right = [
        answer["label"] == ("negative", "positive")[label]
        for answer, (_, label) in zip(answers, reviews[154:183], strict=True)
    ]
    assert sum(right) / 29 == pytest.approx(saved["student"]["test_accuracy"])


def test_model_card(command, save_tiny, monkeypatch):
    folder = run(command("run", epochs=1))
    card = huggingface_hub.ModelCard.load(f"{folder}/README.md")
    assert card.data.pipeline_tag == "text-classification" and card.data.library_name == "transformers"
    assert card.data.base_model is None  # a local folder is no id on the Hub
    by_split = {result.dataset_split: result for result in card.data.eval_results if result.metric_type == "accuracy"}
    f1 = {result.dataset_split: result.metric_value for result in card.data.eval_results if result.metric_type == "f1"}
    saved = results(folder)["student"]
    assert by_split["validation"].metric_value == saved["eval_accuracy"]
    assert by_split["test"].metric_value == saved["test_accuracy"]
    assert f1 == {"validation": saved["eval_macro_f1"], "test": saved["test_macro_f1"]}
    args = distill.parse_args(["--demo", "--output_dir", folder])
    distill.write_model_card(args, results(folder))
    demo = huggingface_hub.ModelCard.load(f"{folder}/README.md").data
    assert demo.datasets == [distill.DEMO_DATASET]
    assert {result.dataset_type for result in demo.eval_results} == {"local"}  # its splits are not the Hub's
    assert distill.hub_id("demo", distill.DEMO_MODEL) == "sentence-transformers/all-MiniLM-L6-v2"
    assert distill.hub_id("google/bert_uncased_L-2_H-128_A-2", None) == "google/bert_uncased_L-2_H-128_A-2"


def test_a_missing_package_is_named(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = command("run", report_to="tensorboard")
    assert "pip install tensorboard" in refused(arguments, capsys)


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
def hub(tmp_path, save_tiny, old_repository, reviews):
    """The published pair and GLUE's SST-2 in small, as their repositories are laid out."""
    folder = tmp_path / "hub"
    save_tiny("hub/models/textattack/bert-base-uncased-SST-2", classes=("LABEL_0", "LABEL_1"))
    old_repository(str(folder / "models/google/bert_uncased_L-2_H-128_A-2"))
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "idx": datasets.Value("int32"),
        }
    )
    glue = folder / "datasets/nyu-mll/glue"
    for split, rows in (("train", reviews[:200]), ("validation", reviews[200:250]), ("test", reviews[250:270])):
        columns = {
            "sentence": [text for text, _ in rows],
            "label": [-1 if split == "test" else label for _, label in rows],  # as GLUE hides them
            "idx": list(range(len(rows))),
        }
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(glue / "sst2" / f"{split}-00000-of-00001.parquet")
    (glue / "README.md").write_text(GLUE_README)
    with HubStandin(folder) as hub:
        yield hub


def test_the_published_command_line_and_a_push(hub, tmp_path):
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
    finished = start(["--hub_model_id", "me/tiny-sst2"], cwd=tmp_path, **environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "" and TOKEN not in finished.stdout
    saved = results(tmp_path / "outputs")
    assert saved["arguments"]["epochs"] == 7 and saved["examples"] == {"train": 200, "eval": 50, "unlabeled": 0}
    assert TOKEN not in json.dumps(saved)
    pushed = tmp_path / "hub/models/me/tiny-sst2"
    assert same_weights(pushed, tmp_path / "outputs")
    assert {"README.md", "config.json", "tokenizer.json", "results.json"} <= set(os.listdir(pushed))
    assert not [name for name in os.listdir(pushed) if "logits" in name or "checkpoint" in name]
    card = huggingface_hub.ModelCard.load(pushed / "README.md").data
    assert card.base_model == "google/bert_uncased_L-2_H-128_A-2" and card.datasets == ["nyu-mll/glue"]
    assert card.eval_results[0].dataset_config == "sst2" and card.eval_results[0].metric_type == "accuracy"

    hub.refuse_push = True
    arguments = ["--hub_model_id", "me/another", "--output_dir", "second", "--epochs", "1"]
    refused = start(arguments, cwd=tmp_path, **environment)
    assert refused.returncode == 2 and json.loads(refused.stdout.splitlines()[-1])["student"]
    assert refused.stderr.count("\n") == 1 and "hf upload me/another second" in refused.stderr
    assert TOKEN not in refused.stderr and os.path.exists(tmp_path / "second/model.safetensors")

    hidden = start(["--test_split", "test", "--output_dir", "third"], cwd=tmp_path, **environment)
    assert hidden.returncode == 2 and "labels of -1" in hidden.stderr


def test_a_run_that_ends_while_it_pushes_need_not_train_again(command, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(distill, "push", lambda args: distill.fail("stopped here"))
    assert "stopped here" in refused(command("run", hub_model_id="me/student"), capsys)
    monkeypatch.setattr(distill, "push", lambda args: None)
    monkeypatch.setattr(distill, "training_step", None)
    assert not os.path.exists(f"{run(command('run', hub_model_id='me/student'))}/checkpoint.pt")


def test_a_push_without_token_is_refused_before_the_work(command, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN" in refused(command("run", hub_model_id="me/student"), capsys)
    assert "--hub_model_id" in refused(command("run", hub_model_id="not/a/repository"), capsys)


# --- continuing ------------------------------------------------------------------------------------------------------

DIE = """
import os, signal, sys
import torch
import distill

def die():
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(name, owner, number, before=lambda *args: None, counts=lambda *args: True):
    # Die at the number-th call of owner.name for which counts() holds, after before().
    function, calls = getattr(owner, name), []
    def wrapper(*args, **kwargs):
        calls.extend([1] * counts(*args))
        if not counts(*args):
            return function(*args, **kwargs)
        if len(calls) == number:
            before(*args)
            die()
        return function(*args, **kwargs)
    setattr(owner, name, wrapper)

def half_a_file(state, file):
    torch.serialization.save(state, file)
    file.flush()
    os.truncate(file.name, os.path.getsize(file.name) // 2)

MOMENT
distill.main(sys.argv[1:])
"""
# The teacher has 2 epochs of 7 steps, the student 3; a checkpoint every 2 steps and after each epoch.
MOMENTS = {
    "fine-tuning the teacher": 'at_call("training_step", distill, 10)',
    "labelling": 'at_call("predict", distill, 1, counts=lambda *args: args[3] == "teacher labels eval")',
    "within an epoch": 'at_call("training_step", distill, 14 + 11)',
    "evaluating an epoch": 'at_call("evaluate", distill, 2 + 2)',
    "between a best epoch and its checkpoint": """at_call(
        "save_checkpoint", distill, 1, counts=lambda *args: args[1] == "student" and args[2].step == 7
    )""",
    "writing a checkpoint": 'at_call("save", torch, 13, half_a_file, lambda state, file: hasattr(file, "name"))',
    "after the last epoch": 'at_call("finish", distill, 1)',
}


@pytest.fixture
def with_dropout(command, save_tiny):
    """Dropout makes the random state matter; the teacher is fine-tuned first, so that there are two trainings."""
    teacher = save_tiny("dropout", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    flags = {"teacher_id": teacher, "student_id": "teacher", "student_layers": 1, "teacher_epochs": 2, "save_steps": 2}
    return lambda output: command(output, **flags)


def test_a_checkpoint_of_every_step_can_be_continued(command, capsys):
    """The last step of an epoch is the one that might fall between the epoch's two halves."""
    undisturbed = run(command("undisturbed", save_steps=1))
    arguments = command("killed", save_steps=1)
    code = DIE.replace("MOMENT", 'at_call("evaluate", distill, 2)')
    assert start(arguments, code).returncode == -signal.SIGKILL
    assert same_weights(undisturbed, run(arguments))


def test_killed_at_any_moment_and_started_again_ends_the_same(with_dropout, capsys):
    undisturbed = run(with_dropout("undisturbed"))
    for moment, line in MOMENTS.items():
        arguments = with_dropout(moment.replace(" ", "_"))
        killed = start(arguments, DIE.replace("MOMENT", line))
        assert killed.returncode == -signal.SIGKILL, (moment, killed.stderr)
        capsys.readouterr()
        folder = run(arguments)
        assert "continuing the " in capsys.readouterr().out or moment == "labelling", moment
        assert not os.path.exists(f"{folder}/checkpoint.pt")
        for part in (".", "teacher"):
            assert same_weights(f"{undisturbed}/{part}", f"{folder}/{part}"), moment
            assert metrics(f"{undisturbed}/{part}") == metrics(f"{folder}/{part}"), moment


def test_checkpoints_that_cannot_be_continued(command, save_tiny, capsys, monkeypatch):
    monkeypatch.setattr(distill, "finish", lambda *args: distill.fail("stopped here"))
    refused(command("run"), capsys)
    path = f"{output_of(command('run'))}/checkpoint.pt"
    untouched = open(path, "rb").read()
    line = refused(command("run", alpha=0.25, epochs=9), capsys)
    assert path in line and "alpha was 0.5, is 0.25" in line and "epochs was 3, is 9" in line
    assert open(path, "rb").read() == untouched
    teacher = command("run")[1]
    save_tiny(os.path.basename(teacher), seed=99, num_hidden_layers=3, hidden_size=48)
    assert "digest of the teacher was" in refused(command("run"), capsys)
    for damaged in (untouched[: len(untouched) // 2], b"", b"no checkpoint"):
        with open(path, "wb") as file:
            file.write(damaged)
        line = refused(command("run"), capsys)
        assert f"{path} is damaged" in line and "delete it" in line


# --- a full disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size):
    """Let no file grow beyond it, as `ulimit -f` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


FULL_DISKS = {  # file -> the function of distill.py from whose n-th call on the disk is full; the size limit
    "teacher_logits.safetensors": ("write_cache", 1, 100),
    "metrics.jsonl": ("train", 1, 10),
    "model.safetensors": ("save_model", 2, 100_000),
    "checkpoint.pt": ("write_checkpoint", 2, 100_000),
    "results.json": ("finish", 1, 100),
    "README.md": ("write_model_card", 1, 100),
    "runs": ("summary_writer", 2, 10),
}


@pytest.mark.parametrize("file", FULL_DISKS)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(command, file, monkeypatch, capsys):
    name, number, size = FULL_DISKS[file]
    function, calls = getattr(distill, name), []

    def limiting(*args, **flags):
        calls.append(1)
        if len(calls) == number:
            limit.enter_context(file_size_limit(size))
        return function(*args, **flags)

    arguments = command("run", report_to="tensorboard" if file == "runs" else "none", save_steps=5)
    with contextlib.ExitStack() as limit, monkeypatch.context() as patched:
        patched.setattr(distill, name, limiting)
        line = refused(arguments, capsys)
    folder = output_of(arguments)
    assert re.search(f"error: cannot write {folder}/{file}: .*File too large.*; fix that and repeat", line)
    assert not [name for name in os.listdir(folder) if "tmp" in name or name.startswith(".")]
    run(arguments)
    assert same_weights(folder, run(command("undisturbed", save_steps=5)))
    assert metrics(folder) == metrics(output_of(command("undisturbed")))


FULL_ON_TWO_RANKS = """
import os, resource, sys
import distill

save_model, leave = distill.save_model, sys.exit

def save_on_full_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save_model(*args)

def tell_code(code):
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(code, file=open(__file__ + os.environ["RANK"], "w"))
    leave(code)

distill.save_model, sys.exit = save_on_full_disk, tell_code
distill.main()
"""


def test_a_full_disk_ends_every_rank_with_exit_code_2(command, tmp_path):
    script = tmp_path / "full.py"
    script.write_text(FULL_ON_TWO_RANKS)
    finished = start(command("run"), torchrun=2, script=str(script), PYTHONPATH=ROOT)
    assert [(tmp_path / f"full.py{rank}").read_text() for rank in (0, 1)] == ["2\n", "2\n"], finished.stderr
    assert finished.stderr.count("error: cannot write") == 1


# --- several processes -----------------------------------------------------------------------------------------------


RECORD_GRADIENTS = """
import sys
import torch
import distill

step, clip = distill.training_step, torch.nn.utils.clip_grad_norm_

def watched_step(*args):
    assert not getattr(args[0], "will_sync_module_buffers", bool)(), "DDP sends constants"
    return step(*args)

def recording_clip(*args):
    with open(distill.parse_args(sys.argv[1:]).output_dir + "/norms", "a") as file:
        print(clip(*args).item(), file=file)

distill.training_step, torch.nn.utils.clip_grad_norm_ = watched_step, recording_clip
distill.main()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_train_like_one(command, tmp_path, ranks):
    script = tmp_path / "record.py"
    script.write_text(RECORD_GRADIENTS)
    one, two = command("one"), command("several")
    for arguments, processes in ((one, 1), (two, ranks)):
        finished = start(arguments, torchrun=processes, script=str(script), PYTHONPATH=ROOT)
        assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    assert len(re.findall("eval accuracy", finished.stdout)) == 1 + 3 + 1  # one rank speaks: teacher, epochs, table
    assert nearly_same_weights(output_of(one), output_of(two))
    assert results(output_of(two))["processes"] == ranks
    # Exactly the same evaluation: the same batches, each computed by one rank.
    teacher, its = results(output_of(one))["teacher"], results(output_of(two))["teacher"]
    assert teacher == its
    # Adam would hide a gradient of the wrong size, so compare the gradients too. Every rank records.
    norms = [[float(line) for line in open(f"{output_of(words)}/norms")] for words in (one, two)]
    assert len(norms[0]) == 21 and norms[0] == pytest.approx(norms[1][::ranks], rel=1e-3)
    losses = [[row["loss"] for row in metrics(output_of(words)) if "loss" in row] for words in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_on_gpus_each_kind_of_tensor_has_its_backend(monkeypatch):
    """Rank 0's answers are CPU tensors, the gradients lie on the GPU."""
    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend=None, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setenv("RANK", "0")
    with distill.process_group(torch.device("cuda")):
        pass
    backends = torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend(asked[0] or "undefined"))
    assert backends.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_too_few_gpus_are_told_before_any_process_connects(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 processes on this machine, but 1 GPUs: lower --nproc_per_node" in refused([], capsys)


def test_little_work_for_each_gpu_is_noted(command, capsys, monkeypatch):
    args = distill.parse_args(command("run", batch_size=130))
    noted = []
    with distill.process_group(torch.device("cpu")):
        for world_size, device in ((2, "cuda"), (3, "cuda"), (3, "cpu")):
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda size=world_size: size)
            distill.check_before_start(args, torch.device(device))
            noted.append("note: with 43 examples per step, each GPU" in capsys.readouterr().out)
        monkeypatch.undo()
    assert noted == [False, True, False]


WAIT_FOR_RANK_0 = """
import datetime, sys, time
import torch
import torch.distributed as dist
import distill

init = dist.init_process_group
dist.init_process_group = lambda backend: init(backend, timeout=datetime.timedelta(seconds=3))
with distill.process_group(torch.device("cpu")):
    assert distill.from_rank0(lambda: time.sleep(6) or "downloaded", timeout=distill.DOWNLOADS) == "downloaded"
    print("waited")
    distill.from_rank0(lambda: time.sleep(6))
"""


def test_only_downloads_are_waited_for_longer_than_torch_does(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(WAIT_FOR_RANK_0)
    finished = start([], torchrun=2, script=str(script), PYTHONPATH=ROOT)
    assert finished.returncode != 0 and finished.stdout.count("waited") == 2, finished.stderr
    assert "imed out" in finished.stderr  # Gloo: "Timed out waiting 3000ms for recv operation to complete"


def test_ranks_must_all_have_work(command, capsys, tmp_path):
    finished = start(command("run", batch_size=1), torchrun=2)
    assert finished.returncode != 0
    errors = [line for line in finished.stderr.splitlines() if "error: batches of 1 examples" in line]
    assert len(errors) == 1, finished.stderr


def test_two_ranks_continue_where_they_were_killed(command, save_tiny, tmp_path):
    flags = {"teacher_id": save_tiny("dropout", hidden_dropout_prob=0.1), "student_id": "teacher", "save_steps": 2}
    undisturbed, arguments = command("undisturbed", **flags), command("killed", **flags)
    assert start(undisturbed, torchrun=2).returncode == 0
    script = tmp_path / "die.py"
    script.write_text(DIE.replace("MOMENT", 'if os.environ["RANK"] == "1":\n    at_call("training_step", distill, 11)'))
    assert start(arguments, torchrun=2, script=str(script), PYTHONPATH=ROOT).returncode != 0
    again = start(arguments, torchrun=2)
    assert again.returncode == 0 and "checkpoint.pt: step 10" in again.stdout
    assert same_weights(output_of(undisturbed), output_of(arguments))


# --- text without labels ---------------------------------------------------------------------------------------------


@pytest.fixture
def more_text(tmp_path, reviews):
    """A text file of 60 sentences that are in no split."""
    path = tmp_path / "more.txt"
    path.write_text("".join(f"{text}\n" for text, _ in reviews[200:260]), encoding="utf-8")
    return str(path)


def test_unlabeled_text_teaches_through_the_teacher_alone(command, write_csv, reviews, more_text, capsys):
    """With alpha 0 it must be as good as labelled text; then with labels of which none may be looked at."""
    unlabeled = run(command("unlabeled", unlabeled_id=more_text, alpha=0.0))
    assert "unlabeled: 60 examples; left out: 0 also in eval or test, 0 empty" in capsys.readouterr().out
    assert results(unlabeled)["examples"] == {"train": 101, "eval": 53, "test": 29, "unlabeled": 60}
    wrong = write_csv("wrong.csv", [(text, 1 - label) for text, label in reviews[200:260]])
    half = [run(command(f"half{i}", unlabeled_id=path)) for i, path in enumerate((more_text, wrong))]
    assert same_weights(*half)
    names = ("negative", "positive")
    write_csv("reviews/train.csv", [(text, names[label]) for text, label in reviews[:101] + reviews[200:260]])
    assert same_weights(unlabeled, run(command("labelled", alpha=0.0)))
    assert not nearly_same_weights(half[0], run(command("labelled_half")))


def test_unlabeled_text_is_mixed_with_labelled_in_every_epoch(command, more_text, monkeypatch):
    step, counts = distill.training_step, []

    def watched_step(*args):
        labels, example_count = args[4], args[6]
        counts.append({"labelled": int((labels != distill.NO_LABEL).sum()), "examples": example_count})
        return step(*args)

    monkeypatch.setattr(distill, "training_step", watched_step)
    run(command("run", unlabeled_id=more_text))
    epochs = [counts[i : i + 11] for i in (0, 11, 22)]  # 161 examples in batches of 15 or less
    for epoch in epochs:
        labelled = [batch["labelled"] for batch in epoch]
        assert sum(labelled) == 101 and sum(batch["examples"] for batch in epoch) == 161
        assert min(labelled) > 0 and sum(batch["labelled"] < batch["examples"] for batch in epoch) >= 10
    assert len(counts) == 33 and epochs[0] != epochs[1]


def test_a_teacher_learns_from_labelled_text_alone(command, more_text, capsys):
    flags = {"teacher_epochs": 2, "epochs": 1}
    plain, mixed = run(command("plain", **flags)), run(command("mixed", unlabeled_id=more_text, **flags))
    assert same_weights(f"{plain}/teacher", f"{mixed}/teacher")
    capsys.readouterr()
    run(command("plain", unlabeled_id=more_text, **flags))
    assert "teacher: fine-tuned already" in capsys.readouterr().out


def test_unlabeled_text_needs_a_teacher(command, more_text, capsys):
    assert "need --unlabeled_id" in refused(command("run", unlabeled_split="test"), capsys)
    assert "leaves the teacher out" in refused(command("run", unlabeled_id=more_text, alpha=1.0), capsys)


# --- search ----------------------------------------------------------------------------------------------------------


def trials_of(folder):
    """The trials in results.json, without their seconds, and the best one's number."""
    found = results(folder)["search"]
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in found["trials"]], found["ranking"][0]


HYPERPARAMETERS = ("epochs", "learning_rate", "alpha", "temperature")


def alone(command, output, trial):
    """Run what a trial ran, as a command of its own."""
    return run(command(output, **{name: trial[name] for name in HYPERPARAMETERS}))


def test_a_search_finds_what_its_best_trial_found(command, monkeypatch, capsys):
    predictions, predict = [], distill.predict
    monkeypatch.setattr(distill, "predict", lambda *args: predictions.append((args[3], len(args[1]))) or predict(*args))
    losses, train = {}, distill.train

    def recording_train(args, stage, *rest, **others):
        progress = train(args, stage, *rest, **others)
        losses[stage] = progress.best["scores"]["loss"]
        return progress

    monkeypatch.setattr(distill, "train", recording_train)
    folder = run(command("search", n_trials=7, alpha=1.0))  # the flag is not what the search goes by
    out = capsys.readouterr().out
    assert [name for name, _ in predictions if "teacher" in name] == [
        "teacher labels train", "teacher labels eval", "teacher labels test",
    ]  # fmt: skip
    assert predictions.count(("evaluating", 29)) == 1  # test is scored once, for the best trial alone

    trials, best = trials_of(folder)
    assert len(trials) == 7
    complete = [trial for trial in trials if trial["state"] == "complete"]
    assert trials[best]["eval_accuracy"] == max(trial["eval_accuracy"] for trial in complete)
    assert all(len(trial["eval_accuracy_by_epoch"]) == trial["epochs"] for trial in complete)
    assert all(len(trial["eval_accuracy_by_epoch"]) < trial["epochs"] for trial in trials if trial not in complete)
    for trial in trials:
        assert 2 <= trial["epochs"] <= 10 and 1e-5 <= trial["learning_rate"] <= 1e-3
        assert 0 <= trial["alpha"] <= 1 and 2 <= trial["temperature"] <= 30
    assert len({trial["learning_rate"] for trial in trials}) == 7
    assert os.listdir(f"{folder}/trials") == [str(best)]

    table = out[out.index("        trial ") :].splitlines()
    assert len(table[1].split()) == 6 and table[1].split()[0] == str(best)
    importances = results(folder)["search"]["importances"]
    assert importances.keys() == set(HYPERPARAMETERS) and sum(importances.values()) == pytest.approx(1)

    saved = results(folder)
    assert {name: saved["arguments"][name] for name in HYPERPARAMETERS} == {
        name: trials[best][name] for name in HYPERPARAMETERS
    }
    by_itself = alone(command, "alone", trials[best])
    assert same_weights(folder, by_itself) and metrics(folder) == metrics(by_itself)
    assert saved["student"].keys() == results(by_itself)["student"].keys()
    assert saved["student"]["test_accuracy"] == results(by_itself)["student"]["test_accuracy"]
    last = max(i for i, trial in enumerate(trials) if trial["state"] == "complete")  # it had others before it
    rows = metrics(alone(command, "last", trials[last]))
    assert [row["eval_accuracy"] for row in rows if "eval_accuracy" in row] == trials[last]["eval_accuracy_by_epoch"]
    assert losses["student"] == pytest.approx(losses[f"trial {last}"], rel=1e-6)

    # The same command finds its work done; with more trials it goes on; another command is refused.
    arguments = command("search", n_trials=8)
    capsys.readouterr()
    run(arguments)
    longer, _ = trials_of(folder)
    assert "continuing the search" in capsys.readouterr().out
    assert longer[:7] == trials and len(longer) == 8 and longer[7]["learning_rate"] not in {
        trial["learning_rate"] for trial in trials
    }  # fmt: skip
    assert "seed was 33, is 34" in refused(command("search", n_trials=8, seed=34), capsys)


def test_a_trial_below_the_median_is_stopped(command, monkeypatch, capsys):
    """Each trial is worse than the one before it: the sixth has five others to be compared with."""
    run_trial, numbers = distill.run_trial, []
    monkeypatch.setattr(
        distill, "run_trial", lambda args, trial, *rest: numbers.append(trial.number) or run_trial(args, trial, *rest)
    )
    monkeypatch.setattr(distill, "training_step", lambda *args: torch.zeros(3))
    monkeypatch.setattr(
        distill,
        "evaluate",
        lambda *args: {"accuracy": 0.9 - 0.1 * numbers[-1], "macro_f1": 0.5, "loss": 1.0, "agreement": 0.5},
    )
    trials, best = trials_of(run(command("run", n_trials=6)))
    assert [trial["state"] for trial in trials] == ["complete"] * 5 + ["pruned"] and best == 0
    assert [len(trial["eval_accuracy_by_epoch"]) for trial in trials] == [*(t["epochs"] for t in trials[:5]), 1]
    assert trials[5]["epochs"] > 1 and "trial 5: stopped, below the median" in capsys.readouterr().out


def test_failed_trials_are_told_and_made_up_for(command, monkeypatch, capsys):
    train, calls = distill.train, []

    def failing_train(*args, **flags):
        calls.append(1)
        if len(calls) in failing:
            raise distill.LossNotFinite("the loss is not finite")
        return train(*args, **flags)

    monkeypatch.setattr(distill, "train", failing_train)
    failing = {1}
    trials, _ = trials_of(run(command("some", n_trials=2)))
    assert [trial["state"] for trial in trials] == ["failed", "complete"]
    said = capsys.readouterr()
    assert "trial 0: failed: the loss is not finite" in said.out and said.err == ""
    trials, _ = trials_of(run(command("some", n_trials=2)))
    assert [trial["state"] for trial in trials] == ["failed", "complete", "complete"]
    failing = range(100)
    assert "no trial has run to its end" in refused(command("all", n_trials=2), capsys)


def test_a_search_on_a_full_disk(command, monkeypatch, capsys):
    suggest = distill.suggest
    arguments = command("run", n_trials=1)
    with contextlib.ExitStack() as limit, monkeypatch.context() as patched:
        patched.setattr(distill, "suggest", lambda trial: limit.enter_context(file_size_limit(10)) or suggest(trial))
        line = refused(arguments, capsys)
    assert f"cannot write {output_of(arguments)}/study.journal: File too large; " in line
    trials, _ = trials_of(run(arguments))
    assert [trial["state"] for trial in trials] == ["failed", "complete"]


def test_a_trial_that_ends_meanwhile_is_not_deleted(tmp_path):
    """Another process may end a better trial between two looks at the study."""
    optuna = distill.import_optuna()

    def trial(number, accuracy):
        trial = optuna.trial.create_trial(value=accuracy, user_attrs={"loss": 1.0})
        trial.number = number
        (tmp_path / "trials" / str(number)).mkdir(parents=True)
        return trial

    trials, looks = [trial(0, 0.6), trial(1, 0.5), trial(2, 0.7)], []

    class Study:
        @property
        def trials(self):
            looks.append(1)
            return trials[: len(looks) + 1]

    distill.keep_best(distill.parse_args(["--checkpoint_dir", str(tmp_path)]), Study())
    assert sorted(os.listdir(tmp_path / "trials")) == ["0", "2"]


def test_a_killed_search_goes_on(command, capsys, monkeypatch):
    arguments = command("search", n_trials=3)
    # In the third trial: the first two have at most 20 epochs of 7 steps.
    killed = start(arguments, DIE.replace("MOMENT", 'at_call("train", distill, 3)'))
    assert killed.returncode == -signal.SIGKILL
    journal = f"{output_of(arguments)}/study.journal"
    os.symlink(journal, f"{journal}.lock")  # as if it had been killed while it wrote
    with open(journal, "a") as file:
        file.write('{"op_code": 6, "wor')
    open_study, locked = distill.open_study, []
    monkeypatch.setattr(
        distill,
        "open_study",
        lambda path, **flags: locked.append(os.path.lexists(path + ".lock")) or open_study(path, **flags),
    )
    trials, best = trials_of(run(arguments))
    assert not any(locked)  # else Optuna would wait for half a minute
    assert [trial["state"] for trial in trials] == ["complete", "complete", "failed", "complete"]
    assert os.listdir(f"{output_of(arguments)}/trials") == [str(best)]
    assert same_weights(output_of(arguments), alone(command, "alone", trials[best]))
    os.remove(f"{output_of(arguments)}/trials/{best}/config.json")
    assert "the best trial's student is missing from" in refused(arguments, capsys)
    with open(journal, "w") as file:
        file.write("no journal\n")
    assert "study.journal is damaged" in refused(arguments, capsys)


def test_each_rank_takes_trials(command, tmp_path):
    """Two ranks; one of them is killed in its second trial; the same command then ends the search."""
    script = tmp_path / "record.py"
    script.write_text("""
import os, signal, sys
import distill

train, calls = distill.train, []

def recording_train(args, *others, **flags):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2 and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    progress = train(args, *others, **flags)
    with open(f"{args.checkpoint_dir}/ranks", "a") as file:
        file.write(os.environ["RANK"])
    return progress

distill.train = recording_train
distill.main()
""")
    arguments = command("search", n_trials=6)
    assert start(arguments, torchrun=2, script=str(script), PYTHONPATH=ROOT, KILL="1").returncode != 0
    again = start(arguments, torchrun=2, script=str(script), PYTHONPATH=ROOT)
    assert again.returncode == 0, again.stderr
    folder = output_of(arguments)
    trials, best = trials_of(folder)
    states = [trial["state"] for trial in trials]
    assert states.count("failed") in (1, 2) and len(states) - states.count("failed") == 6
    with open(f"{folder}/ranks") as file:
        assert set(file.read()) == {"0", "1"}
    assert os.listdir(f"{folder}/trials") == [str(best)]
    assert same_weights(folder, alone(command, "alone", trials[best]))
    assert again.stdout.count("importance: ") == 1 and results(folder)["processes"] == 2


def test_a_search_needs_optuna_the_cache_and_one_machine(command, monkeypatch, capsys):
    assert "leave out --cache_teacher false" in refused(command("run", n_trials=2, cache_teacher="false"), capsys)
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "4")  # of which none is said to run on this machine
        assert "runs on one machine" in refused(command("run", n_trials=2), capsys)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install optuna" in refused(command("run", n_trials=2), capsys)
