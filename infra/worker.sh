#!/usr/bin/env bash
# A further node of a Ray cluster for gradine, in the foreground, started again whenever it ends: it joins again after
# its link or its head was gone. SIGTERM ends it for good.
#
#   GRADINE_HEAD=10.0.0.1:6379 infra/worker.sh [more options of `ray start`]
#
# GRADINE_HEAD            host:port of the head's control service; waited for if it is not there yet
# GRADINE_NODE_IP, GRADINE_CPUS, GRADINE_GPUS, GRADINE_TEMP_DIR, GRADINE_OBJECT_STORE_MB, GRADINE_RESTART_S,
# RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH: as in head.sh. The token is the head's.
source "$(dirname "${BASH_SOURCE[0]}")/node.sh"

[[ ${GRADINE_HEAD:-} == *:* ]] ||
  refuse "GRADINE_HEAD='${GRADINE_HEAD:-}' is not host:port of the head, e.g. 10.0.0.1:6379."
host=${GRADINE_HEAD%:*}
host=${host#[}  # of [2001:db8::1]:6379
host=${host%]}
head_answers() { run timeout 5 bash -c "exec 3<>/dev/tcp/$host/${GRADINE_HEAD##*:}" 2>/dev/null; }

wait_for_head() {
  require_token
  head_answers && return
  say "no head at $GRADINE_HEAD yet; waiting"
  until [[ -n $ended ]] || head_answers; do run sleep 2 || true; done
}

keep_running wait_for_head "--address=$GRADINE_HEAD" "${options[@]}" "$@"
