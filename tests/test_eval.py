"""crl_eval.py and crl_stats.py on tiny models: statistics by hand, conditions against references, resume, refusals."""
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import small_run
import tiny
import torch

import crl_eval
import crl_ppo
import crl_stats



def evaluation(runs, out, **kw):
    given = dict(constant_candidates=8, constant_prompts=2, sft_epochs=2, sft_lr=(1e-3,), resamples=200)
    return crl_eval.Args(run=tuple(map(str, runs)), out=str(out), **{**given, **kw})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two seeds of a one-token task, one run with two sites, one of long answers, whose outcomes are random."""
    folder = small_run.build(tmp_path_factory.mktemp("eval"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_ppo, "score_answer", small_run.parity)
        runs = {"one": [crl_ppo.main(small_run.flags(folder, folder / "runs", seed=s)) for s in (1, 2)],
                "sites": [crl_ppo.main(small_run.flags(folder, folder / "sites", sae=("none",), layer=(1, 2)))],
                "long": [crl_ppo.main(small_run.flags(folder, folder / "runs", "long", seed=3))]}
        yield folder, runs


@pytest.fixture(scope="module")
def results(world):
    """Everything at once: two seeds, all conditions, oracle, cross-task matrix."""
    folder, runs = world
    opts = evaluation(runs["one"], folder / "all", sampled=True, sft=("lora", "full"), oracle_prompts=3,
                      tasks=(f"file:{folder}/long.jsonl",))
    return crl_eval.main(opts), [json.loads(line) for line in open(folder / "all" / "predictions.jsonl")]


def lab_of(world, kind="one", tmp=None, **kw):
    folder, runs = world
    parts = tmp or folder / "parts"
    parts.mkdir(exist_ok=True)
    return crl_eval.load_run(evaluation(runs[kind], folder / "x", **kw), runs[kind][0], parts, "lab")[0]


def lively(lab):
    """The lab with a policy whose choice depends on the prompt and the token, among all features."""
    for agent in lab.agents:
        agent.trials += 10
        agent.pool.fill_(True)
        agent.action_bias.data.zero_()
        agent.policy[-1].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return lab


def steered(lab, decider, part="test"):
    return crl_eval.steer(lab, lab.prompts[part], {"c": decider})["c"]


# ------------------------------------------------------------------------------------------------------ statistics
def test_mcnemar_and_counts_by_hand():
    a, b = np.array([[1, 1, 1, 0, 0, 1, 0.0]]), np.array([[0, 0, 0, 1, 0, 1, 0.0]])
    c = crl_stats.compare(a, b, 200, 0)
    assert c["per_seed"] == [{"corrected": 3, "misguided": 1, "both_right": 1, "both_wrong": 2, "mcnemar_p": 0.625}]
    assert c["p"] == 0.625 and c["p_seeds"] is None  # 2 * (C(4, 0) + C(4, 1)) / 2^4
    assert c["difference"] == pytest.approx(2 / 7)


def test_seeds_by_hand():
    a, b = np.ones((2, 10)), np.zeros((2, 10))
    a[0, :5] = a[1, :3] = 0  # differences 0.5 and 0.7 over seeds; per prompt 0 three times, 0.5 twice, 1 five times
    c = crl_stats.compare(a, b, 5000, 0)
    assert c["p_seeds"] == pytest.approx(1 - 2 / math.pi * math.atan(6))  # t = 0.6 / 0.1 with one degree of freedom
    assert c["p"] == pytest.approx(2 / 2**7)  # seven signs that count, all positive: exact
    same = crl_stats.compare(b + 1, b, 200, 0)
    assert same["p_seeds"] is None  # no spread over seeds, so no t-test


def test_runs_of_folds_by_hand():
    a, b = np.array([[1.0, 1, 0, 1], [1, 1, 1, 1]]), np.array([[0.0, 0, 0, 1], [0, 1, 1, 0]])
    runs = [1.0, 0.5, 0.0, 0.5]  # fold 0 is the first two prompts: differences of seed 1, seed 2; then those of fold 1
    t = np.mean(runs) / (np.std(runs, ddof=1) / 2)
    c = crl_stats.compare(a, b, 200, 0, [0, 0, 1, 1])
    assert c["p_seeds"] == pytest.approx(2 * (1 - scipy.stats.t(3).cdf(t))) and c["difference"] == 0.5
    assert crl_stats.compare(a[:1], b[:1], 200, 0)["p_seeds"] is None
    assert crl_stats.compare(a[:1], b[:1], 200, 0, [0, 0, 1, 1])["p_seeds"] == pytest.approx(0.5)  # 1.0 and 0.0: t = 1


def test_bootstrap_interval_by_hand():
    values = np.array([1.0] * 30 + [0.0] * 70)  # the bootstrap distribution is binomial(100, 0.3)
    low, high = crl_stats.interval(values, 20000, 0)
    assert (low, high) == (pytest.approx(0.21, abs=0.01), pytest.approx(0.39, abs=0.01))
    assert crl_stats.interval(np.ones(5), 200, 0) == [1.0, 1.0]


def test_holm_by_hand():
    family = [{"p": p, "p_seeds": None} for p in (0.01, 0.04, 0.03)]
    crl_stats.holm(family)
    assert [round(c["p_holm"], 6) for c in family] == [0.03, 0.06, 0.06] and "p_seeds_holm" not in family[0]


def bbq_row(context, polarity, groups, answer, stereotyped):
    return {"choices": ["a", "b", "c"], "answer": answer, "meta": {
        "context_condition": context, "question_polarity": polarity, "category": "X",
        "answer_info": {f"ans{i}": ["", g] for i, g in enumerate(groups)},
        "additional_metadata": {"stereotyped_groups": stereotyped}}}


def test_bbq_bias_score_by_hand():
    g = ["old", "nonOld", "unknown"]
    rows = [bbq_row("ambig", "neg", g, 2, ["old"]), bbq_row("ambig", "nonneg", g, 2, ["old"]),
            bbq_row("ambig", "neg", g, 2, ["old"]), bbq_row("ambig", "neg", g, 2, ["old"]),
            bbq_row("disambig", "neg", ["F-Black", "M-White", "unknown"], 0, ["Black"]),
            bbq_row("disambig", "nonneg", g, 0, ["old"]), bbq_row("disambig", "neg", g, 0, ["old"]),
            bbq_row("disambig", "neg", ["x", "y", "unknown"], 0, ["old"])]
    out = crl_stats.bias_score(rows, [0, 1, 1, 2, 0, 0, None, 0])
    # ambig: biased 0 and 1 (row 2: the other group in a negative question is not); 2 of 3, one of four right
    assert out["ambig"] == {"n": 4, "left_out": 0, "accuracy": 0.25, "not_unknown": 3, "biased": 2,
                            "score": pytest.approx(0.75 * (2 * 2 / 3 - 1))}
    # disambig: biased is row 4 only; row 6 invalid; row 7 names no stereotyped group
    assert out["disambig"] == {"n": 3, "left_out": 1, "accuracy": pytest.approx(2 / 3), "not_unknown": 2, "biased": 1,
                               "score": 0.0}


def test_side_effects_headroom_and_groups_by_hand():
    def seed(texts, free):
        return [{"id": str(i), "text": t, "free": float(f)} for i, (t, f) in enumerate(zip(texts, free))]
    plain, crl = seed("aaaa", [1, 1, 0, 0]), seed("abbc", [1, 0, 1, 0])
    assert crl_stats.side_effects([crl], [plain], "free") == {"changed": 3, "worse": 1, "ratio": pytest.approx(1 / 3)}
    found = {"0": {"free": 0.0}, "1": {"free": 0.5}, "2": {"free": 0.1}, "3": {"free": 0.0}}
    out = crl_stats.headroom([found], {"unsteered": [plain], "crl": [crl]}, ("free",))["free"]
    assert out == {"unsteered": 0.5, "crl": 0.5, "oracle": 0.75, "mean_over_tries": pytest.approx(0.15), "regret": 0.25,
                   "captured": 0.0}
    rows = {str(i): {"meta": {"type": t}, "answer": a} for i, (t, a) in enumerate(
        [("homonyms", "safe"), ("homonyms", "safe"), ("contrast", "unsafe"), ("contrast", "unsafe")])}
    groups = crl_stats.by_group({"crl": [crl]}, rows, "free")
    assert groups["safe"] == {"n": 2, "crl": 0.5} and groups["contrast"] == {"n": 2, "crl": 0.5} and len(groups) == 4


def fabricated(rows, flips):
    """Answers of three seeds to rows: unsteered is right on even prompts, CRL on all but the first `flips`."""
    def seed(right):
        same = {"valid": True, "kl": -1e-9, "tokens": 4, "repetition": 0.25, "letter": None}
        return [{"id": i, "text": str(r), "free": float(r), "constrained": float(r), **same}
                for i, r in zip(rows, right)]
    plain = seed([n % 2 == 0 for n in range(len(rows))])
    return {"unsteered": [plain] * 3, "crl": [seed([n >= flips + s for n in range(len(rows))]) for s in range(3)]}


def test_report_and_plots_of_refusals_and_bias(tmp_path):
    rows = {f"{n:02}": {"meta": {"type": "t"}, "answer": "unsafe" if n % 4 < 2 else "safe"} for n in range(40)}
    said, bias = fabricated(rows, 2), {"ambig": {"score": -0.125, "n": 8}}
    task = {"n": 40, "decodings": ("free",), "primary": "free", "seeds": [1, 2, 3], "folds": [0],
            "skipped": {"caa": "why not"}, "oracle": None, "neutral": {},
            "conditions": crl_stats.summarise(said, dict.fromkeys(rows, 0), ("free",), 200, 0),
            "chosen": {"run": {"few_shot": {"shots": 4, "r": 0.123456, "x": [1, 2]}}},
            "by_group": crl_stats.by_group(said, rows, "free"), "bias": {"unsteered": bias, "crl": bias}}
    cross = {"n": 40, "unsteered": 0.5, "crl": 0.9, "caa": 0.75, "difference": 0.4, "p": 0.00001,
             "by_group": {"safe": {"unsteered": 0.75, "crl": 0.5, "caa": 1.0},
                          "unsafe": {"unsteered": 0.0, "crl": 1.0, "caa": 0.5}}}
    found = {"runs": [], "tasks": {"xstest": task}, "cross": {"xstest": {"xstest": cross, "harmbench": cross}}}
    text = crl_stats.report(found)
    line = next(x for x in text.splitlines() if x.startswith("| unsteered"))
    cells = [c.strip() for c in line.split("|")[1:-1]]
    # CRL has 38, 37 and 36 of 40 right; differences 18, 17 and 16, so t = 17 / (1 / sqrt(3)), 2 degrees of freedom
    assert cells[1] == "50.0" and cells[8] == "+42.5" and cells[11] == "0.0012" and cells[13] == "0.000"
    row = next(x for x in text.splitlines() if x.startswith("| crl"))
    assert " 56/5/55/4 " in row  # 19 + 19 + 18, 1 + 2 + 2, 19 + 18 + 18 and 1 + 1 + 2 over seeds
    for part in ("ahead with p < 0.01 of: unsteered\n",
                 "undecided: none", "few_shot: shots 4, r 0.1235, x [1] [2]", "-0.125",
                 "+40.0 (p <0.0001, n 40)", "caa (why not)", "25.0"):
        assert part in text
    drawn = {"crl": (0.5, 1.0), "caa": (0.0, 0.5), "unsteered": (0.25, 0.0)}  # safe ones refused, unsafe ones refused
    harm = {"crl": (0.5, 0.9), "caa": (0.0, 0.75), "unsteered": (0.25, 0.5)}
    assert crl_stats.pareto(found) == {"trained on xstest: XSTest": drawn, "trained on xstest: HarmBench": harm}
    crl_stats.plots(found, lambda fig, name: fig.savefig(tmp_path / name))
    assert {p.name for p in tmp_path.iterdir()} == {"accuracy.png", "flips.png", "cross.png", "pareto.png"}


# ------------------------------------------------------------------------------------------------- whole evaluations
def test_counts_add_up_and_every_condition_is_there(results, world):
    found, lines = results
    task = found["tasks"][f"file:{world[0]}/one.jsonl"]
    assert list(task["conditions"]) == list(crl_eval.CONDITIONS) and not task["skipped"] and task["seeds"] == [1, 2]
    assert set(task["conditions"]["format_control"]) == {"free"}
    assert {(x["run"], x["condition"]) for x in lines if x["task"] == f"file:{world[0]}/one.jsonl"} == {
        (run.name, c) for run in world[1]["one"] for c in crl_eval.CONDITIONS if c != "format_control"}
    for decoding in ("free", "constrained"):
        for name, c in ((n, c[decoding]) for n, c in task["conditions"].items() if decoding in c):
            for key in ("vs_unsteered", "crl_minus"):
                for s in c[key]["per_seed"] if key in c else ():
                    assert sum(s[k] for k in crl_stats.COUNTS) == task["n"]
                if key in c:
                    gains = [(s["corrected"] - s["misguided"]) / task["n"] for s in c[key]["per_seed"]]
                    assert c[key]["difference"] == pytest.approx(np.mean(gains)) and 0 <= c[key]["p_holm"] <= 1
                    assert c[key]["ci"][0] <= c[key]["difference"] <= c[key]["ci"][1]
            right = [x[decoding] for x in lines if x["condition"] == name and x["task"].endswith("one.jsonl")]
            assert name == "format_control" or c["accuracy"] == pytest.approx(np.mean(right))
    free, constrained = (task["conditions"][c][d]["accuracy"] for c, d in
                         (("format_control", "free"), ("unsteered", "constrained")))
    assert free == constrained
    assert task["oracle"]["n"] == 3 and task["oracle"]["free"]["oracle"] >= task["oracle"]["free"]["crl"]


def test_files_and_cross_task(results, world):
    found, lines = results
    folder, one, long = world[0], f"file:{world[0]}/one.jsonl", f"file:{world[0]}/long.jsonl"
    assert json.loads((folder / "all" / "results.json").read_text()) == json.loads(json.dumps(found))
    assert set(found["cross"]) == {one} and set(found["cross"][one]) == {one, long}
    there = {c: [x["correct"] for x in lines if x["task"] == long and x["condition"] == c] for c in crl_eval.CROSS}
    assert len(there["crl"]) == 2 * found["cross"][one][long]["n"]
    assert found["cross"][one][long]["difference"] == pytest.approx(np.mean(there["crl"]) - np.mean(there["unsteered"]))
    for name in ("accuracy.png", "flips.png", "cross.png", "report.md"):
        assert (folder / "all" / name).stat().st_size > 500
    report = (folder / "all" / "report.md").read_text()
    assert all(f"| {c} " in report for c in crl_eval.CONDITIONS) and "Oracle, 3 prompts" in report


def test_same_bytes_again_whatever_the_batch(results, world):
    """A second evaluation with the same batch size: same bytes; with another one: same choices, answers and figures."""
    folder, runs = world
    names = ("predictions.jsonl", "results.json", "report.md", "accuracy.png", "flips.png")
    subset = dict(conditions=("random", "shuffled", "constant_best", "caa", "logit_bias", "few_shot"))
    made = {}
    for out, batch in (("b4", None), ("again", None), ("b1", 1), ("b3", 3)):
        crl_eval.main(evaluation(runs["one"][:1], folder / out, micro_batch=batch, **subset))
        made[out] = [(folder / out / n).read_bytes() for n in names]
    assert made["b4"] == made["again"]
    for out in ("b1", "b3"):
        a, b = ([json.loads(line) for line in made[o][0].splitlines()] for o in ("b4", out))
        kl_a, kl_b = ([x.pop("kl") or 0 for x in lines] for lines in (a, b))
        assert a == b and kl_a == pytest.approx(kl_b, abs=1e-4)
    every = {(x["run"], x["condition"], x["id"]): x["features"] for x in results[1] if x["task"].endswith("one.jsonl")}
    for x in map(json.loads, made["b4"][0].splitlines()):  # nor do other conditions or seeds beside it change one
        assert every[x["run"], x["condition"], x["id"]] == x["features"]


def test_resume_continues(world, monkeypatch, capsys):
    folder, runs = world
    opts = evaluation(runs["one"][:1], folder / "whole", conditions=("constant_best", "shuffled", "few_shot"))
    crl_eval.main(opts)
    cut = dataclasses.replace(opts, out=str(folder / "cut"))
    steer, plain_answers = crl_eval.steer, crl_eval.plain_answers

    def stop(lab):
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setitem(crl_eval.WHOLE, "few_shot", stop)
        crl_eval.main(cut)
    assert not (folder / "cut" / "results.json").exists()
    calls = []
    monkeypatch.setattr(crl_eval, "steer", lambda *a, **k: (calls.append(k.get("title")), steer(*a, **k))[1])
    monkeypatch.setattr(crl_eval, "plain_answers", lambda *a: (calls.append(a[2]), plain_answers(*a))[1])
    crl_eval.main(dataclasses.replace(cut, resume=True))
    assert calls == ["1 shots", "4 shots", "few-shot"]  # what was finished is not done again
    for name in ("results.json", "predictions.jsonl", "report.md"):
        assert (folder / "cut" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    with pytest.raises(SystemExit, match="--resume: shots differs"):
        crl_eval.main(dataclasses.replace(cut, resume=True, shots=(2,)))
    calls.clear()
    crl_eval.main(cut)  # without --resume everything is done anew
    assert "validation prompts" in calls


def test_long_answers(world):
    folder, runs = world
    found = crl_eval.main(evaluation(runs["long"], folder / "long", sft=("lora", "full"), oracle_prompts=2, oracle_n=3))
    task = found["tasks"][f"file:{folder}/long.jsonl"]
    assert set(task["skipped"]) == {"logit_bias", "format_control"}
    assert set(task["conditions"]) == set(crl_eval.CONDITIONS) - {"logit_bias", "format_control", "crl_sampled"}
    assert task["decodings"] == ("free",) and 0 <= task["oracle"]["free"]["regret"] <= 1
    for line in map(json.loads, open(folder / "long" / "predictions.jsonl")):
        assert 1 <= line["tokens"] <= 3 and line["answer"] in "abcdefgh"
        if line["condition"] in ("crl", "random", "constant_random", "constant_best", "top_activation", "shuffled"):
            assert len(line["features"]) == line["tokens"] and all(len(f) == 1 for f in line["features"])
        if line["condition"] == "constant_random":
            assert len({f[0] for f in line["features"]}) == 1 and line["features"][0] != ["1:no-op"]


def test_a_run_older_than_screening_was_not_screened(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"args": {"task": "xstest"}}))
    assert crl_eval.stored_flags(tmp_path) == {"task": "xstest", "screen": False}
    (tmp_path / "args.json").write_text(json.dumps({"args": {"task": "xstest", "screen": True}}))
    assert crl_eval.stored_flags(tmp_path)["screen"] is True


def test_every_condition_is_in_the_refusal_plot(world, tmp_path, capsys):
    """A run on XSTest, applied to HarmBench as well: all conditions there too, fitted on XSTest only."""
    xs = [{"prompt": f"How do I stop {i} leaks?", "label": ("safe", "unsafe")[i % 2], "type": "t"} for i in range(24)]
    harm = [{"prompt": f"Write threat {i}", "category": "c"} for i in range(16)]
    for path, rows in (("xstest/test", xs), ("harmbench/standard", harm)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / f"{path}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = small_run.flags(world[0], tmp_path / "runs", "long", data_dir=str(tmp_path))
    run = crl_ppo.main(dataclasses.replace(flags, task="xstest"))
    opts = evaluation([run], tmp_path / "out", tasks=("harmbench",), sft=("lora",), sft_epochs=1)
    found = crl_eval.main(opts)
    names = set(crl_eval.CONDITIONS) - {"logit_bias", "format_control", "crl_sampled", "sft_full"}
    panels = crl_stats.pareto(found)
    assert set(panels) == {"trained on xstest: XSTest", "trained on xstest: HarmBench"}
    assert all(set(points) == names for points in panels.values()) and (tmp_path / "out" / "pareto.png").exists()
    lines = [json.loads(line) for line in open(tmp_path / "out" / "predictions.jsonl")]
    for name in names:
        safe, unsafe, harmful = (
            np.mean([x["correct"] for x in lines if (x["condition"], x["task"], x["answer"]) == (name, *key)])
            for key in (("xstest", "safe"), ("xstest", "unsafe"), ("harmbench", "unsafe")))
        expected = 1 - safe, unsafe, harmful
        assert panels["trained on xstest: XSTest"][name] == pytest.approx(expected[:2])
        assert panels["trained on xstest: HarmBench"][name] == pytest.approx(expected[::2])
    parts = {f.name for f in (tmp_path / "out" / "parts").iterdir()}
    assert {"run1.caa.json", "run1.constant_best.json", "run1.shots.json"} <= parts
    assert not [f for f in parts if f.endswith(("safetensors", "tmp")) or f.count(".") > 2 and "caa" in f]


def test_readme_names_every_field(results):
    section = (Path(crl_eval.__file__).parent / "README.md").read_text().split("\n## Evaluation\n")[1].split("\n## ")[0]
    found, lines = results
    task = next(iter(found["tasks"].values()))
    crl = task["conditions"]["crl"]["constrained"]
    oracle, cross = task["oracle"]["free"], next(iter(next(iter(found["cross"].values())).values()))
    shown = [found, task, crl, crl["vs_unsteered"], crl["vs_unsteered"]["per_seed"][0], crl["side_effects"], oracle,
             task["neutral"]["crl"], cross, *lines, {"crl_minus", "left_out", "not_unknown", "biased", "score"}]
    fields = {key for x in shown for key in x} - set(crl_eval.CONDITIONS)
    assert [key for key in sorted(fields) if f"`{key}`" not in section] == []
    flags = {f"--{f.name.replace('_', '-')}" for script in (crl_eval, crl_ppo) for f in dataclasses.fields(script.Args)}
    assert [name for name in crl_eval.CONDITIONS if f"`{name}`" not in section] == [] and "--sft lora" in section
    assert set(re.findall("--[a-z][a-z-]+", section)) - flags == set()


# --------------------------------------------------------------------------------------------------------- conditions
@pytest.mark.parametrize("kind, first", [("one", 0), ("sites", 0), ("long", 0), ("long", 1), ("long", 2)])
def test_crl_is_the_greedy_rollout(world, kind, first):
    lab = lively(lab_of(world, kind))
    lab.args.steer_tokens, lab.args.sticky_final = first, 0.0
    said = steered(lab, crl_eval.policy(lab))
    assert len({str(a["features"]) for a in said}) > 2
    expected, decisions = crl_ppo.rollout(lab.lm, lab.agents, lab.args, lab.prompts["test"], 1, None, 0.0,
                                          0.0, greedy=True)
    assert not first or {len(a["features"]) for a in said} == {min(first, max(a["tokens"] for a in said))}
    assert [a["text"] for a in said] == [r["text"] for r in expected]
    assert [a["reward"] for a in said] == [r["reward"] for r in expected]
    for site, d in zip(lab.sites, decisions):
        for roll, t, actions in zip(d["roll"][:, 0].tolist(), d["t"].tolist(), d["actions"][:, 0].tolist()):
            assert set(crl_eval.labels(site, actions)) <= set(said[roll]["features"][t])


def test_many_deciders_equal_one_at_a_time(world):
    for kind in ("one", "sites", "long"):
        lab = lab_of(world, kind)
        deciders = {"unsteered": None, "a": crl_eval.constant(lab, 3), "b": crl_eval.top_activation(lab)}
        together = crl_eval.steer(lab, lab.prompts["test"], deciders)
        for name, decider in deciders.items():
            alone = steered(lab, decider)
            assert [a["text"] for a in alone] == [a["text"] for a in together[name]]
            assert [a["kl"] for a in alone] == pytest.approx([a["kl"] for a in together[name]], abs=1e-4)
        assert together["unsteered"][0]["kl"] == pytest.approx(0, abs=1e-5) and together["a"][0]["kl"] != 0


def test_constant_pushes_its_direction_at_every_token(world):
    lab = lab_of(world, "long")
    x = torch.randn(3, 16)
    delta, actions = crl_eval.constant(lab, 5, multiple=2.0)(0, x, 1, torch.arange(3))
    expected = 2.0 * lab.args.coef * x.norm(dim=1, keepdim=True) * lab.sites[0].directions[5]
    assert torch.allclose(delta, expected) and actions.tolist() == [[5]] * 3


def test_constant_features_where_the_policy_may_push_two(world, monkeypatch):
    """The random control pushes as many as the policy may, the best constant feature and the oracle push theirs once."""
    lab = lab_of(world, "long")
    monkeypatch.setattr(lab.args, "features_per_token", 2)
    x, n = torch.randn(3, 16), torch.arange(3)
    delta, actions = crl_eval.constant_random(lab)(0, x, 0, n)
    a, b = actions[0].tolist()
    assert a != b and (actions == actions[0]).all()
    c = lab.args.coef * x.norm(dim=1, keepdim=True)
    assert torch.allclose(delta, c * lab.sites[0].directions[[a, b]].sum(0))
    assert torch.allclose(crl_eval.constant(lab, 5)(0, x, 0, n)[0], c * lab.sites[0].directions[5])
    one = lab_of(world, "one")
    alone = crl_eval.try_actions(one, one.prompts["val"], torch.arange(24), "")
    monkeypatch.setattr(one.args, "features_per_token", 2)
    for key, right in crl_eval.try_actions(one, one.prompts["val"], torch.arange(24), "").items():
        assert torch.equal(right, alone[key])


def test_random_is_gated_by_the_policy_and_of_its_norm(world):
    lab = lab_of(world, "long")
    site, x, n = lab.sites[0], torch.randn(6, 16), torch.arange(6)
    lab.agents[0].trials += 10  # all features have evidence
    bias = lab.agents[0].action_bias.data
    bias[-1] = -100.0
    delta, actions = crl_eval.random_feature(lab)(0, x, 0, n)
    assert torch.allclose(delta.norm(dim=1), lab.args.coef * x.norm(dim=1)) and len(set(actions.flatten().tolist())) > 1
    assert not crl_eval.is_noop(site, actions).any()
    bias[-1] = 100.0  # the policy does nothing: neither does its control
    delta, actions = crl_eval.random_feature(lab)(0, x, 0, n)
    assert not delta.any() and crl_eval.is_noop(site, actions).all()


def test_top_activation_is_the_strongest_feature(world):
    lab = lab_of(world)
    said = steered(lab, crl_eval.top_activation(lab))
    crl_ppo.reference(lab.lm, lab.sites, lab.args, lab.prompts["test"])
    x = torch.stack([p.x for p in lab.prompts["test"]])
    assert [a["features"] for a in said] == [[[f"1:{f}"]] for f in lab.sites[0].sae.encode(x).argmax(1).tolist()]


def test_shuffled_permutes_the_decisions_of_others(world, tmp_path):
    lab = lively(lab_of(world, tmp=tmp_path))
    said = crl_eval.evaluate(lab, ("unsteered", "crl", "shuffled"))[0]
    own, given = ([a["features"] for a in said[c]] for c in ("crl", "shuffled"))
    assert [a["id"] for a in said["crl"]] == [a["id"] for a in said["shuffled"]] and len(set(map(str, own))) > 2
    assert given == [own[lab.partner[n]] for n in range(len(own))]
    assert sorted(lab.partner.values()) == sorted(lab.partner) and all(a != b for a, b in lab.partner.items())
    lab = dataclasses.make_dataclass("Lab", ["chosen", "partner", "sites", "args"])(
        {(0, 0): [[1], [2]], (1, 0): [[3]]}, {0: 1, 1: 0}, [tiny.tiny_site(1, 4, 8)], tiny.tiny_args())
    decide = crl_eval.shuffled(lab)
    given = decide(0, torch.ones(2, 8), 1, torch.tensor([0, 1]))[1]
    assert given.tolist() == [[3], [2]]  # the last decision of the shorter answer goes on


def test_best_constant_is_chosen_on_train_and_validation_only(world, tmp_path, monkeypatch):
    """Feature 7 answers most training prompts right, 9 the first two; coefficient 2 wins on validation."""
    lab, tried = lab_of(world, tmp=tmp_path), []
    train, val = lab.prompts["train"], lab.prompts["val"]

    def judged(lab_, prompts, actions, title):
        tried.append((len(prompts), actions.tolist()))
        right = [[float(a == 7 or a == 9 and any(p is q for q in train[:2])) for a in actions] for p in prompts]
        return {"free": torch.zeros(len(prompts), len(actions)), "constrained": torch.tensor(right)}

    def on_validation(lab_, prompts, deciders, **kw):
        assert prompts is val
        return {c: [{"reward": -abs(c - 2.0)}] for c in deciders}
    with monkeypatch.context() as m:
        m.setattr(crl_eval, "try_actions", judged)
        m.setattr(crl_eval, "steer", on_validation)
        decide = crl_eval.constant_best(lab)
    x = torch.randn(2, 16)
    expected = crl_eval.constant(lab, 7, 2.0)(0, x, 0, None)[0]
    assert torch.allclose(decide(0, x, 0, torch.arange(2))[0], expected)
    assert tried[0] == (2, list(range(24)))  # the whole dictionary first, then the best eighth on the other prompts
    assert [n for n, _ in tried] == [2, 6] and len(tried[1][1]) == 3 and {7, 9} <= set(tried[1][1])
    chosen = json.loads((tmp_path / "lab.constant_best.json").read_text())
    assert chosen["features_and_prompts"] == [[24, 2], [3, 8]] and chosen["multiple"] == 2.0


def test_best_constant_of_long_answers_is_the_best_on_train(world, tmp_path):
    lab = lab_of(world, "long", tmp=tmp_path, constant_candidates=24, constant_prompts=0, coefs=(1.0,))
    crl_eval.constant_best(lab)
    chosen, site = json.loads((tmp_path / "lab.constant_best.json").read_text()), lab.sites[0]
    right = {a: sum(r["reward"] for r in steered(lab, crl_eval.constant(lab, a), "train")) for a in range(24)}
    assert right[chosen["action"]] == max(right.values()) and chosen["features_and_prompts"] == [[24, 8]]
    assert chosen["feature"] == site.label(chosen["action"]) and len(set(right.values())) > 1


def test_prefills_are_kept_as_far_as_the_cache_goes(world, monkeypatch):
    lab, seen, reference = lab_of(world), [], crl_ppo.reference
    monkeypatch.setattr(crl_ppo, "reference", lambda *a: (seen.extend(p.row["id"] for p in a[3]), reference(*a))[1])
    train, deciders = lab.prompts["train"], {"a": crl_eval.constant(lab, 3)}
    for gigabytes, repeated in ((4.0, 0), (0.0, len(train))):
        lab.args.kv_cache_gb = gigabytes
        lab.held.clear()
        for p in train:
            p.x = p.kv = p.ref_logp = None
        first = crl_eval.steer(lab, train, deciders, fitting=True)
        seen.clear()
        assert crl_eval.steer(lab, train, deciders, fitting=True) == first
        assert len(set(seen)) == repeated


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_unsteered_logps_of_many_answers_to_a_prompt(arch):
    lm = tiny.tiny_lm(arch)
    prompts, answers = tiny.tiny_prompts(lm, (9, 4, 1)), [[7], [8, 9, 10], [11, 12], [13], [14, 15], [16, 17, 18]]
    expected = crl_ppo.unsteered_next(lm, [p for p in prompts for _ in range(2)], answers)[1]
    for a, b in zip(crl_eval.unsteered_logps(lm, prompts, 2, answers), expected):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("kind", ["one", "long"])
def test_plain_answers_share_what_prompts_begin_with(world, kind, monkeypatch):
    """Few-shot prompts, whose examples are run once, are answered as without sharing."""
    lab = lab_of(world, kind)
    shots = [(p.row, "A") for p in lab.prompts["train"][:2]]
    def prompts():
        return [crl_ppo.Prompt(p.row, crl_eval.few_shot_ids(lab.lm, shots, p.row)) for p in lab.prompts["test"]]
    keys, fed = ("id", "text", "reward", "free", "constrained", "letter"), []
    with monkeypatch.context() as m:
        forward = lab.lm.model.forward
        m.setattr(lab.lm.model, "forward", lambda ids, *a, **k: (fed.append(ids.numel()), forward(ids, *a, **k))[1])
        said = crl_eval.plain_answers(lab, prompts(), "t")
    expected = crl_eval.steer(lab, prompts(), {"plain": None})["plain"]
    assert [[a[k] for k in keys] for a in said] == [[a[k] for k in keys] for a in expected]
    if kind == "one":
        assert sum(fed) < sum(len(p.ids) for p in prompts())


def test_correlated_and_contrastive_vectors(world, tmp_path):
    lab = lab_of(world, "long", tmp=tmp_path)
    train = lab.prompts["train"]
    plain = crl_ppo.decode(lab.lm, lab.sites, train, [1] * len(train), 3, None)[0]
    texts = [lab.lm.tok.decode(ids, skip_special_tokens=True) for ids in plain]
    right = np.array([small_run.parity(None, None, None, text)[0] for text in texts])
    acts, resid = [], []
    for p, ids in zip(train, plain):
        xs = []
        with crl_ppo.hooked(lab.lm, lab.sites, lambda i, h: (xs.append(h[0]), h)[1]):
            lab.lm.model(torch.tensor([p.ids + ids[:-1]]))
        x = xs[0][len(p.ids) - 1:]  # the residual streams that the generated tokens came from
        acts.append(lab.sites[0].sae.encode(x).amax(0))
        resid.append(x.mean(0))
    acts, resid = torch.stack(acts), torch.stack(resid)
    r = np.array([np.corrcoef(a, right)[0, 1] if a.std() > 0 else -1 for a in acts.T.numpy()])
    best = int(r.argmax())
    x = torch.randn(2, 16)
    expected = acts[right == 1][:, best].mean() * lab.sites[0].sae.W_dec[best]
    assert torch.allclose(crl_eval.corrsteer_s(lab)(0, x, 0, None)[0], expected.expand(2, -1), atol=1e-4)
    chosen = json.loads((tmp_path / "lab.corrsteer_s.json").read_text())
    assert [c["id"] for c in chosen] == [best] and chosen[0]["r"] == pytest.approx(r[best], abs=1e-5)
    every = json.loads((crl_eval.corrsteer_a(lab), tmp_path / "lab.corrsteer_a.json")[1].read_text())
    assert [c["id"] for c in every] == [int(f) for f in np.argsort(-r)[:10] if r[f] > 0]
    v = resid[right == 1].mean(0) - resid[right == 0].mean(0)
    delta = crl_eval.caa(lab)(0, x, 0, None)[0]
    multiple = json.loads((tmp_path / "lab.caa.json").read_text())["multiple"]
    assert torch.allclose(delta, multiple * lab.args.coef * x.norm(dim=1, keepdim=True) * v / v.norm(), atol=1e-4)


def test_logit_bias_learns_the_letter_prior(world, tmp_path):
    lab = lab_of(world, tmp=tmp_path)
    for p in lab.prompts["train"]:
        p.row["answer"] = 1
    bias = crl_eval.logit_bias(lab)
    test = lab.prompts["test"]
    crl_ppo.reference(lab.lm, lab.sites, lab.args, test)
    said = [crl_eval.biased_answer(lab, p, bias) for p in test]
    assert [a["text"] for a in said] == ["B"] * len(test)
    assert [a["free"] for a in said] == [float(p.row["answer"] == 1) for p in test]
    assert [a["letter"] for a in (crl_eval.biased_answer(lab, p, torch.zeros(26)) for p in test)] == [
        a["letter"] for a in steered(lab, None)]


@pytest.mark.parametrize("chat", [False, True])
def test_few_shot_prompts(chat):
    lm = tiny.tiny_lm("llama", chat=chat)
    rows = [{"prompt": f"q{i}", "choices": ["x", "y"], "answer": i} for i in range(2)]
    assert crl_eval.few_shot_ids(lm, [], rows[0]) == crl_ppo.format_prompt(lm, rows[0])
    text = lm.tok.decode(crl_eval.few_shot_ids(lm, [(rows[1], "B")], rows[0]))
    assert text.index("q1") < text.index("B", text.index("only")) < text.index("q0")
    assert text.count(tiny.BOS) == (0 if chat else 1)


@pytest.mark.parametrize("kind, lr", [("lora", 3e-2), ("full", 3e-3)])
def test_sft_learns_and_leaves_the_model_alone(world, tmp_path, kind, lr, monkeypatch):
    lab = lab_of(world, tmp=tmp_path, sft_epochs=6, sft_lr=(1e-9, lr))
    for part in ("train", "val"):
        for p in lab.prompts[part]:
            p.row["answer"] = 1
    before = {k: v.clone() for k, v in lab.lm.model.state_dict().items()}
    plain = [(a["text"], a["letter"]) for a in steered(lab, None)]
    steered(lab, None, "val")
    done = crl_eval.sft(lab, kind)
    assert {a["letter"] for a in done["said"]} == {1} != {letter for _, letter in plain}
    assert done["chosen"]["reward"] == 1 and done["chosen"]["lr"] == lr
    after = lab.lm.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert not any(p.requires_grad for p in lab.lm.model.parameters())
    assert [(a["text"], a["letter"]) for a in steered(lab, None)] == plain
    monkeypatch.setattr(crl_eval, "sft_loss", None)  # trained once: what is there is taken
    assert crl_eval.sft(lab, kind) == done


def test_full_fine_tuning_of_a_half_precision_model_is_in_float32(world, tmp_path):
    lm = tiny.tiny_lm("gemma2")
    lm.model.to(torch.bfloat16)
    own = {k: v.clone() for k, v in (*lm.model.named_parameters(), *lm.model.named_buffers())}
    with crl_eval.trainable(lm, "full", 2, 0) as weights:
        assert {w.dtype for w in weights} == {torch.float32} and len(weights) == len(list(lm.model.parameters()))
        with torch.no_grad():
            weights[0].add_(1.0)
    for k, v in (*lm.model.named_parameters(), *lm.model.named_buffers()):
        assert v.dtype == own[k].dtype and torch.equal(v, own[k])


def test_sft_stops_early(world, tmp_path, monkeypatch):
    lab, rewards = lab_of(world, tmp=tmp_path, sft_epochs=9), iter([0.2, 0.6, 0.6, 0.4, 1.0])
    plain_answers, used = crl_eval.plain_answers, []
    def judged(lab_, prompts, title):
        if title != "validation prompts":
            return plain_answers(lab_, prompts, title)
        used.append(title)
        return [{"reward": next(rewards)}]
    monkeypatch.setattr(crl_eval, "plain_answers", judged)
    chosen = crl_eval.sft(lab, "lora")["chosen"]
    assert len(used) == 4 and chosen["epoch"] == 2 and chosen["reward"] == 0.6  # two passes without a rise


def answers_nll(lab, pairs):
    """Negative log-probability of every answer token of [(prompt, answer ids)], one prompt at a time."""
    nll = []
    for p, ids in pairs:
        logp = lab.lm.model(torch.tensor([p.ids + ids])).logits[0].log_softmax(-1)
        nll += [-logp[len(p.ids) - 1 + j, token] for j, token in enumerate(ids)]
    return torch.stack(nll)


def test_sft_loss_is_the_answers_cross_entropy(world):
    lab = lab_of(world, "long")
    pairs = [(p, ids) for p, ids in zip(lab.prompts["train"], ([7, 8, 9], [10]))]
    assert crl_eval.sft_loss(lab, pairs).item() == pytest.approx(float(answers_nll(lab, pairs).sum()), abs=1e-4)


def test_sft_steps_along_the_gradient_of_the_whole_batch(world, tmp_path, monkeypatch):
    """Per answer token of the batch, however the batch is cut into pairs."""
    lab, grads = lab_of(world, "long", tmp=tmp_path, sft_epochs=1, sft_lr=(1e-9,), sft_batch=5), []
    lab.golds = [(p, text) for p, text in zip(lab.prompts["train"], ("no", "a longer answer", "b", "", "c d"))]
    pairs = [(p, crl_eval.target_ids(lab, text)) for p, text in lab.golds]
    assert len({len(p.ids + ids) for p, ids in pairs}) > 1 and len({len(ids) for _, ids in pairs}) > 1
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, most: (
        grads.append([w.grad.clone() for w in weights]), clip(weights, most)))
    crl_eval.sft(lab, "lora")
    with crl_eval.trainable(lab.lm, "lora", lab.opts.sft_rank, lab.seed) as weights:
        answers_nll(lab, pairs).mean().backward()
        assert len(grads) == 1 and any(w.grad.any() for w in weights)
        for w, grad in zip(weights, grads[0]):
            assert torch.allclose(w.grad, grad, atol=1e-5)


def test_oracle_is_exhaustive(world, monkeypatch):
    lab, branch, tried = lab_of(world, oracle_prompts=3), crl_ppo.branch, []
    monkeypatch.setattr(crl_ppo, "branch", lambda *a: (tried.append(len(a[2]) * a[3]), branch(*a))[1])
    found, right = crl_eval.oracle(lab), {}
    prompts, A = sorted(lab.prompts["test"], key=lambda p: p.row["id"])[:3], len(lab.sites[0].directions)
    assert sum(tried) == 3 * A
    for a in range(A):
        said, _ = crl_ppo.rollout(lab.lm, lab.agents, lab.args, prompts, 1, None, 0, 0, forced=torch.tensor([a]))
        for p, r in zip(prompts, said):
            right.setdefault(p.row["id"], []).append(r["constrained"])
    assert {i: f["constrained"] for i, f in found.items()} == pytest.approx({i: np.mean(v) for i, v in right.items()})


def test_kl_by_hand(world):
    """One-token answers: exact, over the vocabulary. Long ones: log-probabilities of what was said, per token."""
    for kind in ("one", "long"):
        lab = lab_of(world, kind)
        for p, a in zip(lab.prompts["test"], steered(lab, crl_eval.constant(lab, 3))):
            ids, T = list(p.ids), 1 if kind == "one" else a["tokens"]
            nats = 0.0
            for t in range(T):
                def edit(i, h):
                    moved = torch.zeros_like(h)  # pushed at the last prompt position and every generated one
                    part = h[0, len(p.ids) - 1:]
                    scale = lab.args.coef * part.norm(dim=1, keepdim=True)
                    moved[0, len(p.ids) - 1:] = scale * lab.sites[0].directions[3]
                    return h + moved
                plain = lab.lm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                with crl_ppo.hooked(lab.lm, lab.sites, edit):
                    logp = lab.lm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                said = int(logp.argmax())
                nats += float((logp.exp() * (logp - plain)).sum() if kind == "one" else logp[said] - plain[said])
                ids.append(said)
            assert a["kl"] == pytest.approx(nats / T, abs=1e-4)


def test_length_and_repetition_by_hand(world, monkeypatch):
    lab, said = lab_of(world, "long"), [7, 7, 7, 7, 7]
    n = len(lab.prompts["test"])
    monkeypatch.setattr(crl_ppo, "decode", lambda lm, sites, prompts, counts, *a: (
        [said] * len(counts), [[0.0] * 5] * len(counts)))
    answers = crl_eval.steer(lab, lab.prompts["test"], {"c": None}, fitting=True)["c"]
    assert [(a["tokens"], a["repetition"]) for a in answers] == [(5, pytest.approx(2 / 3))] * n  # 3 trigrams, 1 new


def test_sampled_policy_draws_from_the_policy(world, tmp_path):
    lab = lively(lab_of(world, "long", tmp=tmp_path))
    agent, k = lab.agents[0], lab.args.features_per_token
    agent.policy[-1].weight.data.mul_(0.1)
    x, n = torch.randn(6, 16), torch.arange(6)
    numbers = crl_eval.table_of_numbers(lab, k + 1, 2)[n, 0, 0, :k]
    mask = agent.mask(lab.args, x, 0, False)
    p = crl_ppo.behaviour_logits(agent.logits(agent.observe(x, 0), mask), mask, 0.0).double().exp()
    expected = (p.cumsum(1) < numbers.double()).sum(1)  # inverse CDF
    actions = crl_eval.sampled_policy(lab)(0, x, 0, n)[1]
    assert actions[:, 0].tolist() == expected.tolist() != p.argmax(1).tolist()


def test_neutral_text(world):
    lab = lab_of(world)
    out = crl_eval.neutral(lab, {"still": crl_eval.constant(lab, 3, 0.0), "pushed": crl_eval.constant(lab, 3)})
    nll = []
    for text in crl_eval.NEUTRAL:
        ids = torch.tensor([lab.lm.tok.encode(text)[:128]])
        logp = lab.lm.model(ids).logits[0].log_softmax(-1)
        nll.append(-logp[1:-1].gather(1, ids[0, 2:, None]).mean())
    assert out["unsteered"] == {"perplexity": pytest.approx(float(torch.stack(nll).mean().exp()), rel=1e-5), "kl": 0.0}
    assert out["still"] == out["unsteered"]
    assert out["pushed"]["kl"] > 0.01 and out["pushed"]["perplexity"] != out["unsteered"]["perplexity"]

    lab.args.steer_tokens = 2  # like an answer: only the first two tokens are pushed
    times = []

    def twice(i, x, t, rows):
        times.append(t)
        return crl_eval.constant(lab, 3)(i, x, t, rows)
    early = crl_eval.neutral(lab, {"pushed": twice})["pushed"]
    assert times == [0, 1] * len(crl_eval.NEUTRAL) and 0 < early["kl"] < out["pushed"]["kl"]


def judge_dir(folder, names):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    tok = tiny.tiny_tokenizer()
    cfg = LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      num_attention_heads=2, pad_token_id=tok.pad_token_id, id2label=dict(enumerate(names)))
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(cfg)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return model.eval(), tok


def test_learned_refusal_judge(world, tmp_path):
    texts = [f"text {i}" * i for i in range(1, 20)]
    for index, names in ((1, ["NORMAL", "REJECTION"]), (0, ["refusal", "no_refusal"])):
        model, tok = judge_dir(tmp_path / "j", names)
        expected = [int(model(**tok(text, return_tensors="pt")).logits.argmax()) == index for text in texts]
        judge = crl_eval.load_judge(f"hf:{tmp_path}/j", torch.device("cpu"))
        assert judge(texts) == expected and len(set(expected)) == 2
        for thought in "abcdefgh":  # what was thought is left out
            assert judge([f"<think>{thought * 30}</think>{text}" for text in texts]) == expected
    judge_dir(tmp_path / "k", ["good", "bad"])
    with pytest.raises(SystemExit, match="one label must be about refusing; it has good, bad"):
        crl_eval.load_judge(f"hf:{tmp_path}/k", torch.device("cpu"))
    lab = dataclasses.replace(lab_of(world, "long"), judge=lambda texts: [True] * len(texts))
    assert "rule" not in steered(lab, None)[0]  # not a refusal task
    lab.args.task = "xstest"
    for n, p in enumerate(lab.prompts["test"]):
        p.row["answer"] = "unsafe" if n % 2 else "safe"
    said = steered(lab, None)
    assert [a["reward"] for a in said] == [float(n % 2) for n in range(len(said))] and "rule" in said[0]


# ----------------------------------------------------------------------------------------------- refusals, other modes
@pytest.mark.parametrize("change, field", [("model", "model_hash"), ("sae", "sae_hash"), ("data", "data_hash")])
def test_a_run_whose_parts_differ_is_refused(world, tmp_path, change, field):
    copy = tmp_path / "copy"
    shutil.copytree(world[0], copy, ignore=shutil.ignore_patterns("runs", "sites", "all", "b*", "parts"))
    run = tmp_path / "run"
    shutil.copytree(world[1]["one"][0], run)
    record = json.loads((run / "args.json").read_text().replace(str(world[0]), str(copy)))
    state = dict(task=f"file:{copy}/one.jsonl", model=f"{copy}/model")  # the paths the checkpoint itself names
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(run / "best.safetensors", "pt") as f:
        meta, tensors = json.loads(f.metadata()["crl"]) | state, {k: f.get_tensor(k) for k in f.keys()}
    save_file(tensors, run / "best.safetensors", metadata={"crl": json.dumps(meta)})
    (run / "args.json").write_text(json.dumps(record))
    crl_eval.load_run(evaluation([run], tmp_path), run, tmp_path, "ok")  # moved as a whole it is the same
    if change == "model":
        tiny.save_tiny(copy / "model", "llama", d_model=16, n_layers=4, seed=5)
    elif change == "sae":
        tiny.tiny_sae_dir(copy / "sae", d_model=16, d_sae=24, hook_name=small_run.HOOK, seed=5)
    else:
        lines = (copy / "one.jsonl").read_text().replace("item", "thing")
        (copy / "one.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match=f"{field} differs: checkpoint"):
        crl_eval.main(evaluation([run], tmp_path / "out"))


def test_folds_answer_every_prompt_once(world, tmp_path):
    (folder, runs), seeds = world, (1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_ppo, "score_answer", small_run.parity)
        here = dict(zip(seeds, runs["one"]))
        there = {s: Path(crl_ppo.main(small_run.flags(folder, tmp_path, seed=s, fold=2))).rename(
            tmp_path / Path(here[s]).name) for s in seeds}  # as if begun in the same second, in another folder
        grid = [there[2], here[1], here[2], there[1]]
        out = crl_eval.main(evaluation(grid, tmp_path / "out", conditions=("shuffled",), oracle_prompts=2))
        alone = [crl_eval.main(evaluation([path], tmp_path / "alone", conditions=("shuffled",)))
                 for path in (here[1], there[1], here[2], there[2])]
        (_, task), = out["tasks"].items()
        parts = [next(iter(a["tasks"].values())) for a in alone]
        n = [p["n"] for p in parts]
        assert task["seeds"] == [1, 2] and task["folds"] == [0, 2] and task["n"] == n[0] + n[1]
        assert task["by_group"]["fold 0"]["n"] == n[0] and task["by_group"]["fold 2"]["n"] == n[1]
        assert task["oracle"]["n"] == 4
        for name in ("unsteered", "crl", "shuffled"):
            score = [p["conditions"][name]["free"]["accuracy"] for p in parts]
            per_seed = [(n[0] * score[s] + n[1] * score[s + 1]) / task["n"] for s in (0, 2)]
            assert task["conditions"][name]["free"]["per_seed"] == pytest.approx(per_seed)
        lines = [json.loads(line) for line in open(tmp_path / "out" / "predictions.jsonl")]
        assert len({(r["seed"], r["condition"], r["id"]) for r in lines}) == len(lines) == 2 * 3 * task["n"]
        named = {r["run"] for r in out["runs"]}
        assert {r["run"] for r in lines} == task["chosen"].keys() == named == set(map(str, grid))
        report = (tmp_path / "out" / "report.md").read_text()
        assert f"{task['n']} test prompts, each in one of 2 folds, 2 seed(s)" in report
        with pytest.raises(SystemExit, match=r"no run of seed 2 in fold 2; every seed needs every fold \[0, 2\]"):
            crl_eval.main(evaluation(grid[1:], tmp_path / "none"))
        assert not (tmp_path / "none").exists()


def test_runs_that_do_not_belong_together_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(crl_eval, "evaluate", lambda lab, names: ({}, {}, {}, {}))  # what is refused is so before
    run, twin = world[1]["one"][0], tmp_path / "twin"
    shutil.copytree(run, twin)
    with pytest.raises(SystemExit, match="no other seed of the experiment of .*the same seed"):
        crl_eval.main(evaluation([run, twin], tmp_path, conditions=("crl",)))
    record = json.loads((twin / "args.json").read_text())
    record["args"]["coef"] = 0.25
    (twin / "args.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="coef is 0.25, there 0.5"):
        crl_eval.main(evaluation([run, twin], tmp_path, conditions=("crl",)))
    with pytest.raises(SystemExit, match="sae differs from"):
        crl_eval.main(evaluation([world[1]["one"][0], world[1]["sites"][0]], tmp_path, conditions=("crl",)))


@pytest.mark.parametrize("flags, message", [
    (dict(run=()), "--run is missing"),
    (dict(run=("nowhere",)), "--run nowhere: no such directory"),
    (dict(conditions=("constant_bst",)), "unknown condition 'constant_bst'; did you mean constant_best"),
    (dict(tasks=("mmlo",)), "--tasks: unknown task 'mmlo'; did you mean mmlu"),
    (dict(checkpoint="first"), "--checkpoint first: must be best or last"),
    (dict(resamples=0), "--resamples 0: must be positive"),
    (dict(coefs=(1.0, math.nan)), "--coefs nan: must be positive"),
    (dict(test_samples=-1), "--test-samples -1: must not be negative"),
    (dict(shots=()), "need at least one value"),
    (dict(prompt="  "), "--prompt is empty"),
    (dict(neutral_text="none.txt"), "no such file: none.txt"),
    (dict(refusal_judge="x"), "must be hf:<classifier"),
])
def test_bad_input_is_one_line(world, tmp_path, flags, message):
    opts = evaluation(world[1]["one"][:1], tmp_path)
    with pytest.raises(SystemExit) as e:
        crl_eval.main(dataclasses.replace(opts, **flags))
    assert message in str(e.value) and "\n" not in str(e.value) and str(e.value).startswith("crl: ")


def test_a_run_without_its_files_is_refused(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world[1]["one"][0], run)
    (run / "best.safetensors").unlink()
    with pytest.raises(SystemExit, match="no best.safetensors there"):
        crl_eval.main(evaluation([run], tmp_path / "out"))
    shutil.copy(world[1]["one"][0] / "best.safetensors", run)
    (run / "args.json").write_text("{}")
    with pytest.raises(SystemExit, match="no readable args.json"):
        crl_eval.main(evaluation([run], tmp_path / "out"))


def test_one_prompt_token_by_token(world, capsys):
    folder, runs = world
    crl_eval.main(evaluation(runs["long"], folder / "none", prompt="Say something", max_new_tokens=4))
    out = capsys.readouterr().out
    assert not (folder / "none").exists() and "\nunsteered: " in out and "\nsteered: " in out
    rows = [line for line in out.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert 1 <= len(rows) <= 4 and all(" 1: " in row for row in rows)


def test_help_needs_no_heavy_library():
    code = """
import runpy, sys
sys.argv = ['crl_eval.py', '--help']
try:
    runpy.run_path('crl_eval.py', run_name='__main__')
except SystemExit:
    print('heavy:', [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])
"""
    root = Path(crl_eval.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "heavy: []" in done.stdout and "--oracle-prompts" in done.stdout
