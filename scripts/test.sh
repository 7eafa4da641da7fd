#!/usr/bin/env bash
# Run the tests (no GPU needed; arguments go to pytest). Sets itself up on the first call.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repo/scripts/setup_env.sh"
set_up test
cd "$repo"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if (($# == 0)); then # half a minute, which a single test need not wait for
  "$PYTHON" -m basedpyright --pythonpath "$(command -v "$PYTHON")"
fi
# One thread a process: the suite starts several processes, and tiny tensors gain nothing from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
(($# == 0)) || exec "$PYTHON" -m pytest "$@"
# All tests: those of several processes wait much for each other, so the rest runs beside them. Both
# halves take about as long.
half=(tests/distributed_tests tests/fault_tests/test_nodes.py)
rest=$(mktemp) code=0
trap 'kill %1 2>/dev/null || true; rm -f "$rest"' EXIT
"$PYTHON" -m pytest "${half[@]/#/--ignore=}" >"$rest" 2>&1 &
"$PYTHON" -m pytest "${half[@]}" || code=$?
wait %1 || code=$?
cat "$rest"
exit "$code"
