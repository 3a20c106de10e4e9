"""integrations/lm_eval_harness.py: the harness on local tasks says what the environment says."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import small_run
import tiny
import torch

import crl_ppo
import crl_steer
import crl_tasks
from crl_tasks import hub

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval to try the adapter")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "integrations"))
import lm_eval_harness  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TASK = """task: local_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: text
{rest}
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""
ANSWER = """output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ['<eos>'], max_gen_toks: 1}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder and runs with random policies: letters, long answers with one decision and with two."""
    folder = tmp_path_factory.mktemp("harness")
    sites = dict(sae=("random:9", f"{folder}/sae"), layer=(0, 1), coef=(4.0,))
    kinds = {"one": dict(coef=(1.0, 4.0)), "held": dict(task="long", coef=(2.0,), steer_tokens=2)}
    kinds["turns"] = dict(task="long", decisions=2, steer_tokens=2, seed=3, **sites)
    with small_run.world(folder, **kinds) as made:
        yield made


def write_tasks(folder, tok, n):
    """Local tasks of the harness on n rows, asked as we ask them; returns the rows."""
    docs = []
    rows = []
    for i in range(n):
        text = f"{'x' * (i % 7)} another item {i}"
        choices = ["u", "v", "w", "x"][: 2 + i % 3]
        rows.append({"prompt": text, "choices": choices, "answer": i % 2, "task": "file", "id": str(i)})
        doc = {"text": crl_tasks.prompt_text(tok, rows[-1])[0], "choices": list("ABCD")[: len(choices)]}
        docs.append(doc | {"gold": i % 2, "answer": "AB"[i % 2]})
    hub.write_jsonl(folder / "docs.jsonl", docs)
    for kind, rest in (("choice", CHOICE), ("answer", ANSWER)):
        task = TASK.format(kind=kind, data=folder / "docs.jsonl", rest=rest)
        (folder / f"{kind}.yaml").write_text(task)
    return rows


def test_accuracy_and_answers_are_those_of_the_environment(world, tmp_path):
    run = world[1]["one"]
    model = lm_eval_harness.CRL(str(run), batch_size=7, device="cuda:0", add_bos_token=True)
    tok = model.tokenizer
    rows = write_tasks(tmp_path, tok, 40)
    prompts = [crl_tasks.encode_prompt(tok, row) for row in rows]
    args = crl_ppo.stored_args(run)
    env, agent = model.env, model.agent

    def choose(x, t, rows, columns):
        return agent.get_policy(agent.observe(x, t)).logits.argmax(-1)

    ours = [tok.decode(answer) for (answer,) in env.generate(prompts, choose, 1)]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tasks = ["local_choice", "local_answer"]
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    said = {s["doc_id"]: s["resps"][0][0] for s in found["samples"]["local_answer"]}
    assert [said[n] for n in range(len(rows))] == ours
    assert args.max_new_tokens == 1 and len({str(line["steering"]) for line in model.log}) > 2

    space = [tok.encode(" " + letter, add_special_tokens=False)[0] for letter in "ABCD"]
    asked = tok.pad({"input_ids": [p.ids for p in prompts]}, return_tensors="pt", padding_side="left")
    out = model.model.generate(**asked, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    right = []
    for row, logits in zip(rows, out.logits[0], strict=True):
        right.append(logits[space[: len(row["choices"])]].argmax().item() == row["answer"])
    accuracy = sum(right) / len(right)
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1


@pytest.mark.parametrize("kind", ["held", "turns"])
def test_forced_answers_are_steered_as_generated_ones(world, kind):
    model = lm_eval_harness.CRL(str(world[1][kind]), add_bos_token=True)
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc ", k=rng.randint(1, 30))) for _ in range(9)]
    asked = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    said = model.model.generate(**asked, max_new_tokens=4)[:, -4:].tolist()
    assert len({str(line["steering"]) for line in model.log}) > 2
    contexts = [model.tokenizer.encode(text) for text in texts]
    cut = [row[: 1 + n % 4] for n, row in enumerate(said)]  # of unlike lengths
    requests = [(None, context, tokens) for context, tokens in zip(contexts, cut, strict=True)]
    scored = model._loglikelihood_tokens(requests, True, override_bs=4)
    assert all(greedy for _, greedy in scored)
    worse = [(None, context, [(token + 1) % 280 for token in tokens]) for _, context, tokens in requests]
    less = model._loglikelihood_tokens(worse, True)
    assert not any(greedy for _, greedy in less)
    assert all(good > bad for (good, _), (bad, _) in zip(scored, less, strict=True))


def test_options_of_a_context_are_read_and_line_breaks_stay_with_it(world):
    """With the options of the prompt the letter's likelihood is that of generate()."""
    model = lm_eval_harness.CRL(str(world[1]["one"]), batch_size="auto:4", add_bos_token=True)
    row = {"prompt": "item", "choices": ["u", "v", "w"], "answer": 0, "task": "file"}
    context = crl_tasks.encode_prompt(model.tokenizer, row).ids
    letter = int(model.model.generate(torch.tensor([context]), max_new_tokens=1)[0, -1])
    assert model._loglikelihood_tokens([(None, context, [letter])], True)[0][1]
    forced = crl_steer.prompt_of(model.env, context)
    assert len(forced.ends) == 3 and model.batch_size == 4
    ids, rest = model._encode_pair("ab\n", "A")  # as a chat template ends
    assert model.tokenizer.decode(ids).endswith("\n") and model.tokenizer.decode(rest) == "A"


def test_what_cannot_be_is_refused(world):
    run = str(world[1]["one"])
    for size in (0, "0", -1, "many", "", "auto4"):
        tiny.one_line(lambda: lm_eval_harness.CRL(run, batch_size=size), f"--batch_size {size}")  # noqa: B023
    tiny.one_line(lm_eval_harness.CRL, "run=runs/RUN")
    tiny.one_line(lambda: lm_eval_harness.CRL(run, device="banana"), "--device banana")
    model = lm_eval_harness.CRL(run)
    model.env.steering[:-1] = torch.nan  # the harness would take the first option for the likeliest
    request = (("a prompt", " A"), [0, 70], [71])
    tiny.one_line(lambda: model._loglikelihood_tokens([request], True), "not finite", "'a prompt'")


def test_the_command_runs_without_a_gpu_from_anywhere(world, tmp_path):
    write_tasks(tmp_path, tiny.tiny_tokenizer(), 4)
    command = [sys.executable, ROOT / "integrations" / "lm_eval_harness.py", "run", "--model", "crl"]
    command += ["--model_args", f"run={world[1]['one']},add_bos_token=True", "--tasks", "local_choice"]
    command += ["--include_path", tmp_path, "--batch_size", "auto:4", "--output_path", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [result] = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(result.read_text())["results"]["local_choice"]
