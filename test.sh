#!/usr/bin/env bash
# The whole test suite; CI runs it too. Extra arguments go to pytest: bash test.sh -k papermill
# Every step runs, the exit code is that of the first that failed, and pytest's closing line comes last.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-$(command -v python || command -v python3)}
PATH="$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"  # this Python's own commands
command -v nbdev_test ruff mypy pytest >/dev/null && "$python" -c 'import nbdev, pytest' 2>/dev/null ||
  { echo "the tools are missing: pip install -e '.[dev]' -c constraints.txt" >&2; exit 2; }

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # test this checkout, whichever one is installed
export OMP_NUM_THREADS=1                             # two workers, one thread each
export MPLBACKEND=Agg PYDEVD_DISABLE_FILE_VALIDATION=1

status=0
step() {  # name, command...
  printf '\n== %s, %d s\n' "$1" "$SECONDS"; shift
  "$@"; local code=$?
  if ((code)); then echo "-- failed with exit code $code"; fi
  if ((status == 0)); then status=$code; fi
}

types=$(mktemp)
trap 'rm -f "$types"' EXIT
mypy >"$types" 2>&1 &  # beside what needs one core
mypy=$!
finished() { wait "$mypy"; local code=$?; cat "$types"; return "$code"; }

step "ruff" ruff check .
if (($# == 0)); then
  step "sliders in a browser, the short form" "$python" -m pytest -n 0 -m 'browser and short' tests/browser
fi
step "the notebooks' own tests" nbdev_test --n_workers 2 --timing
step "mypy" finished

printf '\n== pytest, %d s\n' "$SECONDS"  # export drift, clean drift and the shape of the pages are tests as well
"$python" -m pytest -n 2 --dist worksteal --durations 15 "$@"
code=$?
exit $((status ? status : code))
