"""Checkpoints of a training run: its state and its place in the data, through orbax.

Orbax writes in the background into a temporary directory, which is renamed to the
number of the step once everything is in it: what is there under a number is whole. Each
array is saved by its name, in the pieces that the devices hold, and read in those that
the devices then need. What is not an array is in a table of JSON beside them.
"""

import json
import math
import os
import pathlib
import re
import secrets
import shutil
import warnings
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsv4_eqx.numerics.validation import (
    invalid_argument,
    path_of,
    validate_int,
    validate_size,
)
from dsv4_eqx.training.state_leaves import (
    SCALARS,
    description,
    difference,
    from_read,
    is_key,
    is_saved,
    named_leaves,
    placement,
    raw,
)

_CALL: Final = "TrainingCheckpoints"
_ARRAYS, _TABLE = "state", "table"  # the two parts of a checkpoint
_UNFINISHED: Final = re.compile(r"(\d+)\.orbax-checkpoint-tmp")


class Restored(NamedTuple):
    """What `TrainingCheckpoints.restore` found."""

    step: int
    state: Any
    data: Any


class TrainingCheckpoints:
    """The checkpoints of a run in a directory, of which the newest are kept.

    ```
    with TrainingCheckpoints(directory, keep=3) as checkpoints:
        found = checkpoints.restore((model, state, key))
        if found is not None:
            (model, state, key), first = found.state, found.step
            batches.set_state(found.data)
        for step in range(first + 1, last + 1):
            ...
            checkpoints.save(step, (model, state, key), batches.get_state())
    ```

    The state is any tree of arrays: models, over a mesh or not, with packed weights or
    plain ones, optimizers' states, keys, numbers. It may be restored on another mesh,
    or on one device. What was not finished, as when the process is killed, is never
    taken for a checkpoint.
    """

    directory: pathlib.Path

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        """
        **Arguments:**

        - `directory`: of this run alone; it is made if it is not there. With several
            processes, one that all of them see.
        - `keep`: how many checkpoints stay, the newest ones.

        **Raises:** ValueError if an argument is not as described; ImportError without
        orbax.
        """
        keep = validate_size(_CALL, "keep", keep)
        self.directory = path_of(_CALL, "directory", directory).absolute()
        if os.path.lexists(self.directory) and not self.directory.is_dir():
            raise invalid_argument(_CALL, "directory", directory, "a directory")
        self._orbax: Any = _import_orbax()
        options = self._orbax.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = self._orbax.CheckpointManager(
            self.directory, item_names=(_ARRAYS, _TABLE), options=options
        )
        self._unfinished = self._find_unfinished()
        self._unreadable: set[int] = set()

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of which there are checkpoints, in order."""
        return tuple(sorted(self._manager.all_steps()))

    def save(self, step: int, state: Any, data: Any = None) -> None:
        """Starts to save; the state may change, or be donated, once this returns.

        It waits for an earlier one that is still being written.

        **Arguments:**

        - `step`: how many steps are done; more than those of all checkpoints.
        - `state`: a tree of arrays. With several processes, those that are not over
            all of them must be equal on all.
        - `data`: what JSON can hold, as from `PackedBatches.get_state`. With several
            processes it must be the same on all.

        **Raises:** ValueError if there is a checkpoint of this step or a later one,
        JSON cannot hold `data`, or `step` is no integer of at least 0; OSError or
        another error, here or at a later call, if it could not be written.
        """
        step = validate_int("save", "step", step, least=0)
        _validate_data(data)
        self._remove_what_is_no_checkpoint()
        newest = self._manager.latest_step()
        if newest is not None and newest >= step:
            raise ValueError(
                f"save(step={step}): {self.directory} has step {newest}: restore that "
                "to go on from there, or give another directory."
            )
        leaves = named_leaves(state)
        table = {
            "leaves": {name: description(leaf) for name, leaf in leaves.items()},
            "numbers": {n: x for n, x in leaves.items() if _is_number(x)},
            "keys": {n: _key_kind(x) for n, x in leaves.items() if is_key(x)},
            "data": data,
        }
        arrays = {name: _writable(leaf) for name, leaf in leaves.items() if _has(leaf)}
        args = self._orbax.args
        parts = {_TABLE: args.JsonSave(table)}
        if arrays:  # orbax refuses to write none
            parts[_ARRAYS] = args.StandardSave(arrays)
        saved = self._manager.save(step, args=args.Composite(**parts), force=True)
        assert saved, step

    def restore(self, like: Any, *, step: int | None = None) -> Restored | None:
        """The newest whole checkpoint.

        A warning names what is newer and cannot be read, or was not finished.

        **Arguments:**

        - `like`: a state of the same structure, whose arrays say where each one is to
            lie; they may be abstract, with or without `sharding`. What is no array, no
            number and no boolean is taken from here.
        - `step`: of another checkpoint than the newest.

        **Returns:** step, state and data; None if there is no checkpoint at all.

        **Raises:** ValueError if the checkpoint is of another state, naming the first
        leaf that differs; if there is none of this step, or none can be read.
        """
        self.wait()
        if step is not None:
            step = validate_int("restore", "step", step, least=0)
            if step not in self.steps:
                listed = ", ".join(map(str, self.steps)) or "none"
                allowed = f"of a checkpoint in {self.directory}, which has {listed}"
                raise invalid_argument("restore", "step", step, allowed)
        faults: dict[int, str] = {}
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                state, data = self._read(candidate, like)
            except _OtherState as error:
                raise ValueError(
                    f"restore: step {candidate} in {self.directory} is of another "
                    f"state: {error}. Give a state made as the one that was saved."
                ) from None
            except Exception as error:
                if _is_no_fault(error) or jax.process_count() > 1:
                    raise
                faults[candidate] = f"{type(error).__name__}: {error}"[:200]
                continue
            self._say(candidate, faults)
            return Restored(candidate, state, data)
        if faults:
            raise ValueError(
                f"restore: no checkpoint in {self.directory} can be read: {faults}."
            )
        self._say(-1, faults)
        return None

    def wait(self) -> None:
        """Waits until all that was saved is on the disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends what works in the background."""
        self._manager.close()

    def _read(self, step: int, like: Any) -> tuple[Any, Any]:
        """State and data of a checkpoint; `_OtherState` if it is of another one."""
        args, leaves = self._orbax.args, named_leaves(like)
        reading = args.Composite(**{_TABLE: args.JsonRestore()})
        table = self._manager.restore(step, args=reading)[_TABLE]
        wanted = {name: description(leaf) for name, leaf in leaves.items()}
        fault = difference(table["leaves"], wanted)
        if fault is not None:
            raise _OtherState(fault)
        places = {name: placement(leaf) for name, leaf in leaves.items() if _has(leaf)}
        read = {
            n: np.empty(x.shape, x.dtype) for n, x in leaves.items() if _is_empty(x)
        }
        if places:
            reading = args.Composite(**{_ARRAYS: args.StandardRestore(places)})
            read |= self._manager.restore(step, args=reading)[_ARRAYS]
        numbers, keys = table["numbers"], table["keys"]
        found = [
            numbers[name]
            if name in numbers
            else from_read(leaf, read[name], keys.get(name))
            for name, leaf in leaves.items()
        ]
        return _in_place_of(like, found), table["data"]

    def _say(self, step: int, faults: dict[int, str]) -> None:
        """Warns of what is newer than the step that was found."""
        self._unreadable |= set(faults)
        said = [f"step {i} cannot be read ({fault})" for i, fault in faults.items()]
        unfinished = sorted({i for i in self._unfinished.values() if i > step})
        said += [f"step {i} was not finished" for i in unfinished]
        if said:
            used = (
                f"step {step} is the newest whole one" if step >= 0 else "none is whole"
            )
            text = f"restore: in {self.directory}, {'; '.join(said)}; {used}."
            warnings.warn(text, stacklevel=3)

    def _find_unfinished(self) -> dict[pathlib.Path, int]:
        """The directories that a killed process left, and their steps."""
        found = (
            (path, _UNFINISHED.match(path.name)) for path in self.directory.iterdir()
        )
        return {path: int(match[1]) for path, match in found if match is not None}

    def _remove_what_is_no_checkpoint(self) -> None:
        """Removes what was not finished; sets aside what could not be read."""
        if jax.process_index() == 0:
            for path in self._unfinished:
                shutil.rmtree(path, ignore_errors=True)
            for step in self._unreadable:
                aside = f".unreadable-{step}-{secrets.token_hex(4)}"
                os.rename(self.directory / str(step), self.directory / aside)
        if self._unreadable:
            self._manager.reload()
        self._unfinished, self._unreadable = {}, set()


class _OtherState(Exception):
    """In what a checkpoint's state differs."""


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, SCALARS) and not isinstance(leaf, np.generic)


