"""Everything that a GPU should be asked, in one command of at most nine minutes.

    python benchmarks/gpu.py --out benchmarks/results

Correctness first: every form of the kernels against the reference. Then one layer of
each kind at the sizes of Flash in bfloat16, attention, experts and the indexer alone,
decoding steps, and the same layer of transformers on the same GPU. It writes `gpu.json`
and the tables of `gpu.md`, again after each measurement, so that it may be stopped.

- `--only layers,experts` and `--forms hopper` choose; what a former run has written for
  other cases stays. `--match TEXT` chooses cases by what their name contains.
- `--device cpu --tiny` rehearses all of it without a GPU.

Each part runs in a process of its own, that a case which fails or hangs does not take
the others with it: it is recorded, and the rest goes on. The cases of a part compile
side by side, then they are timed; layers four by four, which alone may take seven
minutes. Times are medians of calls that each wait for the result; of short ones, the
time of one among many that do not, if that is less.

The share is that of the roofline: the longer of the useful products at the rate of a
large product, and of the bytes that must move (weights once in each pass) at the rate
of a large copy, both measured here. Of the experts, a decoding step must read those
that its router chose.
"""

import argparse
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Any, Final

HERE: Final = pathlib.Path(__file__).parent
PARTS: Final = (
    "device",
    "correctness",
    "layers",
    "attention",
    "experts",
    "indexer",
    "decoding",
    "transformers",
    "agreement",
)
# Seconds after which a part is stopped, and in which a case must say something.
LIMITS: Final = dict(
    device=60,
    correctness=210,
    layers=420,
    attention=180,
    experts=150,
    indexer=100,
    decoding=150,
    transformers=150,
    agreement=120,
)
SILENCE: Final = 120


def command_of(part: str, args: argparse.Namespace, skip: list[str]) -> list[str]:
    script = "gpu_transformers.py" if part == "transformers" else "gpu_child.py"
    command = [sys.executable, str(HERE / script), "--part", part]
    command += ["--device", args.device, "--forms", ",".join(args.forms)]
    command += ["--folder", str(args.out), "--match", args.match]
    command += ["--tiny"] * args.tiny + ["--skip", json.dumps(skip)]
    if args.sizes:
        command += ["--sizes", ",".join(map(str, args.sizes))]
    return command


def run_part(part: str, args: argparse.Namespace, results: "Results") -> None:
    """The part's process, started again without the case that ended it."""
    deadline = min(time.monotonic() + LIMITS[part], args.deadline)
    done: list[str] = []
    while time.monotonic() < deadline:
        before = len(done)
        failed = run_once(part, args, results, done, deadline)
        if not failed or len(done) == before:
            return
    results.add(dict(part=part, case="the rest", error="no time was left"))


def run_once(
    part: str,
    args: argparse.Namespace,
    results: "Results",
    done: list[str],
    deadline: float,
) -> bool:
    """Reads what a process measures; whether another is needed for the rest."""
    env = os.environ | environment(args)
    log = (args.out / "gpu.log").open("ab")
    child = subprocess.Popen(
        command_of(part, args, done), stdout=subprocess.PIPE, stderr=log, env=env
    )
    lines: queue.Queue[bytes] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    reader.start()
    current, problem = "compiling", ""
    while True:
        patience = min(SILENCE, deadline - time.monotonic())
        try:
            line = lines.get(timeout=max(patience, 0))
        except queue.Empty:
            problem = "took too long"
            child.kill()
            break
        if not line:
            break
        try:
            row = json.loads(line)
        except ValueError:
            continue  # what a library prints
        if "begin" in row:
            current = row["begin"]
            continue
        results.add(dict(part=part) | row)
        done.append(row.get("case", ""))
        current = "between cases"
    code = child.wait()
    log.close()
    if code == 0 and not problem:
        return False
    if current not in done:
        text = problem or f"the process ended with code {code}; see gpu.log"
        results.add(dict(part=part, case=current, error=text))
        done.append(current)
    return True


def _read(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Of the children: this checkout first, and a CPU beside the GPU."""
    path = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    platforms = "cpu" if args.device == "cpu" else "cuda,cpu"
    return dict(
        PYTHONPATH=os.pathsep.join(filter(None, path)),
        JAX_PLATFORMS=platforms,
        PYTHONUNBUFFERED="1",
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.92",
        XLA_PYTHON_CLIENT_PREALLOCATE="true" if args.preallocate else "false",
    )


class Results:
    """Rows of all parts, written after each; a later row of a case replaces it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.rows: dict[str, dict[str, Any]] = {}
        path = folder / "gpu.json"
        if path.exists():
            for row in json.loads(path.read_text()):
                self.rows[_key(row)] = row

    def add(self, row: dict[str, Any]) -> None:
        self.rows[_key(row)] = row
        print(row["part"], _line(row), flush=True)
        rows = list(self.rows.values())
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        for name, content in (("gpu.json", text), ("gpu.md", tables(rows))):
            part = self.folder / f".{name}"
            part.write_text(content)
            part.replace(self.folder / name)


def _key(row: dict[str, Any]) -> str:
    return f"{row['part']} {row.get('case', '')}"


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{k} {_shown(v)}" for k, v in row.items() if k != "part")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def tables(rows: list[dict[str, Any]]) -> str:
    """One markdown table for each part."""
    parts = []
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        names = list(dict.fromkeys(name for row in own for name in row))
        if any("error" not in row for row in own):
            names = [name for name in names if name not in ("part", "case")]
        else:
            names = ["case", "error"]
        lines = ["| " + " | ".join(name.rstrip("_") for name in names) + " |"]
        lines.append("|" + "---|" * len(names))
        for row in own:
            if not any(name in row for name in names if name != "error"):
                row = row | {names[0]: row["case"]}
            cells = (
                _shown(row[n]).replace("|", "/") if n in row else "" for n in names
            )
            lines.append("| " + " | ".join(cell[:120] for cell in cells) + " |")
        parts.append(f"## {part}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--only", default=",".join(PARTS), help="parts")
    parser.add_argument("--forms", default="", help="of kernels; gpu,hopper")
    parser.add_argument("--sizes", default="", help="tokens or rows, only these")
    parser.add_argument("--match", default="", help="words that a case must contain")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all")
    parser.add_argument("--preallocate", action=argparse.BooleanOptionalAction)
    parser.set_defaults(preallocate=True)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"there are no parts {sorted(unknown)}; there are {PARTS}")
    default = "gpu,hopper" if args.device == "gpu" else "cpu"
    args.forms = tuple((args.forms or default).split(","))
    args.sizes = [int(size) for size in args.sizes.split(",") if size]
    args.deadline = time.monotonic() + 60 * args.minutes - 5
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = arguments()
    results = Results(args.out)
    for part in PARTS:
        if part not in args.only:
            continue
        start = time.monotonic()
        run_part(part, args, results)
        print(f"-- {part}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
