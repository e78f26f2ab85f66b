"""Names in Kubernetes: what a run is called there, and which claims there can be."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.errors import Fault

LONGEST_NAME = 63
"""Of a DNS label (RFC 1035, section 2.3.4), which the host name of a pod is."""

_CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")


def object_name(name: str) -> str:
    """Return the name of a run in small letters, digits and hyphens."""
    return re.sub(r"[._]", "-", name.lower()).strip("-")


def name_faults(recipe: Recipe, suffix: str) -> Iterator[Fault]:
    """Yield what keeps a run's and its volume's name from being one in Kubernetes.

    The run's must be a DNS label that begins with a letter, and stay one with the suffix that its pods' host names get.
    """
    name, longest = object_name(recipe.name), LONGEST_NAME - len(suffix)
    if not name[:1].isalpha():
        text = f"{recipe.name!r}: a name in Kubernetes begins with a letter (RFC 1035); write name=run-{name}"
        yield fault(recipe, "name", text)
    elif len(name) > longest:
        text = f"{recipe.name!r}: {len(name)} letters, and a pod's host name has room for {longest}; shorten it"
        yield fault(recipe, "name", text)
    claim = recipe.cluster.volume
    if claim is not None and not _CLAIM.fullmatch(claim):
        text = f"{claim!r} is no name of a PersistentVolumeClaim: small letters, digits, '-', '.'; see kubectl get pvc"
        yield fault(recipe, "cluster.volume", text)
