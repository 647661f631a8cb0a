"""What the figures of an evaluation depend on, and whether two of them are the same."""

import json
import os
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from utils.config import NETWORK, Use, settings
from utils.provenance import gather_provenance
from utils.run import Run

# whose figures they are, and of which images; all else says how they were measured
JUDGED = ("weights", "key", "encoder", "network", "images")
DIGESTS = ("weights", "images")


def identity(
    run: Run,
    config: CfgNode,
    uses: Use,
    origin: Mapping[str, Any],
    data: Mapping[str, Any],
    **how: Any,
) -> dict[str, Any]:
    """All that the figures of an evaluation depend on, by the names of keys and flags.

    It is the entry ``identity`` of a ``provenance``, in results.json, checkpoints and manifests.

    Args:
        run: its precision.
        config: the configuration of the evaluation.
        uses: what depends on its keys, such as ``NETWORK | FEATURE``.
        origin: of the weights, from ``load_pretrained_encoder``; a baseline has no ``weights``.
        data: from ``utils.provenance.data_facts``.
        how: the flags that matter, as ``**{"--temperature": 0.07}``.

    Returns:
        plain values as JSON has them.
    """
    judged = {name: origin.get(name) for name in JUDGED} | {"images": data.get("digest")}
    if not judged["weights"]:
        uses &= ~NETWORK
    return judged | settings(config, uses) | {"AMP_OPT_LEVEL": run.precision.level} | how


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two identities, in words by name.

    What one of them lacks says nothing: results of older versions have not all of it.
    """
    return {
        name: f"other {name}" if name in DIGESTS else f"{name} {old[name]} there, {value} here"
        for name, value in new.items()
        if name in old and old[name] != value
    }


def measured(of: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that says how was measured, not whose encoder on which images."""
    network = settings({}, NETWORK)
    return {
        name: value for name, value in of.items() if name not in (*JUDGED, "--baseline", *network)
    }


def as_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of arguments by the names of their flags."""
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def identity_said(provenance: Any) -> dict[str, Any]:
    """The identity in a ``provenance`` that was read from a file, empty where it has none."""
    said = provenance.get("identity") if isinstance(provenance, dict) else None
    return said if isinstance(said, dict) else {}


def identified(
    run: Run, origin: Mapping[str, Any], data: Any, new: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance of results with an identity; a warning says whose figures they replace.

    Args:
        run: its folder, configuration and device.
        origin, data: as ``gather_provenance`` takes them.
        new: the identity.
    """
    try:
        with open(os.path.join(run.folder, "results.json"), encoding="utf-8") as file:
            old = identity_said(json.load(file).get("provenance"))
    except (OSError, ValueError, AttributeError):  # none yet, or a damaged one
        old = {}
    if other := differences(old, new):
        run.logger.warning(
            "results.json is of another evaluation (%s): it will be replaced",
            "; ".join(other.values()),
        )
    return gather_provenance(run.effective, run.device, origin, data) | {"identity": dict(new)}
