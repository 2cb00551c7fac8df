"""What an evaluation is expected to take on this machine, before any was measured.

Once per cell and kind of parameters, before evaluators start (a calibration beside their work would
measure that too), the operations of `native` are timed (`blindtail.he.calibration`) and the result is kept:

    STATE/calibration.json    seconds by parameters, with the machine they were measured on

Another processor, instruction set, number of threads or build of the native module measures again.
Whatever goes wrong, predictions go by the reference constants; they are corrected by measured
evaluations in any case (`cloud.queue.Predictor`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from blindtail.errors import ConfigError
from blindtail.he.backends import write_atomically
from blindtail.he.calibration import Calibration, calibrate
from blindtail.he.params import Parameters
from blindtail.he.program import Program

_log = logging.getLogger(__name__)
_FORMAT = 1

Machine = dict[str, str | int]


class Costs:
    """Predicted seconds of a cell's programs. `measure` blocks: call it on a thread.

    threads    native threads of one evaluation
    budget_s   about so long may one call of `measure` take; 0 = nothing is measured
    calibrate  `blindtail.he.calibration.calibrate`, or what a test puts in its place
    machine    what calibrations belong to
    """

    def __init__(
        self,
        state_dir: Path,
        backend: str,
        threads: int,
        budget_s: float,
        *,
        calibrate: Callable[..., Calibration] = calibrate,
        machine: Callable[[], Machine] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._backend, self._threads = state_dir / "calibration.json", backend, threads
        self._budget_s, self._calibrate, self._machine = budget_s, calibrate, machine or this_machine
        self._clock = clock
        self._known: dict[str, Calibration] = {}
        self._failed: set[str] = set()
        self._seconds: dict[str, float] = {}  # by program id

    def predicted_s(self, program: Program) -> float:
        """Server seconds of one evaluation; by the reference constants before `measure` has seen it."""
        found = self._seconds.get(program.spec.program_id)
        return program.predicted_s(self._backend) if found is None else found

    def measure(self, programs: Iterable[Program]) -> None:
        """Calibrates for parameters that are new here. Never raises for what cannot be measured."""
        wanted = {program.spec.program_id: program for program in programs}
        if self._backend == "native" and self._budget_s > 0:
            kinds = {_name(program.spec.parameters): program.spec.parameters for program in wanted.values()}
            try:
                self._calibrate_for(kinds)
            except Exception as error:
                _log.warning("predictions go by reference constants: %s: %s", type(error).__name__, error)
        for program_id, program in wanted.items():
            known = self._known.get(_name(program.spec.parameters))
            self._seconds[program_id] = program.predicted_s(self._backend, known)

    def _calibrate_for(self, kinds: Mapping[str, Parameters]) -> None:
        machine = {**self._machine(), "threads": self._threads}
        if not self._known:
            self._known = self._read(machine)
        new = {name: p for name, p in kinds.items() if name not in self._known and name not in self._failed}
        until_s = self._clock() + self._budget_s
        for left, (name, parameters) in zip(range(len(new), 0, -1), new.items(), strict=True):
            budget_s = max(0.0, until_s - self._clock()) / left
            self._failed.add(name)  # unless it succeeds: nothing is tried twice
            made = self._calibrate(parameters, threads=self._threads, budget_s=budget_s)
            self._failed.discard(name)
            self._known[name] = made
            _log.info("%s", _told(parameters, machine, made))
            self._write(machine)  # what is known stays known, whatever becomes of the next

    def _read(self, machine: Machine) -> dict[str, Calibration]:
        """What was measured on this very machine; nothing where the file is another's, or damaged."""
        try:
            content = json.loads(self._path.read_bytes())
            if content["format"] != _FORMAT or content["machine"] != machine:
                return {}
            return {name: Calibration.from_json(one) for name, one in content["calibrations"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, LookupError, TypeError, ValueError, AttributeError, ConfigError) as error:
            _log.warning("%s is not used: %s", self._path.name, error)
            return {}

    def _write(self, machine: Machine) -> None:
        calibrations = {name: one.to_json() for name, one in self._known.items()}
        content = {"format": _FORMAT, "machine": machine, "calibrations": calibrations}
        try:
            write_atomically(self._path, [json.dumps(content, indent=1).encode()])
        except OSError as error:
            _log.warning("the calibration could not be kept: %s", error.strerror)


def this_machine() -> Machine:
    """What the seconds of `native` depend on: processor, caches, instruction set, build of the module."""
    native: Any = importlib.import_module("blindtail.he._native")
    built = Path(native.__file__).stat()
    fields = dict.fromkeys(("model name", "cache size", "siblings"), "")
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            if name.strip() in fields:
                fields[name.strip()] = value.strip()
    except OSError:
        pass
    module = f"{native.version()} {built.st_size} {built.st_mtime_ns}"
    return {**fields, "instructions": native.instruction_sets()[0], "module": module}


def _name(parameters: Parameters) -> str:
    numbers = [parameters.ring_degree, *parameters.key_primes]
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()


def _told(parameters: Parameters, machine: Machine, made: Calibration) -> str:
    low, high = made.points[0][1], made.points[-1][1]
    return (
        f"calibrated for N = {parameters.ring_degree}, {len(parameters.primes)} primes, "
        f"{machine['instructions']}, {machine['threads']} threads in {made.took_s:.2f} s: a transform takes "
        f"{low.transform_s * 1e6:.3g} us at N = 8192, a key pair {low.key_pair_s * 1e6:.3g} to "
        f"{high.key_pair_s * 1e6:.3g} us"
    )


__all__ = ["Costs", "Machine", "this_machine"]
