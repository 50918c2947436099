"""Small GLUE tasks as their makers ship them: the official TSV files, and the hub's repository of parquet files."""

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

_PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
_MNLI = f"index\tpromptID\tpairID\tgenre\t{_PARSES}\tsentence1\tsentence2"
_MNLI_ROW = "{i}\t31193\t31193n\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\t{a}\t{b}"
_STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
_STSB_ROW = "{i}\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\t{a}\t{b}"
_MRPC = "#1 ID\t#2 ID\t#1 String\t#2 String"
_PAIR = "index\tsentence1\tsentence2"

_COLA = (None, "gj04\t{y}\t\t{a}")
_SST2 = ("sentence\tlabel", "{a}\t{y}")
_MRPC_LABELLED = ("Quality\t" + _MRPC, "{y}\t702876\t702977\t{a}\t{b}")
_STSB_LABELLED = (_STSB + "\tscore", _STSB_ROW + "\t{y}")
_QQP = ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{i}\t213221\t213222\t{a}\t{b}\t{y}")
_QNLI = ("index\tquestion\tsentence\tlabel", "{i}\t{a}\t{b}\t{y}")
_PAIRS = (_PAIR + "\tlabel", "{i}\t{a}\t{b}\t{y}")
_MNLI_DEV = (f"{_MNLI}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label", _MNLI_ROW + "\t-\t-\t-\t-\t-\t{y}")

# By folder and file: the first line and the pattern of the others.
OFFICIAL = {
    "CoLA": {"train": _COLA, "dev": _COLA, "test": ("index\tsentence", "{i}\t{a}")},
    "SST-2": {"train": _SST2, "dev": _SST2, "test": ("index\tsentence", "{i}\t{a}")},
    "MRPC": {
        "train": _MRPC_LABELLED,
        "dev": _MRPC_LABELLED,
        "test": ("index\t" + _MRPC, "{i}\t1089874\t1089925\t{a}\t{b}"),
    },
    "STS-B": {"train": _STSB_LABELLED, "dev": _STSB_LABELLED, "test": (_STSB, _STSB_ROW)},
    "QQP": {"train": _QQP, "dev": _QQP, "test": ("id\tquestion1\tquestion2", "{i}\t{a}\t{b}")},
    "MNLI": {
        "train": (f"{_MNLI}\tlabel1\tgold_label", _MNLI_ROW + "\t-\t{y}"),
        "dev_matched": _MNLI_DEV,
        "dev_mismatched": _MNLI_DEV,
        "test_matched": (_MNLI, _MNLI_ROW),
        "test_mismatched": (_MNLI, _MNLI_ROW),
    },
    "QNLI": {"train": _QNLI, "dev": _QNLI, "test": ("index\tquestion\tsentence", "{i}\t{a}\t{b}")},
    "RTE": {"train": _PAIRS, "dev": _PAIRS, "test": (_PAIR, "{i}\t{a}\t{b}")},
    "WNLI": {"train": _PAIRS, "dev": _PAIRS, "test": (_PAIR, "{i}\t{a}\t{b}")},
}
FOLDERS = list(OFFICIAL)

_BINARY = ["0", "1", "1", "0", "1", "0"]
_RTE = ["entailment", "not_entailment", "not_entailment", "entailment", "not_entailment", "entailment"]
# What the files say, six rows per split.
LABELS = {
    **dict.fromkeys(FOLDERS, _BINARY),
    "STS-B": ["0.000", "5.000", "3.800", "2.500", "1.250", "4.667"],
    "MNLI": ["neutral", "contradiction", "entailment", "entailment", "neutral", "contradiction"],
    "QNLI": _RTE,
    "RTE": _RTE,
}

# By folder: the hub's configuration, its text columns, its classes in its order, and how the files spell those.
HUB = {
    "CoLA": ("cola", ["sentence"], ["unacceptable", "acceptable"], ["0", "1"]),
    "SST-2": ("sst2", ["sentence"], ["negative", "positive"], ["0", "1"]),
    "MRPC": ("mrpc", ["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ["0", "1"]),
    "STS-B": ("stsb", ["sentence1", "sentence2"], None, None),
    "QQP": ("qqp", ["question1", "question2"], ["not_duplicate", "duplicate"], ["0", "1"]),
    "MNLI": ("mnli", ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], None),
    "QNLI": ("qnli", ["question", "sentence"], ["entailment", "not_entailment"], None),
    "RTE": ("rte", ["sentence1", "sentence2"], ["entailment", "not_entailment"], None),
    "WNLI": ("wnli", ["sentence1", "sentence2"], ["not_entailment", "entailment"], ["0", "1"]),
}


def texts(folder: str, stem: str) -> list[tuple[str, str]]:
    """The six pairs of texts of a split: quotes, a line separator and a carriage return within, and no plain ASCII."""
    about = f"w1 {folder} {stem}"
    plain = [(f"{about} w{i} w3 w4", f"w{i + 1} w5") for i in range(3)]
    odd = [
        (f'" {about} " w7', "it 's \"half"),
        (f"{about} über\u2028w2 \x85 w3", "naïve w9"),
        (f"{about} a\rb", "n/a"),
    ]
    return plain + odd


def write_official(data: Path, folder: str) -> Path:
    """Write data/folder/*.tsv and return data/folder."""
    target = data / folder
    target.mkdir(parents=True)
    for stem, (header, pattern) in OFFICIAL[folder].items():
        rows = zip(texts(folder, stem), LABELS[folder], strict=True)
        lines = [pattern.format(i=i, a=a, b=b, y=y) for i, ((a, b), y) in enumerate(rows)]
        lines = lines if header is None else [header, *lines]
        (target / f"{stem}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return target


def hub_table(folder: str, stem: str) -> Dataset:
    """A split as the hub has it: its column names, its order of classes, -1 for an unknown label."""
    _, columns, names, spelled = HUB[folder]
    pairs = texts(folder, stem)
    content = {column: [pair[i] for pair in pairs] for i, column in enumerate(columns)}
    features = {column: Value("string") for column in columns}
    features["label"] = Value("float32") if names is None else ClassLabel(names=names)
    if stem.startswith("test"):
        content["label"] = [-1] * len(pairs)
    elif names is None:
        content["label"] = [float(label) for label in LABELS[folder]]
    else:
        content["label"] = [(spelled or names).index(label) for label in LABELS[folder]]
    # Of labelled rows nobody needs it.
    content["idx"] = [i if stem.startswith("test") else 100 + i for i in range(len(pairs))]
    features["idx"] = Value("int32")
    return Dataset.from_dict(content, features=Features(features))


def hub_name(stem: str) -> str:
    """The hub's name of the split in the file ``stem``."""
    return stem.replace("dev", "validation")


def write_repository(place: Path) -> Path:
    """Write a copy of the hub's repository, with all nine configurations, and return its folder."""
    card = ["---", "configs:"]
    for folder in FOLDERS:
        config = HUB[folder][0]
        (place / config).mkdir(parents=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for stem in OFFICIAL[folder]:
            name = hub_name(stem)
            hub_table(folder, stem).to_parquet(place / config / f"{name}-00000-of-00001.parquet")
            card += [f"  - split: {name}", f"    path: {config}/{name}-*"]
    (place / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return place
