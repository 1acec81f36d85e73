"""Predict cohorts of slides, and compare with bulk RNA, survival and drug response."""
