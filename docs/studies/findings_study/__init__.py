"""What the features of real cells say: three questions to an SAE of the mini model, and a page with the answers.

    python docs/studies/findings.py --data $SCSAE_DATA --store ROOT --out docs

1. Which features mean which cell type? PBMC of eight donors; features are chosen on two donors and reported on others.
2. Does an SAE that never saw a stimulated cell hold a feature that tells stimulated cells? Trained on control cells,
   asked of control and IFN-beta cells of donors that it was not trained on; four folds test every donor once.
3. Are features of the protocol told from features of the cell line? Five lines in five batches of two protocols.

Each is a recipe like any user's; what is made is found again by the next call. Layer, k and pooling are the best of
those tried (layers 1 and 3, k 8 and 16, max and mean) on the control SAE of the default split, by the AUROC on its
`select` donors 101 and 1256. Cost: about an hour on two busy cores, and 7 GB of store.

cells: the data sets that are asked; runs: the recipes; answers: the figures; page: docs/findings.md.
"""
