#!/usr/bin/env bash
# Train on this machine, or on several: called once on each. Sets itself up on the first call.
#
#   NGPU         processes (default: every GPU; without a GPU, 2)
#   CONFIG_FILE  TOML file (default: train_configs/debug_model.toml)
#   LOG_RANK     ranks whose output is shown, such as 0,1 (default: 0)
#   MAX_RESTARTS times that a failed run begins anew by itself, from its newest checkpoint (default: 0)
#   STOP_CODE    exit code of a run that SIGTERM or SIGUSR1 has ended, for schedulers that start it again (default: 0)
#   COMM_MODE    fake_backend: a dry run of rank 0 of NGPU in one process, without any communication
#   NNODES       machines, the nodes of the run (default: 1); with several, the same on each (docs/cluster.md):
#     NODE_RANK      number of this machine, from 0
#     MASTER_ADDR    name or address of machine 0
#     MASTER_PORT    a free port there (default: 29500)
#     NODES_TIMEOUT  seconds to wait for the last machine (default: 600)
#     NODE_NAMES     names by number, with blanks between, for messages about machines that never came (default: none)
#   arguments    overrides of the TOML, such as --training.steps 20; --help lists them
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$repo/scripts/setup_env.sh"

refuse() { # sentence
  echo "$1" >&2
  exit 2
}
[[ ${1:-} = -* || ${1:-} != *.toml ]] || refuse "'$1' is not an option; name a settings file so: CONFIG_FILE=$1 ./run_train.sh"
[[ ${NGPU:-1} =~ ^[1-9][0-9]{0,5}$ ]] ||
  refuse "NGPU is '$NGPU': it is the number of processes, from 1; leave it out for one a GPU (without a GPU, 2)."
[[ ${LOG_RANK:=0} =~ ^[0-9]+(,[0-9]+)*$ ]] ||
  refuse "LOG_RANK is '$LOG_RANK': it lists the ranks whose output is shown, such as 0 or 0,1."
[[ ${MAX_RESTARTS:=0} =~ ^[0-9]{1,6}$ ]] ||
  refuse "MAX_RESTARTS is '$MAX_RESTARTS': it is how often a failed run begins anew by itself, from 0."
[[ ${COMM_MODE:-fake_backend} = fake_backend ]] ||
  refuse "COMM_MODE is '$COMM_MODE': the only mode is fake_backend; leave it out to train."
[[ ${STOP_CODE:=0} =~ ^[0-9]{1,2}$ ]] ||
  refuse "STOP_CODE is '$STOP_CODE': it is the exit code of a run that a scheduler's signal has ended, from 0 to 99."
# Kubeflow's operators set torchrun's own variables.
NNODES=${NNODES:-${PET_NNODES:-1}} NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-}}
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}} MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
[[ $NNODES =~ ^[1-9][0-9]{0,5}$ ]] || refuse "NNODES is '$NNODES': it is the number of machines, from 1."
meet=(--standalone)
if [ "$NNODES" -gt 1 ]; then
  if ! [[ $NODE_RANK =~ ^[0-9]{1,6}$ ]] || [ "$NODE_RANK" -ge "$NNODES" ]; then
    refuse "NODE_RANK is '$NODE_RANK': it is the number of this machine, from 0 to $((NNODES - 1)), because NNODES is $NNODES."
  fi
  [ -n "$MASTER_ADDR" ] || refuse "MASTER_ADDR is not set: it is the name or address of machine 0, because NNODES is $NNODES."
  [[ $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ && $MASTER_PORT -le 65535 ]] || refuse "MASTER_PORT is '$MASTER_PORT': it is a free port of machine 0, from 1 to 65535."
  [[ ${NODES_TIMEOUT:=600} =~ ^[1-9][0-9]{0,5}$ ]] ||
    refuse "NODES_TIMEOUT is '$NODES_TIMEOUT': it is how many seconds to wait for the last machine, from 1."
  meet=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --rdzv-backend static --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT" --rdzv-conf "timeout=$NODES_TIMEOUT")
fi

set_up
train=(-m torchtitan.train --job.config_file "${CONFIG_FILE:-$repo/train_configs/debug_model.toml}" "$@")
export LOG_RANK STOP_CODE PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
for argument in "$@"; do
  case $argument in
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      exec "$PYTHON" "${train[@]}"
      ;;
    --version) exec "$PYTHON" "${train[@]}" ;;
  esac
done

# A signal counts from here on. bash takes note of it when its child is done; the launcher listens itself.
ended=
# shellcheck disable=SC2064  # each trap has its own words
for each in TERM:"$STOP_CODE" USR1:"$STOP_CODE" HUP:129 INT:130 QUIT:131; do trap "ended=$each" "${each%:*}"; done
end_if_asked() {
  if [ -z "$ended" ]; then return; fi
  echo "SIG${ended%:*}: the run ends before its first step" >&2
  exit "${ended#*:}"
}

gpus=0
# torch knows best, but its import takes seconds: only a machine with a GPU's driver asks it.
if command -v nvidia-smi rocm-smi >/dev/null || [ -e /dev/nvidia0 ] || [ -e /dev/kfd ]; then
  count='import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); import torch; print(torch.cuda.device_count())'
  gpus=$("$PYTHON" -c "$count") || { end_if_asked; exit 1; }
  [ "$gpus" -gt 0 ] || echo "no GPU visible to this torch: running on CPU" >&2
fi
if [ "$gpus" -gt 0 ]; then
  NGPU=${NGPU:-$gpus}
else
  NGPU=${NGPU:-2}
  # torchrun would give each process one thread; a laptop has more cores than processes.
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
fi
for rank in ${LOG_RANK//,/ }; do
  [ "$rank" -lt "$NGPU" ] || refuse "LOG_RANK is '$LOG_RANK': it lists ranks of this machine, which are 0 to $((NGPU - 1))."
done
# On one machine, whose own name need not resolve to an address, the loopback is right for gloo, which
# runs beside NCCL too. On several the launcher finds the interface.
[ "$NNODES" -gt 1 ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

if [ -n "${COMM_MODE:-}" ]; then
  LOG_RANK=0 RANK=0 LOCAL_RANK=0 WORLD_SIZE=$NGPU exec "$PYTHON" "${train[@]}" --comm.mode "$COMM_MODE"
fi
# A wrong config is told here, in one sentence, before any process meets another; a good one's line
# is for those who asked for it.
check=(env WORLD_SIZE="$((NNODES * NGPU))" LOCAL_WORLD_SIZE="$NGPU" LOG_RANK=0 "$PYTHON" "${train[@]}")
for argument in "$@"; do
  case $argument in --job.check_config | --job.check-config) exec "${check[@]}" ;; esac
done
# On several machines the ranks tell it to those of machines that have another config.
code=0
plural=es
[ "$NGPU" -gt 1 ] || plural=
printf '[titan] %(%H:%M:%S)T I Checking the settings, then starting %s process%s\n' -1 "$NGPU" "$plural" >&2
[ "$NNODES" -gt 1 ] || "${check[@]}" --job.check_config >/dev/null || code=$?
end_if_asked
[ "$code" -eq 0 ] || exit "$code"
exec "$PYTHON" "$repo/scripts/launch.py" "${meet[@]}" --nproc-per-node "$NGPU" --max-restarts "$MAX_RESTARTS" \
  --local-ranks-filter "$LOG_RANK" --role rank --tee 3 "${train[@]}"
