#!/bin/bash
# Checks a config for the number of ranks that it will have, and submits it if nothing is wrong with it:
#   slurm/submit.sh CONFIG [--nodes=N] [options of sbatch] [section.key=value ...]       one run
#   slurm/submit.sh CONFIG [CONFIG ...] seeds=0,1,2 [as above]                           an array: each config, each seed
#   slurm/submit.sh CONFIG [CONFIG ...] seeds=own [as above]                             an array: each config as it is
# It may be called from anywhere: logs, runs/ and whatever a config or an override says of files are where one stands.
set -euo pipefail
COHORT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ranks=${RANKS_PER_NODE:-}
. "$COHORT/slurm/site.sh"

configs=() options=() overrides=() seeds=
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,6s/^# //p' "$COHORT/slurm/submit.sh"; exit ;;
    --*=* | -?=*) options+=("$1") ;;
    -*)
      options+=("$1")
      # --nodes 2: what follows is the option's value unless it is something else that we know.
      if (($# > 1)) && [[ $2 != -* && $2 != *.y?(a)ml && ! $2 =~ ^[a-z_0-9.]+= ]]; then options+=("$2"); shift; fi
      ;;
    seeds=*) seeds=$1 ;;
    *=*) overrides+=("$1") ;;
    # One's own config lies where one stands, ours lie here.
    *) if [[ -f $1 || ! -f $COHORT/$1 ]]; then configs+=("$1"); else configs+=("$COHORT/$1"); fi ;;
  esac
  shift
done
((${#configs[@]})) || { echo "usage: slurm/submit.sh CONFIG [--nodes=N] [options of sbatch] [section.key=value ...]" >&2; exit 2; }

script=$COHORT/slurm/train.sbatch arguments=("${configs[@]}" "${overrides[@]}")
if [ -n "$seeds" ] || ((${#configs[@]} > 1)); then
  IFS=, read -ra numbers <<<"${seeds#seeds=}"
  script=$COHORT/slurm/array.sbatch arguments=("${seeds:-seeds=0}" "${arguments[@]}")
  options=("--array=0-$((${#configs[@]} * (${#numbers[@]} ? ${#numbers[@]} : 1) - 1))" "${options[@]}")
  for key in dir name seed; do
    for override in "${overrides[@]}"; do
      [[ $override != "$key="* ]] || { echo "error: $override: each run of an array has its own; expected no $key" >&2; exit 2; }
    done
  done
fi

# value_of NAME LETTER: what sbatch will take for an option, from the command line or the script's own lines.
value_of() {
  local i value
  value=$(sed -n "s/^#SBATCH --$1=//p" "$script")
  for ((i = 0; i < ${#options[@]}; i++)); do
    case ${options[i]} in
      --"$1"=*) value=${options[i]#*=} ;;
      --"$1" | -"$2") value=${options[i + 1]:-} ;;
      -"$2"*) value=${options[i]#-?} ;;
    esac
  done
  echo "$value"
}
gpus=$(value_of gpus-per-node :)
# --gres=gpu:8, gpu:a100:8 or gpu means the same, and comes before the script's own line.
gres=$(value_of gres :)
case $gres in
  *gpu*) gpus=${gres##*gpu}; gpus=${gpus%%,*}; gpus=${gpus%%(*}; gpus=${gpus##*:}; [[ $gpus =~ ^[0-9]+$ ]] || gpus=1 ;;
esac
nodes=$(value_of nodes N)
if [[ ! $nodes =~ ^[0-9]+$ ]]; then
  echo "error: --nodes=$nodes: expected a number of nodes: a run is checked for the ranks that it will have" >&2; exit 2
fi
world=$((nodes * ${ranks:-${gpus##*:}}))
for config in "${configs[@]}"; do
  # As each job of an array will be named, too.
  named=()
  [[ $script == */train.sbatch || $seeds == seeds=own ]] || named=(name="$(name_of "$config" 0)")
  "$PYTHON" "$COHORT/launch/train.py" "$config" "${overrides[@]}" "${named[@]}" --check --ranks "$world" || { echo "not submitted" >&2; exit 2; }
done

# A job finds our files by the folder that it was submitted from, and those of its user by the one that it runs in.
from=$PWD
job=$(cd "$COHORT" && sbatch --parsable --chdir="$from" "${options[@]}" "$script" "${arguments[@]}")
job=${job%%;*}
log=$(value_of output o)
log=${log//%[jA]/$job}
log=${log//%a/*}
echo "job $job is in the queue
  log:     $log
  follow:  tail -F $log
  state:   squeue --job $job
  stop:    scancel --signal=TERM $job    (saves first; scancel $job leaves it 30 s or what the site grants)"
