"""Score predictions against measurements."""
