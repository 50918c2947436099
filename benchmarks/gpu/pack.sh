#!/usr/bin/env bash
# Make the folder that iwslt14.sh needs on a GPU machine without a network: bash benchmarks/gpu/pack.sh CORPUS [FOLDER]
#
# CORPUS holds BPE'd train, valid and test with the endings .de and .en. FOLDER (default .gpu) gets the binarised
# corpus, wheels for CPython 3.12 on x86-64 Linux (torch and numpy are expected there) and fairseq's source archive.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ $# -ge 1 && $# -le 2 ]] || fail "give the corpus: bash benchmarks/gpu/pack.sh CORPUS [FOLDER]."
corpus=$(realpath -m "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. benchmarks/gpu/size.sh
folder=${2:-.gpu}
python=${PYTHON:-.venv/bin/python}
fairseq="fairseq-fixed==0.12.3.1"
# What fairseq-train, fairseq-generate and the plugin import beyond torch and numpy, and what those need.
runtime=(hydra-core omegaconf PyYAML bitarray packaging tqdm regex sacrebleu portalocker tabulate colorama lxml
    safetensors sacremoses joblib)
building=(cython setuptools wheel) # only if fairseq's wheel does not load there

for split in train valid test; do
    for language in de en; do
        [[ -f $corpus/$split.$language ]] || fail "$corpus has no $split.$language; give the folder of a BPE'd corpus."
    done
done
"$python" -c 'import fairseq' 2>/dev/null || fail "$python cannot import fairseq; run make setup first, or set PYTHON."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pip() { "$python" -m pip -qq --disable-pip-version-check "$@"; }

pins() { # the versions that make setup installs
    local name
    for name in "$@"; do
        grep -hixE "$name==[^ ]+" requirements/*.txt || fail "requirements/ pins no version of $name."
    done
}

fetch() { # fetch FOLDER REQUIREMENT...: wheels that install on the GPU machine, whatever runs here
    local into=$1 platforms=() tag
    shift
    for tag in _2_28 _2_27 _2_26 _2_24 _2_17 _2_12 _2_5 2014 2010 1; do
        platforms+=(--platform "manylinux${tag}_x86_64")
    done
    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
        --dest "$into" "$@"
}

echo "corpus: binarise and compress"
prefixes=()
for split in train valid test; do prefixes+=("--${split}pref" "$corpus/$split"); done
OMP_NUM_THREADS=1 "$python" -W ignore -m fairseq_cli.preprocess --source-lang de --target-lang en "${prefixes[@]}" \
    --destdir "$work/data-bin" >"$work/preprocess.log" 2>&1 ||
    fail "fairseq-preprocess failed: $(tail -1 "$work/preprocess.log")"
rm -f "$work/data-bin/preprocess.log"
basename "$corpus" >"$work/data-bin/corpus.txt"
mkdir -p "$work/pack/wheels" "$work/pack/build-wheels"
XZ_OPT=-9 tar -C "$work" --owner=0 --group=0 --sort=name -cJf "$work/pack/data-bin.tar.xz" data-bin

echo "wheels: download, and build those that have none"
mapfile -t wanted < <(pins "${runtime[@]}")
[[ ${#wanted[@]} -eq ${#runtime[@]} ]] || exit 1
fetch "$work/pack/wheels" "$fairseq" click "${wanted[@]}"
mapfile -t antlr < <(pins antlr4-python3-runtime)
pip wheel --no-deps --wheel-dir "$work/pack/wheels" "${antlr[@]}"
mapfile -t wanted < <(pins "${building[@]}")
[[ ${#wanted[@]} -eq ${#building[@]} ]] || exit 1
fetch "$work/pack/build-wheels" "${wanted[@]}"
pip download --no-deps --no-build-isolation --no-binary=:all: --dest "$work/pack" "$fairseq"

within_limit "$work/pack" "take a smaller corpus or clean the working tree"
rm -rf "$folder"
mv "$work/pack" "$folder"
echo "wrote $folder"
