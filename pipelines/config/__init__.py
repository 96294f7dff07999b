"""The options of every stage, and the recipes that combine them.

A module for each stage holds its options class. pydantic is used in this room alone: a stage receives a checked, frozen
object. The docstring below a field is its help on the command line and in the notebook functions.
"""

from pathlib import Path

from pipelines.config.associate import AssociateOptions
from pipelines.config.circuit import CircuitOptions
from pipelines.config.compare import BaselineOptions, MatchOptions
from pipelines.config.effects import EffectsOptions
from pipelines.config.encode import EncodeOptions
from pipelines.config.exchange import ExportSAEOptions, ImportSAEOptions
from pipelines.config.extract import VARIABLE, DataOptions, ExtractOptions, ForwardOptions, InspectOptions
from pipelines.config.inputs import InputsOptions
from pipelines.config.modules import ModulesOptions
from pipelines.config.options import (
    NO_COLUMN,
    ActorOptions,
    CellOptions,
    GeneOptions,
    Options,
    check,
    option_help,
    parse_size,
    plain_reason,
)
from pipelines.config.probe import ProbeOptions
from pipelines.config.recipe import PARENTS, Recipe, load_recipe, recipe_text, refuse_signed_addresses
from pipelines.config.steer import SteerOptions
from pipelines.config.train import TrainOptions

DEFAULT_STORE = Path("scsae-store")
STORE_HELP = "Folder of the store, or s3://BUCKET/PREFIX."
ADDRESS_HELP = "Ray cluster to use, e.g. ray://HEAD:10001; default: this machine."

__all__ = [
    "ADDRESS_HELP",
    "DEFAULT_STORE",
    "NO_COLUMN",
    "PARENTS",
    "STORE_HELP",
    "VARIABLE",
    "ActorOptions",
    "AssociateOptions",
    "BaselineOptions",
    "CellOptions",
    "CircuitOptions",
    "DataOptions",
    "EffectsOptions",
    "EncodeOptions",
    "ExportSAEOptions",
    "ExtractOptions",
    "ForwardOptions",
    "GeneOptions",
    "ImportSAEOptions",
    "InputsOptions",
    "InspectOptions",
    "MatchOptions",
    "ModulesOptions",
    "Options",
    "ProbeOptions",
    "Recipe",
    "SteerOptions",
    "TrainOptions",
    "check",
    "load_recipe",
    "option_help",
    "parse_size",
    "plain_reason",
    "recipe_text",
    "refuse_signed_addresses",
]
