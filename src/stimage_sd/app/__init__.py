"""The web app: sections, predictions and explained tiles in a browser, served by Streamlit (extra ``app``)."""

from __future__ import annotations
