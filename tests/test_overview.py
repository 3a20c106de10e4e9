"""What a researcher sees first: what actions say, letter switches, rotated options, the page's overview."""

import json
from collections import Counter

import numpy as np
import pytest
import small_run
from test_analyze import Lively, Page, browser, read_through  # noqa: F401
from tiny import lines

import analyze_features as an
import crl_draw
import crl_tasks
import crl_viewer
from crl_tasks import Prompt, hub

NOOP = an.NOOP


def remainder(row, tokens, *more):
    """Stands in for crl_tasks.score_tokens: the remainder of a random model's token names the letter."""
    if not row["choices"]:
        return float(sum(tokens) % 2), True
    return float(tokens[0] % len(row["choices"]) == row["answer"]), True


def letter(prompt, tokens):
    return "ABCD"[tokens[0] % len(prompt.row["choices"])]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """{name: run}: letters, an action that holds, a decision per token."""
    kinds = {"one": dict(val_samples=9), "held": dict(task="long", steer_tokens=0)}
    kinds["token"] = dict(task="long", decisions=2, steer_tokens=2, updates=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_run, "parity", remainder)
        with small_run.world(tmp_path_factory.mktemp("overview"), Lively, **kinds) as (_, runs):
            yield runs


@pytest.fixture(scope="module")
def lab(world):
    return an.Lab(an.Args(prompts=4), str(world["one"]))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """(results, folder) of all analyses, stopped at the fifth, branch."""
    out = tmp_path_factory.mktemp("out")

    def stop(lab):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(an.COMMANDS, "branch", stop)
        with pytest.raises(KeyboardInterrupt):
            an.main(an.Args(run=(str(world["one"]),), out=str(out), prompts=4, draws=2))
    found = {}
    for path in out.glob("*.json"):
        [found[path.stem]] = json.loads(path.read_text())["result"].values()
    return found, out


# --- what is said ---
SAID = [
    (["A"] * 8 + ["B"] * 2, ("A", 0.8, True)),
    (["A"] * 7 + ["B"] * 3, ("A", 0.7, False)),
    (["C"] * 5, ("C", 1.0, False)),  # too few prompts
    (["refusal"] * 9, ("refusal", 1.0, False)),
    (["other"] * 9, ("other", 1.0, False)),
]


@pytest.mark.parametrize("said, found", SAID)
def test_a_switch_gives_one_letter_on_four_of_five_prompts(said, found):
    assert an.mostly(said) == found


REPLIES = [
    "I'm sorry, but I can't help with that.",
    "Sure, here is how.",
    "can't can't can't can't can't can't",
]


@pytest.mark.parametrize("answer", ["safe", "unsafe"])
def test_long_answers_are_refusals_or_others_as_the_reward_says(lab, answer):
    row = {"task": "xstest", "choices": None, "answer": answer, "prompt": "x"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_tasks, "score_tokens", lambda row, text, *more: crl_tasks.score_answer(row, text))
        assert [an.said(lab.env, row, text) for text in REPLIES] == ["refusal", "other", "other"]
    assert an.classes_said([Prompt(row, [], [])]) == ["refusal"]
    assert an.classes_said([Prompt(row | {"task": "gsm8k"}, [], [])]) == []


def test_the_table_counts_the_runs_own_stored_answers(world, lab, finished):
    result = finished[0]["features"]
    known = hub.load_tensors(world["one"] / "rewards.safetensors", {})[1]["completions"]
    log = lines(world["one"] / "interventions.jsonl")
    picks = Counter(lab.names[line["action"]] for line in log)
    table = {row["action"]: row for row in result["answers"]}
    assert list(table)[:2] == ["policy", NOOP] and set(table) == {"policy", *lab.names}
    for action, name in enumerate(lab.names):
        said = Counter()
        for prompt, own in zip(lab.env.prompts, known, strict=True):
            said[letter(prompt, dict(own)[action])] += 1
        shares = [table[name][key] for key in "ABCD"]
        assert shares == pytest.approx([said[key] / len(known) for key in "ABCD"], abs=1e-5)
        assert table[name]["switch"] == (max(said.values()) >= 0.8 * len(known))
        assert (table[name]["picks"], table[name]["tried"]) == (picks[name], len(known))
    unsteered = {line["prompt_id"]: line["unsteered_reward"] for line in log}
    decisions = lines(finished[1] / "decisions.jsonl")
    assert decisions and all(line["noop"] == unsteered[line["id"]] for line in decisions)
    by_id = {prompt.row["id"]: prompt for prompt in lab.val}
    said = Counter(letter(by_id[line["prompt_id"]], [line["token"]]) for line in log)
    assert table["policy"]["B"] == pytest.approx(said["B"] / len(log), abs=1e-5)
    final = json.loads((world["one"] / "final.json").read_text())
    for who, key in (("unsteered", "unsteered"), ("policy", "steered"), ("constant", "constant")):
        assert result[who]["mean"] == pytest.approx(final[key], abs=1e-5)
    assert result["switch_share"] == pytest.approx(final["switches"], abs=1e-5)


