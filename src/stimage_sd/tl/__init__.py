"""Tools to fit models, predict expression and evaluate predictions."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_cohort.bulk_correlation": ["BulkCorrelation", "bulk_correlation"],
        "_predict.adapt": ["adapt"],
        "_predict.cluster": ["cluster"],
        "_predict.combine": ["combine"],
        "_predict.calibrate": ["calibrate"],
        "_cohort.cox_screen": ["cox_screen"],
        "_score.certify": ["certify"],
        "_score.compare_labels": ["LabelAgreement", "compare_labels"],
        "_score.cross_validate": ["cross_validate"],
        "_cells.cross_validate_cells": ["cross_validate_cells"],
        "_cohort.drug_response": ["DrugResponse", "drug_response"],
        "_cohort.enrichment": ["enrichment"],
        "_score.evaluate": ["evaluate"],
        "_cells.evaluate_cells": ["CellScores", "evaluate_cells"],
        "_score.evaluate_genes_high": ["evaluate_genes_high"],
        "_explain.explain": ["explain"],
        "_explain.explained": ["compare_explanations", "explained_nuclei", "top_tiles"],
        "_fit.fit_baseline": ["fit_baseline"],
        "_fit.finetune_nb": ["finetune_nb"],
        "_cells.fit_cell_classifier": ["fit_cell_classifier"],
        "_fit.fit_gene_classifier": ["fit_gene_classifier"],
        "_fit.fit_nb": ["fit_nb"],
        "_predict.predict": ["predict"],
        "_predict.sample": ["sample"],
        "_cells.predict_cells": ["predict_cells"],
        "_cohort.predict_cohort": ["predict_cohort"],
        "_score.local_morans_i": ["local_morans_i"],
        "_score.pool_members": ["pool_members"],
        "_score.predictable_genes": ["predictable_genes"],
        "_cohort.pseudobulk": ["pseudobulk"],
        "_score.risk_coverage": ["risk_coverage"],
        "_cohort.risk_groups": ["RiskGroups", "risk_groups"],
        "_explain.saliency": ["saliency"],
    },
)
