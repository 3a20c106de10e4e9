"""analyze_features.py on tiny models: counts recomputed, continuations against full forwards, viewer in Chromium."""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_run
import torch

import analyze_features as an
import crl_eval
import crl_ppo
import crl_stats

SCRIPT = Path(an.__file__)
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
SMALL = dict(decisions=8, draws=2, branch_prompts=3, alternatives=2, continuations=4, confirm=4, oracle_prompts=3,
             oracle_features=0, sampled_features=4, val_prompts=4, probe_samples=8, folds=3, resamples=100)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs: two seeds of one-token answers, held and per-token long answers, two sites with two signed features, and
    long answers steered at the first token or the first two."""
    folder = small_run.build(tmp_path_factory.mktemp("analyze"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_ppo, "score_answer", small_run.parity)
        patch.setattr(crl_ppo, "hub_reachable", lambda: False)
        patch.setattr(crl_ppo, "plot_curves", lambda path, metrics: None)
        free = dict(task="long", sticky=0.0, sticky_final=0.0)
        kinds = {"one": {}, "two": dict(seed=2), "held": dict(task="long"), "free": free,
                 "sites": dict(free, sae=("none",), layer=(1, 2), signed=True, features_per_token=2),
                 "first": dict(task="long", steer_tokens=1), "second": dict(free, steer_tokens=2),
                 "pair": dict(task="long", steer_tokens=1, features_per_token=2)}
        runs = {name: crl_ppo.main(small_run.flags(folder, folder / name, **kw)) for name, kw in kinds.items()}
        crl_eval.main(crl_eval.Args(run=(str(runs["one"]),), conditions=("random",), resamples=50))
        yield folder, runs


def opts_of(world, command, *names, **kw):
    cls = an.COMMANDS.get(command, an.All)
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(run=tuple(str(world[1][n]) for n in names), **{k: v for k, v in {**SMALL, **kw}.items() if k in known})


def lab_of(world, name, lively=True):
    """Lab of a run; lively: its policy's choice depends on prompt and token, among all features."""
    lab = an.load(opts_of(world, "branch", name), world[1][name])
    for i, agent in enumerate(lab.agents if lively else ()):
        agent.trials += 10
        agent.pool.fill_(True)
        agent.action_bias.data.zero_()
        agent.policy[-1].weight.data.normal_(generator=torch.Generator().manual_seed(i))
    lab.args.coef = 2.0 if lively else lab.args.coef
    return lab


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def record(**kw):
    return {"schema": crl_ppo.SCHEMA, "prompt_id": "p0", "task": "t", "layer": 1, "position": 0, "token": 1,
            "token_text": "a", "unsteered_token": 2, "unsteered_token_text": "b", "feature": [3],
            "feature_name": ["3 name"], "coefficient": [0.5], "added_norm": 1.0, "logprob": -1.0, "value": 0.1,
            "mask_size": 4, "entropy": 0.3, "reward": 1.0, "unsteered_reward": 0.0, **kw}


def fake_run(folder, records, **args):
    """A run directory with a made-up log and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict(task="t", noop=False, coef=0.5, sticky_final=0.0, batch_prompts=4)
    given = dataclasses.asdict(crl_ppo.Args(**{**flags, **args}))
    identity = {"sae": ["s"], "sae_hash": ["h"], "layer": [1], "model": "m"}
    (folder / "args.json").write_text(json.dumps({"schema": crl_ppo.SCHEMA, "args": given, "identity": identity}))
    (folder / "interventions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


# ---------------------------------------------------------------------------------------------------- command line
def test_help_comes_before_the_heavy_imports():
    code = ("import runpy, sys\nsys.argv = ['analyze_features.py', *sys.argv[1:], '--help']\n"
            f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
            "print('HEAVY' if 'torch' in sys.modules or 'numpy' in sys.modules else 'LIGHT')")
    for command in ((), ("oracle",)):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        assert "LIGHT" in done.stdout and "--resamples" in done.stdout, done.stderr


def test_every_flag_is_documented_and_read():
    text = SCRIPT.read_text() + Path(crl_stats.__file__).read_text()  # the intervals are made there
    for cls in (*an.COMMANDS.values(), an.All):
        for f in dataclasses.fields(cls):
            body = text.split(f"    {f.name}: ", 1)[1].split("\n")
            assert body[1].strip().startswith('"""'), f.name
            assert f"opts.{f.name}" in text or f'"{f.name}"' in text, f"{f.name} is read by nothing"


def test_bad_command_lines_end_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "branhc"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("crl: unknown sub-command 'branhc'")
    assert len(done.stderr.splitlines()) == 1
    for command, kw, words in (
            ("critic", {}, "--run is missing"), ("critic", dict(run=("nowhere",)), "no such directory"),
            ("critic", dict(run=(str(tmp_path),), bins=0), "--bins 0: must be positive"),
            ("headroom", dict(folds=1), "--folds 1: must be at least 2"),
            ("sweep", dict(coefs=(math.nan,)), "--coefs nan"), ("headroom", {}, "give --run, or --task"),
            ("critic", dict(run=(str(tmp_path),)), "args.json is missing"),
            ("compare", dict(run=(str(fake_run(tmp_path / "r", [record()])),)), "compare needs two runs")):
        with pytest.raises(SystemExit, match=words):
            an.main(command, an.COMMANDS[command](**{"out": str(tmp_path / "out"), **kw}))


# ------------------------------------------------------------------------------------------------------------- logs
def test_log_in_columns(tmp_path):
    records = [record(feature=[3, None], feature_name=["3 name", "no-op"], coefficient=[0.5, 0.0]),
               record(position=1, feature=[7, 3], feature_name=["-7", "3 name"], coefficient=[-0.5, 0.5], token=2),
               record(prompt_id="p1", reward=0.0, unsteered_reward=1.0, feature=[3, 4], feature_name=["3 name", "4"],
                      coefficient=[0.5, 0.5])]
    log = an.read_log(fake_run(tmp_path / "run", records), keep=1)
    assert log.names == ["1:3", "1:-7", "1:4"] and log.ids == ["p0", "p1"]
    assert [log.names[f] for f in log.pick] == ["1:3", "1:-7", "1:3", "1:3", "1:4"]  # the no-op ended the first draw
    assert log.record.tolist() == [0, 1, 1, 2, 2] and log.changed.tolist() == [True, False, True]
    assert [an.OUTCOMES[o] for o in log.outcome] == ["corrected", "misguided"] and list(log.kept) == [0]
    found = an.summarise(log)
    three = found["features"][0]
    assert [three[k] for k in ("name", "picks", "prompts", "corrected", "misguided")] == ["1:3", 3, 2, 1, 1]
    assert three["first_token_share"] == pytest.approx(2 / 3) and three["changed_token_share"] == pytest.approx(2 / 3)
    first = found["diversity"]["by_position"][0]
    assert first["unique"] == 2 and first["picks"] == 3 and first["top_share"] == pytest.approx(2 / 3)
    assert first["entropy"] == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.replace('"schema": 1', '"schema": 0', 1), "interventions.jsonl:1 has schema 0; this version reads"),
    (lambda t: t.replace('{"schema": 1, ', "{", 1), "has schema None"),
    (lambda t: "not json\n" + t, "interventions.jsonl:1 is not a JSON object"),
    (lambda t: "[1]\n" + t, "interventions.jsonl:1 is not a JSON object"),
    (lambda t: t.replace('"value"', '"walue"', 1), "field 'value' is missing"),
    (lambda t: t.replace('"value": 0.1', '"value": "x"', 1), "interventions.jsonl:1: "),
    (lambda t: "", "holds no records")])
