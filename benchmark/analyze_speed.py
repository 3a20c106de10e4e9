"""Time and peak memory of summarising a long log: `analyze_features.py features --log-only` on a made-up run.

    python benchmark/analyze_speed.py --records 1000000

Writes a log of --records intervention records (200 tokens a prompt, 2000 features) into a temporary directory, runs the
sub-command in a process of its own and prints one JSON line: seconds (aim: below 60; cpu_seconds is what a quiet
machine takes), peak_mb (aim: below 2048) and log_mb.
"""
import dataclasses
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import crl_ppo as crl  # noqa: E402


@dataclass
class SpeedArgs:
    records: int = 1_000_000
    """intervention records"""
    features: int = 2000
    """different features in them"""


def write_run(run, records, features):
    """A run directory with args.json and a log of random decisions in the format of crl_ppo.py."""
    args = dataclasses.asdict(crl.Args(task="gsm8k", batch_prompts=10, noop=True, coef=0.5, sticky_final=0.0))
    identity = {"sae": ["made-up"], "sae_hash": ["0"], "layer": [15], "model": "made-up"}
    (run / "args.json").write_text(json.dumps({"schema": crl.SCHEMA, "args": args, "identity": identity}))
    rng = random.Random(0)
    with open(run / "interventions.jsonl", "w") as f:
        for n in range(records):
            prompt, position = divmod(n, 200)
            feature = rng.randrange(features)
            f.write(json.dumps({
                "schema": crl.SCHEMA, "prompt_id": f"{prompt:012x}", "task": "gsm8k", "layer": 15, "position": position,
                "token": n % 997, "token_text": " token", "unsteered_token": n % 991, "unsteered_token_text": " other",
                "feature": [feature], "feature_name": [f"{feature} at some / words: first, second, third"],
                "coefficient": [0.5], "added_norm": 81.28358459472656, "logprob": -rng.random(), "value": rng.random(),
                "mask_size": 257, "entropy": rng.random(), "reward": float(prompt % 3 == 0),
                "unsteered_reward": float(prompt % 2)}) + "\n")


def main(speed):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        write_run(run, speed.records, speed.features)
        size, began = (run / "interventions.jsonl").stat().st_size, time.time()
        subprocess.run([sys.executable, str(HERE / "analyze_features.py"), "features", "--log-only", "--run", str(run)],
                       check=True, stdout=subprocess.DEVNULL)
        seconds = time.time() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"records": speed.records, "seconds": round(seconds, 1),
                      "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
                      "peak_mb": round(used.ru_maxrss / 1024), "log_mb": size >> 20}))  # ru_maxrss: KiB on Linux


if __name__ == "__main__":
    main(crl.parse_args(SpeedArgs, __doc__))
