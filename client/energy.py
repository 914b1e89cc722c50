"""What a client's tasks take: a meter around each, and the owner's account of them.

codecarbon measures, offline. A processor's energy is read from its counters (RAPL) where the system lets us, and is
then that of the whole package; elsewhere it is an estimate, of the thermal design power of its model times the share of
the machine's processor time that this process used. Memory is always an estimate, of at least 10 W. Of a GPU, NVML
tells what the whole device took. So a figure says what a task cost about, and the sum of many says it better than one:
processor time is counted in steps of 10 ms.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from common import files
from common.errors import ConfigError
from common.model.energy import Energy, sum_of

JOULES_A_KWH = 3.6e6
NOTHING = Energy(joules=0.0, grams=0.0)
MOST_TASKS = 1000  # of one tracker, which keeps something of each
OWN_FIELDS = ("joules", "grams", "rounds")

Result = TypeVar("Result")

log = logging.getLogger("cloister.client")


class Meter(Protocol):
    """Says what work took."""

    def measure(self, work: Callable[[], Result]) -> tuple[Result, Energy]:
        """Does the work. Raises what it raises."""

    def at(self, device: torch.device) -> Meter:
        """The same, for work on another device."""


@dataclass(frozen=True)
class CodeCarbon:
    """The meter that measures this process, by codecarbon. Equal ones share what takes a second to set up."""

    country: str | None = None  # ISO 3166, three letters: whose electricity it is; None is the world's average
    device: str = "cpu"  # of GPUs the one in use: others idle, or work for somebody else

    @classmethod
    def on(cls, device: torch.device, *, country: str | None = None) -> CodeCarbon:
        """For work on a device. Raises `ConfigError` if nothing can be measured, or the country is not known."""
        made = cls(country, str(device))
        made.check()
        return made

    def check(self) -> None:
        """Measures nothing, which takes a second the first time. Raises `ConfigError` if that is not possible."""
        if find_spec("codecarbon") is None:
            raise ConfigError(["the federation's `energy` needs codecarbon: pip install 'cloister[energy]'"])
        try:
            tracker = _Tracker(self)
            tracker.begin()
            tracker.end()
        except ConfigError:
            raise
        except Exception as error:  # codecarbon's constructor logs what is wrong, and goes on
            raise ConfigError([f"codecarbon cannot measure energy here: {type(error).__name__}: {error}"]) from error

    def at(self, device: torch.device) -> CodeCarbon:
        return replace(self, device=str(device))

    def measure(self, work: Callable[[], Result]) -> tuple[Result, Energy]:
        """A task that was done and paid for is not lost because it could not be measured: it then took nothing."""
        idle, energy = _idle(self), NOTHING
        tracker: _Tracker | None = None
        try:
            tracker = idle.pop() if idle else _Tracker(self)
            tracker.begin()
        except Exception as error:  # of codecarbon's many
            _could_not(error)
            tracker = None
        try:
            result = work()
        finally:
            if tracker is not None:
                try:
                    energy = tracker.end()
                    if tracker.tasks < MOST_TASKS:
                        idle.append(tracker)
                except Exception as error:
                    _could_not(error)
        return result, energy


@lru_cache
def _idle(meter: CodeCarbon) -> list[_Tracker]:
    """The trackers that measure nothing just now: one is for one task at a time."""
    return []


class _Tracker:
    """codecarbon's tracker, with all said that a user's configuration might say otherwise: it opens no connection,
    writes no file, and logs errors only."""

    def __init__(self, meter: CodeCarbon) -> None:
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.ERROR)  # which its import sets to INFO
        self.tasks = 0
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code=meter.country,
            # Given here, it is looked up nowhere else.
            force_carbon_intensity_g_co2e_kwh=grams_a_kwh(meter.country),
            tracking_mode="process",  # of other processes on the machine, clients of other owners may be
            gpu_ids=_gpus(torch.device(meter.device)),
            force_cpu_power=None,
            force_ram_power=None,
            force_mode_cpu_load=False,
            pue=1.0,
            wue=0.0,
            region=None,
            cloud_provider=None,
            cloud_region=None,
            output_methods=[],
            output_handlers=[],
            output_dir="/",  # which must be there; nothing is written
            emissions_endpoint=None,
            electricitymaps_api_token=None,
            allow_multiple_runs=True,  # else a file in the folder for temporary ones keeps others out
            log_level="error",
            logger_preamble="",
        )

    def begin(self) -> None:
        self.tasks += 1
        self._tracker.start_task()

    def end(self) -> Energy:
        """What the task took since it began."""
        took = self._tracker.stop_task()
        joules, grams = took.energy_consumed * JOULES_A_KWH, took.emissions * 1000
        return Energy(joules=max(joules, 0.0), grams=max(grams, 0.0))


def _could_not(error: Exception) -> None:
    log.warning("what a task took could not be measured, and counts as nothing: %s: %s", type(error).__name__, error)


def _gpus(device: torch.device) -> list[str]:
    """The UUID of a device that is a GPU: NVML counts other GPUs, and in another order, than a process sees."""
    return [f"GPU-{torch.cuda.get_device_properties(device).uuid}"] if device.type == "cuda" else []


def grams_a_kwh(country: str | None) -> float:
    """Grams of CO2-equivalent for a kWh of a country's electricity, or of the world's. Raises `ConfigError` for a
    country that codecarbon does not know."""
    from codecarbon.input import DataSource

    source: Any = DataSource()  # type: ignore[no-untyped-call]  # codecarbon has some types
    if country is None:
        return float(source.get_carbon_intensity_per_source_data()["world_average"])
    try:
        return float(source.get_global_energy_mix_data()[country]["carbon_intensity"])
    except KeyError:
        raise ConfigError(
            [f"energy.country: codecarbon knows no country {country}; leave it out for the world's average"]
        ) from None


@dataclass
class EnergyBook:
    """What each run took of this owner, in a file of the client's state. What cannot be written ends no training."""

    path: Path
    runs: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> EnergyBook:
        """With what earlier processes noted. What is damaged begins anew: nothing rests on it."""
        try:
            held = json.loads(path.read_bytes())
            runs = {str(run): {name: float(told[name]) for name in OWN_FIELDS} for run, told in held.items()}
            if not all(math.isfinite(value) for told in runs.values() for value in told.values()):
                raise ValueError("not finite")
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s: cannot be read, and begins anew: %s", path, error)
            return cls(path)
        return cls(path, runs)

    def note(self, energy: Energy, *, run: str, trained: bool) -> None:
        """A task of a run has ended."""
        so_far = self.runs.get(run)
        total = sum_of(self.of(run), energy)
        assert total is not None
        rounds = (so_far["rounds"] if so_far else 0) + trained
        self.runs[run] = {**total.told, "rounds": rounds}
        try:
            files.replace(self.path, (json.dumps(self.runs, indent=2) + "\n").encode(), durable=False, mode=files.OWN)
        except OSError as error:
            log.warning("%s: cannot be written: %s; training goes on without it", self.path, error.strerror)

    def of(self, run: str) -> Energy | None:
        """What a run has taken so far; None if nothing is known of it."""
        told = self.runs.get(run)
        return Energy.of(told) if told else None

    def describe(self, run: str) -> str:
        """The same for the owner; "" if nothing is known of it."""
        energy = self.of(run)
        return "" if energy is None else f"{energy} in {self.runs[run]['rounds']:.0f} rounds"