def test_bad_logs_are_refused_in_one_line(tmp_path, change, words):
    run = fake_run(tmp_path / "run", [record(), record(position=1)])
    log = run / "interventions.jsonl"
    log.write_text(change(log.read_text()))
    with pytest.raises(SystemExit, match=words) as e:
        an.read_log(run)
    assert "\n" not in str(e.value)


def test_records_past_steer_tokens_are_no_decisions(tmp_path):
    """A log with --steer-tokens 1 counts like the same log without the records that follow the decision."""
    alone = dict(value=None, feature=[None], feature_name=["no-op"], coefficient=[0.0], mask_size=0, entropy=0.0)
    decisions = [record(prompt_id=f"p{i}", value=i % 2 + i / 100, reward=float(i % 2), coefficient=[0.5 * (i % 3 > 0)],
                        feature=[i % 3 or None], feature_name=[f"{i % 3}"], unsteered_reward=float(i % 3 > 1))
                 for i in range(24)]
    records = [r for d in decisions for r in (d, *(d | alone | {"position": t} for t in (1, 2)))]
    short, long = (fake_run(tmp_path / name, r, noop=True, steer_tokens=1, **kw) for name, r, kw in (
        ("short", decisions, {}), ("long", records, dict(seed=2))))
    a, b = (an.summarise(an.read_log(run)) for run in (short, long))
    assert (a.pop("records"), b.pop("records")) == (24, 72) and a == b and a["decisions"] == 24
    assert an.read_log(long).names == ["1:no-op", "1:1", "1:2"]
    a, b = (an.main("critic", an.Critic(run=(str(run),)))["critic"]["runs"][run.name] for run in (short, long))
    assert a == b and [p["position"] for p in b["sites"][0]["by_position"]] == [0]
    assert b["trained_at"] == "the first token only"
    (pair,) = an.main("compare", an.Common(run=(str(short), str(long))))["compare"]["pairs"]
    assert pair["same"]["same"] == pair["same"]["n"] == 24
    (long / "interventions.jsonl").write_text(json.dumps(records[1]) + "\n")
    with pytest.raises(SystemExit, match="holds no decisions"):
        an.read_log(long)


@pytest.mark.parametrize("kind, n", [("first", 1), ("second", 2), ("pair", 1)])
def test_every_subcommand_on_a_run_with_steer_tokens(world, tmp_path, kind, n):
    results = an.main("all", opts_of(world, "all", kind, out=str(tmp_path)))
    name, log = world[1][kind].name, lines(world[1][kind] / "interventions.jsonl")
    decided = [r for r in log if r["value"] is not None]
    assert set(results) == set(an.COMMANDS) - {"compare"} and len(decided) < len(log)
    assert {r["position"] for r in decided} == set(range(n)) and {r["position"] for r in log} == {0, 1, 2}
    found = results["features"]["runs"][name]
    assert found["decisions"] == len(decided)
    pairs = [r["feature"] for r in decided if len(r["feature"]) > 1]  # the no-op that ends a draw is no second pick
    picks = Counter({f["name"].split(":")[1]: f["picks"] for f in found["features"]})
    assert sum(picks.values()) == len(decided) + sum(second is not None for _, second in pairs)
    assert picks["no-op"] == sum(r["feature"][0] is None for r in decided)
    assert (kind == "pair") == bool(pairs) and (kind != "pair" or any(second is None for _, second in pairs))
    assert [p["position"] for p in found["diversity"]["by_position"]] == list(range(n))
    (site,) = results["critic"]["runs"][name]["sites"]
    assert max(len(v["n"]) for v in site["trajectories"].values()) == n
    assert all(p["position"] < n for p in results["branch"]["runs"][name]["points"])
    data = an.viewer_data(opts_of(world, "viewer", kind))
    assert all(len(t[3]) == (j < n) for p in data["prompts"] for j, t in enumerate(p["t"]))


def test_pushes_of_oracle_and_sweep_end_with_steer_tokens(world, monkeypatch):
    """What every direction does with --steer-tokens 1 is what one decision swapped at the first token does."""
    lab = lab_of(world, "first")
    p = lab.prompts["val"][0]
    (said,) = an.replay(lab, [p])
    _, kv = an.read_through(lab, [p], [said["tokens"]], [said["actions"]])
    answers = [crl_ppo.check_answer(lab.lm, lab.args, p, ids)
               for ids, _ in an.regenerate(lab, p, kv, said, [(0, 0, [a]) for a in range(24)])]
    seen, check = [], crl_ppo.check_answer
    monkeypatch.setattr(crl_ppo, "check_answer", lambda *a: seen.append(a[-1]) or check(*a))
    right, _ = an.outcomes_of(lab, p, lab.sites[0].directions[:24])
    assert right.tolist() == [a["reward"] for a in answers] and seen == [a["tokens"] for a in answers]
    seen.clear()
    (cell,), *_ = crl_ppo.sweep(lab.lm, lab.sites, lab.args, [p], (lab.args.coef,), 24)
    assert cell["right"][0].tolist() == [answers[a]["reward"] for a in cell["actions"]]


