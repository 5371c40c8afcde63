"""Several processes that watch each other: who fails, and what the others say."""

import json
import re
import socket
import subprocess
import sys
import time

import pytest

from dsv4_eqx.processes.initialize import Processes, initialize
from dsv4_eqx.processes.verdict import Peer, differences, judge
from tests.commands import ROOT

TIMEOUT = 5
MEMBER = ROOT / "tests" / "processes" / "member.py"


def run_members(num_processes, fault, victim=-1, timeout=TIMEOUT):
    """Exit status and output of all, their ids, and when the last one was out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    try:
        for index in range(num_processes):
            options = [index, num_processes, port, timeout, fault, victim]
            process = subprocess.Popen(
                [sys.executable, str(MEMBER), *map(str, options)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.append(process)
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    pids = [process.pid for process in running]
    codes = [process.returncode for process in running]
    return codes, outputs, pids, time.time()


@pytest.mark.slow
def test_processes_compute_together_and_end():
    codes, outputs, _, _ = run_members(3, "none")
    assert codes == [0, 0, 0], outputs
    for index, output in enumerate(outputs):
        assert f"process {index} has 3" in output and "ends" not in output


FAULTS = {
    "kill": r"died: killed, or crashed",
    "stop": r"is stopped \(SIGSTOP or \^Z\): (silent|not in 'step', .*) for 5 s",
    "hang": r"hangs: not in 'step', where process \d .* has waited for 5 s",
}
OTHER_FAULTS = {
    "hang in C": r"hangs in C code: (silent|not in 'step', .*) for 5 s",
    "hang inside": r"did not get out of 'step' for 5 s",
    "raise": r"failed: KeyError: 'no such batch'",
    "elsewhere": r"is in 'step' where process 1 .* is in 'saving': nobody can go on",
}
CASES = [(2, fault, victim) for fault in FAULTS for victim in (0, 1)]
CASES += [(2, fault, 1) for fault in OTHER_FAULTS]
CASES += [(4, "kill", 2), (4, "stop", 3), (4, "hang", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes, fault, victim", CASES)
def test_all_end_and_name_the_process_that_fails(num_processes, fault, victim):
    codes, outputs, pids, ended = run_members(num_processes, fault, victim)
    named = 0 if fault == "elsewhere" else victim
    name = rf"process {named} \([^,]+, pid {pids[named]}[^)]*\)"
    wanted = (FAULTS | OTHER_FAULTS)[fault]
    for index in set(range(num_processes)) - {victim}:
        said = re.search(rf"ends: .*{name}.* {wanted}", outputs[index])
        assert said, outputs
    assert all(codes), codes
    (failed,) = re.findall(r"fails at ([\d.]+)", outputs[victim])
    assert ended - float(failed) < 60


@pytest.mark.slow
@pytest.mark.parametrize("num_processes, victim", [(2, 0), (2, 1), (4, 2)])
def test_another_mesh_is_refused_by_all(num_processes, victim):
    codes, outputs, pids, _ = run_members(num_processes, "other mesh", victim)
    all_devices, differs = str(num_processes), victim or 1
    other, own = (all_devices, "1") if victim == 0 else ("1", all_devices)
    name = rf"process {differs} \([^,]+, pid {pids[differs]}\)"
    for code, output in zip(codes, outputs):
        assert code == 1
        wanted = rf"ValueError: .*{name} has mesh.data {other}, process 0 has {own}"
        assert re.search(wanted, output), output


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, wanted",
    [
        (0, "process 0 cannot be reached at 127.0.0.1:"),
        (1, "process 1 has not started"),
    ],
)
def test_a_process_that_never_starts_is_named(victim, wanted):
    codes, outputs, _, _ = run_members(2, "absent", victim)
    assert codes[1 - victim] == 1
    assert f"TimeoutError: initialize: {wanted}" in outputs[1 - victim]


# What is judged, without processes.


def peers(num=3, **settings):
    """As they are at second 0."""
    hello = dict(host="a", settings=settings)
    return [Peer(hello | {"index": i, "pid": 10 + i}, 0.0) for i in range(num)]


def tell(some, now, **message):
    for peer in some:
        peer.update(message, now)


def enter(some, now, name="step", timeout=5):
    tell(some, now, kind="enter", name=name, timeout=timeout)


def verdict(all_peers, now, timeout=7):
    found = judge(all_peers, timeout, now)
    return None if found is None else found.text


def test_silent_and_stopped_processes_are_told_apart():
    some = peers()
    assert verdict(some, 7.0) is None
    tell(some[:2], 7.0, kind="beat", where="a.py:3 in f")
    tell(some[2:], 7.0, kind="alive", state="T")
    assert "process 2 (a, pid 12) is stopped" in str(verdict(some, 7.5))
    tell(some[2:], 7.0, kind="alive", state="R")
    assert "process 2 (a, pid 12) hangs in C code" in str(verdict(some, 7.5))
    tell(some[2:], 7.0, kind="beat", where="")
    assert verdict(some, 14.0) is None
    tell(some[1:], 14.0, kind="beat", where="")
    assert "process 0 (a, pid 10) has not been heard of for 7 s" in str(
        verdict(some, 14.5)
    )


def test_those_that_others_wait_for_are_named():
    some = peers()
    enter(some, 1.0)
    tell(some, 2.0, kind="leave", failure="")
    enter(some[:1], 3.0)
    tell(some[1:2], 4.0, kind="beat", where="")
    tell(some[2:], 7.0, kind="beat", where="data.py:7 in load")
    assert verdict(some, 8.0) is None
    assert verdict(some, 8.5) == (
        "process 1 (a, pid 11) hangs in C code, process 2 (a, pid 12; at data.py:7 in "
        "load) hangs: not in 'step', where process 0 (a, pid 10) has waited for 5 s"
    )


def test_a_region_may_have_its_own_limit():
    some = peers()
    enter(some, 1.0, timeout=100)
    tell(some, 90.0, kind="beat", where="")
    assert verdict(some, 95.0) is None
    tell(some, 101.0, kind="beat", where="")
    assert "did not get out of 'step' for 100 s" in str(verdict(some, 102.0))


def test_different_regions_at_the_same_time_are_found():
    some = peers(2)
    enter(some[:1], 1.0)
    enter(some[1:], 1.0, name="the end")
    assert "process 1 (a, pid 11) is in 'the end'" in str(verdict(some, 1.0))


def test_who_left_a_region_by_an_exception_is_named_if_others_stay_in_it():
    some = peers()
    enter(some, 1.0)
    tell(some[1:2], 2.0, kind="leave", failure="KeyError: 'batch'")
    tell(some, 6.0, kind="beat", where="")
    assert verdict(some, 6.0) is None
    assert verdict(some, 6.5) == (
        "process 1 (a, pid 11) left by KeyError: 'batch': 'step', where process 0 (a, "
        "pid 10) has waited for 5 s"
    )
    tell(some[::2], 6.5, kind="leave", failure="KeyError: 'batch'")
    assert verdict(some, 10.0) is None


def test_the_first_to_end_is_named_though_it_is_heard_of_last():
    some = peers()
    enter(some[:1], 0.5)
    tell(some[:1], 1.0, kind="ended", why="failed: ValueError: connection closed")
    assert verdict(some, 1.1) is None
    tell(some[1:2], 1.1, kind="ended", why="failed: KeyError: 'batch'")
    assert verdict(some, 2.1) == "process 1 (a, pid 11) failed: KeyError: 'batch'"
    tell(some[2:], 1.2, kind="ended", why="died")
    tell(some[2:], 1.3, kind="ended", why="is lost")
    assert verdict(some, 2.1) == "process 2 (a, pid 12) died"


def test_processes_that_are_done_are_not_missed():
    some = peers()
    tell(some[:2], 1.0, kind="done")
    tell(some[:2], 1.5, kind="ended", why="is lost")
    tell(some[2:], 60.0, kind="beat", where="")
    assert verdict(some, 60.0) is None


def test_differences_name_process_item_and_values():
    alike = peers(2, jax="1", mesh="2")
    assert differences(alike) == ""
    other = peers(2, jax="2", mesh="2", extra="5")[1]
    assert differences([alike[0], other]) == (
        "process 1 (a, pid 11) has extra 5, process 0 has nothing; "
        "process 1 (a, pid 11) has jax 2, process 0 has 1"
    )
    many = peers(2, **{f"item{i}": "1" for i in range(20)})[1]
    assert differences([alike[0], many]).endswith("; and 14 more")


@pytest.mark.parametrize(
    "arguments, wrong",
    [
        (("here", 2, 0), "coordinator_address"),
        (("here:x", 2, 0), "coordinator_address"),
        (("here:1", 0, 0), "num_processes"),
        (("here:1", 2, 2), "process_id"),
        (("here:1", 2, True), "process_id"),
    ],
)
def test_wrong_arguments_are_refused(arguments, wrong):
    with pytest.raises(ValueError, match=rf"^initialize.*{wrong}"):
        with initialize(*arguments):
            pass


@pytest.mark.parametrize(
    "options",
    [dict(monitor_port=70000), dict(monitor_port=0), dict(settings=[1])],
)
def test_wrong_options_are_refused(options, without_shape_checks):
    with pytest.raises(ValueError, match=rf"^initialize\({next(iter(options))}="):
        with initialize("here:1", 2, 0, **options):
            pass


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_times_that_are_none_are_refused(timeout):
    for name in ("timeout", "initialization_timeout"):
        with pytest.raises(ValueError, match=f"^initialize.*{name}"):
            with initialize("here:1", 2, 0, **{name: timeout}):
                pass


def test_a_port_in_use_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"process 0 cannot listen on port {port}"):
            with initialize("127.0.0.1:1", 2, 0, monitor_port=port):
                pass


def test_regions_end_by_exceptions_and_have_names_and_times(without_shape_checks):
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as cat:
        processes = Processes(cat, 0, 5.0)
        with pytest.raises(KeyError), processes.together("a"):
            raise KeyError("x" * 9999)
        with pytest.raises(ValueError, match="^together.name=b'a'"):
            with processes.together(b"a"):  # type: ignore[arg-type]
                pass
        with pytest.raises(ValueError, match="^together.timeout=0"):
            with processes.together("a", timeout=0):
                pass
        out, _ = cat.communicate()
    entered, left = map(json.loads, out.splitlines())
    assert entered["kind"] == "enter" and left["kind"] == "leave"
    assert left["failure"].startswith("KeyError: 'xxx") and len(left["failure"]) == 300


def test_regions_do_not_nest():
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as cat:
        processes = Processes(cat, 0, 5.0)
        with processes.together("a"):
            with pytest.raises(ValueError, match="another region"):
                with processes.together("b"):
                    pass
        out, _ = cat.communicate()
    assert [line.split(b'"')[3] for line in out.splitlines()] == [b"enter", b"leave"]
