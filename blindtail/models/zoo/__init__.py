"""Networks that ship with blindtail. Importing this loads no torch; `nets` holds the modules.

Each folder holds edge.bt, cloud.bt, the report.json that names the command and
the library versions that made them, and the trained weights. After a change of
the compiler, these compile again without training (NAME = fashion):

    blindtail train NAME --checkpoint blindtail/models/zoo/NAME/model.safetensors \\
        --out blindtail/models/zoo/NAME
"""

from __future__ import annotations

from pathlib import Path

from blindtail.errors import ModelError


def bundle_paths(name: str) -> tuple[Path, Path]:
    """(edge.bt, cloud.bt) of a trained network that ships with blindtail.

    Raises `ModelError` when there is none of that name.
    """
    folder = Path(__file__).parent / name
    edge, cloud = folder / "edge.bt", folder / "cloud.bt"
    if not name.isidentifier() or not (edge.is_file() and cloud.is_file()):
        raise ModelError(
            f"no trained network {name!r} ships with blindtail; make one with `blindtail train {name}`"
        )
    return edge, cloud