def test_runs_of_older_schemas_are_refused(tmp_path):
    run = fake_run(tmp_path / "run", [record()])
    (run / "args.json").write_text((run / "args.json").read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(SystemExit, match="args.json has schema 0"):
        an.read_log(run)


def test_a_cut_log_is_read_up_to_the_cut(tmp_path, capsys):
    run = fake_run(tmp_path / "run", [record(prompt_id=f"p{i}", token_text="é") for i in range(5)])
    whole = (run / "interventions.jsonl").read_bytes().replace(rb"\u00e9", "é".encode())
    for cut in (whole[:-30], whole[:whole.rindex("é".encode()) + 1]):  # the second one inside a character
        (run / "interventions.jsonl").write_bytes(cut)
        assert an.read_log(run).ids == ["p0", "p1", "p2", "p3"]
        assert "interventions.jsonl:5 is cut off" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- everything, and its numbers
@pytest.fixture(scope="module")
def everything(world):
    out = world[0] / "everything"
    return an.main("all", opts_of(world, "all", "one", "two", out=str(out))), out


def test_no_subcommand_runs_all_that_the_runs_allow(everything):
    results, out = everything
    assert set(results) == set(an.COMMANDS)
    for name in an.COMMANDS:
        stored = json.loads((out / f"{name}.json").read_text())
        assert stored["schema"] == an.SCHEMA and stored["command"] == name and stored["flags"]["resamples"] == 100
        assert (out / f"{name}.png").exists() == (name != "viewer")
        assert f"## {an.REPORTS[name][0]}" in (out / "report.md").read_text()


def test_the_no_op_that_ends_a_draw_is_no_pick_on_test_prompts(tmp_path):
    (tmp_path / "eval").mkdir()
    said = [{"schema": 1, "run": tmp_path.name, "condition": "crl", "task": "t", "id": str(i), "correct": 1.0,
             "features": [f]} for i, f in enumerate((["1:3", "1:no-op"], ["1:no-op", "1:no-op"], ["1:3", "1:4"]))]
    (tmp_path / "eval" / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in said))
    assert an.test_counts(tmp_path)["picks"] == {"1:3": 2, "1:no-op": 1, "1:4": 1}


def test_counts_can_be_recomputed_from_the_logs(world, everything):
    for name in ("one", "two"):
        run = world[1][name]
        found, log = everything[0]["features"]["runs"][run.name], lines(run / "interventions.jsonl")
        sign = {p["prompt_id"]: (p["reward"], p["unsteered_reward"]) for p in log}
        outcome = {i: "corrected" if a > b else "misguided" if a < b else "right" if a else "wrong"
                   for i, (a, b) in sign.items()}
        assert found["outcomes"] == {o: list(outcome.values()).count(o) for o in an.OUTCOMES}
        picks = Counter(f"{r['layer']}:{'no-op' if f is None else f}" for r in log for f in r["feature"])
        assert {f["name"]: f["picks"] for f in found["features"]} == picks
        for f in found["features"]:
            users = {r["prompt_id"] for r in log if f["name"].split(":")[1] in map(str, r["feature"])}
            assert f["corrected"] == sum(outcome[i] == "corrected" for i in users) and f["prompts"] == len(users)
        assert found["diversity"]["all"]["unique"] == len(picks)
        updates = [m["update"] for m in lines(run / "metrics.jsonl")]
        assert sum(e["updates"] for e in found["diversity"]["by_epoch"]) == len(updates)
        assert len(found["diversity"]["by_epoch"]) == 2
    said = [r for r in lines(world[1]["one"] / "eval" / "predictions.jsonl")]
    right = {c: {r["id"]: r["correct"] for r in said if r["condition"] == c} for c in ("crl", "unsteered")}
    test = everything[0]["features"]["runs"][world[1]["one"].name]["test"]
    assert test["outcomes"]["corrected"] == sum(right["crl"][i] > right["unsteered"][i] for i in right["crl"])
    assert sum(test["outcomes"].values()) == test["n"] == len(right["crl"])
    assert test["picks"] == Counter(n for r in said if r["condition"] == "crl" for t in r["features"] for n in t)
    assert everything[0]["features"]["runs"][world[1]["two"].name]["test"] is None


def test_headroom_before_any_run(world, tmp_path):
    folder = world[0]
    given = {f.name: SMALL[f.name] for f in dataclasses.fields(an.Headroom) if f.name in SMALL}
    opts = an.Headroom(task=f"file:{folder}/one.jsonl", model=f"{folder}/model", sae=(f"{folder}/sae",), device="cpu",
                       out=str(tmp_path), **given)
    r = an.main("headroom", opts)["headroom"]
    assert [p["layer"] for p in r["probe"]] == [1] and {c["directions"] for c in r["cells"]} == {"sae", "random:24"}
    assert [c["coef"] for c in r["cells"]] == [0.25, 0.5, 1.0] * 2
    for c in r["cells"]:
        assert c["ceiling"] <= c["switch"] + 1e-9 <= c["any"] + 1e-6
        assert c["ceiling_ci"][0] <= c["ceiling"] <= c["ceiling_ci"][1]
        assert c["mean"] - c["unsteered"] == pytest.approx(c["to_right"] - c["to_wrong"], abs=1e-6)
    curves = [[], [{"samples": 25, "accuracy": 0.75, "sd": 0.125}]]  # too few prompts for a curve: no empty table
    shown = ["\n".join(an.headroom_report(r | {"probe": [r["probe"][0] | {"curve": c}]})) for c in curves]
    assert "fewer prompts" not in shown[0] and "fewer prompts" in shown[1] and "12.5" in shown[1]


# ------------------------------------------------------------------------------------------ decisions played again
def test_what_the_policy_would_choose_next_and_how_likely(world):
    """Two features and the no-op, which ends the draw: probabilities by hand."""
    lab = lab_of(world, "pair")
    agent, prompts = lab.agents[0], lab.prompts["val"]
    agent.policy[-1].weight.data.mul_(0.05)  # no choice is certain
    N, kinds = len(agent.site.directions) - 1, set()
    for p, said in zip(prompts, an.replay(lab, prompts)):
        crl_ppo.reference(lab.lm, lab.sites, lab.args, [p])
        mask = agent.mask(lab.args, p.x[None], 0, True)
        q = crl_ppo.behaviour_logits(agent.logits(agent.observe(p.x[None], 0), mask), mask, 0.0)[0].double().exp()
        assert said["next"][0][0] and not any(said["next"][t][0] for t in range(1, len(said["tokens"])))
        for (a, b), probability in said["next"][0][0]:
            assert {a, b} != set(said["actions"][0, 0].tolist()) and (b == N if a == N else a != b)
            by_hand = q[a] if a == N else q[a] * q[b] / (1 - q[a])
            assert probability == pytest.approx(float(by_hand), rel=1e-4)
            kinds.add((a == N) + (b == N))
    assert kinds == {0, 1} or kinds == {0, 2} or kinds == {0, 1, 2}


