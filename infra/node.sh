# What head.sh and worker.sh share. Sourced by them: it sets what every node must agree on, and keeps Ray running.
set -euo pipefail

say() { echo "$(date '+%F %T') $(basename "$0"): $*" >&2; }
refuse() { say "$*"; exit 2; }

loopback() { [[ $1 == localhost || $1 == 127.* || $1 == ::1 ]]; }

private() {  # whether a file is its owner's alone
  [[ $(stat -L -c %a -- "$1") == [46]00 ]]
}

# Without a token whoever reaches the ports of a node runs programs on it.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
case $RAY_AUTH_MODE in
  token)
    if [[ -z ${RAY_AUTH_TOKEN:-} ]]; then
      export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    fi ;;
  disabled)
    for address in "${GRADINE_NODE_IP:-found}" "${GRADINE_DASHBOARD_HOST:-127.0.0.1}"; do
      loopback "$address" || [[ ${GRADINE_TRUST_NETWORK:-} == 1 ]] ||
        refuse "RAY_AUTH_MODE=disabled on address '$address': beyond this machine Ray wants a token. Leave" \
               "RAY_AUTH_MODE unset, or, in a network that only you reach, set GRADINE_TRUST_NETWORK=1."
    done ;;
  *) refuse "RAY_AUTH_MODE='$RAY_AUTH_MODE' is unknown. Use token, or leave it unset." ;;
esac

require_token() {
  [[ $RAY_AUTH_MODE == disabled || -n ${RAY_AUTH_TOKEN:-} ]] && return
  [[ -s $RAY_AUTH_TOKEN_PATH ]] ||
    refuse "no token: $RAY_AUTH_TOKEN_PATH is missing or empty. Copy the head's there with mode 0600, or set" \
           "RAY_AUTH_TOKEN."
  private "$RAY_AUTH_TOKEN_PATH" ||
    refuse "the token in $RAY_AUTH_TOKEN_PATH can be read by others: its mode is" \
           "$(stat -L -c %a -- "$RAY_AUTH_TOKEN_PATH")." \
           "chmod 600 it, and change the token if others use this machine."
}

# A node that does not answer is declared dead after 3 x (3 s + 1 s); Ray's own settings take over a minute.
export RAY_health_check_initial_delay_ms=${RAY_health_check_initial_delay_ms:-5000}
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-1000}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-3000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-3}
# A node never joins a head that started anew; it ends when it asks after itself there, and starts again. By Ray's own
# setting it asks once a minute.
export RAY_raylet_liveness_self_check_interval_ms=${RAY_raylet_liveness_self_check_interval_ms:-5000}
export OMP_NUM_THREADS=1       # more threads than free cores spin; a worker sets its own number later
export RAY_worker_niceness=0   # Ray's default, 15, hands the cores to whatever else runs
export RAY_USAGE_STATS_ENABLED=0

# Port 0: a free one. On the usual one a second Ray of the machine would take no jobs.
options=(--block --dashboard-agent-listen-port=0 --disable-usage-stats
         "--object-store-memory=$((${GRADINE_OBJECT_STORE_MB:-200} << 20))")
[[ -z ${GRADINE_NODE_IP:-} ]] || options+=("--node-ip-address=$GRADINE_NODE_IP")
[[ -z ${GRADINE_CPUS:-} ]] || options+=("--num-cpus=$GRADINE_CPUS")
[[ -z ${GRADINE_GPUS:-} ]] || options+=("--num-gpus=$GRADINE_GPUS")
[[ -z ${GRADINE_TEMP_DIR:-} ]] || options+=("--temp-dir=$GRADINE_TEMP_DIR")

ended=  # set by a signal: nothing is started any more
child=
trap 'ended=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT

run() {  # a command, to its end, while signals are heard
  "$@" &
  child=$!
  local code
  while true; do  # waited for first: of a child that has ended already, `wait` alone still knows the code
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=
  return "$code"
}

# Ray ends when its node was declared dead by mistake (a link that was down) and when its head is gone for good. It
# then starts anew; never by `ray stop`, which ends every Ray of the machine.
keep_running() {  # before: what must hold for a start; then the options of `ray start`
  local before=$1 code
  shift
  while [[ -z $ended ]]; do
    "$before"
    [[ -z $ended ]] || break
    code=0
    run ray start "$@" || code=$?
    [[ -z $ended ]] || break
    say "Ray ended with exit code $code; it starts again in ${GRADINE_RESTART_S:-5} s"
    run sleep "${GRADINE_RESTART_S:-5}" || true
  done
  say "ended by a signal"
}
