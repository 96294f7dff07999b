"""The options of exchanging SAEs with other libraries."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from pipelines.config.options import MovedDataOptions, Options
from pipelines.config.train import check_registered_name

Format = Literal["saelens", "sparsify", "dictionary_learning"]


def _local(folder: Any) -> Any:
    # a path has lost one of the slashes of s3://
    if str(folder).partition("/")[0].endswith(":"):
        raise ValueError("allowed is a folder of this machine; copy the files from or to other places")
    return folder


LocalFolder = Annotated[Path, pydantic.BeforeValidator(_local)]


class ImportSAEOptions(MovedDataOptions):
    """Import an SAE of SAELens, sparsify or dictionary_learning.

    It becomes an SAE run like a trained one: it is measured on the same tokens, registered, and used by every other
    command. Weights and thresholds are kept.
    """

    folder: LocalFolder
    """Folder of the SAE, as its library has written or published it."""
    activations: str | None = None
    """Activations run that the SAE reads; default: the newest."""
    format: Format | None = None
    """Library that wrote the SAE. Default: recognised by the files of the folder."""
    pick: str | None = None
    """Which SAE is meant, by its path below the folder, where there are several."""
    input_scale: float | None = Field(default=None, gt=0)
    """Number by which activations were multiplied before the training of the SAE, if its weights do not hold it; they
    are changed so that they take raw activations. Default: the SAE takes raw activations as it is."""
    other_site: bool = False
    """Take the SAE although its files name another model or site than that of the activations."""
    recovery_cells: int = Field(default=32, ge=0)
    """Number of `select` cells on which the loss recovered is measured, with x_hat in place of the activations; 0
    measures nothing."""
    seed: int = Field(default=0, ge=0)
    """Seed of the samples of tokens and cells on which the SAE is measured."""
    name: Annotated[str | None, pydantic.AfterValidator(check_registered_name)] = None
    """Name in the model registry; default: sae-MODEL-SITE, as of a trained SAE."""


class ExportSAEOptions(Options):
    """Write an SAE for SAELens, sparsify or dictionary_learning.

    Those libraries then compute the same codes and reconstructions from raw activations.
    """

    folder: LocalFolder
    """New or empty folder for the files."""
    sae: str | None = None
    """SAE run to export; default: the newest."""
    to: Format = "saelens"
    """Library that is to read the files; sparsify has no thresholds and takes topk SAEs alone."""
