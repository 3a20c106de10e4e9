"""analyze_features.py on tiny models: counts recomputed, decisions replaced, the viewer in Chromium."""

import dataclasses
import itertools
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
from tiny import lines, one_line, plain

import analyze_features as an
import crl_map
import crl_ppo
from crl_tasks import Prompt, hub

SCRIPT = Path(an.__file__)
SMALL = dict(decisions=8, draws=2, branch_prompts=3, continuations=4, directions=6, prompts=5)
SMALL["probe_samples"] = 12
HOSTILE = '</script><img src=x onerror="window.hacked=1">|`{{ 7*7 }}'


class Lively(crl_ppo.Agent):
    """A policy that chooses differently on different prompts without having learned anything."""

    def start_at(self, sequences, worth):
        super().start_at(sequences, worth)
        self.prior.data.zero_()
        generator = torch.Generator().manual_seed(len(self.prior))
        self.actor[-1].weight.data.normal_(generator=generator)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, {name: run}): one-token answers (two seeds), an action that holds, a decision per token."""
    kinds = {"one": {}, "two": dict(seed=2), "held": dict(task="long", steer_tokens=0)}
    kinds["token"] = dict(task="long", decisions=2, steer_tokens=2, updates=1)
    with small_run.world(tmp_path_factory.mktemp("analyze"), Lively, **kinds) as made:
        yield made


@pytest.fixture(scope="module")
def everything(world):
    """{names of runs: (results of all commands, folder of the files)}"""
    folder, runs = world
    found = {}
    for names in ("one two", "held", "token"):
        out = folder / f"out {names}"
        paths = tuple(str(runs[name]) for name in names.split())
        found[names] = (an.main(an.Args(run=paths, out=str(out), **SMALL)), out)
    return found


def lab_of(world, name, **flags):
    return an.Lab(an.Args(**{**SMALL, **flags}), str(world[1][name]))


def read_through(env, prompt, tokens, actions):
    """Reference: log-probabilities (T, V) after a prompt and each prefix of an answer, under actions (T,)."""
    start = len(prompt.ids) - 1
    added = [(start + t, action) for t, action in enumerate(actions)]
    return plain(env, prompt.ids + tokens[:-1], added)[start:].log_softmax(-1)


HELP = f"""
import runpy, sys
sys.argv = ['analyze_features.py', '--help']
try:
    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')
except SystemExit:
    print('HEAVY' if 'torch' in sys.modules or 'numpy' in sys.modules else 'LIGHT')
