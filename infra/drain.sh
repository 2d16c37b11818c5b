#!/usr/bin/env bash
# Before this node goes away: Ray starts nothing more here, what trains here is asked to stop, which writes a
# checkpoint, and this waits until it has ended. The run goes on by itself on the nodes that stay.
#
#   infra/drain.sh [SECONDS]    waits at most so long; 60, which is above ray.grace_s
#
# Kubernetes calls it as preStop hook; on VMs call it at a spot notice, or before maintenance. It signals this user's
# processes only: in a pod there are no others, on a shared machine give gradine a user of its own.
set -uo pipefail

trains() {  # pids of workers and drivers; not of the shell around a driver, whose end Ray takes for the job's
  local folder command
  for folder in /proc/[0-9]*; do
    [[ -O $folder ]] || continue
    command=$(tr '\0' ' ' 2>/dev/null < "$folder/cmdline") || continue
    if [[ $command == ray::Worker* || $command =~ ^[^\ ]*python[0-9.]*\ -m\ gradine\.pipeline\ (run|train)\  ]]; then
      echo "${folder#/proc/}"
    fi
  done
}

runs() { [[ -n $(tr -d '\0' 2>/dev/null < "/proc/$1/cmdline") ]]; }  # a zombie's is empty

raylets() {  # "NODE HEAD:PORT" of each Ray that this user runs here: there may be others, which are not to be drained
  local folder command
  for folder in /proc/[0-9]*; do
    [[ -O $folder ]] || continue
    command=$(tr '\0' ' ' 2>/dev/null < "$folder/cmdline") || continue
    if [[ $command =~ ^[^\ ]*raylet\  && $command =~ \ --node_id=([0-9a-f]+)\  ]]; then
      local node=${BASH_REMATCH[1]}
      [[ ! $command =~ \ --gcs-address=([^\ ]+)\  ]] || echo "$node ${BASH_REMATCH[1]}"
    fi
  done
}

seconds=${1:-60}
# Without an answer, as on a node already cut off, the rest still holds.
while read -r node head; do
  timeout 15 ray drain-node --address "$head" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "gradine's drain.sh" --deadline-remaining-seconds "$seconds" </dev/null >/dev/null ||
    echo "drain.sh: the head at $head did not take this node out; Ray may start more here" >&2
done < <(raylets)
asked=$(trains)
for pid in $asked; do
  kill -TERM "$pid" 2>/dev/null || true
done
until=$((SECONDS + seconds))
for pid in $asked; do
  while runs "$pid" 2>/dev/null && ((SECONDS < until)); do
    sleep 1
  done
done
