# What all scripts here share. Sourced, not run, where COHORT is the folder of the repository. What a site has to set comes
# first; each can also be set in the environment of sbatch. Nodes, GPUs and times stand in the #SBATCH lines at the top of
# each script.

TORCHRUN=${TORCHRUN:-$COHORT/.venv/bin/torchrun}           # as `make setup` installs it, or the one in the container
PYTHON=${PYTHON:-$COHORT/.venv/bin/python}                 # of the machine that submits, for submit.sh
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # one a GPU
CONTAINER=${CONTAINER:-}                                   # an image for pyxis/enroot; empty: none
MOUNTS=${MOUNTS:-}                                         # what the container sees besides ours and where the job runs: /data:/data

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# export NCCL_SOCKET_IFNAME=ib0                            # the network of the nodes, where NCCL does not find it itself

# Seconds between the signal that ends a run and SIGKILL: more than an evaluation and writing a checkpoint take together.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
# Workers that torchrun restarts would otherwise be given the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torch warns with pages of C++ frames when one agent leaves before another.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# name_of CONFIG SEED: of a run of an array, FOLDER-CONFIG-seedN, in letters that a name may have.
name_of() {
  local path name
  path=$(realpath -- "$1")
  path=${path%.*}
  name=$(basename "$(dirname "$path")")-$(basename "$path")-seed$2
  name=${name//[^A-Za-z0-9_.-]/_}
  while [[ $name == [^A-Za-z0-9]* ]]; do name=${name:1}; done
  echo "$name"
}

# torchrun_on_all_nodes OPTIONS SCRIPT ARGUMENTS: becomes srun of one torchrun a node, with one rank a GPU. What the first
# rank of a node prints goes to the job's log, what each rank prints to a file in $LOGS/NODE.
torchrun_on_all_nodes() {
  # The address that Slurm itself uses for the first node: names of nodes need not be known to DNS.
  local first address mounts=$COHORT:$COHORT container=()
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  [[ $PWD == "$COHORT" ]] || mounts+=,$PWD:$PWD
  [ -z "$CONTAINER" ] || container=(--container-image="$CONTAINER" --container-mounts="$mounts${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")
  export TORCHRUN RANKS_PER_NODE LOGS ENDPOINT="$address:$((15000 + SLURM_JOB_ID % 20000))"
  # srun signals every process of a step. SIGUSR1 is for the ranks; torchrun would die of it.
  exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}" bash -c '
    trap "" USR1
    exec "$TORCHRUN" --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
      --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$ENDPOINT" \
      --log-dir="$LOGS/$SLURMD_NODENAME" --redirects=3 --tee=0:3 "$@"' torchrun "$@"
}
