"""The examples that train, as a user runs, interrupts and resumes them."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

import dsv4_eqx as dsv4
from dsv4_eqx.config.kinds import SLIDING, TOPK_MOE
from tests.checkpoint.saving import contents
from tests.commands import ROOT, run_here
from tests.models import random_tensors, small_config
from tests.official import write_release
from tests.sharded import assert_same_bits

for package in ("optax", "grain", "orbax.checkpoint"):
    pytest.importorskip(package)

CONFIG = small_config(
    vocab_size=128,
    n_routed_experts=6,
    num_hidden_layers=1,
    layer_types=(SLIDING,),
    compress_ratios=(0,),
    mlp_layer_types=(TOPK_MOE,),
)
SIZES = "--steps 3 --batch 2 --length 24 --held-out-rows 2 --evaluate-every 2".split()
TEXT = "To be, or not to be, that is the question. "
TIMES = ("tokens_per_second", "mfu")


@pytest.fixture
def text(tmp_path):
    """Three short documents."""
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(3):
        (path / f"{i}.txt").write_text(TEXT[i:] * (9 + i))
    return path


def run(example, *args):
    return run_here(ROOT / "examples" / example, *args)


def assert_went_well(done):
    bars = [line for line in re.split(r"[\r\n]", done.stderr) if "%|" in line]
    assert done.returncode == 0 and bars, done.stderr


def log_of(directory):
    """The entries without what depends on the time."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in x.items() if k not in TIMES} for x in entries], entries


@pytest.mark.slow
def test_a_training_run_that_is_interrupted_goes_on_bit_by_bit(
    text, tmp_path, monkeypatch
):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG.to_hf()))
    options = ["--texts", text, "--config", config, *SIZES, "--accumulate", 2]
    options += ["--peak-tflops", 0.1]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run("pretrain.py", *options, "--out", whole)
    assert_went_well(done)
    assert re.search(
        r"held out: [\d.]+ nats a token; a bigram model: [\d.]+", done.stdout
    )

    monkeypatch.syspath_prepend(ROOT / "examples")
    import training_log

    note = training_log.TrainingLog.step

    def interrupt(self, step, *args):
        note(self, step, *args)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training_log.TrainingLog, "step", interrupt)
    done = run("pretrain.py", *options, "--out", broken)
    monkeypatch.undo()
    assert_went_well(done)
    assert "stops after this step and saves" in done.stderr
    assert re.search(
        r"saved; go on with\n  python .*pretrain.py .*--resume$", done.stdout, re.M
    )
    assert not (broken / "model").exists()
    done = run("pretrain.py", *options, "--out", broken)
    assert re.match("pretrain.py: .* has a run: give --resume or ano", done.stderr)
    assert done.returncode == 1
    done = run("pretrain.py", *options, "--out", broken, "--resume")
    assert_went_well(done)

    (found, entries), (expected, _) = log_of(broken), log_of(whole)
    assert found == expected
    steps = [entry for entry in entries if "next_token" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert {
        "ahead",
        "balance",
        "largest_load",
        "learning_rate",
        "tokens",
        "mfu",
    } < steps[0].keys()
    assert [entry["step"] for entry in entries if "held_out" in entry] == [2, 3]
    assert contents(broken / "model") == contents(whole / "model")
    assert (whole / "losses.png").read_bytes()[1:4] == b"PNG"
    model = dsv4.from_pretrained(whole / "model")
    assert model.num_mtp == 1
    # The biases of the router have moved, each by the same three times.
    bias = model.layers[0].moe.router.bias
    assert np.isclose(np.abs(bias).max(), [0.001, 0.003], atol=1e-6).any()


def sliding_release(directory):
    """A release of two layers that take little to compile."""
    config = small_config(
        vocab_size=128,
        n_routed_experts=6,
        num_hidden_layers=2,
        layer_types=(SLIDING,) * 2,
        compress_ratios=(0,) * 2,
        mlp_layer_types=(TOPK_MOE,) * 2,
        num_nextn_predict_layers=0,
    )
    return write_release(directory, config, random_tensors(config))


@pytest.mark.slow
def test_adapters_of_a_release_are_trained_and_a_run_of_theirs_resumed(text, tmp_path):
    release, out = sliding_release(tmp_path / "release"), tmp_path / "tuned"
    options = ["--release", release, "--bytes", "--texts", text, *SIZES, "--lora", 3]
    done = run("finetune.py", *options, "--save-every", 1, "--out", out)
    assert_went_well(done)
    packed = dsv4.from_pretrained(release, dtype=np.float32, keep_quantized=True)
    tuned = dsv4.load_lora(packed, out / "adapter")
    query = tuned.layers[1].attention.query_down
    assert query.rank == 3 and np.abs(query.b).max() > 0
    assert_same_bits(query.base, packed.layers[1].attention.query_down)
    # A checkpoint has adapters alone, from which the last step is done again.
    shutil.rmtree(out / "checkpoints" / "3")
    done = run("finetune.py", *options, "--save-every", 1, "--out", out, "--resume")
    assert_went_well(done)
    assert_same_bits(dsv4.load_lora(packed, out / "adapter"), tuned)


@pytest.mark.slow
def test_some_layers_of_a_release_are_trained_over_a_mesh(tmp_path):
    release = sliding_release(tmp_path / "release")
    lines = [{"prompt": "2 + 3 = ", "completion": x * 30} for x in "abcdefghijkl"]
    texts = tmp_path / "a.jsonl"
    texts.write_text("\n".join(map(json.dumps, lines)))
    options = ["--release", release, "--bytes", "--texts", texts, *SIZES]
    options += "--mesh data=2 --fsdp --train-layers 1".split()
    done = run("finetune.py", *options, "--out", tmp_path / "tuned")
    assert_went_well(done)
    # Two pieces of each, with a target less than the completion's 30 tokens.
    assert "10 documents" in done.stdout and "290 targets" in done.stdout
    before = dsv4.from_pretrained(release, dtype=np.float32)
    after = dsv4.from_pretrained(tmp_path / "tuned" / "model", dtype=np.float32)
    assert_same_bits(after.layers[0], before.layers[0])
    assert_same_bits(after.embedding, before.embedding)
    moved = [
        not np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, (after.layers[1], before.layers[1])))
    ]
    assert sum(moved) > 10
    losses = [x["next_token"] for x in log_of(tmp_path / "tuned")[1] if "tokens" in x]
    assert len(losses) == 3 and all(map(np.isfinite, losses))


@pytest.mark.parametrize(
    "options, wrong",
    [
        ("--texts no/such", "no/such: there is no such file"),
        ("--length 9999", "--length 9999: the model has 4096 positions"),
        ("--mesh model=2", "is no axis and size"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--batch 0", "--batch 0: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_said_without_a_traceback(options, wrong, tmp_path):
    done = run("pretrain.py", *options.split(), "--layers", 1, "--out", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(rf"pretrain.py: .*{wrong}", done.stderr), done.stderr


def test_a_bigram_model_is_the_one_to_beat(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from training_log import bigram_nats

    seen = [(np.array([0, 1, 0, 1, 2]), None)]
    batch = dsv4.PackedBatch(
        np.array([[0, 1, 2, 1, 0]], np.int32),
        np.array([[0, 0, 0, 1, -1]], np.int32),
        np.array([[True, True, True, True, False]]),
    )
    # 0 -> 1 twice of 2, 1 -> 2 once of 2, and each pair once more.
    expected = -(np.log(3 / 5) + np.log(2 / 5)) / 2
    np.testing.assert_allclose(bigram_nats(seen, [batch], 3), expected)
    assert bigram_nats(seen, [batch], 5000) is None
