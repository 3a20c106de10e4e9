#!/usr/bin/env bash
# The figures behind the defaults of each task (docs/results.md): what the screening finds under other flags, and PPO
# again on the tables of runs/learn (made by learn.sh), under other flags. Training and validation prompts only.
#   bash benchmark/defaults.sh DIR [screen] [replay]      DIR is the --data-dir mirror
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
for part in ${@:-screen replay}; do
  case $part in
    screen)
      for task in bbq_ambig bbq_disambig mmlu; do
        echo "== $task"
        python benchmark/screening.py --task $task --samples 400 --data-dir "$data" --model smollm2-135m -- \
          "coef=(0.5,)" "coef=(1.0,)" "coef=(2.0,)"
      done
      echo "== xstest"
      python benchmark/screening.py --task xstest --samples 200 --data-dir "$data" --model smollm2-135m -- \
        "" "features=3, steer_tokens=3" "coef=(1.0,)" "coef=(2.0,)";;
    replay)
      for job in bbq_ambig-400 bbq_disambig-400 xstest-200 harmbench-100; do
        [ -d runs/learn/$job ] || continue
        echo "== $job"
        python benchmark/replay.py runs/learn/$job/*__* -- "" "updates=150, learning_rate=1e-3" \
          "updates=150, learning_rate=3e-4" "updates=30, learning_rate=3e-4" "pool=2" "pool=8" "pool=16" \
          "weight_decay=0.1" "weight_decay=3.0" "hidden=16" "epsilon=0.0" "ent_coef=0.0" "group=16" "algo='grpo'" \
          "baseline='none'"
      done;;
    *) echo "unknown part $part: screen or replay" >&2; exit 1;;
  esac
done