@pytest.mark.parametrize("kind", ["held", "free", "sites", "first", "second", "pair"])
def test_replaced_decisions_equal_full_forwards_and_never_recompute_the_prefix(world, kind):
    """Every swap against the whole sequence run anew without a cache; positions that go through the model counted."""
    lab = lab_of(world, kind)
    lab.args.max_new_tokens, lab.lm.eos = 6, set()
    p, k, held = lab.prompts["val"][0], lab.args.features_per_token, lab.args.sticky_final >= 0.5
    said = an.replay(lab, [p])[0]
    assert len(said["tokens"]) == 6 and (held or len({tuple(a) for a in said["actions"][:, 0].tolist()}) > 1)
    last = lab.args.steer_tokens or 6
    assert (said["actions"][:last] >= 0).all() and (said["actions"][last:] == an.NOTHING).all()
    assert all(said["next"][t][i] == [] for t in range(last, 6) for i in range(len(lab.sites)))
    (logp,), kv = an.read_through(lab, [p], [said["tokens"]], [said["actions"]])

    def reference(t0, site, actions):
        tokens, chosen = said["tokens"][:t0], [a.clone() for a in said["actions"][:t0]]
        for t in range(t0, 6):
            row, now = torch.full((len(lab.sites), k), an.NOTHING), {}

            def edit(i, h):
                if t == t0 and i == site:
                    row[i] = torch.tensor(actions)
                elif t >= last:
                    row[i] = an.NOTHING
                elif held and t > 0:
                    row[i] = chosen[t - 1][i]
                else:
                    none = torch.full((1, 1, k), -1)
                    row[i] = crl_ppo.choose(lab.agents[i], lab.args, h[:, -1], t, none, 0.0, 0.0)["actions"][0, 0]
                h = h.clone()
                for s, a in enumerate([*chosen, row]):
                    h[0, len(p.ids) - 1 + s] += an.pushed(lab, i, h[:, len(p.ids) - 1 + s], a[i][None])[0]
                return h

            def undo_last(i, h):  # the choice is made on what the earlier pushes left
                x = h.clone()
                for s, a in enumerate(chosen):
                    x[0, len(p.ids) - 1 + s] += an.pushed(lab, i, h[:, len(p.ids) - 1 + s], a[i][None])[0]
                now[i] = x
                return edit(i, h)
            with torch.no_grad(), crl_ppo.hooked(lab.lm, lab.sites, undo_last):
                logits = lab.lm.model(torch.tensor([p.ids + tokens]), use_cache=False).logits[0, -1]
            tokens, chosen = tokens + [int(logits.argmax())], [*chosen, row]
        return tokens

    swaps = [(t, i, [5, 7][:k]) for t in range(last) for i in range(len(lab.sites))]
    swaps += [(last // 3, 0, [an.NOTHING] * k)]
    seen = []
    handle = lab.lm.layers[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[:2].numel()))
    found = an.regenerate(lab, p, kv, said, swaps)
    handle.remove()
    assert sum(seen) == sum(6 - t for t, _, _ in swaps)  # one position per regenerated token: no prefix
    assert [ids for ids, _ in found] == [reference(*s) for s in swaps]
    kept = an.regenerate(lab, p, kv, said, [(t, 0, None) for t in range(6)])
    assert [ids for ids, _ in kept] == [said["tokens"]] * 6
    forced = an.regenerate(lab, p, kv, said, [(t, 0, None) for t in range(6)], forced=True)
    assert [lp for _, lp in forced] == pytest.approx([float(logp[t:].sum()) for t in range(6)], abs=2e-3)


def test_read_through_in_a_batch_and_token_effects(world):
    lab = lab_of(world, "free")
    prompts = lab.prompts["val"][:3]
    prompts[0].ids = prompts[0].ids + prompts[0].ids[1:4]  # another length
    said = an.replay(lab, prompts)
    said[1] |= {"tokens": said[1]["tokens"][:2], "actions": said[1]["actions"][:2]}  # a shorter answer
    batch, _ = an.read_through(lab, prompts, [a["tokens"] for a in said], [a["actions"] for a in said])
    for p, a, logp in zip(prompts, said, batch):
        (alone,), _ = an.read_through(lab, [p], [a["tokens"]], [a["actions"]])
        assert logp.tolist() == pytest.approx(alone.tolist(), abs=1e-3)
        i = [dict(position=t, layer=1, token=tok, feature=[int(x) for x in c], coefficient=[2.0])
             for t, (tok, c) in enumerate(zip(a["tokens"], a["actions"][:, 0]))]
        _, (plain,) = crl_ppo.unsteered_next(lab.lm, [p], [a["tokens"]])
        known = [x - y for x, y in zip(alone.tolist(), plain)]
        assert an.token_effects(lab, [p], [i])[0] == pytest.approx(known, abs=1e-3)


@pytest.mark.parametrize("kind", ["one", "held", "free", "sites", "first", "second"])
def test_counterfactuals_against_what_is_known(world, kind):
    lab, opts = lab_of(world, kind), opts_of(world, "features", kind, decisions=6)
    prompts = lab.prompts["val"]
    played = an.replay(lab, prompts)
    cases = an.counterfactuals(lab, prompts, played, opts)
    assert len(cases) == (5 if kind in ("one", "held", "first") else 6)
    assert max(c["position"] for c in cases) < (lab.args.steer_tokens or 3)
    by_id = {p.row["id"]: (p, a) for p, a in zip(prompts, played)}
    for c in cases:
        p, a = by_id[c["prompt_id"]]
        assert c["reward"] == a["reward"] and len(c["names"]) == lab.args.features_per_token
        if kind in ("one", "held", "first"):  # without its only decision the answer is the unsteered one
            assert c["noop_reward"] == p.ref["reward"]
        elif kind in ("free", "second"):
            (logp,), _ = an.read_through(lab, [p], [a["tokens"]], [a["actions"]])
            assert c["logp"] == pytest.approx(float(logp[c["position"]:].sum()), abs=2e-3)


def test_effect_is_paired_by_prompt():
    cases = [dict(prompt_id=i, reward=1.0, noop_reward=float(i == 0)) for i in range(6)] + [
        dict(prompt_id=0, reward=1.0, noop_reward=0.0)]
    e = an.effect(SimpleNamespace(resamples=500, seed=0), cases, "reward", "noop")
    assert e["n"] == 6 and e["mean"] == pytest.approx(5.5 / 6) and e["ci"][0] < e["mean"] <= e["ci"][1] == 1.0
    assert an.effect(SimpleNamespace(resamples=9, seed=0), cases[:3], "reward", "noop")["ci"] is None


# ------------------------------------------------------------------------------------------------------------- branch
def test_two_proportions_by_hand():
    assert an.two_proportions(2, 0, 2) == pytest.approx(2 / 16)  # max over q of 2 q^2 (1 - q)^2
    assert an.two_proportions(3, 3, 8) == 1.0 and an.two_proportions(16, 0, 16) < 1e-7


@pytest.mark.parametrize("kind", ["one", "free", "first", "second"])
def test_branch_points_are_flips_that_continuations_confirm(world, kind, monkeypatch):
    lab, opts = lab_of(world, kind), opts_of(world, "branch", kind, continuations=8, confirm=3)
    prompts = lab.prompts["val"]
    flips, tried = an.branch_points(lab, prompts, an.replay(lab, prompts), opts)
    assert max(f["position"] for f in flips) < (lab.args.steer_tokens or 3)
    assert flips and tried >= len(flips) and sum(f["p"] is not None for f in flips) == min(3, len(flips))
    for f in flips:
        assert f["reward"] != f["instead_reward"] and f["instead"] != f["chosen"]
        if f["p"] is not None:
            assert f["p"] == pytest.approx(an.two_proportions(f["right"], f["instead_right"], 8))
    first = [f["prompt_id"] for f in flips if f["p"] is not None]
    assert len(set(first)) == min(3, len({f["prompt_id"] for f in flips}))  # spread over prompts
    monkeypatch.setattr(an, "load", lambda *a: lab)
    r = an.branch(dataclasses.replace(opts, branch_prompts=5), None)["runs"][world[1][kind].name]
    tested = [f for f in r["points"] if f["p"] is not None]
    assert all(f["p_holm"] >= f["p"] for f in tested) and r["flips"] == len(r["points"])
    assert r["branch_points"] == len({(f["prompt_id"], f["position"]) for f in tested if f["confirmed"]})
    gaps = [abs(f["right"] - f["instead_right"]) for f in tested]
    assert gaps == sorted(gaps, reverse=True) and "## " not in "\n".join(an.branch_report({"runs": {}}))


def test_right_share_is_that_of_sampled_tokens(world):
    lab = lab_of(world, "one")
    p, V = lab.prompts["val"][0], 287
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    gold, offered = lab.lm.letters[p.row["answer"]], {t for ids in lab.lm.letters[:len(p.row["choices"])] for t in ids}
    weight = logits[0].exp()
    for decoding, among in (("free", range(V)), ("constrained", offered)):
        lab.args.reward_decoding = decoding
        share = sum(weight[t] for t in set(gold)) / sum(weight[t] for t in among)
        assert float(an.right_share(lab, p, logits)) == pytest.approx(float(share), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- critic
def test_auc_by_hand():
    a = an.auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    assert a["auc"] == 0.75 and a["n"] == [2, 2] and a["ci"][0] < 0.75 < a["ci"][1]
    assert an.auc(np.array([1.0, 2.0]), np.array([True, True])) is None
    ties = an.auc(np.ones(6), np.array([True, False] * 3))
    assert ties["auc"] == 0.5


def critic_run(folder, value, n=60, **args):
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, n).astype(float)
    return fake_run(folder, [record(prompt_id=f"p{i}", position=t, reward=rewards[i], unsteered_reward=0.0,
                                    value=value(rewards[i], rng)) for i in range(n) for t in range(2)], **args)


@pytest.mark.parametrize("value, word, args", [
    (lambda r, rng: 0.8 * r + 0.1, "the policy", {}), (lambda r, rng: rng.normal(), "the value estimate", {}),
    (lambda r, rng: -r, "the value estimate: V ranks", {}), (lambda r, rng: r, "no critic", dict(algo="grpo"))])
def test_critic_says_what_the_bottleneck_is(tmp_path, value, word, args):
    run = critic_run(tmp_path / "run", value, **args)
    r = an.main("critic", an.Critic(run=(str(run),), bins=4))["critic"]["runs"]["run"]
    assert word in r["bottleneck"]
    s = r["sites"][0]
    assert [p["position"] for p in s["by_position"]] == [0, 1] and s["trajectories"]["corrected"]["n"][0] + \
        s["trajectories"]["wrong"]["n"][0] == 60
    if word == "the policy":  # V = 0.1 + 0.8 y
        y = np.array([x["reward"] for x in lines(run / "interventions.jsonl")])[::2]
        assert s["by_position"][0]["auc_right"]["auc"] == 1.0 and s["slope"] == pytest.approx(1.25, rel=1e-5)
        assert s["by_position"][0]["explained_variance"] == pytest.approx(1 - 0.04, rel=1e-5)
        assert s["calibration_error"] == pytest.approx(0.1, rel=1e-5) and s["mean_outcome"] == y.mean()


# ------------------------------------------------------------------------------------------------- oracle, shared
def test_oracle_tries_every_feature(world, monkeypatch):
    lab, opts = lab_of(world, "one"), opts_of(world, "oracle", "one", random_directions=10)
    monkeypatch.setattr(an, "load", lambda *a: lab)
    r = an.oracle(opts, None)["runs"][world[1]["one"].name]
    assert r["features"] == r["dictionary"] == 24 and r["prompts"] == 3 and r["random_directions"] == 10
    known = {p.row["id"]: p for p in lab.prompts["val"]}
    for row in r["by_prompt"]:
        p = known[row["prompt_id"]]
        logits = an.one_token(lab, [p], torch.zeros(1, 24, dtype=torch.long), torch.arange(24)[None, :, None])
        right = crl_ppo.read_letters(lab.lm, [p], logits)["constrained"][0]
        gold = an.gold_logp(lab, [p], logits)[0]
        chosen = int(row["chosen"].split(":")[1])
        assert row["fix"] + row["break"] + row["leave"] == 24
        assert row["rank"] == 1 + int((gold > gold[chosen]).sum()) and row["reward"] == float(right[chosen])
        assert row["best"] == max(float(right.max()), row["unsteered"])
        assert row["fix"] == int((right > row["unsteered"]).sum())
    assert r["regret"] == pytest.approx(np.mean([x["best"] - x["reward"] for x in r["by_prompt"]]))


@pytest.mark.parametrize("better", ["SAE", "random", "neither"])
def test_oracle_compares_with_random_directions(world, monkeypatch, better):
    lab = lab_of(world, "held")
    prompts = lab.prompts["val"] * 2  # ten, all wrong without steering
    for p in prompts:
        p.ref = {"reward": 0.0}

    def planted(lab, p, directions):
        wins = better == ("SAE" if len(directions) == 12 else "random")
        return torch.full((len(directions),), float(wins)), None
    monkeypatch.setattr(an, "load", lambda *a: lab)
    monkeypatch.setattr(an, "prompts_of", lambda *a: prompts)
    monkeypatch.setattr(an, "outcomes_of", planted)
    replay = an.replay

    def replayed(*a):
        out = replay(*a)
        for p in prompts:
            p.ref = {"reward": 0.0}
        return out
    monkeypatch.setattr(an, "replay", replayed)
    opts = opts_of(world, "oracle", "held", oracle_features=12, random_directions=11, oracle_prompts=10)
    verdict = an.oracle(opts, None)["runs"][world[1]["held"].name]["sae_beats_random"]
    assert verdict.startswith({"SAE": "yes", "random": "no:", "neither": "not shown"}[better])


def test_shared_features_by_hand(tmp_path, monkeypatch):
    runs = [fake_run(tmp_path / n, [record(prompt_id=str(f), feature=[f], feature_name=[str(f)]) for f in used])
            for n, used in (("a", (1, 2)), ("b", (2, 3)))]
    monkeypatch.setattr(an, "dictionary_size", lambda log: {1: 4})
    (s,) = an.shared(*map(an.read_log, runs))
    assert s["shared"] == 1 and s["features"] == ["2"] and s["expected"] == 1.0
    assert s["p"] == pytest.approx(1 - 1 / 6)  # 1 - C(2, 2) / C(4, 2) ways to miss both


def test_dictionary_size_is_that_of_the_checkpoint(world):
    assert an.dictionary_size(an.read_log(world[1]["held"])) == {1: 24}
    assert an.dictionary_size(an.read_log(world[1]["sites"])) == {1: 16, 2: 16}


def test_neuronpedia_links_and_labels(tmp_path, monkeypatch, capsys):
    for layer in (20, 12):  # --layer 12 takes the SAE of the same kind at another layer of the release
        name = "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
        assert an.neuronpedia_id(name, layer) == f"gemma-2-2b/{layer}-gemmascope-res-16k"
    assert an.neuronpedia_id("my-sae", 3) is None and an.neuronpedia_id("no/such/release", 3) is None
    asked = []

    class Answer:
        def __init__(self, url, timeout):
            asked.append(url)

        __enter__, __exit__ = lambda self: self, lambda self, *a: None

        def read(self, *a):
            return b'{"explanations": [{"description": "cats"}]}'
    monkeypatch.setattr(an.urllib.request, "urlopen", Answer)
    url = "https://www.neuronpedia.org/m/20-x/5"
    for _ in range(2):
        assert an.neuronpedia_labels([url], tmp_path / "n.json") == {url: "cats"}
    assert asked == ["https://www.neuronpedia.org/api/feature/m/20-x/5"]  # the second time from the file

    def offline(*a, **k):
        raise OSError("no route")
    monkeypatch.setattr(an.urllib.request, "urlopen", offline)
    assert an.neuronpedia_labels([url + "6"], tmp_path / "n.json") == {url: "cats"}
    assert "no label" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- headroom, layers, sweep
def test_held_out_has_no_luck_of_many_tries():
    rng = torch.Generator().manual_seed(0)
    lucky = torch.cat([torch.zeros(8, 1), torch.eye(8)], 1)  # some option is right on every prompt, by luck
    assert crl_ppo.held_out(lucky, [0] * 8, rng).tolist() == [0.0] * 8
    switch = torch.zeros(8, 3)
    switch[:4, 1] = switch[4:, 2] = 1  # one option per kind
    assert crl_ppo.held_out(switch, [0] * 4 + [1] * 4, rng).tolist() == pytest.approx([1.0] * 8)
    assert crl_ppo.held_out(switch, [0] * 8, rng).mean() < 0.8
    alone = torch.tensor([[1.0, 0.0]])
    assert crl_ppo.held_out(alone, ["x"], rng).tolist() == [1.0]  # nothing to learn from: do nothing


def test_learning_curve_rises_where_there_is_something_to_learn_and_stays_at_chance_where_not():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, generator=g, dtype=torch.float64)
    rows = an.learning_curve(x, (x[:, 0] + x[:, 1] > 0).long(), 0)
    assert [r["samples"] for r in rows] == [25, 50, 100, 200]
    assert rows[0]["accuracy"] < 0.75 < 0.83 < rows[-1]["accuracy"] and all(0 < r["sd"] < 0.2 for r in rows)
    noise = an.learning_curve(x, torch.randint(2, (300,), generator=g), 0)
    assert all(abs(r["accuracy"] - 0.5) < 0.1 for r in noise)
    assert an.learning_curve(x[:30], torch.arange(30) % 2, 0) == []  # nothing left to be right on


