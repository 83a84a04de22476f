"""``python -m zokern.bench``: each operation beside what users would run instead, in one run."""
