#!/usr/bin/env bash
# A real Slurm cluster on one machine, for tests: munge, slurmctld and four slurmd, each node in its own uts, pid and
# mount namespace. No systemd, no cgroups, no database.
#   cluster.sh up | down      start or stop everything; repeating either does no harm
#   cluster.sh crash NODE     the node dies with everything on it, as in a power loss
#   cluster.sh start NODE     bring it back
# All state is under $SLURM_LAB (keep the path short: it holds a socket). Only processes started here are ended, by pid.
# Needs root and the packages munge slurmctld slurmd slurm-client.
set -u -o pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB=${SLURM_LAB:?names the folder for the state of the cluster}
PORT=${SLURM_LAB_PORT:-17000} # slurmctld; the slurmds are on the four after it
NODES=4
export SLURM_CONF=$LAB/etc/slurm.conf
export SLURM_LAB_MARK=$LAB # in the environment of all that is started here: a reused pid is not ours
PATH=$PATH:/usr/sbin:/sbin

log() { printf '[slurm lab] %s\n' "$*" >&2; }
has_mark() { { tr '\0' '\n' <"/proc/$1/environ" | grep -qx "SLURM_LAB_MARK=$LAB"; } 2>/dev/null; }
alive() { [ -n "${1:-}" ] && [ -r "/proc/$1/stat" ] && [ "$(awk '/^State:/{print $2}' "/proc/$1/status" 2>/dev/null)" != Z ]; }
pid_of() { cat "$LAB/pid/$1" 2>/dev/null; }
running() {
    local pid
    pid=$(pid_of "$1")
    alive "$pid" && has_mark "$pid"
}
spawn() { # NAME COMMAND...: a foreground daemon in its own session, its pid recorded
    local name=$1
    shift
    setsid "$@" </dev/null >>"$LAB/log/$name.out" 2>&1 9>&- &
    echo $! >"$LAB/pid/$name"
    disown $! 2>/dev/null || true
}
wait_for() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" </dev/null >/dev/null 2>&1; do
        [ $SECONDS -ge $end ] && { log "timed out: $what"; return 1; }
        sleep 0.05
    done
}
stop_one() { # NAME [SIGNAL]
    local pid tries=100
    pid=$(pid_of "$1")
    [ -n "$pid" ] || return 0
    running "$1" && kill "-${2:-TERM}" "$pid" 2>/dev/null
    while running "$1" && [ $tries -gt 0 ]; do
        sleep 0.05
        tries=$((tries - 1))
    done
    running "$1" && kill -9 "$pid" 2>/dev/null
    rm -f "$LAB/pid/$1"
}
write_conf() {
    cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$LAB/munge.socket,cred_expire=5
StateSaveLocation=$LAB/state
SlurmctldPidFile=$LAB/slurmctld.pid
SlurmdPidFile=$LAB/slurmd.%n.pid
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
PlugStackConfig=$LAB/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
EnforcePartLimits=ALL
MaxArraySize=1001
MinJobAge=86400
KillWait=5
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-$NODES] NodeHostname=node[1-$NODES] NodeAddr=127.0.1.[1-$NODES] Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=2 RealMemory=4000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=node[1-$NODES] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 DefaultTime=10 MaxTime=INFINITE DefMemPerCPU=500 State=UP
PartitionName=high Nodes=node[1-$NODES] Default=NO PriorityTier=10 PreemptMode=OFF DefaultTime=10 MaxTime=INFINITE DefMemPerCPU=500 State=UP
CONF
    cat "$HERE/target.conf" >>"$SLURM_CONF"
    : >"$LAB/etc/plugstack.conf"
    mknod "$LAB/etc/nvidia0" c 1 3 # sets CUDA_VISIBLE_DEVICES, with no device behind it
    echo "NodeName=node[1-$NODES] Name=gpu File=$LAB/etc/nvidia0" >"$LAB/etc/gres.conf"
    { cat /etc/hosts; for ((i = 1; i <= NODES; i++)); do echo "127.0.1.$i node$i"; done; } >"$LAB/etc/hosts"
}
start_node() {
    local node=$1 init
    mkdir -p "$LAB/spool/$node"
    if ! running "$node"; then
        rm -f "$LAB/pid/$node.ready"
        # shellcheck disable=SC2016 # expanded inside the namespace
        spawn "$node" unshare --uts --pid --mount-proc --fork --kill-child -- bash -c '
            hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts
            : >"$2/pid/$1.ready"; while :; do sleep 3600 & wait $!; done' node-init "$node" "$LAB"
        wait_for 5 "namespace of $node" test -e "$LAB/pid/$node.ready" || return 1
    fi
    running "$node.slurmd" && return 0
    init=$(cat "/proc/$(pid_of "$node")/task/$(pid_of "$node")/children")
    spawn "$node.slurmd" nsenter -t "${init// /}" --uts --pid --mount -- slurmd -D -N "$node" -f "$SLURM_CONF"
}
any_running() {
    local file
    for file in "$LAB"/pid/*; do running "${file##*/}" && return 0; done
    return 1
}
ready() { [ "$(sinfo -h -N -p main -o '%t' | grep -cE '^(idle|mix|alloc|comp)$')" -ge "$NODES" ]; }
up() {
    mkdir -p "$LAB"/{etc,log,pid,state,spool}
    exec 9>"$LAB/lock"
    flock 9
    if ! any_running; then
        rm -rf "${LAB:?}"/{state,spool,log,pid,etc}/* "$LAB"/munge.*
        write_conf
    fi
    if ! running munged; then
        (umask 077; head -c 128 /dev/urandom >"$LAB/etc/munge.key")
        spawn munged munged --foreground --force --num-threads=2 --socket="$LAB/munge.socket" \
            --key-file="$LAB/etc/munge.key" --pid-file="$LAB/munge.pid" --log-file="$LAB/log/munged.log" --seed-file="$LAB/munge.seed"
        wait_for 10 munged munge -n -S "$LAB/munge.socket" || { cat "$LAB/log/munged.out" >&2; return 1; }
    fi
    if ! running slurmctld; then
        spawn slurmctld slurmctld -D -f "$SLURM_CONF"
        wait_for 15 slurmctld scontrol ping || { tail -20 "$LAB/log/slurmctld.log" >&2; return 1; }
    fi
    local i
    for ((i = 1; i <= NODES; i++)); do start_node "node$i" || return 1; done
    wait_for 60 "nodes ready" ready || { sinfo -N >&2; tail -5 "$LAB"/log/slurmd.*.log >&2; return 1; }
}
leftover() { # daemons of this lab that are not among the recorded pids any more
    local folder pid
    for folder in /proc/[0-9]*; do
        pid=${folder#/proc/}
        case "$(cat "$folder/comm" 2>/dev/null)" in
            munged | slurmctld | slurmscriptd | slurmd | slurmstepd | unshare | nsenter)
                has_mark "$pid" && alive "$pid" && echo "$pid" ;;
        esac
    done
}
none_left() { [ -z "$(leftover)" ]; }
down() {
    [ -d "$LAB/pid" ] || return 0
    exec 9>"$LAB/lock"
    flock 9
    stop_one slurmctld
    local i pid
    for ((i = 1; i <= NODES; i++)); do stop_one "node$i" KILL && rm -f "$LAB/pid/node$i".*; done
    stop_one munged
    for pid in $(leftover); do kill -9 "$pid" 2>/dev/null; done
    wait_for 5 "the end of all daemons" none_left
}
case "${1:-}" in
    up | down) "$1" ;;
    crash) stop_one "$2" KILL; stop_one "$2.slurmd" KILL ;;
    start) exec 9>"$LAB/lock"; flock 9; start_node "$2" ;;
    *) sed -n '2,8p' "$0" >&2; exit 2 ;;
esac