@pytest.mark.parametrize("n", [30, 60])  # fewer and more rows than dimensions: two forms of the same weights
def test_ridge_is_ridge_regression_with_the_penalty_that_does_best_on_a_fifth(n):
    g = torch.Generator().manual_seed(n)
    x, new = (torch.randn(m, 40, generator=g, dtype=torch.float64) for m in (n, 200))
    labels = (x[:, 0] > 0).long()
    a, b = (torch.cat([(v - x.mean(0)) / x.std(0), torch.ones(len(v), 1)], 1) for v in (x, new))
    y, inner, scores = torch.nn.functional.one_hot(labels).double(), n // 5, {}
    for penalty in 10.0**torch.arange(7):
        def weights(x, y):
            return torch.linalg.solve(x.T @ x + penalty * torch.eye(41, dtype=x.dtype), x.T @ y)
        hits = (a[:inner] @ weights(a[inner:], y[inner:])).argmax(1) == labels[:inner]
        scores.setdefault(int(hits.sum()), (b @ weights(a, y)).argmax(1))
    assert torch.equal(an.ridge(x, labels, new), scores[max(scores)])


def planted_sweep(monkeypatch, right_at):
    """crl_ppo.answer is right where the norm of what is pushed is near `right_at` times that of x."""
    seen = []

    def answer(lm, agents, args, prompts, counts, decide):
        seen.extend(p.row["id"] for p in prompts)
        x = torch.ones(len(prompts), 16)
        size = decide(0, x, 0, torch.arange(len(prompts)))[:, :, 0:].norm(dim=-1) / x.norm(dim=-1)[:, None]
        return [{"reward": float(abs(s - right_at) < 1e-3)} for s in size.flatten().tolist()]
    monkeypatch.setattr(crl_ppo, "answer", answer)
    return seen


