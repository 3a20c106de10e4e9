"""analyze_features.py on tiny models: counts recomputed from the lines, decisions replaced, the viewer in Chromium."""
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_run
import torch

import analyze_features as an
import crl_ppo
import crl_tasks
from crl_model import Prompt

SCRIPT = Path(an.__file__)
SMALL = dict(decisions=8, draws=2, branch_prompts=3, continuations=4, directions=6, prompts=5, probe_samples=12)
HOSTILE = "</script><img src=x onerror=\"window.hacked=1\">|`{{ 7*7 }}"


class Lively(crl_ppo.Agent):
    """A policy that chooses differently on different prompts without having learned anything."""

    def __init__(self, args, pushes, *given):
        super().__init__(args, pushes, *given)
        self.policy[-1].bias.data.zero_()
        self.policy[-1].weight.data.normal_(generator=torch.Generator().manual_seed(args.seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs: one-token answers (two seeds), two features together and in turn, a push held, a decision per token."""
    folder = small_run.build(tmp_path_factory.mktemp("analyze"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_tasks, "score_answer", small_run.parity)
        patch.setattr(crl_tasks, "hub_reachable", lambda: False)
        patch.setattr(crl_ppo, "Agent", Lively)
        kinds = {"one": {}, "two": dict(seed=2), "pair": dict(features=2, pool=8),
                 "held": dict(task="long", steer_tokens=0), "active": dict(afm="active", group=2, batch_prompts=4),
                 "turns": dict(task="long", steer_tokens=3, features=2),
                 "token": dict(task="long", decide="token", steer_tokens=2, group=2, batch_prompts=4, updates=1)}
        yield folder, {name: crl_ppo.main(small_run.flags(folder, folder / name, **kw)) for name, kw in kinds.items()}


@pytest.fixture(scope="module")
def everything(world):
    """{names of runs: (results of all commands, folder of the files)}"""
    groups = ("one two", "pair", "turns", "token", "active")
    sets = {names: tuple(str(world[1][n]) for n in names.split()) for names in groups}
    return {names: (an.main(an.Args(run=runs, out=f"{world[0]}/out {names}", **SMALL)), world[0] / f"out {names}")
            for names, runs in sets.items()}


def lab_of(world, name, **kw):
    return an.Lab(an.Args(**{**SMALL, **kw}), str(world[1][name]))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_help_comes_before_the_heavy_imports_and_names_every_flag():
    code = ("import runpy, sys\nsys.argv = ['analyze_features.py', '--help']\n"
            f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
            "print('HEAVY' if 'torch' in sys.modules or 'numpy' in sys.modules else 'LIGHT')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "LIGHT" in done.stdout, done.stderr
    for f in dataclasses.fields(an.Args)[1:]:
        assert "--" + f.name.replace("_", "-") in done.stdout, f.name
        assert f"opts.{f.name}" in SCRIPT.read_text(), f"{f.name} is read by nothing"


def test_bad_command_lines_end_in_one_line(world):
    run = str(world[1]["one"])
    for kw, words in ((dict(command="branhc"), "unknown command 'branhc'; one of features"),
                      (dict(command="critic"), "critic needs --run"), (dict(command="map"), "map needs --run"),
                      (dict(command="map", task="mmlu", coef=(math.nan,)), "--coef nan"),
                      (dict(run=(run,), temperature=0.0), "--temperature 0.0"),
                      (dict(run=(run, run + "/")), "two have the same name"),
                      (dict(run=("nowhere",)), "no readable args.json"),
                      (dict(command="map", run=(run,), layer=(9,)), "--layer 9: .* has layers 0 to 3")):
        with pytest.raises(SystemExit, match=words) as e:
            an.main(an.Args(**kw))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.replace('"schema": 3', '"schema": 1', 1), ":1: schema 1, here 3; use the version"),
    (lambda t: "not json\n" + t, ":1 is not JSON"), (lambda t: "[1]\n" + t, ":1: field 'schema' is missing"),
    (lambda t: t.replace('"value"', '"walue"', 1), ":1: field 'value' is missing"),
    (lambda t: t.replace('"decided": true', '"decided": 1', 1), ":1: field 'decided' is missing or of another type"),
    (lambda t: t.split("\n", 1)[1], "token 1 of prompt .* a line before it is missing"),
    (lambda t: "", "holds no lines")])
def test_bad_logs_are_refused_in_one_line(world, tmp_path, change, words):
    (tmp_path / "log").write_text(change((world[1]["held"] / "interventions.jsonl").read_text()))
    with pytest.raises(SystemExit, match=words) as e:
        an.read_log(tmp_path / "log")
    assert "\n" not in str(e.value)


def test_a_run_without_a_log_was_stopped(tmp_path):
    with pytest.raises(SystemExit, match="no .*log: was this run stopped before its validation"):
        an.read_log(tmp_path / "log")


def test_a_cut_log_is_read_up_to_the_cut(world, tmp_path, capsys):
    whole = (world[1]["held"] / "interventions.jsonl").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-30])
    assert len(an.read_log(tmp_path / "log")) == whole.count(b"\n") - 1
    assert f"log:{whole.count(bytes([10]))} is cut off" in capsys.readouterr().err


@pytest.mark.parametrize("field, value", [("model_hash", "0" * 16), ("sae_hash", ["0"]), ("data_hash", "0" * 16)])
def test_a_run_of_another_model_sae_or_data_is_refused_by_field(world, tmp_path, field, value):
    run = shutil.copytree(world[1]["one"], tmp_path / "run")
    tensors, state = crl_ppo.load_tensors(run / "table.safetensors", {})
    crl_ppo.save_tensors(run / "table.safetensors", tensors, state | {field: value})
    with pytest.raises(SystemExit, match=f"{field} differs: checkpoint"):
        an.Lab(an.Args(), str(run))


def gains_of(gains, reward):
    """How many prompts steering left as they were, right (1) or wrong (0)."""
    return sum(g == 0 and r == reward for g, r in gains)


def test_counts_can_be_recomputed_from_the_lines_beside_them(world, everything):
    for names, (results, out) in everything.items():
        stored = {name: json.loads((out / f"{name}.json").read_text())["result"] for name in an.COMMANDS}
        assert stored.keys() == results.keys() and (out / "viewer.html").exists()
        files = {name: lines(out / f"{name}.jsonl") for name in ("table", "decisions", "branch", "map")}
        for kind in names.split():
            run, lab = world[1][kind], lab_of(world, kind)
            called = lab.names
            log = lines(run / "interventions.jsonl")
            decided = [r for r in log if r["decided"]]
            picks = Counter(called[r["choice"]] for r in decided)
            if kind != "turns":  # there a line has one feature of the push
                assert all(lab.actions.describe(lab.table.pushes[r["choice"]]) == r["push"] for r in decided)
            table, measured, tried, cells = ([r for r in rows if r["run"] == run.name] for rows in files.values())
            f = stored["features"][run.name]
            assert (f["decisions"], f["tokens"], f["pushes_used"]) == (len(decided), len(log), len(picks))
            gains = {r["prompt_id"]: (r["reward"] - r["unsteered_reward"], r["reward"]) for r in log}.values()
            assert [f[key] for key in an.OUTCOMES] == [sum(g > 0 for g, _ in gains), sum(g < 0 for g, _ in gains),
                                                       gains_of(gains, 1), gains_of(gains, 0)]
            for push in f["pushes"]:
                name, rows = push["name"], [r["rewards"] for r in table if push["name"] in r["rewards"]]
                mine = [d for d in measured if d["push"] == name]
                assert push["picks"] == picks[name] and push["measured"] == len(mine) and push["tried"] == len(rows)
                assert push["misguided"] == len({r["prompt_id"] for r in decided if called[r["choice"]] == name
                                                 and r["reward"] < r["unsteered_reward"]})
                assert push["sets_right"] == sum(r[name] > r["no-op"] for r in rows)
                assert push["sets_wrong"] == sum(r[name] < r["no-op"] for r in rows)
                ids = {d["id"] for d in mine}
                by_id = [[d["reward"] - np.mean(d["random"]) for d in mine if d["id"] == i] for i in ids]
                mean = np.mean([np.mean(d) for d in by_id]) if mine else None
                assert push["vs_random"] == mean or push["vs_random"]["mean"] == pytest.approx(mean, abs=1e-5)
            b = stored["branch"][run.name]
            assert b["tried"] == len(tried) and b["confirmed"] == sum(r["confirmed"] for r in tried)
            flips = [r for r in tried if r["reward"] != r["instead_reward"]]
            assert b["flips"] == len(flips) and b["tested"] == sum(r["right"] is not None for r in tried)
            assert b["noop_flips"] == sum(r["instead"] == "no-op" for r in flips)
            found = [len({r["id"] for r in rows}) for rows in (flips, tried)]
            assert [b["flipped_prompts"], b["prompts"]] == found
            for cell in stored["map"][run.name]["cells"]:
                rows = [r for r in cells if all(r[k] == cell[k] for k in ("layer", "directions", "coef"))]
                assert cell["n"] == len(rows) and cell["tried"] == len(rows[0]["rewards"])
                assert cell["to_right"] == sum(x > r["unsteered"] for r in rows for x in r["rewards"])
                assert cell["to_wrong"] == sum(x < r["unsteered"] for r in rows for x in r["rewards"])
            c = stored["critic"][run.name]
            assert c["n"] == len({r["prompt_id"] for r in log}) == sum(x["n"] for x in c["calibration"])


def test_runs_are_compared_by_flags_and_shared_features(world, everything):
    pair = everything["one two"][0]["features"]["{} and {}".format(*(world[1][name].name for name in ("one", "two")))]
    logs = [lines(world[1][name] / "interventions.jsonl") for name in ("one", "two")]
    used = [{m["feature"] for r in log for m in r["push"]} for log in logs]
    flags = {row["flag"]: (row["first"], row["second"]) for row in pair["flags"]}
    assert flags["seed"] == ("1", "2") and "pool" not in flags
    (common,) = pair["shared"]
    assert common["features"] == " ".join(map(str, sorted(used[0] & used[1]))) and common["dictionary"] == 24
    assert (common["first"], common["second"], common["both"]) == (*map(len, used), len(used[0] & used[1]))
    assert common["expected"] == pytest.approx(len(used[0]) * len(used[1]) / 24, abs=1e-5) and 0 <= common["p"] <= 1


def test_a_pairs_effect_is_the_pairs_alone_and_a_filler_is_no_member(everything):
    (result,) = everything["pair"][0]["features"].values()
    sizes = {push["name"]: len(push["members"]) for push in result["pushes"]}
    assert sizes.pop("no-op") == 0 and 2 in sizes.values()
    assert all(size == name.count(" + ") + 1 for name, size in sizes.items())


def test_map_needs_no_run(world, tmp_path):
    folder = world[0]
    opts = an.Args(command="map", task=f"file:{folder}/one.jsonl", model=f"{folder}/model", sae=(f"{folder}/sae",),
                   out=str(tmp_path), coef=(0.5, 2.0), layer=(1, 2), **SMALL)
    (result,) = an.main(opts)["map"].values()
    cells = {(c["layer"], c["directions"], c["coef"]) for c in result["cells"]}
    assert cells == {(1, "sae", 0.5), (1, "sae", 2), *((n, "random", c) for n in (1, 2) for c in (0.5, 2))}
    assert "policy" not in result and (tmp_path / "report.md").exists()


@pytest.mark.parametrize("kind", ["pair", "held", "turns", "token"])
def test_the_logs_own_decisions_give_the_logs_answers_and_others_equal_full_forwards(world, kind):
    lab = lab_of(world, kind)
    said = {i: g["token"].tolist() for i, g in lab.log.groupby("prompt_id")}
    pushes = lab.table.pushes
    for t in range(len(lab.picks[0])):
        cases = [(n, t, pushes[own[t]]) for n, own in enumerate(lab.picks) if t < len(own)]
        for (n, _, _), ids in zip(cases, an.answers_with(lab, cases, 0.0)):
            assert ids == said[lab.val[n].row["id"]]
    other = [a for a in range(len(pushes)) if a != lab.picks[0][-1]]
    t = len(lab.picks[0]) - 1
    for a, ids in zip(other, an.answers_with(lab, [(0, t, pushes[a]) for a in other], 0.0)):
        used = [*lab.picks[0][:t], a]
        held = [used[-1] if s < (lab.args.steer_tokens or 99) else lab.table.noop for s in range(t + 1, len(ids))]
        acting = [lab.actions.acting(push, s) for s, push in enumerate(pushes[(used + held)[:len(ids)]])]
        logp = an.read_through(lab, lab.val[0], ids, torch.stack(acting))
        assert logp[1].argmax(-1).tolist() == ids  # greedy under exactly these pushes


def test_sampled_continuations_follow_the_softmax_and_keep_what_came_before(world):
    lab = lab_of(world, "token", temperature=1.5)
    n = next(n for n, own in enumerate(lab.picks) if len(own) == 2)
    push = lab.table.pushes[lab.picks[n][1]]
    answers = an.answers_with(lab, [(n, 1, push)] * 400, 1.5)
    tokens = lab.log[lab.log["prompt_id"] == lab.val[n].row["id"]]["token"].tolist()
    assert {a[0] for a in answers} == {tokens[0]}
    logits = an.read_through(lab, lab.val[n], tokens[:2], lab.table.pushes[lab.picks[n]])[1, 1]
    p = (logits / 1.5).softmax(-1)
    seen = torch.bincount(torch.tensor([a[1] for a in answers]), minlength=len(p)) / 400
    assert (seen - p).abs().sum() / 2 < 0.5 * (1 - p.max()) + 0.1 and seen.argmax() in p.topk(3).indices


def test_random_pushes_have_the_size_sites_and_strengths_of_the_picked_ones(world, monkeypatch):
    lab, seen = lab_of(world, "pair"), []
    monkeypatch.setattr(an, "rewards_with", lambda lab, cases: seen.append(cases) or np.zeros(len(cases)))
    picked = list(an.decision_lines(lab))
    for own, (_, _, push) in zip([d for d in picked for _ in range(2)], seen[1]):
        members = lab.actions.describe(push)
        mine = lab.actions.describe(lab.table.pushes[lab.names.index(own["push"])])
        assert [(m["layer"], m["coefficient"]) for m in members] == [(m["layer"], m["coefficient"]) for m in mine]
    assert all(push.tolist() == lab.table.pushes[-1].tolist() for _, _, push in seen[0])


def test_one_token_probabilities_are_exact(world):
    lab = lab_of(world, "one", temperature=0.9)
    for p in lab.val[:2]:
        ids = torch.tensor(lab.lm.letters)[:len(p.row["choices"])]
        for push, share in zip(lab.table.pushes, an.right_shares(lab, p, lab.table.pushes)):
            p_of = (an.read_through(lab, p, [0], push[None])[1, 0] / 0.9).exp()  # (V,)
            right = p_of[ids[p.row["answer"]].unique()].sum() / p_of[ids.unique()].sum()
            assert share == pytest.approx(float(right), abs=1e-4)


def test_promoted_tokens_go_through_the_final_norm(world):
    lab = lab_of(world, "one")
    (card,) = an.cards(lab, {(1, 3)})
    norm, head = lab.lm.model.model.norm.weight, lab.lm.model.lm_head.weight
    order = ((lab.actions.sites[0].directions[3] * norm) @ head.T).argsort(descending=True).tolist()
    assert card["promoted"] == [lab.lm.tok.decode([t]) for t in order[:8]]
    assert card["suppressed"] == [lab.lm.tok.decode([t]) for t in order[::-1][:8]]
    assert sum(card["histogram"]) == card["active"] and len(card["neighbours"]) == 5
    assert all(g != 3 for g, *_ in card["neighbours"]) and max(v for c in card["contexts"] for _, v in c) > 0


@pytest.mark.parametrize("scores, area", [
    ((1, 2, 3, 4), 1), ((4, 3, 2, 1), 0), ((1, 1, 1, 1), 0.5), ((1, 3, 2, 4), 0.75)])
def test_auc_and_an_interval_that_has_a_width(scores, area):
    found = an.auc(np.array(scores), np.array([False, False, True, True]))
    assert found["auc"] == area and found["ci"][1] - found["ci"][0] > 0.2
    assert found["ci"][0] <= area <= found["ci"][1] and an.auc(np.array(scores), np.zeros(4, bool)) is None


def test_served_chooses_on_other_prompts_and_the_noop_wins_ties():
    reward = np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], float)
    fit, held = np.array([0, 2]), np.array([1, 3])
    kinds = np.array(["a", "a", "b", "b"])
    assert an.served(reward, kinds, [(fit, held)]).tolist() == [0, 1, 0, 1]
    assert an.served(reward, kinds, [(fit, held)], np.array(["b"] * 4)).tolist() == [0, 0, 0, 1]
    assert an.served(reward * 0 + 1, kinds, [(fit, held)]).sum() == 2
    noise = np.random.default_rng(0).integers(0, 2, (100, 500)).astype(float)  # the best of 500 is luck
    halves = [(np.arange(50), np.arange(50, 100)), (np.arange(50, 100), np.arange(50))]
    assert abs(an.served(noise, np.zeros(100), halves).mean() - 0.5) < 0.1


def test_sae_against_random_resamples_directions_too():
    a, b = np.zeros((200, 6)), np.zeros((200, 6))
    a[:, 0] = 1  # one lucky direction of six, on every prompt
    found = an.two_way(an.Args(), a, b, np.arange(200))
    assert found["mean"] == pytest.approx(1 / 6) and found["ci"][0] == 0 and found["p"] > 0.2
    assert an.two_way(an.Args(), a + 1, b, np.arange(200))["p"] < 0.01
    assert an.two_way(an.Args(), a + 1, b, np.arange(200) % 3)["p"] == 0.25  # three groups show nothing


@pytest.mark.parametrize("rare, tell", [(0, 1), (1, 1), (0, 0), (1, 0)])
def test_the_ceiling_needs_what_a_probe_tells(monkeypatch, rare, tell):
    """40 prompts of two classes, and a push for each. One prompt of a third class changes nothing, and where x tells
    nothing, the map's ceiling does not profit by the gold classes."""
    kinds = np.array(["a", "b"] * 20)
    kinds[:rare] = "c"
    x = np.where(kinds == "a", 1.0, -1.0) if tell else np.tile([1.0, 1.0, -1.0, -1.0], 10)
    x = torch.from_numpy(x).float()[:, None]
    monkeypatch.setattr(an, "prefill", lambda lm, layers, part, options: (0, {0: x[[p.ids[0] for p in part]]}))
    some = [Prompt({"id": str(n), "group": str(n)}, [n]) for n in range(40)]
    lab = SimpleNamespace(lm=None, args=crl_ppo.Args(micro_batch=8), opts=an.Args())
    rows, told = an.probes(lab, [0], some, kinds)
    assert len(rows) == 1 and ((told[0] == kinds).mean() >= 0.95) == bool(tell)
    reward = np.stack([kinds == "z", kinds == "a", kinds == "b"], 1).astype(float)
    halves = [(np.arange(20), np.arange(20, 40)), (np.arange(20, 40), np.arange(20))]
    ceiling = an.served(reward, kinds, halves, told[0]).mean()
    assert ceiling >= 0.95 if tell else ceiling <= 0.55
    assert an.probes(lab, [0], some, np.array(["c"] + ["a"] * 39)) == ([], {})  # nothing to tell


def test_effects_are_paired_by_prompt_and_keep_near_copies_together():
    d = np.repeat(np.tile([0.0, 1.0], 5), 10)
    near, apart = (an.index_of([Prompt({"id": str(i), "group": f"g{i // size}"}, []) for i in range(100)])
                   for size in (10, 1))
    copies, alone = an.effect(pd.Series(d, near)), an.effect(pd.Series(d, apart))
    assert copies["mean"] == alone["mean"] == 0.5
    assert np.diff(copies["ci"]) > 2 * np.diff(alone["ci"])
    same = an.effect(pd.Series(1.0, near))
    assert same["mean"] == 1 and same["ci"][0] < 1
    cases = [{"id": "0", "group": "g", "reward": 1.0, "noop": 0.0, "random": [0.0, 1.0]}] * 3
    cases = pd.DataFrame(cases, columns=an.DECISION)
    assert an.against(cases[:0]) == {"vs_noop": None, "vs_random": None}
    assert an.against(cases)["vs_random"] | {"p": 0, "ci": 0} == {"n": 1, "mean": 0.5, "p": 0, "ci": 0}


def hostile(data):
    """The same with markup in every text."""
    if isinstance(data, dict):
        return {key: hostile(v) if key not in ("hash", "url", "members") else v for key, v in data.items()}
    if isinstance(data, list):
        return [hostile(v) for v in data]
    return f"{data} {HOSTILE}" if isinstance(data, str) else data


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    """(folder with viewer.html of two runs, its data), every text of it hostile."""
    data = {"runs": [], "features": {}, "pushes": [], "prompts": []}
    for name in ("one", "token"):
        an.view(lab_of(world, name), data)
    folder = tmp_path_factory.mktemp("page")
    data = hostile(an.finite(data))
    an.viewer(folder, data)
    return folder, data


def test_viewer_holds_what_was_logged_and_escapes_it(world, page):
    html = (page[0] / "viewer.html").read_text()
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<img" not in html and "http-equiv" in html
    assert json.loads(html.split('type="application/json">')[1].split("</script>")[0]) == page[1]
    log = lines(world[1]["one"] / "interventions.jsonl") + lines(world[1]["token"] / "interventions.jsonl")
    tokens = [t for p in page[1]["prompts"] for t in p["tokens"]]
    called = [lab_of(world, kind).names for kind in ("one", "token")]
    names = [own[r["choice"]] for own, kind in zip(called, ("one", "token"))
             for r in lines(world[1][kind] / "interventions.jsonl") if r["decided"]]
    assert [t["text"] for t in tokens] == [f"{r['token_text']} {HOSTILE}" for r in log]
    assert [page[1]["pushes"][t["push"]]["name"] for t in tokens if t["decided"]] == [
        f"{name} {HOSTILE}" for name in names]
    assert {key.split(":")[0] for key in page[1]["features"]} == {"0", "1"}  # of which run
    assert all(key.split(":")[1:] == [str(f["layer"]), str(f["feature"])] for key, f in page[1]["features"].items())
    assert all(m.split(":")[0] == str(push["run"]) for push in page[1]["pushes"] for m in push["members"])
    report = an.report({"branch": {f"r{HOSTILE}": {"v": HOSTILE, "top": [{"a": HOSTILE, "b": 1.0}]}}})
    assert "<script" not in report and "<img" not in report and "<" not in report.split("\n## ")[1]
    assert len({line.count("|") for line in report.splitlines() if line.startswith("|")}) == 1


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium to try the viewer in a browser")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("apt-get install chromium chromium-driver to try the viewer in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    b = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield b
    b.quit()


def test_viewer_in_chromium(browser, page):
    folder, data = page

    def js(code):
        return browser.execute_script(f"return {code}")

    def choose(id_, value):
        browser.execute_script(f"$('{id_}').value = {json.dumps(value)}; $('{id_}').dispatchEvent(new Event("
                               f"'{'input' if id_ == 'search' else 'change'}'))")
        return js("shown.length")

    def key(name):
        browser.execute_script(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{name}'}}))")
    browser.get(f"file://{folder}/viewer.html")
    assert js("shown.length") == len(data["prompts"])
    for outcome, name in enumerate(an.OUTCOMES):  # filters
        assert choose("outcome", str(outcome)) == sum(p["outcome"] == outcome for p in data["prompts"])
    choose("outcome", "")
    assert choose("run", "1") == sum(p["run"] == 1 for p in data["prompts"])
    choose("run", "")
    assert choose("search", "nothing like it") == 0 and "No prompt matches" in js("$('prompt').textContent")
    assert choose("search", data["prompts"][0]["id"].split()[0]) == 1
    choose("search", "")
    many = next(i for i, p in enumerate(data["prompts"]) if len(p["tokens"]) > 1)
    browser.execute_script(f"document.activeElement.blur(); open({many} - 1)")
    key("j")
    key("ArrowRight")
    assert js("current") == many and js("token") == 1
    i, t = next((i, j) for i, p in enumerate(data["prompts"]) for j, t in enumerate(p["tokens"])
                if t["decided"] and data["pushes"][t["push"]]["members"])
    browser.execute_script(f"open({i}); document.querySelectorAll('.token')[{t}].click()")
    info = js("$('info').textContent")
    assert all(word in info for word in ("probability", "next, steered", "next, unsteered", "nats on this token"))
    browser.execute_script("document.querySelector('#info .feature').click()")  # the push, then its feature
    panel, push = js("$('panel').textContent"), data["pushes"][data["prompts"][i]["tokens"][t]["push"]]
    assert push["name"] in panel and f"{push['picks']} times" in panel and "minus random pushes" in panel
    browser.execute_script("document.querySelector('#panel .feature').click()")
    panel, card = js("$('panel').textContent"), data["features"][push["members"][0]]
    words = ("suppresses", "density", "cosine", "Strongest contexts", card["name"], push["name"])
    assert all(word in panel for word in words) and js("document.querySelectorAll('#panel .shade').length") > 0
    assert js("document.querySelectorAll('svg').length") > 0 and js("document.images.length") == 0
    assert js("document.scripts.length") == 2 and js("window.hacked === undefined")
    assert browser.get_log("browser") == []
