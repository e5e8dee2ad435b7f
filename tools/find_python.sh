#!/usr/bin/env bash
# Prints the path of a Python >= 3.12 that can make virtual environments; 3.12 is preferred, or the
# first of PYTHON_VERSIONS that is there.
# Candidates are executed: a python3.12 on PATH may be a pyenv shim whose version is not selected.
set -euo pipefail

usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
  local version root
  for version in ${PYTHON_VERSIONS:-3.12 3.13 3.14}; do
    type -aP "python$version" || true
    for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
      compgen -G "$root/versions/$version*/bin/python$version" || true
    done
  done
  type -aP python3 python || true
}

if [ -n "${PYTHON:-}" ]; then
  usable "$PYTHON" && exec "$PYTHON" -c 'import sys; print(sys.executable)'
  echo "PYTHON=$PYTHON is not a working Python >= 3.12 with the modules venv and ensurepip" >&2
  exit 1
fi

while read -r candidate; do
  if usable "$candidate"; then
    exec "$candidate" -c 'import sys; print(sys.executable)'
  fi
done < <(candidates)

echo "no working Python >= 3.12 (with venv) found on PATH or under pyenv;" \
  "install one or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
