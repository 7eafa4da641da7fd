# Sourced by run_train.sh and scripts/test.sh. `set_up [EXTRA,...]` sets PYTHON to an interpreter that
# has what pyproject.toml asks for, with these of its optional dependencies.
#
# An activated environment that has it all is used as it is. Otherwise .venv in the repository is made,
# and what it lacks is installed, in the versions of constraints.txt. Nothing is remembered: each call
# looks at what is there (a tenth of a second), so a set-up that was interrupted, or is older than
# pyproject.toml, mends itself.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

lacking() { # interpreter, extras, [constraints]: prints what it lacks, and fails where that is anything
  "$1" "$repo/scripts/check_dependencies.py" "$repo/pyproject.toml" "${@:2}"
}

set_up() { # [extras]
  local extras=${1:-} lacks activated=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [ -n "$activated" ] && ! [ "$activated" -ef "$repo/.venv" ]; then
    PYTHON=python
    if lacks=$(lacking python "$extras"); then return; fi
    lacks=${lacks:-a Python that runs}
    echo "the activated environment lacks: ${lacks//$'\n'/, }; using .venv (or pip install -e" \
      "'.${extras:+[$extras]}' into yours)" >&2
  fi
  PYTHON=$repo/.venv/bin/python
  if ! lacking "$PYTHON" "$extras" "$repo/constraints.txt" >/dev/null 2>&1; then fill_venv "$extras"; fi
}

fill_venv() { # extras
  local base site info packages
  if ! "$PYTHON" -c 'import tomllib' 2>/dev/null || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    base=$(find_python) || exit 2
    "$base" -m venv --clear "$repo/.venv"
  fi
  site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # pip writes RECORD last; where it was interrupted before, it would still take the package for whole.
  for info in "$site"/*.dist-info; do
    [ -e "$info/RECORD" ] || rm -rf "$info"
  done
  mapfile -t packages < <(lacking "$PYTHON" "$1" "$repo/constraints.txt")
  echo "Installing into $repo/.venv (a few minutes the first time): ${packages[*]}" >&2
  "$PYTHON" -m pip install --quiet --constraint "$repo/constraints.txt" "${packages[@]}"
  # The repository itself, as an editable install has it, but without building it: that needs a network.
  echo "$repo" >"$site/torchtitan-moe.pth"
}

find_python() { # prints the first that is new enough and can make environments
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import ensurepip, tomllib, venv' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "run_train.sh and scripts/test.sh need Python 3.11 or newer with venv; none was found in PATH:" \
    "install one (Debian, Ubuntu: apt-get install python3 python3-venv)." >&2
  return 2
}
