"""What looks at runs and engines from outside: plots, speed, comparisons with the originals."""
