"""Recipes: the options of several stages in one YAML file."""

from pathlib import Path

import pydantic
from pydantic import Field

from feature_store.credentials import is_signed
from feature_store.errors import StoreError
from feature_store.storage.text_files import read_text
from pipelines.config.associate import AssociateOptions
from pipelines.config.encode import EncodeOptions
from pipelines.config.exchange import ImportSAEOptions
from pipelines.config.extract import ExtractOptions
from pipelines.config.options import Options, check
from pipelines.config.steer import SteerOptions
from pipelines.config.train import TrainOptions
from pipelines.errors import UsageError

PARENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "train": (("extract",), "activations"),
    "import_sae": (("extract",), "activations"),
    "encode": (("train", "import_sae"), "sae"),
    "associate": (("encode",), "codes"),
    "steer": (("associate",), "associations"),
}
"""For a stage of a recipe, the stages that make the run it starts from, and the option that names that run."""
IMPORT_SAE = "import-sae"
"""The key of the import, which is named as its command is."""


class Recipe(Options):
    """The options of the stages of a recipe. A stage that is left out is not run.

    A stage starts from the run that the stage before it made.
    """

    store: str | None = None
    """Folder of the store, or s3://BUCKET/PREFIX; --store on the command line takes precedence."""
    extract: ExtractOptions | None = None
    """Options of the extraction."""
    train: TrainOptions | None = None
    """Options of the training."""
    import_sae: ImportSAEOptions | None = Field(
        default=None, validation_alias=pydantic.AliasChoices(IMPORT_SAE, "import_sae")
    )
    """Options of importing an SAE, in the place of a training; the key is `import-sae`."""
    encode: EncodeOptions | None = None
    """Options of the encoding."""
    associate: AssociateOptions | None = None
    """Options of the associations."""
    steer: tuple[SteerOptions, ...] = ()
    """Steering runs, one after the other."""

    @pydantic.model_validator(mode="after")
    def _one_sae(self) -> "Recipe":
        """Refuse several values: a recipe trains one SAE."""
        options = self.train
        for name in ("arch", "k", "l1_coefficient") if options is not None else ():
            if len(values := getattr(options, name)) > 1:
                raise ValueError(
                    f"train.{name} was {list(values)}, but a recipe trains one SAE; give one value "
                    "(`scsae train` takes several)"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _trained_or_imported(self) -> "Recipe":
        """Refuse an import beside a training, and one for the activations of several sites."""
        if self.import_sae is None:
            return self
        if self.train is not None:
            raise ValueError(f"the recipe has train and {IMPORT_SAE}; an SAE is trained or imported: give one of them")
        if self.extract is not None and len(self.extract.layer) > 1:
            raise ValueError(
                f"extract.layer was {list(self.extract.layer)}, but {IMPORT_SAE} takes one SAE, which reads one site; "
                "give one layer"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _other_data_are_encoded(self) -> "Recipe":
        """Refuse other data for the associations: those of a recipe are of the codes of its encoding."""
        if self.associate is not None and self.associate.data:
            raise ValueError(
                "associate.data is not allowed in a recipe; give encode.data, or use `scsae associate --data`"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_origin(self) -> "Recipe":
        """Refuse a named run if the recipe also has the stage that makes it."""
        for follower, (makers, field) in PARENTS.items():
            stages = getattr(self, follower)
            maker = next((one for one in makers if getattr(self, one) is not None), None)
            for stage in stages if isinstance(stages, tuple) else (stages,):
                named = None if stage is None else getattr(stage, field)
                if named is not None and maker is not None:
                    raise ValueError(
                        f"{_key(follower)}.{field} was {named!r}, but the recipe has {_key(maker)} too, which makes "
                        "that run; leave one of them out"
                    )
        return self


def _key(stage: str) -> str:
    """Return the key of a stage in a recipe."""
    return IMPORT_SAE if stage == "import_sae" else stage


def recipe_text(path: Path) -> str:
    """Return the text of a recipe; raise UsageError for a file that is missing or no text."""
    try:
        return read_text(path, "the recipe", wanted="a YAML file, saved as UTF-8")
    except StoreError as error:
        raise UsageError(str(error)) from None


def refuse_signed_addresses(text: str) -> None:
    """Raise UsageError for a recipe with an address that holds a signature: Ray shows the text of a job to everybody
    who can open its dashboard, and keeps it.
    """
    for word in text.split():
        if "://" in word and is_signed(word):
            raise UsageError(
                f"the recipe holds the signed address {word}, which Ray would show with its signature; give an s3:// "
                "or gs:// address, for which the nodes have credentials, or type `scsae run RECIPE` on the head"
            )


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; raise UsageError for a file that is missing or no text, invalid YAML or an unknown key."""
    # not above: every command imports this module, and few read a recipe
    import yaml

    try:
        values = yaml.safe_load(recipe_text(path))
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"the recipe {path} holds {values!r}; give a mapping of stages to their options")
    return check(Recipe, values, f"recipe {path}")
