# Sourced by run_train.sh and scripts/test.sh. `set_up [EXTRA,...]` sets PYTHON to an interpreter that
# has what pyproject.toml asks for, with these of its optional dependencies.
#
# The first of these that has torch: the activated environment, .venv in the repository, the python3 of
# PATH. Neither the first nor the last is changed: where it lacks something, a sentence names the pip
# command that adds it. Without any torch, .venv is made. What .venv lacks is installed, in the versions
# of constraints.txt. Nothing is remembered: each call looks at what is there (a tenth of a second), so a
# set-up that was interrupted, or is older than pyproject.toml, mends itself.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

lacking() { # interpreter, extras, [constraints]: prints what it lacks, and fails where that is anything
  "$1" "$repo/scripts/check_dependencies.py" "$repo/pyproject.toml" "${@:2}"
}

set_up() { # [extras]
  local extras=${1:-} activated=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  [ "$activated" -ef "$repo/.venv" ] && activated=
  if [ -n "$activated" ] && use python "$extras" "the activated environment, $activated,"; then return; fi
  PYTHON=$repo/.venv/bin/python
  local own=${extras:+$extras,}report # our own environment also draws the report of a run
  if lacking "$PYTHON" "$own" "$repo/constraints.txt" >/dev/null 2>&1; then return; fi
  if [ -z "$activated" ] && ! has_torch "$PYTHON" && use python3 "$extras" "the python3 of PATH"; then return; fi
  PYTHON=$repo/.venv/bin/python
  fill_venv "$own"
}

# Sets PYTHON to an interpreter that has all, and fails for one without torch. One that has torch and lacks
# something else ends us with the way out: no second torch is fetched beside it.
use() { # interpreter, extras, its name for people
  local lacks
  PYTHON=$1
  if lacks=$(lacking "$1" "$2"); then return; fi
  if ! has_torch "$1"; then
    [ "$1" = python3 ] || echo "$3 has no torch: using .venv" >&2
    return 1
  fi
  case ${lacks:=a Python that runs} in
    Python*) echo "$3 has torch but not $lacks; activate an environment that has both, or one without" \
      "torch to have .venv made." ;;
    *) echo "$3 has torch but lacks ${lacks//$'\n'/, }; run: $1 -m pip install '${lacks//$'\n'/\' \'}'" ;;
  esac >&2
  exit 2
}

has_torch() { # interpreter
  (cd / && "$1" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))') 2>/dev/null
}

fill_venv() { # extras
  local base site info packages log=$repo/.venv/pip.log
  # The machines of a run may share this folder, and would write to it at once.
  if [ "${NNODES:-1}" -gt 1 ]; then
    echo "$repo/.venv lacks packages; run $repo/run_train.sh --help once before a run on several machines" >&2
    exit 2
  fi
  if ! "$PYTHON" -c 'import tomllib' 2>/dev/null || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    base=$(find_python) || exit 2
    echo "Making $repo/.venv" >&2
    "$base" -m venv --clear "$repo/.venv"
  fi
  site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # pip writes RECORD last; where it was interrupted before, it would still take the package for whole.
  for info in "$site"/*.dist-info; do
    [ -e "$info/RECORD" ] || rm -rf "$info"
  done
  mapfile -t packages < <(lacking "$PYTHON" "$1" "$repo/constraints.txt")
  echo "Installing into $repo/.venv (some 1.5 GB, minutes the first time): ${packages[*]}" >&2
  if ! "$PYTHON" -m pip install --retries 1 --constraint "$repo/constraints.txt" "${packages[@]}" \
    2>"$log" | name_packages; then
    echo "pip could not install that: $(reason_in "$log") (all it said: $log)" >&2
    exit 2
  fi
  # The repository itself, as an editable install has it, but without building it: that needs a network.
  echo "$repo" >"$site/torchtitan-moe.pth"
}

name_packages() { # pip's words as it goes: in a terminal, one changing line with the package at hand
  local word name line=
  while read -r word name _; do
    [ -t 2 ] || continue
    case $word in
      Collecting | Downloading | Installing) printf '\r\033[K  %s %.60s' "$word" "${name##*/}" >&2; line=1 ;;
    esac
  done
  [ -z "$line" ] || printf '\r\033[K' >&2
}

reason_in() { # pip's words: prints why it failed, and the way out
  if grep -qE 'NewConnectionError|ProxyError|timed out|name resolution' "$1"; then
    echo "the package index can't be reached; connect this machine to a network, set PIP_INDEX_URL to a" \
      "mirror, or activate an environment that has torch"
  else
    sed -n 's/^ERROR: //p' "$1" | tail -n 1
  fi
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
