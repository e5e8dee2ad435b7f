#!/usr/bin/env bash
# Makes .venv hold what pyproject.toml asks for. Does nothing, and needs no network, where it already does.
set -euo pipefail
cd "$(dirname "$0")/.."

EXTRAS=${EXTRAS:-cuda13,triton,torch,dev}
UNFINISHED=.venv/.installing # there while an install runs; left behind by one that was interrupted
python=.venv/bin/python

exec 9>.venv.lock # two makes at once must not install into the same folder
flock 9

if [ -e "$UNFINISHED" ] || ! "$python" -c '' 2>/dev/null; then
  base=$(tools/find_python.sh)
  echo "Creating .venv with $("$base" --version), $base"
  rm -rf .venv
  mkdir .venv && touch "$UNFINISHED"
  "$base" -m venv .venv
fi

if [ -e "$UNFINISHED" ] || ! "$python" tools/check_pins.py --deep --extras "$EXTRAS" >/dev/null 2>&1; then
  echo "Installing jax-moe[$EXTRAS] into .venv (about 6 GB, minutes the first time)"
  touch "$UNFINISHED"
  quiet=--quiet # a terminal gets pip's progress bars
  [ -t 1 ] && quiet=
  "$python" -m pip install $quiet --disable-pip-version-check --editable ".[$EXTRAS]"
  "$python" tools/check_pins.py --deep --extras "$EXTRAS"
  rm "$UNFINISHED"
fi
touch .venv/.ready
