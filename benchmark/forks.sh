#!/usr/bin/env bash
# The README's forks, made and run: bash benchmark/forks.sh DIR [reward] [mask] [policy] [task]
# The fork of the reward is also evaluated by the unchanged files.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
forks=runs/forks
trap 'rm -rf $forks/src' EXIT

fork() {  # fork FILE EDIT TASK SAMPLES: a run of a copy of the scripts, after sed has made an EDIT in FILE
  rm -rf $forks/src; mkdir -p $forks/src; cp crl_*.py $forks/src; ln -s "$PWD/sae" $forks/src/sae
  sed -i "$2" "$forks/src/$1"
  if cmp -s "$1" "$forks/src/$1"; then echo "$1 has no such line any more: $2" >&2; exit 1; fi
  python $forks/src/crl_ppo.py --task "$3" --samples "$4" --data-dir "$data" --model smollm2-135m --run-dir "$forks/$name"
}

questions() {  # questions sums|cities: 200 with the answers yes and no, as lines of a task of one's own
  python - "$1" << 'PY'
import json, random, sys
cities = ("Paris London Berlin Madrid Rome Vienna Tokyo Cairo Boston Chicago Dublin Athens Prague Lisbon Oslo Moscow "
          "Delhi Lima")
fruits = "apple pear plum cherry banana mango grape lemon orange peach melon kiwi fig papaya apricot lime berry coconut"
forms = ("Is {} a {}?", "Do you think that {} is a {}?", "Tell me: is {} a {}?", "Would you say {} is a {}?",
         "Quiz: is {} a {}?", "One more question. Is {} a {}?")
rng, asked = random.Random(0), {}
while len(asked) < 200:
    a, b, right = rng.randint(2, 99), rng.randint(2, 99), len(asked) % 2 == 0
    question = f"Is {a} + {b} equal to {a + b + (0 if right else rng.choice([-10, -2, -1, 1, 2, 10]))}?"
    if sys.argv[1] == "cities":
        place = rng.random() < 0.5
        who, kind = rng.choice((cities if place else fruits).split()), "city" if place == right else "fruit"
        question = rng.choice(forms).format(who, kind)
    asked[question] = 0 if right else 1
for prompt, answer in asked.items():
    print(json.dumps({"prompt": prompt, "choices": ["yes", "no"], "answer": answer}))
PY
}

for name in ${@:-reward mask policy task}; do
  case $name in
    reward)
      fork crl_tasks.py 's/is_refusal(text) == (row\["answer"\] == "unsafe"))/is_refusal(text))/' xstest 50
      python crl_eval.py --run $forks/reward/*__* --conditions unsteered crl;;
    mask)
      fork crl_ppo.py '/^    weight, chosen = torch.ones/i\    return reward.mean(0).topk(min(size, reward.shape[1])).indices.tolist()' \
        bbq_ambig 400;;
    policy)
      fork crl_ppo.py '/^        self.policy\[-1\].bias.data\[-1\] =/i\        self.policy = nn.Sequential(layer_init(nn.Linear(d, P), std=0.01))' \
        bbq_ambig 400;;
    task)
      mkdir -p $forks/task
      for kind in sums cities; do
        questions $kind > $forks/task/$kind.jsonl
        python crl_ppo.py --task file:$forks/task/$kind.jsonl --samples 100 --model smollm2-135m --run-dir $forks/task
      done;;
  esac
done
