"""Published networks that the baseline recipes use."""
