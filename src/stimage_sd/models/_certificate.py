"""Certificate of a fitted model: what it can be trusted with, measured on sections that it was not trained on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stimage_sd._page import Block, as_page, as_text, write_page

#: key of a model's record of training
KEY = "certificate"
#: genes in the table of a card
_N_BEST = 15
#: significant digits in model files
_DIGITS = 6
_LABELS = {
    "n_tiles": "tiles", "exposure": "depth", "ood_share": "tiles unlike training", "pearson": "Pearson",
    "coverage": "90 % interval covers", "nll": "NLL", "nll_floor": "NLL, mean-only", "q_value": "q-value",
    "steps": "steps", "calibration": "PIT distance", "shift": "log2 shift",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Certificate:
    """What a model can be trusted with, measured on sections that it was not trained on.

    Made by `stimage_sd.tl.certify` and kept by the model (``model.certificate``). Jupyter shows it as a card.

    Attributes
    ----------
    genes
        One row per gene of the model. Columns: ``gene``; ``pearson``, mean over sections; ``n_sections``, sections
        where the gene was measured and varies; ``p_value`` and ``q_value`` of the correlation, by permutation;
        ``predictable``, whether the q-value is small enough; ``steps``, the smallest neighborhood in steps between
        spots at which the correlation is reliable, 0 for single spots, NaN for none; ``coverage`` of 90 % intervals;
        ``calibration``, the largest distance of the probability integral transform from uniform; ``nll`` and
        ``nll_floor``, the negative log-likelihood per count of the model and of the mean-only fit; ``shift``, log2 of
        the observed over the expected total of the gene.
    sections
        One row per section: ``section``, ``patient``, ``n_tiles``, ``exposure`` (depth relative to training),
        ``ood_share`` (share of tiles farther from the training tiles than 95 % of these), and mean scores.
    pit
        Density of the probability integral transform in ten bins, ``float64 (10,)``. All 1 if distributions are
        correct.
    about
        What was certified and how: description of the model, its training sections and patients, ``q``, ``reliable``,
        ``n_permutations``, ``method`` and ``step_um``, the distance between spots.
    """

    genes: pd.DataFrame
    sections: pd.DataFrame
    pit: np.ndarray
    about: Mapping[str, Any]

    @property
    def predictable(self) -> list[str]:
        """Names of the predictable genes, best gene first."""
        chosen = self.genes[self.genes["predictable"]].sort_values("pearson", ascending=False)
        return chosen["gene"].tolist()

    def card(self) -> str:
        """Return the card as Markdown text, without its figure."""
        return as_text(_blocks(self))

    def page(self) -> str:
        """Return the card as an HTML page with its figure."""
        return as_page(_blocks(self))

    def write(self, path: str | Path) -> Path:
        """Write the card with its figure to one file.

        Parameters
        ----------
        path
            File to write. ``.html``: one page with the figure inside. ``.md``: Markdown, with the figure in a PNG
            file beside it. Existing files are replaced.

        Returns
        -------
        The path.

        Raises
        ------
        ValueError
            If the path has another suffix.
        """
        return write_page(path, _blocks(self))

    def _repr_html_(self) -> str:
        return "\n".join(block.html() for block in _blocks(self))

    def __repr__(self) -> str:
        return f"Certificate: {_verdict(self)}"

    def content(self) -> dict[str, Any]:
        """Return the certificate as plain values for JSON."""
        return {
            "genes": _columns(self.genes),
            "sections": _columns(self.sections),
            "pit": [float(f"{value:.{_DIGITS}g}") for value in self.pit],
            "about": dict(self.about),
        }

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Certificate:
        """Build a certificate from what `content` returned."""
        genes, sections = (pd.DataFrame(content[name]) for name in ("genes", "sections"))
        genes = genes.astype({str(name): float for name in genes if name not in ("gene", "predictable")})
        return cls(genes, sections.fillna({"patient": ""}), np.asarray(content["pit"], float), dict(content["about"]))


class Certified:
    """Base class of models that can hold a certificate in their record of training."""

    training: dict[str, Any]

    @property
    def certificate(self) -> Certificate | None:
        """What the model can be trusted with (`stimage_sd.tl.certify`), `None` if nobody measured it."""
        content = self.training.get(KEY)
        return None if content is None else Certificate.of(content)


def without_certificate(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of training for a changed model, to which its certificate no longer applies."""
    return {name: value for name, value in training.items() if name != KEY}


def _columns(frame: pd.DataFrame) -> dict[str, list[Any]]:
    return {str(name): [_plain(value) for value in frame[name].tolist()] for name in frame}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
    return value


# --------------------------------------------------------------------------------------------------
# the card