def _is_empty(leaf: Any) -> bool:
    return not _is_number(leaf) and math.prod(leaf.shape) == 0


def _has(leaf: Any) -> bool:
    """Whether it is an array with elements; orbax writes no others."""
    return not _is_number(leaf) and not _is_empty(leaf)


def _key_kind(key: Any) -> str:
    return str(jax.random.key_impl(key))


def _writable(leaf: Any) -> Any:
    """The array to write; of several processes, the first writes what is on each."""
    array = raw(leaf)
    is_shared = isinstance(array, jax.Array) and not array.is_fully_addressable
    return array if is_shared or jax.process_count() == 1 else np.asarray(array)


def _in_place_of(like: Any, found: list[Any]) -> Any:
    """The tree with other leaves where it has some that are saved."""
    leaves, structure = jax.tree.flatten(like)
    new = iter(found)
    leaves = [next(new) if is_saved(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def _validate_data(data: Any) -> None:
    """Refuses what would come back as something else."""
    try:
        is_kept = json.loads(json.dumps(data)) == data
    except (TypeError, ValueError, RecursionError):
        is_kept = False
    if not is_kept:
        allowed = "what JSON holds: text keys, lists, numbers, True, False and None"
        raise invalid_argument("save", "data", data, allowed)


def _is_no_fault(error: Exception) -> bool:
    """Whether an error tells nothing about the checkpoint."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _import_orbax() -> Any:
    """The package orbax.checkpoint, which only this file needs."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            f"{_CALL} needs orbax: pip install 'dsv4-eqx[train]'"
        ) from error
    return orbax.checkpoint
