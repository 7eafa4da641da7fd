#!/usr/bin/env bash
# Train on this machine. Sets itself up on the first call.
#
#   NGPU         processes (default: every GPU; without a GPU, 2)
#   CONFIG_FILE  TOML file (default: train_configs/debug_model.toml)
#   LOG_RANK     ranks whose output is shown, such as 0,1 (default: 0)
#   MAX_RESTARTS times that a failed run begins anew by itself, from its newest checkpoint (default: 0)
#   COMM_MODE    fake_backend: a dry run of rank 0 of NGPU in one process, without any communication
#   arguments    overrides of the TOML, such as --training.steps 20; --help lists them
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$repo/scripts/setup_env.sh"

refuse() { # sentence
  echo "$1" >&2
  exit 2
}
[[ ${NGPU:-1} =~ ^[1-9][0-9]{0,5}$ ]] ||
  refuse "NGPU is '$NGPU': it is the number of processes, from 1; leave it out for one a GPU (without a GPU, 2)."
[[ ${LOG_RANK:=0} =~ ^[0-9]+(,[0-9]+)*$ ]] ||
  refuse "LOG_RANK is '$LOG_RANK': it lists the ranks whose output is shown, such as 0 or 0,1."
[[ ${MAX_RESTARTS:=0} =~ ^[0-9]{1,6}$ ]] ||
  refuse "MAX_RESTARTS is '$MAX_RESTARTS': it is how often a failed run begins anew by itself, from 0."
[[ ${COMM_MODE:-fake_backend} = fake_backend ]] ||
  refuse "COMM_MODE is '$COMM_MODE': the only mode is fake_backend; leave it out to train."

set_up
train=(-m torchtitan.train --job.config_file "${CONFIG_FILE:-$repo/train_configs/debug_model.toml}" "$@")
export LOG_RANK PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
for argument in "$@"; do
  case $argument in -h | --help | --version) exec "$PYTHON" "${train[@]}" ;; esac
done

# A signal counts from here on. bash takes note of it when its child is done; the launcher listens itself.
ended=
for each in TERM:0 USR1:0 HUP:129 INT:130 QUIT:131; do trap "ended=$each" "${each%:*}"; done
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
# All processes are on this machine, whose own name need not resolve to an address; gloo runs
# beside NCCL too.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

if [ -n "${COMM_MODE:-}" ]; then
  LOG_RANK=0 RANK=0 LOCAL_RANK=0 WORLD_SIZE=$NGPU exec "$PYTHON" "${train[@]}" --comm.mode "$COMM_MODE"
fi
# A wrong config is told here, in one sentence, before any process meets another; a good one's line
# is for those who asked for it.
check=(env WORLD_SIZE="$NGPU" LOCAL_WORLD_SIZE="$NGPU" LOG_RANK=0 "$PYTHON" "${train[@]}")
for argument in "$@"; do
  case $argument in --job.check_config | --job.check-config) exec "${check[@]}" ;; esac
done
"${check[@]}" --job.check_config >/dev/null || exit
end_if_asked
exec "$PYTHON" "$repo/scripts/launch.py" --standalone --nproc-per-node "$NGPU" --max-restarts "$MAX_RESTARTS" \
  --local-ranks-filter "$LOG_RANK" --role rank --tee 3 "${train[@]}"
