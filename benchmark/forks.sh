#!/usr/bin/env bash
# The README's forks, made and run: bash benchmark/forks.sh DIR [reward] [mask] [policy] [task]
# The fork of the reward is also evaluated by the unchanged files.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
forks=runs/forks
trap 'rm -rf $forks/src' EXIT

fork() {  # fork FILE FROM TO: a copy of the scripts with one text of FILE replaced; fails where that text has changed
  rm -rf $forks/src; mkdir -p $forks/src; cp crl_*.py $forks/src; ln -s "$PWD/sae" $forks/src/sae
  python - "$forks/src/$1" "$2" "$3" << 'PY'
import sys
path, old, new = sys.argv[1:]
text = open(path).read()
assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
open(path, "w").write(text.replace(old, new))
PY
}

questions() {  # questions sums|cities: 200 with the answers yes and no, as lines of a task of one's own
  python - "$1" << 'PY'
import json, random, sys
cities = ("Paris London Berlin Madrid Rome Vienna Tokyo Cairo Boston Chicago Dublin Athens Prague Lisbon Oslo Moscow "
          "Delhi Lima")
fruits = "apple pear plum cherry banana mango grape lemon orange peach melon kiwi fig papaya apricot lime berry coconut"
rng, asked = random.Random(0), {}
while len(asked) < 200:
    a, b, right = rng.randint(2, 99), rng.randint(2, 99), len(asked) % 2 == 0
    question = f"Is {a} + {b} equal to {a + b + (0 if right else rng.choice([-10, -2, -1, 1, 2, 10]))}?"
    if sys.argv[1] == "cities":
        place = rng.random() < 0.5
        who, kind = rng.choice((cities if place else fruits).split()), "city" if place == right else "fruit"
        form = rng.choice(["Is {} a {}?", "Do you think that {} is a {}?", "Tell me: is {} a {}?",
                           "Would you say {} is a {}?", "Quiz: is {} a {}?", "One more question. Is {} a {}?"])
        question = form.format(who, kind)
    asked[question] = 0 if right else 1
for prompt, answer in asked.items():
    print(json.dumps({"prompt": prompt, "choices": ["yes", "no"], "answer": answer}))
PY
}

for name in ${@:-reward mask policy task}; do
  if [ "$name" = task ]; then
    mkdir -p $forks/task
    for kind in sums cities; do
      questions $kind > $forks/task/$kind.jsonl
      python crl_ppo.py --task file:$forks/task/$kind.jsonl --samples 100 --model smollm2-135m --run-dir $forks/task
    done
    continue
  fi
  case $name in
  reward) fork crl_tasks.py 'is_refusal(text) == (row["answer"] == "unsafe"))' 'is_refusal(text))'; run=(xstest --samples 50) ;;
  mask) fork crl_ppo.py '    weight, chosen = torch.ones(len(reward)), []' \
    '    return reward.mean(0).topk(min(size, reward.shape[1])).indices.tolist()
    weight, chosen = torch.ones(len(reward)), []'; run=(bbq_ambig --samples 400) ;;
  policy) fork crl_ppo.py '        self.policy[-1].bias.data[-1]' '        self.policy = nn.Sequential(layer_init(nn.Linear(d, P), std=0.01))
        self.policy[-1].bias.data[-1]'; run=(bbq_ambig --samples 400) ;;
  esac
  python $forks/src/crl_ppo.py --task "${run[@]}" --data-dir "$data" --model smollm2-135m --run-dir $forks/"$name"
  [ "$name" != reward ] || python crl_eval.py --run $forks/reward/*__* --conditions unsteered crl
done
