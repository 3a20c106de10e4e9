#!/usr/bin/env bash
# The runs behind docs/results.md: on the embedded model, resumable; then `python benchmark/summary.py runs/learn/*`.
#   bash benchmark/learn.sh DIR [TASK:SAMPLES ...]     runs go to runs/learn/TASK-SAMPLES
# DIR is the --data-dir mirror; "" takes the rows from the hub or the wheels.
# SEEDS="1 2 3" and FOLDS="0" choose the runs, FLAGS="--afm none" changes them, NAME=-afm-none keeps changed runs apart.
# xstest: SEEDS=1 FOLDS="0 1 2 3" bash benchmark/learn.sh DIR xstest:200 xstest:50
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
for job in "${@:-bbq_ambig:400 bbq_ambig:100 bbq_disambig:400 bbq_disambig:2000}"; do
  for job in $job; do
    task=${job%%:*}; samples=${job#*:}; out=runs/learn/$task-$samples${NAME:-}
    for seed in ${SEEDS:-1 2 3}; do
      for fold in ${FOLDS:-0}; do
        done_with="$out/.seed$seed-fold$fold"
        [ -e "$done_with" ] && continue
        python crl_ppo.py --task "$task" --samples "$samples" --seed "$seed" --fold "$fold" ${data:+--data-dir "$data"} \
          --model smollm2-135m --run-dir "$out" ${FLAGS:-}
        touch "$done_with"
      done
    done
  done
done
