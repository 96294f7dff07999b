"""The study behind docs/steering.md: experiments that steer real cells.

    python docs/studies/steering.py --data $SCSAE_DATA --store ROOT --out docs

1. Kang et al. 2018: stimulated cells to control, and control cells to stimulated, on donors that nothing was chosen on.
2. sc_mixology: batches taken away, cell lines kept, on cells that nothing was chosen on.
3. CTCL skin: cells of patients to those of healthy donors, one donor of each side left out.
4. sc_mixology, and CTCL skin with its donors as batches: which kind of edit mixes batches.
Each is run with several SAEs (other seeds, and other donors or cells held out); `--only NAME` runs one experiment.
"""
