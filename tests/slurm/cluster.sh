#!/bin/bash
# A real Slurm of two virtual nodes on this machine, for tests: one munged, one slurmctld and a slurmd for each node, on
# loopback, without systemd, cgroups or accounting. For Debian and Ubuntu, as root; installs slurm-wlm and munge if absent.
#   tests/slurm/cluster.sh run COMMAND ...     starts it, runs a command with SLURM_CONF set, stops it
#   tests/slurm/cluster.sh up | down
set -euo pipefail
D=${COHORT_SLURM:-${TMPDIR:-/tmp}/cohort-slurm}
export SLURM_CONF=$D/slurm.conf

up() {
  if ! { command -v slurmctld && command -v munged; } >/dev/null; then
    echo "installing Slurm"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update && apt-get -qq install -y --no-install-recommends slurm-wlm munge >/dev/null
  fi
  mkdir -p "$D"/{state,log,run}
  chmod 755 "$D" "$D/run"
  [ -s "$D/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$D/munge.key")
  local host
  host=$(hostname)
  # cred_expire: a job that is requeued waits so long before it starts again.
  cat >"$SLURM_CONF" <<CONF
ClusterName=cohort
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26917
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock,cred_expire=10
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool-%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=600
InactiveLimit=0
MessageTimeout=20
PropagateResourceLimitsExcept=ALL
NodeName=DEFAULT CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=27101
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=27102
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  echo "CgroupPlugin=autodetect" >"$D/cgroup.conf"
  munged --force --key-file="$D/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/run/munge.seed"
  slurmctld -f "$SLURM_CONF" -c
  slurmd -f "$SLURM_CONF" -N n1
  slurmd -f "$SLURM_CONF" -N n2
  for _ in $(seq 100); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" != 2 ] || return 0
    sleep 0.1
  done
  echo "Slurm did not come up within 10 s; its logs are in $D/log" >&2
  return 1
}

down() {
  local file
  scancel --user="$(id -un)" 2>/dev/null || true
  for file in "$D"/run/{slurmd-n1,slurmd-n2,slurmctld,munged}.pid; do
    [ ! -s "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
  done
}

case ${1:-} in
  up) up ;;
  down) down ;;
  run) trap down EXIT; up; shift; "$@" ;;
  *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
