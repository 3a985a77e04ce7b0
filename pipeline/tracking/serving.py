"""A trained model as MLflow loads and serves it: images in, label maps out.

    mlflow models serve -m models:/voc-res101@best --env-manager local --port 5001

MLflow calls `_load_pyfunc`, whose name is MLflow's, with the weights' safetensors file: nothing is unpickled, and no
code comes out of the database; the code is this project's, installed where the model is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime.dvc_md5 import dvc_md5
from refinenet.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


class Served:
    """What MLflow calls; one image at a time, whatever comes at once: PyTorch uses all cores for each."""

    def __init__(self, weights: Path, device: str) -> None:
        import torch

        from refinenet.inference.predictor import Predictor

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._predictor = Predictor(weights, torch.device(device))
        self._alone = threading.Lock()

    def predict(self, table: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Label the column `image` (bytes of image files): columns `label` and `classes`, as `models.signature` says.

        A label is the bytes of a palette PNG of the upright image's size: index of `classes`, 255 = void. `params`:
        `scales` and `flip`, as `pipeline.predict` has them. MlflowException (status 400) for what is no image.
        """
        import pandas as pd
        from mlflow.exceptions import MlflowException

        from pipeline.formats.label_images import indexed
        from pipeline.formats.photo import decoded
        from refinenet.config import Protocol

        scales = tuple(float(scale) for scale in (params or {}).get("scales", (1.0,)))
        labels = []
        try:
            if not scales or not all(0 < scale <= 8 for scale in scales):
                raise UserError(f"scales: {list(scales)}, expected numbers above 0, 8 at most")
            protocol = Protocol(scales, bool((params or {}).get("flip", False)))
            for number, data in enumerate(table["image"]):
                png = BytesIO()
                with self._alone:
                    image = decoded(BytesIO(bytes(data)), f"image {number}")
                    label = self._predictor.label_photo(image, protocol, f"image {number}")
                indexed(label, self._predictor.palette).save(png, "png")
                labels.append(png.getvalue())
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({"label": labels, "classes": [list(self._predictor.classes)] * len(labels)})


def _load_pyfunc(path: str, config: Mapping[str, Any]) -> Served:
    """Load the model of the safetensors file `path`. UserError if its md5 is no longer the one that was logged.

    `config`, as logged: "md5", and "device", which MLFLOW_PYFUNC_INFERENCE_CONFIG='{"device": "cpu"}' sets; "" is a GPU
    where there is one.
    """
    weights = Path(path)
    if (found := dvc_md5(weights)) != config["md5"]:
        raise UserError(f"{weights}: md5 {found}, expected {config['md5']}, of the weights that were logged")
    return Served(weights, str(config["device"]))
