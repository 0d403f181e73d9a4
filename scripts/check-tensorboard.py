#!/usr/bin/env python3
"""Does TensorBoard itself read our event files? Compares what it shows with metrics.jsonl, number by number.

    check-tensorboard.py [RUN]      a folder with metrics.jsonl and event files (default: the run that tests/report.rs leaves)

Three readers: TensorBoard's own `event_accumulator` in Python, and `tensorboard --logdir` on the loopback with its fast (Rust) and its
slow (Python) loader, asked over HTTP. Needs `pip install tensorboard`; without it, it makes target/tensorboard, a virtual
environment, from PyPI and goes on there.
"""

import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60  # seconds for TensorBoard to start and to load


def main():
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target/tmp/report/run"
    if not (run / "metrics.jsonl").is_file() or not list(run.glob("events.out.tfevents.*")):
        sys.exit(f"error: {run}: found no run with event files; run `cargo test --test report`, or name a run")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        sys.exit(in_environment(sys.argv[1:]))
    wanted = expected(run)
    count = sum(len(points) for points in wanted.values())
    print(f"{run}: {len(wanted)} curves, {count} numbers, files:")
    for file in sorted(run.glob("events.out.tfevents.*")):
        print(f"  {file.name}, {file.stat().st_size} bytes")
    compare("event_accumulator", wanted, accumulated(run))
    for fast in ("true", "false"):
        serve(run, wanted, fast)


def in_environment(arguments):
    """Runs this script again where TensorBoard is."""
    home = ROOT / "target/tensorboard"
    python = home / "bin/python"
    if os.environ.get("GLMTUNE_TENSORBOARD_VENV"):
        return "error: tensorboard is not importable in target/tensorboard; remove that folder"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "tensorboard", "setuptools<81"], check=True)
    environment = dict(os.environ, GLMTUNE_TENSORBOARD_VENV="1")
    return subprocess.run([str(python), __file__, *arguments], env=environment).returncode


def expected(run):
    """Tag -> {step: value as float32} of metrics.jsonl; null is NaN."""
    curves = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key == "step" or not (value is None or isinstance(value, (int, float))):
                continue
            tag = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            value = math.nan if value is None else value
            curves.setdefault(tag, {})[row["step"]] = struct.unpack("f", struct.pack("f", value))[0]
    return curves


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def compare(reader, wanted, found):
    assert sorted(found) == sorted(wanted), f"{reader}: tags {set(found) ^ set(wanted)}"
    for tag, points in wanted.items():
        assert list(found[tag]) == list(points), f"{reader}: {tag}: steps {set(found[tag]) ^ set(points)}"
        for step, value in points.items():
            assert same(found[tag][step], value), f"{reader}: {tag} at step {step}: {found[tag][step]}, expected {value}"
    lost = sum(math.isnan(value) for points in found.values() for value in points.values())
    print(f"{reader}: every curve equal, {lost} NaN among them")


def accumulated(run):
    from tensorboard.backend.event_processing import event_accumulator as ea

    accumulator = ea.EventAccumulator(str(run), size_guidance={ea.SCALARS: 0, ea.TENSORS: 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    for tag in tags["tensors"]:
        event = accumulator.Tensors(tag)[-1]
        print(f"text {tag} at step {event.step}: {event.tensor_proto.string_val[0].decode()[:40]!r}")
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in tags["scalars"]}


def serve(run, wanted, fast):
    """Starts `tensorboard` as a user does, on a free port of the loopback, and asks it as its page does."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--host", "127.0.0.1", "--port", "0",
             "--load_fast", fast, "--samples_per_plugin", "scalars=100000,text=100"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )
        try:
            address = None
            until = time.monotonic() + PATIENCE
            while address is None:
                log.seek(0)
                text = log.read()
                found = re.search(r"http://127\.0\.0\.1:\d+/", text)
                address = found and found.group()
                if process.poll() is not None or time.monotonic() > until:
                    raise AssertionError(f"tensorboard did not start:\n{text}")
                time.sleep(0.2)

            def ask(path, **query):
                url = address + path + ("?" + urllib.parse.urlencode(query) if query else "")
                with urllib.request.urlopen(url, timeout=30) as answer:
                    return json.load(answer)

            while True:  # it loads in the background
                tags = next(iter(ask("data/plugin/scalars/tags").values()), {})
                last = max(max(points) for points in wanted.values())
                seen = ask("data/plugin/scalars/scalars", run=".", tag="train/loss") if "train/loss" in tags else []
                if seen and seen[-1][1] == last:
                    break
                if time.monotonic() > until:
                    raise AssertionError(f"tensorboard shows {len(tags)} tags, train/loss up to {seen[-1:]}")
                time.sleep(0.5)
            curves = {}
            for tag in tags:
                points = ask("data/plugin/scalars/scalars", run=".", tag=tag)
                # NaN travels as a string or as a bare NaN, both of which float takes.
                curves[tag] = {step: float("nan" if value is None else value) for _, step, value in points}
            texts = ask("data/plugin/text/tags")
            loader = "fast" if fast == "true" else "slow"
            compare(f"tensorboard --logdir, {loader} loader, over HTTP", wanted, curves)
            for tag in next(iter(texts.values()), []):
                shown = ask("data/plugin/text/text", run=".", tag=tag)[-1]["text"]
                assert "<script" not in shown, shown
                print(f"  its page shows text {tag}: {shown[:70]!r}")
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
