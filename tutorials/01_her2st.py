# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From an H&E to predicted genes
#
# Train on sections of a HER2-positive breast tumour (Andersson et al. 2021, legacy Spatial Transcriptomics), predict
# another from its H&E alone, and see how far the prediction can be trusted. A few hundred genes and a small ensemble
# keep it short; the defaults are larger.

# %%
import os
import tempfile
from pathlib import Path

import spatialdata
import squidpy as sq

import stimage_sd as sti

# %% [markdown]
# ## Sections
#
# A section is one `SpatialData` object, a cohort a dictionary of them. Where the tumour's sections are not at hand,
# synthetic Visium runs take their place, in which nuclei and stroma drive the counts: all that follows is the same.

# %%
scratch = Path(tempfile.mkdtemp())
if (Path(os.environ.get("STIMAGE_SD_DATA", "")) / "her2st" / "C5").is_dir():
    cohort = {name: sti.datasets.her2st(name) for name in ("C3", "C4", "C5")}
else:
    cohort = {}
    for seed, name in enumerate(("first", "second", "third")):
        run = sti.datasets.synthetic_visium(scratch / name, n_spots=150, n_genes=60, seed=seed)
        cohort[name] = sti.io.visium(run, image=run / "image.tif", sample=name)

*training, held_out = cohort
train = {name: cohort[name] for name in training}
test = cohort[held_out]
test

# %% [markdown]
# Each has the H&E, lazily, the spots, and their raw counts.

# %%
test.tables["counts"]

# %% [markdown]
# ## Staining and tiles
#
# All sections get the staining of the first. The stains are fitted on a thumbnail; the normalised image is one more,
# lazy, element, computed where it is read. Then one tile a spot; `keep` marks those with at least 70 % tissue.

# %%
reference = sti.pp.stain_normalize(cohort, train[training[0]])
sti.pp.tile(cohort)
test.tables["tiles"].obs.head()

# %%
_ = sti.pl.tiles(test, n_examples=6)

# %% [markdown]
# ## Embeddings
#
# EfficientNet-Lite0 sees three squares around the centre of every tile, as wide as the spot, twice and four times as
# wide; the neighbours' mean stands beside. An interrupted run goes on where it stopped.

# %%
sti.pp.embed(cohort)
{key: values.shape for key, values in test.tables["tiles"].obsm.items()}

# %% [markdown]
# ## Genes and a model
#
# Highly variable genes of the training sections, and an ensemble of heads that give every gene and tile a negative
# binomial distribution. Members are validated in turn on sections that they do not train on, and stop early there.

# %%
genes = sti.pp.select_genes(train, n_top=200)
model = sti.tl.fit_nb(train, genes=genes, n_members=4)
model

# %%
_ = sti.pl.training(model)

# %% [markdown]
# ## Prediction
#
# `predict` needs no counts: tiles and embeddings are enough, and it checks that they were made as the model expects.

# %%
sti.tl.predict(test, model)
test.tables["predictions"]

# %% [markdown]
# `X` is the mean. The layer `aleatoric` is the variance that counts have by themselves, `epistemic` what the members
# of the ensemble do not agree on, and `lower` and `upper` bound the 90 % interval.
#
# ## How good is it?
#
# The test section was measured, so its counts can be compared with the prediction.

# %%
scores = sti.tl.evaluate(test)
scores.set_index("gene")[["pearson", "bivariate_morans_i", "iou", "coverage", "nll", "nll_floor"]].describe()

# %%
_ = sti.pl.scores(scores)

# %%
best = scores.sort_values("pearson", ascending=False)["gene"].iloc[0]
_ = sti.pl.prediction(test, best)

# %% [markdown]
# Where the model is unsure, and why: aleatoric and epistemic variance of the same gene; and whether its intervals
# cover what they say.

# %%
_ = sti.pl.uncertainty(test, best)

# %%
_ = sti.pl.calibration(test)

# %% [markdown]
# ## On with squidpy
#
# The predictions are an ordinary table of the section.

# %%
predictions = test.tables["predictions"]
sq.pl.spatial_scatter(predictions, color=best)

# %%
sq.gr.spatial_neighbors(predictions, coord_type="generic", n_neighs=8)
sq.gr.spatial_autocorr(predictions, mode="moran", genes=list(predictions.var_names[:20]))
predictions.uns["moranI"].head()

# %% [markdown]
# ## To disk and back
#
# The section and the model are files that hold all of it.

# %%
test.write(scratch / "section.zarr")
model.save(scratch / "breast.stimage")

again = spatialdata.read_zarr(scratch / "section.zarr")
sti.tl.predict(again, sti.models.load(scratch / "breast.stimage"))
float(abs(again.tables["predictions"].X - test.tables["predictions"].X).max())
