#!/usr/bin/env bash
# The runs behind docs/results.md: on the embedded model, resumable; then `python benchmark/summary.py runs/learn/*`.
#   bash benchmark/learn.sh DIR [TASK:SAMPLES ...]     runs go to runs/learn/TASK-SAMPLES
# DIR is the --data-dir mirror; "" takes the rows from the hub or the wheels.
# SEEDS="1 2 3" and FOLDS="0" choose the runs. FLAGS="--coef 2" changes them, to runs/learn/TASK-SAMPLES--coef2, or where
# NAME=-other says.
# xstest: SEEDS=1 FOLDS="0 1 2 3" bash benchmark/learn.sh DIR xstest:200 xstest:50
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
flags=${FLAGS:-}
for job in ${@:-bbq_ambig:400 bbq_ambig:100 bbq_disambig:400 bbq_disambig:2000}; do
  out=runs/learn/${job/:/-}${NAME-${flags// /}}
  for seed in ${SEEDS:-1 2 3}; do
    for fold in ${FOLDS:-0}; do
      done_with="$out/.seed$seed-fold$fold"
      [ -e "$done_with" ] && continue
      python crl_ppo.py --task "${job%%:*}" --samples "${job#*:}" --seed "$seed" --fold "$fold" \
        ${data:+--data-dir "$data"} --model smollm2-135m --run-dir "$out" $flags
      touch "$done_with"
    done
  done
done
