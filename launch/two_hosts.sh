#!/usr/bin/env bash
# Run a command on two "hosts" of one machine: network namespaces joined by a cable of a given speed. See usage() below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./launch/two_hosts.sh [--rate 1gbit] [--ranks 2] [--shift 0] COMMAND [ARGUMENT...]

Starts COMMAND with mpirun on two hosts, --ranks on each: two network namespaces with names, addresses and host names of
their own, joined by a virtual cable that is shaped to --rate (a rate as tc writes it; 0: not shaped). The monotonic clock
of the second is --shift seconds ahead, by a time namespace (0: one clock for both). Everything is removed at the end.
It needs root, ip and tc (on Debian: iproute2), and the activated environment. No traffic leaves the two namespaces.

exit codes: the command's; 2 something is missing on this machine
TEXT
}

rate=1gbit ranks=2 shift=0
while [[ ${1:-} == --* ]]; do
    case $1 in
    --rate) rate=${2:?--rate needs a value} && shift 2 ;;
    --ranks) ranks=${2:?--ranks needs a value} && shift 2 ;;
    --shift) shift=${2:?--shift needs a value} && shift 2 ;;
    --help) usage && exit 0 ;;
    *) printf 'two_hosts.sh: unknown option %s; see --help\n' "$1" >&2 && exit 2 ;;
    esac
done
[[ $# -gt 0 ]] || { usage >&2 && exit 2; }
missing=()
[[ $(id -u) == 0 ]] || missing+=("root")
PATH=$PATH:/usr/sbin:/sbin # where ip and tc are, also for those who have them not on PATH
needed=(ip unshare mpirun)
[[ $rate == 0 ]] || needed+=(tc)
for tool in "${needed[@]}"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
((${#missing[@]} == 0)) || { printf 'two_hosts.sh: this needs %s.\n' "${missing[*]}" >&2 && exit 2; }

ahead=
if [[ $shift != 0 ]]; then
    ahead="--time --monotonic $shift --fork --kill-child"
    # shellcheck disable=SC2086 # several words
    unshare $ahead true || { printf 'two_hosts.sh: time namespaces are not allowed here.\n' >&2 && exit 2; }
fi

name=pneumo$$
scratch=$(mktemp -d)
remove() {
    for host in a b; do
        ip netns del "$name$host" 2>/dev/null || true
        rm -rf "/etc/netns/$name$host"
    done
    rm -rf "$scratch"
}
trap remove EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for host in a b; do
    ip netns add "$name$host" || { printf 'two_hosts.sh: network namespaces are not allowed here.\n' >&2 && exit 2; }
    mkdir -p "/etc/netns/$name$host" # what lies here stands in for /etc within the namespace
    printf '127.0.0.1 localhost\n10.77.0.1 hosta\n10.77.0.2 hostb\n' >"/etc/netns/$name$host/hosts"
done
ip link add cable netns "${name}a" type veth peer name cable netns "${name}b"
for host in a b; do
    ip -n "$name$host" addr add "10.77.0.$([[ $host == a ]] && echo 1 || echo 2)/24" dev cable
    ip -n "$name$host" link set lo up
    ip -n "$name$host" link set cable up
    [[ $rate == 0 ]] || ip netns exec "$name$host" tc qdisc add dev cable root tbf rate "$rate" burst 256k latency 50ms
done

cat >"$scratch/agent" <<TEXT # how Open MPI starts its daemon on another host: agent HOST COMMAND...
#!/bin/sh
host=\$1 ahead=
shift
[ \$host = hosta ] || ahead="$ahead"
exec ip netns exec "$name\${host#host}" unshare -u \$ahead sh -c "hostname \$host; \$*"
TEXT
chmod +x "$scratch/agent"
unset PRTE_MCA_rmaps_default_mapping_policy # it would fill the first host
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 GLOO_SOCKET_IFNAME=cable
ip netns exec "${name}a" unshare -u sh -c 'hostname hosta; exec "$@"' sh \
    mpirun --prtemca plm_ssh_agent "$scratch/agent" --prtemca prte_if_include cable --mca btl_tcp_if_include cable \
    --mca pml ob1 --host "hosta:$ranks,hostb:$ranks" --map-by "ppr:$ranks:node" --bind-to none \
    -x PATH -x VIRTUAL_ENV -x GLOO_SOCKET_IFNAME -n $((2 * ranks)) "$@"
