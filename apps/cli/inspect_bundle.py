"""What `inspect` tells of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedit.apps.cli.inspect_quantization import print_quantization
from edgedit.apps.cli.tables import count, decibels, megabytes, print_facts, print_line, print_table, small

__all__ = ["bundle_document", "print_bundle"]

#: Characters of a prompt template that are shown.
TEMPLATE_SHOWN = 80
#: Nodes and tensors of a package that are named before the rest is counted.
LISTED = 3


def bundle_document(path: Path) -> dict[str, Any]:
    """The manifest, with the folder, the model's hash and its size. Raises BundleError."""
    from edgedit.bundle import open_bundle
    from edgedit.json_reader import parse_json
    from edgedit.tuning_record import load

    bundle = open_bundle(path)
    packages = {}
    for name, component in bundle.manifest.components.items():
        if "coreml" in component.artefacts:
            from edgedit.runtimes.mil_report import report

            artefact = component.artefacts["coreml"]
            for index, chunk in enumerate(artefact.chunks or (artefact.graph,)):
                label = f"{name} {index + 1}/{len(artefact.chunks)}" if artefact.chunks else name
                packages[label] = report(bundle.path / chunk).as_dict()
    tuned = load(bundle)
    recipes = {}
    for name in bundle.manifest.components:
        if (record := f"quantization/{name}.json") in bundle.manifest.files:
            recipes[name] = parse_json(bundle.file(record).read_bytes(), record).members()
    size = sum(entry.size for entry in bundle.manifest.files.values())
    return {
        "kind": "bundle",
        "path": str(path),
        "model_hash": bundle.model_hash,
        "size": size,
        "manifest": bundle.manifest.raw,
        "coreml": packages,
        "tuning": None if tuned is None else tuned.as_dict(),
        "quantization": recipes,
    }


def print_bundle(document: Mapping[str, Any]) -> None:
    """The same for people."""
    manifest = document["manifest"]
    provenance = manifest["provenance"]
    print_line(f"{document['path']}: a bundle")
    print_facts(
        {
            "name": manifest["name"],
            "family": manifest["family"],
            "pipeline": manifest["pipeline_class"],
            "hash": document["model_hash"][:16],
            "size": megabytes(document["size"]),
            "licence": provenance["licence"],
            "source": provenance["source"],
            "revision": provenance["revision"],
            "converted": provenance["created"],
            "options": _plain(provenance["options"]),
            "versions": _plain(provenance["versions"]),
        }
    )
    rows = [
        [
            name,
            part["architecture"],
            count(part["parameters"]),
            backend,
            artefact["precision"],
            megabytes(sum(manifest["files"][file]["size"] for file in artefact["files"])),
            *_parity(artefact["parity"]),
        ]
        for name, part in manifest["components"].items()
        for backend, artefact in part["artefacts"].items()
    ]
    print_table(["component", "architecture", "params", "backend", "type", "size", "parity", "rel. L2"], rows)
    for name, part in manifest["components"].items():
        print_line(f"{name}: {_tensors(part['inputs'])} -> {_tensors(part['outputs'])}")
    print_facts({key: value for key, value in _settings(manifest).items() if value})
    if document["tuning"]:
        chosen = document["tuning"]["components"].items()
        shown = [f"{name} on {p['engine']}, threads {p['threads']}, {p['form']} graph" for name, p in chosen]
        print_facts({"tuned here": "; ".join(shown)})
    if document["coreml"]:
        _print_packages(document["coreml"])
    if document["quantization"]:
        print_quantization(document["quantization"])


def _print_packages(packages: Mapping[str, Any]) -> None:
    """What Core ML's packages hold, and why parts of them are float32."""
    print_table(
        ["Core ML package", "sizes", "operators", "fp16", "fp32", "for the Neural Engine", "axes", "weights"],
        [
            [
                name,
                ", ".join(package["functions"]),
                str(sum(package["operators"].values())),
                str(package["types"].get("fp16", 0)),
                str(package["types"].get("fp32", 0)),
                str(package["units"]["Neural Engine, GPU or CPU"]),
                str(package["largest_rank"]),
                ", ".join(f"{kind} {megabytes(size)}" for kind, size in package["weights"].items()),
            ]
            for name, package in packages.items()
        ],
    )
    for name, package in packages.items():
        for reason, nodes in package["islands"].items():
            print_line(f"{name}: {len(nodes)} nodes in float32: {reason} ({_some(nodes)})")
        wide = [f"{operation} {shape}" for operation, shape in package["ranked"].items()]
        if wide:
            print_line(f"{name}: {len(wide)} tensors of more than four axes, not for the Neural Engine: {_some(wide)}")


def _some(names: Sequence[str]) -> str:
    """The first few of many; --json has all."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more, listed by --json" if rest > 0 else "")


def _settings(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    best, prompt, latents = manifest["recommended"], manifest["prompt"], manifest["latents"]
    return {
        "draws": best
        and f"{best['width']}x{best['height']}, {best['steps']} steps, {best['sampler']}, "
        f"guidance {best['guidance_scale']:g}",
        "sizes": best and ", ".join(f"{width}x{height}" for width, height in best["sizes"]),
        "attention": _operators(manifest["components"].get("transformer", {}).get("config", {}).get("self_attention")),
        "schedule": manifest["schedule"] and _plain(manifest["schedule"]),
        "guidance": manifest["guidance"] and _plain(manifest["guidance"]),
        "latents": latents
        and f"{latents['channels']} channels at 1/{latents['scale_factor']}, "
        f"sides multiples of {latents['size_multiple']}, "
        f"scaling {latents['scaling_factor']:g}, shift {latents['shift_factor']:g}, "
        f"{'with' if latents['preview'] else 'no'} preview",
        "positions": manifest["positions"] and _plain(manifest["positions"]),
        "conditioning": manifest["conditioning"] and _plain(manifest["conditioning"]),
        "prompt": prompt
        and f"at most {prompt['positive']['max_length']} tokens, "
        f"{'lower case' if prompt['lower'] else 'case kept'}, padding {prompt['padding']}, "
        f"template {_short(prompt['positive']['template'])!r}",
    }


def _operators(entries: Sequence[Mapping[str, Any]] | None) -> str | None:
    """Self-attention operators with the blocks that have them: "lit (heads 2, kernel_size 5) in 0-3, 5"."""
    shown = []
    for entry in entries or ():
        options = {key: value for key, value in entry.items() if key not in ("operator", "layers")}
        details = f" ({_plain(options)})" if options else ""
        shown.append(f"{entry['operator']}{details} in {_ranges(entry['layers'])}")
    return "; ".join(shown)


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers 0, 1, 2, 3 and 5 as "0-3, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _parity(parity: Mapping[str, Any] | None) -> Sequence[str]:
    if parity is None:
        return "not measured", "-"
    return decibels(parity["psnr_db"]), small(parity["relative_l2"])


def _tensors(specs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{spec['name']} {spec['dtype']}[{', '.join(map(str, spec['shape']))}]" for spec in specs)


def _plain(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(str(value))}" for key, value in section.items() if value is not None)


def _short(text: str) -> str:
    return text if len(text) <= TEMPLATE_SHOWN else text[: TEMPLATE_SHOWN // 2] + "…" + text[-TEMPLATE_SHOWN // 2 :]
