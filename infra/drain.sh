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

seconds=${1:-60}
# Without an answer, as on a head or a node already cut off, the rest still holds.
timeout 15 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "gradine's drain.sh" \
  --deadline-remaining-seconds "$seconds" >/dev/null 2>&1 || true
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
