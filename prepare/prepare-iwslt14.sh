#!/usr/bin/env bash
# IWSLT'14 German-English, tokenised, cleaned and BPE'd, into iwslt14.tokenized.de-en/ of the
# current directory. All options: prepare-iwslt14.sh --help
set -euo pipefail

repo="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    python="$repo/.venv/bin/python"
    [[ -x "$python" ]] || python=python3
fi

# -P: a "prepare" folder in the current directory must not hide this repository's.
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m prepare.iwslt14 "$@"
