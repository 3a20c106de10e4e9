#!/usr/bin/env bash
# The runs behind the README's results: 3 seeds a task on the embedded model. About N minutes each on one core.
#   bash benchmark/learn.sh DIR [TASK...]      DIR is the --data-dir mirror; runs go to runs/learn
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
for job in "${@:-bbq_ambig bbq_disambig truthfulqa mmlu xstest:50 xstest:200 harmbench}"; do for task in $job; do
  samples=${task#*:}; name=${task%%:*}
  [ "$samples" = "$task" ] && samples=4000
  for seed in ${SEEDS:-1 2 3}; do
    python crl_ppo.py --task "$name" --samples "$samples" --seed "$seed" --data-dir "$data" --model smollm2-135m \
      --dtype bfloat16 --run-dir "runs/learn/$name-$samples" --table-every 0 ${FLAGS:-}
  done
done; done
python benchmark/summary.py runs/learn/*
