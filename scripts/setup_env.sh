# Sourced by run_train.sh and scripts/test.sh: sets PYTHON to an interpreter that has what we need.
#
# An activated environment that already has the dependencies is used as it is. Otherwise .venv in the
# repository is made and filled from pyproject.toml, with the versions of constraints.txt; a stamp lets
# later calls skip this until one of the two files changes. EXTRAS names optional dependencies (test).

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

has_dependencies() { # interpreter
  "$1" "$repo/scripts/check_dependencies.py" "$repo/pyproject.toml" ${EXTRAS:-}
}

newest_python() {
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "run_train.sh and scripts/test.sh need Python 3.11 or newer with venv; none was found in PATH:" \
    "install one (Debian: apt-get install python3 python3-venv)." >&2
  return 2
}

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && has_dependencies python 2>/dev/null; then
  PYTHON=python
else
  PYTHON=$repo/.venv/bin/python
  stamp=$repo/.venv/installed-$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum | tr ' ' -)${EXTRAS:+-$EXTRAS}
  if [ ! -e "$stamp" ]; then
    echo "Setting up $repo/.venv (a few minutes, once) ..." >&2
    base=$(newest_python) || exit 2
    [ -x "$PYTHON" ] || "$base" -m venv "$repo/.venv"
    # torch by itself first: with it there, nothing else asks the index for another build of it.
    "$PYTHON" -m pip install --quiet "$(grep '^torch==' "$repo/constraints.txt")"
    "$PYTHON" -m pip install --quiet --constraint "$repo/constraints.txt" \
      --editable "$repo${EXTRAS:+[$EXTRAS]}"
    touch "$stamp"
  fi
fi
