"""The study behind docs/findings.md: what the features of an SAE of the mini model say about real cells.

    python docs/studies/findings.py --data $SCSAE_DATA --store ROOT --out docs

1. Which features stand for which cell type? PBMC of eight donors; features are chosen on two donors and reported on
   others.
2. Does an SAE that never saw a stimulated cell have a feature that separates stimulated cells? It is trained on control
   cells and applied to control and IFN-beta cells of donors that it was not trained on; four folds test every donor
   once.
3. Do features separate the protocol from the cell line? Five lines in five batches of two protocols.

Each part runs a recipe, as a user would; runs that are in the store are not made again. Layer, k and pooling are the
best of those tried (layers 1 and 3, k 8 and 16, max and mean) on the control SAE of the default split, by the AUROC on
its `select` donors 101 and 1256. Cost: about an hour on two busy cores, and 7 GB of store.

`cells` prepares the data sets, `runs` has the recipes, `measures` the figures, and `page` writes docs/findings.md.
"""