def test_coef_auto_takes_the_best_coefficient_from_validation_prompts_only(world, monkeypatch, tmp_path):
    folder, _ = world
    args = small_run.flags(folder, tmp_path, coef="auto", updates=1)
    crl_ppo.check_args(args)
    lm, sites, prompts, _ = crl_ppo.set_up(args)
    seen = planted_sweep(monkeypatch, 0.5)
    cells, best, sure = crl_ppo.sweep(lm, sites, args, prompts["val"], (0.25, 0.5, 1.0), 4)
    held = [float(c["held_out"].mean()) for c in cells]
    assert held[1] > 0.9 > max(held[0], held[2])
    assert cells[best]["coef"] == 0.5 and sure > 0.5 and set(seen) == {p.row["id"] for p in prompts["val"]}
    assert cells[1]["right"].shape == (5, 4) and cells[1]["right"].all()
    used = []

    def sweep(lm, sites, args, given, *a):
        used.extend(given)
        return cells, best, sure
    monkeypatch.setattr(crl_ppo, "sweep", sweep)
    monkeypatch.setattr(crl_ppo, "reference", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))  # far enough
    with pytest.raises(KeyboardInterrupt):
        crl_ppo.main(args)
    assert json.loads(next(tmp_path.glob("*/args.json")).read_text())["args"]["coef"] == 0.5
    assert used and {p.row["id"] for p in used} <= {p.row["id"] for p in prompts["val"]}