"""


def test_help_comes_before_the_heavy_imports_and_names_every_flag():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert "LIGHT" in done.stdout, done.stderr
    for field in dataclasses.fields(an.Args)[1:]:
        assert "--" + field.name.replace("_", "-") in done.stdout, field.name


BAD_FLAGS = [
    (dict(command="branhc"), "unknown command 'branhc'; one of features"),
    (dict(command="critic"), "critic needs --run"),
    (dict(command="map"), "map needs --run"),
    (dict(command="map", task="mmlu", coef=(math.nan,)), "--coef nan"),
    (dict(run=("RUN",), temperature=0.0), "--temperature 0.0"),
    (dict(run=("RUN",), draws=0), "--draws 0"),
    (dict(run=("RUN", "RUN/")), "two have the same name"),
    (dict(run=("nowhere",)), "no readable args.json"),
    (dict(command="map", run=("RUN",), layer=(9,)), "has layers 0 to 3"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_command_lines_end_in_one_line(world, flags, words):
    runs = tuple(name.replace("RUN", str(world[1]["one"])) for name in flags.get("run", ()))
    one_line(lambda: an.main(an.Args(**{**flags, "run": runs})), words)


BAD_LOGS = [
    (lambda text: text.replace('"schema": 5', '"schema": 1', 1), ":1: schema 1, here 5; use the version"),
    (lambda text: "not json\n" + text, ":1 is not JSON"),
    (lambda text: "[1]\n" + text, ":1: field 'schema' is missing"),
    (lambda text: text.replace('"value"', '"walue"', 1), ":1: field 'value' is missing"),
    (lambda text: text.replace('"decided": true', '"decided": 1', 1), ":1: field 'decided' is missing or of"),
    (lambda text: text.split("\n", 1)[1], "a line before it is missing"),
    (lambda text: "", "holds no lines"),
]


@pytest.mark.parametrize("change, words", BAD_LOGS)
def test_bad_logs_are_refused_in_one_line(world, tmp_path, change, words):
    (tmp_path / "log").write_text(change((world[1]["held"] / "interventions.jsonl").read_text()))
    one_line(lambda: an.read_log(tmp_path / "log"), words)


def test_a_cut_log_is_read_up_to_the_cut_and_a_run_without_one_was_stopped(world, tmp_path, capsys):
    one_line(lambda: an.read_log(tmp_path / "log"), "log: was this run stopped before its")
    whole = (world[1]["held"] / "interventions.jsonl").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-30])
    count = whole.count(b"\n")
    assert len(an.read_log(tmp_path / "log")) == count - 1
    assert f"log:{count} is cut off" in capsys.readouterr().err


OTHERS = dict(prompt_id="x", action=99, model_hash="0", sae_hash=["0"], data_hash="0")


@pytest.mark.parametrize("field", OTHERS)
def test_a_log_or_run_of_another_model_sae_or_data_is_refused_by_field(world, tmp_path, field):
    run = shutil.copytree(world[1]["one"], tmp_path / "run")
    words = f"{field} {OTHERS[field]!r} is unknown to the run's data or mask"
    if "hash" in field:
        words = f"{field} differs: checkpoint"
        tensors, state = hub.load_tensors(run / "rewards.safetensors", {})
        hub.save_tensors(run / "rewards.safetensors", tensors, state | {field: OTHERS[field]})
    else:
        log = lines(run / "interventions.jsonl")
        log[0][field] = OTHERS[field]
        hub.write_jsonl(run / "interventions.jsonl", log)
    one_line(lambda: an.Lab(an.Args(), str(run)), words)


# ------------------------------------------------------------------ counts, from the lines beside the results
@pytest.fixture(params=["one", "two", "held", "token"])
def case(request, world, everything):
    """One run: its name, log, {command: result} as stored, and {file: the lines that are its own}."""
    names = next(names for names in everything if request.param in names.split())
    out = everything[names][1]
    run = world[1][request.param]
    lab = lab_of(world, request.param)
    found = SimpleNamespace(log=lines(run / "interventions.jsonl"), names=lab.names, env=lab.env, stored={})
    for name in an.COMMANDS:
        if name == "permute" and request.param in ("held", "token"):
            continue  # their answers have no options
        found.stored[name] = json.loads((out / f"{name}.json").read_text())["result"][run.name]
    for name in ("table", "decisions", "branch", "map"):
        setattr(found, name, [line for line in lines(out / f"{name}.jsonl") if line["run"] == run.name])
    return found


def test_outcomes_and_picks_are_those_of_the_log(case):
    decided = [line for line in case.log if line["decided"]]
    found = case.stored["features"]
    picks = Counter(case.names[line["action"]] for line in decided)
    assert all(case.env.describe(line["action"]) == line["steering"] for line in decided)
    counts = [found[key] for key in ("decisions", "tokens", "actions_used")]
    assert counts == [len(decided), len(case.log), len(picks)]
    first = {line["prompt_id"]: (line["reward"], line["unsteered_reward"]) for line in case.log}
    pairs = Counter(first.values())
    assert [found[key] for key in an.OUTCOMES] == [pairs[1, 0], pairs[0, 1], pairs[1, 1], pairs[0, 0]]
    for action in found["actions"]:
        own = [line for line in decided if case.names[line["action"]] == action["name"]]
        misguided = {line["prompt_id"] for line in own if line["reward"] < line["unsteered_reward"]}
        assert (action["picks"], action["misguided"]) == (len(own), len(misguided))


def test_effects_are_those_of_the_lines(case):
    for action in case.stored["features"]["actions"]:
        name = action["name"]
        rows = [line["rewards"] for line in case.table if name in line["rewards"]]
        mine = [line for line in case.decisions if line["action"] == name]
        assert action["measured"] == len(mine) and action["tried"] == len(rows)
        assert action["sets_right"] == sum(row[name] > row["no-op"] for row in rows)
        assert action["sets_wrong"] == sum(row[name] < row["no-op"] for row in rows)
        by_prompt = {}
        for line in mine:
            by_prompt.setdefault(line["id"], []).append(line["reward"] - np.mean(line["random"]))
        if mine:
            mean = np.mean([np.mean(d) for d in by_prompt.values()])
            assert action["vs_random"]["mean"] == pytest.approx(mean, abs=1e-5)
        else:
            assert action["vs_random"] is None


def test_branch_map_and_critic_count_their_lines(case):
    flips = [line for line in case.branch if line["reward"] != line["instead_reward"]]
    expected = {
        "tried": len(case.branch),
        "confirmed": sum(line["confirmed"] for line in case.branch),
        "flips": len(flips),
        "tested": sum(line["right"] is not None for line in case.branch),
        "noop_flips": sum(line["instead"] == "no-op" for line in flips),
        "flipped_prompts": len({line["id"] for line in flips}),
    }
    assert len(case.branch) > 0 and expected.items() <= case.stored["branch"].items()
    for cell in case.stored["map"]["cells"]:
        rows = [r for r in case.map if all(r[key] == cell[key] for key in ("layer", "directions", "coef"))]
        assert cell["n"] == len(rows) and cell["tried"] == len(rows[0]["rewards"])
        assert cell["to_right"] == sum(x > row["unsteered"] for row in rows for x in row["rewards"])
        assert cell["to_wrong"] == sum(x < row["unsteered"] for row in rows for x in row["rewards"])
    critic = case.stored["critic"]
    assert critic["n"] == len({line["prompt_id"] for line in case.log})
    assert critic["n"] == sum(part["n"] for part in critic["calibration"])


def test_runs_are_compared_by_flags_and_shared_features(world, everything):
    runs = [world[1][name] for name in ("one", "two")]
    pair = everything["one two"][0]["features"][f"{runs[0].name} and {runs[1].name}"]
    used = []
    for run in runs:
        steering = [line["steering"] for line in lines(run / "interventions.jsonl")]
        used.append({does["feature"] for does in steering if does})
    both = used[0] & used[1]
    flags = {row["flag"]: (row["first"], row["second"]) for row in pair["flags"]}
    assert flags["seed"] == ("1", "2") and "pool" not in flags
    [common] = pair["shared"]
    assert common["features"] == " ".join(map(str, sorted(both))) and common["dictionary"] == 24
    assert (common["first"], common["second"], common["both"]) == (len(used[0]), len(used[1]), len(both))
    assert common["expected"] == pytest.approx(len(used[0]) * len(used[1]) / 24, abs=1e-5)
    assert 0 <= common["p"] <= 1
    # the map says where a policy with known rewards stands
    for names, known in (("one two", True), ("held", True), ("token", False)):
        for result in everything[names][0]["map"].values():
            assert ("policy" in result) == known
            if known:
                assert result["regret"] == pytest.approx(result["mask_coverage"] - result["policy"], abs=1e-5)


def test_map_needs_no_run(world, tmp_path):
    folder = world[0]
    where = dict(task=f"file:{folder}/one.jsonl", model=f"{folder}/model", sae=(f"{folder}/sae",))
    opts = an.Args(command="map", **where, out=str(tmp_path), coef=(0.5, 2.0), layer=(1, 2), **SMALL)
    [result] = an.main(opts)["map"].values()
    cells = {(cell["layer"], cell["directions"], cell["coef"]) for cell in result["cells"]}
    expected = {(1, "sae", 0.5), (1, "sae", 2)}
    expected |= {(layer, "random", coef) for layer in (1, 2) for coef in (0.5, 2)}
    assert cells == expected and "policy" not in result and (tmp_path / "report.md").exists()


# ----------------------------------------------------------------------- another decision in its place
@pytest.mark.parametrize("kind", ["one", "held", "token"])
def test_another_decision_gives_the_greedy_answer_under_it(world, kind):
    """And the log's own decision gives the log's own answer."""
    lab = lab_of(world, kind)
    every = itertools.product(lab.picks.keys(), range(lab.args.decisions), range(lab.env.noop + 1))
    cases = [(n, t, action) for n, t, action in every if t < len(lab.picks[n])]
    _, answers, places = an.answers_with(lab, lab.env, cases)
    for (n, t, action), (row, column) in zip(cases, places, strict=True):
        tokens = answers[row][column]
        own = lab.picks[n]
        assert action != own[t] or tokens == lab.tokens[n]
        if t == len(own) - 1:
            held = own[:t] + [action] * len(tokens)
            acting = held[: lab.args.steer_tokens or len(tokens)] + [lab.env.noop] * len(tokens)
            logprobs = read_through(lab.env, lab.val[n], tokens, acting[: len(tokens)])
            assert logprobs.argmax(-1).tolist() == tokens


def test_sampled_continuations_follow_the_softmax_and_keep_what_came_before(world):
    lab = lab_of(world, "token", temperature=1.5, continuations=400)
    n = next(n for n, own in lab.picks.items() if len(own) == 2)
    answers = an.continued(lab, n, 1, lab.picks[n][1])
    tokens = lab.tokens[n]
    assert {answer[0] for answer in answers} == {tokens[0]}
    logits = read_through(lab.env, lab.val[n], tokens[:2], lab.picks[n])[1]
    p = (logits / 1.5).softmax(-1)
    seen = torch.bincount(torch.tensor([answer[1] for answer in answers]), minlength=len(p)) / 400
    assert (seen - p).abs().sum() / 2 < 0.5 * (1 - p.max()) + 0.1
    assert seen.argmax() in p.topk(3).indices


@pytest.mark.parametrize("kind", ["one", "token"])
def test_random_actions_have_the_site_and_strength_of_the_picked_ones(world, kind):
    lab = lab_of(world, kind)
    picked = [0, 1, 0]
    env, numbers = an.random_actions(lab, picked)
    assert env.actions[: lab.env.noop + 1] == lab.env.actions
    assert len(numbers) == 6 and max(numbers) == env.noop - 1
    for i, number in enumerate(numbers):
        site, feature, coef = env.actions[number]
        assert (site, coef) == lab.env.actions[picked[i // 2]][::2]
        assert torch.equal(env.steering[number], coef * lab.sites[site].directions[feature])
    assert len({env.actions[number] for number in numbers}) > 2


def test_one_token_probabilities_are_exact(world):
    lab = lab_of(world, "one", temperature=0.9)
    for n, prompt in enumerate(lab.val[:2]):
        shares = an.right_shares(lab, n)
        assert len(shares) == lab.env.noop + 1
        for action, share in enumerate(shares):
            p = (read_through(lab.env, prompt, [0], [action])[0] / 0.9).softmax(-1)  # (V,)
            letters = list(set(lab.env.letters[prompt.row["answer"]]))
            assert share == pytest.approx(float(p[letters].sum()), abs=1e-5)
        with pytest.MonkeyPatch.context() as m:  # not-a-number is no right answer, and harms no other one
            m.setattr(lab.env, "steering", lab.env.steering.clone())
            lab.env.steering[1] = math.nan
            assert an.right_shares(lab, n) == pytest.approx([shares[0], 0.0, *shares[2:]], abs=1e-5)


def test_promoted_tokens_go_through_the_final_norm(world):
    lab = lab_of(world, "one")
    [card] = an.cards(lab, {(1, 3)})
    model = lab.env.model
    logits = (lab.sites[0].directions[3] * model.model.norm.weight) @ model.lm_head.weight.T
    order = logits.argsort(descending=True).tolist()
    assert card["promoted"] == [lab.env.tok.decode([token]) for token in order[:8]]
    assert card["suppressed"] == [lab.env.tok.decode([token]) for token in order[::-1][:8]]
    assert sum(card["histogram"]) == card["active"] and len(card["neighbours"]) == 5
    assert all(other != 3 for other, *_ in card["neighbours"])
    assert max(value for context in card["contexts"] for _, value in context) > 0


def test_statistics_by_hand():
    areas = [((1, 2, 3, 4), 1), ((4, 3, 2, 1), 0), ((1, 1, 1, 1), 0.5), ((1, 3, 2, 4), 0.75)]
    for scores, area in areas:
        found = an.auc(np.array(scores), np.array([False, False, True, True]))
        assert found["auc"] == area and found["ci"][1] - found["ci"][0] > 0.2
        assert found["ci"][0] <= area <= found["ci"][1]
        assert an.auc(np.array(scores), np.zeros(4, bool)) is None

    # what is served is chosen on other prompts, and the no-op wins ties
    reward = np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], float)
    folds = [(np.array([0, 2]), np.array([1, 3]))]
    kinds = np.array(["a", "a", "b", "b"])
    assert crl_map.served(reward, kinds, folds).tolist() == [0, 1, 0, 1]
    assert crl_map.served(reward, kinds, folds, np.array(["b"] * 4)).tolist() == [0, 0, 0, 1]
    assert crl_map.served(reward * 0 + 1, kinds, folds).sum() == 2
    noise = np.random.default_rng(0).integers(0, 2, (100, 500)).astype(float)  # the best of 500 is luck
    halves = [(np.arange(50), np.arange(50, 100)), (np.arange(50, 100), np.arange(50))]
    assert abs(crl_map.served(noise, np.zeros(100), halves).mean() - 0.5) < 0.1

    # coverage is of a mask that was chosen on other prompts
    apart = [(np.array([0, 1]), np.array([2, 3]))]
    assert crl_map.covered(reward, reward[:, 0], apart, 1).tolist() == [0, 0, 0, 0]
    reward = np.vstack([reward, [1, 0, 0]])
    folds = [(np.array([0, 2]), np.array([1, 3, 4])), (np.array([1, 3, 4]), np.array([0, 2]))]
    assert crl_map.covered(reward, reward[:, 0], folds, 2).tolist() == [1, 1, 1, 1, 1]
    assert crl_map.covered(reward, reward[:, 0], folds, 1).tolist() == [1, 1, 0, 0, 1]

    # SAE against random: directions are drawn anew, too
    a = np.zeros((200, 6))
    b = np.zeros((200, 6))
    a[:, 0] = 1  # one lucky direction of six, on every prompt
    found = crl_map.two_way(an.Args(), a, b, np.arange(200))
    assert found["mean"] == pytest.approx(1 / 6) and found["ci"][0] == 0 and found["p"] > 0.2
    assert crl_map.two_way(an.Args(), a + 1, b, np.arange(200))["p"] < 0.01
    assert crl_map.two_way(an.Args(), a + 1, b, np.arange(200) % 3)["p"] == 0.25  # three groups show nothing


@pytest.mark.parametrize("rare", [0, 1])
@pytest.mark.parametrize("tell", [True, False])
def test_the_ceiling_needs_what_a_probe_tells(monkeypatch, rare, tell):
    """40 prompts of two classes, and an action for each. One prompt of a third class changes nothing.

    Where x tells nothing, the map's ceiling does not profit by the right classes."""
    kinds = np.array(["a", "b"] * 20)
    kinds[:rare] = "c"
    x = np.where(kinds == "a", 1.0, -1.0) if tell else np.tile([1.0, 1.0, -1.0, -1.0], 10)
    monkeypatch.setattr(crl_map, "read_at", lambda env, layers, prompts: x[:, None, None])
    some = [Prompt({"id": str(n), "group": str(n)}, [n], []) for n in range(40)]
    lab = SimpleNamespace(env=None, opts=an.Args())
    rows, told = crl_map.probes(lab, [0], some, kinds)
    assert len(rows) == 1 and ((told[0] == kinds).mean() >= 0.95) == tell
    reward = np.stack([kinds == "z", kinds == "a", kinds == "b"], 1).astype(float)
    halves = [(np.arange(20), np.arange(20, 40)), (np.arange(20, 40), np.arange(20))]
    ceiling = crl_map.served(reward, kinds, halves, told[0]).mean()
    assert ceiling >= 0.95 if tell else ceiling <= 0.55
    assert crl_map.probes(lab, [0], some, np.array(["c"] + ["a"] * 39)) == ([], {})  # nothing to tell


