"""The registered model, which maps activations to codes. MLflow loads this file as code, with the SAE's folder as its
artifact.

No pickle is written or read: the artifact is `sae.safetensors` and `config.json`. Loading takes about 0.1 s.
"""

from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt


class RegisteredSAE(mlflow.pyfunc.PythonModel):
    """An MLflow model whose `predict` is the threshold encoder of a trained SAE."""

    def load_context(self, context: Any) -> None:
        """Read the SAE from the artifact folder."""
        from sae_core.sae import load_sae

        self.sae = load_sae(context.artifacts["sae"])

    def predict(
        self, context: Any, model_input: npt.NDArray[np.float32], params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return dense codes, float32 [token n_features], of raw activations, float32 [token d_model]."""
        import torch

        with torch.inference_mode():
            return self.sae.encode(torch.as_tensor(np.asarray(model_input, dtype=np.float32))).to_dense().numpy()


mlflow.models.set_model(RegisteredSAE())
