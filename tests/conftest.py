"""Small data sets and models for the tests: real sentences, BERT's real vocabulary, tiny random weights."""

import csv
import json
import os
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForPreTraining

import data

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,  # so that random weights answer different texts differently
}

torch.set_num_threads(1)  # tiny models gain nothing from more, and on a busy machine threads wait for each other


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.demo_model())


@pytest.fixture(scope="session")
def reviews():
    """1,000 of the demo's real sentences with their labels, 0 or 1."""
    split = data.read_demo("dataset")["train"][:1000]
    return list(zip(split["text"], split["label"], strict=True))


@pytest.fixture
def write_csv(tmp_path):
    """write_csv(name, rows, header) -> path, under the test's own folder."""

    def write(name, rows, header=("text", "label")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return str(path)

    return write


@pytest.fixture
def save_tiny(tmp_path, tokenizer):
    """save_tiny(name, ...) -> folder of a tiny classifier with random weights."""

    def save(name, model_type="bert", seed=0, classes=("negative", "positive"), tokenizer=tokenizer, **changes):
        folder = str(tmp_path / name)
        config = AutoConfig.for_model(model_type, **{**TINY, "vocab_size": len(tokenizer), **changes})
        config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def reviews_folder(write_csv, reviews):
    """A data set folder: 101 training, 53 validation and 29 test sentences, numbers that divide by nothing."""
    names = ("negative", "positive")
    rows = [(text, names[label]) for text, label in reviews]
    write_csv("reviews/train.csv", rows[:101])
    write_csv("reviews/validation.csv", rows[101:154])
    return os.path.dirname(write_csv("reviews/test.csv", rows[154:183]))


@pytest.fixture
def old_repository():
    """google/bert_uncased_L-2_H-128_A-2 as it is: config.json without model_type, vocab.txt, pytorch_model.bin."""

    def make(folder):
        os.makedirs(folder)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = BertConfig(
            **{name: TINY[name] for name in sizes}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = BertForPreTraining(config)
        torch.save(model.state_dict(), os.path.join(folder, "pytorch_model.bin"))
        written = {**config.to_diff_dict(), "vocab_size": config.vocab_size}
        for name in ("model_type", "transformers_version", "architectures", "dtype"):
            written.pop(name, None)
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(written, file)
        shutil.copyfile(f"{data.demo_model()}/vocab.txt", f"{folder}/vocab.txt")
        return model

    return make
