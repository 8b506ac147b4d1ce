from __future__ import annotations

from pathlib import Path

from edgedit.bench.energy import EnergyMeter


def zone(folder: Path, name: str, now: int, limit: int = 1_000_000) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{now}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_packages_are_added_up_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone(tmp_path, name, 100)
    meter = EnergyMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 400_100)
    zone(tmp_path, "intel-rapl:1", 100_100)
    zone(tmp_path, "intel-rapl:0:0", 300_100)
    assert meter.joules() == 0.5


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 900_000)
    meter = EnergyMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 50_000)
    assert meter.joules() == 0.15


def test_a_system_that_does_not_tell_gives_nothing(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "none").joules() is None
    zone(tmp_path, "intel-rapl:0", 5)
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.joules() is None
