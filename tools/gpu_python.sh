#!/usr/bin/env bash
# Runs the first Python that holds the packages that the GPU tests need: the current one, else .venv.
# Installs and downloads nothing. Usage: tools/gpu_python.sh -m tools.gpu_tests RESULTS_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."

for python in ${PYTHON:-python3 python} .venv/bin/python; do
  if "$python" tools/check_pins.py --extras triton,torch,bench,test >/dev/null 2>&1; then
    exec "$python" "$@"
  fi
done

echo "no interpreter here holds the packages that the GPU tests need; this is what ${PYTHON:-python3} lacks:" >&2
lacking=$("${PYTHON:-python3}" tools/check_pins.py --extras triton,torch,bench,test 2>&1) || true
echo "${lacking:-everything: it does not run Python}" >&2
exit 2