def _blocks(certificate: Certificate) -> Iterator[Block]:
    about, sections = certificate.about, certificate.sections
    yield Block(f"Certificate of a model of {len(certificate.genes):,} genes", is_heading=True)
    model = ", ".join(f"{name} {value}" for name, value in about["model"].items() if isinstance(value, str | int))
    yield Block(
        f"Model: {model}. Trained on {_named(about['trained_on'], about['trained_patients'])}. Tested on "
        f"{_named(sections['section'].tolist(), sections['patient'].tolist())}, not used for training."
    )
    yield Block(f"{_verdict(certificate)}.")
    yield from (Block(text) for text in _limits(certificate))
    yield Block("Correlation, calibration and scale of the genes", figure=partial(_picture, certificate))
    yield Block(table=_formatted(sections))
    best = certificate.genes.sort_values("pearson", ascending=False).head(_N_BEST)
    yield Block(f"The {len(best)} genes of highest correlation:")
    columns = ["gene", "pearson", "q_value", "steps", "coverage", "calibration", "nll", "nll_floor", "shift"]
    yield Block(table=_formatted(best[columns]))
    yield Block(
        f"Pearson correlation of log1p. The q-value is of up to {about['n_permutations']:,} permuted maps "
        f"({about['method']}), by Benjamini and Hochberg. Steps: radius of the smallest neighborhood at which the "
        f"correlation is {about['reliable']:g} or more{_step(about)}. PIT distance: 0 for correct distributions. Log2 "
        "shift: observed over expected total of the gene at the depth of the section."
    )


def _verdict(certificate: Certificate) -> str:
    genes, q = certificate.genes, certificate.about["q"]
    known = genes[genes["predictable"]]
    text = f"{len(known):,} of {len(genes):,} genes are predictable (q-value at most {q:g})"
    if not len(known):
        return text
    single = int((known["steps"] == 0).sum())
    return (
        f"{text}, with a median correlation of {known['pearson'].median():.2f}. {single:,} are reliable at single spots"
    )


def _limits(certificate: Certificate) -> Iterator[str]:
    """Say what the certificate does not show."""
    sections, trained = certificate.sections, set(certificate.about["trained_patients"])
    known = [patient for patient in sections["patient"] if patient]
    if len(known) < len(sections) or not trained:
        yield "Patients are not all known, so the card does not say how the model does on other patients."
    elif set(known) <= trained:
        yield "All tested sections are of patients in the training data. The card says nothing on other patients."
    if (sections["ood_share"] > 0.5).any():
        named = ", ".join(sections.loc[sections["ood_share"] > 0.5, "section"])
        yield f"Most tiles of {named} are unlike the training tiles."
    covered = sections["coverage"].dropna()
    if len(covered) and (covered < 0.85).any():
        yield f"90 % intervals covered only {covered.min():.0%} of the counts of a section. They are too narrow."


def _named(sections: list[str], patients: list[str]) -> str:
    of = sorted({patient for patient in patients if patient})
    return ", ".join(sections) + (f" (patient{'s' if len(of) > 1 else ''} {', '.join(of)})" if of else "")


def _step(about: Mapping[str, Any]) -> str:
    return f", in steps of {about['step_um']:.0f} µm between spots" if about.get("step_um") else ""


def _formatted(frame: pd.DataFrame) -> pd.DataFrame:
    shown = frame.copy()
    for name in shown:
        if name in ("ood_share", "coverage"):
            shown[name] = [f"{value:.0%}" if pd.notna(value) else "-" for value in shown[name]]
        elif name in ("n_tiles", "steps"):
            shown[name] = [f"{int(value)}" if pd.notna(value) else "-" for value in shown[name]]
        elif pd.api.types.is_float_dtype(shown[name]):
            shown[name] = [f"{value:.3g}" if pd.notna(value) else "-" for value in shown[name]]
    return shown.rename(columns=_LABELS)


def _picture(certificate: Certificate) -> bytes:
    """Draw the distribution of correlations, the probability integral transform and the scales, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=110)
    correlation, pit, scale = figure.subplots(1, 3)
    genes = certificate.genes
    known = genes["pearson"].notna()
    bins = np.linspace(min(-0.1, genes["pearson"].min()) if known.any() else -0.1, 1, 40)
    groups = [genes.loc[known & (genes["predictable"] == flag), "pearson"] for flag in (True, False)]
    labels = [f"predictable ({len(groups[0]):,})", f"not ({len(groups[1]):,})"]
    correlation.hist(groups, bins=bins, stacked=True, color=["#1f77b4", "#c7c7c7"], label=labels)
    correlation.set(xlabel="Pearson correlation with the counts", ylabel="genes", title="accuracy on new sections")
    correlation.legend(frameon=False)
    pit.axhline(1, color="gray", linestyle="--", linewidth=1)
    pit.stairs(certificate.pit, np.linspace(0, 1, len(certificate.pit) + 1), color="#1f77b4", linewidth=2)
    pit.set(xlabel="predicted probability of a smaller count", ylabel="density", title="calibration", xlim=(0, 1))
    pit.set_ylim(0, max(2.0, 1.1 * float(certificate.pit.max())))
    scales, reliable = certificate.about["scales"], certificate.about["reliable"]
    counts = [int((genes["steps"] == step).sum()) for step in scales]
    names = ["one spot", *(f"{step} step{'s' if step > 1 else ''}" for step in scales[1:]), "none"]
    colors = ["#1f77b4"] * len(scales) + ["#c7c7c7"]
    scale.bar_label(scale.bar(range(len(names)), [*counts, len(genes) - sum(counts)], color=colors))
    scale.set_xticks(range(len(names)), names)
    scale.set(xlabel="smallest neighborhood", ylabel="genes", title=f"scale of a correlation of {reliable:g}")
    for ax in (correlation, pit, scale):
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