def test_the_share_of_decisions_that_are_switches():
    rows = [{"action": name, "switch": name != "b", "A": 1.0} for name in ("policy", "a", "b", NOOP)]
    found = an.switches(rows, {"a": 3, "b": 5, NOOP: 2}, ["a", "b", NOOP])
    assert (found["switch_share"], found["switch_share_without_noop"]) == (0.5, 0.3)
    assert found["switch_actions"] == 2 and found["switch_verdict"].startswith("50% of 10 decisions")
    assert an.switches(rows, {"c": 1}, ["c", NOOP]) == {}  # not every action was tried


# --- rotated options ---
def test_rotation_moves_options_and_keeps_the_right_one(lab):
    prompt = next(p for p in lab.val if len(p.row["choices"]) == 3)
    u, v, w = prompt.row["choices"]
    moved = an.rotated(lab, prompt, 1)
    assert moved.row["choices"] == [w, u, v]
    assert moved.row["choices"][moved.row["answer"]] == prompt.row["choices"][prompt.row["answer"]]
    assert f"A. {w}\nB. {u}\nC. {v}" in lab.env.tok.decode(moved.ids)
    assert an.rotated(lab, prompt, 0).ids == prompt.ids


FOLLOWERS = [
    ("content", (1, 0), lambda k: k),
    ("letter", (0, 1), lambda k: 0),
    ("neither", (0, 0), lambda k: 3),
]


@pytest.mark.parametrize("what, shares, says", FOLLOWERS)
def test_content_is_told_from_letter(lab, what, shares, says):
    """Answers to three options that move along, that stay, and that are none ("other") once rotated."""
    asked = []
    for n in range(8):
        for choices in ("xyz", "zxy", "yzx"):
            row = {"id": str(n), "group": str(n), "choices": list(choices), "answer": 0}
            asked.append(Prompt(row, [], []))
    turns = [0, 1, 2] * 8
    answers = [[says(k) if k else 0] for k in turns]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.env, "score", lambda row, tokens: (float(tokens[0] == row["answer"]), True))
        row, letters = an.followed(lab, asked, turns, "policy", 8, answers, np.ones(24))
    assert (row["keeps_content"]["mean"], row["keeps_letter"]["mean"]) == shares
    assert letters[0] == "A" and row["right"]["mean"] == 1 and row["switch"] == (what == "letter")
    assert {"content": "follows the content", "letter": "follows the letter"}.get(
        what, "neither"
    ) in an.follows(row)


def test_permute_asks_again_and_counts_its_lines(world, lab, finished, tmp_path):
    result = finished[0]["permute"]
    asked = lines(finished[1] / "permute.jsonl")
    assert result["prompts"] == 4 and result["asked"] == len(asked) >= 8
    kept = {"policy": [], NOOP: []}
    prompts = {prompt.row["id"]: prompt for prompt in lab.val}
    first = {}
    for line in asked:
        n = len(prompts[line["id"]].row["choices"])
        said = {"policy": line["policy"], NOOP: line["actions"][-1]}
        if line["rotation"] == 0:
            first = said
            continue
        for who, word in said.items():
            back = "ABCD"[("ABCD".index(word) - line["rotation"]) % n]
            kept[who].append((line["id"], back == first[who]))
    for row in result["answers"][:2]:
        by_prompt = {}
        for name, same in kept[row["action"]]:
            by_prompt.setdefault(name, []).append(same)
        mean = np.mean([np.mean(same) for same in by_prompt.values()])
        assert row["keeps_content"]["mean"] == pytest.approx(mean, abs=1e-5)
    switch = {}
    for action, name in enumerate(lab.names):
        said = Counter(line["actions"][action] for line in asked)
        switch[name] = max(said.values()) >= 0.8 * len(asked)
    chosen = [switch[line["chosen"][0]] for line in asked]
    assert result["switch_share"] == pytest.approx(np.mean(chosen), abs=1e-5)
    line = asked[1]
    prompt = an.rotated(lab, prompts[line["id"]], line["rotation"])
    for action, word in enumerate(line["actions"]):
        token = int(read_through(lab.env, prompt, [0], [action])[0].argmax())
        assert letter(prompt, [token]) == word
    with pytest.raises(SystemExit, match="has answers without options, which permute needs"):
        an.main(an.Args(command="permute", run=(str(world["held"]),), out=str(tmp_path)))


