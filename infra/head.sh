#!/usr/bin/env bash
# The head of a Ray cluster for gradine, in the foreground, started again whenever it ends; SIGTERM ends it for good.
#
#   infra/head.sh [more options of `ray start`]
#
# GRADINE_NODE_IP         this node's address (found if unset)   GRADINE_PORT            of the control service (6379)
# GRADINE_DASHBOARD_HOST  127.0.0.1; jobs come in here           GRADINE_DASHBOARD_PORT  8265
# GRADINE_CPUS, _GPUS     what this node offers (found)          GRADINE_TEMP_DIR        Ray's own files (/tmp/ray)
# GRADINE_OBJECT_STORE_MB 200: gradine hands over little by it   GRADINE_RESTART_S       5
# RAY_AUTH_TOKEN          or RAY_AUTH_TOKEN_PATH (~/.ray/auth_token), made here if missing; workers and drivers need it
# RAY_health_check_*      how soon a dead node is seen: 12 s unless set
source "$(dirname "${BASH_SOURCE[0]}")/node.sh"

if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} && ! -e $RAY_AUTH_TOKEN_PATH ]]; then
  (umask 077
   mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
   od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
  say "made a token: $RAY_AUTH_TOKEN_PATH. Copy it to every node and to whoever submits jobs, with mode 0600"
fi

keep_running require_token --head "${options[@]}" "--port=${GRADINE_PORT:-6379}" \
  "--dashboard-host=${GRADINE_DASHBOARD_HOST:-127.0.0.1}" "--dashboard-port=${GRADINE_DASHBOARD_PORT:-8265}" "$@"
