"""What `pretrain.py` and `finetune.py` show: a bar, a log in JSON lines, a picture."""

import json
import pathlib
import time
from typing import Any, Final

import jax
import numpy as np
from tqdm import tqdm

# The most TFLOP/s of a device, dense and in bfloat16, by a part of its kind's name.
PEAKS: Final = {
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5p": 459,
    "TPU v6": 918,
}
# The curves of the picture, from the top down: a title, and what of the log is in it.
PANELS: Final = {
    "nats a token": ("next_token", "ahead", "held_out"),
    "balance loss": ("balance",),
    "largest load / mean": ("largest_load",),
    "tokens a second": ("tokens_per_second",),
    "learning rate": ("learning_rate",),
}


def peak_flops(given: float | None) -> float | None:
    """The most FLOP/s of all devices: from TFLOP/s of one, or its kind, if known."""
    kind = jax.devices()[0].device_kind
    if given is None:
        given = next((peak for name, peak in PEAKS.items() if name in kind), None)
    return None if given is None else given * 1e12 * jax.device_count()


class TrainingLog:
    """The bar and the log of a run, which goes on where the run does."""

    def __init__(self, directory, first, last, flops_per_token, peak):
        """From step `first`, already done, to `last`; lines of later steps are cut."""
        self.path = pathlib.Path(directory) / "log.jsonl"
        self.flops_per_token, self.peak = flops_per_token, peak
        kept = [entry for entry in read_log(self.path) if entry["step"] <= first]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        part = self.path.with_suffix(".part")
        part.write_text(text)
        part.replace(self.path)
        self.bar = tqdm(total=last, initial=first, unit="step", dynamic_ncols=True)
        self.shown: dict[str, str] = {}
        self.start = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def step(self, step: int, seen: dict[str, Any], num_tokens: int) -> None:
        """Notes a step: its losses, and how many tokens it had."""
        seconds, self.start = time.perf_counter() - self.start, time.perf_counter()
        entry = {name: float(value) for name, value in seen.items()}
        entry |= dict(tokens=int(num_tokens), tokens_per_second=num_tokens / seconds)
        if self.peak is not None:
            entry["mfu"] = num_tokens / seconds * self.flops_per_token / self.peak
        self._write(step, entry)
        self.shown |= {
            "loss": f"{entry['next_token']:.3f}",
            "tokens/s": f"{entry['tokens_per_second']:,.0f}",
        }
        if "largest_load" in entry:
            self.shown["load"] = f"{entry['largest_load']:.2f}"
        if "mfu" in entry:
            self.shown["MFU"] = f"{entry['mfu']:.1%}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def held_out(self, step: int, nats: float) -> None:
        """Notes the loss of texts that are not trained on."""
        self._write(step, {"held_out": nats})
        self.shown["held out"] = f"{nats:.3f}"
        self.start = time.perf_counter()  # its time is none of the next step's

    def _write(self, step: int, entry: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | entry) + "\n")


def bigram_nats(seen: list[Any], unseen: list[Any], vocab_size: int) -> float | None:
    """What a model of pairs of tokens makes of the unseen batches; for few tokens."""
    if vocab_size > 4096:
        return None
    counts = np.ones((vocab_size, vocab_size))
    for tokens, _ in seen:
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    nats = np.log(counts.sum(1, keepdims=True)) - np.log(counts)
    found = []
    for tokens, ids, mask in unseen:
        is_target = mask[:, 1:] & (ids[:, 1:] == ids[:, :-1])
        found.append(nats[tokens[:, :-1], tokens[:, 1:]][is_target])
    return float(np.concatenate(found).mean())


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line that was cut off is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw(directory: pathlib.Path, bigram: float | None) -> str:
    """Draws the log beside it; says what was made, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: it needs matplotlib, pip install 'dsv4-eqx[plot]'"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_log(directory / "log.jsonl")
    panels = {
        title: [name for name in names if any(name in entry for entry in entries)]
        for title, names in PANELS.items()
    }
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = plt.subplots(
        len(panels), figsize=(7, 2.4 * len(panels)), layout="constrained", sharex=True
    )
    for panel, (title, names) in zip(np.atleast_1d(axes), panels.items()):
        for name in names:
            points = [(x["step"], x[name]) for x in entries if name in x]
            panel.plot(*zip(*points), label=name.replace("_", " "))
        if bigram is not None and "held_out" in names:
            panel.axhline(bigram, color="gray", ls=":", label="bigram model, held out")
        panel.set(ylabel=title)
        panel.legend()
    axes = np.atleast_1d(axes)
    axes[-1].set(xlabel="step")
    path = directory / "losses.png"
    figure.savefig(path, dpi=150)
    return f"the losses are drawn in {path}"
