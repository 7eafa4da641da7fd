#!/usr/bin/env bash
# Train on this machine. Sets itself up on the first call.
#
#   NGPU         processes (default: every GPU; without a GPU, 2)
#   CONFIG_FILE  TOML file (default: train_configs/debug_model.toml)
#   LOG_RANK     ranks whose output is shown, such as 0,1 (default: 0)
#   COMM_MODE    fake_backend: one process plays rank 0 of NGPU, without any communication
#   arguments    overrides of the TOML, such as --training.steps 20
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$repo/scripts/setup_env.sh"

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
if [ "$gpus" -gt 0 ]; then
  NGPU=${NGPU:-$gpus}
else
  NGPU=${NGPU:-2}
  # torchrun would give each process one thread; a laptop has more cores than processes.
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
  # All processes are on this machine; its own name need not resolve to an address.
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi
CONFIG_FILE=${CONFIG_FILE:-$repo/train_configs/debug_model.toml}
train=(-m torchtitan.train --job.config_file "$CONFIG_FILE" "$@")
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

if [ "${COMM_MODE:-}" = fake_backend ]; then
  RANK=0 LOCAL_RANK=0 WORLD_SIZE=$NGPU exec "$PYTHON" "${train[@]}" --comm.mode fake_backend
fi
# A wrong config is told here, in one sentence, before torchrun would wrap it into its own report.
WORLD_SIZE=$NGPU "$PYTHON" "${train[@]}" --job.check_config
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NGPU" \
  --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3 "${train[@]}"