def test_sweep_recommends_with_its_confidence(world, tmp_path, monkeypatch):
    planted_sweep(monkeypatch, 0.25)
    r = an.main("sweep", opts_of(world, "sweep", "held", out=str(tmp_path)))["sweep"]
    assert [c["coef"] for c in r["cells"]] == [0.125, 0.25, 0.5, 1.0, 2.0] * 2
    best = r["recommended"]
    assert best["coef"] == 0.25 and best["switch"] == 1.0 and 0 < best["confidence"] <= 1
    assert r["cells"][1]["to_right"] == 1 - r["cells"][1]["unsteered"] and r["cells"][1]["to_wrong"] == 0


def test_layers_without_and_with_runs(world, tmp_path):
    r = an.main("layers", opts_of(world, "layers", "one", out=str(tmp_path)))["layers"]
    assert {(c["layer"], c["directions"]) for c in r["cells"]} >= {(1, "sae"), (1, "random:24"), (3, "random:24")}
    both = an.main("layers", opts_of(world, "layers", "one", "two", out=str(tmp_path)))["layers"]["runs"]
    for row in both:
        run = next(p for p in world[1].values() if p.name == row["run"])
        log = {r["prompt_id"]: r["reward"] - r["unsteered_reward"] for r in lines(run / "interventions.jsonl")}
        gains = np.array(list(log.values()))
        assert row["gain"] == pytest.approx(gains.mean()) and row["to_right"] == (gains > 0).mean()


def test_probe_is_cross_validated():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(90, 200, dtype=torch.double, generator=g), torch.randint(3, (90,), generator=g)
    chance = float((an.cross_validated(x, labels, 5, 0) == labels).double().mean())
    assert chance < 0.55  # more dimensions than rows: any leak would give 1
    x = x[:, :20]
    x[torch.arange(90), labels] += 30
    assert float((an.cross_validated(x, labels, 5, 0) == labels).double().mean()) == 1.0


def test_residuals_are_those_of_the_prompt_alone(world):
    lab = lab_of(world, "one", lively=False)
    prompts = lab.prompts["val"]
    prompts[1].ids = prompts[1].ids + prompts[1].ids[1:5]
    x = an.residuals(lab.lm, [0, 1], prompts)
    crl_ppo.prefill(lab.lm, lab.sites[0], [prompts[1]])
    assert torch.allclose(x[1, 1].float(), prompts[1].x, atol=1e-3) and x.shape == (2, 5, 16)


def test_compare_by_hand(tmp_path):
    made = {"a": (1, [(1, 5), (1, 5), (0, 6), (1, 5)]), "b": (2, [(1, 5), (0, 6), (0, 6), (0, 5)])}  # (reward, feature)
    runs = [fake_run(tmp_path / name, [record(prompt_id=str(i), reward=float(r), feature=[f], feature_name=[str(f)])
                                       for i, (r, f) in enumerate(rows)], seed=seed)
            for name, (seed, rows) in made.items()]
    (pair,) = an.main("compare", an.Common(run=tuple(map(str, runs)), out=str(tmp_path / "out")))["compare"]["pairs"]
    assert pair["flags"] == {"seed": [1, 2]} and pair["common"] == 4
    assert pair["reward"]["per_seed"][0]["corrected"] == 2 and pair["reward"]["difference"] == 0.5
    assert pair["same"]["same"] == 3 and pair["same"]["chance"] == pytest.approx(4 * (3 * 2 + 1 * 2) / 16)


# ------------------------------------------------------------------------------------------------------------- viewer
HOSTILE = "|</script><script>window.hacked=1</script><img src=x onerror=\"window.hacked=1\">&'\"\u2028|`"


def hostile_run(folder):
    records = [record(prompt_id=f"p{i} {HOSTILE}", task=f"t{HOSTILE}", position=t, token=t, reward=float(i % 2),
                      token_text=f"w{t} " + HOSTILE * (t == 2), unsteered_token=t if t else 99, value=0.1 * i,
                      unsteered_token_text=HOSTILE, feature=[i % 3 if t else None], unsteered_reward=float(i % 4 > 1),
                      feature_name=[f"{i % 3} {HOSTILE}" if t else "no-op"], coefficient=[0.5 if t else 0.0])
               for i in range(8) for t in range(3)]
    return fake_run(folder, records, task=f"t{HOSTILE}")


def test_viewer_escapes_all_it_is_given(tmp_path):
    run = hostile_run(tmp_path / "run")
    an.main("viewer", an.Viewer(run=(str(run),), log_only=True))
    an.main("features", an.Features(run=(str(run),), log_only=True))
    html = (run / "analysis" / "viewer.html").read_text()
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "onerror=\"" not in html
    assert "<img" not in html and "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    report = (run / "analysis" / "report.md").read_text()
    assert "<script" not in report and "<img" not in report
    rows = [line for line in report.splitlines() if line.startswith("| 1:")]
    assert len(rows) == 4 and len({line.count("|") for line in rows}) == 1


def test_viewer_stays_under_its_size(tmp_path, monkeypatch):
    run = hostile_run(tmp_path / "run")
    big = an.main("viewer", an.Viewer(run=(str(run),), log_only=True))["viewer"]
    assert big["prompts"] == 8 and big["bytes"] == (run / "analysis" / "viewer.html").stat().st_size
    monkeypatch.setattr(an, "VIEWER_BYTES", big["bytes"] - 1)
    small = an.main("viewer", an.Viewer(run=(str(run),), log_only=True))["viewer"]
    assert small["prompts"] == 6 and small["of"] == 8 and small["bytes"] < big["bytes"]


