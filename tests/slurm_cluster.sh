#!/usr/bin/env bash
# A single-node Slurm cluster for tests: slurm_cluster.sh start|stop DIRECTORY
#
# Settings, state and logs are in DIRECTORY; set SLURM_CONF=DIRECTORY/slurm.conf to use it. Its ports
# are free ones, so that a machine can have several.
# Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge.
set -euo pipefail
dir=$(realpath -m "$2")

stop() {
    # Jobs first, the running, then the waiting ones: without the daemons they would run on.
    export SLURM_CONF="$dir/slurm.conf"
    scancel --full --signal=KILL --user=root || true
    scancel --user=root || true
    for _ in $(seq 50); do
        [ -z "$(squeue --noheader 2>/dev/null)" ] && break
        sleep 0.2
    done
    for name in slurmd slurmctld munged; do
        if [ -f "$dir/$name.pid" ]; then
            kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
        fi
    done
}

free_ports() {
    python3 -c 'import socket
sockets = [socket.create_server(("", 0)) for _ in range(2)]
print(*[s.getsockname()[1] for s in sockets])'
}

if [ "$1" = stop ]; then
    stop
    exit
fi

mkdir -p "$dir/state" "$dir/spool"
chmod 755 "$dir"
# --force: munged rejects paths below world-writable directories such as /tmp.
head -c 1024 /dev/urandom >"$dir/munge.key"
chmod 600 "$dir/munge.key"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"

read -r controller_port node_port < <(free_ports)
cat >"$dir/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CryptoType=crypto/munge
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=30
MinJobAge=300
SchedulerParameters=sched_interval=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$(free -m | awk '/^Mem/ {print $2}') State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
export SLURM_CONF="$dir/slurm.conf"
slurmctld
slurmd
for _ in $(seq 60); do
    if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
        exit 0
    fi
    sleep 0.5
done
echo "slurm_cluster.sh: the node did not become idle; see the logs in $dir" >&2
tail -n 5 "$dir"/*.log >&2
stop
exit 1
