"""crl_harness.py: the real lm-evaluation-harness on local tasks says what crl_steer.py and crl_eval.py say."""
import json
import random

import pytest
import small_run
import torch

import crl_eval
import crl_steer
import crl_tasks

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval to try the adapter")
import crl_harness  # noqa: E402

TASK = """task: local_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: text
{rest}
"""
REST = {"choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
                  "metric_list: [{metric: acc}]",
        "answer": "output_type: generate_until\ndoc_to_target: answer\n"
                  "generation_kwargs: {until: ['<eos>'], max_gen_toks: 1}\nmetric_list: [{metric: exact_match}]"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder and runs with random policies, on a task of letters with 200 rows and on long answers."""
    folder = small_run.build(tmp_path_factory.mktemp("harness"))
    rows = [{"prompt": f"{'x' * (i % 7)} item {i}", "choices": ["u", "v", "w"], "answer": i % 3} for i in range(200)]
    (folder / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_tasks, "score_answer", small_run.parity)
        runs = {"one": small_run.go(folder, folder / "runs", coef=(1.0, 4.0)),
                "turns": small_run.go(folder, folder / "runs", "long", features=2, steer_tokens=2, observe=2, seed=3),
                "token": small_run.go(folder, folder / "runs", "long", decide="token", steer_tokens=2, coef=(2.0,))}
        for run in runs.values():
            small_run.random_policy(run)
        yield folder, runs


def test_accuracy_and_answers_are_those_of_crl_eval(world, tmp_path):
    run = world[1]["one"]
    study = crl_eval.load_study(crl_eval.Args(run=(str(run),), out=str(tmp_path)), run)
    (tmp_path / "parts").mkdir()
    crl_eval.evaluate([study], ["crl"])
    ours = [json.loads(line) for line in study.part("crl").read_text().splitlines()]
    tok, rows = study.lm.tok, [p.row for p in study.prompts["test"]]
    assert len(rows) >= 40
    with open(tmp_path / "docs.jsonl", "w") as f:
        for row in rows:
            f.write(json.dumps({"text": crl_tasks.prompt_text(tok, row), "choices": ["A", "B", "C"],
                                "gold": row["answer"], "answer": "ABC"[row["answer"]]}) + "\n")
    for kind, rest in REST.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=tmp_path / "docs.jsonl", rest=rest))
    model = crl_harness.CRL(str(run), batch_size=7, add_bos_token=True)
    found = lm_eval.simple_evaluate(model=model, tasks=["local_choice", "local_answer"], task_manager=lm_eval.tasks.
                                    TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0)
    said = {s["doc_id"]: s["resps"][0][0] for s in found["samples"]["local_answer"]}
    assert [said[n] for n in range(len(rows))] == [row["text"] for row in ours]
    space = [ids[0] for ids in ([tok.encode(" " + c, add_special_tokens=False) for c in "ABC"])]
    with crl_steer.steered(study.lm.model, tok, run):
        asked = tok.pad({"input_ids": [p.ids for p in study.prompts["test"]]}, return_tensors="pt", padding_side="left")
        out = study.lm.model.generate(**asked, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    right = out.logits[0][:, space].argmax(-1) == torch.tensor([row["answer"] for row in rows])
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(float(right.float().mean()))
    assert 0 < right.float().mean() < 1


@pytest.mark.parametrize("kind", ["turns", "token"])
def test_forced_answers_are_steered_as_generated_ones(world, kind):
    model, rng = crl_harness.CRL(str(world[1][kind]), add_bos_token=True), random.Random(0)
    texts = ["".join(rng.choices("abc ", k=rng.randint(1, 30))) for _ in range(9)]
    asked = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    said = model.model.generate(**asked, max_new_tokens=4)[:, -4:].tolist()
    assert len({str(e["push"]) for e in model.log}) > 2
    contexts = [model.tokenizer.encode(text) for text in texts]
    ids, rest = model._encode_pair("ab\n", "A")  # as a chat template ends
    assert model.tokenizer.decode(ids).endswith("\n") and model.tokenizer.decode(rest) == "A"
    cut = [row[:1 + n % 4] for n, row in enumerate(said)]  # of unlike lengths
    scored = model._loglikelihood_tokens([(None, c, s) for c, s in zip(contexts, cut)], True, override_bs=4)
    assert all(greedy for _, greedy in scored)
    worse = [[(token + 1) % 280 for token in row] for row in cut]
    less = model._loglikelihood_tokens([(None, c, s) for c, s in zip(contexts, worse)], True)
    assert not any(greedy for _, greedy in less) and all(a > b for (a, _), (b, _) in zip(scored, less))