def test_viewer_holds_what_was_logged(world, tmp_path):
    run = world[1]["free"]
    data = an.viewer_data(opts_of(world, "viewer", "free", out=str(tmp_path)))
    log = lines(run / "interventions.jsonl")
    tokens = [t for p in data["prompts"] for t in p["t"]]
    assert [t[0] for t in tokens] == [r["token_text"] for r in log] and all(t[2] is not None for t in tokens)
    assert [data["features"][t[3][0][1][0]]["label"] for t in tokens] == [r["feature_name"][0] for r in log]
    assert all(p["p"].startswith("Say") and p["s"] is not None for p in data["prompts"])
    inside = an.page(data).decode().split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(inside) == json.loads(json.dumps(an.finite(data)))


class Browser:
    """Headless Chromium over its debugging pipe (file descriptors 3 and 4): no port, no package, no waiting."""

    def __init__(self, profile):
        there, self.write = os.pipe()
        self.read, back = os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-component-update", "--disable-background-networking", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}")
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{back}', CHROMIUM, *flags]
        self.process = subprocess.Popen(command, pass_fds=(there, back), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 16)
            assert part, "Chromium ended"
            self.buffer += part
        one, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(one)

    def __call__(self, method, **params):
        self.count += 1
        text = {"id": self.count, "method": method, "params": params}
        text |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(text).encode() + b"\0")
        while (m := self.message()).get("id") != self.count:
            self.events.append(m)
        assert "error" not in m, m
        return m["result"]

    def open(self, path):
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())

    def js(self, code):
        r = self("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in r, r
        return r["result"].get("value")

    def key(self, key):
        text = {"text": key} if len(key) == 1 else {}
        self("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium): the viewer was not tried in a browser")
    b = Browser(tmp_path_factory.mktemp("profile"))
    yield b
    b.close()


def trouble(browser):
    """Console messages, exceptions, and requests for anything but the page itself."""
    bad = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [e for e in browser.events if e.get("method") in bad
            or e.get("method") == "Network.requestWillBeSent" and not e["params"]["request"]["url"].startswith("file:")]


SHOWN = "document.querySelectorAll('#list li').length"


def choose(browser, id_, value):
    event = "input" if id_ == "search" else "change"
    browser.js(f"$('{id_}').value = {json.dumps(value)}; $('{id_}').dispatchEvent(new Event('{event}'))")


def test_viewer_in_chromium(browser, tmp_path):
    run = hostile_run(tmp_path / "run")
    an.main("viewer", an.Viewer(run=(str(run),), log_only=True))
    browser.open(run / "analysis" / "viewer.html")
    assert trouble(browser) == [] and browser.js(SHOWN) == 8 and browser.js("window.hacked === undefined")
    # filters
    for value, outcome in enumerate(an.OUTCOMES):
        choose(browser, "outcome", str(value))
        assert browser.js(SHOWN) == 2 and browser.js("$('list').querySelector('.tag').textContent") == outcome
    choose(browser, "outcome", "")
    names = browser.js("D.features.map(f => f.name)")
    choose(browser, "feature", str(names.index("1:2")))
    assert browser.js(SHOWN) == 2 and "p2" in browser.js("$('list').textContent")
    choose(browser, "feature", "")
    choose(browser, "search", "P5")
    assert browser.js(SHOWN) == 1 and "p5" in browser.js("$('prompt').textContent")
    choose(browser, "search", "nothing like it")
    assert browser.js(SHOWN) == 0 and "No prompt matches" in browser.js("$('prompt').textContent")
    choose(browser, "search", "")
    choose(browser, "sort", "value")
    assert "p7" in browser.js("$('list').querySelector('li').textContent")
    choose(browser, "sort", "")
    # keyboard
    browser.js("document.activeElement.blur(); open(0)")
    browser.key("j")
    assert browser.js("current") == 1
    browser.key("ArrowRight")
    assert browser.js("token") == 1 and browser.js("document.activeElement.className").startswith("token")
    browser.key("k")
    browser.key("/")
    assert browser.js("current") == 0 and browser.js("document.activeElement.id") == "search"
    browser.key("Escape")
    # a token shows its decision; a click on the feature opens it and lists every place; a place opens its prompt
    browser.js("open(4); document.querySelectorAll('.token')[1].click()")
    info = browser.js("$('info').textContent")
    assert "coefficient 0.50" in info and "value 0.400" in info and "probability 0.368" in info
    browser.js("document.querySelector('#info .feature').click()")
    assert HOSTILE in browser.js("$('featurename').textContent")
    assert "Used at 6 tokens" in browser.js("$('panel').textContent")
    assert browser.js("document.querySelectorAll('.places li').length") == 6
    browser.js("document.querySelectorAll('.places button')[5].click()")
    assert browser.js("current") == 7 and browser.js("token") == 2
    # nothing of the log became an element, light and dark differ, a narrow screen does not scroll sideways
    assert browser.js("document.images.length") == 0 and browser.js("document.scripts.length") == 2
    assert browser.js("window.hacked === undefined")
    light = browser.js("getComputedStyle(document.body).backgroundColor")
    browser.js("$('theme').click()")
    assert browser.js("getComputedStyle(document.body).backgroundColor") != light
    browser("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    assert browser.js("document.documentElement.scrollWidth") <= 360
    assert browser.js("$('detail').getBoundingClientRect().top >= $('list').getBoundingClientRect().bottom")
    assert browser.js("$('answer').getBoundingClientRect().width") > 300
    browser("Emulation.clearDeviceMetricsOverride")
    assert trouble(browser) == []


def test_viewer_greys_tokens_without_a_decision(browser, world, tmp_path):
    an.main("viewer", opts_of(world, "viewer", "first", out=str(tmp_path)))
    browser.open(tmp_path / "viewer.html")
    assert trouble(browser) == [] and browser.js("document.querySelectorAll('.token:not(.alone)').length") == 1
    assert browser.js("document.querySelectorAll('.token.alone').length") > 0
    assert "without a decision" in browser.js("$('prompt').textContent")
    browser.js("document.querySelectorAll('.token')[1].click()")
    info = browser.js("$('info').textContent")
    assert "none: past --steer-tokens" in info and "coefficient" not in info and "value" not in info
    choose(browser, "sort", "value")
    assert browser.js(SHOWN) == 5 and trouble(browser) == []


def test_viewer_of_a_real_run_in_chromium(browser, everything):
    browser.open(everything[1] / "viewer.html")
    assert trouble(browser) == [] and browser.js(SHOWN) == 10
    assert browser.js("document.querySelectorAll('#charts svg').length") == 3
    choose(browser, "task", "1")
    assert browser.js(SHOWN) == 5 and "item" in browser.js("$('prompt').textContent")
    assert "nats on this token" in browser.js("$('info').textContent")
