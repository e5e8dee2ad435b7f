#!/usr/bin/env bash
# Runs the GPU tests with the first interpreter that holds the pinned packages: the current one, else .venv.
# Installs and downloads nothing. Usage: tools/gpu_tests.sh RESULTS_FOLDER [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

for python in ${PYTHON:-python3 python} .venv/bin/python; do
  if "$python" tools/check_pins.py --extras triton,torch >/dev/null 2>&1; then
    exec "$python" -m tools.gpu_tests "$@"
  fi
done

echo "no interpreter here holds the packages that the GPU tests need; this is what ${PYTHON:-python3} lacks:" >&2
"${PYTHON:-python3}" tools/check_pins.py --extras triton,torch >&2 || true
exit 2
