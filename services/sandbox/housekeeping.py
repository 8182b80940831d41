"""What a service leaves on the machine, and how it is removed: control groups, processes, folders."""

from __future__ import annotations

import shutil
from pathlib import Path

from services.kit.telemetry import get_logger
from services.sandbox.cgroups import instances, is_alive, remove_instance
from services.sandbox.isolation import Machine

log = get_logger(__name__)


def clear_leftovers(machine: Machine, state: Path) -> None:
    """Removes the processes, control groups and folders of services that ended without doing so."""
    if machine.root and machine.cgroups is not None:
        for instance in instances(machine.cgroups):
            if not is_alive(instance):
                log.warning("clearing_leftovers", instance=instance)
                remove_instance(machine.cgroups, instance)
    for folder in state.glob("*-*/") if state.exists() else []:
        if not is_alive(folder.name):
            shutil.rmtree(folder)


def remove_own(machine: Machine, folder: Path) -> None:
    """Removes this service's control groups and folder."""
    if machine.root and machine.cgroups is not None:
        remove_instance(machine.cgroups, machine.instance)
    shutil.rmtree(folder)