def test_the_probe_reads_what_a_policy_at_the_layer_would_read(world):
    lab = lab_of(world, "one")
    prompts = lab.val[:3]
    read = crl_map.read_at(lab.env, [1, 3], prompts)
    assert read.shape == (3, 2, lab.env.obs_dim)
    rows = [lab.env.prompts.index(prompt) for prompt in prompts]
    np.testing.assert_allclose(read[:, 0], lab.env.obs[rows, 0].nan_to_num(), atol=1e-4)
    for prompt, x in zip(prompts, read, strict=True):
        states = lab.env.decoder(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        assert np.abs(states[2][0, -1].numpy() - x[0, :16]).max() < 1e-4  # after layer 1


def test_effects_are_paired_by_prompt_and_keep_near_copies_together():
    d = np.repeat(np.tile([0.0, 1.0], 5), 10)
    found = {}
    for size in (10, 1):
        prompts = [Prompt({"id": str(i), "group": f"g{i // size}"}, [], []) for i in range(100)]
        found[size] = an.effect(pd.Series(d, an.index_of(prompts)))
    assert found[10]["mean"] == found[1]["mean"] == 0.5
    assert np.diff(found[10]["ci"]) > 2 * np.diff(found[1]["ci"])
    same = an.effect(pd.Series(1.0, an.index_of(prompts)))
    assert same["mean"] == 1 and same["ci"][0] < 1
    line = {"id": "0", "group": "g", "reward": 1.0, "noop": 0.0, "random": [0.0, 1.0]}
    cases = pd.DataFrame([line] * 3, columns=an.DECISION)
    assert an.against(cases[:0]) == {"vs_noop": None, "vs_random": None}
    found = an.against(cases)["vs_random"]
    assert (found["n"], found["mean"]) == (1, 0.5)


# ----------------------------------------------------------------------------------------------------- viewer
def hostile(data):
    """The same with markup in every text."""
    if isinstance(data, dict):
        kept = ("hash", "url", "card")
        return {key: value if key in kept else hostile(value) for key, value in data.items()}
    if isinstance(data, list):
        return [hostile(value) for value in data]
    return f"{data} {HOSTILE}" if isinstance(data, str) else data


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    """(folder with viewer.html of two runs, its data), every text of it hostile."""
    data = {"runs": [], "features": {}, "actions": [], "prompts": []}
    for name in ("one", "token"):
        an.view(lab_of(world, name), data)
    folder = tmp_path_factory.mktemp("page")
    data = hostile(an.finite(data))
    an.write_viewer(folder, data)
    return folder, data


def test_viewer_holds_what_was_logged_and_escapes_it(world, page):
    folder, data = page
    html = (folder / "viewer.html").read_text()
    assert html.count("<script") == 2 and html.count("</script>") == 2
    assert "<img" not in html and "http-equiv" in html
    assert json.loads(html.split('type="application/json">')[1].split("</script>")[0]) == data
    log = []
    names = []
    for kind in ("one", "token"):
        own = lines(world[1][kind] / "interventions.jsonl")
        called = lab_of(world, kind).names
        log += [f"{line['token_text']} {HOSTILE}" for line in own]
        names += [f"{called[line['action']]} {HOSTILE}" for line in own if line["decided"]]
    tokens = [token for prompt in data["prompts"] for token in prompt["tokens"]]
    assert [token["text"] for token in tokens] == log
    assert [data["actions"][token["action"]]["name"] for token in tokens if token["decided"]] == names
    assert {key.split(":")[0] for key in data["features"]} == {"0", "1"}  # of which run
    for action in data["actions"]:
        assert bool(action["steering"]) == bool(action["card"])
        if action["card"]:
            assert action["card"].split(":")[0] == str(action["run"])
            assert data["features"][action["card"]]["feature"] == action["steering"]["feature"]
    report = an.report({"branch": {f"r{HOSTILE}": {"v": HOSTILE, "top": [{"a": HOSTILE, "b": 1.0}]}}})
    assert "<" not in report.split("\n## ")[1]
    assert len({line.count("|") for line in report.splitlines() if line.startswith("|")}) == 1


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium to try the viewer")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("apt-get install chromium chromium-driver to try the viewer in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driven = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driven
    driven.quit()


class Page:
    """The viewer in a browser."""

    def __init__(self, browser, folder):
        self.run = browser.execute_script
        browser.get(f"file://{folder}/viewer.html")

    def js(self, code):
        return self.run(f"return {code}")

    def choose(self, name, value):
        """Sets a filter; returns how many prompts are shown."""
        event = "input" if name == "search" else "change"
        self.run(f"$('{name}').value = {json.dumps(value)}; $('{name}').dispatchEvent(new Event('{event}'))")
        return self.js("shown.length")


def test_viewer_in_chromium_filters_and_keys(browser, page):
    folder, data = page
    prompts = data["prompts"]
    viewer = Page(browser, folder)
    assert viewer.js("shown.length") == len(prompts)
    used = prompts[0]["tokens"][0]["action"]
    having = [any(t["decided"] and t["action"] == used for t in prompt["tokens"]) for prompt in prompts]
    expected = [("outcome", str(n), sum(p["outcome"] == n for p in prompts)) for n in range(4)]
    expected += [("run", "1", sum(p["run"] == 1 for p in prompts)), ("action", str(used), sum(having))]
    expected += [("search", prompts[0]["id"].split()[0], 1), ("search", "nothing like it", 0)]
    for name, value, count in expected:
        assert viewer.choose(name, value) == count
        assert count or "No prompt matches" in viewer.js("$('prompt').textContent")
        viewer.choose(name, "")
    many = next(i for i, prompt in enumerate(prompts) if len(prompt["tokens"]) > 1)
    viewer.run(f"document.activeElement.blur(); open({many} - 1)")
    for key in ("j", "ArrowRight"):
        viewer.run(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
    assert viewer.js("current") == many and viewer.js("token") == 1
    assert browser.get_log("browser") == []


def test_viewer_in_chromium_shows_token_action_and_feature(browser, page):
    folder, data = page
    viewer = Page(browser, folder)
    steered = []
    for i, prompt in enumerate(data["prompts"]):
        for t, token in enumerate(prompt["tokens"]):
            if token["decided"] and data["actions"][token["action"]]["card"]:
                steered.append((i, t, data["actions"][token["action"]]))
    i, t, action = steered[0]
    card = data["features"][action["card"]]
    viewer.run(f"open({i}); document.querySelectorAll('.token')[{t}].click()")
    shown = viewer.js("$('info').textContent")
    assert "next, steered" in shown and "next, unsteered" in shown and "nats on this token" in shown
    viewer.run("document.querySelector('#info .feature').click()")  # the action, then its feature
    shown = viewer.js("$('panel').textContent")
    assert action["name"] in shown and f"{action['picks']} times" in shown
    viewer.run("document.querySelector('#panel .feature').click()")
    shown = viewer.js("$('panel').textContent")
    for words in ("suppresses", "density", "cosine", "Strongest contexts", card["name"], action["name"]):
        assert words in shown
    for drawn in ("#panel .shade", "svg"):
        assert viewer.js(f"document.querySelectorAll('{drawn}').length") > 0
    assert viewer.js("document.images.length") == 0 and viewer.js("document.scripts.length") == 2
    assert viewer.js("window.hacked === undefined") and browser.get_log("browser") == []
