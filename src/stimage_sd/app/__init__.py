"""Web app that shows sections, predictions and explained tiles in a browser, with Streamlit (extra ``app``)."""

from __future__ import annotations
