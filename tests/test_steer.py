"""crl_steer.py on tiny models: generate() under a run's policy says what crl_eval.py says, and leaves no trace."""
import json
import shutil

import pytest
import small_run
import tiny
import torch
import tyro
from statsmodels.stats.proportion import proportion_confint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import crl_eval
import crl_ppo
import crl_steer
import crl_tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder and runs: a letter, one that samples among active features, long answers held and in turn, by token. Their
    policies are random ones, whose choices hang on the prompt."""
    folder = small_run.build(tmp_path_factory.mktemp("steer"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crl_tasks, "score_answer", small_run.parity)
        runs = {"one": small_run.go(folder, folder / "runs", features=2, coef=(1.0, 4.0)),
                "active": small_run.go(folder, folder / "runs", afm="active", group=4, seed=2),
                "held": small_run.go(folder, folder / "runs", "long", steer_tokens=0, coef=(2.0,), observe=3),
                "turns": small_run.go(folder, folder / "runs", "long", features=2, steer_tokens=2, observe=2, seed=3),
                "token": small_run.go(folder, folder / "runs", "long", decide="token", steer_tokens=2, coef=(2.0,))}
        for run in runs.values():
            small_run.random_policy(run)
        yield folder, runs


def load(folder):
    """Model and tokenizer as anyone loads them."""
    tok = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval(), tok


@pytest.mark.parametrize("batched, cached", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("kind", ["one", "active", "held", "turns", "token"])
def test_generate_says_what_crl_eval_does(world, tmp_path, kind, batched, cached):
    folder, run = world[0], world[1][kind]
    study = crl_eval.load_study(crl_eval.Args(run=(str(run),), out=str(tmp_path)), run)
    (tmp_path / "parts").mkdir()
    crl_eval.evaluate([study], ["crl"])
    expected, (model, tok), new = study.part("crl").read_text().splitlines(), load(folder), study.args.max_new_tokens
    with crl_steer.steered(model, tok, run) as log:
        ids = [p.ids for p in study.prompts["test"]]
        for part in [ids] if batched else [[row] for row in ids]:
            asked = tok.pad({"input_ids": part}, return_tensors="pt")
            model.generate(**asked, max_new_tokens=new, use_cache=cached, do_sample=False)
    pushes = set()
    for n, line in enumerate(map(json.loads, expected)):
        own = [e for e in log if (e["row"], e["call"]) == ((n, 0) if batched else (0, n))]
        assert tok.decode([e["token"] for e in own], skip_special_tokens=new > 1) == line["text"]
        assert [e["position"] for e in own] == list(range(line["tokens"]))
        held = [line["push"][min(t, len(line["push"]) - 1)] for t in range(len(own))]
        steered = study.args.steer_tokens or new
        assert [e["push"] for e in own] == [push if t < steered else [] for t, push in enumerate(held)]
        assert sum(e["decided"] for e in own) == (min(len(own), steered) if kind == "token" else 1)
        pushes.add(str(held))
    assert len(pushes) > 2


@pytest.mark.parametrize("kind", ["one", "held", "token"])
def test_the_model_is_what_it_was(world, kind):
    model, tok = load(world[0])
    asked = tok(["a question"], return_tensors="pt")
    before, weights = model.generate(**asked, max_new_tokens=3), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), crl_steer.steered(model, tok, world[1][kind]):
        model.generate(**asked, max_new_tokens=3)
        1 / 0
    assert torch.equal(model.generate(**asked, max_new_tokens=3), before) and "generate" not in vars(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()) and tok.padding_side == "left"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_sampling_several_answers_decides_once_for_each_row(world):
    model, tok = load(world[0])
    with crl_steer.steered(model, tok, world[1]["token"]) as log:
        torch.manual_seed(0)
        asked = tok(["abc", "z"], return_tensors="pt", padding=True)
        out = model.generate(**asked, max_new_tokens=4, do_sample=True, num_return_sequences=3,
                             return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, :-4], asked["input_ids"].repeat_interleave(3, 0))
    assert {e["row"] for e in log} == set(range(6))
    for row in range(6):
        own = [e for e in log if e["row"] == row]
        assert [e["decided"] for e in own] == [True, True, False, False][:len(own)]
        assert [e["token"] for e in own] == out.sequences[row, -4:][:len(own)].tolist()


@pytest.mark.parametrize("flags, words", [
    (dict(num_beams=4), "num_beams 4"), (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
    (dict(guidance_scale=1.5), "guidance_scale"), (dict(prefill_chunk_size=4), "prefill_chunk_size"),
    (dict(generation_config=GenerationConfig(prompt_lookup_num_tokens=3)), "prompt_lookup_num_tokens"),
    (dict(attention_mask=torch.tensor([[1, 0]])), "padding_side = 'left'"),
    (dict(inputs=torch.tensor([[2, 70], [0, 70]])), "attention_mask is missing"),
    (dict(inputs=torch.tensor([0, 70])), "input_ids of shape"), (dict(inputs=None), "input_ids of shape")])
def test_what_cannot_be_steered_is_refused(world, flags, words):
    model, tok = load(world[0])
    flags = {"inputs": torch.tensor([[0, 70]]), "max_new_tokens": 2} | flags
    with crl_steer.steered(model, tok, world[1]["one"]):
        with pytest.raises(SystemExit, match=words):
            model.generate(**flags)
        model.generation_config.num_beams = 3
        with pytest.raises(SystemExit, match="num_beams 3"):
            model.generate(torch.tensor([[0, 70]]), GenerationConfig(max_new_tokens=2))
        with pytest.raises(SystemExit, match="steered already"), crl_steer.steered(model, tok, world[1]["one"]):
            pass


@pytest.mark.parametrize("field", ["dtype", "model_hash", "sae_hash"])
def test_another_model_or_sae_is_refused_by_field(world, tmp_path, field):
    folder, run = world[0], world[1]["one"]
    model, tok = load(folder)
    if field == "dtype":
        model = model.to(torch.bfloat16)
    elif field == "model_hash":
        model.get_input_embeddings().weight.data[0, 0] += 1
    else:
        record = json.loads((run / "args.json").read_text())
        record["args"]["sae"] = [tiny.tiny_sae_dir(tmp_path / "sae", 16, 24, small_run.HOOK, seed=5)]
        (tmp_path / "args.json").write_text(json.dumps(record))
        run = tmp_path
    with pytest.raises(SystemExit, match=f"{field} differs"), crl_steer.steered(model, tok, run):
        pass


# ------------------------------------------------------------------------------------------------------------- export
def test_an_exported_controller_steers_alike_and_holds_nothing_of_this_machine(world, tmp_path):
    folder, run = world[0], tmp_path / "run"
    shutil.copytree(world[1]["turns"], run)
    shutil.copytree(folder / "sae", tmp_path / "sae")
    (tmp_path / "sae" / "run_me.py").write_text("nothing executable is exported")
    record = json.loads((run / "args.json").read_text())
    record["args"] |= {"sae": [str(tmp_path / "sae")], "init": str(tmp_path / "begun_from")}
    (run / "args.json").write_text(json.dumps(record))
    (run / "eval").mkdir()
    (run / "eval" / "report.md").write_text("# Evaluation\n\n## the task: 1 run\n")
    crl_ppo.main(tyro.cli(crl_ppo.Args, args=["--export", str(run), str(tmp_path / "out")]))
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".md"}
    assert not any(str(place).encode() in p.read_bytes() for p in files for place in (folder, tmp_path))
    card = (tmp_path / "out" / "README.md").read_text()
    final = json.loads((run / "final.json").read_text())
    for words in (final["verdict"], f"| {100 * final['steered']:.1f} (", "#### the task: 1 run", "model_hash: ",
                  "## Licences"):
        assert words in card
    low, high = proportion_confint(round(final["steered"] * final["val_n"]), final["val_n"], method="wilson")
    assert f"({100 * low:.1f} to {100 * high:.1f})" in card and "Gemma" not in card
    (model, tok), logs = load(folder), []
    for place in (run, tmp_path / "out"):
        with crl_steer.steered(model, tok, place) as log:
            model.generate(**tok(["Say 3", "x"], return_tensors="pt", padding=True), max_new_tokens=3)
        logs.append(log)
    assert logs[0] == logs[1] and any(e["push"] for e in logs[0])
    tensors, state = crl_ppo.load_tensors(run / "best.safetensors", {})
    record["identity"]["model"] = state["model"] = "tiny-gemma"
    (run / "args.json").write_text(json.dumps(record))
    crl_ppo.save_tensors(run / "best.safetensors", tensors, state)
    crl_ppo.main(crl_ppo.Args(export=(str(run), str(tmp_path / "gemma"))))
    assert "Gemma Terms of Use" in (tmp_path / "gemma" / "README.md").read_text()
    with pytest.raises(SystemExit, match="exists"):
        crl_ppo.main(crl_ppo.Args(export=(str(run), str(tmp_path / "out"))))
    (run / "final.json").unlink()
    with pytest.raises(SystemExit, match="--resume"):
        crl_ppo.main(crl_ppo.Args(export=(str(run), str(tmp_path / "other"))))
    assert not (tmp_path / "other").exists()