# --- files ---
def test_what_was_finished_is_written_and_told_beforehand(world, finished, capsys):
    results, out = finished
    assert set(results) == {"features", "critic", "viewer", "permute"}
    for name in ("features", "critic", "permute"):
        assert (out / f"{name}-{world['one'].name}.png").read_bytes()[:4] == b"\x89PNG"
    report = (out / "report.md").read_text()
    assert "## permute" in report and "![features](features-" in report
    [result] = an.main(an.Args(command="viewer", run=(str(world["one"]),), out=str(out)))["viewer"].values()
    assert result["tokens_replayed_otherwise"] == 0
    said = capsys.readouterr().out.splitlines()
    assert " s (viewer " in said[0] and said[-1] == f"open {out}/viewer.html"
    assert "## features" in (out / "report.md").read_text()  # of the command before
    data = page_data(out)
    measured = [action["measured"] for action in results["features"]["actions"]]
    assert sorted(action["measured"] for action in data["actions"]) == sorted(
        measured
    )  # decisions.jsonl is read
    assert any(action["vs_random"] for action in data["actions"])


def page_data(out):
    html = (out / "viewer.html").read_text()
    return json.loads(html.split('type="application/json">')[1].split("</script>")[0])


SHOWN = [
    (dict(n=5, mean=0.0, ci=[-1, 1], p=1.0), "too few"),
    (dict(n=6, mean=0.0, ci=[-1, 1], p=1.0), "0 (-1 to 1)"),
    (dict(n=5, mean=0.5, ci=[0, 1]), "0.5 (0 to 1)"),  # a share
]


@pytest.mark.parametrize("value, text", SHOWN)
def test_effects_on_few_prompts_are_not_shown(value, text):
    assert crl_draw.cell(value) == text


# --- the page ---
@pytest.mark.parametrize("kind", ["one", "held", "token"])
def test_the_replay_says_what_was_logged_with_the_models_own_probabilities(world, kind):
    lab = an.Lab(an.Args(), str(world[kind]))
    replayed = crl_viewer.replay(lab)
    for n, part in lab.log.groupby("n"):
        acting = [line["action"] if line["steering"] else lab.env.noop for line in part.to_dict("records")]
        tokens = part["token"].tolist()
        for column, actions in enumerate((acting, [lab.env.noop] * len(tokens))):
            expected = read_through(lab.env, lab.val[n], tokens, actions)
            for t, (token, plain) in enumerate(zip(tokens, part["unsteered_token"], strict=True)):
                top, at = replayed[n, column, t]
                assert top[0][0] == (plain if column else token)
                assert at == pytest.approx(expected[t, [token, plain]].tolist(), abs=1e-3)
                assert top[1][1] == pytest.approx(expected[t].topk(2).values[1].item(), abs=1e-3)


COMPARED = [(5, -1.0, None), (3, -1.2, True), (3, -3.0, False), (-1, -9.0, None)]


@pytest.mark.parametrize("logged, at, tie", COMPARED)
def test_a_tie_is_told_from_another_answer(lab, logged, at, tie):
    top = [(5, -1.0), (3, at)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.args, "dtype", "bfloat16")
        found = crl_viewer.compared(lab, logged, at, top)
        assert (found and found[4]) == tie
        patch.setattr(lab.args, "dtype", "float32")
        assert tie is None or not crl_viewer.compared(lab, logged, at, top)[4]


def test_the_page_opens_on_the_overview(browser, finished, tmp_path):  # noqa: F811
    data = page_data(finished[1])
    data["prompts"][0]["tokens"][0]["differs"] = [["A", 0.4, "B", 0.41, True], None]
    few = next(a for a, action in enumerate(data["actions"]) if action["steering"])
    data["actions"][few] |= {"picks": 2, "measured": 1}
    crl_viewer.write_viewer(tmp_path, data)
    page = Page(browser, tmp_path)
    text = page.js("$('prompt').textContent")
    run = data["runs"][0]
    assert page.js("home") and run["switch_verdict"] in text and f"corrected {run['corrected']}" in text
    assert f"{100 * run['policy']['mean']:.1f} (" in text and "too few" in text
    assert page.js("document.querySelectorAll('.grid tbody tr').length") == len(data["actions"]) + 1
    assert page.js("getComputedStyle(document.querySelector('.grid thead th')).position") == "sticky"
    assert page.js("$('action').options.length") == len(data["actions"]) + 1  # chosen or not
    for a in range(len(data["actions"])):
        page.choose("action", str(a))
        for how, counts in (("right", lambda r, plain: r > 0.5), ("up", lambda r, plain: r > plain)):
            having = [p for p in data["prompts"] if counts(p["rewards"][a], p["reward"][1])]
            assert page.choose("how", how) == len(having)
        page.choose("how", "")
    page.choose("action", "")
    page.run("open(0)")
    assert "tie within rounding" in page.js("$('info').textContent")
    page.run(f"showAction({few})")
    assert "too few: 1 decisions measured" in page.js("$('panel').textContent")
    active = next(key for key, card in data["features"].items() if card["active"])
    page.run(f"feature({json.dumps(active)})")
    assert page.js("document.querySelectorAll('#panel svg rect').length") == 10
    assert browser.get_log("browser") == []
