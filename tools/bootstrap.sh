#!/usr/bin/env bash
# Makes VENV (.venv) hold what pyproject.toml asks for, and JAX in the version given by the variable
# of that name. Does nothing, and needs no network, where it already does.
set -euo pipefail
cd "$(dirname "$0")/.."

JAX=${JAX:-0.11.2} # what the kernels are developed and measured with
VENV=${VENV:-.venv}
wanted="jax==$JAX"
constraints=()
if [ "$JAX" = 0.11.2 ]; then
  EXTRAS=${EXTRAS:-cuda13,triton,torch,bench,dev}
  constraints=(--constraint tools/developed_with.txt)
else # the extra cuda13 is bound to the JAX that the kernels ran on
  EXTRAS=${EXTRAS:-triton,torch,bench,dev}
  wanted="jax[cuda13]==$JAX"
fi
UNFINISHED=$VENV/.installing # there while an install runs; left behind by one that was interrupted
python=$VENV/bin/python

holds_all() {
  "$python" tools/check_pins.py --deep --extras "$EXTRAS" --also "$wanted"
}

exec 9>"$VENV.lock" # two makes at once must not install into the same folder
flock 9

if [ -e "$UNFINISHED" ] || ! "$python" -c '' 2>/dev/null; then
  base=$(tools/find_python.sh)
  echo "Creating $VENV with $("$base" --version), $base"
  rm -rf "$VENV"
  mkdir "$VENV" && touch "$UNFINISHED"
  "$base" -m venv "$VENV"
fi

if [ -e "$UNFINISHED" ] || ! holds_all >/dev/null 2>&1; then
  echo "Installing jax-moe[$EXTRAS] and JAX $JAX into $VENV (about 6 GB, minutes the first time)"
  touch "$UNFINISHED"
  quiet=--quiet # a terminal gets pip's progress bars
  [ -t 1 ] && quiet=
  "$python" -m pip install $quiet --disable-pip-version-check "${constraints[@]}" \
    --editable ".[$EXTRAS]" "$wanted"
  holds_all
  rm "$UNFINISHED"
fi
touch "$VENV/.ready"
