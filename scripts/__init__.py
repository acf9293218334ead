"""Programs that set up, test, measure and draw. Run them from the root of the repository: `python -m scripts.NAME`."""
