"""The table of `scsae models-supported`: every family of foundation models that can be read, here and by plug-ins."""

import polars as pl


def supported_models() -> pl.DataFrame:
    """Return one row for each family: its name, files, names of genes, length, options and licence of the weights."""
    from sae_core.scfm import FAMILIES
    from sae_core.scfm.families import plug_ins

    rows = [
        {
            "family": family.name,
            "files": family.files,
            "genes": family.genes,
            "genes of a cell": family.length,
            "options": "\n".join(f"{option.name}: {option.help}" for option in family.options),
            "licence of the weights": family.licence,
        }
        for family in (*FAMILIES, *plug_ins().families)
    ]
    return pl.DataFrame(rows)
