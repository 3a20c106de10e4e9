"""kill -9 at random moments: what is begun again ends with the same bytes as what was never interrupted.

    python benchmark/faults.py [--trials 20] [--seed 0]

The stages take turns: download and conversion of the embedded model, training (screening, table, PPO, validation) with
--resume, evaluation with --resume, export. Training is on the tests' tiny model. Prints a line per trial and the count.
"""
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]
TIMES = ("wall_s", "known_s", "learn_s")  # of final.json


def content(path):
    """{file: hash} of a file or directory; of final.json without its times, without args.json, which names folders."""
    found = {}
    for file in sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()):
        data = file.read_bytes()
        if file.name == "final.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k not in TIMES}).encode()
        if file.name != "args.json":
            found[file.name if path.is_file() else str(file.relative_to(path))] = hashlib.sha256(data).hexdigest()
    return found


def start(command, after=None):
    """Run a command, or kill it after so many seconds. True if it came to its end."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    assert process.returncode == 0, f"{command} failed: {said.strip().splitlines()[-1:]}"
    return True


def stages(folder):
    """{stage: (command of a try in directory `at`, what it makes there)}."""
    import crl_ppo
    import small_run
    small = small_run.build(folder / "small")

    def train(at):
        if old := [p.parent for p in at.glob("*/args.json")]:
            return ["crl_ppo.py", "--resume", old[0]]
        given, default = vars(small_run.flags(small, at, updates=40)), vars(crl_ppo.Args())
        return ["crl_ppo.py", *(word for key, v in given.items() if v != default[key] for word in (
            f"--{key.replace('_', '-')}", *(v if isinstance(v, tuple) else (v,))))]
    start(train(folder / "run"))
    run = next(p.parent for p in (folder / "run").glob("*/final.json"))
    fetch = "import sys, crl_model; crl_model.fetch_embedded_model(sys.argv[1])"
    return {"download": (lambda at: ["-c", fetch, at], lambda at: next(at.glob("smollm2*"))),
            "training": (train, lambda at: next(at.glob("*/final.json")).parent),
            "evaluation": (lambda at: ["crl_eval.py", "--run", run, "--out", at, "--resume", "--conditions", "random"],
                           lambda at: at / "predictions.jsonl"),
            "export": (lambda at: ["crl_steer.py", run, at / "out"], lambda at: at / "out")}


def main(trials: int = 20, seed: int = 0):
    """Args:
        trials: kills in all
        seed: of the moments
    """
    rng, same = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as tmp:
        folder, expected = Path(tmp), {}
        kinds = stages(folder)
        for n in range(trials):
            stage = list(kinds)[n % len(kinds)]
            command, made = kinds[stage]
            if stage not in expected:  # uninterrupted
                began, at = time.time(), folder / f"{stage}-whole"
                at.mkdir()
                start(command(at))
                expected[stage] = content(made(at)), time.time() - began
            files, seconds = expected[stage]
            at, after = folder / f"{stage}-{n}", rng.uniform(0.1, 1) * seconds
            at.mkdir()
            ended = start(command(at), after)
            if not (at / "out").exists():  # an export that is there is whole
                start(command(at))
            alike = content(made(at)) == files
            same += alike
            print(f"{stage}: {'came to its end' if ended else 'killed'} after {after:.1f} of {seconds:.1f} s, then "
                  f"{'the same bytes' if alike else 'OTHER BYTES'}", flush=True)
    print(f"{same} of {trials} ended with the same bytes")
    return same == trials


if __name__ == "__main__":
    sys.exit(not tyro.cli(main))
