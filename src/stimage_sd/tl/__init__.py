"""Tools: fit, predict, evaluate; one file a task."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_bulk_correlation": ["BulkCorrelation", "bulk_correlation"],
        "_cluster": ["cluster"],
        "_combine": ["combine"],
        "_conformal": ["calibrate"],
        "_cox_screen": ["cox_screen"],
        "_cross_validate": ["cross_validate"],
        "_cross_validate_cells": ["cross_validate_cells"],
        "_drug_response": ["DrugResponse", "drug_response"],
        "_enrichment": ["enrichment"],
        "_evaluate": ["evaluate"],
        "_evaluate_cells": ["CellScores", "evaluate_cells"],
        "_evaluate_genes_high": ["evaluate_genes_high"],
        "_explain": ["explain"],
        "_explained": ["compare_explanations", "explained_nuclei", "top_tiles"],
        "_fit_baseline": ["fit_baseline"],
        "_finetune_nb": ["finetune_nb"],
        "_fit_cell_classifier": ["fit_cell_classifier"],
        "_fit_gene_classifier": ["fit_gene_classifier"],
        "_fit_nb": ["fit_nb"],
        "_predict": ["predict"],
        "_predict_cells": ["predict_cells"],
        "_predict_cohort": ["predict_cohort"],
        "_predictable_genes": ["predictable_genes"],
        "_pseudobulk": ["pseudobulk"],
        "_risk_coverage": ["risk_coverage"],
        "_risk_groups": ["RiskGroups", "risk_groups"],
        "_saliency": ["saliency"],
    },
)
