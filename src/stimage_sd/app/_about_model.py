"""What a model is, what it was trained on, and what it can be trusted with, as Markdown."""

from __future__ import annotations

from typing import Any

import pandas as pd

from stimage_sd.models._facts import facts_of


def about_model(model: Any) -> pd.DataFrame:
    """Describe a model's input, training and members.

    Parameters
    ----------
    model
        An ensemble or a fine-tuned model.

    Returns
    -------
    Columns ``what`` and ``value``, with texts. Only what the model file states is listed.
    """
    # the page shows the certificate by itself
    facts = {name: value for name, value in facts_of(model).items() if name != "certificate"}
    return pd.DataFrame([(name.capitalize(), value) for name, value in facts.items()], columns=["what", "value"])


#: columns of the certificate's genes that are shown, and their names on the page
GENE_COLUMNS = {
    "gene": "gene", "predictable": "predictable", "pearson": "correlation", "q_value": "q-value",
    "coverage": "90 % interval covers", "n_sections": "sections",
}  # fmt: skip
SECTION_COLUMNS = {
    "section": "section", "patient": "patient", "n_tiles": "tiles", "ood_share": "unlike training",
    "pearson": "mean correlation", "coverage": "90 % interval covers",
}  # fmt: skip


def certificate_tables(certificate: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the genes of a certificate, best first, and the sections that the model was tested on."""
    genes = certificate.genes.sort_values(["predictable", "pearson"], ascending=False, kind="stable")
    return _shown(genes, GENE_COLUMNS), _shown(certificate.sections, SECTION_COLUMNS)


def certificate_words(certificate: Any) -> list[str]:
    """Return the verdict of a certificate and what it does not show, from its card without tables and notes."""
    paragraphs = [text for text in certificate.card().split("\n\n") if not text.startswith(("#", "|"))]
    # the description of the model comes first, the best genes and notes on the scores come last
    notes = (number for number, text in enumerate(paragraphs) if text.startswith("The ") and text.endswith(":"))
    last = next(notes, len(paragraphs))
    return paragraphs[1:last]


def certificate_page(certificate: Any) -> bytes:
    """Return the card of a certificate with its figure as one HTML page."""
    return certificate.page().encode()


def _shown(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    known = {name: label for name, label in columns.items() if name in frame}
    return frame[list(known)].rename(columns=known).round(3)


def outside_words(is_outside: Any) -> tuple[str, bool]:
    """Say how many tiles are unlike the training tiles.

    Parameters
    ----------
    is_outside
        ``bool (n_tiles,)``.

    Returns
    -------
    The words, and whether they are a warning: more than a fifth of the tiles, four times the share that the training
    tiles have by definition.
    """
    n_tiles, n_outside = len(is_outside), int(is_outside.sum())
    if n_tiles == 1:
        words = "The tile is unlike the training tiles." if n_outside else "The tile is like the training tiles."
        return words, bool(n_outside)
    if n_outside == 0:
        return f"All {n_tiles:,} tiles are like the training tiles.", False
    many = n_outside > 0.2 * n_tiles
    share = f"{n_outside:,} of {n_tiles:,} tiles ({n_outside / n_tiles:.0%}) {'is' if n_outside == 1 else 'are'}"
    words = f"{share} unlike the training tiles: farther out than 95 % of the training tiles."
    if many:
        words += " Another laboratory's staining, another scanner or another tissue can be the reason. Predictions of "
        words += "these tiles have no support in the training data."
    return words, many
