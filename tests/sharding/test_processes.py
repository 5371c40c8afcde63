"""Several processes: when one fails all end, and say why."""

import concurrent.futures
import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from dsv4_eqx.sharding.processes import Processes, initialize
from tests.commands import ROOT

MEMBER = ROOT / "tests" / "sharding" / "member.py"
# How many processes there are, what one of them does, and which.
CASES = [
    (2, "none", 0),
    (2, "differ", 1),
    (2, "kill", 1),
    (2, "stop", 0),
    (2, "raise", 0),
    (2, "hang", 0),
    (2, "hang in C", 1),
    (1, "hang in C", 0),
]


def start(index, *arguments):
    """A process, and the file that it writes to."""
    output = tempfile.TemporaryFile("w+")
    command = [sys.executable, str(MEMBER), *map(str, (index, *arguments))]
    return subprocess.Popen(command, stdout=output, stderr=output), output


def run_members(num_processes, fault, victim):
    """Exit status, output and id of each, and when the last one had ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        start(index, num_processes, port, fault, victim)
        for index in range(num_processes)
    ]
    with contextlib.ExitStack() as stack:
        for process, output in started:
            stack.enter_context(output)
            stack.callback(process.kill)
        for index, (process, _) in enumerate(started):
            if fault != "stop" or index != victim:
                process.wait(timeout=100)
        ended = time.time()
        if fault == "stop":
            assert started[victim][0].poll() is None
            started[victim][0].send_signal(signal.SIGCONT)
        codes = [process.wait(timeout=60) for process, _ in started]
        for _, output in started:
            output.seek(0)
        texts = [output.read() for _, output in started]
    return codes, texts, [process.pid for process, _ in started], ended


@pytest.fixture(scope="module")
def runs():
    """All cases, some at a time: most of their time they wait."""
    pool = concurrent.futures.ThreadPoolExecutor(3)
    yield {case: pool.submit(run_members, *case) for case in CASES}
    pool.shutdown(cancel_futures=True)


def failed_run(runs, *case):
    """Output of the victim and of the other, after the checks that all faults share."""
    codes, texts, pids, ended = runs[case].result()
    *_, victim = case
    assert all(codes), texts
    (failed,) = re.findall(r"fails at ([\d.]+)", texts[victim])
    assert ended - float(failed) < 60
    assert not any(f"process {i} has 2" in text for i, text in enumerate(texts))
    return texts[victim], texts[1 - victim], pids[victim], pids[1 - victim]


def test_processes_compute_together_and_end(runs):
    codes, texts, _, _ = runs[2, "none", 0].result()
    assert codes == [0, 0], texts
    for index, text in enumerate(texts):
        assert f"process {index} has 2" in text and "ends" not in text


def test_processes_whose_settings_differ_are_refused_by_all(runs):
    codes, texts, pids, _ = runs[2, "differ", 1].result()
    name = rf"process 1 \([^,]+, pid {pids[1]}\)"
    items = (
        r"mesh\.data 1, process 0 has 2; name nothing, process 0 has None; "
        r"yarn\.factor 2\.0, process 0 has 4\.0: start"
    )
    assert codes == [1, 1]
    for text in texts:
        assert re.search(rf"ValueError: initialize: {name} has {items}", text), text


def test_a_killed_process_ends_the_others_with_their_stacks(runs):
    _, other, _, _ = failed_run(runs, 2, "kill", 1)
    # And not what the other raised, as its connection was lost.
    assert re.search(r"Task 1 heartbeat timeout|sending heartbeats\):\s+1\s", other)
    assert "Fatal Python error: Aborted" in other and "ends:" not in other


def test_a_stopped_process_ends_the_others_and_ends_when_continued(runs):
    victim, other, _, _ = failed_run(runs, 2, "stop", 0)
    assert "CoordinationService/Heartbeat" in other
    assert "in step" in other or "in <lambda>" in other
    assert "The following tasks are unhealthy" in victim


def test_a_process_that_raises_ends_the_others_which_say_what(runs):
    victim, other, pid, other_pid = failed_run(runs, 2, "raise", 0)
    names = [rf"process {i} \([^,]+, pid {x}\)" for i, x in enumerate((pid, other_pid))]
    said = rf"{names[1]} ends: {names[0]} failed: KeyError: 'no such batch'\n"
    assert re.search(said, other), other
    assert victim.endswith("\nKeyError: 'no such batch'\n")


@pytest.mark.parametrize("fault, index", [("hang", 0), ("hang in C", 1)])
def test_a_process_that_hangs_ends_with_all_others_and_their_stacks(runs, fault, index):
    victim, other, _, pid = failed_run(runs, 2, fault, index)
    name = rf"process {1 - index} \([^,]+, pid {pid}\)"
    why = rf"{name} did not get out of 'step' for 5 s\n"
    assert re.search(rf"{name} ends: {why}", other), other
    assert re.search(r'member.py", line \d+ in <lambda>', other)
    assert re.search(r'member.py", line \d+ in fail', victim), victim
    if fault == "hang":
        assert re.search(rf"process {index} .* ends: {why}", victim)


def test_a_process_that_hangs_in_c_ends_itself(runs):
    codes, texts, _, _ = runs[1, "hang in C", 0].result()
    assert codes == [1]
    assert re.search(r"Timeout \(0:00:11\)!\n(.*\n)+.* in fail\n", texts[0]), texts


WRONG = [
    ("address", "here"),
    ("address", "here:x"),
    ("address", ":1"),
    ("address", "here:65536"),
    ("num_processes", 0),
    ("index", 2),
    ("index", -1),
    ("index", True),
    ("index", np.float32(1)),
    ("settings", [1]),
    ("timeout", 0),
    ("timeout", 1.5),
    ("heartbeat_timeout", -1),
    ("initialization_timeout", float("inf")),
]


@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_arguments_are_refused(name, value, without_shape_checks):
    arguments = {"address": "here:1", "num_processes": 2, "index": np.int64(0)}
    with pytest.raises(ValueError, match=rf"^initialize\({name}="):
        with initialize(**arguments | {name: value}):
            pass


def test_regions_do_not_nest_and_have_a_time(without_shape_checks):
    processes = Processes(0, 60)
    with pytest.raises(KeyError), processes.together("a"):
        with pytest.raises(ValueError, match="'b'.* inside .*'a'"):
            with processes.together("b"):
                pass
        raise KeyError
    for timeout in (0, 1.5):
        with pytest.raises(ValueError, match=f"^together.timeout={timeout}"):
            with processes.together("a", timeout=timeout):
                pass
