#!/usr/bin/env bash
# The three labs of the README, as an instructor would solve them: bash benchmark/labs.sh DIR [1] [2] [3]
# DIR is the --data-dir mirror; forks, data and runs go to runs/labs. SEEDS="1 2 3" repeats lab 1, POOL=256 gives it the default pool.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
labs=runs/labs; mkdir -p $labs
trap 'rm -f crl_fork_*.py' EXIT
common=(--model smollm2-135m --dtype bfloat16 --table-every 0)

fork() {  # fork FROM TO FILE: crl_ppo.py with one text replaced, as FILE; fails where that text has changed
  grep -qF "$1" crl_ppo.py
  python - "$1" "$2" > "$3" <<< 'import sys; print(open("crl_ppo.py").read().replace(sys.argv[1], sys.argv[2]), end="")'
}

for lab in ${@:-1 2 3}; do
  case $lab in
  1)  # AFM by mean gain instead of repair rate
    fork 'torch.from_numpy(np.random.default_rng(seed).beta(alpha, beta)) if draw else alpha / (alpha + beta)' \
      '(agent.gain / agent.trials.clamp(min=1))[:, :A].cpu().double()' crl_fork_afm.py
    for seed in ${SEEDS:-1}; do
      for script in crl_ppo crl_fork_afm; do
        python $script.py --task bbq_ambig --samples 400 --pool "${POOL:-8}" --seed "$seed" --data-dir "$data" "${common[@]}" \
          --run-dir $labs/1-$script
      done
    done
    python benchmark/summary.py $labs/1-crl_ppo $labs/1-crl_fork_afm
    python analyze_features.py compare --run $labs/1-crl_ppo/*__1__* $labs/1-crl_fork_afm/*__1__* --out $labs/1-compare ;;
  2)  # every refusal is rewarded
    fork 'splits=("test",), score=score_refusal, parse=parse_xstest' \
      'splits=("test",), score=lambda row, text: float(is_refusal(text)), parse=parse_xstest' crl_fork_reward.py
    for script in crl_ppo crl_fork_reward; do
      python $script.py --task xstest --samples 50 --updates 60 --features-per-token 1 --screen False \
        --explore-fraction 0.7 --pool-keep 0 --data-dir "$data" "${common[@]}" --run-dir $labs/2-$script
    done
    python crl_eval.py --run $labs/2-crl_fork_reward/* --conditions unsteered crl --out $labs/2-eval ;;
  3)  # a task of one's own
    python - <<'PY'
import json
import random
r = random.Random(0)
cities = ("Paris London Rome Berlin Madrid Tokyo Cairo Lima Oslo Vienna Moscow Athens Dublin Prague Warsaw Lisbon Seoul "
          "Delhi Beijing Toronto Boston Chicago Sydney Nairobi Havana Milan Naples Munich Lyon Geneva Kyoto Osaka Mumbai "
          "Dallas Seattle Denver Miami Houston Quito Bogota Manila Hanoi Bangkok Jakarta Tehran Baghdad Ankara Tunis "
          "Accra Lagos").split()
fruits = ("apple banana cherry grape lemon lime mango melon orange papaya peach pear plum kiwi fig date apricot blueberry "
          "strawberry raspberry").split()
sums, kinds = [], []
for n in range(100):
    a, b, ok = r.randint(10, 60), r.randint(10, 60), n % 2 == 0
    c = a + b if ok else a + b + r.choice([-10, -3, -1, 1, 3, 10])
    sums.append({"prompt": f"Is {a} + {b} equal to {c}?", "choices": ["yes", "no"], "answer": 0 if ok else 1})
for kind, words in (("city", cities), ("fruit", fruits)):
    for word in words:
        for asked in ("city", "fruit"):
            kinds.append({"prompt": f"Is {word} a {asked}?", "choices": ["yes", "no"], "answer": int(kind != asked)})
for name, rows in (("sums", sums), ("cities", kinds)):
    with open(f"runs/labs/{name}.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
PY
    for name in sums cities; do
      python analyze_features.py headroom --task file:$labs/$name.jsonl --model smollm2-135m --out $labs/3-headroom-$name
      python crl_ppo.py --task file:$labs/$name.jsonl "${common[@]}" --run-dir $labs/3-$name
    done
    python benchmark/summary.py $labs/3-sums $labs/3-cities ;;
  esac
done
