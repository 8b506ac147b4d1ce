"""What an `.mlpackage` is made of, as far as its specification tells, without running it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedit.runtimes.mil_constants import DECOMPRESS
from edgedit.runtimes.mil_package import Blob, MilOperation, read_package

__all__ = ["ISLANDS", "PackageReport", "report"]

#: Key of a package's metadata: JSON of the nodes that are computed in float32, by reason.
ISLANDS = "edgedit.islands"

#: The Neural Engine computes in float16 and takes tensors of up to four axes.
_NEURAL_ENGINE_RANK = 4


@dataclass(frozen=True)
class PackageReport:
    """One package.

    Attributes:
        functions: names, the default one first.
        opset: MIL's opset, "CoreML8" for iOS 18.
        operators: how often each operator occurs in the default function, constants apart.
        types: how many of these give float16, float32, int32 and so on.
        units: how many the Neural Engine could take (float16, at most four axes), and how many are left to the GPU and
            the CPU. Core ML decides when it compiles; this is an upper bound.
        float32: operations that give float32, by operator.
        largest_rank: the most axes of any tensor; `ranked` has the shapes of those above four, by operation.
        islands: nodes of the graph that are computed in float32, by reason.
        weights: bytes in the file by stored type, each tensor once.
    """

    functions: list[str]
    opset: str
    operators: dict[str, int]
    types: dict[str, int]
    units: dict[str, int]
    float32: dict[str, int]
    largest_rank: int
    ranked: dict[str, list[int]]
    islands: dict[str, list[str]]
    weights: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def report(package: Path) -> PackageReport:
    """Read the package and count. Raises BundleError when it is damaged."""
    found = read_package(package)
    names = [found.default, *sorted(name for name in found.functions if name != found.default)]
    function = found.functions[found.default]
    operations = [operation for operation in function.operations if operation.kind not in DECOMPRESS]
    weights: dict[int, Blob] = {}
    for each in found.functions.values():
        for operation in each.operations:
            for value in operation.inputs.values():
                if isinstance(value, Blob):
                    weights[value.offset] = value
    stored: Counter[str] = Counter()
    for blob in weights.values():
        stored[blob.type.dtype] += blob.nbytes
    able = sum(_neural(operation) for operation in operations)
    ranks = [(max(len(kind.shape) for _, kind in operation.outputs), operation.name) for operation in operations]
    return PackageReport(
        functions=names,
        opset=function.opset,
        operators=dict(Counter(operation.kind for operation in operations).most_common()),
        types=dict(Counter(operation.outputs[0][1].dtype for operation in operations).most_common()),
        units={"Neural Engine, GPU or CPU": able, "GPU or CPU": len(operations) - able},
        float32=dict(Counter(o.kind for o in operations if o.outputs[0][1].dtype == "fp32").most_common()),
        largest_rank=max((rank for rank, _ in ranks), default=0),
        ranked={
            operation.name: list(kind.shape)
            for operation in operations
            for _, kind in operation.outputs
            if len(kind.shape) > _NEURAL_ENGINE_RANK
        },
        islands=json.loads(found.metadata.get(ISLANDS, "{}")),
        weights=dict(stored.most_common()),
    )


def _neural(operation: MilOperation) -> bool:
    kinds = [kind for _, kind in operation.outputs]
    return all(kind.dtype == "fp16" and len(kind.shape) <= _NEURAL_ENGINE_RANK for kind in kinds)
